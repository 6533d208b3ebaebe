"""What a run does when something breaks: a notebook that raises, a parameters tag that is lost, a run that is made twice."""
import json
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from anomaly_nb import batch, parameters, runner
from anomaly_nb.core import InputError
from house import ROOT


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    "A folder of experiments of our own."
    folder = tmp_path/"experiments"
    folder.mkdir()
    monkeypatch.setattr(parameters, "experiments_folder", lambda: folder)
    return folder


def notebook(path, code, parameters='out: str = ""  # folder\nn: int = 1  # a number'):
    cells = [(parameters, ["parameters"]), *((c, []) for c in code)]
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, "cells": [
        {"cell_type": "code", "id": f"c{i}", "metadata": {"tags": tags} if tags else {}, "source": text, "outputs": [], "execution_count": None} for i, (text, tags) in enumerate(cells)]}))


WRITE = "import json, pathlib\npathlib.Path(out, 'metrics.json').write_text(json.dumps({'n': n}))"


def test_a_failed_run_is_kept_apart_and_never_a_result(experiments, tmp_path):
    notebook(experiments/"breaks.ipynb", ["1/0"])
    runs = tmp_path/"runs"
    run = runner.execute(runner.Run("breaks", {}), runs)
    assert run.status == "failed" and "ZeroDivisionError" in run.message
    assert run.folder.parent.name == "failed" and "ZeroDivisionError" in (run.folder/"traceback.txt").read_text()
    assert not list(runs.glob("breaks-*")) and not list(runs.glob(".partial-*"))
    assert runner.execute(runner.Run("breaks", {}), runs).status == "failed"          # and it is tried again


def test_a_run_without_metrics_has_failed(experiments, tmp_path):
    notebook(experiments/"forgets.ipynb", ["1 + 1"])
    run = runner.execute(runner.Run("forgets", {}), tmp_path/"runs")
    assert run.status == "failed" and "without writing metrics.json" in run.message


def test_one_failure_does_not_end_the_others(experiments, tmp_path):
    notebook(experiments/"breaks.ipynb", ["1/0"])
    notebook(experiments/"works.ipynb", [WRITE])
    runs = batch.execute_all([runner.Run("breaks", {}), runner.Run("works", {"n": "2"}), runner.Run("works", {"m": 2})], tmp_path/"runs", processes=2)
    assert [r.status for r in runs] == ["failed", "done", "failed"]
    assert json.loads((runs[1].folder/"metrics.json").read_text()) == {"n": 2}
    assert "there is no 'm'" in runs[2].message


def test_other_code_is_another_run_and_other_words_are_not(experiments, tmp_path):
    notebook(experiments/"works.ipynb", [WRITE])
    first = runner.execute(runner.Run("works", {}), tmp_path/"runs")
    notebook(experiments/"works.ipynb", ["# a comment\n" + WRITE])
    assert runner.execute(runner.Run("works", {}), tmp_path/"runs").status == "cached"
    notebook(experiments/"works.ipynb", [WRITE, "x = 1"])
    second = runner.execute(runner.Run("works", {}), tmp_path/"runs")
    assert (first.status, second.status) == ("done", "done") and first.folder != second.folder


def test_the_key_knows_what_can_change_a_number(experiments, monkeypatch):
    notebook(experiments/"works.ipynb", ["from anomaly_nb.core import settings\n" + WRITE])
    path = experiments/"works.ipynb"
    base = parameters.run_key(path, {"n": 1, "out": "a"})
    assert parameters.run_key(path, {"n": 1, "out": "b"}) == base
    assert parameters.run_key(path, {"n": 2, "out": "a"}) != base
    monkeypatch.setenv("ANOMALY_NB_COMPUTE_PRECISION", "bf16-mixed")
    assert parameters.run_key(path, {"n": 1, "out": "a"}) != base
    monkeypatch.setenv("ANOMALY_NB_COMPUTE_PRECISION", "32-true")
    monkeypatch.setenv("ANOMALY_NB_COMPUTE_THREADS", "2")
    assert parameters.run_key(path, {"n": 1, "out": "a"}) != base


def test_a_lost_parameters_tag_is_refused_before_a_kernel_starts(experiments, tmp_path):
    notebook(experiments/"works.ipynb", [WRITE])
    nb = json.loads((experiments/"works.ipynb").read_text())
    nb["cells"][0]["metadata"] = {}
    (experiments/"works.ipynb").write_text(json.dumps(nb))
    with pytest.raises(InputError, match="0 cells tagged 'parameters'"): runner.execute(runner.Run("works", {}), tmp_path/"runs")
    assert not (tmp_path/"runs").exists()


def test_one_run_has_one_name_however_much_of_it_was_typed(experiments, tmp_path):
    notebook(experiments/"works.ipynb", [WRITE], 'out: str = ""  # folder\nmodel: str = "random"  # model\nn: int = 1  # a number')
    first = runner.execute(runner.Run("works", {}), tmp_path/"runs")
    again = runner.execute(runner.Run("works", {"model": "random", "n": "1"}), tmp_path/"runs")
    assert (first.status, again.status) == ("done", "cached") and first.folder == again.folder


def test_one_run_is_never_made_by_two_at_once(experiments, tmp_path):
    notebook(experiments/"slow.ipynb", ["import time; time.sleep(4)", WRITE])
    first = threading.Thread(target=runner.execute, args=(runner.Run("slow", {}), tmp_path/"runs"))
    first.start()
    while not list((tmp_path/"runs").glob(".partial-*/job.json")): first.join(0.05)
    with pytest.raises(InputError, match="being made by another process"): runner.execute(runner.Run("slow", {}), tmp_path/"runs")
    first.join()
    assert runner.execute(runner.Run("slow", {}), tmp_path/"runs").status == "cached"


def test_a_child_whose_parent_died_while_it_started_ends(experiments, tmp_path):
    notebook(experiments/"works.ipynb", [WRITE])
    job = tmp_path/"job.json"
    job.write_text(json.dumps({"notebook": str(experiments/"works.ipynb"), "output": str(tmp_path/"out.ipynb"), "folder": str(tmp_path), "parameters": {"out": str(tmp_path)}}))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    child = subprocess.Popen([sys.executable, "-c", "import sys; from anomaly_nb.warm import execute_job; sys.exit(execute_job(*sys.argv[1:]))", str(job), str(gone.pid)], start_new_session=True)
    assert child.wait(60) == -signal.SIGKILL and not (tmp_path/"metrics.json").exists()


def test_no_experiment_shipped_lacks_a_comment_or_type():
    for path in (ROOT/"nbs"/"experiments").glob("*.ipynb"):
        found = parameters.read_parameters(path)
        assert found and all(p.comment for p in found.values())


def test_a_full_disk_fails_with_a_name_and_leaves_no_result(experiments, tmp_path):
    "A notebook whose write fails as on a full disk: /dev/full is the device that is always full."
    notebook(experiments/"full.ipynb", ["with open('/dev/full', 'w') as f: f.write('x' * 100000)", WRITE])
    run = runner.execute(runner.Run("full", {}), tmp_path/"runs")
    assert run.status == "failed" and "No space left" in run.message
    assert not list((tmp_path/"runs").glob("full-*"))
    shutil.rmtree(tmp_path/"runs")
