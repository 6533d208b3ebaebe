"""The tree keeps the rules of the house; each rule catches the fault it is for."""
import json
import shutil
import subprocess
import sys

import pytest

import house
from house import ROOT


@pytest.mark.parametrize("rule", house.RULES, ids=lambda r: r.__name__)
def test_the_tree_keeps_the_rule(rule):
    assert rule(ROOT) == []


@pytest.fixture
def tree(tmp_path):
    "A copy of the tree to plant a fault in."
    for name in ("nbs", "anomaly_nb", "README_files"):
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "CONTRIBUTING.md"): shutil.copy(ROOT/name, tmp_path/name)
    return tmp_path


def edit(path, change):
    "Loads a notebook, lets `change` alter it, writes it back."
    nb = json.loads(path.read_text(encoding="utf-8"))
    change(nb)
    path.write_text(json.dumps(nb), encoding="utf-8")


def chapter(tree, module):
    return next(p for p in house.notebooks(tree) if house.default_exp(p) == module)


def add_code(nb, text, tags=()):
    nb["cells"].append({"cell_type": "code", "id": "planted", "metadata": {"tags": list(tags)} if tags else {}, "source": text, "outputs": [], "execution_count": None})


def only(problems, words):
    assert len(problems) == 1 and words in problems[0], problems


def test_catches_an_import_from_an_upper_floor(tree):
    with open(tree/"anomaly_nb"/"arrays.py", "a") as f: f.write("\nfrom anomaly_nb.models.vae import VAE\n")
    only(house.floors(tree), "arrays: imports models.vae")


def test_catches_siblings_importing_each_other_even_inside_a_function(tree):
    with open(tree/"anomaly_nb"/"metrics"/"detection.py", "a") as f: f.write("\ndef f():\n    import anomaly_nb.data.records\n")
    only(house.floors(tree), "metrics.detection: imports data.records")


def test_catches_a_relative_import_upwards(tree):
    with open(tree/"anomaly_nb"/"metrics"/"detection.py", "a") as f: f.write("\nfrom ..models.vae import VAE\n")
    only(house.floors(tree), "metrics.detection: imports models.vae")


def test_catches_a_module_on_no_floor(tree):
    (tree/"anomaly_nb"/"utils.py").write_text("x = 1\n")
    only(house.floors(tree), "utils: stands on no floor")
    only(house.no_orphan_module(tree), "utils.py")


def test_catches_a_heavy_import_in_the_command_line(tree):
    with open(tree/"anomaly_nb"/"cli.py", "a") as f: f.write("\nimport torch\n")
    only(house.light_imports(tree), "cli: imports torch")


def test_catches_two_notebooks_for_one_module(tree):
    path = chapter(tree, "arrays")
    shutil.copy(path, path.with_name("011_arrays.ipynb"))
    only(house.one_notebook_a_module(tree), "as 010_arrays.ipynb does")


def test_catches_a_module_in_another_place_than_its_notebook(tree):
    path = chapter(tree, "models.vae")
    shutil.move(path, tree/"nbs"/path.name)
    only(house.one_notebook_a_module(tree), "its place says vae")


def test_catches_an_exporting_experiment(tree):
    edit(tree/"nbs"/"experiments"/"evaluate.ipynb", lambda nb: add_code(nb, "#| export\nx = 1"))
    only(house.one_notebook_a_module(tree), "is no chapter")


def test_catches_an_export_without_default_exp(tree):
    edit(chapter(tree, "arrays"), lambda nb: nb["cells"].pop(1))
    only(house.one_notebook_a_module(tree), "has no default_exp")


def test_catches_a_library_that_is_not_exported(tree):
    edit(chapter(tree, "arrays"), lambda nb: add_code(nb, "#| export\ndef planted(): return 1"))
    only(house.library_is_fresh(tree), "arrays: differs")


def test_catches_a_lost_parameters_tag(tree):
    def lose(nb):
        for c in nb["cells"]: c["metadata"].pop("tags", None)
    edit(tree/"nbs"/"experiments"/"evaluate.ipynb", lose)
    only(house.parameters_tags(tree), "0 cells tagged")


def test_catches_an_untyped_parameter(tree):
    def add(nb): next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))["source"] += "\nplanted = 3  # no type"
    edit(tree/"nbs"/"experiments"/"evaluate.ipynb", lambda nb: [c.update(source="".join(c["source"])) for c in nb["cells"]] and add(nb))
    only(house.parameters_tags(tree), "planted")


