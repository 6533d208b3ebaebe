"""What is entered into MLflow, and when: names, numbers, entries, once each. Without MLflow; tests/system/test_tracking.py has a real store."""
import importlib.metadata
import json
import os
import posixpath
import re
import sqlite3
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as some

from anomaly_nb import sweep_commands, tracking
from anomaly_nb.cli import main
from anomaly_nb.core import InputError, write_json
from anomaly_nb.core import settings as settings_of
from anomaly_nb.ledger import Ledger, read_ledger
from anomaly_nb.tracking import STORE, check_store, curves, entries, entry_of, flat_metrics, safe_name, track_folder, with_tracking

sys.path.insert(0, str(Path(__file__).parent/"system"))
from project import WRITE, project  # noqa: E402

METRICS = {"seed": 0, "kinds": {"residual": {"threshold": .1, "protocol": {"fpr": .01}, "pixel": {"ap": .2, "dice": None}}}}


def run_of(root, name="evaluate-brain-vae-c0ffee", metrics=METRICS, parameters={"model": "vae", "seed": 0}):
    write_json(root/name/"params.json", {"experiment": "evaluate", "key": "c0ffee", "parameters": parameters})
    write_json(root/name/"metrics.json", metrics)
    return root/name


def ended(root, state, name="evaluate-brain-ae-bad", place="failed/", **more):
    write_json(root/f"{place}{name}"/"state.json", {"state": state, "message": f"it {state}", "seconds": 2.0, "attempts": 1} | more)
    return root/f"{place}{name}"


class Listed:
    "A store in memory; `full`: how many it takes."
    def __init__(self, full=1000): self.runs, self.entries, self.full = {}, [], full
    def known(self): return dict(self.runs)
    def enter(self, entry):
        if len(self.runs) == self.full: raise InputError("mlflow.db", "database is locked", "a store that no other program holds")
        self.entries.append(entry)
        return self.runs.setdefault((entry.name, entry.content), f"id-{len(self.runs)}")


# --- names and numbers -------------------------------------------------------------------------------------------------------------------------------------------------

def taken(name):
    "MLflow's own rules."
    norm = posixpath.normpath(name)
    return re.fullmatch(r"[/\w.\- :]+", name) and norm == name and norm != "." and not norm.startswith(("..", "/")) and len(name) <= 250


@settings(max_examples=60, deadline=None)
@given(some.lists(some.lists(some.text(min_size=0, max_size=8), min_size=1, max_size=4), min_size=1, max_size=6))
def test_every_name_is_taken_and_none_is_lost(paths):
    kinds = {}
    for n, path in enumerate(paths):
        place = kinds
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict): break
        if isinstance(place, dict): place[f"n{n}"] = n
    found = flat_metrics({"kinds": {"k": kinds}, "top": kinds})
    assert all(taken(name) for name in found)
    count = lambda c: sum(count(v) for v in c.values()) if isinstance(c, dict) else 1
    assert len(found) == 2*count(kinds) - count(kinds.get("protocol", {}))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "../../etc/passwd", "a//b", "a/./b", "<script>alert(1)</script>", "=1+1", "line\nbreak", "trailing\n", "nul\0", "\ud800", "50 % (T1)", "x"*1000, "ü/é", "knn+lof"])
def test_hostile_names(name):
    assert taken(safe_name(name)) and taken(safe_name("residual", name, "ap")) and taken(safe_name(name, "ap"))
    assert safe_name(name) == safe_name(name) and safe_name(name) != safe_name(f"{name}'")


def test_good_names_stay():
    assert safe_name("residual", "pixel", "ap") == "residual/pixel_ap"
    assert safe_name("residual", "sites", "cut: ill against healthy") == "residual/sites_cut: ill against healthy"
    assert safe_name("größe") == "größe"


@pytest.mark.parametrize("content, found", [
    ({"kinds": None}, {}), ({"kinds": ["residual"]}, {}), ({"kinds": {"residual": 3}}, {}), ({}, {}),
    ({"kinds": {"a": {"x": True, "y": "1", "z": [1], "n": None, "i": float("inf"), "big": 10**400}}}, {}),
    ({"kinds": {"a": {"protocol": {"fpr": .01}, "image": {"protocol": 3}}}}, {"a/image_protocol": 3.0}),
    ({"seed": 3, "model": 4, "parameters": 150}, {"parameters": 150.0}),
])
def test_what_is_a_number(content, found):
    assert flat_metrics(content, ("seed", "model")) == found


@pytest.mark.parametrize("text", ["", "stage,epoch\n", "epoch,step,loss\n0,1,2\n", "stage,epoch,step,loss\ntrain,0,x,1\n", "stage,epoch,step,loss\ntrain,0,1,nan\n", "stage,epoch,step,loss\ntrain,0\n", "a\0b\nc", "stage,epoch,step,loss\ntrain,0,1,2,3,4\n"])
def test_odd_histories(tmp_path, text):
    (tmp_path/"history.csv").write_text(text)
    assert curves(tmp_path/"history.csv") in ({}, {"history train/loss": [(1, 2.0)]})


