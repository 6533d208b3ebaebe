"""Preprocessing: places in the world, masks beside images, standards learned from training scans, and a prepared folder that is never stale, half-written or silently short."""
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from anomaly_nb.core import DataError, LeakageError, ParameterError
from anomaly_nb.data import prepare
from anomaly_nb.data.folder import folder_records
from anomaly_nb.data.normalise import HistogramMatch, Nyul
from anomaly_nb.data.prepare import prepare_records, write_table
from anomaly_nb.data.preprocess import BiasCorrection, BrainMask, CropToForeground, Resample
from anomaly_nb.data.records import Record, load_record, read_volume, write_volume
from anomaly_nb.data.register import Register, carry, itk_image
from anomaly_nb.data.steps import apply_steps, preparation_steps, steps_from
from anomaly_nb.data.transforms import CropOrPad, ZScore, describe

SPACING, SHAPE = (3.0, 1.2, 0.8), (10, 24, 30)                        # z, y, x: every confusion of axes shows


def oblique(spacing=SPACING, angle=0.25):
    "Affine of (d,h,w,1) -> RAS mm of a tilted grid."
    c, s = np.cos(angle), np.sin(angle)
    A = np.eye(4)
    A[:3, :3] = np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * np.array(spacing)
    A[:3, 3] = 12, -30, 7
    return A


def smooth(shape=SHAPE, seed=0, spacing=SPACING):
    "A smooth positive image, the same in mm along every axis."
    noise = np.random.default_rng(seed).normal(size=shape)
    return (100 + 400 * ndimage.gaussian_filter(noise, [3 / s for s in spacing])).clip(1).astype("float32")


def ball(shape=SHAPE):
    return sum(((g - (n - 1) / 2) / (0.42 * n)) ** 2 for g, n in zip(np.indices(shape), shape)) < 1


def sample(image=None, affine=None, **parts):
    image = smooth() if image is None else image
    yes = np.ones((1, *image.shape), dtype=bool)
    A = oblique() if affine is None else affine
    meta = dict(affine=A.tolist(), spacing=tuple(np.linalg.norm(A[:3, :3], axis=0)), volume_shape=image.shape)
    return dict(image=image[None], mask=~yes, foreground=yes, valid=yes, mask_known=True, label=1, id="s", subject="s", meta=meta) | parts


def record(folder, name, pool="train", seed=0, gain=1.0, ill=False, ignore=False, **meta):
    "A small scan on disk: an oblique anisotropic brain with air round it."
    folder.mkdir(parents=True, exist_ok=True)
    inside, files = ball(), {k: str(folder / f"{name}_{k}.nii.gz") for k in ("image", "brain", "mask", "valid")}
    image, lesion = smooth(seed=seed), np.zeros(SHAPE, dtype=bool)
    lesion[3:7, 9:14, 10:17] = ill
    write_volume(files["image"], np.where(inside, gain * (image + 150 * lesion), 0), oblique())
    write_volume(files["brain"], inside, oblique())
    write_volume(files["mask"], lesion, oblique())
    valid = np.ones(SHAPE, dtype=bool); valid[4:6, 16:19, 12:18] = False
    write_volume(files["valid"], valid, oblique())
    return Record(name, name, (files["image"],), int(ill), files["mask"] if ill else None, foreground=files["brain"], valid=files["valid"] if ignore else None,
                  meta={"pool": pool, "family": "ms" if ill else "healthy", "site": "", "contrast": "FLAIR"} | meta)


@pytest.fixture
def scans(tmp_path):
    raw = tmp_path / "raw"
    return {"train": [record(raw, f"t{i}", seed=i, gain=1 + i) for i in range(3)], "val": [record(raw, "v0", "val", 7)],
            "test": [record(raw, "h0", "test", 8), record(raw, "ill 1.", "test", 9, ill=True, ignore=True)]}


def run(scans, steps, tmp_path, **kw):
    return prepare_records(scans, steps, tmp_path / "out", processes=1, cache=tmp_path / "cache", **kw)


# places

