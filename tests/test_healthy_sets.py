"""IXI, HCP, MOOD and CheXpert: miniatures in real formats, a mark that must lie where it was put, pools without a person in two, and bad input that is named."""
import csv
import gzip
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from anomaly_nb.core import DataError, LeakageError, ParameterError
from anomaly_nb.data.check import check_records
from anomaly_nb.data.chexpert import NO_FINDING, OBSERVATIONS, chexpert_counts, chexpert_folder, chexpert_records, health_of, observed, parse_place
from anomaly_nb.data.healthy_sets import IXI_SITES, deal_sites, grids_differ, hcp_records, ixi_counts, ixi_people, ixi_records, ixi_scans, mood_brain_records
from anomaly_nb.data.records import load_record, read_manifest, write_manifest
from anomaly_nb.data.torso import mood_records
from anomaly_nb.data.transforms import wanted_transforms
from anomaly_nb.experiment import read_set

MARK, HALF = np.array([-24., 36., 30.]), (80, 96, 80)      # RAS mm: left, in front, up; half the field of view along right, front, up
POOLS = ("train", "val", "test", "val_anomalous", "weak", "unlabelled")


# ---------- miniatures

def place(codes, spacing, turn=0.0, shift=(0, 0, 0)):
    "(shape, affine) of a grid whose axes run towards `codes`; `turn` (degrees) in the axial plane makes it oblique."
    affine, shape = np.eye(4), np.zeros(3, int)
    for i, (world, sign) in enumerate(nib.orientations.axcodes2ornt(codes).astype(int)):
        affine[:3, i], shape[i] = sign*spacing[i]*np.eye(3)[world], 2*HALF[world]/spacing[i]
    c, s = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = shift - affine[:3, :3] @ (shape - 1)/2
    return shape, affine


def paint(path, codes="RAS", spacing=(8., 8., 8.), seed=0, scale=1.0, dtype="int16", skull=False, fault=None, **where):
    "A NIfTI file of a head in mm with a bright mark. `fault`: what is wrong between its voxels and its header."
    shape, affine = place(codes, spacing, **where)
    at = np.tensordot(affine[:3, :3], np.indices(shape), 1) + affine[:3, 3, None, None, None]
    def inside(r): return sum((a/b)**2 for a, b in zip(at, np.array([60, 74, 60])*r)) < 1
    image = 260.*(inside(1.24) & ~inside(1.14)) if skull else np.zeros(shape)
    image[inside(1)] = 180
    image += np.random.default_rng(seed).integers(0, 12, image.shape)*(image > 0)
    image[((at - MARK[:, None, None, None])**2).sum(0) < 13**2] = 600
    if fault == "two axes exchanged": image = image.swapaxes(0, 1)
    if fault == "mirrored": image = image[::-1]
    if fault == "upside down": image = image[:, :, ::-1]
    if fault == "moved": affine = affine + np.array([[0, 0, 0, 20], *np.zeros((3, 4))])
    if fault == "stretched": affine = affine @ np.diag([1.6, 1, 1, 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image((scale*image).astype(dtype), affine), path)


def check_mark(record, within=5.0):
    "The mark lies at its mm, and in the half of the array where a left, front, upper thing belongs."
    sample = load_record(record)
    image = sample["image"][0]
    at = np.argwhere(image > .8*image.max()).mean(0)
    off = (np.array(sample["meta"]["affine"]) @ [*at, 1])[:3] - MARK
    assert np.abs(off).max() < within, off
    d, h, w = (at + .5)/image.shape
    assert d > .55 and h < .45 and w > .55


IDS = {"Guys": (2, 15, 16, 17), "HH": (12, 13, 14), "IOP": (35, 36, 57)}
NAMES = {n: f"IXI{n:03d}-{site}-{700 + n:04d}" for site, ids in IDS.items() for n in ids}


def ixi_mini(root, flat=False, ending=".nii.gz", t2="LAS", without_t2=(15, 57)):
    for n, name in NAMES.items():
        paint(root/("" if flat else "IXI-T1")/f"{name}-T1{ending}", "PSR", (8., 8., 8.8), n, skull=True)
        if n not in without_t2: paint(root/("" if flat else "IXI-T2")/f"{name}-T2{ending}", t2, (8., 8., 9.) if t2 == "LAS" else (8., 8., 8.8), 100 + n, skull=True)
    return root


def hcp_mini(root, people=("100206", "100307", "100408", "100610")):
    for n, p in enumerate(people):
        for c in ("T1", "T2"): paint(root/p/"T1w"/f"{c}w_acpc_dc_restore_brain.nii.gz", "LAS", seed=10*n + (c == "T2"), scale=3.7, dtype="float32", shift=(0, -18, 19))
        image = nib.load(root/p/"T1w"/"T1w_acpc_dc_restore_brain.nii.gz")
        nib.save(nib.Nifti1Image((image.get_fdata() > 0).astype("uint8"), image.affine), root/p/"T1w"/"brainmask_fs.nii.gz")
        (root/p/"MNINonLinear").mkdir()
    return root


def mood_mini(root, toys=3):
    for n in range(6): paint(root/"brain_train"/f"{n:05d}.nii.gz", seed=n, scale=1/600, dtype="float32")
    for n in range(toys):
        paint(root/"toy"/f"toy_{n}.nii.gz", seed=50 + n, scale=1/600, dtype="float32")
        image = nib.load(root/"toy"/f"toy_{n}.nii.gz")
        for kind in ("pixel", "sample"): (root/"toy_label"/kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(((image.get_fdata() > .8)*(n > 0)*.99).astype("float32"), image.affine), root/"toy_label"/"pixel"/f"toy_{n}.nii.gz")
        (root/"toy_label"/"sample"/f"toy_{n}.nii.gz.txt").write_text(f"{int(n > 0)}\n")
    return root


# patient: states of the studies (h healthy, i ill, u uncertain, b blank, w wire, z only zeros)
TRAIN = {1: "h", 2: "hi", 3: "i", 4: "u", 5: "b", 6: "hhh", 7: "h", 8: "ii", 9: "h", 10: "w", 11: "h", 12: "hu", 13: "z", 14: "iu"}
VALID = {101: "h", 102: "i", 103: "hh"}
SAYS = {"h": {NO_FINDING: "1.0"}, "i": {"Lung Opacity": "1.0", "Pleural Effusion": "1.0", "Fracture": "0.0"}, "u": {"Pneumonia": "-1.0"}, "b": {}, "w": {NO_FINDING: "1.0", "Support Devices": "1.0"}, "z": {"Edema": "0.0"}}
HEAD = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS]


