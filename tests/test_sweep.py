"""A sweep file is read like a contract; one data set or run that breaks costs no other; what is done stays done."""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from anomaly_nb import batch, catalog, experiment, parameters, runner, sweep
from anomaly_nb.core import DataError, InputError
from house import ROOT, modules
from test_cli import call
from test_faults import WRITE, experiments, notebook  # noqa: F401 (experiments is a fixture)


def file(folder, text, name="mine.yaml"):
    (folder/name).write_text(text, encoding="utf-8")
    return folder/name


# --- reading -----------------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, said", [
    ("", "is empty"),
    ("- model: vae", "is a list"),
    ("vae", "is a str"),
    ("grid: {seed: [0, 1]\nruns: []", "line 2: is not YAML"),
    ("grid:\n\tseed: [0]", "is not YAML"),
    ("grid: !!python/object/apply:os.system ['true']", "is not YAML"),
    ("grid: {seed: [0], seed: [1]}", "'seed' stands twice"),
    ("fixed: {}\nfixed: {}\ngrid: {seed: [0]}", "'fixed' stands twice"),
    ("grid: {seed: 2024-13-45}", "is not YAML"),
    ("[" * 3000, "is not YAML"),
    ("gird: {seed: [0]}", "did you mean 'grid'?"),
    ("1: 2", "there is no 1"),
    ("experiment: evalute\ngrid: {seed: [0]}", "did you mean 'evaluate'?"),
    ("experiment: [evaluate]\ngrid: {seed: [0]}", "experiment"),
    ("fixed: {model: ae}", "names no runs"),
    ("grid: {}", "grid: is empty"),
    ("grid:", "grid: is empty"),
    ("grid: [1]", "grid: is a list"),
    ("grid: {seed: []}", "grid: seed: is an empty list"),
    ("grid: {seed: 1}", "grid: seed: is 1; expected: a list"),
    ("grid: {sead: [1]}", "did you mean 'seed'?"),
    ("grid: {seed: [0, 1, one]}", "grid: seed, value 3: parameter seed: is 'one'"),
    ("grid: {seed: [0, [1]]}", "grid: seed, value 2"),
    ("grid: {seed: [0, null]}", "grid: seed, value 2"),
    ("grid: {seed: [0, 1.5]}", "grid: seed, value 2"),
    ("grid: {seed: [0, true]}", "grid: seed, value 2"),
    ("grid: {max_seconds: [10, .nan]}", "grid: max_seconds, value 2"),
    ("grid: {model: [ae, vea]}", "grid: model, value 2: model: there is no 'vea'; expected: did you mean 'vae'?"),
    ("grid: {out: [a, b]}", "the runner gives each run its folder"),
    ("grid: {model: [ae, random], model_options: [latent=8]}", "random latent=8): model_options".replace("):", ":")),
    ("fixed: {seed: [1, 2]}\ngrid: {epochs: [1]}", "fixed: seed: is a list"),
    ("fixed: {seed: 1}\ngrid: {seed: [1, 2]}", "stands in fixed and in grid"),
    ("fixed: 3\ngrid: {seed: [1, 2]}", "fixed: is a int"),
    ("runs: []", "runs: is no list or an empty one"),
    ("runs: {model: ae}", "runs: is no list"),
    ("runs: [ae]", "runs, entry 1: is a str"),
    ("runs: [{model: ae}, {modell: ae}]", "runs, entry 2: parameter: there is no 'modell'"),
    ("runs: [{model: ae}, {model: random, model_options: latent=8}]", "runs, entry 2"),
    ("runs: [{dims: 4, model: ae}]", "dims: is 4"),
    ("grid: {seed: [1]}\nreport: ../mine", "report: is '../mine'"),
    ("grid: {seed: [1]}\nreport: 3", "report: is 3"),
    ("grid: {seed: &a [1,2,3,4,5,6,7,8,9,0], epochs: *a, batch_size: *a, max_seconds: *a}", "asks for 10000 runs"),
])
def test_a_wrong_file_is_refused_with_its_place(tmp_path, text, said):
    path = file(tmp_path, text)
    with pytest.raises(InputError) as caught: sweep.read_sweep(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match="none.yaml: cannot be read"): sweep.read_sweep(tmp_path/"none.yaml")
    with pytest.raises(InputError, match="cannot be read"): sweep.read_sweep(tmp_path)
    (tmp_path/"latin.yaml").write_bytes("grid: {data_options: [größe]}".encode("latin-1"))
    with pytest.raises(InputError, match="latin.yaml: is not text in UTF-8"): sweep.read_sweep(tmp_path/"latin.yaml")
    (tmp_path/"zero.yaml").write_bytes(b"grid: \x00\x01")
    with pytest.raises(InputError, match="zero.yaml"): sweep.read_sweep(tmp_path/"zero.yaml")


