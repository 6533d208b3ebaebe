"""Multiple sclerosis and stroke: every layout in real formats, stored in every order of axes, damaged in every way; where a lesion lies in millimetres; whose outline; who may be tested on."""
import gzip
import json
import os

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt

from anomaly_nb.core import DataError, LeakageError, ParameterError
from anomaly_nb.data import isles, ms_older, ms_sets
from anomaly_nb.data.check import check_records
from anomaly_nb.data.isles import flipped_file, isles_file, isles_records, lost_affine
from anomaly_nb.data.ms_older import isbi_records, msseg2008_records, nrrd_file, nrrd_payload, read_nrrd
from anomaly_nb.data.derived import ILL_POOLS, deal_ill
from anomaly_nb.data.ms_sets import mslub_records, msseg_records
from anomaly_nb.data.records import Record, check_leakage, load_record, read_volume
from anomaly_nb.data.sets import SliceSet, VolumeSet

SPACING, SHAPE, MIDDLE = (2., 2.5, 3.), (22, 24, 12), np.array([0., -7, 4])        # x, y, z in RAS mm
SPACES = {"left-posterior-superior": (-1, -1, 1), "RAS": (1, 1, 1), "left-anterior-superior": (-1, 1, 1)}


class Grid:
    "Where the voxels of a file lie: axes in the order `code`, tilted by some degrees about z and x."
    def __init__(self, code="RAS", tilt=0., spacing=SPACING, shape=SHAPE):
        M, n = np.zeros((3, 3)), []
        for i, (axis, sign) in enumerate(axcodes2ornt(code).astype(int)): M[axis, i] = sign*spacing[axis]; n.append(shape[axis])
        c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
        M = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ M
        self.affine, self.shape = nib.affines.from_matvec(M, MIDDLE - M @ (np.array(n) - 1)/2), tuple(n)
        self.mm = np.einsum("ij,jabc->iabc", M, np.indices(n)) + self.affine[:3, 3, None, None, None]

    def ball(self, centre, radius): return sum(((a - c)/r)**2 for a, c, r in zip(self.mm, centre, np.broadcast_to(radius, 3))) < 1
    def brain(self): return self.ball(MIDDLE, (19, 25, 15))
    def lesion(self, place): return self.ball(place, 5.5)

    def head(self, place, seed=0, skull=False, dark=False):
        "An image: bright lesion (or a dark one), slightly brighter at the back and on the right, 0 outside; perhaps a skull."
        values = self.brain()*(100 + .3*(self.mm[0] - self.mm[1]) + (-40 if dark else 60)*self.lesion(place))
        rim = self.ball(MIDDLE, (22, 29, 18)) & ~self.ball(MIDDLE, (20, 27, 16)) if skull else 0*self.brain()
        return values + 200*rim + (values > 0)*np.random.default_rng(seed).normal(0, 3, self.shape)