@pytest.mark.parametrize("spacing", [(1.5, 0.6, 0.8), (1.0, 1.0, 0.5), (3.0, 0.4, 0.8)])
def test_resampling_is_what_simpleitk_reads_at_the_same_places_of_the_world(spacing):
    import SimpleITK as itk
    s = sample()
    new = Resample(spacing)(s)
    A, (_, *shape) = np.asarray(new["meta"]["affine"]), new["image"].shape
    ours = itk_image(s["image"][0], s["meta"]["affine"])
    theirs = itk.GetArrayFromImage(itk.Resample(ours, itk_image(np.zeros(shape), A), itk.Transform(), itk.sitkLinear, -1.0))
    seen = theirs >= 0                                                # not beyond the middle of the outermost voxels
    assert theirs.shape == tuple(shape) and seen.mean() > 0.7
    assert np.abs(new["image"][0] - theirs)[seen].max() < 0.1, "the image lies elsewhere"
    assert np.ptp(s["image"]) > 100 and np.allclose(new["meta"]["spacing"], [n if abs(n / o - 1) > 1e-3 else o for n, o in zip(spacing, SPACING)])


@pytest.mark.parametrize("order", ["linear", "cubic"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (6.0, 2.4, 1.6), (4.0, 1.7, 2.9)])
def test_image_and_mask_move_together(spacing, order):
    for axis in range(3):
        ramp = np.broadcast_to(np.arange(SHAPE[axis], dtype="float32").reshape([-1 if a == axis else 1 for a in range(3)]), SHAPE).copy()
        edge = SHAPE[axis] / 2 - 0.3
        new = Resample(spacing, order=order)(sample(ramp, mask=ramp[None] > edge))
        inner = tuple(slice(2, -2) if n > 6 else slice(None) for n in new["image"].shape[1:])
        off = np.abs(new["image"][0] - edge) > 0.51                   # a mask knows its edge to half an old voxel
        assert (new["mask"][0] == (new["image"][0] > edge))[inner][off[inner]].all()
        step = spacing[axis] / SPACING[axis]                          # a ramp of voxel numbers rises by this, all the way
        margin = int(np.ceil(2 / step)) + 1
        places = new["image"][0].mean(tuple(a for a in range(3) if a != axis))[margin:-margin]
        assert np.allclose(np.diff(places), step, atol=0.02 * step)


def test_resampling_there_and_back_keeps_the_grid_and_the_world():
    s = sample(mask=ball()[None])
    back = Resample(SPACING)(Resample((1.5, 0.6, 0.4))(s))
    assert back["image"].shape == s["image"].shape and np.allclose(back["meta"]["affine"], s["meta"]["affine"])
    assert (back["mask"] != s["mask"]).mean() < 0.01 and s["image"].shape[1:] == SHAPE


def test_cubic_is_exact_for_parabolas_and_antialiasing_takes_out_what_is_too_fine():
    x = np.arange(30, dtype="float32")
    new = Resample((3.0, 1.2, 0.5), order="cubic")(sample(np.broadcast_to(x ** 2 / 10, SHAPE).copy()))["image"][0, 5, 12]
    places = (29 / 2 + (np.arange(len(new)) - (len(new) - 1) / 2) * 0.5 / 0.8)[4:-4]
    assert np.abs(new[4:-4] - places ** 2 / 10).max() < 1e-3
    stripes = np.broadcast_to(np.arange(30) % 2 * 100.0, SHAPE).astype("float32")
    for order in ("linear", "cubic"):
        out = Resample((3.0, 1.2, 2.4), order=order)(sample(stripes))["image"][0, :, :, 1:-1]
        assert np.ptp(out) < 25, "every third voxel was taken"      # of 100


def test_crop_and_resample_in_any_order_keep_a_landmark():
    mask = np.zeros((1, *SHAPE), dtype=bool); mask[0, 4:6, 10:14, 14:20] = True
    s = sample(mask=mask, foreground=ball()[None])
    def place(s): return np.asarray(s["meta"]["affine"])[:3] @ [*ndimage.center_of_mass(s["mask"][0]), 1]
    chains = ((Resample((1.5, 0.6, 0.4)), CropToForeground(1)), (CropToForeground(1), Resample((1.5, 0.6, 0.4)), CropOrPad((30, 50, 60), cut=True)), (CropOrPad((14, 30, 32)), Resample(1.0)))
    for chain in chains: assert np.linalg.norm(place(apply_steps(s, chain)) - place(s)) < 0.4


