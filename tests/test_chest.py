"""Radiographs, torsos and photographs as files: DICOM read as it says, VinDr's and MOOD's layouts to the letter, the dial at zero, the same bytes however they were made."""
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from skimage.morphology import flood

from anomaly_nb.core import DataError, ParameterError, rng_of, write_aside
from anomaly_nb.data import chest
from anomaly_nb.data.chest import FAMILIES, POOLS, SIZES, Job, chest_records, plan
from anomaly_nb.data.dicom import read_dicom, write_dicom
from anomaly_nb.data.folder import folder_records
from anomaly_nb.data.jobs import build_jobs, run_jobs
from anomaly_nb.data.records import Record, load_record, read_image, read_volume
from anomaly_nb.data.textures import DEFECT_SOURCES, TASK_SOURCES, cut_photo, photo_records
from anomaly_nb.data.torso import SIZES as TORSOS, mood_records, torso_records
from anomaly_nb.data.transforms import Equalise, Resize, wanted_transforms
from anomaly_nb.data.vindr import vindr_records

FINDINGS = ["Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
            "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis"]
MAKE = "import sys; from anomaly_nb.data.chest import chest_records; chest_records('tiny', ('val', 'val_anomalous'), root=sys.argv[1])"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("chest")


@pytest.fixture(scope="module")
def records(root):
    return chest_records("tiny", POOLS, root=root, processes=1)


def folder_of(records):
    return Path(next(iter(records.values()))[0].images[0]).parents[1]


def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock" and p.parts[-2] not in ("boxes", "hashes")}


def table(folder, name):
    return pd.read_csv(folder/"annotations"/f"{name}.csv", dtype={"image_id": str})


# ---------- DICOM

@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [None, (1500, 1000), ([1500, 300], [1000, 100])])
@pytest.mark.parametrize("rescale", [None, (2.0, -100.0)])
def test_grey_values_follow_the_tags(tmp_path, kind, window, rescale):
    stored = np.random.default_rng(3).integers(0, 4096, (20, 30)).astype(np.uint16)
    write_dicom(tmp_path/"a.dcm", stored, "a", kind, window, (.2, .4), rescale=rescale)
    x, spacing = read_dicom(tmp_path/"a.dcm")
    m, b = rescale or (1, 0)
    by_hand = m*stored.astype(float) + b
    low, high = (1000, 2000) if window else (by_hand.min(), by_hand.max())
    by_hand = np.clip(by_hand, low, high)
    if kind == "MONOCHROME1": by_hand = low + high - by_hand
    assert x.shape == (1, 1, 20, 30) and x.dtype == np.float32 and np.allclose(x[0, 0], by_hand) and spacing == (1, .2, .4)
    assert np.isclose(np.ptp(read_dicom(tmp_path/"a.dcm", window=False)[0]), m*np.ptp(stored.astype(float)))


def test_twelve_bits_and_nothing_of_a_person(tmp_path):
    write_dicom(tmp_path/"a.dcm", np.arange(4096, dtype=np.uint16).reshape(64, 64), "somebody")
    f = pydicom.dcmread(tmp_path/"a.dcm")
    assert (f.BitsAllocated, f.BitsStored, f.HighBit) == (16, 12, 11) and "PatientName" not in f and "StudyDate" not in f and np.array_equal(f.pixel_array.ravel(), np.arange(4096))
    with pytest.raises(DataError, match="4096"): write_dicom(tmp_path/"b.dcm", np.full((4, 4), 4096), "b")


def test_colour_and_palettes(tmp_path):
    write_dicom(tmp_path/"a.dcm", np.arange(16, dtype=np.uint16).reshape(4, 4), "a")
    f = pydicom.dcmread(tmp_path/"a.dcm")
    rgb = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    f.SamplesPerPixel, f.PhotometricInterpretation, f.PlanarConfiguration, f.BitsAllocated, f.BitsStored, f.HighBit, f.PixelData = 3, "RGB", 0, 8, 8, 7, rgb.tobytes()
    f["PixelData"].VR = "OB"
    f.save_as(tmp_path/"rgb.dcm")
    x, _ = read_dicom(tmp_path/"rgb.dcm")
    assert np.array_equal(x[:, 0].transpose(1, 2, 0), rgb)