def test_catches_an_experiment_that_defines(tree):
    edit(tree/"nbs"/"experiments"/"evaluate.ipynb", lambda nb: add_code(nb, "def planted(): return 1"))
    only(house.experiments_define_nothing(tree), "defines planted")


def test_catches_a_notebook_too_large(tree):
    edit(chapter(tree, "core"), lambda nb: nb["cells"].append({"cell_type": "markdown", "id": "planted", "metadata": {}, "source": "x" * house.LIMIT}))
    only(house.sizes(tree), "000_core.ipynb")


def test_catches_two_notebooks_of_one_name(tree):
    shutil.copy(chapter(tree, "arrays"), tree/"nbs"/"data"/"010_arrays.ipynb")
    only(house.unique_names(tree), "same name")


def test_catches_a_cell_that_is_not_evaluated(tree):
    edit(chapter(tree, "arrays"), lambda nb: add_code(nb, "#| eval: false\n1/0"))
    only(house.opening(tree), "not evaluated")


def test_catches_a_cell_that_may_fail(tree):
    edit(chapter(tree, "arrays"), lambda nb: add_code(nb, "1/0", ["raises-exception"]))
    only(house.opening(tree), "is no exercise")


def test_catches_a_chapter_without_its_one_line(tree):
    edit(chapter(tree, "arrays"), lambda nb: nb["cells"][0].update(source="# Arrays"))
    only(house.opening(tree), "does not open with")


def test_catches_stale_outputs(tree):
    edit(chapter(tree, "arrays"), lambda nb: add_code(nb, "1 + 1"))
    only(house.outputs_fresh(tree), "010_arrays.ipynb: stored outputs are stale")


def test_catches_other_pinned_versions(tree):
    with open(tree/"constraints.txt", "a") as f: f.write("planted==1\n")
    assert len(house.outputs_fresh(tree)) == sum(map(house.keeps_outputs, house.notebooks(tree)))


def test_catches_a_machine_path_in_an_output(tree):
    def show(nb): next(c for c in nb["cells"] if c.get("outputs"))["outputs"].append({"output_type": "stream", "name": "stdout", "text": ["/home/someone/runs\n"]})
    edit(chapter(tree, "core"), show)
    only(house.outputs_without_paths(tree), "names /home/someone")


def test_catches_a_readme_edited_by_hand(tree):
    with open(tree/"README.md", "a") as f: f.write("\nplanted\n")
    only(house.readme_from_index(tree), "README.md")


def test_cleaning_keeps_the_parameters_tag(tree):
    "nbdev-clean drops cell metadata it does not know; papermill would then run with the defaults and exit 0."
    subprocess.run([str(house.Path(sys.executable).parent/"nbdev-clean")], cwd=tree, check=True, capture_output=True)
    assert house.parameters_tags(tree) == []
    assert house.outputs_fresh(tree) == []


@pytest.mark.parametrize("words, missing", [("**You need**", "without **You need**"), ("**Next:**", "**Next:**"), ("\n3. ", "2 answers"), ("## What goes wrong", "What goes wrong")])
def test_catches_a_chapter_that_does_not_open_or_close(tree, words, missing):
    def lose(nb):
        cell = next(c for c in reversed(nb["cells"]) if c["cell_type"] == "markdown" and words in "".join(c["source"]))
        before, _, after = "".join(cell["source"]).rpartition(words)
        cell["source"] = before + "\n" + after
    edit(chapter(tree, "models.checkpoints"), lose)
    only(house.opens_and_closes(tree), missing)


def test_catches_a_dead_link(tree):
    edit(chapter(tree, "arrays"), lambda nb: nb["cells"].append({"cell_type": "markdown", "id": "planted", "metadata": {}, "source": "see [nowhere](999_nothing.ipynb#here)"}))
    only(house.links(tree), "nothing at 999_nothing.ipynb")


def test_catches_a_trained_network_that_nobody_loads(tree):
    (tree/"nbs"/"checkpoints").mkdir(exist_ok=True)
    (tree/"nbs"/"checkpoints"/"planted.safetensors").write_bytes(b"x")
    assert {w for p in house.checkpoints_used(tree) for w in ("no notebook loads it", "README.md does not name it") if "planted" in p and w in p} == {"no notebook loads it", "README.md does not name it"}


def test_catches_networks_that_weigh_too_much(tree):
    (tree/"nbs"/"checkpoints").mkdir(exist_ok=True)
    with open(tree/"nbs"/"checkpoints"/"planted.safetensors", "wb") as f: f.truncate(11_000_000)
    assert any("10 at most" in p for p in house.checkpoints_used(tree))