def test_itk_sees_the_array_where_it_reads_the_file(tmp_path):
    import SimpleITK as itk
    write_volume(tmp_path / "a.nii.gz", smooth(), oblique())
    ours, theirs = itk_image(smooth(), oblique()), itk.ReadImage(str(tmp_path / "a.nii.gz"))
    for i in ((0, 0, 0), (29, 0, 3), (4, 20, 9)): assert np.allclose(ours.TransformIndexToPhysicalPoint(i), theirs.TransformIndexToPhysicalPoint(i), atol=1e-3) and ours[i] == theirs[i]


def test_carry_asks_the_scan_where_the_template_is():
    s = sample()
    T, A = np.eye(4), np.asarray(s["meta"]["affine"])
    T[:3, 3] = A[:3, 0]                                               # one slice of 3 mm further
    assert np.allclose(carry(s["image"][0], A, T, SHAPE, A)[:-1], s["image"][0, 1:], atol=1e-2)
    assert np.allclose(carry(s["image"][0], A, np.eye(4), SHAPE, A), s["image"][0], atol=1e-2)


# brain and shading

def test_bias_is_estimated_in_the_foreground_only():
    inside = ball((16, 20, 20))
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in inside.shape], indexing="ij")
    tissue = np.where(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=inside.shape), 1.5) > 0, 100, 160)
    image = (np.where(inside, tissue, 1) * np.exp(0.4 * x)).astype("float32")
    wild = np.where(inside, image, np.random.default_rng(1).uniform(1, 9000, inside.shape)).astype("float32")
    step = BiasCorrection(shrink=1, iterations=(10, 10))
    a, b = (step(sample(i, np.diag([4.0, 4, 4, 1])[:, [2, 1, 0, 3]], foreground=inside[None])) for i in (image, wild))
    assert np.allclose(a["image"][0][inside], b["image"][0][inside], rtol=1e-5)
    found = np.log(image / a["image"][0])[inside]
    assert np.corrcoef(found, x[inside])[0, 1] > 0.9 and a["meta"]["bias"][0] > 1.2


def test_brain_mask_says_which_and_counts_what_it_cuts_off():
    inside = ball()
    mask = np.zeros((1, *SHAPE), dtype=bool); mask[0, 5, 11:13, :] = True
    s = BrainMask("nonzero")(sample(np.where(inside, smooth(), 0), mask=mask))
    assert s["meta"]["foreground"] == "nonzero" and s["meta"]["mask_outside"] == (mask[0] & ~inside).sum() > 0
    assert s["meta"]["foreground_ml"] == pytest.approx(inside.sum() * np.prod(SPACING) / 1000, rel=1e-3)
    with pytest.raises(DataError, match="has no brain mask"): BrainMask("given")(sample())


# intensities

def test_nyul_undoes_gain_and_offset_and_keeps_order():
    train = [sample(smooth(seed=i), foreground=ball()[None]) for i in range(4)]
    nyul, s = Nyul().fit(train), sample(smooth(seed=9), foreground=ball()[None])
    other = s | {"image": 0.01 * s["image"] - 7}
    assert np.allclose(nyul(other)["image"], nyul(s)["image"], atol=0.02)
    for step in (nyul, HistogramMatch().fit(train)):
        x, y = s["image"][0][ball()], step(s)["image"][0][ball()]
        assert (np.diff(y[np.argsort(x)]) >= 0).all() and not step(s)["image"][0][~ball()].any()
    eight_bit = s | {"image": np.round(s["image"] / 60)}              # a handful of grey values: landmarks coincide
    y = nyul(eight_bit)["image"][0][ball()]
    assert np.isfinite(y).all() and len(np.unique(y)) == len(np.unique(eight_bit["image"][0][ball()]))


def test_each_channel_has_its_own_standard():
    two = [sample(foreground=ball()[None]) | {"image": np.stack([smooth(seed=i), 5000 - 3 * smooth(seed=i) ** 1.1])} for i in range(3)]
    nyul = Nyul().fit(two)
    flipped = two[0] | {"image": two[0]["image"][::-1].copy()}
    assert not np.allclose(nyul.standard[0], nyul.standard[1], atol=1) and not np.allclose(nyul(flipped)["image"][::-1], nyul(two[0])["image"], atol=0.5)


# registration

