"""Runs in a real MLflow store: what is in it, that it is in it once, and that a store that fails costs nothing. Where MLflow is not installed these are NOT RUN."""
import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from project import WRITE, call, project
from test_kill import wait_for

from anomaly_nb import tracking
from anomaly_nb.core import InputError, write_json
from anomaly_nb.ledger import read_ledger
from anomaly_nb.tracking import STORE, Store, track_folder

NUMBERS = WRITE.replace("{'n': n, 'seed': seed}", "{'n': n, 'seed': seed, 'kinds': {'knn+lof': {'protocol': {'fpr': .01}, 'pixel': {'ap': .1*n, 'dice': None}, 'families': {'T1 (post)': {'dice': .3}}}}}")
FIGURE = "pathlib.Path(out, 'figures').mkdir(); pathlib.Path(out, 'figures', 'panel.png').write_bytes(b'a picture')"


@pytest.fixture(scope="module", autouse=True)
def mlflow():
    "MLflow, saying nothing to its makers."
    if importlib.util.find_spec("mlflow") is None:
        said = 'NOT RUN: runs in MLflow, for it is not installed (pip install -c constraints.txt -e ".[tracking]")'
        pytest.fail(said, pytrace=False) if os.environ.get("CI") else pytest.skip(said)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow
    return mlflow


@pytest.fixture(scope="module")
def empty(mlflow, tmp_path_factory):
    "A new store without runs; making one takes seconds."
    folder = tmp_path_factory.mktemp("empty")
    Store(folder)
    return folder/STORE


@pytest.fixture()
def root(empty, tmp_path):
    "A folder of three runs, one of them failed, with an empty store."
    shutil.copy(empty, tmp_path/STORE)
    for n in range(2):
        write_json(tmp_path/f"evaluate-{n}"/"params.json", {"experiment": "evaluate", "parameters": {"seed": n, "odd (+)": "", "text": "<script>alert(1)</script>"}})
        write_json(tmp_path/f"evaluate-{n}"/"metrics.json", {"kinds": {"residual": {"pixel": {"ap": .5}}}})
    write_json(tmp_path/"failed"/"evaluate-2"/"state.json", {"state": "failed", "message": "ValueError: no", "seconds": 1.0, "attempts": 1})
    (tmp_path/"failed"/"evaluate-2"/"traceback.txt").write_text("cell 3\nValueError: no\n")
    return tmp_path


def client_of(folder):
    from mlflow import MlflowClient
    return MlflowClient(tracking_uri=f"sqlite:///{Path(folder).resolve()/STORE}")


def runs_of(folder, which=1):
    "{name: run} of the runs that a person sees (3: the deleted ones as well)."
    client = client_of(folder)
    return {run.info.run_name: run for run in client.search_runs([e.experiment_id for e in client.search_experiments()], run_view_type=which)}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file() and p.name.split(".")[-1] in ("json", "txt", "ipynb", "png") and "mlflow-artifacts" not in p.parts}


def test_a_sweep_is_tracked_once(tmp_path):
    folder = project(tmp_path/"a ü 5%", "experiment: toy\ngrid: {n: [1, 2, 3]}\n", toy=["if n == 3: raise ValueError('three is too many')", NUMBERS, FIGURE])
    first = call(folder, "sweep", "mine.yaml", "--track")
    assert "tracked: 3 new, 0 there before" in first.stdout, first.stderr
    assert "INFO" not in first.stderr and "Warning" not in first.stderr
    before = (folder/"runs"/STORE).stat().st_size
    for words in (["mine.yaml", "--track"], ["track"]): assert "tracked: 0 new, 3 there before" in call(folder, "sweep", *words).stdout
    assert (folder/"runs"/STORE).stat().st_size == before and not list(tmp_path.rglob("mlruns"))
    rows, runs = {r["name"]: r for r in read_ledger(folder/"runs")}, runs_of(folder/"runs")
    assert {name: run.info.run_id for name, run in runs.items()} == {name: r["track"] for name, r in rows.items()} and len(runs) == 3

    good = next(run for run in runs.values() if run.data.params["n"] == "2")
    assert good.info.status == "FINISHED" and good.data.params["what"] == ""
    assert {n.split("/")[-1].split("-")[0]: v for n, v in good.data.metrics.items()} == {"pixel_ap": .2, "families_T1 _post_": .3}
    assert {k: good.data.tags[k] for k in ("experiment", "sweep", "state")} == {"experiment": "toy", "sweep": "mine", "state": "done"} and good.info.run_name.endswith(good.data.tags["key"])
    place, own = Path(tmp_path/folder/"runs"/"mlflow-artifacts"/good.info.run_id/"artifacts"), folder/"runs"/good.info.run_name
    assert {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()} == {"notebook.ipynb", "metrics.json", "params.json", "section.json", "figures/panel.png"}
    assert all((place/name).read_bytes() == (own/name).read_bytes() for name in ("notebook.ipynb", "metrics.json", "figures/panel.png"))
    bad = next(run for run in runs.values() if run.data.params["n"] == "3")
    assert (bad.info.status, bad.data.tags["state"], bad.data.tags["message"]) == ("FAILED", "failed", "ValueError: three is too many")
    assert "three is too many" in (folder/"runs"/"mlflow-artifacts"/bad.info.run_id/"artifacts"/"traceback.txt").read_text()


