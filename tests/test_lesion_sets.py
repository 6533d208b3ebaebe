"""WMH and BraTS: every layout in miniature, where each lesion lies in mm, and what is said of files that are missing, broken or wrong."""
import gzip
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from anomaly_nb.core import DataError, ParameterError
from anomaly_nb.data import derived
from anomaly_nb.data.brats import CONVENTIONS, REGIONS, brats_records, region_labels
from anomaly_nb.data.check import check_records
from anomaly_nb.data.derived import channel_files, deal_person, folders_below, label_file, majority_file, make_each, missing_files
from anomaly_nb.data.records import check_leakage, load_record, read_volume
from anomaly_nb.data.wmh import scanner_of, wmh_records

EVERY = ("test", "val_anomalous", "weak", "unlabelled")
SHAPE = (14, 16, 10)
PHILIPS = "Philips_VU .PETMR_01."


def affine(spacing=(0.96, 0.95, 3.0), angle=0.1):
    "Of an oblique scan, axes to right, front, top."
    A = np.eye(4)
    A[:3, :3] = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]) * spacing
    A[:3, 3] = -20, 7, -31
    return A


def scan(seed=0):
    "(image, tissue) [i,j,k]: background 0; tissue 1, 2, 3 beside each other, far from any symmetry; the image is 100*tissue brighter there."
    rng = np.random.default_rng(seed)
    tissue = np.zeros(SHAPE, "uint8")
    i, j, k = 2 + seed % 3, 3 + seed % 4, 1 + seed % 2
    tissue[i:i + 3, j:j + 2, k:k + 2], tissue[i:i + 3, j + 2:j + 5, k:k + 2], tissue[i + 3:i + 5, j:j + 3, k:k + 3] = 1, 2, 3
    image = rng.integers(50, 60, SHAPE) + 100*tissue
    image[:1], image[-1:] = 0, 0
    return image, tissue


def save(path, array, A, axes="RAS", dtype=None):
    "Writes an array that stands in RAS with other axes."
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array.astype(dtype or array.dtype), A)
    if axes != "RAS": image = image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)))
    nib.save(image, path)
    return path


def centre(mask, A):
    "Centre of mass in RAS mm."
    return np.asarray(A)[:3, :3] @ np.argwhere(mask).mean(0) + np.asarray(A)[:3, 3]


def lies_at(record, truth, A, value):
    "Whether the record's mask lies where `truth` [i,j,k] was written, and the image is as bright there as it was made."
    sample = load_record(record)
    mask = sample["mask"][0]
    return mask.sum() == truth.sum() and np.allclose(centre(mask, sample["meta"]["affine"]), centre(truth, A), atol=.02) and all(abs(c[mask].mean() - value) < 10 for c in sample["image"])


def everyone(found):
    return {r.id: r for items in found.values() for r in items}


# WMH ------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def wmh_person(folder, seed, axes="LAS", ending=".nii.gz", A=None):
    A = affine() if A is None else A
    image, tissue = scan(seed)
    for part, dtype in (("orig", "uint16"), ("pre", "float32")):
        for name in ("FLAIR", "T1"): save(folder/part/f"{name}{ending}", image + (part == "orig"), A, axes, dtype)
        save(folder/part/f"3DT1{ending}", np.repeat(image, 3, 2), A @ np.diag([1, 1, 1/3, 1]), "PSR", "float32")
    save(folder/f"wmh{ending}", np.where(tissue < 3, tissue, 0), A, axes, "float32")


PLACES = {"training/Utrecht/0": "LAS", "training/Singapore/50": "RPI", "training/Amsterdam/GE3T/100": "PSR", "test/Utrecht/1": "RAS", "test/Amsterdam/GE1T5/150": "LPS", f"test/Amsterdam/{PHILIPS}/160": "AIL"}


@pytest.fixture(scope="module")
def wmh(tmp_path_factory):
    "The new layout, in a folder with a space, a trailing full stop and an umlaut; every person stored with other axes."
    root = tmp_path_factory.mktemp("wmh")/"Läsionen (WMH) v1."
    for place, axes in PLACES.items(): wmh_person(root/place, int(place.rpartition("/")[2]), axes)
    save(root/"additional_annotations"/"observer_o3"/"training"/"Utrecht"/"0"/"result.nii.gz", np.zeros(SHAPE), affine())
    (root/"training"/"Utrecht"/"0"/"._wmh.nii.gz").write_bytes(b"\0\5\26\7")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("cache")


