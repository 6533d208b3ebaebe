"""The rules of the house, each a function `rule(root) -> list of problems`. `test_house.py` holds the tree to them and plants each fault once."""
import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [{"core"}, {"arrays"}, {"viz", "annotations"}, {"widgets"}, {"explorers"}, {"data", "tasks", "models", "detectors", "metrics"}, {"methods"}, {"catalog"}, {"experiment", "evaluation"}, {"measurement"}, {"ledger", "exports"}, {"results"}, {"ranking"}, {"figures", "page", "judgement"}, {"fold_section", "own_tables", "breakdown", "gallery"}, {"report"}, {"parameters"}, {"cells"}, {"warm"}, {"runner"}, {"batch"}, {"sweep", "data_commands"}, {"slurm", "tracking"}, {"sweep_commands"}, {"cli"}]
LIGHT = {"core": "anything heavy", "cli": "anything heavy", "catalog": "anything heavy"}   # besides the metrics, which may import numpy
HEAVY = {"torch", "monai", "pytorch_lightning", "matplotlib", "sklearn", "scipy", "pandas", "nibabel", "nilearn"}
LIMIT = 500 * 1024


def notebooks(root):
    "Every notebook of the source, but for Jupyter's own copies."
    return sorted(p for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def code(path):
    return [source(c) for c in cells(path) if c["cell_type"] == "code"]


def is_experiment(path):
    return path.parent.name == "experiments"


def default_exp(path):
    "The module a notebook says it exports, or None."
    found = [m.group(1) for text in code(path) for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", text, re.M)]
    return found[0] if found else None


def modules(root):
    "{dotted name within the library: path}."
    lib = root/"anomaly_nb"
    return {".".join(p.relative_to(lib).with_suffix("").parts): p for p in sorted(lib.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")}


def _floor(module):
    first = module.split(".")[0]
    return next((i for i, names in enumerate(FLOORS) if first in names), None)


def floors(root):
    "A module imports its own package or a lower floor; siblings never import each other."
    problems = []
    for name, path in modules(root).items():
        here = _floor(name)
        if here is None:
            problems.append(f"{name}: stands on no floor")
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                package = "anomaly_nb." + ".".join(name.split(".")[:-node.level]) if node.level else ""
                module = ".".join(filter(None, [package.rstrip("."), node.module])) if node.level else node.module
                targets = [f"{module}.{a.name}" if module == "anomaly_nb" else module for a in node.names]
            for target in {t.removeprefix("anomaly_nb.") for t in targets if t.startswith("anomaly_nb.")}:
                there = _floor(target)
                same = name.split(".")[0] == target.split(".")[0]
                if not same and (there is None or there >= here): problems.append(f"{name}: imports {target}, which is not below it")
    return problems


def light_imports(root):
    "core, cli, catalog and the metrics import nothing heavy at module level."
    problems = []
    for name, path in modules(root).items():
        if name not in LIGHT and not name.startswith("metrics."): continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            banned = HEAVY | (set() if name.startswith("metrics.") else {"numpy"})
            problems += [f"{name}: imports {t} at module level" for t in targets if t.split(".")[0] in banned]
    return problems


def one_notebook_a_module(root):
    "Every exporting notebook has a module of its own, at the same place of the tree; experiments and tutorials export nothing."
    problems, seen = [], {}
    for path in notebooks(root):
        target, relative = default_exp(path), path.relative_to(root/"nbs")
        exports = any(re.search(r"^#\|\s*export", text, re.M) for text in code(path))
        if path.name == "index.ipynb" or is_experiment(path) or "tutorials" in relative.parts:
            if exports or target: problems.append(f"{relative}: exports, but is no chapter")
            continue
        if target is None:
            problems.append(f"{relative}: has no default_exp")
            continue
        wanted = ".".join([*relative.parent.parts, re.sub(r"^\d+_", "", path.stem)])
        if target != wanted: problems.append(f"{relative}: exports to {target}, its place says {wanted}")
        if target in seen: problems.append(f"{relative}: exports to {target}, as {seen[target]} does")
        seen[target] = relative
    return problems


def no_orphan_module(root):
    "Every module of the library has its notebook."
    sources = {default_exp(p) for p in notebooks(root)}
    return [f"anomaly_nb/{name.replace('.', '/')}.py: no notebook exports it" for name in modules(root) if name not in sources]


def library_is_fresh(root):
    "The library equals a fresh export of the notebooks."
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        shutil.copytree(root/"nbs", place/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        for name in ("pyproject.toml", "README.md"): shutil.copy(root/name, place/name)
        (place/"anomaly_nb").mkdir()
        shutil.copy(root/"anomaly_nb"/"__init__.py", place/"anomaly_nb"/"__init__.py")
        done = subprocess.run([Path(sys.executable).parent/"nbdev-export"], cwd=place, capture_output=True, text=True)
        if done.returncode: return [f"nbdev-export failed: {done.stderr.strip().splitlines()[-1:]}"]
        ours, fresh = modules(root), modules(place)
        problems = [f"{n}: not in the library, run nbdev-export" for n in fresh if n not in ours]
        problems += [f"{n}: differs from its notebook, run nbdev-export" for n in fresh if n in ours and ours[n].read_bytes() != fresh[n].read_bytes()]
        return problems


def parameters_tags(root):
    "Every experiment has one cell tagged `parameters`, flat, typed and commented."
    problems = []
    for path in (p for p in notebooks(root) if is_experiment(p)):
        tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
        if len(tagged) != 1:
            problems.append(f"{path.name}: {len(tagged)} cells tagged 'parameters'")
            continue
        text = source(tagged[0]).splitlines()
        for node in ast.parse(source(tagged[0])).body:
            line = text[node.lineno - 1]
            if not isinstance(node, ast.AnnAssign) or "#" not in line: problems.append(f"{path.name}: parameter without type or comment: {line}")
    return problems


def experiments_define_nothing(root):
    "An experiment defines neither function nor class, and stores no output."
    problems = []
    for path in (p for p in notebooks(root) if is_experiment(p)):
        for text in code(path):
            body = ast.parse(re.sub(r"^%.*$", "", text, flags=re.M)).body
            problems += [f"{path.name}: defines {n.name}" for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        if any(c.get("outputs") for c in cells(path)): problems.append(f"{path.name}: stores outputs")
    return problems


def sizes(root):
    "A notebook stays under 500 KB."
    return [f"{p.name}: {p.stat().st_size // 1024} KB" for p in notebooks(root) if p.stat().st_size > LIMIT]


def unique_names(root):
    "Base names are unique: nbdev-test prints nothing else."
    seen, problems = {}, []
    for path in notebooks(root):
        if path.name in seen: problems.append(f"{path.relative_to(root)}: same name as {seen[path.name].relative_to(root)}")
        seen[path.name] = path
    return problems


def opening(root):
    "A chapter opens with `# Title` and `> one line`; `default_exp` stands alone in the second cell; nothing is hidden from evaluation, and only an unsolved exercise may fail."
    problems = []
    for path in notebooks(root):
        if any(re.search(r"^#\|\s*eval:\s*false", text, re.M) for text in code(path)): problems.append(f"{path.name}: has a cell that is not evaluated")
        if any("raises-exception" in c["metadata"].get("tags", []) and not re.match(r"#\|\s*exercise\b", source(c)) for c in cells(path)): problems.append(f"{path.name}: a cell that may fail and is no exercise")
        if path.name == "index.ipynb" or is_experiment(path) or "tutorials" in path.parts: continue
        first, second = cells(path)[:2]
        if not re.match(r"# [^\n]+\n\n?> [^\n]+\s*$", source(first)): problems.append(f"{path.name}: does not open with '# Title' and '> one line'")
        if not re.fullmatch(r"#\|\s*default_exp\s+\S+\s*", source(second)): problems.append(f"{path.name}: second cell is not default_exp alone")
        if sum(bool(re.match(r"#\|\s*hide\b", text)) for text in code(path)) > 2: problems.append(f"{path.name}: more than two hidden checks")
    return problems


def outputs_key(root, path):
    "Hash of the code cells of a notebook and of the pinned versions: what its stored outputs were made from."
    constraints = (root/"constraints.txt").read_bytes()
    return hashlib.sha256("\0".join(code(path)).encode() + constraints).hexdigest()[:16]


def keeps_outputs(path):
    return not is_experiment(path)


def outputs_fresh(root):
    "The stored outputs of a chapter were made from the code it holds."
    problems = []
    for path in (p for p in notebooks(root) if keeps_outputs(p)):
        stored = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("anomaly_nb", {}).get("outputs")
        if stored != outputs_key(root, path): problems.append(f"{path.name}: stored outputs are stale, run make outputs")
    return problems


def outputs_without_paths(root):
    "What a notebook shows is the same on every machine: no output names a folder of the one it ran on."
    problems = []
    for path in notebooks(root):
        outputs = [o for c in cells(path) for o in c.get("outputs", [])]
        text = json.dumps([{**o, "data": {k: v for k, v in o.get("data", {}).items() if k != "image/png"}} for o in outputs])
        problems += [f"{path.name}: an output names {m}" for m in sorted(set(re.findall(r"/(?:home|root|work|tmp|Users)/[\w.-]+", text)))]
    return problems


def readme_from_index(root, write=False):
    "README.md (and its pictures) are what nbconvert makes of nbs/index.ipynb."
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "nbconvert", "--to", "markdown", str(root/"nbs"/"index.ipynb"), "--output", "README", "--output-dir", place, "--TagRemovePreprocessor.remove_input_tags=hide_input"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: return [f"nbconvert failed: {done.stderr.strip().splitlines()[-1:]}"]
        page = Path(place)/"README.md"      # its links start one folder higher
        page.write_text(re.sub(r"\]\((?!https?:|#|README_files)(?:\.\./([^)\s]+)|([^)\s]+))\)", lambda m: f"]({m[1] or 'nbs/' + m[2]})", page.read_text(encoding="utf-8")), encoding="utf-8")
        made = {p.relative_to(place): p.read_bytes() for p in sorted(Path(place).rglob("*")) if p.is_file()}
    if write:
        shutil.rmtree(root/"README_files", ignore_errors=True)
        for name, content in made.items():
            (root/name).parent.mkdir(exist_ok=True)
            (root/name).write_bytes(content)
    return [f"{n}: differs from nbs/index.ipynb, run make export" for n, content in made.items() if not (root/n).is_file() or (root/n).read_bytes() != content]


def loading(root):
    "{notebook that loads trained networks, or trains them: its code}."
    texts = {p: "\n".join(code(p)) for p in notebooks(root)}
    return {p: text for p, text in texts.items() if "load_or_train(" in text and "default_exp models.checkpoints" not in text}


def checkpoint_users(root, readers=None):
    "{name of a trained network that lies beside the notebooks: the notebook (of `readers`, see `loading`) that has its name in quotes}."
    readers = loading(root) if readers is None else readers
    return {f.stem: p for f in sorted((root/"nbs"/"checkpoints").glob("*.safetensors")) for p, text in readers.items() if f'"{f.stem}"' in text}


def checkpoints_used(root):
    "Every trained network beside the notebooks is loaded by one, is listed with its origin, and together they stay below 10 MB; what a notebook would load is there."
    folder, readers = root/"nbs"/"checkpoints", loading(root)
    users = checkpoint_users(root, readers)
    files = {p.stem: p for p in folder.glob("*.safetensors")}
    told = (folder/"README.md").read_text(encoding="utf-8") if (folder/"README.md").is_file() else ""
    asked = {name: p for p, text in readers.items() for name in re.findall(r'load_or_train\("([\w-]+)"', text)}
    problems = [f"checkpoints/{n}: no notebook loads it" for n in files if n not in users] + [f"{p.name}: loads checkpoints/{n}, which is not there: make checkpoints" for n, p in asked.items() if n not in files]
    problems += [f"checkpoints/{n}: README.md does not name it: make checkpoints" for n in files if f"| {n} |" not in told]
    if (size := sum(p.stat().st_size for p in files.values())) > 10e6: problems.append(f"checkpoints: {size/1e6:.1f} MB, 10 at most")
    return problems


def is_chapter(path):
    return path.name != "index.ipynb" and not is_experiment(path)


def opens_and_closes(root):
    "A chapter says what you will be able to do, what you need and what it takes; it closes with what goes wrong, three to five questions with as many folded answers, and where to go next."
    problems = []
    for path in filter(is_chapter, notebooks(root)):
        texts = [source(c) for c in cells(path) if c["cell_type"] == "markdown"]
        first, whole = "\n".join(texts[:3]), "\n\n".join(texts)
        missing = [w for w in ("**You will be able to**", "**You need**", "**It takes**") if w not in first] + [w for w in ("## What goes wrong", "**Questions**", "<summary>Answers</summary>") if w not in whole]
        if not re.search(r"\*\*Next:\*\* [^\n]*\]\([^)\n]+\)", texts[-1]): missing.append("**Next:** with a link")
        if missing: problems.append(f"{path.name}: without {', '.join(missing)}")
        else:
            asked, answered = whole.rpartition("**Questions**")[2].split("<summary>Answers</summary>")[:2]
            numbers = [len(re.findall(r"^\d+\. ", part.partition("</details>")[0], re.M)) for part in (asked, answered)]
            if not 3 <= numbers[0] <= 5 or numbers[0] != numbers[1]: problems.append(f"{path.name}: {numbers[0]} questions and {numbers[1]} answers")
    return problems


def links(root):
    "Every relative link of a notebook leads to a file."
    problems = []
    for path in notebooks(root):
        for text in (source(c) for c in cells(path) if c["cell_type"] == "markdown"):
            problems += [f"{path.name}: nothing at {target}" for target in re.findall(r"(?<!!)\[[^\]]*\]\((?!https?:|#|mailto:)([^)\s#]+)", text) if not (path.parent/target).exists()]
    return problems


RULES = [floors, light_imports, one_notebook_a_module, no_orphan_module, library_is_fresh, parameters_tags, experiments_define_nothing, sizes, unique_names, opening, outputs_fresh, outputs_without_paths, readme_from_index, checkpoints_used, links, opens_and_closes]