def chexpert_mini(root, prefix="CheXpert-v1.0-small", batches=False):
    root.mkdir(parents=True)
    for part, patients in (("train", TRAIN), ("valid", VALID)):
        rows = []
        for p, states in patients.items():
            for s, state in enumerate(states, 1):
                for v, looks in enumerate(("frontal", "lateral")[:1 + (s == 1)], 1):
                    inner = f"patient{p:05d}/study{s}/view{v}_{looks}.jpg"
                    file = root.parent/f"CheXpert-v1.0 batch {2 + p % 3} (train {1 + p % 3})"/inner if batches and part == "train" else root/part/inner
                    picture = np.random.default_rng([p, s, v]).integers(60, 110, (48, 40)).astype("uint8")
                    picture[6:12, 28:34] = 250                                   # high, and on the right of the picture
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(file, quality=90)
                    rows.append([f"{prefix}/{part}/{inner}", "Female" if p % 2 else "Male", p % 90 if p != 7 else 0, looks.title(), ("AP" if p % 3 else "PA") if looks == "frontal" else "", *(SAYS[state].get(o, "") for o in OBSERVATIONS)])
        with open(root/f"{part}.csv", "w", newline="", encoding="utf-8") as out: csv.writer(out).writerows([HEAD, *rows])
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "All four sets, in a folder whose name has blanks, letters beyond ASCII and a dot at its end."
    root = tmp_path_factory.mktemp("sets")/"gesunde Köpfe, 健康 v1."
    ixi_mini(root/"IXI"); hcp_mini(root/"HCP"/"HCP_1200"); mood_mini(root/"MOOD"/"brain"); chexpert_mini(root/"CheXpert-v1.0")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def copy(base, tmp_path):
    "A copy of one set that may be broken."
    return lambda name: Path(shutil.copytree(base/name, tmp_path/name))


def subjects(records):
    return {pool: {r.subject for r in items} for pool, items in records.items()}


def everyone(records):
    return [r for items in records.values() for r in items]


def readers(base, cache):
    return {"ixi": lambda: ixi_records(base/"IXI", pools=POOLS, cache=cache), "hcp": lambda: hcp_records(base/"HCP", pools=POOLS, cache=cache),
            "mood": lambda: mood_brain_records(base/"MOOD", pools=POOLS, cache=cache), "chexpert": lambda: chexpert_records(base, POOLS)}


# ---------- all of them

@pytest.mark.parametrize("name", ["ixi", "hcp", "mood", "chexpert"])
def test_records_load_and_nobody_stands_in_two_pools(name, base, cache, tmp_path):
    records = readers(base, cache)[name]()
    assert set(records) == {"train", "val", "test"} | ({"val_anomalous"} if name in ("mood", "chexpert") else set())
    who = subjects(records)
    assert all(not who[a] & who[b] for a in who for b in who if a < b)
    assert len({r.id for r in everyone(records)}) == len(everyone(records))
    assert not any(r.label for pool in ("train", "val") for r in records[pool]) and all(r.label for r in records.get("val_anomalous", []))
    for pool, items in records.items():
        for r in items:
            assert r.meta["pool"] == pool and {"family", "site", "contrast", "cohort", "modality"} <= set(r.meta)
            assert json.loads(json.dumps(r.meta)) == r.meta
            sample = load_record(r)
            if name == "chexpert": assert r.mask_known == (not r.label) and r.mask is None
            else: check_mark(r); assert not sample["foreground"].all() and sample["foreground"][0].sum() > 800
    write_manifest(tmp_path/"m.csv", everyone(records))
    assert read_manifest(tmp_path/"m.csv") == everyone(records)
    assert check_records(records)["problems"] == []


