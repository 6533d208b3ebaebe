"""Published tables beside ours: no cell is lost, a stand-in is never taken for a measurement, and what could not be run says why."""
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from anomaly_nb import catalog
from anomaly_nb.core import DataError, ParameterError
from anomaly_nb.data.chest import chest_records
from anomaly_nb.data.public_sets import PUBLIC_SETS
from anomaly_nb.methods.published import NOT_TABULATED, PUBLISHED, absent, against_paper, all_published, beside, draw_beside, measured_rows, not_run, published_table, told_against

KEY = ["method", "set", "metric"]


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    "No public set is here, whatever this machine's settings.ini says."
    for name in PUBLIC_SETS: monkeypatch.setenv(f"ANOMALY_NB_DATA_{name.upper()}", "")


def cells(table): return set(map(tuple, table[KEY].to_numpy()))


def some(name, n=3):
    "Numbers of ours for the first cells of a table, and one that the paper lacks."
    t = published_table(name)[:n]
    extra = {**t.iloc[0][KEY].to_dict(), "method": "mean image"}
    return pd.concat([t[KEY], pd.DataFrame([extra])], ignore_index=True).assign(value=.5, low=.4, high=.6, trainings=1)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_every_published_cell_is_there(name):
    p, t = PUBLISHED[name], published_table(name)
    for ours, data in ((None, "embedded"), (None, "real"), (some(name), "embedded")):
        table = beside(name, ours, data)
        assert cells(t) <= cells(table) and not table.duplicated(KEY).any() and len(table) == len(t) + (ours is not None)
        assert table[:len(t)]["paper"].tolist() == t["paper"].tolist() and (table["state"].str.len() > 0).all()
    assert {m for m in p.ours.values() if m} <= set(catalog.MODELS) and {d for d, *_ in (*p.sets.values(), p.train) if d} <= set(catalog.DATASETS)
    assert {d for d, _ in (*p.stand_ins.values(), p.stand_in_train)} <= set(catalog.DATASETS) and set(p.sets) == set(p.stand_ins) == set(t["set"])


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_stand_in_is_never_measured(name):
    table = beside(name, some(name), "embedded")
    assert table["measured"].isna().all() and (table["stand_in"].notna() == (table["state"] == "stand-in")).all() and table["stand_in"].notna().sum() == 4
    with pytest.raises(DataError, match="is not here"): beside(name, some(name), "real")               # nobody could have measured on a set that is absent


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_without_data_all_is_not_run_and_says_why(name):
    table = beside(name, None, "real")
    assert table["measured"].isna().all() and table["stand_in"].isna().all() and table["state"].str.startswith("NOT RUN: ").all()
    assert all(r.state.endswith("no such method here" if PUBLISHED[name].ours.get(r.method) == "" else absent(PUBLISHED[name].sets[r.set][0])) for r in table.itertuples())
    assert draw_beside(table).axes


def test_a_folder_makes_it_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("ANOMALY_NB_DATA_MVTEC", str(tmp_path))
    table = beside("mvtec", some("mvtec"), "real", {"FPI": "not asked for today", "all": "no time"})
    assert absent("mvtec") == "" and (table["measured"].notna() == (table["state"] == "measured")).all() and table["stand_in"].isna().all()
    assert set(table[table["method"] == "FPI"]["state"]) == {"NOT RUN: not asked for today"} and set(table[table["method"] == "DRAEM"]["state"]) == {"NOT RUN: no time"}
    monkeypatch.setenv("ANOMALY_NB_DATA_MVTEC", str(tmp_path/"typo"))
    assert "is no folder" in absent("mvtec")


def test_where_the_paper_lies_to_our_interval():
    table = beside("mvtec", some("mvtec"))
    assert not len(against_paper(table)) and told_against(table) == "No cell of the paper was measured."        # a stand-in reaches nothing
    real = table.assign(measured=table["stand_in"], paper=[.7, .5, .3, *table["paper"][3:]])
    real.loc[3:, "measured"] = math.nan
    found = against_paper(real)
    assert found["verdict"].tolist() == ["ours below", "paper inside our interval", "ours above"] and np.allclose(found["difference"], [-.2, 0, .2])
    assert against_paper(real.assign(low=math.nan))["verdict"].tolist() == ["no interval"]*3 and told_against(real).startswith("Of 3 cells")
    assert told_against(real.assign(method="Random")) == "No cell of the paper was measured."


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_every_cell_without_a_number_has_its_reason(name):
    table = beside(name, some(name), why={"all": "no time"})
    assert not_run(table)["cells"].sum() == table["state"].str.startswith("NOT RUN").sum() and not_run(table)["reason"].is_unique


def test_a_crowded_figure_keeps_the_ensembles():
    "Single folds go first; a part of an ensemble stands beside the paper's whole one."
    t = published_table("many_tasks_mri")
    ours = t[t["method"].str.contains("fold |^Random")][KEY]
    ours = pd.concat([ours, ours[ours["method"] == "Random"].assign(method="1/4 ensemble (of 2)")], ignore_index=True).assign(value=.5, low=.4, high=.6, trainings=1)
    labels = [label.get_text() for label in draw_beside(beside("many_tasks_mri", ours)).axes[0].get_yticklabels()]
    assert {"1/4 ensemble", "1/4 ensemble (of 2)", "Random"} <= set(labels) and not any(" fold " in label for label in labels)


