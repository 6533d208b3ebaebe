"""A kill in the middle of a run: the broken folder is no result, and the same command goes on."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from house import ROOT

BIN = Path(sys.executable).parent/"anomaly-nb"
RUN = ["run", "evaluate", "-p", "model=ae", "-p", "epochs=12", "-p", "batch_size=4"]


def hears_ctrl_c():
    "For a child: a shell that starts the tests in the background has Ctrl-C ignored, and children inherit that."
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(runs):
    return subprocess.Popen([BIN, *RUN], cwd=ROOT, env=os.environ | {"ANOMALY_NB_RUNS_FOLDER": str(runs)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c)


def wait_for(condition, seconds=120):
    "Waits until `condition()` is true and returns it; fails after a while."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found: return found
        time.sleep(0.05)
    pytest.fail("nothing happened in time")


def epoch_of(runs):
    "The epoch a running run says it has reached, or 0."
    for file in runs.glob(".partial-*/progress.json"):
        try: text = json.loads(file.read_text()).get("text", "")
        except ValueError: continue
        if "epoch " in text: return int(text.split("epoch ")[1].split(",")[0])
    return 0


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    "The metrics of the same run, left alone."
    runs = tmp_path_factory.mktemp("whole")
    assert start(runs).wait(300) == 0
    return next(runs.glob("evaluate-*/metrics.json")).read_bytes()


@pytest.mark.parametrize("whom", ["the run", "the warm parent", "the parent", "everything"])
def test_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path, whom, expected):
    runs = tmp_path/"killed"
    parent = start(runs)
    wait_for(lambda: epoch_of(runs) >= 3)
    family = psutil.Process(parent.pid).children(recursive=True)
    (warm,) = [p for p in psutil.Process(parent.pid).children() if "serve()" in " ".join(p.cmdline())]
    copies = warm.children()
    assert len(copies) == 1
    victims = {"the run": copies, "the warm parent": [warm], "the parent": [psutil.Process(parent.pid)], "everything": [psutil.Process(parent.pid), *family]}
    for process in victims[whom]: process.send_signal(signal.SIGKILL)
    said = parent.communicate(timeout=120)[1]
    assert parent.returncode != 0
    assert not list(runs.glob("evaluate-*")), "a broken folder was taken for a result"
    alive = psutil.wait_procs(family, timeout=30)[1]
    assert not alive, "children outlive their parent and would write into the folder"
    if whom in ("the run", "the warm parent"): assert "ae" in said and "killed" in said and "Start the same command again" in said
    again = start(runs)
    epochs = wait_for(lambda: epoch_of(runs))
    assert again.wait(300) == 0
    assert epochs >= 3, "the second start did not go on from the checkpoint"
    result = next(runs.glob("evaluate-*/metrics.json"))
    assert result.read_bytes() == expected
    assert not list(runs.glob(".partial-*"))


def test_ctrl_c_ends_the_children(tmp_path):
    parent = start(tmp_path)
    wait_for(lambda: epoch_of(tmp_path) >= 1)
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60) != 0
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert not list(tmp_path.glob("evaluate-*"))