def test_registration_finds_a_known_movement_the_same_way_twice(tmp_path):
    def head(shape, spacing, T):
        A = np.eye(4)
        A[:3, :3] = np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]) * np.array(spacing)
        A[:3, 3] = -A[:3, :3] @ (np.asarray(shape) - 1) / 2
        x, y, z = np.moveaxis(np.einsum("ij,j...->i...", T @ A, np.stack([*np.indices(shape), np.ones(shape)]))[:3], 0, 0)
        inside = (x / 60) ** 2 + (y / 75) ** 2 + (z / 55) ** 2 < 1
        image = 100 + 40 * np.sin(x / 11 + 1) * np.cos(y / 13) + 30 * np.sin(z / 10 + y / 25)
        return np.where(inside, image, 0).astype("float32"), inside, A
    c, s = np.cos(0.15), np.sin(0.15)
    T = np.eye(4); T[:3, :3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]]; T[:3, 3] = 8, -5, 6
    image, inside, A = head((26, 36, 30), (5.0, 5.0, 5.0), np.eye(4))
    write_volume(tmp_path / "t.nii.gz", image, A); write_volume(tmp_path / "b.nii.gz", inside, A)
    moved, its, B = head((30, 34, 40), (4.5, 5.5, 4.0), T)
    scan = sample(moved, B, foreground=its[None], mask=its[None])
    core = ndimage.binary_erosion(inside, iterations=2)
    step = Register(tmp_path / "t.nii.gz", tmp_path / "b.nii.gz", at=5.0, iterations=80)
    one, two = step(scan), step(scan)
    found = T @ np.asarray(one["meta"]["registration"]["matrix"])     # of the way there and back nothing is left
    corner = np.array([30.0, 40.0, -25.0, 1])
    assert np.linalg.norm((found @ corner - corner)[:3]) < 2.5, "half a voxel of 5 mm"
    assert np.rad2deg(np.arccos(min(1, (np.trace(found[:3, :3]) - 1) / 2))) < 1
    assert np.array_equal(one["image"], two["image"]) and one["meta"] == two["meta"]
    assert one["image"].shape[1:] == image.shape and np.corrcoef(one["image"][0][core], image[core])[0, 1] > 0.97
    with pytest.raises(DataError, match="overlap"): replace(step, min_overlap=1.0)(scan)


# a prepared folder

def test_a_prepared_folder_reads_back_as_anybodys(scans, tmp_path):
    made = run(scans, "resample=1.5,masks=nearest zscore crop=1", tmp_path)
    back = folder_records(tmp_path / "out")
    for pool in made:
        assert [(r.id, r.subject, r.label, r.images, r.mask, r.foreground, r.valid) for r in back[pool]] == [(r.id, r.subject, r.label, r.images, r.mask, r.foreground, r.valid) for r in made[pool]]
    ill = load_record(back["test"][1])
    expected = apply_steps(load_record(scans["test"][1]), preparation_steps("resample=1.5,masks=nearest zscore crop=1"))
    for key in ("image", "mask", "foreground", "valid"): assert np.array_equal(ill[key], expected[key]), key
    assert not ill["valid"].all() and ill["id"] == "ill 1." and ill["meta"]["contrast"] == "FLAIR" and ill["meta"]["family"] == "ms"
    assert np.allclose(ill["meta"]["affine"], expected["meta"]["affine"], atol=1e-4)


def test_the_standard_comes_from_train_and_changes_with_it_alone(scans, tmp_path):
    steps = "resample=1.5 nyul"
    run(scans, steps, tmp_path)
    note = tmp_path / "out" / "train" / "t0.json"
    learned = lambda: next(s for s in steps_from(json.loads((tmp_path / "out" / "provenance.json").read_text())["steps"]) if isinstance(s, Nyul)).standard
    by_hand = Nyul().fit([Resample(1.5)(load_record(r)) for r in scans["train"]]).standard
    first, before = learned(), note.stat().st_mtime_ns
    assert np.allclose(first, by_hand)
    other = scans | {"test": [record(tmp_path / "raw", "h9", "test", 33, gain=70.0)], "val": [record(tmp_path / "raw", "v9", "val", 44)]}
    run(other, steps, tmp_path)
    assert learned() == first and note.stat().st_mtime_ns == before, "test or validation scans had a part in it"
    run(other | {"train": other["train"][:2]}, steps, tmp_path)
    assert learned() != first and note.stat().st_mtime_ns != before
    left = json.loads((tmp_path / "out" / "provenance.json").read_text())["left_over"]
    assert "train/t2.json" in left and "t2" not in (tmp_path / "out" / "manifest.csv").read_text()


