"""Three published tables beside ours: every published cell is there; embedded numbers never stand where real ones do; nothing is trained without data; on miniatures of the sets it is measured."""
import csv
import functools
import json
from contextlib import nullcontext
from unittest.mock import patch

import matplotlib
import numpy as np
import pandas as pd
import pytest
import test_ms_sets as ms
from matplotlib.figure import Figure
from PIL import Image

from anomaly_nb.core import DataError, ParameterError
from anomaly_nb.data.mvtec import CATEGORIES
from anomaly_nb.experiment import load_records
from anomaly_nb.methods import published
from anomaly_nb.methods.published import PUBLISHED, published_table
from anomaly_nb.models import fit as fitting
from anomaly_nb.parameters import check_parameters, code_cells, experiment_path

NAMES = ("ct_pretext", "lesion_sets", "mvtec")
QUICK = {"ct_pretext": dict(methods="vae", baselines="", epochs=1), "lesion_sets": dict(methods="intensity", baselines=""), "mvtec": dict(methods="cutpaste", baselines="")}


@pytest.fixture(autouse=True)
def nobody_has_data(monkeypatch, tmp_path_factory):
    "Whatever this machine's settings.ini names, no set is here until a test says so."
    matplotlib.use("Agg")
    for name in {n for p in PUBLISHED.values() for n, *_ in p.sets.values() if n} | {"folder"}: monkeypatch.setenv(f"ANOMALY_NB_DATA_{name.upper()}", "")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ANOMALY_NB_PATHS_CACHE", str(tmp_path/"cache"))


def run(name, out, drawn=False, **given):
    "Executes the experiment here, with an empty figure unless `drawn`: (table, what its cells defined)."
    path, names = experiment_path(f"reproduce_{name}"), {}
    values = check_parameters(path, given) | {"out": str(out)}
    with nullcontext() if drawn else patch.object(published, "draw_beside", lambda *_: Figure(figsize=(1, 1))):
        for source, tags in code_cells(path):
            if "parameters" in tags: names |= values
            else: exec(compile(source, str(path), "exec"), names)
    for file in ("provenance.json", "metrics.json", "section.json"): json.loads((out/file).read_text())
    return pd.read_csv(out/"scores"/"beside.csv"), names


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    "Tables of runs on embedded cohorts, each made once."
    return functools.cache(lambda name: run(name, tmp_path_factory.mktemp(name), drawn=True, **QUICK[name], n_boot=20)[0])


def cells(table): return set(map(tuple, table[["method", "set", "metric"]].to_numpy()))


@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_never_fills_the_column_of_the_real_set(name, stand_in):
    table = stand_in(name)
    assert cells(published_table(name)) <= cells(table) and not table.duplicated(["method", "set", "metric"]).any()
    assert table["measured"].isna().all() and table["stand_in"].notna().any()
    assert set(table["state"].str.partition(":")[0]) == {"stand-in", "NOT RUN"}
    assert (table["stand_in"].notna() == (table["state"] == "stand-in")).all()
    paper = table.merge(published_table(name), on=["method", "set", "metric"], suffixes=("", "_printed"))
    assert len(paper) == len(published_table(name)) and np.allclose(paper["paper"], paper["paper_printed"])


@pytest.mark.parametrize("name", NAMES)
def test_without_data_nothing_is_trained_and_every_cell_says_why(name, tmp_path, monkeypatch):
    def never(*_, **__): raise AssertionError("something was trained")
    monkeypatch.setattr(fitting, "fit", never)
    table, _ = run(name, tmp_path, data="real")
    assert cells(table) == cells(published_table(name))
    assert table[["measured", "stand_in"]].isna().all(axis=None)
    why = table["state"].str.removeprefix("NOT RUN: ")
    assert table["state"].str.startswith("NOT RUN: ").all() and (why.str.len() > 10).all()
    sets = {"ct_pretext": "never published", "lesion_sets": "no line", "mvtec": "no line mvtec = FOLDER"}
    assert why[table["method"] != "8 transformers"].str.contains(sets[name]).all()


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ANOMALY_NB_DATA_MVTEC", str(tmp_path/"typo"))
    table, _ = run("mvtec", tmp_path/"run", data="real")
    assert table["state"].str.contains("typo").all()


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_word_is_refused(name, tmp_path):
    for given in (dict(data="reel"), dict(methods="vea"), dict(baselines="vae")):
        with pytest.raises(ParameterError): run(name, tmp_path/"run", **QUICK[name] | given)


