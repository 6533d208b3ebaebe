"""The command line as a person meets it: in a process of its own, by its exit status and its words."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from house import ROOT

BIN = Path(sys.executable).parent/"anomaly-nb"


def call(*words, cwd=ROOT, **environment):
    return subprocess.run([BIN, *words], cwd=cwd, capture_output=True, text=True, env=os.environ | environment, timeout=300)


@pytest.mark.parametrize("words, said", [
    (["run", "evalute"], "did you mean 'evaluate'?"),
    (["run", "evaluate", "-p", "epoch=3"], "did you mean 'epochs'?"),
    (["run", "evaluate", "-p", "epochs=three"], "parameter epochs: is 'three'"),
    (["run", "evaluate", "-p", "max_seconds=soon"], "expected: float"),
    (["run", "evaluate", "-p", "model=vea"], "did you mean 'vae'?"),
    (["run", "evaluate", "-p", "model=vae", "-p", "model_options=latnt=8"], "did you mean 'latent'?"),
    (["run", "evaluate", "-p", "dataset=brian"], "did you mean 'brain'?"),
    (["run", "evaluate", "-p", "contrast=FLAIRE"], "did you mean 'FLAIR'?"),
    (["run", "evaluate", "-p", "size=small"], "tiny"),
    (["run", "evaluate", "-p", "model"], "NAME=VALUE"),
    (["run", "evaluate", "-p", "epochs=1", "-p", "epochs=2"], "given twice"),
    (["data", "make", "brian"], "did you mean 'brain'?"),
    (["data", "make", "brain", "--size", "huge"], "tiny"),
    (["demo", "--size", "deno"], "did you mean 'demo'?"),
    (["report", "no/such/folder"], "is no folder"),
    (["run", "evaluate", "-p", "dataset=folder", "-p", "path=no/such/scans"], "there is nothing at no/such/scans"),
    (["run", "evaluate", "-p", "dataset=folder"], "path"),
    (["run", "evaluate", "-p", "path=."], "path"),
    (["run", "evaluate", "-p", "model=sae", "-p", "detector=ocsvm+lofo"], "did you mean 'lof'?"),
    (["run", "evaluate", "-p", "model=sae", "-p", "detector=lof", "-p", "detector_options=lof.neighbours=3"], "did you mean 'n_neighbors'?"),
    (["run", "evaluate", "-p", "scope=pacient"], "did you mean 'patient'?"),
    (["run", "evaluate", "-p", "model=ae", "-p", "dims=4"], "dims"),
    (["run", "evaluate", "-p", "task=piars"], "did you mean 'pairs'?"),
    (["run", "evaluate", "-p", "out=here"], "the runner gives each run its folder"),
    (["sweep", "no/such.yaml"], "no/such.yaml: cannot be read"),
    (["sweep", "README.md"], "README.md"),
    (["sweep", "sweeps/demo.yaml", "-p", "modle=vae"], "did you mean 'model'?"),
    (["sweep", "sweeps/demo.yaml", "-p", "size=tny"], "tny"),
    (["sweep", "sweeps/demo.yaml", "-p", "size=tiny", "--processes", "-1"], "--processes: is -1"),
    (["data", "check", "brian"], "did you mean 'brain'?"),
    (["data", "check", "folder"], "path"),
    (["data", "check", "folder", "--path", "no/such/scans"], "no/such/scans"),
    (["data", "check", "brain", "-o", "lesion_contrats=0.5"], "did you mean 'lesion_contrast'?"),
    (["data", "check", "brain", "-o", "lesion_contrast"], "-o NAME=VALUE"),
])
def test_bad_input_is_refused_in_one_line(words, said, tmp_path):
    done = call(*words, ANOMALY_NB_RUNS_FOLDER=str(tmp_path/"runs"))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path/"runs").exists() or not list((tmp_path/"runs").iterdir())   # nothing half-written


def test_a_mistyped_environment_variable_is_refused():
    done = call("doctor", ANOMALY_NB_COMPUTE_SED="3")
    assert done.returncode == 2 and "ANOMALY_NB_COMPUTE_SEED" in done.stderr


def test_an_empty_runs_folder_is_no_report(tmp_path):
    done = call("report", str(tmp_path))
    assert done.returncode == 2 and "no finished run" in done.stderr


def test_runs_folder_under_a_file_is_refused(tmp_path):
    (tmp_path/"file").write_text("not a folder")
    done = call("run", "evaluate", ANOMALY_NB_RUNS_FOLDER=str(tmp_path/"file"/"runs"))
    assert done.returncode != 0 and "file" in done.stderr and "Traceback" not in done.stderr


def test_works_from_any_folder(tmp_path):
    done = call("data", "list", cwd=tmp_path)
    assert done.returncode == 0 and "brain" in done.stdout


def test_two_runs_and_a_report(tmp_path):
    "From a name to a page: two methods, run folders whole, numbers equal to the byte when made again, text escaped."
    runs = tmp_path/"runs"
    for model in ("random", "intensity"):
        done = call("run", "evaluate", "-p", f"model={model}", ANOMALY_NB_RUNS_FOLDER=str(runs))
        assert done.returncode == 0, done.stderr
    folders = sorted(p for p in runs.glob("evaluate-*"))
    assert len(folders) == 2
    for folder in folders:
        names = {p.name for p in folder.iterdir()}
        assert {"notebook.ipynb", "params.json", "metrics.json", "provenance.json", "scores", "figures", "model.safetensors"} <= names
        text = (folder/"metrics.json").read_text()
        assert str(tmp_path) not in text and "seconds" not in text
        assert json.loads((folder/"provenance.json").read_text())["versions"]["torch"]
    random = json.loads(next(runs.glob("evaluate-brain-random-*/metrics.json")).read_text())["kinds"]["random"]["pixel"]
    assert abs(random["auroc"] - 0.5) < 0.02 and random["ap"] < 1.3 * random["prevalence"]      # chance: a leak of the truth would show here
    again = tmp_path/"again"
    assert call("run", "evaluate", "-p", "model=random", ANOMALY_NB_RUNS_FOLDER=str(again)).returncode == 0
    other = next(again.glob("evaluate-*"))
    assert (other/"metrics.json").read_bytes() == (runs/other.name/"metrics.json").read_bytes()
    done = call("report", ANOMALY_NB_RUNS_FOLDER=str(runs))
    assert done.returncode == 0 and "random" in done.stdout
    page = (runs/"report.html").read_text()
    assert "embedded cohort" in page and "src=\"data:image/png;base64," in page and "http" not in page.replace("http://www.w3.org", "")


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    "A class in a file beside settings.ini is run by `module:Class`, from a folder below; its code and that of its neighbour belong to the key, their words do not; faults are one line."
    from anomaly_nb import parameters
    from anomaly_nb.core import settings
    (tmp_path/"settings.ini").write_text(f"[paths]\ncohorts = {settings().cohorts}\ncache = {settings().cache}\n")
    (tmp_path/"own_gain.py").write_text("GAIN = 2.0   # louder\n")
    (tmp_path/"own_loud.py").write_text("from own_gain import GAIN\nfrom anomaly_nb.models.baselines import IntensityThreshold\n\nclass Loud(IntensityThreshold):\n    'Brightness, louder.'\n    dims = (2,)\n    def score(self, batch, kind=None): return {k: GAIN*v for k, v in super().score(batch, kind).items()}\n")
    (tmp_path/"below").mkdir()
    done = call("run", "evaluate", "-p", "model=own_loud:Loud", cwd=tmp_path/"below")
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path/"runs").glob("evaluate-brain-own_loud-Loud-*")
    metrics = json.loads((folder/"metrics.json").read_text())
    assert metrics["model"] == "own_loud:Loud" and not metrics["baseline"] and metrics["kinds"]["bright"]["pixel"]["ap"] > 0.1

    monkeypatch.setenv("ANOMALY_NB_SETTINGS", str(tmp_path/"settings.ini"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    notebook = parameters.experiment_path("evaluate")
    values = parameters.check_parameters(notebook, {"model": "own_loud:Loud"})
    data = parameters.data_hash(values)
    made, others = (parameters.run_key(notebook, values | {"model": m}, data) for m in ("own_loud:Loud", "random"))
    assert folder.name.endswith(made)                                                    # the same key from another process and folder
    (tmp_path/"own_gain.py").write_text("GAIN = 2.0   # a better comment\n")
    (tmp_path/"own_loud.py").write_text((tmp_path/"own_loud.py").read_text().replace("louder", "but twice as loud"))
    assert parameters.run_key(notebook, values, data) == made
    (tmp_path/"own_gain.py").write_text("GAIN = 3.0\n")
    assert parameters.run_key(notebook, values, data) != made and parameters.run_key(notebook, values | {"model": "random"}, data) == others
    assert not any(n.startswith("own_") for n in parameters.modules_needed(notebook, values))                # nothing of it is imported ahead: it may be edited while a sweep goes on
    for model, said in (("own_lout:Loud", "No module named 'own_lout'"), ("own_gain:GAIN", "GAIN is no model")):
        refused = call("run", "evaluate", "-p", f"model={model}", cwd=tmp_path)
        assert refused.returncode == 2 and said in refused.stderr and len(refused.stderr.strip().splitlines()) == 1, refused.stderr


def test_help_is_quick_and_light():
    "No heavy module for a call for help, whatever the command; and an answer before the eye has moved."
    code = "import sys\nfrom anomaly_nb.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\nprint([m for m in ('torch', 'numpy', 'yaml', 'sklearn', 'pandas', 'rich', 'IPython') if m in sys.modules])"
    for words in (["--help"], ["sweep", "--help"], ["data", "check", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.stdout.strip().splitlines()[-1] == "[]"
    import time
    took = []
    for _ in range(5):
        start = time.perf_counter()
        call("--help")
        took.append(time.perf_counter() - start)
    bare = min(_seconds([sys.executable, "-c", "import argparse, configparser, difflib, hashlib, json, tempfile"]) for _ in range(5))
    assert min(took) < bare + 0.15


def _seconds(command):
    import time
    start = time.perf_counter()
    subprocess.run(command, capture_output=True)
    return time.perf_counter() - start


@pytest.fixture
def scans(tmp_path):
    "A folder of twelve small scans with a manifest: four ill, with masks; a name with HTML in it."
    import nibabel as nib
    import numpy as np
    rng, lines = np.random.default_rng(0), ["path,subject,split,label,mask"]
    (tmp_path/"scans").mkdir()

    def write(name, array): nib.save(nib.Nifti1Image(array.astype("float32"), np.diag([2, 2, 2, 1])), tmp_path/"scans"/name)
    for i in range(12):
        image, mask = rng.normal(100, 10, (24, 24, 8)), np.zeros((24, 24, 8))
        pool, ill = ("train", "val", "test")[min(i // 3, 2)], i >= 8
        if ill: mask[8:14, 8:14, 3:6] = 1
        write(f"s{i}.nii.gz", image + 60 * mask)
        if ill: write(f"m{i}.nii.gz", mask)
        lines.append(f"s{i}.nii.gz,{'<b>bold</b>' if i == 9 else f'p{i}'},{pool},{int(ill)},{f'm{i}.nii.gz' if ill else ''}")
    (tmp_path/"scans"/"manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.long
def test_own_scans_with_a_relative_path(scans):
    "check, run and report from another folder than the project's; the same scans under another name are the same run; broken ones are named before a run."
    runs = {"ANOMALY_NB_RUNS_FOLDER": str(scans/"runs")}
    checked = call("data", "check", "folder", "--path", "scans", cwd=scans)
    assert checked.returncode == 0, checked.stderr + checked.stdout
    words = ["run", "evaluate", "-p", "dataset", "folder", "-p", "model=intensity", "-p", "path"]
    done = call(*words, "scans", cwd=scans, **runs)
    assert done.returncode == 0, done.stderr
    folder = next((scans/"runs").glob("evaluate-folder-intensity-*"))
    assert json.loads((folder/"params.json").read_text())["parameters"]["path"] == "scans"
    metrics = json.loads((folder/"metrics.json").read_text())
    assert str(scans) not in json.dumps(metrics)
    assert next(iter(metrics["kinds"].values()))["pixel"]["auroc"] > 0.95                # lesions brighter by six standard deviations
    (scans/"scans").rename(scans/"moved")
    again = call(*words, str(scans/"moved"), cwd=ROOT, **runs)
    assert again.returncode == 0 and "cached" in again.stdout
    assert call("report", **runs).returncode == 0
    assert "<b>bold</b>" not in (scans/"runs"/"report.html").read_text()
    (scans/"moved"/"s9.nii.gz").write_bytes((scans/"moved"/"s9.nii.gz").read_bytes()[:200])
    broken = call("data", "check", "folder", "--path", "moved", cwd=scans)
    assert broken.returncode == 1 and "s9.nii.gz" in broken.stdout and "Traceback" not in broken.stderr
    (scans/"moved"/"s9.nii.gz").unlink()
    missing = call(*words, "moved", cwd=scans, **runs)
    assert missing.returncode == 2 and "s9.nii.gz" in missing.stderr and len(missing.stderr.strip().splitlines()) == 1
