"""A sweep of short runs, killed in the middle and started again: nothing finished is repeated, nothing is lost, and one run that cannot work ends no other."""
import os
import signal
import subprocess

import psutil

from house import ROOT
from test_kill import BIN, epoch_of, hears_ctrl_c, wait_for

SWEEP = """
fixed: {size: tiny, batch_size: 4}
runs:
  - {model: ae, model_options: lr=1e30}      # the loss is no number after a few steps
  - {model: random}
  - {model: ae, epochs: 6}
  - {model: intensity}
"""
GOOD = {"random", "intensity", "ae"}


def start(folder):
    return subprocess.Popen([BIN, "sweep", "mine.yaml", "--folder", "runs", "--processes", "2"], cwd=folder, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c)


def finished(folder):
    "{folder of a finished run: the times of all that is in it}."
    return {p.parent.name: {f.name: f.stat().st_mtime_ns for f in p.parent.rglob("*")} | {"": p.parent.stat().st_mtime_ns} for p in (folder/"runs").glob("evaluate-*/metrics.json")}


def test_a_killed_sweep_goes_on(tmp_path):
    (tmp_path/"mine.yaml").write_text(SWEEP)
    parent = start(tmp_path)
    wait_for(lambda: finished(tmp_path) and epoch_of(tmp_path/"runs") >= 2)         # one is done, one is in the middle of its training
    family = psutil.Process(parent.pid).children(recursive=True)
    for process in [psutil.Process(parent.pid), *family]:
        try: process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    parent.communicate(timeout=60)
    assert not psutil.wait_procs(family, timeout=30)[1]
    before = finished(tmp_path)
    assert 1 <= len(before) < len(GOOD) and list((tmp_path/"runs").glob(".partial-*ae*"))

    dry = subprocess.run([BIN, "sweep", "mine.yaml", "--folder", "runs", "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert dry.returncode == 0 and dry.stdout.count("done ") == len(before) and "killed" in dry.stdout and finished(tmp_path) == before

    again = start(tmp_path)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 1, err                                                   # because of the planted one, which is named
    assert "lr=1e30: failed." in err and "the training loss is" in err and "Traceback" not in err
    after = finished(tmp_path)
    assert {name.split("-")[2] for name in after} == GOOD and len(after) == len(GOOD)
    assert {name: after[name] for name in before} == before, "a finished run was made again"
    assert not list((tmp_path/"runs").glob(".partial-*"))
    assert [p.name.split("-")[2] for p in (tmp_path/"runs"/"failed").iterdir()] == ["ae"]
    page = (tmp_path/"runs"/"report-mine.html").read_text()
    assert "lr=1e30" in page and all(model in page for model in GOOD)


def test_ctrl_c_says_how_to_go_on(tmp_path):
    (tmp_path/"mine.yaml").write_text(SWEEP.replace("epochs: 6", "epochs: 500"))
    parent = start(tmp_path)
    wait_for(lambda: epoch_of(tmp_path/"runs") >= 4)                                   # not the one that breaks in its first
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 130 and "stopped:" in err and "start the same command again" in err and "Traceback" not in err
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert list((tmp_path/"runs").glob(".partial-*ae*"))