# --- entries -----------------------------------------------------------------------------------------------------------------------------------------------------------

def test_an_entry_is_made_of_what_is_there(tmp_path):
    folder = run_of(tmp_path, parameters={"model": "vae", "seed": 0, "inputs": "x"*9000, "odd": "SURROGATE"})
    (folder/"params.json").write_text((folder/"params.json").read_text().replace("SURROGATE", "\\ud800"))
    (folder/"figures").mkdir()
    (folder/"figures"/"panel.png").touch()
    (folder/"secret").write_text("of another")
    os.symlink(folder/"secret", folder/"figures"/"link.png")
    os.symlink(folder/"secret", folder/"notebook.ipynb")
    entry = entry_of(folder, folder.name, {"sweep": "claims"})
    assert [p.name for p, _ in entry.files] == ["metrics.json", "params.json", "panel.png"]
    assert len(entry.parameters["inputs"]) == 6000 and entry.parameters["odd"] == "?"
    assert entry.metrics == {"residual/threshold": .1, "residual/pixel_ap": .2}
    assert {k: entry.tags[k] for k in ("experiment", "key", "sweep", "state", "folder")} == {"experiment": "evaluate", "key": "c0ffee", "sweep": "claims", "state": "done", "folder": folder.name}
    write_json(folder/"provenance.json", {"commit": "abc", "dirty": True, "wall_seconds": 2.5, "peak_memory_mib": 100})
    entry = entry_of(folder, folder.name)
    assert entry.ended - entry.began == 2500 and entry.metrics["cost/peak_memory_mib"] == 100 and entry.tags["commit"] == entry.tags["mlflow.source.git.commit"] == "abc"


@pytest.mark.parametrize("broken", ["", "[1]", "null", '{"parameters": [1], "experiment": {}, "wall_seconds": "x"}', "[" * 100_000])
def test_broken_files_beside_a_result_cost_only_themselves(tmp_path, broken):
    folder = run_of(tmp_path)
    for name in ("params.json", "provenance.json"): (folder/name).write_text(broken)
    (entry,), left = entries(tmp_path)
    assert left == [] and entry.metrics["residual/pixel_ap"] == .2 and entry.experiment == "evaluate" and entry.parameters == {}


def test_which_runs_have_ended(tmp_path):
    run_of(tmp_path)
    (run_of(tmp_path, "cut")/"metrics.json").write_text('{"kinds"')
    ended(tmp_path, "failed", "a")
    (tmp_path/"failed"/"old").mkdir()
    (tmp_path/"failed"/"old"/"traceback.txt").write_text("cell 1\nValueError: no\n")
    for state in ("oom", "timeout", "killed"): ended(tmp_path, state, f"p-{state}", ".partial-")
    ended(tmp_path, "timeout", "again", ".partial-")
    (tmp_path/".partial-new").mkdir()
    (tmp_path/".locks").mkdir()
    with FileLock(tmp_path/".locks"/"again.lock"): found, left = entries(tmp_path)          # it is being made once more
    assert {e.name: (e.tags["state"], e.status) for e in found} == {"evaluate-brain-vae-c0ffee": ("done", "FINISHED"), "a": ("failed", "FAILED"), "old": ("failed", "FAILED"), "p-oom": ("oom", "FAILED"), "p-timeout": ("timeout", "FAILED")}
    assert next(e for e in found if e.name == "old").tags["message"] == "ValueError: no"
    assert left == [("cut", "its metrics.json is not whole")]


# --- once --------------------------------------------------------------------------------------------------------------------------------------------------------------

def test_each_run_is_entered_once_and_the_ledger_has_its_id(tmp_path):
    folder, store, ledger = run_of(tmp_path), Listed(), Ledger(tmp_path)
    ended(tmp_path, "oom", "evaluate-brain-ae-bad")
    ledger.queue(folder.name, "evaluate", {}, sweep="claims")
    assert track_folder(tmp_path, store) == ([folder.name, "evaluate-brain-ae-bad"], 0, [])                   # the finished first
    assert track_folder(tmp_path, store) == ([], 2, [])
    assert [(r["name"], r["track"]) for r in read_ledger(tmp_path)] == [(folder.name, "id-0")]               # no row is made for a run without one
    run_of(tmp_path, "evaluate-brain-ae-bad")                                                               # made again, with more memory
    assert track_folder(tmp_path, store)[:2] == (["evaluate-brain-ae-bad"], 1)
    (tmp_path/"ledger.sqlite").unlink()
    assert track_folder(tmp_path, store)[:2] == ([], 2)                                                     # the store knows by itself
    assert track_folder(tmp_path, Listed())[:2] == (["evaluate-brain-ae-bad", folder.name], 0)               # a new store takes all


def test_a_store_that_stops_in_the_middle(tmp_path):
    for n in range(3): run_of(tmp_path, f"evaluate-{n}")
    store = Listed(full=2)
    with pytest.raises(InputError, match="is locked"): track_folder(tmp_path, store)
    store.full = 1000
    assert track_folder(tmp_path, store)[:2] == (["evaluate-2"], 2)