@pytest.fixture()
def wmh_copy(wmh, tmp_path):
    shutil.copytree(wmh/"training", tmp_path/"training")
    return tmp_path


def test_wmh_new_layout(wmh, cache):
    found = wmh_records(wmh, cache=cache)
    assert {r.id: r.meta["pool"] for r in found["test"]} == dict.fromkeys(("Utrecht-1", "GE1T5-150", "Philips_VU-160"), "test")
    records = everyone(found)
    assert len(records) == 6 and {r.meta["part"] for p, items in found.items() if p != "test" for r in items} == {"training"}
    r = records["Philips_VU-160"]
    assert (r.meta["site"], r.meta["cohort"], r.label, r.mask_known, r.meta["foreground"]) == ("Amsterdam", "WMH 2017", 1, True, "otsu")
    json.dumps([r.meta for r in records.values()])
    check_leakage({p: derived_pool(items) for p, items in found.items()})
    assert not check_records(found)["problems"]


def derived_pool(items):
    "What `check_leakage` asks for."
    return type("Pool", (), {"subjects": [r.subject for r in items]})


@pytest.mark.parametrize("contrast", ["FLAIR", "T1", "FLAIR+T1", ("T1", "FLAIR")])
def test_wmh_lesions_lie_where_they_were_written(wmh, cache, contrast):
    for i, r in everyone(wmh_records(wmh, contrast, foreground="nonzero", cache=cache)).items():
        image, tissue = scan(int(i.rpartition("-")[2]))
        assert lies_at(r, tissue == 1, affine(), 155), i
        sample = load_record(r)
        assert np.allclose(centre(~sample["valid"][0], sample["meta"]["affine"]), centre(tissue == 2, affine()), atol=.02) and not (sample["mask"] & ~sample["valid"]).any()
        assert sample["foreground"].sum() == (image != 0).sum()


@pytest.mark.parametrize("fault", ["wrong affine", "swapped axis", "shifted label", "mirrored"])
def test_a_fault_in_the_miniature_is_seen(wmh_copy, cache, fault):
    "Each fault, planted in the files, fails the check above, or is an error that names the file."
    folder = wmh_copy/"training"/"Utrecht"/"0"
    image, tissue = scan(0)
    files = [folder/"pre"/"FLAIR.nii.gz", folder/"wmh.nii.gz"]
    def rewrite(path, change, A=None):
        old = nib.load(path)
        nib.save(nib.Nifti1Image(np.ascontiguousarray(change(np.asarray(old.dataobj))), old.affine if A is None else A), path)
    if fault == "shifted label": rewrite(files[1], lambda a: np.roll(a, 1, 0))
    for path in files:
        if fault == "swapped axis": rewrite(path, lambda a: a.transpose(1, 0, 2))
        if fault == "wrong affine": rewrite(path, lambda a: a, nib.load(path).affine + np.array([[0, 0, 0, 2.], [0]*4, [0]*4, [0]*4]))
        if fault == "mirrored": rewrite(path, lambda a: a, nib.load(path).affine @ np.diag([-1, 1, 1, 1]))
    r = everyone(wmh_records(wmh_copy, foreground="given", cache=cache))["Utrecht-0"]
    assert not lies_at(r, tissue == 1, affine(), 155)


@pytest.mark.parametrize("change, words", [("grid", "has the grid"), ("affine", "lies elsewhere"), ("axis", "has the grid")])
def test_wmh_labels_of_another_grid_are_named(wmh_copy, cache, change, words):
    path = wmh_copy/"training"/"Singapore"/"50"/"wmh.nii.gz"
    old = nib.load(path)
    array, A = np.asarray(old.dataobj), old.affine.copy()
    if change == "grid": array = array[1:]
    if change == "affine": A[0, 3] += .5
    if change == "axis": array = array.transpose(1, 0, 2)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array), A), path)
    with pytest.raises(DataError, match=words) as error: wmh_records(wmh_copy, cache=cache)
    assert error.value.where == str(path) and "FLAIR.nii.gz" in error.value.expected