def test_lesion_sets_are_measured_where_they_are(tmp_path, monkeypatch, cache):
    "MSLUB teaches with its own lesion-free slices; ISBI has nobody to spare and is taught by those of MSLUB; BraTS and WMH are not there."
    ms.mslub(tmp_path/"mslub", people=10); ms.isbi(tmp_path/"isbi")
    for name in ("mslub", "isbi"): monkeypatch.setenv(f"ANOMALY_NB_DATA_{name.upper()}", str(tmp_path/name))
    table, made = run("lesion_sets", tmp_path/"run", data="real", methods="intensity+ae", baselines="", epochs=1, n_boot=20, margin_mm=1.0, steps="", grid="12x24x22", model_options="widths=(4,8)")
    state = {(m, s): state for m, s, state in table[["method", "set", "state"]].to_numpy()}
    for column in ("MSLUB, beside transformers", "MSLUB, beside autoencoders", "MSSEG 2015"): assert state["FLAIR threshold", column] == "measured"
    assert state["dense autoencoder", "MSSEG 2015"] == "measured" and table["stand_in"].isna().all()
    assert state["FLAIR threshold", "BraTS"] == "NOT RUN: no line brats = FOLDER under [data] in settings.ini"
    assert state["8 transformers", "MSLUB, beside transformers"] == "NOT RUN: no such method here" and state["f-AnoGAN", "MSSEG 2015"].startswith("NOT RUN: not asked for")
    assert len(made["fitted"]) == 2                                              # one training for both sets
    best = table[(table["method"] == "FLAIR threshold") & (table["metric"] == "best Dice")].set_index("set")
    assert best.loc["MSSEG 2015", "measured"] > 0.9 and best.loc["MSLUB, beside autoencoders", "measured"] > 0.9       # the lesions of a miniature are the brightest of its brain
    fair = table[(table["method"] == "FLAIR threshold") & (table["metric"] == "Dice, normals' threshold")].set_index("set")["measured"]
    assert len(fair) == 2 and (fair < best.loc[fair.index, "measured"]).all() and (best["low"] <= best["high"])[best["measured"].notna()].all()
    tested = {r.subject for found in made["pools"].values() for r in found["test"]}
    assert not tested & {r.subject for found in made["pools"].values() for pool in ("train", "val") for r in found[pool]}
    assert all(r.label == 0 for found in made["pools"].values() for pool in ("train", "val") for r in found[pool]) and all(r.label for found in made["pools"].values() for r in found["test"])


def test_healthy_people_of_another_set_teach_when_they_are_given(tmp_path, monkeypatch, cache):
    ms.mslub(tmp_path/"mslub", people=6)
    monkeypatch.setenv("ANOMALY_NB_DATA_MSLUB", str(tmp_path/"mslub"))
    for n in range(5):
        grid = ms.Grid("RAS")
        ms.put(tmp_path/"healthy"/f"person{n}.nii.gz", grid.head(ms.seat(n), n)*~grid.lesion(ms.seat(n)), grid)
    table, made = run("lesion_sets", tmp_path/"run", data="real", methods="intensity", baselines="", healthy="folder", healthy_path=str(tmp_path/"healthy"), healthy_options="foreground=nonzero", n_boot=10, steps="", grid="12x24x22")
    (place, found), = made["pools"].items()
    assert made["taught"] == "folder" and all("healthy" in r.images[0] for pool in ("train", "val") for r in found[pool]) and all("mslub" in r.id and r.label for r in found["test"])
    assert (table.loc[(table["method"] == "FLAIR threshold") & table["set"].str.contains("MSLUB"), "state"] == "measured").all()
    with pytest.raises(ParameterError): run("lesion_sets", tmp_path/"other", data="real", healthy="folder")


def test_isbi_alone_has_nobody_to_learn_from(tmp_path, monkeypatch, cache):
    ms.isbi(tmp_path/"isbi")
    monkeypatch.setenv("ANOMALY_NB_DATA_ISBI", str(tmp_path/"isbi"))
    table, _ = run("lesion_sets", tmp_path/"run", data="real", steps="", grid="12x24x22")
    own = table[(table["set"] == "MSSEG 2015") & (table["method"] != "8 transformers")]
    assert len(own) and own["state"].str.contains("nobody to learn from").all() and table["measured"].isna().all()