def test_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "WAIT", .01)
    run_of(tmp_path)
    (tmp_path/".locks").mkdir()
    with FileLock(tmp_path/".locks"/"mlflow.lock"), pytest.raises(InputError, match="another process"): track_folder(tmp_path, Listed())


def test_a_truncated_store_is_broken(tmp_path):
    with sqlite3.connect(tmp_path/STORE) as db:
        for table in ("alembic_version", "runs", "tags"): db.execute(f"CREATE TABLE {table} (name TEXT)")
        db.executemany("INSERT INTO runs VALUES (?)", [("x"*100,)]*2000)
    db.close()
    check_store(tmp_path)
    os.truncate(tmp_path/STORE, (tmp_path/STORE).stat().st_size//8192*4096)
    with pytest.raises(InputError, match="is broken"): check_store(tmp_path)
    (tmp_path/STORE).unlink()
    (tmp_path/STORE).mkdir()
    with pytest.raises(InputError, match="mlflow.db"): check_store(tmp_path)


# --- the command -------------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture()
def home(tmp_path, monkeypatch):
    "(folder of a project, calls): its sweep only notes that it was called, and leaves a run."
    folder, calls = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1, 2]}\n", toy=[WRITE]), []
    monkeypatch.setenv("ANOMALY_NB_SETTINGS", str(folder/"settings.ini"))
    monkeypatch.setattr(sweep_commands, "run_sweep", lambda *args, **more: (calls.append(args), run_of(folder/"runs"), 0)[2])
    return folder, calls


def without(name): raise importlib.metadata.PackageNotFoundError(name)


def test_without_mlflow_nothing_is_begun(home, monkeypatch, capsys):
    folder, calls = home
    monkeypatch.setattr(tracking.need_mlflow, "__defaults__", (without,))
    for words in (["--track"], ["--collect", "--track"]): assert main(["sweep", str(folder/"mine.yaml"), *words]) == 2
    assert main(["sweep", "track"]) == 2 and "runs: is no folder" in capsys.readouterr().err                     # that is said first
    (folder/"runs").mkdir()
    assert main(["sweep", "track"]) == 2 and not calls
    said = capsys.readouterr().err
    assert said == 'anomaly-nb: tracking: MLflow is not installed; expected: the extra tracking: pip install -c constraints.txt -e ".[tracking]"\n'
    assert main(["sweep", str(folder/"mine.yaml")]) == 0 and len(calls) == 1                                     # not asked for


def test_the_setting_asks_for_it(home, monkeypatch, capsys):
    folder, calls = home
    store = Listed()
    monkeypatch.setattr(tracking, "need_mlflow", lambda: None)
    monkeypatch.setattr(tracking, "Store", lambda root: store)
    monkeypatch.setattr("anomaly_nb.sweep.prepare", lambda plan: plan)
    monkeypatch.setenv("ANOMALY_NB_RUNS_TRACK", "mlflow")
    assert settings_of().track == "mlflow"
    assert main(["sweep", str(folder/"mine.yaml")]) == 0 and "tracked: 1 new, 0 there before; to look: mlflow ui --backend-store-uri sqlite:////" in capsys.readouterr().out
    assert main(["sweep", str(folder/"mine.yaml"), "--dry-run"]) == 0 and "tracked" not in capsys.readouterr().out
    monkeypatch.setenv("ANOMALY_NB_RUNS_TRACK", "no")
    assert main(["sweep", str(folder/"mine.yaml"), "--track"]) == 0 and "0 new, 1 there before" in capsys.readouterr().out
    (folder/"runs"/"half").mkdir()
    (folder/"runs"/"half"/"metrics.json").write_text("{")
    assert main(["sweep", "track"]) == 1 and "not tracked: half: its metrics.json is not whole" in capsys.readouterr().err
    monkeypatch.setenv("ANOMALY_NB_RUNS_TRACK", "mlfow")
    assert main(["sweep", "track"]) == 2 and "did you mean 'mlflow'" in capsys.readouterr().err


def test_a_store_that_fails_costs_no_result(home, monkeypatch, capsys):
    folder, calls = home
    monkeypatch.setattr(tracking, "need_mlflow", lambda: None)
    monkeypatch.setattr(tracking, "Store", lambda root: Listed(full=0))
    assert main(["sweep", str(folder/"mine.yaml"), "--track"]) == 1
    said = capsys.readouterr().err
    assert "not tracked: mlflow.db: database is locked" in said and "The results are all in" in said and "anomaly-nb sweep track tries again" in said
    assert json.loads((folder/"runs"/"evaluate-brain-vae-c0ffee"/"metrics.json").read_text()) == METRICS
    (folder/"runs"/STORE).write_bytes(b"half a disk"*400)
    assert main(["sweep", str(folder/"mine.yaml"), "--track"]) == 2 and len(calls) == 1                          # said before the sweep began
    assert with_tracking(False, folder/"runs", lambda: 7) == 7
