"""`anomaly-nb data check` on a miniature of every real data set: whole ones pass; of broken ones every missing and every broken file is named."""
from pathlib import Path

import pytest
import test_healthy_sets as healthy
import test_lesion_sets as lesions
import test_ms_sets as ms

from anomaly_nb.core import DataError
from anomaly_nb.data_commands import check_set
from anomaly_nb.experiment import ALL_POOLS, read_set


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