def test_nothing_stale_survives_a_changed_parameter_or_source(scans, tmp_path):
    made = run(scans, "brain=given zscore", tmp_path)
    old = read_volume(made["train"][0].images[0])[0]
    wider = run(scans, [CropOrPad((16, 30, 40)), ZScore(background=-2.0)], tmp_path)
    assert read_volume(wider["train"][0].images[0])[0].shape == (16, 30, 40) and wider["train"][0].valid
    bare = run({p: [replace(r, foreground=None) for r in rs] for p, rs in scans.items()}, "zscore", tmp_path)
    assert bare["train"][0].foreground is None and not (tmp_path / "out" / "train" / "t0_foreground.nii.gz").exists(), "an old brain mask lies beside a scan that has none"
    times = {p: os.stat(p).st_mtime_ns for p in (r.images[0] for r in bare["val"] + bare["test"])}
    write_volume(scans["train"][0].images[0], smooth(seed=99), oblique())                         # same name, another content
    again = run({p: [replace(r, foreground=None) for r in rs] for p, rs in scans.items()}, "zscore", tmp_path)
    assert not np.allclose(read_volume(again["train"][0].images[0])[0], old) and {p: os.stat(p).st_mtime_ns for p in times} == times
    with open(again["val"][0].images[0], "r+b") as f: f.truncate(100)                              # somebody's accident
    run({p: [replace(r, foreground=None) for r in rs] for p, rs in scans.items()}, "zscore", tmp_path)
    load_record(again["val"][0])


def test_a_killed_run_leaves_no_half_file_and_goes_on(scans, tmp_path):
    code = "\n".join(["import os, sys, json", "from anomaly_nb.data.records import read_manifest", "from anomaly_nb.data.prepare import prepare_records",
                      "records = {}", "for r in read_manifest(sys.argv[1]): records.setdefault(r.meta['pool'], []).append(r)",
                      "count, real = [0], os.replace", "def die(a, b):", "    count[0] += str(b).endswith('.nii.gz')", "    if count[0] == 5: os._exit(9)", "    real(a, b)", "os.replace = die",
                      "prepare_records(records, 'resample=1.5 zscore', sys.argv[2], processes=1, cache=sys.argv[3])"])
    from anomaly_nb.data.records import write_manifest
    write_manifest(tmp_path / "all.csv", [r for rs in scans.values() for r in rs])
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "all.csv", tmp_path / "out", tmp_path / "cache"], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    out = tmp_path / "out"
    halves, finished = list(out.rglob(".part-*")), {p: p.stat().st_mtime_ns for p in out.glob("*/*.json")}
    assert halves and len(finished) == 2 and not (out / "manifest.csv").exists() and json.loads((out / "provenance.json").read_text())["finished"] is False
    for p in out.rglob("[!.]*.nii.gz"): read_volume(p)                                             # whatever has its name is whole
    made = run(scans, "resample=1.5 zscore", tmp_path)
    assert not list(out.rglob(".part-*")) and {p: p.stat().st_mtime_ns for p in finished} == finished
    assert sum(map(len, made.values())) == 6 and json.loads((out / "provenance.json").read_text())["finished"] is True
    for rs in made.values():
        for r in rs: load_record(r)