@pytest.mark.parametrize("where", range(0, 1000, 37))
def test_a_damaged_file_is_named_or_read(tmp_path, where):
    write_dicom(tmp_path/"a.dcm", np.arange(64, dtype=np.uint16).reshape(8, 8), "a", window=(30, 60))
    raw = bytearray((tmp_path/"a.dcm").read_bytes())
    for how in ("cut", "changed"):
        bad = raw[:min(where, len(raw) - 1)] if how == "cut" else raw[:where % len(raw)] + bytes([raw[where % len(raw)] ^ 0xFF]) + raw[where % len(raw) + 1:]
        (tmp_path/"bad.dcm").write_bytes(bytes(bad))
        try: x, _ = read_dicom(tmp_path/"bad.dcm")
        except DataError as error: assert "bad.dcm" in str(error)
        else: assert how == "changed" and np.isfinite(x).all()


def test_a_folder_of_dicoms_is_read_like_any_other(tmp_path):
    for kind, n in (("normal", 6), ("nodule", 2)):
        (tmp_path/kind).mkdir()
        for i in range(n): write_dicom(tmp_path/kind/f"p{i}{kind}.dcm", np.random.default_rng(i).integers(0, 999, (8, 8)).astype(np.uint16), f"{kind}{i}", spacing=(2., 3.))
    found = folder_records(tmp_path)
    assert sum(map(len, found.values())) == 8 and sum(r.label for r in found["test"]) == 2
    assert load_record(found["train"][0])["meta"]["spacing"] == (1., 2., 3.)


# ---------- VinDr's layout

def test_tables_are_vindrs(records):
    folder = folder_of(records)
    assert list(table(folder, "image_labels_train").columns) == ["image_id", "rad_id", *FINDINGS, "Other diseases", "No finding"]
    assert list(table(folder, "image_labels_test").columns) == ["image_id", *FINDINGS, "Other disease", "No finding"]
    box = ["class_name", "x_min", "y_min", "x_max", "y_max"]
    assert list(table(folder, "annotations_train").columns) == ["image_id", "rad_id", *box] and list(table(folder, "annotations_test").columns) == ["image_id", *box]
    for part in ("train", "test"):
        labels, boxes = table(folder, f"image_labels_{part}"), table(folder, f"annotations_{part}")
        assert {f"{i}.dicom" for i in labels.image_id} == {p.name for p in (folder/part).iterdir()} and labels.image_id.str.fullmatch("[0-9a-f]{32}").all()
        assert (labels.groupby("image_id").size() == (3 if part == "train" else 1)).all()
        values = labels[[*FINDINGS, "No finding"]]
        assert set(np.unique(values)) == {0, 1} and (values.sum(axis=1) <= 1).all()
        nothing = boxes.class_name == "No finding"
        assert boxes[nothing][box[1:]].isna().all().all() and not boxes[~nothing].isna().any().any() and ((boxes.x_min < boxes.x_max) & (boxes.y_min < boxes.y_max))[~nothing].all()
        assert boxes[~nothing][box[1:]].to_numpy().min() >= 0 and boxes[~nothing][box[1:]].to_numpy().max() <= 64


def test_labels_and_masks_follow_from_the_tables(records):
    "An independent reading of the tables (pandas) gives the records' labels and masks."
    folder = folder_of(records)
    for pool, items in records.items():
        part = "test" if pool == "test" else "train"
        labels, boxes = table(folder, f"image_labels_{part}"), table(folder, f"annotations_{part}")
        for r in items:
            none = labels[labels.image_id == r.meta["image_id"]]["No finding"]
            assert (none.sum() == len(none)) == (not r.label) and (not r.label or none.sum() <= 1)
            mine, mask = boxes[(boxes.image_id == r.meta["image_id"]) & (boxes.class_name != "No finding")], np.zeros((64, 64), bool)
            for b in mine.itertuples(): mask[round(b.y_min):max(round(b.y_max), round(b.y_min) + 1), round(b.x_min):max(round(b.x_max), round(b.x_min) + 1)] = True
            assert np.array_equal(load_record(r)["mask"][0, 0], mask) and mask.any() == r.label