def test_wmh_flat_layout_deals_everybody(tmp_path, cache):
    for place in ("Utrecht/0", "Utrecht/4", "Singapore/0", "Singapore/50", *(f"GE3T/{n}" for n in range(100, 112))): wmh_person(tmp_path/"old"/place, 0)
    found = wmh_records(tmp_path/"old", foreground="given", cache=cache)
    records = everyone(found)
    assert len(records) == 16 and {"Utrecht-0", "Singapore-0"} <= set(records) and set(found) == {"test", "val_anomalous", "weak"}
    assert records["GE3T-100"].meta["site"] == "Amsterdam" and records["GE3T-100"].meta["part"] == ""
    assert {i: r.meta["pool"] for i, r in everyone(wmh_records(tmp_path/"old", seed=1, foreground="given", cache=cache)).items()} != {i: r.meta["pool"] for i, r in records.items()}
    shutil.rmtree(tmp_path/"old"/"Utrecht"/"4")
    assert all(r.meta["pool"] == records[i].meta["pool"] for i, r in everyone(wmh_records(tmp_path/"old", foreground="given", cache=cache)).items())
    site = everyone(wmh_records(tmp_path/"old"/"GE3T", foreground="given", cache=cache))                # the path of one site
    assert len(site) == 12 and all(r.meta["pool"] == records[i].meta["pool"] for i, r in site.items())


@pytest.mark.parametrize("name", [PHILIPS, "Philips_VU .PETMR_01", "Philips_VU.PETMR_01.", "Philips_VU.PETMR_01", "Philips_VU_.PETMR_01_", "Philips_VU"])
def test_wmh_philips_by_any_name(tmp_path, cache, name):
    wmh_person(tmp_path/"test"/"Amsterdam"/name/"160", 160, ending=".nii")
    (r,) = wmh_records(tmp_path, cache=cache)["test"]
    assert r.id == "Philips_VU-160" and r.meta["site"] == "Amsterdam" and lies_at(r, scan(160)[1] == 1, affine(), 155)
    assert scanner_of("Lyon") is None and scanner_of("GE_1T5 ")[:2] == ("GE1T5", "Amsterdam")


def test_wmh_files_of_choice(wmh, cache):
    pre, orig = (everyone(wmh_records(wmh, "T1", corrected=c, foreground="given", cache=cache))["Utrecht-1"] for c in (True, False))
    assert "/pre/T1" in pre.images[0] and "/orig/T1" in orig.images[0] and load_record(orig)["foreground"].all()
    own = everyone(wmh_records(wmh, "3DT1", foreground="given", cache=cache))["Utrecht-1"]
    assert (own.mask, own.valid, own.mask_known, own.label) == (None, None, False, 1)
    with pytest.raises(ParameterError, match="3DT1"): wmh_records(wmh, "3DT1+FLAIR", cache=cache)
    with pytest.raises(ParameterError, match="contrast"): wmh_records(wmh, "T2", cache=cache)
    with pytest.raises(ParameterError, match="pools"): wmh_records(wmh, pools="tests", cache=cache)
    assert wmh_records(wmh, pools=("train", "val"), cache=cache) == {}


def test_wmh_missing_files_are_all_named(wmh_copy, cache):
    folder = wmh_copy/"training"
    (folder/"Utrecht"/"0"/"wmh.nii.gz").unlink()
    (folder/"Singapore"/"50"/"pre"/"T1.nii.gz").unlink()
    (folder/"Utrecht"/"9").mkdir()
    with pytest.raises(DataError) as error: wmh_records(wmh_copy, "FLAIR+T1", pools="test", cache=cache)       # also of pools that are not asked for
    assert "5 of 12 files are missing" in str(error.value) and all(n in str(error.value) for n in ("Utrecht/0/wmh.nii.gz", "Singapore/50/pre/T1.nii.gz", "Utrecht/9/pre/FLAIR.nii.gz"))


def test_wmh_wrong_folders(wmh_copy, cache):
    with pytest.raises(DataError, match="folder is missing"): wmh_records(wmh_copy/"no", cache=cache)
    (wmh_copy/"empty").mkdir()
    with pytest.raises(DataError, match="holds nobody"): wmh_records(wmh_copy/"empty", cache=cache)
    with pytest.raises(DataError, match="is no folder"): wmh_records(wmh_copy/"training"/"Utrecht"/"0"/"wmh.nii.gz", cache=cache)
    shutil.copytree(wmh_copy/"training"/"Utrecht", wmh_copy/"Utrecht")
    with pytest.raises(DataError, match="Utrecht-0 2 times"): wmh_records(wmh_copy, cache=cache)
    (wmh_copy/"Utrecht").rename(wmh_copy/"Lyon")
    with pytest.raises(DataError, match="no scanner") as error: wmh_records(wmh_copy, cache=cache)
    assert error.value.where.endswith("Lyon/0")


BREAK = {"truncated": lambda p: p.write_bytes(p.read_bytes()[:-40]), "empty": lambda p: p.write_bytes(b""), "no NIfTI": lambda p: p.write_bytes(b"PK\3\4" + bytes(800)), "no voxels": lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:400]))}