def put(path, values, grid, dtype="int16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values).astype(dtype), grid.affine), path)


def put_nrrd(path, values, grid, space="left-posterior-superior", encoding="raw", attached=False, change=str):
    "An NRRD as the challenge of 2008 has it: header in ASCII, voxels beside it (or after it)."
    A = np.diag([*SPACES[space], 1]) @ grid.affine
    voxels = np.asarray(values).round().astype("<i2").tobytes(order="F")
    if encoding == "gzip": voxels = gzip.compress(voxels, mtime=0)
    name = f"{path.stem}.raw" + ".gz"*(encoding == "gzip")
    def vector(v): return "(" + ",".join(f"{n:.12g}" for n in v) + ")"
    lines = ["NRRD0004", "# written for a test", "type: short", "dimension: 3", f"space: {space}", f"sizes: {' '.join(map(str, grid.shape))}", f"space directions: {' '.join(vector(A[:3, i]) for i in range(3))}", "kinds: domain domain domain",
             "endian: little", f"encoding: {encoding}", f"space origin: {vector(A[:3, 3])}", *([] if attached else [f"data file: {name}"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    head = change("\n".join(lines) + "\n")
    if attached: path.write_bytes(head.encode() + b"\n" + voxels)
    else:
        path.write_text(head)
        (path.parent/name).write_bytes(voxels)
    return path


def seat(n): return (8*(-1)**n, -20. + 4*(n % 7), 5.)                       # centre of the lesion of person n, RAS mm


# ---------------------------------------------------------------------------------------------------------------- the sets
def mslub(root, code="LPS", tilt=0., full=False, people=None, layout="prefixed"):
    g, places = Grid(code, tilt), {}
    for n in range(1, (people or (4 if full else 2)) + 1):
        p = f"patient{n:02d}"
        places[f"mslub-{p}"] = seat(n)
        images = {c: g.head(seat(n), n, True, c == "T1W") for c in ("FLAIR", "T1W")[:1 + full]}
        gt = np.clip(g.lesion(seat(n))*1.0, .02, .97)                       # a map, not a mask
        for folder, prefix in ([(root/p, f"{p}_")] if layout == "prefixed" else [(root/"cross_sectional"/v/p, "") for v in ("coregistered", "raw")]):
            for c, a in images.items(): put(folder/f"{prefix}{c}.nii.gz", a, g)
            put(folder/f"{prefix}consensus_gt.nii.gz", gt, g, "float32")
            if folder.parent.name != "raw": put(folder/f"{prefix}brainmask.nii.gz", g.brain(), g, "uint8")
    return places


def msseg(root, code="LIP", tilt=0., full=False, people=("Training/Center_01/Patient_01", "Training/Center_07/Patient_01", "Training/Center_08/Patient_02", "Testing/Center_01/Patient_01", "Testing/Center_03/Patient_02")):
    g, places = Grid(code, tilt), {}
    other = Grid(code, tilt, (3., 2.5, 3.))
    for n, name in enumerate(people if full else people[-2:]):
        p, at = root/name, np.array(seat(n))
        places["msseg2016-" + name.replace("/", "-")] = tuple(at)
        for c, word in (("FLAIR", "FLAIR"), ("T1", "T1"), ("T1ce", "GADO"), ("PD", "DP"))[:4 if full else 1]:
            put(p/"Preprocessed_Data"/f"{word}_preprocessed.nii.gz", g.head(at, n, dark=c == "T1"), g)
            raw = g if c == "FLAIR" else other
            if full: put(p/"Raw_Data"/f"{word}.nii.gz", raw.head(at, n, True), raw)
        put(p/"Masks"/"Brain_Mask.nii.gz", g.brain(), g, "uint8")
        put(p/"Masks"/"Consensus.nii.gz", g.lesion(at), g, "uint8")
        for rater in range(1, 8*full): put(p/"Masks"/f"ManualSegmentation_{rater}.nii.gz", g.lesion(at + (0 if rater < 5 else 40)), g, "uint8")       # four agree, three are elsewhere
    return places


def msseg2008(root, code="RAI", tilt=0., full=False, space="left-posterior-superior", **how):
    g, places = Grid(code, tilt), {}
    for n, case in enumerate(("CHB_train_Case01", "CHB_train_Case02", "UNC_train_Case01", "UNC_test1_Case01")[:4 if full else 2]):
        folder = root/f"{case[:9]}_Part1"/case
        for c in ("FLAIR", "T1", "T2")[:1 + 2*full]: put_nrrd(folder/f"{case}_{c}.nhdr", g.head(seat(n), n, True, c == "T1"), g, space, **how)
        if "train" in case: put_nrrd(folder/f"{case}_lesion.nhdr", g.lesion(seat(n)), g, space, **how); places[f"msseg2008-{case}"] = seat(n)
        if "UNC_train" in case: put_nrrd(root/"UNC_train_lesion_byCHB"/case/f"{case}_lesion_byCHB.nhdr", g.ball(seat(n), 8), g, space, **how)
    return places


def isbi(root, code="LSP", tilt=0., full=False, ending=".nii"):
    g, places = Grid(code, tilt), {}
    for n in range(1, 3 + full):
        for date in range(1, 3 + full):
            stem, folder = f"training{n:02d}_{date:02d}", root/"training"/f"training{n:02d}"
            places[f"isbi-{stem}"] = seat(n)
            for c in ("flair", "mprage")[:1 + full]: put(folder/"preprocessed"/f"{stem}_{c}_pp{ending}", g.head(seat(n), 10*n + date, dark=c == "mprage"), g, "float32")
            for rater in (1, 2)[:1 + full]: put(folder/"masks"/f"{stem}_mask{rater}{ending}", g.ball(seat(n), 4.5 + rater), g, "float32")
    put(root/"testdata_website"/"test01"/"preprocessed"/f"test01_01_flair_pp{ending}", g.head(seat(0), 99), g, "float32")
    return places


def siss(root, code="LAS", tilt=0., full=False, people=None):
    g, places, people = Grid(code, tilt), {}, people or (4 if full else 2)
    for n in range(1, people + 2):
        folder = root/("SISS2015_Training" if n <= people else "SISS2015_Testing")/str(n if n <= people else 1)
        for i, c in enumerate(("MR_Flair", "MR_T1", "MR_T2", "MR_DWI")[:4 if full else 1]): put(folder/f"VSD.Brain.XX.O.{c}.{7000 + 10*n + i}"/f"VSD.Brain.XX.O.{c}.{7000 + 10*n + i}.nii", g.head(seat(n), 10*n + i, dark=c == "MR_T1"), g)
        if n <= people:
            put(folder/f"VSD.Brain_{n}more.XX.O.OT.{7005 + 10*n}"/f"VSD.Brain_{n}more.XX.O.OT.{7005 + 10*n}.nii", g.lesion(seat(n)), g)
            places[f"isles2015-{n:02d}"] = seat(n)
    return places


def open_ms(root, code="PSR", tilt=0., full=False): return mslub(root, code, tilt, full, 3 if full else 1, "open")


SETS = {"mslub": (mslub, mslub_records), "open_ms": (open_ms, mslub_records), "msseg": (msseg, msseg_records), "msseg2008": (msseg2008, msseg2008_records), "isbi": (isbi, isbi_records), "isles": (siss, isles_records)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "{set: (folder, places)}, one of each; not to be changed."
    found = {}
    for name, (write, _) in SETS.items():
        root = tmp_path_factory.mktemp(name)
        found[name] = root, write(root, full=True)
    return found


def flat(dealt): return {r.id: r for items in dealt.values() for r in items}


def refused(words, do, error=DataError):
    with pytest.raises(error) as caught: do()
    for word in [words] if isinstance(words, str) else words: assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def complaints(record, place, bright=True):
    "What is wrong with where the lesion lies: the mask's centre of mass in RAS mm, and what the image shows under it."
    try: sample = load_record(record)
    except DataError as error: return [str(error)]
    A, mask, image = np.array(sample["meta"]["affine"]), sample["mask"][0], sample["image"][0]
    inside = sample["foreground"][0] & ~mask
    at = A[:3, :3] @ np.argwhere(mask).mean(0) + A[:3, 3] if mask.any() else np.full(3, np.inf)
    found = [] if np.abs(at - place).max() < 1.2 else [f"the mask lies at {at}, not at {place}"]
    hot = A[:3, :3] @ np.argwhere(sample["foreground"][0] & (image > 140) & (image < 185)).mean(0) + A[:3, 3]
    if not np.abs(hot - place).max() < 1.5: found.append(f"the image shows the lesion at {hot}, not at {place}")
    if not mask.any() or image[mask].mean() < np.median(image[inside]) + 35: found.append("no lesion under the mask")
    return found


# ---------------------------------------------------------------------------------------------------------------- where things lie
@pytest.mark.parametrize("code, tilt", [("RAS", 0.), ("PIR", 0.), ("IPL", 0.), ("LPS", 12.)])
def test_a_lesion_lies_where_it_was_written_whatever_the_order_of_axes(tmp_path, cache, code, tilt):
    for name, (write, read) in SETS.items():
        places = write(tmp_path/name, code, tilt)
        records = flat(read(tmp_path/name, **({"foreground": "nonzero"} if name == "msseg2008" else {}), cache=cache))
        assert set(records) == set(places), name
        for i in records: assert complaints(records[i], places[i]) == [], (name, code, i)


def test_all_orders_give_the_same_sample(tmp_path, cache):
    for name, (write, read) in SETS.items():
        samples = []
        for code in ("LPS", "IRP"):
            write(tmp_path/name/code, code)
            samples.append(load_record(next(iter(flat(read(tmp_path/name/code, pools=ILL_POOLS, cache=cache)).values())), 1))
        a, b = samples
        assert np.allclose(a["meta"]["affine"], b["meta"]["affine"]), name
        assert np.array_equal(a["mask"], b["mask"]) and np.array_equal(a["foreground"], b["foreground"]), name
        assert a["image"].shape == b["image"].shape == (1, 12, 24, 22)
        assert np.abs(a["image"] - b["image"]).mean() < 8                                    # the noise is another


FAULTS = {
    "a wrong affine of the mask": lambda values, grid: (values, nib.affines.from_matvec(grid.affine[:3, :3], grid.affine[:3, 3] + (4, 0, 0))),
    "a mirrored affine of the mask": lambda values, grid: (values, np.diag([-1, 1, 1, 1.]) @ grid.affine),
    "a mask shifted by two voxels": lambda values, grid: (np.roll(values, 2, 0), grid.affine),
    "a mask with an axis reversed": lambda values, grid: (values[:, ::-1], grid.affine),
    "a mask with two axes swapped": lambda values, grid: (np.ascontiguousarray(values.swapaxes(0, 1))[:values.shape[0], :values.shape[1]], grid.affine),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_mask_is_seen(tmp_path, cache, fault):
    places = siss(tmp_path, people=1)
    g, (name, at) = Grid("LAS"), next(iter(places.items()))
    path = isles_file(tmp_path/"SISS2015_Training"/"1", "OT")
    assert complaints(flat(isles_records(tmp_path, cache=cache))[name], at) == []
    values, affine = FAULTS[fault](np.pad(g.lesion(at), ((0, 2), (0, 0), (0, 0)))[:22], g)
    nib.save(nib.Nifti1Image(values.astype("int16"), affine), path)
    assert complaints(flat(isles_records(tmp_path, cache=cache))[name], at), fault


@pytest.mark.parametrize("fault", ["affine", "axis", "swap"])
def test_a_fault_of_image_and_mask_together_is_seen_in_millimetres(tmp_path, cache, fault):
    "Overlays are perfect then; only the place in the world tells."
    g = Grid("LPS")
    at = seat(1)
    p = tmp_path/"patient01"
    for name, values, dtype in (("FLAIR", g.head(at, 1), "int16"), ("consensus_gt", g.lesion(at), "float32"), ("brainmask", g.brain(), "uint8")):
        other = Grid("LPS")
        if fault == "affine": other.affine = np.diag([1, -1, 1, 1.]) @ g.affine
        put(p/f"patient01_{name}.nii.gz", values[:, ::-1] if fault == "axis" else values.swapaxes(0, 1) if fault == "swap" else values, other, dtype)
    record = next(iter(flat(mslub_records(tmp_path, cache=cache)).values()))
    sample = load_record(record)
    assert sample["image"][0][sample["mask"][0]].mean() > 140                                # overlaid well
    assert complaints(record, at)


# ---------------------------------------------------------------------------------------------------------------- damage
def first_files(name, root):
    "(image, mask, pattern of its reader) of one person."
    return {"mslub": (root/"patient02"/"patient02_FLAIR.nii.gz", root/"patient02"/"patient02_consensus_gt.nii.gz"),
            "msseg": (root/"Testing"/"Center_01"/"Patient_01"/"Preprocessed_Data"/"FLAIR_preprocessed.nii.gz", root/"Testing"/"Center_01"/"Patient_01"/"Masks"/"Consensus.nii.gz"),
            "msseg2008": (root/"CHB_train_Part1"/"CHB_train_Case01"/"CHB_train_Case01_FLAIR.raw", root/"CHB_train_Part1"/"CHB_train_Case01"/"CHB_train_Case01_lesion.nhdr"),
            "isbi": (root/"training"/"training02"/"preprocessed"/"training02_01_flair_pp.nii", root/"training"/"training02"/"masks"/"training02_01_mask1.nii"),
            "isles": tuple(os.path.join(root, "SISS2015_Training", "2", p) for p in ("VSD.Brain.XX.O.MR_Flair.7020/VSD.Brain.XX.O.MR_Flair.7020.nii", "VSD.Brain_2more.XX.O.OT.7025/VSD.Brain_2more.XX.O.OT.7025.nii"))}[name]


@pytest.mark.parametrize("name", ["mslub", "msseg", "msseg2008", "isbi", "isles"])
def test_a_damaged_file_is_named(tmp_path, cache, name):
    write, read = SETS[name]
    write(tmp_path)
    def use():
        for r in flat(read(tmp_path, cache=cache)).values(): load_record(r)
    for path in map(str, first_files(name, tmp_path)):
        with open(path, "rb") as file: whole = file.read()
        for damaged in (whole[:-40], b"", whole[:len(whole)//2], whole[:len(whole)//2] + b"\0"*40 + whole[len(whole)//2 + 40:] if path.endswith(".gz") else whole[:30], b"this is no image, whatever its name says"):
            with open(path, "wb") as file: file.write(damaged)
            said = refused(os.path.basename(path).rsplit(".", 2 if path.endswith(".gz") else 1)[0], use)
            assert not said.startswith(str(cache)), said                                     # the set's own file, not ours
        with open(path, "wb") as file: file.write(whole)
    use()


def test_what_is_broken_is_told_together_and_healthy_pools_are_not_asked(tmp_path, cache):
    mslub(tmp_path, people=3)
    broken = [tmp_path/f"patient{n:02d}"/f"patient{n:02d}_consensus_gt.nii.gz" for n in (1, 3)]
    for f in broken: f.write_bytes(f.read_bytes()[:60])
    refused([f.name for f in broken], lambda: mslub_records(tmp_path, pools="test", shares=(1, 0, 0), cache=cache))
    assert mslub_records(tmp_path, pools=("train", "val"), cache=cache) == {}


def test_a_mask_of_another_grid_is_named(tmp_path, cache):
    msseg(tmp_path, full=True, people=("Testing/Center_01/Patient_01",))
    g, masks = Grid("LIP", shape=(22, 24, 14)), tmp_path/"Testing"/"Center_01"/"Patient_01"/"Masks"
    put(masks/"Consensus.nii.gz", g.lesion(seat(0)), g, "uint8")
    refused(["Consensus.nii.gz", "has the grid (14, 24, 22)"], lambda: load_record(msseg_records(tmp_path, cache=cache)["test"][0]))
    put(masks/"ManualSegmentation_3.nii.gz", g.lesion(seat(0)), g, "uint8")
    refused("ManualSegmentation_3.nii.gz", lambda: msseg_records(tmp_path, annotation="majority", cache=cache))
    put(masks/"Brain_Mask.nii.gz", g.brain(), g, "uint8")
    refused(["Brain_Mask.nii.gz", "has the grid"], lambda: load_record(msseg_records(tmp_path, annotation=1, cache=cache)["test"][0]))


@pytest.mark.parametrize("value, dtype", [(255, "uint8"), (2, "uint8"), (.5, "float32"), (np.nan, "float32")])
def test_a_rater_s_mask_that_is_not_binary_is_named(tmp_path, cache, value, dtype):
    msseg(tmp_path, full=True, people=("Testing/Center_01/Patient_01",))
    g = Grid("LIP")
    put(tmp_path/"Testing"/"Center_01"/"Patient_01"/"Masks"/"ManualSegmentation_2.nii.gz", np.where(g.lesion(seat(0)), value, 0), g, dtype)
    refused(["ManualSegmentation_2.nii.gz", "binary"], lambda: load_record(msseg_records(tmp_path, annotation=2, cache=cache)["test"][0]))
    refused(["ManualSegmentation_2.nii.gz", "binary"], lambda: msseg_records(tmp_path, annotation="majority", cache=cache))
    load_record(msseg_records(tmp_path, annotation=3, cache=cache)["test"][0])


def test_a_consensus_with_nan_is_refused_and_its_threshold_is_strict(tmp_path, cache):
    mslub(tmp_path, people=1)
    g = Grid("LPS")
    values = np.where(g.lesion(seat(1)), .97, 0.)
    values[0, 0, 0] = .9
    put(tmp_path/"patient01"/"patient01_consensus_gt.nii.gz", values, g, "float64")
    record = next(iter(flat(mslub_records(tmp_path, cache=cache)).values()))
    assert load_record(record)["mask"].sum() == g.lesion(seat(1)).sum()
    values[0, 0, 0] = np.nan
    put(tmp_path/"patient01"/"patient01_consensus_gt.nii.gz", values, g, "float64")
    refused(["patient01_consensus_gt", "NaN"], lambda: mslub_records(tmp_path, cache=cache))


@pytest.mark.parametrize("name, gone, contrast", [
    ("mslub", ["patient01/patient01_T1W.nii.gz", "patient03/patient03_brainmask.nii.gz", "patient04/patient04_consensus_gt.nii.gz"], "FLAIR+T1"),
    ("open_ms", ["cross_sectional/coregistered/patient02/FLAIR.nii.gz", "cross_sectional/coregistered/patient03/brainmask.nii.gz"], "FLAIR"),
    ("msseg", ["Training/Center_07/Patient_01/Preprocessed_Data/GADO_preprocessed.nii.gz", "Testing/Center_03/Patient_02/Masks/Consensus.nii.gz"], "T1ce"),
    ("msseg2008", ["CHB_train_Part1/CHB_train_Case02/CHB_train_Case02_T2.nhdr", "UNC_train_Part1/UNC_train_Case01/UNC_train_Case01_lesion.raw"], "T2"),
    ("isbi", ["training/training01/preprocessed/training01_02_flair_pp.nii", "training/training03/masks/training03_01_mask1.nii"], "FLAIR"),
    ("isles", ["SISS2015_Training/3/VSD.Brain.XX.O.MR_DWI", "SISS2015_Training/4/VSD.Brain.XX.O.OT"], "DWI")])
def test_all_missing_files_are_named(tmp_path, cache, name, gone, contrast):
    write, read = SETS[name]
    write(tmp_path, full=True)
    for g in gone:
        if name == "isles": os.unlink(isles_file((tmp_path/g).parent, g.rpartition(".O.")[2]))
        else: (tmp_path/g).unlink()
    said = refused([*gone, f"{len(gone)} of "], lambda: read(tmp_path, contrast, cache=cache))
    assert "are missing" in said
    assert not [word for word in ("patient02_", "training02") if word in said and name in ("mslub", "isbi")]


def test_many_missing_files_are_counted(tmp_path, cache):
    mslub(tmp_path, people=9)
    refused(["9 of 27 files are missing", "patient05_T2W.nii.gz", "and 4 more"], lambda: mslub_records(tmp_path, "T2", cache=cache))


# ---------------------------------------------------------------------------------------------------------------- names and places
def test_names_with_spaces_and_other_alphabets(tmp_path, cache, monkeypatch):
    for name, (write, read) in SETS.items():
        root = tmp_path/f"Bänder 多発性 {name}. "
        places = write(root)
        records = flat(read(root, cache=cache/"mit Leerzeichen é"))
        i = sorted(places)[0]
        assert load_record(records[i])["mask"].any()
        monkeypatch.chdir(root)
        relative = flat(read(".", cache=cache/"mit Leerzeichen é"))
        monkeypatch.chdir(tmp_path)
        assert {i: r.images for i, r in relative.items()} == {i: r.images for i, r in records.items()}              # paths hold anywhere


def test_variants_of_a_layout_are_one_set(tmp_path, cache, made):
    root, places = made["open_ms"]
    same = [flat(mslub_records(p, cache=cache)) for p in (root, root/"cross_sectional", root/"cross_sectional"/"coregistered", root/"cross_sectional"/"raw")]
    assert all(s == same[0] for s in same)                                                   # the version is said by the option, not by the path
    raw = flat(mslub_records(root, version="raw", cache=cache))
    assert set(raw) == set(places)
    for r in raw.values():
        assert os.sep + "raw" + os.sep in r.images[0] and os.sep + "coregistered" + os.sep in r.foreground and r.meta["version"] == "raw"
    p = tmp_path/"LIT"/"patient01"
    mslub(tmp_path/"LIT", people=1)
    put(p/"raw"/"patient01_FLAIR.nii.gz", Grid("LPS").head(seat(1), 3, True), Grid("LPS"))
    raw = flat(mslub_records(tmp_path/"LIT", version="raw", cache=cache))["mslub-patient01"]
    assert raw.images[0].endswith("raw/patient01_FLAIR.nii.gz") and complaints(raw, seat(1)) == []
    os.rename(p/"patient01_brainmask.nii.gz", p/"brainmask.nii.gz")                          # both spellings in one folder, as in the history of open_ms_data
    assert flat(mslub_records(tmp_path/"LIT", cache=cache))["mslub-patient01"].foreground.endswith("/brainmask.nii.gz")
    assert len(isbi(tmp_path/"isbi", ending=".nii.gz")) == len(flat(isbi_records(tmp_path/"isbi", cache=cache))) == 4
    assert set(flat(isbi_records(tmp_path/"isbi"/"training", cache=cache))) == set(flat(isbi_records(tmp_path/"isbi", cache=cache)))


def test_channels_come_in_the_order_asked_for(made, cache):
    for name, (_, read) in SETS.items():
        samples = [load_record(next(iter(flat(read(made[name][0], c, cache=cache)).values())), 2) for c in ("FLAIR+T1", "T1+FLAIR")]
        assert np.array_equal(samples[0]["image"], samples[1]["image"][::-1]) and samples[1]["meta"]["contrast"] == "T1+FLAIR"
        bright, dark = samples[0]["image"][:, samples[0]["mask"][0]].mean(1)
        assert bright > 140 and dark < 80, name


def test_raw_contrasts_on_other_grids_are_refused(made, cache):
    root, _ = made["msseg"]
    record = msseg_records(root, "FLAIR+PD", version="raw", cache=cache)["test"][0]
    refused("DP.nii.gz", lambda: load_record(record))
    alone = msseg_records(root, version="raw", cache=cache)["test"][0]
    sample = load_record(alone)
    assert (sample["image"][~sample["foreground"]] > 150).any()                              # the skull is there, and outside
    both = load_record(msseg_records(root, "PD+FLAIR+T1ce", cache=cache)["test"][0], 3)
    assert both["meta"]["contrast"] == "PD+FLAIR+T1ce"


def test_foregrounds_are_what_they_say(made, cache):
    g = Grid("LPS")
    for foreground, share in (("given", g.brain().mean()), ("nonzero", None), ("otsu", None)):
        r = mslub_records(made["mslub"][0], foreground=foreground, shares=(1, 0, 0), cache=cache)["test"][0]
        assert r.meta["foreground"] == foreground
        if share: assert load_record(r)["foreground"].mean() == share
    for name in ("isbi", "isles", "msseg2008"):
        refused("foreground", lambda: SETS[name][1](made[name][0], foreground="given", cache=cache), ParameterError)


@pytest.mark.parametrize("option, value", [("contrast", "Flair"), ("contrast", "FLAIR+FLAIR"), ("pools", "tests"), ("shares", (.5, .6, 0)), ("shares", "all"), ("foreground", "brain")])
def test_bad_options_are_named(made, option, value):
    for name, (_, read) in SETS.items(): refused(option, lambda: read(made[name][0], **{option: value}), ParameterError)


def test_other_bad_options_are_named(made):
    root = made["msseg"][0]
    for option, value in (("annotation", 8), ("annotation", "all"), ("version", "denoised"), ("year", 2015)): refused(option, lambda: msseg_records(root, **{option: value}), ParameterError)
    refused("version", lambda: mslub_records(made["mslub"][0], version="preprocessed"), ParameterError)
    refused("annotation", lambda: isbi_records(made["isbi"][0], annotation="consensus"), ParameterError)
    refused("annotation", lambda: msseg2008_records(made["msseg2008"][0], annotation="UNC"), ParameterError)
    refused("flip_y", lambda: isles_records(made["isles"][0], flip_y="no"), ParameterError)


def test_a_wrong_folder_is_named(tmp_path, made):
    for name, (_, read) in SETS.items():
        refused(str(tmp_path/"nothing"), lambda: read(tmp_path/"nothing"))
        (tmp_path/"empty").mkdir(exist_ok=True)
        refused(str(tmp_path/"empty"), lambda: read(tmp_path/"empty"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, made):
    (tmp_path/"file").write_text("in the way")
    for name, how in (("mslub", {}), ("msseg", {"annotation": "majority"}), ("msseg2008", {}), ("isbi", {"annotation": "majority"}), ("isles", {"flip_y": True})): refused(str(tmp_path/"file"), lambda: SETS[name][1](made[name][0], cache=tmp_path/"file", **how))


# ---------------------------------------------------------------------------------------------------------------- who goes where
@pytest.mark.parametrize("name", SETS)
def test_nobody_stands_in_two_pools_and_nobody_is_lost(made, cache, name):
    root, places = made[name]
    pools = set()
    for seed in range(4):
        for shares in (None, (.4, .3, .3)):
            dealt = SETS[name][1](root, shares=shares, seed=seed, cache=cache)
            check_leakage({p: VolumesOf(items) for p, items in dealt.items()})
            assert {r.id for items in dealt.values() for r in items} == set(places) and sum(map(len, dealt.values())) == len(places)
            assert set(dealt) <= set(ILL_POOLS) and all(r.meta["pool"] == p and r.label == 1 and r.mask_known for p, items in dealt.items() for r in items)
            pools |= {(r.subject, p) for p, items in dealt.items() for r in items}
            one = SETS[name][1](root, pools="test", shares=shares, seed=seed, cache=cache)
            assert one == ({"test": dealt["test"]} if "test" in dealt else {})                # what is asked for does not move anybody
    assert len(pools) > len({s for s, _ in pools})                                           # the seed does


class VolumesOf:
    def __init__(self, records): self.subjects = [r.subject for r in records]


def test_all_dates_of_a_person_stay_together_and_are_different_scans(made, cache):
    root, places = made["isbi"]
    for seed in range(12):
        home = {}
        for pool, items in isbi_records(root, shares=(.34, .33, .33), seed=seed, cache=cache).items():
            for r in items: assert home.setdefault(r.subject, pool) == pool
        assert len(home) == 3
    records = flat(isbi_records(root, cache=cache))
    assert sorted(records) == sorted(places) and {r.subject for r in records.values()} == {"isbi-training01", "isbi-training02", "isbi-training03"}
    assert {r.meta["date"] for r in records.values()} == {"01", "02", "03"}
    leak = {"test": VolumesOf([records["isbi-training01_01"]]), "weak": VolumesOf([records["isbi-training01_02"]])}
    with pytest.raises(LeakageError, match="isbi-training01"): check_leakage(leak)            # were it dealt by scan, this would say so


def test_the_organisers_split_holds_unless_shares_are_said(made, tmp_path, cache):
    root, places = made["msseg"]
    for seed in range(5):
        dealt = msseg_records(root, seed=seed, cache=cache)
        assert {r.id for r in dealt["test"]} == {i for i in places if "Testing" in i}
    assert len(msseg_records(root, shares=(1, 0, 0), cache=cache)["test"]) == 5
    os.symlink(root/"Training", tmp_path/"Training")                                          # half of a download
    some = set().union(*(msseg_records(tmp_path, seed=seed, cache=cache) for seed in range(8)))
    assert some == set(ILL_POOLS)
    names = {i.split("-", 2)[2] for i in places}
    assert len(names) < len(places)                                                          # Center_01/Patient_01 is two people


def test_people_without_outlines_are_unlabelled_and_only_when_asked(made, cache):
    for name, i in (("msseg2008", "msseg2008-UNC_test1_Case01"), ("isbi", "isbi-test01_01"), ("isles", "isles2015-testing-01")):
        root, places = made[name]
        dealt = SETS[name][1](root, pools=(*ILL_POOLS, "unlabelled"), cache=cache)
        assert [r.id for r in dealt["unlabelled"]] == [i]
        r = dealt["unlabelled"][0]
        assert (r.mask, r.mask_known, r.label) == (None, False, 1) and not load_record(r)["mask"].any()
        assert i not in flat(SETS[name][1](root, cache=cache)) and r.subject not in {q.subject for p, items in dealt.items() if p != "unlabelled" for q in items}


def test_two_folders_of_one_person_are_refused(tmp_path, cache):
    isbi(tmp_path)
    os.rename(tmp_path/"testdata_website"/"test01", tmp_path/"testdata_website"/"training01")
    refused("second folder of training01", lambda: isbi_records(tmp_path, cache=cache))


def test_dealing_is_by_person_and_data_set():
    people = [Record(f"{i}-{t}", f"s{i}", ("x.nii",), 1) for i in range(400) for t in range(2)]
    a, b = ({r.subject: p for p, items in deal_ill(people, d).items() for r in items} for d in ("mslub", "isles"))
    assert a != b and abs(np.mean([p == "test" for p in a.values()]) - .5) < .1
    assert set(deal_ill(people, "mslub", shares=(0, 1, 0))) == {"val_anomalous"}
    assert deal_ill([], "mslub") == {}


# ---------------------------------------------------------------------------------------------------------------- whose outline
def test_annotations_of_msseg(made, cache):
    root, places = made["msseg"]
    i = "msseg2016-Testing-Center_01-Patient_01"
    masks = {a: load_record(flat(msseg_records(root, annotation=a, cache=cache))[i])["mask"] for a in ("consensus", "majority", 1, 4, 5, 7)}
    assert np.array_equal(masks["majority"], masks[1]) and np.array_equal(masks[1], masks[4]) and np.array_equal(masks[5], masks[7])
    assert masks["consensus"].sum() and not (masks[5] & masks[1]).any()                      # four against three
    assert flat(msseg_records(root, annotation="majority", cache=cache))[i].meta["annotation"] == "majority"


def test_annotations_of_2008_and_2015(made, cache):
    root, _ = made["msseg2008"]
    own, chb = (flat(msseg2008_records(root, annotation=a, cache=cache)) for a in ("given", "CHB"))
    assert len(own) == len(chb) == 3                                                          # the second folder of UNC_train_Case01 is no person
    volumes = {k: [load_record(r[f"msseg2008-{k}_train_Case01"])["mask"].sum() for r in (own, chb)] for k in ("CHB", "UNC")}
    assert volumes["CHB"][0] == volumes["CHB"][1] and volumes["UNC"][1] > 2*volumes["UNC"][0]
    assert flat(msseg_records(root, year=2008, cache=cache)).keys() == own.keys()
    root, _ = made["isbi"]
    one, two, both = (load_record(flat(isbi_records(root, annotation=a, cache=cache))["isbi-training01_01"])["mask"] for a in (1, 2, "majority"))
    assert one.sum() < two.sum() and np.array_equal(both, one & two)


# ---------------------------------------------------------------------------------------------------------------- NRRD
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR"])
def test_nrrd_in_every_space_is_the_same_as_nifti(tmp_path, cache, space, code):
    g = Grid(code, 8.)
    values = g.head(seat(1)).round()
    put(tmp_path/"a.nii.gz", values, g)
    wanted, A = read_volume(tmp_path/"a.nii.gz")
    for n, how in enumerate(({}, {"encoding": "gzip"}, {"attached": True}, {"attached": True, "encoding": "gzip"})):
        path = put_nrrd(tmp_path/f"b{n}.{'nrrd' if how.get('attached') else 'nhdr'}", values, g, space, **how)
        array, affine = read_nrrd(path)
        assert np.array_equal(array, wanted) and np.allclose(affine, A, atol=1e-4) and array.dtype == "int16", how
        again, at = read_volume(nrrd_file(path, cache))
        assert np.array_equal(again, wanted) and np.allclose(at, A, atol=1e-4)


def test_a_nrrd_is_made_once_and_anew_when_it_changes(tmp_path, cache, monkeypatch):
    g = Grid()
    path = put_nrrd(tmp_path/"x.nhdr", g.head(seat(1)), g)
    first = nrrd_file(path, cache)
    monkeypatch.setattr(ms_older, "read_nrrd", lambda p: pytest.fail("read again"))
    assert nrrd_file(path, cache) == first
    monkeypatch.undo()
    put_nrrd(path, g.head(seat(2)), g)
    assert nrrd_file(path, cache) != first                                                    # other voxels, same header
    second = nrrd_file(path, cache)
    put_nrrd(path, g.head(seat(2)), g, change=lambda t: t.replace("left-posterior-superior", "left-anterior-superior"))
    assert nrrd_file(path, cache) not in (first, second)                                      # another header, same voxels


@pytest.mark.parametrize("change, words", [
    (lambda t: t.replace("left-posterior-superior", "scanner-xyz"), "does not say how it lies in the head (space: scanner-xyz)"),
    (lambda t: t.replace("left-posterior-superior", "left-posterior-superior-time"), "does not say how it lies"),
    (lambda t: "\n".join(line for line in t.splitlines() if not line.startswith("space")) + "\n", "space: not there"),
    (lambda t: "\n".join(line for line in t.splitlines() if not line.startswith("space directions")) + "\n", "space directions"),
    (lambda t: t.replace("dimension: 3", "dimension: 4"), "dimension 4"),
    (lambda t: t.replace("NRRD0004", "NRRD"), "is no NRRD"),
    (lambda t: "", "is empty"),
    (lambda t: t[:12], "truncated"),
    (lambda t: t.replace("data file: x.raw", "data file: /etc/hostname"), "outside its folder"),
    (lambda t: t.replace("data file: x.raw", "data file: ../other/x.raw"), "outside its folder"),
    (lambda t: t.replace("data file: x.raw", "data file: LIST"), "several files"),
    (lambda t: t.replace("data file: x.raw", "data file: x%02d.raw 1 5 1"), "several files"),
    (lambda t: t.replace("data file: x.raw\n", ""), "names no file of voxels"),
    (lambda t: t.replace("sizes: 22 24 12", "sizes: 22 24 13"), "cannot be read"),
    (lambda t: t.replace("sizes: 22 24 12", "sizes: 22 24 11"), "bytes"),
    (lambda t: t.replace("type: short", "type: block"), "cannot be read"),
    (lambda t: t.replace("(-2,", "(nan,").replace("(2,", "(nan,"), "cannot be inverted"),
    (lambda t: t.replace("type: short", "type: short\nbyte skip: 10"), "cannot be read")])
def test_a_bad_nrrd_header_names_the_file(tmp_path, change, words, capfd):
    g = Grid()
    path = put_nrrd(tmp_path/"x.nhdr", g.head(seat(1)), g, change=change)
    refused(["x.", words], lambda: read_nrrd(path))
    assert capfd.readouterr() == ("", "")                                                     # SimpleITK keeps quiet


def test_bad_nrrd_voxels_name_the_file(tmp_path):
    g = Grid()
    path = put_nrrd(tmp_path/"x.nhdr", g.head(seat(1)), g, encoding="gzip")
    payload = nrrd_payload(path)
    whole = payload.read_bytes()
    for spoiled in (whole[:len(whole)//2], b"", whole[:20] + b"??" + whole[22:]):
        payload.write_bytes(spoiled)
        refused("x.nhdr", lambda: read_nrrd(path))
    payload.unlink()
    refused(["x.raw.gz", "missing"], lambda: read_nrrd(path))


# ---------------------------------------------------------------------------------------------------------------- ISLES
def lost_kinds(): return {"identity": np.eye(4), "of SimpleITK": np.diag([-1., -1., 1., 1.]), "none": None}


@pytest.mark.parametrize("kind", lost_kinds())
def test_a_copy_that_lost_its_affine_is_refused_until_somebody_decides(tmp_path, cache, kind):
    g, (array, affine) = Grid("LAS", spacing=(1., 1., 1.)), (None, lost_kinds()[kind])
    folder = tmp_path/"SISS2015_Training"/"1"
    truth = np.zeros(g.shape, "int16"); truth[15:19, 4:8, 5:8] = 1                            # front of the array's middle? behind: y grows to the front
    for part, values in (("MR_Flair.1", 100*(g.brain() | (truth > 0)) + 60*truth), ("OT.2", truth)):
        name = f"VSD.Brain.XX.O.{part}"
        (folder/name).mkdir(parents=True)
        image = nib.Nifti1Image(values.astype("int16"), affine)
        if affine is None: image.set_sform(None, 0); image.set_qform(None, 0)
        nib.save(image, folder/name/f"{name}.nii")
    refused(["2 of 2 files have lost their orientation", "flip_y"], lambda: isles_records(tmp_path, cache=cache))
    for flip in (False, True):
        record = isles_records(tmp_path, flip_y=flip, shares=(1, 0, 0), cache=cache)["test"][0]
        sample = load_record(record)
        assert record.meta["flip_y"] is flip and (sample["image"][0][sample["mask"][0]] == 160).all()      # image and mask together
        y = np.argwhere(sample["mask"][0])[:, 1].mean()                                       # our second axis grows to the back
        at_the_back = y > sample["mask"].shape[2]/2
        assert at_the_back == (flip == (kind == "of SimpleITK"))


def test_an_affine_is_lost_only_if_it_says_nothing(tmp_path):
    def write(affine, codes=(2, 0)):
        image = nib.Nifti1Image(np.zeros((3, 4, 5), "int16"), affine)
        image.set_sform(affine, codes[0]); image.set_qform(affine, codes[1])
        nib.save(image, tmp_path/"x.nii")
        return lost_affine(tmp_path/"x.nii")
    assert write(np.eye(4)) and write(np.diag([-1., 1, 1, 1])) and write(np.diag([-1., -1, 1, 1]), (0, 1)) and write(nib.affines.from_matvec(np.eye(3), (5, 5, 5)), (0, 0))
    assert not write(nib.affines.from_matvec(np.eye(3), (-90, -126, -72))) and not write(np.diag([1., 1, 3, 1])) and not write(nib.affines.from_matvec(np.diag([-1., -1, 1]), (0, 239, 0)))      # the last: BraTS
    assert not write(np.array([[0, 1., 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    (tmp_path/"x.nii").write_bytes(b"")
    assert not lost_affine(tmp_path/"x.nii")                                                  # that is for loading to say


def test_flipping_keeps_a_lesion_under_its_mask_and_moves_both(tmp_path, cache):
    places = siss(tmp_path, people=1)
    record = next(iter(flat(isles_records(tmp_path, flip_y=True, cache=cache)).values()))
    at = np.array(places[record.id])
    mirrored = at*(1, -1, 1) + (0, 2*MIDDLE[1], 0)
    assert complaints(record, mirrored) == [] and complaints(record, at)
    twice = flipped_file(flipped_file(isles_file(tmp_path/"SISS2015_Training"/"1", "OT"), cache), cache)
    assert np.array_equal(read_volume(twice)[0], read_volume(isles_file(tmp_path/"SISS2015_Training"/"1", "OT"))[0])


def test_files_of_a_case_are_found_by_whole_words(tmp_path):
    g = Grid()
    for name in ("VSD.Brain.XX.O.MR_T1c.1", "VSD.Brain.XX.O.MR_T1.2", "VSD.Brain.XX.O.MR_T2.3", "VSD.Brain.XX.O.MR_Flair.4", "VSD.OTHER.XX.O.MR_DWI.5", "VSD.Brain_3more.XX.O.OT.6"): put(tmp_path/name/f"{name}.nii.gz", g.brain(), g)
    (tmp_path/"VSD.Brain.XX.O.MR_T2.3"/"._VSD.Brain.XX.O.MR_T2.3.nii.gz").write_bytes(b"mac")
    (tmp_path/"VSD.Brain.XX.O.MR_T2.3"/"License.txt").write_text("MR_T2")
    found = {part: os.path.basename(isles_file(tmp_path, part)).split(".")[-3] for part in ("MR_T1", "MR_T2", "MR_Flair", "MR_DWI", "OT")}
    assert found == {"MR_T1": "2", "MR_T2": "3", "MR_Flair": "4", "MR_DWI": "5", "OT": "6"}
    put(tmp_path/"flat.OT.nii", g.brain(), g)
    refused("second file of OT", lambda: isles_file(tmp_path, "OT"))


def test_spes_beside_siss_is_not_mixed_in(tmp_path, cache):
    siss(tmp_path, people=2)
    os.rename(tmp_path/"SISS2015_Testing", tmp_path/"SPES2015_Training")
    refused(["SPES2015_Training", "second case 1"], lambda: isles_records(tmp_path, cache=cache))
    assert len(flat(isles_records(tmp_path/"SISS2015_Training", cache=cache))) == 2


# ---------------------------------------------------------------------------------------------------------------- together
@pytest.mark.parametrize("name", SETS)
def test_each_set_works_in_2d_and_3d_and_passes_the_check(made, cache, name):
    root, places = made[name]
    dealt = SETS[name][1](root, shares=(1, 0, 0), cache=cache)
    items = dealt["test"][:2]
    assert json.loads(json.dumps([r.meta for r in items])) == [r.meta for r in items]
    assert {"pool", "family", "site", "contrast", "cohort", "modality", "foreground"} <= set(items[0].meta)
    assert all(os.path.isabs(f) and os.path.isfile(f) for r in items for f in r.files)
    volumes = VolumeSet(items, cache=False)
    slices = SliceSet(volumes)
    assert volumes[0]["image"].shape == (1, 12, 24, 22) and slices[0]["image"].shape == (1, 24, 22) and slices.labels.any() and not slices.labels.all()
    report = check_records({"test": items})
    assert report["problems"] == [], report["problems"]


def test_ids_of_all_sets_can_stand_together(made, cache):
    ids = [i for name, (_, read) in SETS.items() if name != "open_ms" for i in flat(read(made[name][0], cache=cache))]
    assert len(ids) == len(set(ids))
    assert not {s for s in vars(isles) if s in ("torch", "monai")} | {s for s in vars(ms_sets) if s in ("torch", "monai")}