def test_an_entry_lies_over_grid_and_grid_over_fixed(tmp_path):
    plan = sweep.read_sweep(file(tmp_path, """
fixed: {size: tiny, max_seconds: 1e1, epochs: 7}
grid: {seed: [0, 1, 2], batch_size: [8, "16"]}
runs:
  - {model: [ae, vae]}
  - {model: random, seed: 5, epochs: [1, 2]}
"""))
    got = {(p["model"], p["seed"], p["batch_size"], p["epochs"], p["max_seconds"]) for p in (r.parameters for r in plan.runs)}
    wanted = {(m, s, b, 7, 10.0) for m in ("ae", "vae") for s in (0, 1, 2) for b in (8, 16)} | {("random", 5, b, e, 10.0) for b in (8, 16) for e in (1, 2)}
    assert got == wanted and len(plan.runs) == len(wanted) and plan.repeated == 0
    assert all(type(r.parameters["max_seconds"]) is float and r.parameters["size"] == "tiny" for r in plan.runs)
    assert len({r.name for r in plan.runs}) == len(plan.runs)      # people can tell them apart


def test_runs_said_twice_are_counted_once(tmp_path):
    plan = sweep.read_sweep(file(tmp_path, "runs: [{model: ae}, {model: [ae, vae], seed: 0}, {model: vae, max_seconds: '0.0'}]"))
    assert ([r.parameters["model"] for r in plan.runs], plan.repeated) == (["ae", "vae"], 2)


def test_the_shipped_sweeps_are_right():
    for path in sorted((ROOT/"sweeps").glob("*.yaml")):
        plan = sweep.read_sweep(path)
        assert plan.repeated == 0, path
        if plan.then: continue                                                  # what counts is the second part: a table with a row of chance, a correlation
        baselines = {name for r in plan.first for name in (r.parameters.get("model", ""), *str(r.parameters.get("baselines", "")).split("+"))} & {"random", "intensity", "trivial", "pca", "mean"}
        assert len(baselines) >= 2, f"{path}: no number means much without baselines"


def test_all_methods_are_all_methods():
    plan = sweep.read_sweep(ROOT/"sweeps"/"all-methods.yaml")
    assert sorted(r.parameters["model"] for r in plan.runs) == sorted(name for name in catalog.MODELS if name != "spine")


def test_included_sweeps_keep_their_second_parts_and_the_last_gets_all(two_parts, tmp_path):
    file(tmp_path, "experiment: works\ngrid: {n: [1, 2]}\nthen: {experiment: sums}", "one.yaml")
    file(tmp_path, "experiment: works\ngrid: {n: [2, 3]}", "two.yaml")
    path = file(tmp_path, "include: [one.yaml, two.yaml]\nthen: {experiment: sums, fixed: {k: 2}}", "all.yaml")
    plan, runs = sweep.prepare(sweep.read_sweep(path)), tmp_path/"runs"
    assert len(plan.first) == 3 and len(plan.every) == 5 and plan.parts[0].runs[1] is plan.parts[1].runs[0] and all(r.key for r in plan.first)      # n=2 stands in both files and is one run
    batch.execute_all(plan.first, runs, processes=2)
    batch.execute_all(sweep.follow(plan.parts[0], runs).then, runs)
    assert len(plan.parts[0].then[0].parameters["inputs"].split(",")) == 2
    batch.execute_all(sweep.follow(plan, runs).then, runs)
    assert plan.then[0].status == "done" and len(plan.then[0].parameters["inputs"].split(",")) == 4