@pytest.mark.parametrize("name", ["ixi", "hcp", "mood", "chexpert"])
def test_dealing_depends_on_the_seed_alone(name, base, cache):
    def dealt(seed):
        make = {"ixi": ixi_records, "hcp": hcp_records, "mood": mood_brain_records}.get(name)
        return subjects(make(base/name.upper(), seed=seed, foreground="nonzero", cache=cache) if make else chexpert_records(base, ("train", "val"), seed=seed, val_share=.4))
    assert dealt(3) == dealt(3) and len({json.dumps({k: sorted(v) for k, v in dealt(s).items()}) for s in range(6)}) > 1


@pytest.mark.parametrize("name, folder", [("ixi", "IXI"), ("ixi", "IXI-T2"), ("hcp", "HCP_1200"), ("hcp", "T1w"), ("mood", "brain_train"), ("mood", "toy"), ("chexpert", "train")])
def test_a_folder_that_may_not_be_read_is_named_and_not_empty(name, folder, base, cache, monkeypatch):
    real = os.scandir
    def scandir(path="."):
        if Path(path).name == folder: raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=rf"{folder}: .*Permission denied"): readers(base, cache)[name]()


@pytest.mark.parametrize("name, file", [("ixi", "IXI.csv"), ("chexpert", "train.csv"), ("mood", "toy_1.nii.gz.txt")])
def test_a_table_that_may_not_be_read(name, file, base, cache, monkeypatch):
    (base/"IXI"/"IXI.csv").write_text(TABLES["comma"])
    try:
        real = Path.open
        def opened(self, *args, **more):
            if self.name == file: raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **more)
        monkeypatch.setattr(Path, "open", opened)
        with pytest.raises((DataError, PermissionError), match="Permission denied") as error: readers(base, cache)[name]()
        assert file in str(error.value) and error.type is DataError
    finally: (base/"IXI"/"IXI.csv").unlink()


@pytest.mark.parametrize("read", [ixi_records, hcp_records, mood_brain_records, chexpert_records])
def test_no_folder_an_empty_one_and_no_path(read, tmp_path):
    for path in (tmp_path/"nowhere", tmp_path):
        with pytest.raises(DataError, match=tmp_path.name): read(path)
    with pytest.raises(ParameterError, match="path"): read("")