def test_what_was_begun_is_entered_again_and_what_was_deleted_stays_away(root):
    new, before, left = track_folder(root)
    assert (len(new), before, left) == (3, 0, [])
    assert {name: run.info.status for name, run in runs_of(root).items()} == {"evaluate-0": "FINISHED", "evaluate-1": "FINISHED", "evaluate-2": "FAILED"}
    client, run = client_of(root), runs_of(root)["evaluate-0"]
    assert run.data.params["text"] == "<script>alert(1)</script>" and any(name.startswith("odd ___-") for name in run.data.params)
    client.update_run(run.info.run_id, status="RUNNING")                                      # the power went while its files were copied
    client.delete_run(runs_of(root)["evaluate-1"].info.run_id)                                # a person did not want it
    assert track_folder(root)[:2] == (["evaluate-0"], 2)
    again = runs_of(root)
    assert {*again} == {"evaluate-0", "evaluate-2"} and again["evaluate-0"].info.run_id != run.info.run_id
    client.delete_experiment(again["evaluate-0"].info.experiment_id)
    assert track_folder(root)[:2] == ([], 3)
    write_json(root/"evaluate-3"/"metrics.json", {})
    with pytest.raises(InputError, match="'evaluate' was deleted"): track_folder(root)


def test_many_numbers_and_names(root):
    names = [f"a{chr(c)}b" for c in range(32, 600)]
    write_json(root/"evaluate-9"/"metrics.json", {"kinds": {"k": {"pixel": dict(zip(names, range(len(names)))), "..": {"x"*400: 1, "": 2}, "more": {f"m{n}": n for n in range(1500)}}}})
    write_json(root/"evaluate-9"/"params.json", {"experiment": "evaluate/../x", "parameters": {f"p{n}": n for n in range(250)} | {"inputs": "x"*20_000}})
    (root/"evaluate-9"/"scores").mkdir()
    (root/"evaluate-9"/"scores"/"history.csv").write_text("stage,epoch,step,loss\n" + "".join(f"train,{n},{n},{1/(n + 1)}\n" for n in range(1000)))
    assert len(track_folder(root)[0]) == 4
    run = runs_of(root)["evaluate-9"]
    assert len(run.data.metrics) == len(names) + 2 + 1500 + 1 and len(run.data.params) == 251
    assert len(client_of(root).get_metric_history(run.info.run_id, "history train/loss")) == 1000


def test_a_locked_store(root, monkeypatch):
    monkeypatch.setattr(tracking, "WAIT", .2)
    before, store = contents(root), Store(root)
    other = sqlite3.connect(root/STORE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match="mlflow.db: cannot be written .database is locked"): track_folder(root)
    other.execute("ROLLBACK"); other.execute("BEGIN IMMEDIATE")                                # reading goes on, writing does not
    with pytest.raises(InputError, match="mlflow.db: does not take evaluate-0 .*locked"): store.enter(tracking.entries(root)[0][0])
    other.close()
    assert len(track_folder(root)[0]) == 3 and contents(root) == before


def test_a_store_of_another_version(root):
    with sqlite3.connect(root/STORE) as db: db.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    db.close()
    before = contents(root)
    done = call(root, "sweep", "track", ANOMALY_NB_RUNS_FOLDER=root)
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert f"{root/STORE}: cannot be opened" in done.stderr and "mlflow db upgrade sqlite:///" in done.stderr and contents(root) == before
    (root/STORE).unlink()
    assert "3 new, 0 there before" in call(root, "sweep", "track", ANOMALY_NB_RUNS_FOLDER=root).stdout      # made anew


def test_mlflow_shows_it(root):
    "The page of `mlflow ui` and what it asks its server for."
    track_folder(root)
    port = 5000 + os.getpid() % 5000
    server = subprocess.Popen([sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", f"sqlite:///{root/STORE}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=root)
    def ask(path, **content):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", json.dumps(content).encode() if content else None, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=20).read()
    def up():
        try: return ask("health")
        except OSError: return None
    try:
        wait_for(up, 90)
        assert b"<title>MLflow" in ask("")
        found = json.loads(ask("ajax-api/2.0/mlflow/runs/search", experiment_ids=["1"], filter='metrics."residual/pixel_ap" > 0.4 and params.seed = "1"'))["runs"]
        assert [run["info"]["run_name"] for run in found] == ["evaluate-1"]
        bad = runs_of(root)["evaluate-2"].info.run_id
        assert b"ValueError: no" in ask(f"get-artifact?path=traceback.txt&run_uuid={bad}")
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)