@pytest.mark.parametrize("text, said", [("include: []\n", "is no list of file names"), ("include: one.yaml", "is no list of file names"), ("include: [gone.yaml]", "gone.yaml: cannot be read"), ("include: [me.yaml]", "one level of files"),
                                        ("seeds: x", "seeds: is 'x'"), ("seeds: 2\ngrid: {seed: [1]}", "stands in grid and in seeds"), ("zip: {seed: [1, 2], epochs: [1]}", "different lengths (seed 2, epochs 1)"), ("seeds: 0", "is an empty list"),
                                        ("seeds: 2\nexclude: [{seed: 7}]", "exclude, entry 1: meets no run"), ("seeds: 2\nexclude: [{seed: [0, 1]}]", "leaves no run"), ("seeds: 2\nexclude: []", "exclude: is no list or an empty one"), ("seeds: 2\nexclude: [{modle: ae}]", "did you mean 'model'?")])
def test_short_forms_are_refused_with_their_place(tmp_path, text, said):
    path = file(tmp_path, text, "me.yaml")
    with pytest.raises(InputError) as caught: sweep.read_sweep(path)
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_task_folds_are_all_there():
    "5 + 10 + 10 + 5 networks for each of three seeds, and a table for each seed of the same data."
    plan = sweep.read_sweep(ROOT/"sweeps"/"task_folds.yaml")
    folds = {(r.parameters["trained"], r.parameters["fold"], r.parameters["seed"]) for r in plan.runs}
    assert folds == {(t, f, s) for t, n in ((1, 5), (2, 10), (3, 10), (4, 5)) for f in range(n) for s in range(3)} and len(plan.runs) == 90
    assert [r.parameters["seed"] for r in plan.then] == [0, 1, 2] and {r.experiment for r in plan.then} == {"task_table"}
    assert {tuple(r.parameters[k] for k in ("dataset", "size", "contrast", "dims")) for r in plan.runs + plan.then} == {("brain", "coarse", "T2", 2)}
    taste = sweep.read_sweep(ROOT/"sweeps"/"task_folds.yaml", {"size": "tiny", "max_seconds": "10", "seed": "0"})
    assert (len(taste.runs), len(taste.then)) == (30, 1) and {r.parameters["size"] for r in taste.runs + taste.then} == {"tiny"}


# --- the key ---------------------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["models.vae", "models.fit", "evaluation", "data.brain"])
def test_the_key_follows_imports_as_python_does(name):
    "Independent truth: the modules of this library that a fresh Python has after the import."
    code = f"import sys, anomaly_nb.{name}; print(*[m for m in sys.modules if m.startswith('anomaly_nb.')])"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    known = {f"anomaly_nb.{m}" for m in modules(ROOT)}
    assert loaded & known <= set(parameters.imported_modules(f"import anomaly_nb.{name}"))
    assert len(loaded & known) > 3


def test_a_path_is_no_part_of_the_key_and_reaches_the_kernel_whole(experiments, tmp_path, monkeypatch):
    notebook(experiments/"reads.ipynb", ["import json, pathlib\npathlib.Path(out, 'metrics.json').write_text(json.dumps({'path': path}))"], 'out: str = ""  # folder\npath: str = ""  # data')
    (tmp_path/"scans").mkdir()
    monkeypatch.chdir(tmp_path)
    run = runner.execute(runner.Run("reads", {"path": "scans"}), tmp_path/"runs")
    assert json.loads((run.folder/"metrics.json").read_text())["path"] == str(tmp_path/"scans")
    assert json.loads((run.folder/"params.json").read_text())["parameters"]["path"] == "scans"
    assert runner.execute(runner.Run("reads", {"path": str(tmp_path/"scans")}), tmp_path/"runs").status == "cached"
    with pytest.raises(InputError, match="there is nothing at scans/no"): runner.execute(runner.Run("reads", {"path": "scans/no"}), tmp_path/"runs")