def test_a_stranger_reads_the_folder_as_vindr(records, tmp_path):
    found = vindr_records(folder_of(records), POOLS, side=0, val_share=.25, cache=tmp_path)
    ids = lambda pools, rs: {(r.meta["image_id"] if "image_id" in r.meta else r.id, r.label) for p in pools for r in rs[p]}
    for pools in (("train", "val"), ("test",), ("val_anomalous",)): assert ids(pools, found) == ids(pools, records)
    assert len(found["val"]) == 8 and len(list((folder_of(records)/"train").iterdir())) == sum(len(found[p]) for p in ("train", "val", "val_anomalous")) + SIZES["tiny"].doubtful


# ---------- the cohort

def test_every_kind_of_file_and_the_same_kinds_for_ill_and_healthy():
    rows = [(q.family != "healthy", film["monochrome1"], film["window"]) for pool in POOLS for q in plan("claims", pool) for film in [chest.draw_film(rng_of("chest film", 0, q.name), q.site)]]
    frame = pd.DataFrame(rows, columns=["ill", "inverted", "window"])
    share = frame.groupby("ill").agg(inverted=("inverted", "mean"), none=("window", lambda w: (w == "none").mean()), several=("window", lambda w: (w == "several").mean()))
    assert (abs(share.loc[True] - share.loc[False]) < .08).all() and (share > .08).all().all()


def test_files_hold_what_their_names_promise(records):
    kinds = set()
    for r in records["train"]:
        f = pydicom.dcmread(r.images[0])
        assert f.BitsStored == 12 and f.pixel_array.max() <= 4095 and f.PatientID == r.meta["image_id"] and f.PatientSex == r.meta["sex"]
        assert (f.PhotometricInterpretation == "MONOCHROME1") == r.meta["monochrome1"]
        values = f.get("WindowCenter")
        assert {"none": values is None, "one": isinstance(values, float), "several": isinstance(values, pydicom.multival.MultiValue)}[r.meta["window"]]
        kinds.add((r.meta["monochrome1"], r.meta["window"]))
    assert len(kinds) >= 4


def test_how_a_picture_was_stored_is_gone_after_reading(tmp_path, monkeypatch):
    "The same patient, with and without window, inverted or not: the same picture, to the rounding of twelve bits."
    draw, patient, seen = chest.draw_film, plan("tiny", "test")[-1], {}
    for inverted in (False, True):
        for window in ("one", "several", "none"):
            monkeypatch.setattr(chest, "draw_film", lambda *a, i=inverted, w=window: draw(*a) | {"monochrome1": i, "window": w})
            job = Job(str(tmp_path/f"{inverted}{window}"), patient, 64)
            chest.make_patient(job)
            x, stored = read_image(job.image)[0][0, 0], pydicom.dcmread(job.image)
            assert (stored.PhotometricInterpretation == "MONOCHROME1") == inverted and ("WindowCenter" in stored) == (window != "none")
            seen[inverted, window] = (x - x.min())/np.ptp(x)
    for x in seen.values(): assert np.abs(x - seen[False, "one"]).max() < 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_contrast_zero_is_the_healthy_twin_to_the_bit(root, family):
    zero, one = (chest_records("tiny", ("test",), families=(family,), lesion_contrast=c, twins=True, truth="mask", root=root, processes=1)["test"] for c in (0, 1))
    pixels = lambda r: pydicom.dcmread(r.images[0]).pixel_array
    none, full = ({r.id: r for r in items} for items in (zero, one))
    ill = [r for r in one if r.label]
    assert len(ill) == SIZES["tiny"].ill
    for r in ill:
        twin = full[r.id + "-twin"]
        assert np.array_equal(pixels(none[r.id]), pixels(twin)) and np.array_equal(load_record(none[r.id])["image"], load_record(twin)["image"])
        assert not np.array_equal(pixels(r), pixels(twin)) and twin.subject == r.subject and not twin.label and twin.meta["family"] == "healthy"
        assert r.mask_known == (family != "cardiomegaly")
        changed = (pixels(r) != pixels(twin)) if r.mask_known else np.zeros((64, 64), bool)
        if r.mask_known:
            mask = load_record(r)["mask"][0, 0]
            assert changed[mask].mean() > .9 and mask.sum() > 4
            boxed = next(b for b in chest_records("tiny", ("test",), families=(family,), root=root, processes=1)["test"] if b.id == r.id)
            assert (mask <= load_record(boxed)["mask"][0, 0]).mean() > .98                       # what was drawn lies in the box
    healthy = [r for r in one if not r.label and "-twin" not in r.id]
    for r in healthy: assert np.array_equal(pixels(r), pixels(none[r.id]))