@pytest.mark.parametrize("how", list(BREAK))
def test_wmh_broken_files_are_named(wmh_copy, cache, how):
    image, labels = (wmh_copy/"training"/p for p in ("Utrecht/0/pre/FLAIR.nii.gz", "Singapore/50/wmh.nii.gz"))
    BREAK[how](image)
    broken = everyone(wmh_records(wmh_copy, cache=cache))["Utrecht-0"]
    with pytest.raises(DataError) as error: load_record(broken)                                      # an image: told by check_records, with all others
    assert error.value.where == str(image)
    BREAK[how](labels)
    with pytest.raises(DataError) as error: wmh_records(wmh_copy, cache=cache)
    assert error.value.where == str(labels)
    BREAK[how](wmh_copy/"training"/"Utrecht"/"0"/"wmh.nii.gz")
    with pytest.raises(DataError, match="2 of 3 scans cannot be used") as error: wmh_records(wmh_copy, cache=cache)
    assert "Singapore/50/wmh.nii.gz" in str(error.value) and "Utrecht/0/wmh.nii.gz" in str(error.value)


@pytest.mark.parametrize("value, words", [(3, "unknown label 3 .6 voxels"), (1.5, "without a whole number"), (np.nan, "without a whole number"), (-1, "unknown label -1")])
def test_wmh_unknown_labels(wmh_copy, cache, value, words):
    path = wmh_copy/"training"/"Utrecht"/"0"/"wmh.nii.gz"
    old = nib.load(path)
    labels = old.get_fdata()
    labels[np.nonzero(labels == 1)[0][:1], np.nonzero(labels == 1)[1][:1]] = value if value != 3 else 0
    if value == 3: labels[labels == 1] = np.where(np.arange((labels == 1).sum()) < 6, 3, 1)
    nib.save(nib.Nifti1Image(labels.astype("float32"), old.affine), path)
    with pytest.raises(DataError, match=words) as error: wmh_records(wmh_copy, cache=cache)
    assert error.value.where == str(path)


# BraTS ----------------------------------------------------------------------------------------------------------------------------------------------------------------------