def test_wrong_names_and_double_cells():
    with pytest.raises(ParameterError): published_table("many_task_mri")
    with pytest.raises(ParameterError): absent("brain")                                                # made here: nobody brings it
    with pytest.raises(ParameterError): beside("mvtec", data="reel")
    with pytest.raises(DataError, match="twice"): beside("mvtec", pd.concat([some("mvtec")]*2))


def test_the_folds_give_the_printed_means():
    "592 typed numbers: means and standard deviations over folds are printed as well."
    t = pd.concat([published_table(n) for n in ("many_tasks_mri", "many_tasks_xray")])
    folds = t[t["method"].str.contains(" fold ")]
    printed = t[t["method"].str.endswith("mean of folds")]
    assert len(printed) == 4*8 and folds.groupby(["set", "metric"]).size().eq(30).all()
    for r in printed.itertuples():
        own = folds[folds["method"].str.startswith(r.method[:3]) & (folds["set"] == r.set) & (folds["metric"] == r.metric)]["paper"]
        assert abs(own.mean() - r.paper) < 1e-3 and abs(own.std() - r.spread) < 1e-3, r


def test_seeds_are_joined():
    rng, key = np.random.default_rng(0), ("VAE", "a", "voxel AP")
    one = measured_rows({key: [(.5, rng.normal(.5, .01, 500))]}, {"a": 30})
    two = measured_rows({key: [(.4, rng.normal(.4, .01, 500)), (.6, rng.normal(.6, .01, 500))]}, {"a": 30}, {"VAE": 10})
    assert one["value"][0] == two["value"][0] == .5 and (one["trainings"][0], two["trainings"][0]) == (1, 10)
    assert two["high"][0] - two["low"][0] > 3*(one["high"][0] - one["low"][0])
    assert not len(measured_rows({key: [(math.nan, [math.nan])]}, {"a": 30}))


def test_papers_without_a_number_are_listed():
    t = all_published()
    assert set(NOT_TABULATED) <= set(t["source"]) and t["state"].str.len().gt(0).all() and t["numbers"].gt(0).sum() == len(PUBLISHED)


def executed(name, out, **given):
    "(table, metrics) that the code of a reproduction leaves in `out`, run in this process with other parameters."
    notebook = json.loads((Path(__file__).parents[1]/"nbs"/"experiments"/f"reproduce_many_tasks_{name}.ipynb").read_text(encoding="utf-8"))
    space = {"display": lambda *shown: None}
    for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
        exec("".join(cell["source"]), space)
        if "draw_beside" in space: space["draw_beside"] = lambda *_: Figure(figsize=(1, 1))                # figures are tested above
        if "parameters" in cell["metadata"].get("tags", []): space |= given | {"out": str(out)}
    return pd.read_csv(out/"scores"/"beside.csv"), json.loads((out/"metrics.json").read_text())


@pytest.mark.parametrize("name", ["mri", "xray"])
def test_the_experiment_without_data_trains_nothing(name, tmp_path):
    table, told = executed(name, tmp_path, data="real")
    assert cells(published_table(f"many_tasks_{name}")) == cells(table) and table["state"].str.contains(r"^NOT RUN: .*(?:under \[data\]|asked for|not run here)").all()
    assert told["folds"] == [] and not told["cells"] and not list((tmp_path/"checkpoints").rglob("*.safetensors")) and (tmp_path/"section.json").is_file()


def test_a_miniature_is_measured(tmp_path, monkeypatch):
    "The embedded chest cohort lies on disk as VinDr-CXR does; some of its training part plays DDAD's list."
    found = chest_records("tiny", pools=("train", "val", "val_anomalous", "test"))
    names = {pool: [f"{Path(r.images[0]).stem}.png" for r in items] for pool, items in found.items()}
    (tmp_path/"list.json").write_text(json.dumps({"train": {"0": names["train"][:15], "unlabeled": {"0": [], "1": []}}, "test": {"0": names["val"], "1": names["val_anomalous"]}}))
    monkeypatch.setenv("ANOMALY_NB_DATA_VINDR", str(Path(found["train"][0].images[0]).parents[1]))
    table, told = executed("xray", tmp_path, data="real", ddad_list=str(tmp_path/"list.json"), data_options="side=64", trained=4, folds="0,3", methods="MemAE", baselines="none", epochs=1, baseline_epochs=1, batch_size=16, model_options="widths=(4,8)", n_boot=10)
    measured = table[table["state"] == "measured"]
    assert table["stand_in"].isna().all() and set(measured["method"]) == {"MemAE", "Random", "4/1 fold 0", "4/1 fold 3", "4/1 ensemble (of 2)", "4/1 mean of folds (of 2)"}
    assert set(measured["set"]) == {"DDAD's test split", "VinDr-CXR test"} and told["people"] == {"DDAD's test split": 16, "VinDr-CXR test": 22}
    assert table[table["method"].isin(["4/1 ensemble", "1/4 fold 0", "NSA"])]["state"].str.startswith("NOT RUN: not asked for").all()        # two of five networks are not the paper's ensemble
    trainings = measured.groupby("method")["trainings"].first()
    assert (trainings["Random"], trainings["MemAE"], trainings["4/1 ensemble (of 2)"]) == (0, 1, 2)
