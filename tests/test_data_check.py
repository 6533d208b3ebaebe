"""`anomaly-nb data check` on a miniature of every real data set: whole ones pass; of broken ones every missing and every broken file is named."""
import json
from pathlib import Path

import pytest
import test_healthy_sets as healthy
import test_lesion_sets as lesions
import test_ms_sets as ms
from test_cli import call

from anomaly_nb.core import DataError, check_sample
from anomaly_nb.data_commands import check_set
from anomaly_nb.experiment import ALL_POOLS, make_set, read_set


def wmh(root):
    for place, axes in lesions.PLACES.items(): lesions.wmh_person(root/place, int(place.rpartition("/")[2]), axes)


def brats(root):
    for n in (1, 2, 3): lesions.brats_person(root/"MICCAI_BraTS2020_TrainingData"/f"BraTS20_Training_{n:03d}", n)


BUILDERS = {"wmh": wmh, "brats": brats, "mslub": ms.mslub, "msseg": ms.msseg, "msseg2008": ms.msseg2008, "isbi": ms.isbi, "isles": ms.siss, "ixi": healthy.ixi_mini, "hcp": healthy.hcp_mini, "mood_brain": healthy.mood_mini, "chexpert": healthy.chexpert_mini}
ROOTS = {"mood_brain": "brain", "chexpert": "CheXpert-v1.0-small"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=BUILDERS)
def mini(request, tmp_path, cache, monkeypatch):
    "(name, root) of a fresh miniature, in a folder whose name is not plain; derived files go to a cache of the tests."
    monkeypatch.setenv("ANOMALY_NB_PATHS_CACHE", str(cache))
    root = tmp_path/"Köpfe (v1) ."/ROOTS.get(request.param, "set")
    BUILDERS[request.param](root)
    return request.param, root


def test_a_whole_copy_passes_and_a_broken_one_names_every_file(mini, capsys):
    name, root = mini
    assert check_set(name, str(root)) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "no problems" in out and ("whole copies of" in out or name in ("msseg2008", "isbi"))
    files = sorted({Path(f) for items in read_set(name, "", "", "", ALL_POOLS, str(root)).values() for r in items for f in r.images if root in Path(f).parents})
    if name == "msseg2008": files = sorted(root.rglob("*_FLAIR.raw"))                             # NRRD: read through a NIfTI in the cache
    broken = files[:2]
    for f in broken: f.write_bytes(f.read_bytes()[:len(f.read_bytes())//3])
    assert check_set(name, str(root)) == 1
    out = capsys.readouterr().out
    assert all(f.stem in out for f in broken), out
    if name in ("ixi", "mood_brain", "mslub"): return                                            # nothing promises a file of theirs: only the count can tell
    for f in broken: f.unlink()
    assert check_set(name, str(root)) == 1
    out = capsys.readouterr().out
    assert all(any(n in out for n in (f.stem, f.parent.name, f.parent.name.rpartition(".")[0])) for f in broken), out


def test_a_folder_that_is_not_there(tmp_path):
    for name in BUILDERS:
        with pytest.raises(DataError, match="nowhere"): check_set(name, str(tmp_path/"nowhere"))


def test_a_folder_with_something_else(tmp_path, capsys):
    (tmp_path/"x").mkdir(); (tmp_path/"x"/"readme.txt").write_text("no scans")
    for name in BUILDERS:
        assert check_set(name, str(tmp_path)) == 1
        assert str(tmp_path) in capsys.readouterr().out


def test_files_that_are_no_nifti(capsys):
    assert check_set("chest") == 0
    out = capsys.readouterr().out
    assert "stored as   DICOM" in out


@pytest.mark.parametrize("dims", [2, 3])
def test_every_set_makes_samples(mini, dims):
    name, root = mini
    found = read_set(name, "", "", "", ALL_POOLS, str(root))
    records = [r for items in found.values() for r in items]
    if name == "chexpert" and dims == 3: return                                                   # pictures
    samples = make_set(records, dims, grid="12x24x24", min_foreground=0.01)
    assert len(samples) >= len(records)
    one = check_sample(samples[0])
    assert one["image"].shape[1:] == ((24, 24) if dims == 2 else (12, 24, 24)) or name == "chexpert"
    lesion = sum(bool(samples[i]["mask"].any()) for i in range(len(samples)))
    assert bool(lesion) == any(r.label and r.mask_known for r in records)


@pytest.mark.long
def test_learned_on_one_set_tested_on_another(tmp_path):
    "From the settings to the report: two miniatures, joined, through the experiment notebook, from the command line; and a prepared copy of one of them."
    healthy.ixi_mini(tmp_path/"ixi"); wmh(tmp_path/"WMH 2017")
    env = {"ANOMALY_NB_DATA_IXI": str(tmp_path/"ixi"), "ANOMALY_NB_DATA_WMH": str(tmp_path/"WMH 2017"), "ANOMALY_NB_RUNS_FOLDER": str(tmp_path/"runs"), "ANOMALY_NB_PATHS_CACHE": str(tmp_path/"cache")}
    info = call("data", "info", "wmh", **env)
    assert info.returncode == 0 and "doi 10.34894/AECRSD" in info.stdout and "WMH 2017" in info.stdout
    done = call("run", "evaluate", "-p", "dataset=cross", "-p", "data_options=source=ixi target=wmh margin_mm=0.0", "-p", "contrast=T1", "-p", "model=mean", "-p", "grid=12x24x24", **env)
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path/"runs").glob("evaluate-cross-mean-*")
    metrics = json.loads((folder/"metrics.json").read_text())
    counts = next(iter(metrics["kinds"].values()))["counts"]
    assert counts["anomalous"] and counts["subjects"] > counts["anomalous"]
    assert str(tmp_path) not in json.dumps(metrics)
    copied = call("data", "prepare", "wmh", "--steps", "resample=1", "--to", str(tmp_path/"copy"), "--processes", "1", **env)
    assert copied.returncode == 0, copied.stderr
    read = call("data", "check", "wmh", **env | {"ANOMALY_NB_DATA_WMH": str(tmp_path/"copy")})
    assert read.returncode == 0 and "1x1x1" in read.stdout, read.stdout + read.stderr
    wrong = call("data", "prepare", "wmh", "--steps", "resampel=1", "--to", str(tmp_path/"other"), **env)
    assert wrong.returncode == 2 and "did you mean 'resample'" in wrong.stderr and not (tmp_path/"other").exists()