PARTS = ("necrosis", "oedema", "enhancing")
ENDS = {"2017": ("flair", "t1", "t1ce", "t2"), "2023": ("t2f", "t1n", "t1c", "t2w")}
GRID = np.array([[-1., 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def numbered(tissue, convention):
    return np.array([0, *(CONVENTIONS[convention][p] for p in PARTS)], "uint8")[tissue]


def brats_person(folder, seed, convention="2017", axes="LPS", ending=".nii.gz", seg=True):
    image, tissue = scan(seed)
    sep, A = "-" if convention == "2023" else "_", affine((1, 1, 1), 0)
    for n, end in enumerate(ENDS[convention]): save(folder/f"{folder.name}{sep}{end}{ending}", image + 1000*n*(image > 0), A, axes, "int16")
    if seg: save(folder/f"{folder.name}{sep}seg{ending}", numbered(tissue, convention), A, axes, "uint8")


@pytest.fixture(scope="module")
def brats(tmp_path_factory):
    "Every edition, {edition: folder}; `seed` of a case is the number in its name."
    home = tmp_path_factory.mktemp("brats")
    for n, axes in enumerate(("LPS", "LAS", "RPI", "PSR")): brats_person(home/"2017"/"Brats17TrainingData"/("HGG" if n else "LGG")/f"Brats17_TCIA_{n}_1", n, axes=axes)
    base = home/"2020"/"MICCAI_BraTS2020_TrainingData"
    for n in (1, 2, 355): brats_person(base/f"BraTS20_Training_{n:03d}", n, ending=".nii" if n > 1 else ".nii.gz")
    (base/"BraTS20_Training_355"/"BraTS20_Training_355_seg.nii").rename(base/"BraTS20_Training_355"/"W39_1998.09.19_Segm.nii")
    (base/"name_mapping.csv").write_text("Grade,BraTS_2017_subject_ID,BraTS_2019_subject_ID,BraTS_2020_subject_ID\nHGG,NA,BraTS19_CBICA_AAB_1,BraTS20_Training_001\nLGG,NA,NA,BraTS20_Training_002\n", encoding="utf-8")
    brats_person(home/"2020"/"MICCAI_BraTS2020_ValidationData"/"BraTS20_Validation_004", 4, seg=False)
    for n in (0, 1): brats_person(home/"2021 Müller."/f"BraTS2021_{n:05d}", n, axes="RAS" if n else "LPS")
    for n, visit in ((0, 0), (0, 1), (2, 0)): brats_person(home/"2023"/"ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"/f"BraTS-GLI-{n:05d}-{visit:03d}", n, "2023")
    brats_person(home/"2023"/"ASNR-MICCAI-BraTS2023-GLI-Challenge-ValidationData"/"BraTS-GLI-00004-000", 4, "2023", seg=False)
    task = home/"MSD"/"Task01_BrainTumour"
    for n, axes in ((1, "RAS"), (2, "LPS"), (4, "RAS")):
        image, tissue = scan(n)
        save(task/("imagesTs" if n == 4 else "imagesTr")/f"BRATS_{n:03d}.nii.gz", np.stack([image + 1000*c*(image > 0) for c in range(4)], -1), affine((1, 1, 1), 0), axes, "float32")
        if n < 4: save(task/"labelsTr"/f"BRATS_{n:03d}.nii.gz", numbered(tissue, "MSD"), affine((1, 1, 1), 0), axes)
    (task/"imagesTr"/"._BRATS_001.nii.gz").write_bytes(b"\0\5\26\7")
    (task/"dataset.json").write_text(json.dumps({"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}}))
    return {p.name[:4].strip(): p for p in home.iterdir()}


EDITIONS = ("2017", "2020", "2021", "2023", "MSD")


def test_a_tumour_without_the_part_that_was_asked_for_is_told_and_no_fault(tmp_path, cache):
    for n in (0, 1, 2): brats_person(tmp_path/f"BraTS2021_{n:05d}", n)
    file = tmp_path/"BraTS2021_00001"/"BraTS2021_00001_seg.nii.gz"
    image = nib.load(file)
    values = np.asanyarray(image.dataobj)
    nib.save(nib.Nifti1Image(np.where(values == 4, 2, values).astype("uint8"), image.affine), file)                 # a low grade: nothing of it enhances
    found = check_records(brats_records(tmp_path, region="enhancing", cache=cache))
    assert not found["problems"] and any("1 lesions have no enhancing part" in h for h in found["hints"])
    nib.save(nib.Nifti1Image(0*values, image.affine), file)
    assert any("is empty and 'BraTS2021_00001' is labelled anomalous" in p for p in check_records(brats_records(tmp_path, cache=cache))["problems"])


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("region", list(REGIONS))
def test_brats_regions_lie_where_they_were_written(brats, cache, edition, region):
    records = everyone(brats_records(brats[edition], pools=EVERY, region=region, cache=cache))
    assert len([r for r in records.values() if r.mask]) == {"2017": 4, "2020": 3, "2021": 2, "2023": 3, "MSD": 2}[edition]
    for i, r in records.items():
        seed = {"2017": lambda: i.split("_")[2], "2023": lambda: i.split("-")[2]}.get(edition, lambda: i.rpartition("_")[2])
        image, tissue = scan(int(seed()))
        truth = np.isin(tissue, [1 + PARTS.index(p) for p in REGIONS[region]])
        assert (r.meta["region"], r.label, r.mask_known) == (region, 1, bool(r.mask))
        if r.mask: assert lies_at(r, truth, affine((1, 1, 1), 0), image[truth].mean()), i
        else: assert r.meta["pool"] == "unlabelled" and seed() in ("004", "00004")


@pytest.mark.parametrize("edition", EDITIONS)
def test_brats_channels_are_those_asked_for(brats, cache, edition):
    asked = "T2+FLAIR+T1CE+T1"
    for r in everyone(brats_records(brats[edition], asked, EVERY, cache=cache)).values():
        sample = load_record(r, channels=4)
        inside = sample["foreground"][0]
        assert [round(c[inside].min(), -3) for c in sample["image"]] == [3000, 0, 2000, 1000] and not sample["image"][:, ~inside].any()
        json.dumps(r.meta)


def test_brats_grades_subjects_and_pools(brats, cache):
    grade = {i: r.meta.get("grade") for e in EDITIONS for i, r in everyone(brats_records(brats[e], pools=EVERY, cache=cache)).items()}
    assert [grade[i] for i in ("Brats17_TCIA_0_1", "Brats17_TCIA_3_1", "BraTS20_Training_001", "BraTS20_Training_002", "BraTS20_Training_355", "BraTS2021_00001")] == ["LGG", "HGG", "HGG", "LGG", None, None]
    found = brats_records(brats["2023"], pools=EVERY, cache=cache)
    visits = [everyone(found)[f"BraTS-GLI-00000-00{v}"] for v in (0, 1)]
    assert visits[0].subject == visits[1].subject and visits[0].meta["pool"] == visits[1].meta["pool"] and visits[0].meta["year"] == "2023+"
    check_leakage({p: derived_pool(items) for p, items in found.items()})
    assert "unlabelled" not in brats_records(brats["2020"], cache=cache)
    assert [r.id for r in brats_records(brats["2020"], pools="unlabelled", cache=cache)["unlabelled"]] == ["BraTS20_Validation_004"]
    assert not check_records(found)["problems"]


def test_brats_a_visit_without_segmentation_goes_with_its_person(brats, tmp_path, cache):
    shutil.copytree(brats["2023"], tmp_path, dirs_exist_ok=True)
    brats_person(tmp_path/"ValidationData"/"BraTS-GLI-00002-001", 2, "2023", seg=False)
    r = everyone(found := brats_records(tmp_path, pools=EVERY, cache=cache))["BraTS-GLI-00002-001"]
    assert r.meta["pool"] == everyone(found)["BraTS-GLI-00002-000"].meta["pool"] and not r.mask_known


@pytest.mark.parametrize("edition, old, new", [("2017", 4, 3), ("2021", 2, 7), ("2023", 3, 4), ("MSD", 3, 4)])
def test_brats_labels_of_another_convention(brats, tmp_path, cache, edition, old, new):
    shutil.copytree(brats[edition], tmp_path/"x")
    path = sorted([*(tmp_path/"x").rglob("*seg.nii.gz"), *(tmp_path/"x").rglob("labelsTr/*")])[0]
    image = nib.load(path)
    seg = np.asarray(image.dataobj).copy()
    seg[seg == old] = new
    nib.save(nib.Nifti1Image(seg, image.affine), path)
    with pytest.raises(DataError, match=f"unknown label {new}") as error: brats_records(tmp_path/"x", pools=EVERY, cache=cache)
    assert error.value.where == str(path) and "enhancing" in error.value.expected


def test_reading_2023_by_the_rule_of_2017_loses_the_enhancing_tumour():
    tissue = scan()[1]
    seg = numbered(tissue, "2023")
    assert not np.isin(seg, region_labels("2017", "enhancing")).any() and np.isin(seg, region_labels("2017")).sum() == (tissue > 0).sum() - (tissue == 3).sum()
    assert region_labels("MSD", "core") == (2, 3) and region_labels("2017", "core") == (1, 4)


@pytest.mark.parametrize("fault", ["wrong affine", "swapped axis", "shifted label"])
@pytest.mark.parametrize("edition", ["2021", "MSD"])
def test_a_fault_in_the_brats_miniature_is_seen(brats, tmp_path, cache, edition, fault):
    shutil.copytree(brats[edition], tmp_path/"x")
    i, image, seg = ("BRATS_001", *(tmp_path/"x"/"Task01_BrainTumour"/p/"BRATS_001.nii.gz" for p in ("imagesTr", "labelsTr"))) if edition == "MSD" else ("BraTS2021_00001", *(tmp_path/"x"/"BraTS2021_00001"/f"BraTS2021_00001_{e}.nii.gz" for e in ("flair", "seg")))
    truth, A = scan(1)[1] > 0, affine((1, 1, 1), 0)
    value = scan(1)[0][truth].mean()
    assert lies_at(everyone(brats_records(tmp_path/"x", pools=EVERY, cache=cache))[i], truth, A, value)
    for path in (image, seg):
        old = nib.load(path)
        array, B = np.asarray(old.dataobj), old.affine.copy()
        if fault == "wrong affine": B[:3, 3] += 1
        if fault == "swapped axis": array = array.swapaxes(0, 1)
        if fault == "shifted label" and path == seg: array = np.roll(array, 1, 2)
        nib.save(nib.Nifti1Image(np.ascontiguousarray(array), B), path)
    assert not lies_at(everyone(brats_records(tmp_path/"x", pools=EVERY, cache=cache))[i], truth, A, value)


@pytest.mark.parametrize("edition, seg", [("2021", "BraTS2021_00001/BraTS2021_00001_seg.nii.gz"), ("MSD", "Task01_BrainTumour/labelsTr/BRATS_001.nii.gz")])
def test_brats_segmentation_of_another_grid_is_named(brats, tmp_path, cache, edition, seg):
    shutil.copytree(brats[edition], tmp_path/"x")
    old = nib.load(tmp_path/"x"/seg)
    nib.save(nib.Nifti1Image(np.asarray(old.dataobj)[:, 1:], old.affine), tmp_path/"x"/seg)
    with pytest.raises(DataError, match="has the grid") as error: brats_records(tmp_path/"x", pools=EVERY, cache=cache)
    assert error.value.where == str(tmp_path/"x"/seg)


@pytest.mark.parametrize("how", list(BREAK))
def test_brats_broken_files_are_named(brats, tmp_path, cache, how):
    for edition in ("2021", "MSD"): shutil.copytree(brats[edition], tmp_path/edition)
    image, four = tmp_path/"2021"/"BraTS2021_00000"/"BraTS2021_00000_t2.nii.gz", tmp_path/"MSD"/"Task01_BrainTumour"/"imagesTr"/"BRATS_001.nii.gz"
    BREAK[how](image); BREAK[how](four)
    problems = check_records(brats_records(tmp_path/"2021", "FLAIR+T2", EVERY, cache=cache))["problems"]
    assert len(problems) == 1 and str(image) in problems[0]
    with pytest.raises(DataError) as error: brats_records(tmp_path/"MSD", pools=EVERY, cache=cache)
    assert error.value.where == str(four)
    BREAK[how](image.with_name("BraTS2021_00000_seg.nii.gz"))
    with pytest.raises(DataError) as error: brats_records(tmp_path/"2021", pools=EVERY, cache=cache)
    assert error.value.where.endswith("BraTS2021_00000_seg.nii.gz")


def test_brats_missing_files_are_all_named(brats, tmp_path, cache):
    shutil.copytree(brats["2020"], tmp_path/"a training-validation"); shutil.copytree(brats["MSD"], tmp_path/"b")
    base = tmp_path/"a training-validation"/"MICCAI_BraTS2020_TrainingData"
    (base/"BraTS20_Training_355"/"W39_1998.09.19_Segm.nii").unlink(); (base/"BraTS20_Training_002"/"BraTS20_Training_002_t1ce.nii").unlink(); (base/"BraTS20_Training_007").mkdir()
    with pytest.raises(DataError, match="4 of 9 files are missing") as error: brats_records(tmp_path/"a training-validation", "T1CE", cache=cache)
    assert all(n in str(error.value) for n in ("BraTS20_Training_355_seg.nii.gz", "BraTS20_Training_002_t1ce.nii.gz", "BraTS20_Training_007_t1ce.nii.gz", "BraTS20_Training_007_seg.nii.gz"))
    (tmp_path/"b"/"Task01_BrainTumour"/"imagesTr"/"BRATS_001.nii.gz").unlink(); (tmp_path/"b"/"Task01_BrainTumour"/"labelsTr"/"BRATS_002.nii.gz").unlink()
    with pytest.raises(DataError, match="2 of 5 files are missing: Task01_BrainTumour/imagesTr/BRATS_001.nii.gz, Task01_BrainTumour/labelsTr/BRATS_002.nii.gz"): brats_records(tmp_path/"b", cache=cache)


def test_brats_wrong_folders(brats, tmp_path, cache):
    with pytest.raises(DataError, match="folder is missing"): brats_records(tmp_path/"no", cache=cache)
    with pytest.raises(DataError, match="holds no case of BraTS"): brats_records(tmp_path, cache=cache)
    for edition in ("2021", "2023"): shutil.copytree(brats[edition], tmp_path/"both"/edition)
    with pytest.raises(DataError, match="2 of 2021, 4 of 2023"): brats_records(tmp_path/"both", cache=cache)
    shutil.copytree(brats["2021"], tmp_path/"twice"/"a"); shutil.copytree(brats["2021"], tmp_path/"twice"/"b")
    with pytest.raises(DataError, match="BraTS2021_00000"): brats_records(tmp_path/"twice", cache=cache)
    shutil.copytree(brats["MSD"], tmp_path/"msd")
    for text in ('{"modality": {"0": "CT"}, "labels": {"1": "liver"}}', "{", "[]"):
        (tmp_path/"msd"/"Task01_BrainTumour"/"dataset.json").write_text(text)
        with pytest.raises(DataError, match="dataset.json: does not describe Task01"): brats_records(tmp_path/"msd", cache=cache)
    for wrong in (dict(contrast="T1c"), dict(region="all"), dict(foreground="brain"), dict(pools="tests")):
        with pytest.raises(ParameterError): brats_records(brats["2021"], cache=cache, **wrong)


# Derived files --------------------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("axes", ["RAS", "LAS", "RPI", "PSR", "AIL"])
def test_derived_files_keep_place_and_type(tmp_path, axes):
    tissue = scan(3)[1]
    path = save(tmp_path/"Läsion 1 .nii.gz", tissue, affine(), axes, "float32")
    for labels, invert, truth in (((1,), False, tissue == 1), ((1, 3), False, np.isin(tissue, (1, 3))), ((2,), True, tissue != 2)):
        file = label_file(path, labels, invert=invert, cache=tmp_path/"cache")
        array, A = read_volume(file)
        assert nib.load(file).get_data_dtype() == np.uint8 and array.sum() == truth.sum() and np.allclose(centre(array, A), centre(truth, affine()), atol=.01)
        assert np.allclose(A, read_volume(path)[1], atol=1e-4) and file == label_file(path, labels, invert=invert, cache=tmp_path/"cache")
    assert len(list((tmp_path/"cache"/"derived").iterdir())) == 3


def test_derived_probabilities_votes_and_channels(tmp_path):
    p = np.random.default_rng(0).random(SHAPE).astype("float32")
    assert read_volume(label_file(save(tmp_path/"p.nii.gz", p, affine()), above=.9, cache=tmp_path))[0].sum() == (p > np.float32(.9)).sum()
    masks = [p > t for t in (.2, .5, .7, .9)]
    files = [save(tmp_path/f"{n}.nii.gz", m.astype("uint8"), affine(), axes) for n, (m, axes) in enumerate(zip(masks, ("RAS", "LAS", "RPI", "LPS")))]
    for n in range(1, 5): assert read_volume(majority_file(files[:n], tmp_path))[0].sum() == (2*sum(m.astype(int) for m in masks[:n]) > n).sum()
    A = affine(); A[2, 3] += 1
    with pytest.raises(DataError, match="lies elsewhere") as error: majority_file([*files, save(tmp_path/"moved.nii.gz", masks[0].astype("uint8"), A)], tmp_path)
    assert error.value.where.endswith("moved.nii.gz")
    with pytest.raises(DataError, match="no binary mask"): majority_file([tmp_path/"p.nii.gz"], tmp_path)
    for wrong in ([], "0.nii.gz"):
        with pytest.raises(ParameterError): majority_file(wrong, tmp_path)
    four = save(tmp_path/"four.nii.gz", np.stack([p, 2*p], -1), affine(), "RPI")
    assert [round(float(read_volume(f)[0].max()/p.max())) for f in channel_files(four, (1, 0), 2, tmp_path)] == [2, 1]
    with pytest.raises(DataError, match="four.nii.gz"): channel_files(four, (0,), 4, tmp_path)


def test_derived_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = save(tmp_path/"l.nii.gz", scan()[1], affine())
    def full(*_, **__): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(derived, "write_volume", full)
        with pytest.raises(DataError, match="No space left") as error: label_file(path, [1], cache=tmp_path/"cache")
        assert error.value.where == str(tmp_path/"cache")
        with pytest.raises(DataError, match="No space left") as error: make_each(tmp_path, [path]*3, lambda p: label_file(p, [1], cache=tmp_path/"cache"))
        assert error.value.where == str(tmp_path/"cache")                                            # once, not three times
    assert not (tmp_path/"cache"/"derived").exists() and read_volume(label_file(path, [1], cache=tmp_path/"cache"))[0].any()


def test_derived_helpers(tmp_path):
    for n in range(7): (tmp_path/"a"/f"p {n}.").mkdir(parents=True)
    (tmp_path/"a"/"p 0."/"x.nii").write_bytes(b""); (tmp_path/"a"/"p 0."/".x.nii").write_bytes(b""); (tmp_path/"__MACOSX").mkdir()
    os.symlink(tmp_path/"a"/"p 0.", tmp_path/"a"/"q")
    assert [(str(f.relative_to(tmp_path)), n) for f, n in folders_below(tmp_path) if n] == [("a/p 0.", {"x.nii"}), ("a/q", {"x.nii"})] and len(list(folders_below(tmp_path, 1))) == 2
    with pytest.raises(DataError, match=r"6 of 7 files are missing: a/p 1./x.nii, .*, a/p 5./x.nii and 1 more"): missing_files(tmp_path, [tmp_path/"a"/f"p {n}."/"x.nii" for n in range(7)])
    dealt = [deal_person("brats", 0, f"p{n}", {"test": .5, "weak": .5}) for n in range(400)]
    assert 150 < dealt.count("test") < 250 and dealt == [deal_person("brats", 0, f"p{n}", {"test": .5, "weak": .5}) for n in range(400)]