def test_other_data_at_the_same_path_are_another_run(monkeypatch):
    values = parameters.check_parameters(parameters.experiment_path("evaluate"), {"dataset": "brain"})
    key = lambda contents: parameters.run_key(parameters.experiment_path("evaluate"), values, contents)
    before = parameters.data_hash(values)
    records = experiment.load_records("brain", "tiny", "FLAIR")
    for change in ({"label": 1 - records["test"][0].label}, {"meta": records["test"][0].meta | {"family": "other"}}, {"mask": None}):
        from dataclasses import replace
        other = records | {"test": [replace(records["test"][0], **change), *records["test"][1:]]}
        monkeypatch.setattr(experiment, "load_records", lambda *a, **k: other)
        if change == {"mask": None} and not records["test"][0].mask: continue
        assert key(parameters.data_hash(values)) != key(before), change


def test_options_are_refused_before_a_kernel_starts():
    check = lambda **given: parameters.check_parameters(parameters.experiment_path(given.pop("experiment", "evaluate")), given)
    with pytest.raises(InputError, match="did you mean 'erode'"): check(postprocess="erod=1")
    with pytest.raises(InputError, match="an odd number"): check(postprocess="median=4")
    assert check(postprocess="erode=1 median=3")["postprocess"] == "erode=1 median=3"
    assert check(experiment="ct_pretext", model_options="latent=8")["model_options"] == "latent=8"     # of several networks: there is no parameter model
    with pytest.raises(InputError, match="there is no model"): check(model="", model_options="latent=8")


def test_a_subject_in_two_pools_is_said_before_a_kernel_starts(monkeypatch):
    records = experiment.load_records("brain", "tiny", "FLAIR")
    monkeypatch.setattr(experiment, "load_records", lambda *a, **k: records | {"val": [*records["val"], records["train"][0]]})
    with pytest.raises(DataError, match="share 1 subject"): parameters.data_hash({"dataset": "brain"})


# --- data once -----------------------------------------------------------------------------------------------------------------------------------------------------------

TOY = 'out: str = ""  # folder\ndataset: str = "brain"  # data\nsize: str = "tiny"  # size\ncontrast: str = "FLAIR"  # contrast\nn: int = 1  # a number'


def test_data_are_read_once_and_an_error_fails_only_its_own_runs(experiments, tmp_path, monkeypatch):
    notebook(experiments/"works.ipynb", [WRITE], TOY)
    asked, real = [], experiment.load_records

    def load(dataset, size, contrast, *rest, **more):
        asked.append(contrast)
        if contrast == "T2": raise DataError("scans/07.nii.gz", "is truncated", "a NIfTI file")
        return real(dataset, size, contrast, *rest, **more)
    monkeypatch.setattr(experiment, "load_records", load)
    plan = sweep.prepare(sweep.read_sweep(file(tmp_path, "experiment: works\ngrid: {contrast: [FLAIR, T2], n: [1, 2]}")))
    assert asked == ["FLAIR", "T2"]
    assert [r.status for r in plan.runs] == ["queued", "queued", "failed", "failed"]
    assert [sweep.state_of(r, tmp_path/"runs") for r in plan.runs] == ["to do", "to do", "no data", "no data"]
    batch.execute_all(plan.runs, tmp_path/"runs", processes=2)
    assert asked == ["FLAIR", "T2"]                                                           # the runner does not read them again
    assert [r.status for r in plan.runs] == ["done", "done", "failed", "failed"]
    assert all(r.message == "scans/07.nii.gz: is truncated; expected: a NIfTI file" for r in plan.runs[2:])
    assert [sweep.state_of(r, tmp_path/"runs") for r in plan.runs] == ["done", "done", "no data", "no data"]


def test_a_size_that_a_data_set_does_not_have_refuses_the_file(tmp_path):
    with pytest.raises(InputError, match="mine.yaml: tny: .*'tny'"): sweep.prepare(sweep.read_sweep(file(tmp_path, "grid: {size: [tiny, tny]}")))


# --- running ---------------------------------------------------------------------------------------------------------------------------------------------------------------