@pytest.mark.parametrize("patient", [q for q in plan("tiny", "test") if q.name.endswith("-000A") and q.family != "healthy"], ids=lambda q: q.family)
def test_the_dials_turn(tmp_path, patient):
    def change(**dials):
        jobs = [Job(str(tmp_path/str(dials)), patient, 64, twin=t, **dials) for t in (False, True)]
        for j in jobs: chest.make_patient(j)
        ill, twin = (read_image(j.image)[0] for j in jobs)
        return np.abs(ill - twin).mean()
    assert change(contrast=0.) == 0 < change(contrast=.3) < change(contrast=.6) < change()
    assert change(size=.5) < change() < change(size=1.3)


def test_sites_pools_and_counts():
    for size, n in SIZES.items():
        for pool in POOLS:
            who = plan(size, pool)
            assert len(who) == getattr(n, pool) + (4*n.ill if pool == "test" else 0) and len({q.name for q in who}) == len(who)
            for family in {q.family for q in who}:
                sites = [q.site for q in who if q.family == family]
                assert abs(sites.count("A") - sites.count("B")) <= 1
    c = SIZES["claims"]
    assert c.train >= 60 and c.val >= 100 and c.test >= 100 and c.ill >= 40


def test_the_same_person_at_every_size(root):
    small, large = (load_record(chest_records("tiny", ("val",), side=s, root=root, processes=1)["val"][0])["image"][0, 0] for s in (64, 128))
    other = load_record(chest_records("tiny", ("val",), root=root)["val"][2])["image"][0, 0]
    same, else_ = (np.corrcoef(a.ravel(), large.reshape(64, 2, 64, 2).mean((1, 3)).ravel())[0, 1] for a in (small, other))
    assert same > .96 > .94 > else_


def test_make_data_reads_it(records, root, monkeypatch, tmp_path):
    from anomaly_nb.experiment import make_data
    monkeypatch.setenv("ANOMALY_NB_PATHS_CACHE", str(tmp_path))
    data = make_data(records, dims=2, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch["image"].shape) == (4, 1, 64, 64) and data.shape == (64, 64) and batch["foreground"].all() and abs(float(batch["image"].mean())) < .1
    assert wanted_transforms(records["train"]) == (Equalise(256),) and wanted_transforms(vindr_records(folder_of(records), ("test",), cache=tmp_path)["test"]) == (Resize(256), Equalise(256))
    plain = chest_records("tiny", ("train",), equalise=False, root=root)["train"]
    assert wanted_transforms(plain) == ()


def test_two_processes_write_the_same_bytes_and_a_killed_build_goes_on(tmp_path):
    a, b = tmp_path/"a", tmp_path/"b"
    run = lambda folder: subprocess.Popen([sys.executable, "-c", MAKE, str(folder)], start_new_session=True, stderr=subprocess.PIPE)
    whole, child = run(a), run(b)
    while len(list(b.rglob("*.dicom"))) < 3 and child.poll() is None: time.sleep(.005)
    os.killpg(child.pid, signal.SIGKILL); child.wait()
    assert whole.wait(120) == 0 and 3 <= len(list(b.rglob("*.dicom"))) < 16
    assert run(b).wait(120) == 0
    assert digests(a) == digests(b) and not list(b.rglob(".part-*"))


def test_a_hole_is_repaired_with_the_same_bytes(root):
    records = chest_records("tiny", ("val",), seed=5, root=root)
    folder = folder_of(records)
    before = digests(folder)
    shutil.rmtree(folder/"annotations"); Path(records["val"][1].images[0]).unlink()
    chest_records("tiny", ("val",), seed=5, root=root)
    assert digests(folder) == before


@pytest.mark.parametrize("options,said", [({"size": "huge"}, "there is no 'huge'"), ({"families": ("edema",)}, "there is no 'edema'"), ({"lesion_contrast": 1.5}, "lesion_contrast"), ({"lesion_size": 0}, "lesion_size"),
                                          ({"truth": "pixels"}, "there is no 'pixels'"), ({"side": 20}, "side"), ({"side": 64.5}, "side"), ({"lesion_contrast": True}, "lesion_contrast")])
