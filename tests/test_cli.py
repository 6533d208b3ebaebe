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