def mvtec(root, categories, taught=10, tested=3):
    rng = np.random.default_rng(0)
    for c, kind in ((c, kind) for c in categories for kind in ("train/good", "test/good", "test/broken")):
        (root/c/kind).mkdir(parents=True)
        for i in range(taught if kind == "train/good" else tested):
            picture = rng.integers(90, 110, (16, 16) if c == "grid" else (16, 16, 3)).astype("uint8")
            if kind == "test/broken":
                picture[4:10, 5:11] = 250
                (root/c/"ground_truth"/"broken").mkdir(parents=True, exist_ok=True)
                mask = np.zeros((16, 16), "uint8"); mask[4:10, 5:11] = 255
                Image.fromarray(mask).save(root/c/"ground_truth"/"broken"/f"{i:03d}_mask.png")
            Image.fromarray(picture).save(root/c/kind/f"{i:03d}.png")


def test_a_mean_over_fewer_categories_is_no_published_mean(tmp_path, monkeypatch, cache):
    mvtec(tmp_path/"mvtec"/"mvtec_anomaly_detection", ("bottle", "grid"))
    monkeypatch.setenv("ANOMALY_NB_DATA_MVTEC", str(tmp_path/"mvtec"))
    table, _ = run("mvtec", tmp_path/"run", data="real", data_options="side=16", methods="cutpaste", epochs=1, n_boot=20)
    assert table.loc[table["paper"].notna(), "state"].str.startswith("NOT RUN").all()
    assert table.loc[(table["paper"].notna()) & (table["method"] == "CutPaste, 3 classes"), "state"].str.contains("2 of 15 categories").all()
    own = table[table["set"] == "MVTec AD, 2 of 15 categories"]
    each = pd.read_csv(tmp_path/"run"/"scores"/"mvtec_categories.csv")
    assert (own["state"] == "measured").all() and set(each["category"]) == {"bottle", "grid"}
    for row in own.itertuples(): assert np.isclose(row.measured, each[(each["method"] == row.method) & (each["metric"] == row.metric)]["value"].mean())
    with pytest.raises(ParameterError): run("mvtec", tmp_path/"other", data="real", categories="botle", data_options="side=16")


def test_all_categories_fill_the_published_cells(tmp_path, monkeypatch, cache):
    mvtec(tmp_path/"mvtec", CATEGORIES, 5, 2)
    monkeypatch.setattr(fitting, "fit", lambda *_, **__: [])                     # untrained networks have numbers, too
    monkeypatch.setenv("ANOMALY_NB_DATA_MVTEC", str(tmp_path/"mvtec"))
    table, made = run("mvtec", tmp_path/"run", data="real", data_options="side=16", methods="nsa", baselines="", epochs=1, n_boot=5, model_options="widths=(4,8)")
    nsa = table[table["method"] == "NSA"].set_index("set")
    assert (nsa["state"] == "measured").all() and set(nsa.index) == set(PUBLISHED["mvtec"].sets)
    assert len(made["solid"]) == 10 and np.isclose(nsa.loc["MVTec AD, 15 categories", "measured"], made["by_category"].query("method == 'NSA'")["value"].mean())


def test_your_own_ct_scans_are_not_the_papers(tmp_path, stand_in):
    "The same people through a manifest give the numbers of the embedded cohort, and no cell of the paper is filled by them."
    records = load_records("ct", "tiny", "CT", PUBLISHED["ct_pretext"].stand_ins["clinical CT"][1])
    with open(tmp_path/"ct.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow("path subject label mask family split foreground".split())
        rows.writerows([r.images[0], r.subject, r.label, r.mask or "", r.meta["family"], pool, r.foreground or ""] for pool in ("train", "val", "test") for r in records[pool])
    table, _ = run("ct_pretext", tmp_path/"b", **QUICK["ct_pretext"], data="real", path=str(tmp_path/"ct.csv"), model_options="widths=(4,8) latent=8", n_boot=20)
    own = table[table["set"] == "own CT scans"].set_index(["method", "metric"])["measured"]
    assert table.loc[table["set"] == "clinical CT", "state"].str.contains("never published").all() and len(own) == 6
    same = stand_in("ct_pretext").dropna(subset="stand_in").set_index(["method", "metric"])["stand_in"]
    assert np.allclose(own[same.index], same)
    counts = pd.read_csv(tmp_path/"b"/"scores"/"ct_counts.csv")
    assert counts["volumes in the paper"].tolist() == [119, 30, 30, 44] and counts["volumes here"].tolist() == [len(records["train"]), len(records["val"]), *(sum(r.label == ill for r in records["test"]) for ill in (0, 1))]
    with pytest.raises((DataError, ParameterError)): run("ct_pretext", tmp_path/"c", path=str(tmp_path/"ct.csv"))