BAD = {"truncated": lambda raw: raw[:len(raw)//3], "gzip cut": lambda raw: raw[:-9], "zero bytes": lambda raw: b"", "wrong magic": lambda raw: b"PK\x03\x04" + raw[4:], "no image inside": lambda raw: gzip.compress(b"patient,age\n" * 60),
       "data cut before packing": lambda raw: gzip.compress(gzip.decompress(raw)[:2000])}


def test_every_broken_volume_is_listed(copy, cache):
    root, names = copy("IXI"), list(NAMES.values())
    for (how, spoil), name in zip(BAD.items(), names):
        file = root/"IXI-T1"/f"{name}-T1.nii.gz"
        file.write_bytes(spoil(file.read_bytes()))
    problems = check_records(ixi_records(root, cache=cache))["problems"]
    assert len(problems) == len(BAD) and all(any(f"{name}-T1.nii.gz" in p for p in problems) for name in names[:len(BAD)])


# ---------- IXI

@pytest.mark.parametrize("codes, spacing, turn", [("PSR", (7., 7., 8.8), 0), ("LAS", (7., 7., 9.), 0), ("RAS", (8., 8., 8.), 0), ("LPI", (8., 6., 9.), 0), ("SRP", (9., 6., 8.), 0), ("AIL", (7., 8., 9.), 0), ("PSR", (7., 7., 8.), 9), ("LAS", (7., 7., 8.), -12)])
def test_the_mark_lies_where_it_was_put(codes, spacing, turn, tmp_path, cache):
    paint(tmp_path/"one.nii.gz", codes, spacing, turn=turn, shift=(3, -4, 5))
    for name in NAMES.values(): (tmp_path/f"{name}-T1.nii.gz").symlink_to(tmp_path/"one.nii.gz")
    check_mark(ixi_records(tmp_path, pools="train", foreground="given", cache=cache)["train"][0])


@pytest.mark.parametrize("codes", ["PSR", "LAS"])
@pytest.mark.parametrize("fault", ["two axes exchanged", "mirrored", "upside down", "moved", "stretched"])
def test_a_wrong_axis_or_affine_turns_red(codes, fault, base, cache, tmp_path):
    good = ixi_records(base/"IXI", "T1" if codes == "PSR" else "T2", "train", foreground="given", cache=cache)["train"][0]
    paint(tmp_path/"bad.nii.gz", codes, (8., 8., 8.8), fault=fault)
    bad = type(good)(good.id, good.subject, (str(tmp_path/"bad.nii.gz"),), meta=good.meta)
    check_mark(good)
    with pytest.raises(AssertionError): check_mark(bad)


def test_ixi_in_one_folder_unpacked_and_in_folders_is_the_same(base, tmp_path, cache):
    def plain(path): return {p: [(r.id, r.subject, r.meta) for r in i] for p, i in ixi_records(path, foreground="given", cache=cache).items()}
    assert plain(base/"IXI") == plain(ixi_mini(tmp_path/"flat", flat=True)) == plain(ixi_mini(tmp_path/"unpacked", ending=".nii"))


def test_ixi_pools_have_every_site_and_do_not_move(base, cache):
    home = {r.subject: p for p, i in ixi_records(base/"IXI", foreground="given").items() for r in i}
    for pool, items in ixi_records(base/"IXI", foreground="given").items(): assert {r.meta["site"] for r in items} == set(IXI_SITES)
    for site in IXI_SITES:
        only = ixi_records(base/"IXI", foreground="given", site=site)
        assert {r.meta["site"] for r in everyone(only)} == {site} and len(everyone(only)) == len(IDS[site]) and all(home[r.subject] == r.meta["pool"] for r in everyone(only))
        assert {r.meta["scanner"] for r in everyone(only)} == {IXI_SITES[site]}
    assert all(home[r.subject] == r.meta["pool"] for r in everyone(ixi_records(base/"IXI", "T2", pools=("train", "test"), foreground="given")))
    with pytest.raises(DataError, match="site HH"): deal_sites({"a": "HH", "b": "HH", "c": "Guys", "d": "Guys", "e": "Guys"})


def test_ixi_counts_name_who_lacks_what(base, copy):
    counts = ixi_counts(base/"IXI")
    assert counts["lacking"] == {"T2": [NAMES[15], NAMES[57]]} and counts["sites"] == {"Guys": 4, "HH": 3, "IOP": 3} and counts["contrasts"] == {"T1": 10, "T2": 8} and counts["IXI.csv"] == "not there: no ages"
    root = copy("IXI")
    (root/"twice").mkdir(); shutil.copy(root/"IXI-T1"/f"{NAMES[12]}-T1.nii.gz", root/"twice")
    for name in ("IXI012-XX-0712-T1.nii.gz", "brain.nii.gz", "IXI012-HH-0712-DTI-03.nii.gz"): shutil.copy(root/"IXI-T1"/f"{NAMES[12]}-T1.nii.gz", root/name)
    shutil.copy(root/"IXI-T1"/f"{NAMES[13]}-T1.nii.gz", root/"IXI012-HH-0999-T1.nii.gz")
    counts = ixi_counts(root)
    assert counts["copies"] == [f"twice/{NAMES[12]}-T1.nii.gz"] and counts["not understood"] == ["IXI012-XX-0712-T1.nii.gz", "brain.nii.gz"] and counts["diffusion"] == 1 and counts["scanned twice"] == ["IXI012"]
    assert json.dumps(counts) and len(ixi_scans(root)[0]) == 11
    both = [r for r in everyone(ixi_records(root, foreground="given")) if r.subject == "IXI012"]
    assert len(both) == 2 and len({r.meta["pool"] for r in both}) == 1
    shutil.copy(root/"IXI-T1"/f"{NAMES[13]}-T1.nii.gz", root/"twice"/f"{NAMES[12]}-T1.nii.gz")
    with pytest.raises(DataError, match="is another scan than"): ixi_records(root)


def test_ixi_contrasts_are_joined_on_one_grid_only(base, tmp_path, cache):
    with pytest.raises(DataError, match=rf"T1 and T2 lie on different grids in 8 of 8 scans \(the first is {NAMES[2]}\).*prepared on one grid"): ixi_records(base/"IXI", "T1+T2")
    root = ixi_mini(tmp_path/"prepared", t2="PSR")
    one, other = (ixi_records(root, c, cache=cache) for c in ("T1+T2", "T2+T1"))
    assert len(everyone(one)) == 8 and {r.meta["contrast"] for r in everyone(one)} == {"T1+T2"}
    a, b = (load_record(everyone(r)[0])["image"] for r in (one, other))
    assert a.shape[0] == 2 and (a == b[::-1]).all() and (a[0] != a[1]).any()
    paint(root/"IXI-T2"/f"{NAMES[2]}-T2.nii.gz", "PSR", (8., 8., 8.8), shift=(6, 0, 0))           # same size, another place
    with pytest.raises(DataError, match=f"in 1 of 8 scans .*{NAMES[2]}"): ixi_records(root, "T1+T2")
    (root/"IXI-T2"/f"{NAMES[2]}-T2.nii.gz").write_bytes(b"broken")                                # loading it says so, with all others
    assert not grids_differ([root/"IXI-T1"/f"{NAMES[2]}-T1.nii.gz", root/"IXI-T2"/f"{NAMES[2]}-T2.nii.gz"])
    assert len(everyone(ixi_records(root, "T1+T2", foreground="given"))) == 8
    paint(tmp_path/"turned.nii.gz", "LAS", (8.8, 8., 8.))                                         # the same grid, stored along other axes
    assert not grids_differ([root/"IXI-T1"/f"{NAMES[2]}-T1.nii.gz", tmp_path/"turned.nii.gz"])


SEX = '"SEX_ID (1=m, 2=f)"'
TABLES = {"comma": f"IXI_ID,{SEX},AGE\n2,1,35.8\n12,2,41\n12,2,44\n13,1,0\n400,1,50\n14,,22.123\n", "semicolon": "\ufeffIXI_ID;SEX_ID (1=m, 2=f);AGE\r\n2;1;35,8\r\n12;2;41\r\n12;2;44\r\n13;1;\r\n400;1;50\r\n14;;22,123\r\n", "tab": f"IXI_ID\t{SEX}\tHEIGHT\tAGE\n2\t1\t1\t35.8\n12\t2\t1\t41\n12\t2\t1\t44\n13\t1\t1\t\n400\t1\t1\t50\n14\t\t1\t22.123\n"}


@pytest.mark.parametrize("kind", TABLES)
def test_ixi_ages(kind, copy):
    root = copy("IXI")
    (root/"IXI.csv").write_text(TABLES[kind], encoding="utf-8")
    meta = {r.subject: r.meta for r in everyone(ixi_records(root, foreground="given"))}
    assert {s: (m.get("age"), m.get("sex")) for s, m in meta.items() if {"age", "sex"} & set(m)} == {"IXI002": (35.8, "M"), "IXI013": (None, "M"), "IXI014": (22.12, None)}
    told = ixi_counts(root)["IXI.csv"]
    assert told["twice, not used"] == ["IXI012"] and told["rows without a scan"] == 1 and told["without an age"] == ["IXI013"] and told["rows"] == 6
    assert told["scanned, without a row"] == sorted(f"IXI{n:03d}" for n in NAMES if n not in (2, 12, 13, 14))


@pytest.mark.parametrize("text, says", [("IXI_ID,AGE\n2,30\n", "has no column 'SEX_ID"), ("", "has no column 'IXI_ID'"), (f"IXI_ID,{SEX},AGE\n2,1,30\ntwo,1,30\n", "line 3: has the id 'two'"), (f"IXI_ID,{SEX},AGE\n2,1\n", "line 2: has another number of cells"),
                                        (f"IXI_ID,{SEX},AGE\n2,1,old\n", "line 2: .*'old'"), ("IXI_ID,SEX_ID (1=m, 2=f),AGE\n2,1,30\n", "a comma inside a cell needs quotes")])
def test_ixi_table_that_is_wrong(text, says, tmp_path):
    (tmp_path/"IXI.csv").write_text(text)
    with pytest.raises(DataError, match=f"IXI.csv.*{says}"): ixi_people(tmp_path, ["IXI002"])
    (tmp_path/"IXI.csv").write_bytes(f"IXI_ID,{SEX},AGE,é\n".encode("latin-1"))
    with pytest.raises(DataError, match="IXI.csv: cannot be read"): ixi_people(tmp_path, [])


def test_ixi_foregrounds_and_parameters(base, cache):
    for method, share in (("otsu", (.3, .7)), ("nonzero", (.2, .7)), ("given", (1, 1))):
        r = ixi_records(base/"IXI", pools="val", foreground=method, cache=cache)["val"][0]
        assert share[0] <= load_record(r)["foreground"].mean() <= share[1] and r.meta["foreground"] == {"given": "everything"}.get(method, method)
    for wrong in (dict(contrast="FLAIR"), dict(contrast="T1+T1"), dict(foreground="brain"), dict(site="hh"), dict(split=(1, 1, 1)), dict(split=(.5, 0, .5))):
        with pytest.raises(ParameterError, match=next(iter(wrong))): ixi_records(base/"IXI", **wrong)
    with pytest.raises(DataError, match="no scan with PD .there are T1, T2"): ixi_records(base/"IXI", "PD")


# ---------- HCP, MOOD

def test_hcp_channels_masks_and_layouts(base, cache):
    a, b = (hcp_records(base/"HCP"/inner, c) for inner, c in (("", "T1+T2"), ("HCP_1200", "T2+T1")))
    assert subjects(a) == subjects(b) and {len(i) for i in a.values()} == {1, 2}
    one, two = (load_record(r["test"][0]) for r in (a, b))
    assert (one["image"] == two["image"][::-1]).all() and a["test"][0].meta["foreground"] == "given" and (one["foreground"][0] == (one["image"][0] > 0)).all()
    assert hcp_records(base/"HCP", pools="val", foreground="otsu", cache=cache)["val"][0].meta["foreground"] == "otsu"


def test_several_contrasts_through_the_catalog(base, cache):
    found = read_set("hcp", "tiny", "T1+T2", "", ("train", "val", "test"), str(base/"HCP"))           # an experiment joins contrasts by +, and hands a tuple on
    assert {len(r.images) for r in everyone(found)} == {2} and {r.meta["contrast"] for r in everyone(found)} == {"T1+T2"}
    with pytest.raises(DataError, match="T1 and T2 lie on different grids"): read_set("ixi", "tiny", "T1+T2", "", ("train",), str(base/"IXI"))


def test_hcp_names_everything_that_is_missing(copy, cache):
    root = copy("HCP")
    people = sorted(p.name for p in (root/"HCP_1200").iterdir())
    for p in people: (root/"HCP_1200"/p/"T1w"/"T2w_acpc_dc_restore_brain.nii.gz").unlink()
    (root/"HCP_1200"/people[2]/"T1w"/"brainmask_fs.nii.gz").unlink()
    with pytest.raises(DataError, match=r"5 of 12 files are missing: .*T2w") as error: hcp_records(root, "T1+T2")
    assert all(p in str(error.value) for p in people)
    with pytest.raises(DataError, match=r"1 of 8 files are missing: .*brainmask_fs"): hcp_records(root)
    assert len(everyone(hcp_records(root, foreground="nonzero", cache=cache))) == 4
    shutil.rmtree(root/"HCP_1200"/people[0]/"T1w")
    with pytest.raises(DataError, match=f"{people[0]}/T1w/T1w_acpc"): hcp_records(root, foreground="nonzero")


@pytest.mark.parametrize("wrong, says", [("grid", "has the grid"), ("place", "lies elsewhere"), ("values", "is not a binary mask")])
def test_hcp_mask_that_does_not_fit(wrong, says, copy):
    root = copy("HCP")
    for file in root.rglob("brainmask_fs.nii.gz"):
        image = nib.load(file)
        array, affine = image.get_fdata().astype("uint8"), image.affine.copy()
        if wrong == "grid": array = array[:-1]
        if wrong == "place": affine[0, 3] += 8
        if wrong == "values": array = 2*array
        nib.save(nib.Nifti1Image(array, affine), file)
    with pytest.raises(DataError, match=f"brainmask_fs.nii.gz: {says}"): load_record(hcp_records(root)["val"][0])


def test_mood_toys_and_layouts(base, cache, copy):
    records = mood_brain_records(base/"MOOD", "T2", POOLS, cache=cache)
    assert {p: len(i) for p, i in records.items()} == {"train": 4, "val": 1, "test": 2, "val_anomalous": 2} and {r.meta["contrast"] for r in everyone(records)} == {"T2"}
    for r in records["val_anomalous"]:
        sample = load_record(r)
        assert (sample["mask"][0] == (sample["image"][0] > .8)).all() and sample["mask"].any()
    assert [r.id for r in records["test"] if r.meta["part"] == "toy"] == ["mood-brain-toy-toy_0"]
    for inner in ("brain", "brain/brain_train"): assert subjects(mood_brain_records(base/"MOOD"/inner, pools=POOLS, cache=cache)) == subjects(records)
    theirs = {r.id for r in mood_records(base/"MOOD"/"brain", part="brain_train", shrink=2, cache=cache)["train"]}
    assert theirs == {r.id for r in everyone(records) if r.meta["part"] == "brain_train"}
    root = copy("MOOD")
    shutil.rmtree(root/"brain"/"toy")
    assert set(mood_brain_records(root, pools=POOLS, cache=cache)) == {"train", "val", "test"}


def test_mood_toys_that_are_wrong(copy, cache):
    root = copy("MOOD")/"brain"/"toy_label"
    (root/"sample"/"toy_1.nii.gz.txt").write_text("0.5")
    with pytest.raises(DataError, match="toy_1.nii.gz.txt: says b'0.5'"): mood_brain_records(root.parent, cache=cache)
    assert mood_brain_records(root.parent, pools="train", cache=cache)
    (root/"sample"/"toy_1.nii.gz.txt").write_text("1")
    for n in (1, 2): (root/"pixel"/f"toy_{n}.nii.gz").write_bytes(b"\x1f\x8bcut")
    with pytest.raises(DataError, match="2 of 3 toy cases cannot be used: .*toy_1.*toy_2"): mood_brain_records(root.parent, cache=cache)
    for n in (0, 2): (root/"pixel"/f"toy_{n}.nii.gz").unlink()
    with pytest.raises(DataError, match="2 of 6 files are missing: toy_label/pixel/toy_0.nii.gz, toy_label/pixel/toy_2.nii.gz"): mood_brain_records(root.parent, cache=cache)


# ---------- CheXpert

def test_health_of_what_is_said():
    def asked(row, option): return health_of(*observed(dict.fromkeys(OBSERVATIONS, "") | row, "line"), option)
    for option, doubt in (("ill", 1), ("healthy", 0), ("leave", None)):
        assert [asked(SAYS[s], option) for s in "hiubwz"] == [0, 1, doubt, None, 1, None]
        assert asked({NO_FINDING: "1", "Support Devices": "-1"}, option) == doubt and asked({"Edema": "1", "Pneumonia": "-1"}, option) == 1 and asked({NO_FINDING: "0.0"}, option) is None
    assert len(OBSERVATIONS) == 14


def test_chexpert_pools_are_of_patients(base):
    records = chexpert_records(base, POOLS, val_share=.3)
    who = subjects(records)
    assert who["train"] | who["val"] == {f"patient{p:05d}" for p, states in TRAIN.items() if "h" in states} and len(who["val"]) == 2
    assert who["val_anomalous"] == {f"patient{p:05d}" for p in (3, 4, 8, 10, 14)} and who["test"] == {f"patient{p:05d}" for p in VALID}
    for seed in range(5):
        again = subjects(chexpert_records(base, POOLS, seed=seed, val_share=.5))
        assert not again["train"] & again["val"] and not (again["train"] | again["val"]) & again["val_anomalous"]
    assert {r.id for r in records["train"] + records["val"] if r.subject == "patient00006"} == {f"patient00006-study{s}-view1_frontal" for s in (1, 2, 3)}
    effusion = next(r for r in records["val_anomalous"] if r.subject == "patient00003")
    assert (effusion.meta["family"], effusion.meta["findings"], effusion.meta["age"], effusion.meta["sex"]) == ("Pleural Effusion", "Pleural Effusion+Lung Opacity", 3, "F")
    assert "age" not in next(r for r in everyone(records) if r.subject == "patient00007").meta                   # 0 is no age
    assert {r.meta["family"] for r in records["val_anomalous"]} == {"Pleural Effusion", "Pneumonia", "Support Devices"}
    counts = chexpert_counts(base)["train"]
    assert counts["nothing said, left out"] == 2 and counts["ill pictures of those patients, left out"] == 2 and counts["pictures"] == 34 == counts["healthy"] + counts["ill"] + counts["of another view"] + 2


def test_chexpert_layouts_views_doubts_and_wishes(base, tmp_path):
    def plain(path, **more): return {p: [(r.id, r.label, r.meta) for r in i] for p, i in chexpert_records(path, POOLS, **more).items()}
    expected = plain(base)
    assert plain(base/"CheXpert-v1.0") == plain(chexpert_mini(tmp_path/"a"/"CheXpert-v1.0-small", "CheXpert-v1.0").parent) == plain(chexpert_mini(tmp_path/"b"/"CheXpert-v1.0 batch 1 (validate & csv)", batches=True).parent) == expected
    assert {r.meta["contrast"] for r in everyone(chexpert_records(base, view="lateral"))} == {"lateral"}
    for view in ("AP", "PA"): assert {(r.meta["projection"], r.meta["contrast"]) for r in everyone(chexpert_records(base, view=view))} == {(view, "frontal")}
    doubts = {u: chexpert_records(base, ("train", "val", "val_anomalous"), uncertain=u) for u in ("ill", "healthy", "leave")}
    assert {u: "patient00004" in set().union(*subjects(r).values()) for u, r in doubts.items()} == {"ill": True, "healthy": True, "leave": False}
    assert "patient00004" in subjects(doubts["healthy"])["train"] | subjects(doubts["healthy"])["val"]
    assert [t.describe()["name"] for t in wanted_transforms(everyone(chexpert_records(base, side=32)))] == ["Resize", "Equalise"] and not wanted_transforms(everyone(chexpert_records(base, side=0, equalise=False)))
    for wrong in (dict(view="top"), dict(uncertain="ignore"), dict(side=-1), dict(side=2.5), dict(val_share=1), dict(val_share=True)):
        with pytest.raises(ParameterError, match=next(iter(wrong))): chexpert_records(base, **wrong)


def test_chexpert_pictures_stand_upright(base):
    for r in everyone(chexpert_records(base)):
        image = load_record(r)["image"][0, 0]
        y, x = np.argwhere(image > 200).mean(0)
        assert image.shape == (48, 40) and abs(y - 8.5) < 1 and abs(x - 30.5) < 1
        for turned in (image.T, image[:, ::-1], image[::-1]): assert np.abs(np.argwhere(turned > 200).mean(0) - (8.5, 30.5)).max() > 5


def edit(name, old, new): return lambda root: (root/name).write_text((root/name).read_text().replace(old, new, 1))


FIRST = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
WRONG = {
    "a column is missing": (edit("train.csv", "Pleural Other", "Pleural Otter"), r"train.csv: has no column 'Pleural Other'"),
    "all columns": (lambda r: (r/"train.csv").write_text(""), "train.csv: has no column 'Path', 'Sex'"),
    "a value": (edit("train.csv", "-1.0", "0.3"), "line .*says '0.3' of 'Pneumonia'"),
    "an unknown image": (edit("train.csv", FIRST, FIRST.replace("00001", "77777")), "1 of .* files are missing: train/patient77777/study1/view1_frontal.jpg"),
    "leaves above": (edit("train.csv", FIRST, "../" + FIRST), r"train.csv, line 2: the Path '../CheXpert.* leaves the data set's folder"),
    "leaves inside": (edit("train.csv", FIRST, FIRST.replace("study1", "..")), "line 2.*leaves"),
    "leaves absolutely": (edit("train.csv", FIRST, "/etc/" + FIRST), "line 2.*leaves"),
    "leaves backwards": (edit("train.csv", FIRST, FIRST.replace("patient00001/study1", "..\\..\\study1")), "line 2.*leaves"),
    "is no picture": (edit("train.csv", FIRST, FIRST.replace("view1_frontal.jpg", "notes.txt")), "line 2: the Path is"),
    "another part": (edit("train.csv", FIRST, FIRST.replace("train/", "valid/")), "line 2.*lies in valid/"),
    "stands twice": (edit("train.csv", FIRST.replace("00001", "00003"), FIRST), "line 7: .*stands at line 2 as well"),
    "view and name differ": (edit("train.csv", "Frontal,AP", "Lateral,AP"), "line 2: is 'Lateral' by its column and frontal by its name"),
    "a short line": (edit("train.csv", ",Frontal,AP,", ",Frontal,"), "line 2: has another number of cells"),
    "no UTF-8": (lambda r: (r/"train.csv").write_bytes(b"Path,\xff\xfe\n"), "train.csv: cannot be read"),
    "no table": (lambda r: (r/"valid.csv").unlink(), "valid.csv: the file is missing"),
    "nobody healthy": (lambda r: (r/"train.csv").write_text((r/"train.csv").read_text().replace(",1.0,,", ",,,")), "healthy frontal picture"),
}


@pytest.mark.parametrize("what", WRONG)
def test_chexpert_table_that_is_wrong(what, copy):
    change, says = WRONG[what]
    root = copy("CheXpert-v1.0")
    change(root)
    with pytest.raises(DataError, match=says): chexpert_records(root)


def test_chexpert_missing_strays_and_the_same_patient(copy):
    root = copy("CheXpert-v1.0")
    stray = root/"train"/"patient00099"/"study1"/"view1_frontal.jpg"
    shutil.copytree(root/"train"/"patient00001", stray.parents[1])
    told = chexpert_counts(root)["train"]
    assert told["files without a row"] == 2 and "patient00099/study1/view1_frontal.jpg" in told["such as"] and chexpert_counts(root)["valid"]["files without a row"] == 0
    for p in range(1, 9): shutil.rmtree(root/"train"/f"patient{p:05d}")
    with pytest.raises(DataError, match=r"\d+ of \d+ files are missing: .*patient00001.*patient00002.* and \d+ more"): chexpert_records(root)
    assert len(chexpert_records(root, "test")["test"]) == 4                                   # the other part is whole


def test_chexpert_patient_of_both_tables(copy):
    root = copy("CheXpert-v1.0")
    shutil.move(root/"valid"/"patient00102", root/"valid"/"patient00009")
    (root/"valid.csv").write_text((root/"valid.csv").read_text().replace("patient00102", "patient00009"))
    with pytest.raises(LeakageError, match=r"1 patient in train.csv and in valid.csv \(patient00009\)"): chexpert_records(root)
    assert chexpert_records(root, "test") and chexpert_records(root, "train")


def test_chexpert_bom_and_batches_with_a_patient_twice(copy, tmp_path):
    root = copy("CheXpert-v1.0")
    (root/"train.csv").write_bytes(b"\xef\xbb\xbf" + (root/"train.csv").read_bytes())
    assert len(chexpert_records(root)["val_anomalous"]) == 7
    shutil.copytree(root/"train"/"patient00001", root/"CheXpert-v1.0 batch 2 (train 1)"/"patient00001")
    with pytest.raises(DataError, match="patient00001: stands in .*train as well"): chexpert_records(root)
    assert chexpert_folder(root.parent) == root
    assert parse_place("Mein Archiv ü/train/patient00001/study1/view2_lateral.jpg", "train", "line")[3] == "lateral"


def test_every_broken_jpeg_is_listed(copy):
    root = copy("CheXpert-v1.0")
    files = [Path(r.images[0]) for r in chexpert_records(root)["train"]]
    for file, raw in zip(files, (lambda b: b[:len(b)//2], lambda b: b"", lambda b: b"Path,Sex\n", lambda b: b"PK\x03\x04" + b[4:])): file.write_bytes(raw(file.read_bytes()))
    problems = check_records(chexpert_records(root))["problems"]
    assert len(problems) == 4 and all(any(str(f) in p for p in problems) for f in files[:4])