def test_two_processes_make_the_same_files_and_name_every_broken_scan(scans, tmp_path, monkeypatch):
    (tmp_path / "raw" / "cut.nii.gz").write_bytes((tmp_path / "raw" / "t0_image.nii.gz").read_bytes()[:400])
    broken = [replace(scans["val"][0], id=n, subject=n, images=(str(tmp_path / "raw" / f),)) for n, f in (("cut", "cut.nii.gz"), ("gone", "gone.nii.gz"))]
    tiny = replace(scans["test"][1], id="tiny", subject="tiny", mask=str(tmp_path / "raw" / "tiny.nii.gz"))
    one = np.zeros(SHAPE, dtype=bool); one[5, 12, 15] = True
    write_volume(tiny.mask, one, oblique())
    wrong = scans | {"val": scans["val"] + broken, "test": [*scans["test"], tiny]}
    alone = prepare_records(scans, "resample=4x2.4x1.6 nyul", tmp_path / "alone", processes=1, cache=tmp_path / "cache")
    plain = prepare.run_jobs
    monkeypatch.setattr(prepare, "run_jobs", lambda jobs, make, processes, seconds, text: plain(jobs, make, 2 if "prep" in text else 1, 100, text))
    with pytest.raises(DataError) as error: prepare_records(wrong, "resample=4x2.4x1.6 nyul", tmp_path / "out", processes=2, cache=tmp_path / "cache")
    for words in ("3 of 9", "cut.nii.gz: is truncated", "gone.nii.gz: the file is missing", "'tiny': loses its whole lesion (1 voxels) in Resample"): assert words in str(error.value)
    said = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert sorted(said["broken"]) == ["cut", "gone", "tiny"] and said["finished"] is False and sorted(said["scans"]) == sorted(r.id for rs in scans.values() for r in rs)
    for pool, rs in folder_records(tmp_path / "out").items():
        assert [r.id for r in rs] == [r.id for r in alone[pool]]
        for r, a in zip(rs, alone[pool]):
            for f, g in zip(r.files, a.files): assert open(f, "rb").read() == open(g, "rb").read(), f


def test_labels_that_are_not_known_stay_unknown(scans, tmp_path):
    sick, healthy = scans["test"][1], scans["test"][0]
    odd = {"weak": [replace(sick, id="w", subject="w", mask=None, mask_known=False)], "unlabelled": [replace(healthy, id="u", subject="u", mask_known=False, meta=healthy.meta | {"family": ""})],
           "val_anomalous": [replace(sick, id="a", subject="a", meta=sick.meta | {"family": "", "age": 51, "regions": [1, 2]})]}
    made = run(scans | odd, "zscore", tmp_path)
    back = folder_records(tmp_path / "out", pools=tuple(scans | odd))
    assert [(p, r.label, r.mask_known, bool(r.mask)) for p in odd for r in back[p]] == [("weak", 1, False, False), ("unlabelled", 0, False, False), ("val_anomalous", 1, True, True)]
    assert back["val_anomalous"][0].meta["age"] == "51" and back["val_anomalous"][0].meta["regions"] == "[1, 2]" and made["val_anomalous"][0].meta["regions"] == [1, 2]
    write_table(tmp_path / "out" / "again.csv", made)
    assert (tmp_path / "out" / "again.csv").read_text() == (tmp_path / "out" / "manifest.csv").read_text()
    assert list(csv.reader(open(tmp_path / "out" / "manifest.csv")))[0][:7] == ["path", "subject", "id", "label", "mask", "family", "split"]


def test_refuses_before_it_makes_anything(scans, tmp_path):
    r = scans["train"][0]
    with pytest.raises(DataError, match="was not made by prepare"): prepare_records(scans, "zscore", tmp_path / "raw")
    with pytest.raises(LeakageError): run({"train": [r], "test": [replace(r, id="x")]}, "zscore", tmp_path)
    with pytest.raises(ParameterError, match="did you mean 'train'"): run({"trian": [r]}, "zscore", tmp_path)
    with pytest.raises(ParameterError, match="did you mean 'zscore'"): run(scans, "zscor", tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ParameterError, match="learns from pool 'train'"): run({"test": scans["test"]}, "nyul", tmp_path)


def test_words_and_json_are_the_same_steps():
    steps = preparation_steps("brain=otsu,strip bias=4,iterations=10x20 resample=3x1x1,order=cubic match,points=51 crop=2 size=32x48x48,cut=true")
    assert steps == steps_from(json.loads(json.dumps(describe(steps))))
    assert steps[1] == BiasCorrection(4, (10, 20)) and steps[0] == BrainMask("otsu", True) and steps[2].spacing == (3.0, 1.0, 1.0) and steps[3] == HistogramMatch(51)
    for text in ("bias,iterations=10", "resample=1x1", "crop=-1", "size=12x12x1.5y", "nyul,standard=1", "match=", "rescale,lower=a"):
        try: preparation_steps(text)
        except (ParameterError, DataError): continue
        assert text == "bias,iterations=10" and preparation_steps(text)[0].iterations == (10,)            # one number for a list of one