def test_unknown_options(options, said, tmp_path):
    with pytest.raises(ParameterError, match=said): chest_records(**options, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_and_a_full_disk_are_named(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("in the way")
    for make in (chest_records, torso_records, photo_records):
        with pytest.raises(DataError, match="file.*cannot be written"): make("tiny", root=tmp_path/"file")
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(chest, "write_dicom", full)
    with pytest.raises(DataError, match="No space left"): chest_records("tiny", ("val",), root=tmp_path, processes=1)
    assert not list(tmp_path.rglob("*.dicom"))


# ---------- torso and photographs

def test_torsos_lie_as_moods_do(tmp_path):
    records = torso_records("tiny", root=tmp_path)["train"]
    assert len(records) == TORSOS["tiny"][1] and [Path(r.images[0]).name for r in records] == [f"{i:05d}.nii.gz" for i in range(6)] and {Path(r.images[0]).parent.name for r in records} == {"abdom_train"}
    for r in records:
        s = load_record(r)
        image = s["image"][0]
        assert image.min() >= 0 and image.max() <= 1 and image.shape == (40, 40, 40) and not r.label
        assert np.array_equal(s["foreground"][0], ~flood(image <= .03, (0, 0, 0), connectivity=1))        # scikit-image's flood fill from the corner
    again = torso_records("tiny", root=tmp_path/"again")["train"]
    assert [Path(r.images[0]).read_bytes() for r in again] == [Path(r.images[0]).read_bytes() for r in records]
    assert torso_records("tiny", pools=("val", "test"), root=tmp_path) == {}
    correlations = np.corrcoef([load_record(r)["image"].ravel() for r in records])
    assert correlations[~np.eye(6, dtype=bool)].max() < .97                                               # six people, not one


def test_moods_reader_shrinks(tmp_path):
    records = torso_records("tiny", root=tmp_path)["train"]
    folder = Path(records[0].images[0]).parents[1]
    small = mood_records(folder, shrink=4, count=2, cache=tmp_path/"cache")["train"]
    assert len(small) == 2 and small[0].id == "mood-abdom-00000"
    a, b = read_volume(records[0].images[0])[0], read_volume(small[0].images[0])[0]
    by_hand = np.array([[[a[4*i:4*i + 4, 4*j:4*j + 4, 4*k:4*k + 4].mean() for k in range(10)] for j in range(10)] for i in range(10)])
    assert np.allclose(b, by_hand, atol=1e-6)
    for wrong in ({"shrink": 0}, {"shrink": 1.5}, {"count": -1}, {"part": "knee"}):
        with pytest.raises(ParameterError): mood_records(folder, **wrong)


def test_photographs_are_not_those_of_the_defects(tmp_path):
    records = photo_records("tiny", side=48, root=tmp_path)["train"]
    assert {r.meta["photograph"] for r in records} <= set(TASK_SOURCES) and not {r.meta["photograph"] for r in records} & set(DEFECT_SOURCES)
    for r in records: assert load_record(r)["image"].shape == (1, 1, 48, 48)
    assert np.array_equal(load_record(records[7])["image"][0, 0], cut_photo(7, 48)) and photo_records("tiny", pools=("test",), root=tmp_path) == {}
    assert min(cut_photo(i, 32).std() for i in range(200)) > 5                                           # none of `claims` is a blank


# ---------- jobs

@dataclass(frozen=True)
class Mortal:
    "A job whose first worker dies."
    folder: str
    name: str

    def files(self): return [Path(self.folder)/f"{self.name}.txt"]


def make_mortal(job):
    if job.name == "2" and not (Path(job.folder)/"died").exists():
        (Path(job.folder)/"died").write_text("")
        os._exit(9)
    with write_aside(job.files()[0]) as aside: aside.write_text(job.name)


def test_a_pool_that_loses_a_worker_is_finished_here(tmp_path):
    jobs = [Mortal(str(tmp_path), str(i)) for i in range(5)]
    run_jobs(jobs, make_mortal, processes=2, seconds=100)
    assert (tmp_path/"died").exists() and [j.files()[0].read_text() for j in jobs] == list("01234")


def test_finish_runs_once_and_only_when_something_was_made(tmp_path):
    calls, job = [], Mortal(str(tmp_path), "1")
    for _ in range(2): build_jobs([job], make_mortal, finish=lambda: calls.append(job.files()[0].is_file()))
    assert calls == [True]
