"""A person's own scans: formats, folders, manifests, the split, computed foregrounds, the check, and MVTec AD's layout."""
import csv
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from anomaly_nb.core import DataError, LeakageError, ParameterError
from anomaly_nb.data.check import check_records, check_text
from anomaly_nb.data.folder import folder_records, split_subjects, subject_of
from anomaly_nb.data.formats import read_picture
from anomaly_nb.data.module import AnomalyDataModule
from anomaly_nb.data.mvtec import mvtec_records
from anomaly_nb.data.records import Record, load_record, read_image, read_volume, write_volume
from anomaly_nb.data.sets import SliceSet, VolumeSet
from anomaly_nb.data.transforms import Resize, ZScore, wanted_transforms
from anomaly_nb.data_commands import check_set

AFFINE = np.diag([-2.0, -2.0, 4.0, 1.0])[:, [2, 1, 0, 3]]


def noise(shape, seed):
    return np.random.default_rng(seed).integers(1, 256, shape).astype("uint8")


def nifti(path, seed=0, shape=(4, 16, 14), mask=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(shape, "uint8") if mask is not False else noise(shape, seed)
    if mask: array[1:3, 4:8, 4:8] = 1
    write_volume(path, array, AFFINE)


def png(path, seed=0, shape=(16, 14), mask=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = noise(shape, seed)
    if mask is not None: array = np.zeros(shape[:2], "uint8"); array[4:8, 4:8] = 255 * mask
    Image.fromarray(array).save(path)


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sizes(records):
    return {pool: len(items) for pool, items in records.items()}


def manifest(folder, rows, name="manifest.csv", delimiter=","):
    with open(folder / name, "w", newline="") as out: csv.writer(out, delimiter=delimiter).writerows(rows)
    return folder / name


@pytest.fixture
def scans(tmp_path):
    "Ten normal subjects and two ill ones as NIfTI, flat."
    folder = tmp_path / "scans"
    for i in range(10): nifti(folder / f"p{i:02d}.nii.gz", i)
    for i in range(2): nifti(folder / f"q{i}.nii.gz", 50 + i); nifti(folder / f"q{i}_mask.nii.gz", mask=True)
    return folder


# ---------- formats ----------
@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.bmp", "a.tif", "a.tiff"])
def test_a_picture_is_a_volume_of_one_slice_with_a_known_place(tmp_path, name):
    array = noise((9, 7), 1)
    Image.fromarray(array).save(tmp_path / name)
    read, affine = read_image(tmp_path / name, spacing=(3.0, 0.5, 0.25))
    assert read.shape == (1, 1, 9, 7) and read.dtype == np.float32 and np.array_equal(read[0, 0], array)
    step = lambda a, b: affine @ (*b, 1) - affine @ (*a, 1)
    assert np.allclose(step((0, 0, 0), (0, 1, 0))[:3], (0, -0.5, 0)) and np.allclose(step((0, 0, 0), (0, 0, 1))[:3], (-0.25, 0, 0)) and np.allclose(step((0, 0, 0), (1, 0, 0))[:3], (0, 0, 3))
    assert nib.aff2axcodes(affine) == ("S", "P", "L")


def test_sixteen_bits_of_a_grey_picture_survive(tmp_path):
    array = (np.arange(63, dtype=np.uint16) * 1040).reshape(9, 7)
    Image.fromarray(array).save(tmp_path / "deep.png")
    assert np.array_equal(read_picture(tmp_path / "deep.png")[0, 0], array) and array.max() > 60000


def test_colour_alpha_and_palette(tmp_path):
    rgb = noise((9, 7, 3), 2)
    Image.fromarray(np.dstack([rgb, noise((9, 7), 3)])).save(tmp_path / "alpha.png")
    assert np.array_equal(read_picture(tmp_path / "alpha.png")[:, 0], rgb.transpose(2, 0, 1))
    Image.fromarray((rgb[..., 0] > 128).astype("uint8")).convert("P").save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png").shape == (3, 1, 9, 7)


def test_a_volume_of_one_channel_is_asked_for_and_three_are_there(tmp_path):
    png(tmp_path / "c.png", shape=(9, 7, 3))
    with pytest.raises(DataError, match="c.png: holds 3 channels"): read_volume(tmp_path / "c.png")


def test_a_nifti_file_does_not_take_a_spacing_from_elsewhere(tmp_path):
    nifti(tmp_path / "a.nii.gz")
    sample = load_record(Record("a", "a", (str(tmp_path / "a.nii.gz"),), meta={"spacing": (9, 9, 9)}))
    assert sample["meta"]["spacing"] == (4.0, 2.0, 2.0)


@pytest.mark.parametrize("values,said", [((0, 255), None), ((0, 1), None), ((0, 65535), None), ((255,), None), ((0, 128), "values 0, 128"), ((0, 1, 255), "values 0, 1, 255"), ((0, 100, 255), "values 0, 100, 255")])
def test_a_mask_picture_is_black_and_white(tmp_path, values, said):
    png(tmp_path / "a.png")
    mask = np.resize(np.array(values, np.uint16 if max(values) > 255 else np.uint8), (16, 14))
    Image.fromarray(mask).save(tmp_path / "m.png")
    record = Record("a", "a", (str(tmp_path / "a.png"),), 1, str(tmp_path / "m.png"))
    if said is None: assert np.array_equal(load_record(record)["mask"][0, 0], mask > 0)
    else:
        with pytest.raises(DataError, match=said): load_record(record)


def test_a_nifti_mask_of_0_and_255_is_still_refused(tmp_path):
    nifti(tmp_path / "a.nii.gz")
    write_volume(tmp_path / "m.nii.gz", (noise((4, 16, 14), 0) > 99) * np.uint8(255), AFFINE)
    with pytest.raises(DataError, match="m.nii.gz: is not a binary mask"): load_record(Record("a", "a", (str(tmp_path / "a.nii.gz"),), 1, str(tmp_path / "m.nii.gz")))


@pytest.mark.parametrize("what,change,said", [
    ("picture", lambda a: np.full_like(a, 7), "constant"), ("npz", lambda a: np.where(a > 250, np.nan, a.astype(float)), "NaN"), ("npz", lambda a: np.full(a.shape, 3.0), "constant")])
def test_useless_intensities_are_refused_in_every_format(tmp_path, what, change, said):
    path = tmp_path / ("a.png" if what == "picture" else "a.npz")
    array = change(noise((16, 14), 0))
    if what == "picture": Image.fromarray(array).save(path)
    else: np.savez(path, image=array)
    with pytest.raises(DataError, match=f"{path.name}.*{said}"): load_record(Record("a", "a", (str(path),)))


def test_a_mask_on_another_grid_is_refused_in_every_format(tmp_path):
    png(tmp_path / "a.png"); png(tmp_path / "m.png", shape=(14, 16), mask=1); nifti(tmp_path / "m.nii.gz", mask=True, shape=(1, 16, 14))
    for mask, said in (("m.png", "has the grid"), ("m.nii.gz", "lies elsewhere")):
        with pytest.raises(DataError, match=f"{mask}.*{said}"): load_record(Record("a", "a", (str(tmp_path / "a.png"),), 1, str(tmp_path / mask)))


def test_an_npz_alone_and_its_parts(tmp_path):
    image, mask = noise((2, 4, 16, 14), 0), noise((4, 16, 14), 1) > 200
    np.savez(tmp_path / "a.npz", image=image, mask=mask, valid=~mask, spacing=(5.0, 1.0, 1.0))
    record = Record("a", "a", (str(tmp_path / "a.npz"),), 1)
    sample = load_record(record, channels=2)
    assert np.array_equal(sample["image"], image) and np.array_equal(sample["mask"][0], mask) and np.array_equal(sample["valid"][0], ~mask) and sample["meta"]["spacing"] == (5.0, 1.0, 1.0)
    hidden = load_record(replace(record, mask_known=False))
    assert not hidden["mask"].any()                                        # unknown is unknown, whatever the file holds


class Harm:
    "A pickle that leaves a file behind when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_a_pickle_inside_an_npz_never_runs(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.array([Harm(tmp_path / "ran"), 1], dtype=object))
    with pytest.raises(DataError, match="a.npz.*object array"): load_record(Record("a", "a", (str(tmp_path / "a.npz"),)))
    np.load(tmp_path / "a.npz", allow_pickle=False).close()
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["image"]
    assert (tmp_path / "ran").exists()                                     # it would have


def test_every_flipped_bit_of_a_png_is_noticed(tmp_path):
    png(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    for at in range(8, raw.find(b"IEND") - 4):                             # the end marker holds nothing
        (tmp_path / "b.png").write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1:])
        with pytest.raises(DataError, match="b.png"): read_picture(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes(raw[:-14])
    with pytest.raises(DataError, match="b.png"): read_picture(tmp_path / "b.png")


def test_channels_must_agree_across_records(tmp_path):
    png(tmp_path / "grey.png"); png(tmp_path / "rgb.png", shape=(16, 14, 3))
    with pytest.raises(DataError, match="'rgb'.*has 3 channels"): VolumeSet([Record(n, n, (str(tmp_path / f"{n}.png"),)) for n in ("grey", "rgb")], cache=tmp_path / "cache")
    for c in range(3): png(tmp_path / f"c{c}.png", c)
    mixed = VolumeSet([Record("rgb", "rgb", (str(tmp_path / "rgb.png"),)), Record("three", "three", tuple(str(tmp_path / f"c{c}.png") for c in range(3)))], cache=tmp_path / "cache")
    assert mixed.channels == 3                                             # one file of three, or three of one


# ---------- folders ----------
def test_a_flat_folder_is_split_by_subject_and_the_ill_go_to_test(scans):
    before = tree(scans)
    records = folder_records(scans)
    assert sizes(records) == {"train": 6, "val": 2, "test": 4} and [r.id for r in records["test"] if r.label] == ["q0", "q1"]
    assert all(load_record(r)["mask"].sum() == 32 for r in records["test"] if r.label)
    assert tree(scans) == before                                           # nothing is written there
    assert folder_records(scans, split=(0.8, 0.2, 0.0)).keys() == records.keys()


def test_the_split_depends_on_names_and_seed_only(scans, tmp_path):
    ids = lambda records: {pool: {r.id for r in items} for pool, items in records.items()}
    first = ids(folder_records(scans))
    shutil.copytree(scans, tmp_path / "elsewhere" / "other name")
    assert ids(folder_records(tmp_path / "elsewhere" / "other name")) == first
    seeds = {tuple(sorted(ids(folder_records(scans, seed=s))["train"])) for s in range(5)}
    assert len(seeds) > 1
    names = [f"s{i}" for i in range(50)]
    one, more = split_subjects(names, (0.6, 0.2, 0.2)), split_subjects([*names, "new"], (0.6, 0.2, 0.2))
    assert sum(one[n] != more[n] for n in names) <= 2                      # a new subject moves the borders, not the deck


def test_two_scans_of_a_subject_stay_together(tmp_path):
    for i in range(8):
        for visit in (1, 2): nifti(tmp_path / f"sub-{i:02d}_ses-{visit}_T1w.nii.gz", 2 * i + visit)
    nifti(tmp_path / "sub-03_ses-3_T1w.nii.gz", 99); nifti(tmp_path / "sub-03_ses-3_T1w_mask.nii.gz", mask=True)
    records = folder_records(tmp_path)
    pools = {}
    for pool, items in records.items():
        for r in items: pools.setdefault(r.subject, set()).add(pool)
    assert all(len(p) == 1 for p in pools.values()) and len(pools) == 8 and pools["sub-03"] == {"test"}
    assert sum(r.label for r in records["test"]) == 1 and "sub-00-sub-00_ses-1_T1w" in {r.id for items in records.values() for r in items}


@pytest.mark.parametrize("name,folders,pattern,subject", [("sub-A1_ses-2_FLAIR", (), "", "sub-A1"), ("Patient_07_T2", (), "", "Patient_07"), ("x12_slice-033", (), "", "x12"), ("0012", ("train",), "", "train-0012"),
                                                        ("IXI012-HH-1211-T1", (), "^(IXI[0-9]+)", "IXI012"), ("mouse_left", (), "", "mouse_left")])
def test_whose_scan_is_it(name, folders, pattern, subject):
    assert subject_of(name, folders, pattern) == subject


def test_pools_as_folders_and_validation_cut_from_training(tmp_path):
    for i in range(10): png(tmp_path / "train" / f"{i:03d}.png", i)
    for i in range(3): png(tmp_path / "test" / "normal" / f"{i:03d}.png", 20 + i)
    for i in range(2): png(tmp_path / "test" / "crack" / f"{i:03d}.png", 30 + i); png(tmp_path / "ground_truth" / "crack" / f"{i:03d}_mask.png", mask=1)
    png(tmp_path / "test" / "dent" / "000.png", 40)
    png(tmp_path / "weak" / "dent" / "000.png", 41); png(tmp_path / "unlabelled" / "000.png", 42)
    (tmp_path / "test" / "notes.txt").write_text("not an image")
    records = folder_records(tmp_path, pools=("train", "val", "test", "val_anomalous", "weak", "unlabelled"))
    assert sizes(records) == {"train": 8, "val": 2, "test": 6, "weak": 1, "unlabelled": 1}
    known = {r.meta["family"]: (r.label, r.mask_known) for r in records["test"]}
    assert known == {"healthy": (0, True), "crack": (1, True), "dent": (1, False)}
    png(tmp_path / "val" / "000.png", 50)
    assert sizes(folder_records(tmp_path))["train"] == 10                  # its own val: nothing is cut


def test_families_beside_normal(tmp_path):
    for i in range(6): png(tmp_path / "healthy" / f"h{i}.png", i)
    png(tmp_path / "stroke" / "s0.png", 9)
    records = folder_records(tmp_path)
    assert [(r.meta["family"], r.mask_known) for r in records["test"] if r.label] == [("stroke", False)] and sizes(records)["train"] == 4


def test_a_subject_folder_names_the_subject(tmp_path):
    for i in range(6):
        for v in range(2): nifti(tmp_path / "train" / f"anna{i}" / f"visit{v}.nii.gz", 2 * i + v)
    nifti(tmp_path / "test" / "tumour" / "bert" / "visit0.nii.gz", 77)
    records = folder_records(tmp_path)
    assert {r.subject for r in records["train"]} | {r.subject for r in records["val"]} == {f"anna{i}" for i in range(6)} and len(records["val"]) % 2 == 0
    assert records["test"][0].subject == "bert" and records["test"][0].meta["family"] == "tumour"


@pytest.mark.parametrize("files,said", [
    (["trian/a.png", "test/x/b.png"], "neither train/ nor normal/|trian"), (["train/a.png", "tests/x/b.png"], "did you mean 'test'"), (["train/a.png", "b.png"], "b.png: lies beside"),
    (["train/a.png", "train/c.png", "test/b.png"], "b.png: lies directly in test"), (["a.png", "b_mask.png"], "b_mask.png: belongs to no image"), (["a.nrrd", "b.nrrd"], "holds no image .2 .nrrd"),
    ([f"{p}/{n}.png" for p, n in (("train", "a"), ("train", "b"), ("val", "c"), ("test/good", "a"))], "subject 'a' is in 'train' here and in 'test' at .*good/a.png"), (["a.png", "b.png"], "has 2 normal"),
    (["train/a.png", "train/b.png", "train/x/y/z.png", "test/good/q.png"], "lies too deep"), (["train/a.png", "train/a_mask.png", "val/b.png", "test/good/c.png"], "a.png: is anomalous and stands in 'train'")])
def test_a_folder_that_is_not_understood_says_what_was_expected(tmp_path, files, said):
    for i, name in enumerate(files):
        if name.endswith(".nrrd"): (tmp_path / name).write_bytes(b"ObjectType = Image")
        else: png(tmp_path / name, i, mask=1 if "_mask" in name else None)
    with pytest.raises((DataError, ParameterError), match=said): folder_records(tmp_path)


@pytest.mark.parametrize("options,said", [({"split": (0.5, 0.2)}, "split"), ({"split": (0.5, 0.2, 0.2)}, "sum to 1"), ({"split": "thirds"}, "split"), ({"foreground": "brain"}, "foreground"), ({"subject": "(p"}, "no regular expression"),
                                          ({"subject": "p[0-9]+"}, "0 groups"), ({"subject": "(z[0-9]+)"}, "does not match"), ({"spacing": "1x2"}, "1x2"), ({"spacing": -1}, "-1")])
def test_options_are_checked(scans, options, said):
    with pytest.raises((DataError, ParameterError), match=said): folder_records(scans, **options)


# ---------- manifests ----------
def test_a_manifest_with_everything(scans):
    rows = [["path", "subject", "id", "label", "mask", "split", "site", "family", "meta.age"]]
    rows += [[f"p{i:02d}.nii.gz|p{i:02d}.nii.gz", f"p{i}", f"<b>{i}</b>", 0, "", ("train", "val", "test")[min(i // 4, 2)], "A", "", 60 + i] for i in range(10)]
    rows += [["q0.nii.gz|q0.nii.gz", "q0", "", 1, "q0_mask.nii.gz", "test", "B", "glioma", ""], ["q1.nii.gz|q1.nii.gz", "q1", "", 1, "", "val_anomalous", "B", "", ""]]
    for delimiter in ",;\t":
        found = folder_records(manifest(scans, rows, delimiter=delimiter), pools=("train", "val", "test", "val_anomalous", "weak"))
        assert sizes(found) == {"train": 4, "val": 4, "test": 3, "val_anomalous": 1}
    ill = found["test"][-1]
    assert (ill.label, ill.mask_known, ill.meta["family"], ill.meta["site"], found["val_anomalous"][0].mask_known) == (1, True, "glioma", "B", False)
    assert found["train"][0].id == "<b>0</b>" and found["train"][0].meta["age"] == "60" and load_record(ill)["image"].shape == (2, 4, 16, 14)
    (scans / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + (scans / "manifest.csv").read_bytes())      # as a spreadsheet saves it
    assert sizes(folder_records(scans)) == {"train": 4, "val": 4, "test": 3}


def test_an_empty_mask_is_normal_and_a_spacing_is_used(tmp_path):
    for i in range(5): png(tmp_path / f"a{i}.png", i)
    png(tmp_path / "none.png", mask=0)
    path = manifest(tmp_path, [["path", "subject", "mask", "spacing"], *[[f"a{i}.png", f"a{i}", "none.png", "1x0.2x0.3"] for i in range(5)]])
    records = folder_records(path)
    assert sum(sizes(records).values()) == 5 and not any(r.label for items in records.values() for r in items)
    assert load_record(records["train"][0])["meta"]["spacing"] == pytest.approx((1.0, 0.2, 0.3))


@pytest.mark.parametrize("rows,said", [
    ([["path", "subjct"]], "did you mean 'subject'"), ([["path", "site"]], "no column 'subject'"), ([["path", "subject", "age"]], "others begin with 'meta.'"), ([["path", "subject", "path"]], "twice"),
    ([["path", "subject"]], "has no lines"), ([["path", "subject"], ["no.nii.gz", "a"]], "line 2: the file no.nii.gz is missing"), ([["path", "subject"], ["p00.nii.gz", ""]], "line 2: the subject is empty"),
    ([["path", "subject"], ["p00.nii.gz|no.nii.gz", "a"]], "line 2: the file no.nii.gz"), ([["path", "subject", "mask"], ["p00.nii.gz", "a", ""], ["p01.nii.gz", "b", "x.nii.gz"]], "line 3: the file x.nii.gz"),
    ([["path", "subject", "split"], ["p00.nii.gz", "a", "trian"]], "line 2: split: there is no 'trian'.*'train'"), ([["path", "subject", "label"], ["p00.nii.gz", "a", "ill"]], "line 2: the label is 'ill'"),
    ([["path", "subject", "split", "label"], ["p00.nii.gz", "a", "train", "1"]], "line 2: is anomalous and stands in 'train'"), ([["path", "subject", "split", "label"], ["p00.nii.gz", "a", "val_anomalous", "0"]], "line 2: is normal"),
    ([["path", "subject", "split"], ["p00.nii.gz", "a", "train"], ["p01.nii.gz", "b", "val"], ["p02.nii.gz", "a", "test"]], "line 4: subject 'a' is in 'test' here and in 'train' at .*line 2"),
    ([["path", "subject", "id"], *[[f"p0{i}.nii.gz", f"s{i}", "same" if i in (1, 3) else f"{i}"] for i in range(5)]], "'same' stands for p01.nii.gz and p03.nii.gz"),
    ([["path", "subject"], ["p00.nii.gz", "a", "b"]], "line 2: has 3 cells"), ([["path", "subject", "spacing"], ["p00.nii.gz", "a", "1xtwox3"]], "line 2: the spacing"), ([["path", "subject"], ["p00.nii.gz", "a"], ["p01.nii.gz", "b"]], "2 normal subject"),
    ([["path", "subject", "label", "family"], ["p00.nii.gz", "a", "0", "glioma"]], "line 2: has the label 0 and the family 'glioma'"), ([["path", "subject", "split"], ["p00.nii.gz", "a", "train"], ["p01.nii.gz", "b", "val"]], "has no scan in 'test'")])
def test_a_wrong_manifest_names_file_and_line(scans, rows, said):
    path = manifest(scans, rows, "mine.csv")
    with pytest.raises((DataError, LeakageError, ParameterError), match=said) as error: folder_records(path)
    assert "mine.csv" in str(error.value)


# ---------- foreground ----------
def test_a_computed_foreground_is_cached_named_and_left_out_of_the_folder(tmp_path):
    folder, cache = tmp_path / "scans", tmp_path / "cache"
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in (6, 30, 28)), indexing="ij")
    head = h**2 + w**2 < 0.6
    for i in range(4):
        image = (100 + 5 * np.random.default_rng(i).normal(size=head.shape)) * head
        image[:, 13:17, 12:16] = 0                                         # a ventricle, enclosed
        nifti(folder / f"s{i}.nii.gz"); write_volume(folder / f"s{i}.nii.gz", image.astype("float32"), AFFINE)
    before = tree(folder)
    given, nonzero, otsu = (folder_records(folder, foreground=f, cache=cache)["train"][0] for f in ("given", "nonzero", "otsu"))
    assert [r.meta["foreground"] for r in (given, nonzero, otsu)] == ["everything", "nonzero", "otsu"] and given.foreground is None and tree(folder) == before
    load = lambda r: load_record(r)["foreground"][0]
    assert load(given).all() and np.array_equal(load(nonzero), read_volume(nonzero.images[0])[0] != 0) and (load(otsu) == head).mean() > 0.995 and load(otsu)[3, 15, 14]
    made = {p: p.stat().st_mtime_ns for p in cache.rglob("*.nii.gz")}
    folder_records(folder, foreground="otsu", cache=cache)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.nii.gz")} == made      # found again
    write_volume(folder / "s0.nii.gz", read_volume(folder / "s1.nii.gz")[0] * 2, AFFINE)
    folder_records(folder, foreground="otsu", cache=cache)
    assert len(list(cache.rglob("*.nii.gz"))) == len(made) + 1             # another content, another foreground


# ---------- check ----------
def test_the_check_lists_every_fault_and_goes_on(scans):
    rows = [["path", "subject", "split", "mask", "label"], *[[f"p{i:02d}.nii.gz", f"p{i}", "train", "", ""] for i in range(6)], ["p06.nii.gz", "p6", "val", "", ""], ["p07.nii.gz", "p7", "val", "", ""],
            ["q0.nii.gz", "q0", "test", "q0_mask.nii.gz", 1], ["q1.nii.gz", "q1", "test", "q1_mask.nii.gz", 1], ["p08.nii.gz", "p8", "test", "", 0]]
    records = folder_records(manifest(scans, rows), foreground="nonzero", cache=scans.parent / "cache")
    assert check_records(records)["problems"] == []
    raw = (scans / "p01.nii.gz").read_bytes()
    (scans / "p01.nii.gz").write_bytes(raw[:len(raw) // 2])
    (scans / "p03.nii.gz").write_text("patient,age")
    (scans / "p05.nii.gz").unlink()
    shutil.copy(scans / "p00.nii.gz", scans / "p08.nii.gz")
    nifti(scans / "q1_mask.nii.gz", mask=0)
    write_volume(scans / "q0_mask.nii.gz", np.zeros((4, 16, 13), "uint8"), AFFINE)
    report = check_records({p: [replace(r, foreground=None) for r in items] for p, items in records.items()})
    for words in ("p01.nii.gz: is truncated", "p03.nii.gz: is truncated or not an image", "p05.nii.gz: the file is missing", "q1_mask.nii.gz: is empty", "q0_mask.nii.gz: has the grid", "train as 'p0' and test as 'p8'"):
        assert sum(words in p for p in report["problems"]) == 1, (words, report["problems"])
    assert len(report["problems"]) == 6 and report["pools"]["train"]["broken"] == 3
    text = check_text(report)
    assert "6 problems:" in text and "train: 6 scans of 6 subjects" in text and "3 BROKEN" in text


def test_broken_scans_do_not_stop_a_computed_foreground(scans):
    (scans / "p04.nii.gz").write_bytes(b"")
    records = folder_records(scans, foreground="otsu", cache=scans.parent / "cache")
    problems = check_records(records)["problems"]
    assert len(problems) == 1 and "p04.nii.gz" in problems[0]


# ---------- all the way ----------
def test_own_colour_pictures_reach_a_batch(tmp_path):
    for i in range(10): png(tmp_path / "s" / "train" / f"a{i}.png", i, (20, 20, 3))
    for i in range(2): png(tmp_path / "s" / "test" / "good" / f"g{i}.png", 20 + i, (20, 20, 3)); png(tmp_path / "s" / "test" / "dot" / f"d{i}.png", 30 + i, (20, 20, 3)); png(tmp_path / "s" / "test" / "dot" / f"d{i}_mask.png", shape=(20, 20), mask=1)
    records = folder_records(tmp_path / "s")
    data = AnomalyDataModule(**{p: SliceSet(VolumeSet(items, (ZScore(),), tmp_path / "cache")) for p, items in records.items()}, batch_size=4)
    batch = next(iter(data.loader("test")))
    assert tuple(batch["image"].shape) == (4, 3, 20, 20) and sorted(batch["label"].tolist()) == [0, 0, 1, 1] and int(batch["mask"].sum()) == 32


# ---------- MVTec AD ----------
@pytest.fixture
def industrial(tmp_path):
    "The real layout in miniature: colour and single-channel categories, text files in between, the archive's own folder."
    root = tmp_path / "mvtec_anomaly_detection"
    for category, shape in (("bottle", (40, 40, 3)), ("screw", (40, 40))):
        for i in range(10): png(root / category / "train" / "good" / f"{i:03d}.png", i, shape)
        for i in range(3): png(root / category / "test" / "good" / f"{i:03d}.png", 20 + i, shape)
        for d in ("broken_large", "contamination"):
            for i in range(2): png(root / category / "test" / d / f"{i:03d}.png", 30 + i, shape); png(root / category / "ground_truth" / d / f"{i:03d}_mask.png", shape=shape, mask=1)
        for place in ("", "train", "train/good", "test", "test/good", "test/contamination", "ground_truth"): (root / category / place / "license.txt").write_text("CC BY-NC-SA")
    (root / "readme.txt").write_text("MVTec AD")
    return root


def test_mvtec_layout(industrial):
    for path in (industrial, industrial.parent, industrial / "bottle"):
        records = mvtec_records(path, "bottle", pools=("train", "val", "val_anomalous", "test"))
        assert sizes(records) == {"train": 8, "val": 2, "test": 7}
    assert [Path(r.images[0]).stem for r in records["val"]] == ["008", "009"] and len({r.subject for items in records.values() for r in items}) == 17
    assert {r.meta["family"]: r.label for r in records["test"]} == {"healthy": 0, "broken_large": 1, "contamination": 1}
    ill = next(r for r in records["test"] if r.label)
    assert load_record(ill)["image"].shape == (3, 1, 40, 40) and load_record(ill)["mask"].sum() == 16
    assert load_record(mvtec_records(industrial, "screw")["test"][0])["image"].shape == (1, 1, 40, 40)
    assert check_records(mvtec_records(industrial, "screw"))["problems"] == []


def test_mvtec_pictures_are_resized_on_the_way(industrial, tmp_path):
    records = mvtec_records(industrial, "bottle", side=10)
    assert wanted_transforms(records["test"]) == (Resize(10),)
    volumes = VolumeSet(records["test"], (*wanted_transforms(records["test"]), ZScore()), tmp_path / "cache")
    assert volumes.shape == (1, 10, 10) and volumes.spacing == (1.0, 4.0, 4.0)
    assert sorted({int(volumes[i]["mask"].sum()) for i in range(len(volumes))}) == [0, 1]                # 4 x 4 pixels become one
    thin = load_record(records["test"][0])
    thin |= {"mask": np.zeros_like(thin["mask"]), "label": 1}
    thin["mask"][0, 0, 5] = True
    assert Resize(10)(thin)["mask"][0, 0].any(1).tolist() == [i == 1 for i in range(10)]                # a scratch one pixel wide stays


@pytest.mark.parametrize("break_it,said", [(lambda r: (r / "bottle/ground_truth/contamination/001_mask.png").unlink(), "masks are missing: .*001_mask.png"), (lambda r: shutil.rmtree(r / "bottle/test"), "holds no folders"),
                                           (lambda r: [p.unlink() for p in (r / "bottle/train/good").glob("*.png")], "holds no .png"), (lambda r: shutil.rmtree(r / "bottle"), "there is no 'bottle'")])
def test_a_damaged_mvtec_folder_is_named(industrial, break_it, said):
    break_it(industrial)
    with pytest.raises((DataError, ParameterError), match=said): mvtec_records(industrial, "bottle")


def test_everything_that_is_wrong_is_named_at_once(scans, tmp_path, capsys):
    rows = [["path", "subject", "mask"], *[[f"p{i:02d}.nii.gz", f"p{i:02d}", ""] for i in range(6)], ["gone.nii.gz", "a", "lost_mask.nii.gz"], ["p06.nii.gz", "b", ""], ["p07.nii.gz", "", ""], ["p08.nii.gz", "c"], ["away.nii.gz", "d", ""]]
    with pytest.raises(DataError, match="4 of 11 lines cannot be used") as error: folder_records(manifest(scans, rows))
    assert len(error.value.all) == 4
    for said in ("line 8: the files gone.nii.gz, lost_mask.nii.gz are missing", "line 10: the subject is empty", "line 11: has 2 cells", "line 12: the file away.nii.gz is missing"): assert said in str(error.value)
    (scans/"manifest.csv").unlink()
    for name in ("x_mask", "y_foreground"): nifti(scans/f"{name}.nii.gz", mask=True)
    with pytest.raises(DataError, match="2 of 14 files cannot be used") as error: folder_records(scans)
    assert all(n in str(error.value) for n in ("x_mask.nii.gz", "y_foreground.nii.gz"))
    assert check_set("folder", str(scans)) == 1
    out = capsys.readouterr().out
    assert all(n in out for n in ("x_mask.nii.gz", "y_foreground.nii.gz"))