def test_done_is_done_and_a_failure_is_tried_again_if_asked(experiments, tmp_path):
    notebook(experiments/"works.ipynb", ["assert n != 2, 'two <is> too many'", WRITE])
    path, runs = file(tmp_path, "experiment: works\ngrid: {n: [1, 2, 3]}"), tmp_path/"runs"
    first = batch.execute_all(sweep.prepare(sweep.read_sweep(path)).runs, runs, processes=2)
    assert [r.status for r in first] == ["done", "failed", "done"]
    times = {p: p.stat().st_mtime_ns for p in runs.glob("works-*/*")}
    assert runner.failed_runs(runs) == [(first[1].folder.name, "AssertionError: two <is> too many")]
    again = sweep.prepare(sweep.read_sweep(path))
    assert [sweep.state_of(r, runs) for r in again.runs] == ["done", "failed", "done"]
    failure = next((runs/"failed").glob("*/state.json")).stat().st_mtime_ns
    assert [r.status for r in batch.execute_all(again.runs, runs, processes=2)] == ["cached", "failed", "cached"]
    assert next((runs/"failed").glob("*/state.json")).stat().st_mtime_ns == failure              # told, not made
    again = sweep.prepare(sweep.read_sweep(path))
    assert [r.status for r in batch.execute_all(again.runs, runs, processes=2, retry=True)] == ["cached", "failed", "cached"]
    assert next((runs/"failed").glob("*/state.json")).stat().st_mtime_ns > failure and runner.read_state(next((runs/"failed").glob("*")))["attempts"] == 2
    assert times == {p: p.stat().st_mtime_ns for p in runs.glob("works-*/*")}
    notebook(experiments/"works.ipynb", [WRITE])                                             # repaired: another key, and the old failure is history
    assert [r.status for r in batch.execute_all(sweep.prepare(sweep.read_sweep(path)).runs, runs, processes=2)] == ["done"] * 3
    assert runner.failed_runs(runs) == []


def test_code_that_changes_while_a_sweep_runs_makes_other_runs(experiments, tmp_path):
    notebook(experiments/"works.ipynb", [WRITE])
    plan = sweep.prepare(sweep.read_sweep(file(tmp_path, "experiment: works\ngrid: {n: [1]}")))
    before = plan.runs[0].key
    notebook(experiments/"works.ipynb", [WRITE, "x = 1"])
    run = batch.execute_all(plan.runs, tmp_path/"runs")[0]
    assert run.status == "done" and before not in run.folder.name


@pytest.mark.parametrize("code, ends", [(WRITE, ["done", "cached"]), ("1/0", ["failed", "failed"])])
def test_two_sweeps_at_once_share_a_run(experiments, tmp_path, code, ends):
    "The run is made once, whoever comes first; the other waits and takes what comes of it, a failure too."
    log = tmp_path/"log"
    notebook(experiments/"slow.ipynb", [f"with open({str(log)!r}, 'a') as f: f.write('x')", "import time; time.sleep(2)", code])
    runs = [runner.Run("slow", {}) for _ in range(2)]
    threads = [threading.Thread(target=batch.execute_all, args=([run], tmp_path/"runs")) for run in runs]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert sorted(r.status for r in runs) == sorted(ends)
    assert log.read_text() == "x"
    assert len({r.folder for r in runs}) == 1


def test_what_another_process_left_is_taken_over(experiments, tmp_path):
    "A process that holds the run's lock and is killed: whoever waits makes the run."
    notebook(experiments/"works.ipynb", [WRITE])
    run, runs = runner.Run("works", {}), tmp_path/"runs"
    run.parameters = parameters.check_parameters(experiments/"works.ipynb", {})
    lock = runs/".locks"/f"works-{parameters.run_key(experiments/'works.ipynb', run.parameters)}.lock"
    lock.parent.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", f"import time; from filelock import FileLock; lock = FileLock({str(lock)!r}); lock.acquire(); print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    waiting = threading.Thread(target=batch.execute_all, args=([run], runs))
    waiting.start()
    end = time.monotonic() + 20
    while run.status != "elsewhere" and time.monotonic() < end: time.sleep(0.05)
    assert run.status == "elsewhere" and not list(runs.glob("works-*"))
    other.kill(); other.wait()
    waiting.join(60)
    assert run.status == "done" and run.message == ""


# --- then --------------------------------------------------------------------------------------------------------------------------------------------------------------------

SUM = ["import json, pathlib", "found = [json.loads((pathlib.Path(out).parent/i/'metrics.json').read_text())['n'] for i in inputs.split(',')]", "pathlib.Path(out, 'metrics.json').write_text(json.dumps({'n': sum(found), 'inputs': inputs}))"]
LATER = 'out: str = ""  # folder\ninputs: str = ""  # folders\nk: int = 0  # a number'


@pytest.fixture
def two_parts(experiments):
    notebook(experiments/"works.ipynb", ["assert n < 90, 'too large'", WRITE])
    notebook(experiments/"sums.ipynb", SUM, LATER)
    return experiments


def run_both(plan, runs):
    "Statuses of both parts after running them as the command does."
    sweep.prepare(plan)
    batch.execute_all(plan.runs, runs, processes=2)
    batch.execute_all(sweep.follow(plan, runs).then, runs)
    return [r.status for r in plan.runs], [r.status for r in plan.then]


@pytest.mark.parametrize("text, said", [
    ("then:", "then: is empty"),
    ("then: {}", "then: is empty"),
    ("then: [sums]", "then: is a list"),
    ("then: {experiment: sms}", "then: experiment: there is no 'sms'; expected: did you mean 'sums'?"),
    ("then: {experiment: works}", "then: experiment: is 'works', which takes no folders of other runs; expected: a notebook with a parameter inputs"),
    ("then: {experiment: sums, then: {experiment: sums}}", "then: then: there is no 'then'"),
    ("then: {experiment: sums, report: x}", "there is no 'report'"),
    ("then: {experiment: sums, fixed: {inputs: a}}", "then: inputs: is 'a'; expected: nothing"),
    ("then: {experiment: sums, grid: {k: []}}", "then: grid: k: is an empty list"),
    ("then: {experiment: sums, grid: {k: [1, two]}}", "then: grid: k, value 2"),
    ("then: {experiment: sums, runs: [{k: 1}, {j: 1}]}", "then: runs, entry 2: parameter: there is no 'j'"),
    ("then: {experiment: sums}\nthen: {experiment: sums}", "'then' stands twice"),
])
def test_a_wrong_second_part_is_refused_with_its_place(two_parts, tmp_path, text, said):
    path = file(tmp_path, f"experiment: works\ngrid: {{n: [1]}}\n{text}")
    with pytest.raises(InputError) as caught: sweep.read_sweep(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_the_second_part_gets_the_folders_of_the_first(two_parts, tmp_path):
    path, runs = file(tmp_path, "experiment: works\ngrid: {n: [1, 2, 5]}\nthen: {experiment: sums, grid: {k: [1, 2]}}"), tmp_path/"runs"
    plan = sweep.read_sweep(path)
    assert run_both(plan, runs) == (["done"] * 3, ["done"] * 2)
    for r in plan.then:
        found = json.loads((r.folder/"metrics.json").read_text())
        assert found["n"] == 8 and found["inputs"].split(",") == sorted(p.folder.name for p in plan.runs)
    assert [r.name for r in plan.then] == ["then sums k=1", "then sums k=2"]
    assert run_both(sweep.read_sweep(path), runs) == (["cached"] * 3, ["cached"] * 2)
    assert run_both(sweep.read_sweep(file(tmp_path, "experiment: works\nruns: [{n: [5, 2]}, {n: 1}]\nthen: {experiment: sums, grid: {k: [1, 2]}}", "turned.yaml")), runs) == (["cached"] * 3, ["cached"] * 2)   # the order of the file does not matter
    assert run_both(sweep.read_sweep(file(tmp_path, "experiment: works\ngrid: {n: [1, 2, 5, 7]}\nthen: {experiment: sums}", "longer.yaml")), runs) == (["cached"] * 3 + ["done"], ["done"])          # other inputs, another run
    notebook(two_parts/"works.ipynb", ["assert n < 90, 'too large'", WRITE, "x = 1"])
    again = sweep.read_sweep(path)
    assert run_both(again, runs) == (["done"] * 3, ["done"] * 2) and {r.key for r in again.then}.isdisjoint(r.key for r in plan.then)     # other code above, another key below


def test_a_failure_above_is_left_out_and_none_at_all_is_a_failure(two_parts, tmp_path):
    path, runs = file(tmp_path, "experiment: works\ngrid: {n: [1, 99]}\nthen: {experiment: sums}"), tmp_path/"runs"
    plan = sweep.read_sweep(path)
    assert run_both(plan, runs) == (["done", "failed"], ["done"])
    assert json.loads((plan.then[0].folder/"metrics.json").read_text())["n"] == 1
    plan = sweep.read_sweep(path, {"n": 99})
    assert run_both(plan, runs) == (["failed"], ["failed"]) and "none of the runs above is finished" in plan.then[0].message


def test_what_is_fixed_and_given_reaches_both_parts(two_parts, tmp_path):
    notebook(two_parts/"sums.ipynb", SUM, LATER + '\nn: int = 0  # as above\nsize: str = "tiny"  # as above')
    path = file(tmp_path, "experiment: works\nfixed: {n: 3}\nruns: [{}]\nthen: {experiment: sums, fixed: {k: 4}}".replace("runs: [{}]", "runs: [{n: 3}]"))
    plan = sweep.read_sweep(path)
    assert (plan.then[0].parameters["n"], plan.then[0].parameters["k"]) == (3, 4)
    assert sweep.read_sweep(file(tmp_path, "experiment: works\nfixed: {n: 3}\nruns: [{n: 4}]\nthen: {experiment: sums, grid: {n: [7, 8]}}")).then[1].parameters["n"] == 8    # its own words win
    plan = sweep.read_sweep(path, {"n": "5", "k": "6"})
    assert (plan.runs[0].parameters["n"], plan.then[0].parameters["n"], plan.then[0].parameters["k"]) == (5, 5, 6)
    with pytest.raises(InputError, match="there is no 'm'"): sweep.read_sweep(path, {"m": 1})
    with pytest.raises(InputError, match="parameter k: is 'six'"): sweep.read_sweep(path, {"k": "six"})


def test_a_second_part_without_data_fails_alone(two_parts, tmp_path, monkeypatch):
    notebook(two_parts/"sums.ipynb", SUM, LATER + '\ndataset: str = "brain"  # data\nsize: str = "tiny"  # size\ncontrast: str = "T2"  # contrast')
    monkeypatch.setattr(experiment, "load_records", lambda *a, **k: (_ for _ in ()).throw(DataError("scans/07.nii.gz", "is truncated", "a NIfTI file")))
    plan = sweep.read_sweep(file(tmp_path, "experiment: works\ngrid: {n: [1]}\nthen: {experiment: sums}"))
    assert run_both(plan, tmp_path/"runs") == (["done"], ["failed"]) and "is truncated" in plan.then[0].message


# --- the command -----------------------------------------------------------------------------------------------------------------------------------------------------------

def test_a_dry_run_lists_and_starts_nothing(tmp_path):
    path = file(tmp_path, "grid: {seed: [0, 1]}\nruns: [{model: random}, {model: random, seed: 0}]")
    done = call("sweep", str(path), "--dry-run", "--folder", str(tmp_path/"runs"))
    assert done.returncode == 0, done.stderr
    assert "2 runs, 1 more said twice and dropped" in done.stdout and done.stdout.count("to do") == 2 and "seed=1" in done.stdout
    assert not (tmp_path/"runs").exists()


def test_a_sweep_from_the_command_line(tmp_path):
    "One planted failure: the others are made, the list names it, the page too, the status is 1; relative names from another folder."
    file(tmp_path, "fixed: {size: tiny}\nruns: [{model: ae, model_options: lr=1e30}, {model: random}]")
    done = call("sweep", "mine.yaml", "--folder", "runs", "--processes", "2", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "ae lr=1e30: failed." in done.stderr and "not finite" not in done.stdout and str(tmp_path/"runs"/"failed") in done.stderr and "Traceback" not in done.stderr
    page = (tmp_path/"runs"/"report-mine.html").read_text()
    assert "random" in page and "lr=1e30" in page and "the training loss is" in page
    made = next((tmp_path/"runs").glob("evaluate-brain-random-*"))
    stamp = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert call("report", str(tmp_path/"runs")).returncode == 0
    assert "the training loss is" in (tmp_path/"runs"/"report.html").read_text()           # the page over a folder finds failures too
    again = call("sweep", "mine.yaml", "--folder", "runs", "--dry-run", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("failed ") == 1 and again.stdout.count("done ") == 1, again.stderr
    assert stamp == {p: p.stat().st_mtime_ns for p in made.rglob("*")}
