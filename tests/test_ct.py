"""Head CT: Hounsfield units and windows by the book, the same person as in the brain cohort, the dial at zero, whole files, the mixes as planned."""
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from anomaly_nb.core import DataError, InputError, ParameterError, rng_of
from anomaly_nb.data import ct, head
from anomaly_nb.data.anatomy import draw_person, grid_offsets, map_to_template, read_at, subject_anatomy, template_maps
from anomaly_nb.data.brain import Subject
from anomaly_nb.data.ct import FAMILIES, PAPER, POOLS, SIZES, WINDOWS, Job, ct_records, make_head, plan
from anomaly_nb.data.jobs import build_jobs
from anomaly_nb.data.records import Record, load_record, read_volume
from anomaly_nb.data.sets import SliceSet, VolumeSet
from anomaly_nb.data.transforms import Window, apply_transforms, wanted_transforms, zscore
from anomaly_nb.metrics.detection import auroc
from anomaly_nb.metrics.uncertainty import bootstrap_images, interval

MAKE = "import sys; from anomaly_nb.data.ct import Job, Subject, make_head; [make_head(Job(sys.argv[1], Subject(f'n{i}', 'val', 'AB'[i]), 4.0)) for i in (0, 1)]"


def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.nii.gz"))}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ct")


@pytest.fixture(scope="module")
def pair(root):
    "The function that makes an ill head and its twin: (ill, twin) as dicts of arrays."
    def both(family, contrast=1.0, name="someone", site="A"):
        jobs = [Job(str(root), Subject(f"{name}-{family}-{site}", "test", site, family), 4.0, contrast, twin=t) for t in (False, True)]
        for j in jobs: make_head(j)
        return [{w: read_volume(j.file(w))[0] for w in ("ct", "head", "brain", *["mask"]*j.ill)} for j in jobs]
    return both


# ---------- files

def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path):
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    child = subprocess.Popen([sys.executable, "-c", MAKE, str(killed)], start_new_session=True)
    def there(): return [p for p in killed.rglob("*.nii.gz") if not p.name.startswith(".part-")]
    while len(there()) < 1 and child.poll() is None: time.sleep(.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert 1 <= len(there()) < 6, "killed too late to say anything"
    for folder in (killed, whole): build_jobs([Job(str(folder), Subject(f"n{i}", "val", "AB"[i]), 4.0) for i in (0, 1)], make_head, 1)      # the first file is another process's
    assert digests(killed) == digests(whole) and len(digests(whole)) == 6 and not list(killed.rglob(".part-*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(InputError, match="file.*cannot be written"): ct_records("tiny", ("val",), root=tmp_path/"file")


def test_files_are_ordinary_nifti_in_hounsfield_units(pair, root):
    made, _ = pair("haemorrhage")
    image = nibabel.load(next(Path(root).rglob("someone-haemorrhage-A_ct.nii.gz")))
    assert image.get_data_dtype() == np.int16 and image.header.get_zooms() == (4.0, 4.0, 4.0) and image.shape == (64, 64, 48)
    hu = made["ct"]
    assert abs(np.median(hu[made["head"] == 0]) + 1000) < 5 and hu.min() >= -1024 and 700 < hu.max() < 2000
    assert (made["brain"] <= made["head"]).all() and (made["mask"] <= made["brain"]).all()


# ---------- anatomy

def test_the_affine_puts_the_brain_where_the_brain_cohort_has_it(root):
    "Without tilt, the brain's mask at a world point is the brain cohort's."
    a = subject_anatomy("who", 4.0, "A")
    scan = head.draw_head(rng_of("scan"), "A", 40.0) | {"pose": [0, 0, 0]}
    made = head.form_head(a.tissues, a.tissues.sum(0), a.person, a.to_template, scan, rng_of("image"), 4.0)
    mine, theirs = made["brain"], a.tissues.sum(0) > .5
    grid = head.head_offsets(4.0)
    inner = [slice(int(np.argmin(np.abs(grid[i].max(tuple({0, 1, 2} - {i})) - grid_offsets(4.0)[i].min()))), None) for i in range(3)]
    cut = mine[tuple(slice(s.start, s.start + n) for s, n in zip(inner, theirs.shape))]
    assert np.array_equal(cut, theirs) and cut.sum() == mine.sum()


def test_layers_lie_in_order_round_the_brain():
    "Independent of the drawing: distance to the brain's mask by scipy; going out, fluid or bone edge, bone, then soft tissue, then air."
    from scipy import ndimage
    a = subject_anatomy("layers", 2.0, "A")
    scan = head.draw_head(rng_of("scan"), "A", a.person["age"]) | {"pose": [0, 0, 0], "noise": 1e-6, "thickness": 0.0, "skull": 7.0, "gap": 2.0, "scalp": 6.0}
    made = head.form_head(a.tissues, a.tissues.sum(0), a.person, a.to_template, scan, rng_of("image"), 2.0)
    d, middle = 2*ndimage.distance_transform_edt(~made["brain"]), slice(55, 65)          # above the ventricles: no face
    profile = [np.median(made["ct"][middle][(d[middle] > low) & (d[middle] <= low + 2)]) for low in range(1, 24, 2)]
    bone = [k for k, v in enumerate(profile) if v > 300]
    assert bone and 1 <= bone[0] and 2 <= len(bone) <= 5 and bone == list(range(bone[0], bone[-1] + 1))
    assert -200 < min(profile[bone[-1] + 1:bone[-1] + 3]) < 300 and profile[-1] < -990


def test_shares_are_the_mean_over_the_voxel():
    "Partial volume against 1000 samples inside each voxel."
    rng = rng_of("shares")
    d, low, high = rng.uniform(-5, 15, 200), 2.0, 5.5
    inside = d[:, None] + 4*((np.arange(1000) + .5)/1000 - .5)
    assert np.allclose(head.share(d, low, high, 4.0), ((inside > low) & (inside < high)).mean(1), atol=2e-3)


def test_the_template_position_agrees_with_the_anatomy_inside_its_box():
    rng = rng_of("brain anatomy", "p", "A")
    person = draw_person(rng, "A")
    to_template = map_to_template(person, rng)
    assert np.allclose(head.in_template(person, to_template, grid_offsets(4.0)), to_template, atol=1e-3)
    inner, outer = np.array([0., 90., 0.]), np.array([0., 110., 0.])                      # beyond the box: about the person's scale
    step = head.in_template(person, to_template, outer.reshape(3, 1)) - head.in_template(person, to_template, inner.reshape(3, 1))
    assert step[1, 0] == pytest.approx(20/person["scale"][1], abs=3)


def test_head_and_brain_distances_agree_with_the_template():
    maps = head.head_maps()
    y = grid_offsets(4.0)
    depth, d = read_at(template_maps()["depth"], y, 2.0), read_at(maps["brain"], y, 2.0)
    near = np.abs(depth) < 8
    assert np.abs(depth + d)[near].max() < 1.5
    assert (maps["head"] - maps["brain"]).max() < 4


def test_rotations_are_rotations():
    R = head.rotation(.1, -.05, .12)
    assert np.allclose(R @ R.T, np.eye(3)) and np.linalg.det(R) == pytest.approx(1)
    nod = head.rotation(0, 0, .1) @ [0, -1, 0]                      # a voxel in front is read higher up in the subject: the chin is down
    assert nod[0] > 0 and nod[2] == 0


def test_grain_is_quiet_at_long_wavelengths():
    n = head.grain(rng_of("grain"), (16, 64, 64))
    power = (np.abs(np.fft.fft2(n))**2).mean(0)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    assert .05 < power[(f > 0) & (f < .05)].mean()/power[(f > .2) & (f < .3)].mean() < .35 and n.std() == pytest.approx(1)
    assert abs(np.corrcoef(n[0].ravel(), n[1].ravel())[0, 1]) < .05


# ---------- lesions

@pytest.mark.parametrize("family", ["haemorrhage", "atrophy"])
def test_contrast_zero_is_the_twin_to_the_bit(pair, family):
    ill, twin = pair(family, 0.0, site="B")
    assert all(np.array_equal(ill[k], twin[k]) for k in ("ct", "head", "brain"))
    assert family == "atrophy" or ill["mask"].any()


@pytest.fixture(scope="module")
def controls():
    "Every head of `tiny` with the ill at contrast 0: (labels, HU volumes, head masks). In the shared folder, as the notebooks have it: made once."
    records = [r for rs in ct_records("tiny", lesion_contrast=0, processes=1).values() for r in rs]
    return np.array([r.label for r in records]), [read_volume(r.images[0])[0].astype(float) for r in records], [read_volume(r.foreground)[0] > 0 for r in records]


def told_apart(labels, volumes, heads):
    "`Interval` of the AUROC, ill against healthy, of simple statistics of a head: mean, variance, grain (variance of differences between neighbours in soft tissue) and distance of its histogram to the mean histogram of all."
    found = {"mean": [], "variance": [], "grain": []}
    bins, shares = np.r_[-1000, -100, 0:100:5, 100:1501:200], []
    for hu, inside in zip(volumes, heads):
        v, soft = hu[inside], inside & (hu > 10) & (hu < 55)
        near = (hu[..., 1:] - hu[..., :-1])[soft[..., 1:] & soft[..., :-1]].var()
        for name, value in zip(found, (v.mean(), v.var(), near)): found[name].append(value)
        shares.append(np.sqrt(np.histogram(v.clip(-1000, 1500), bins)[0]/v.size))
    found["histogram"] = ((np.array(shares) - np.mean(shares, 0))**2).sum(1)
    return {name: interval(auroc(labels, np.array(x)), bootstrap_images(labels, np.array(x), statistics=("auroc",))["auroc"], len(labels)) for name, x in found.items()}


def test_without_contrast_nothing_simple_tells_the_ill_from_other_heads(controls):
    "The negative control between people; `contrast_zero_is_the_twin` is the one within a person."
    labels, volumes, heads = controls
    assert [int((labels == k).sum()) for k in (0, 1)] == [26, 12]
    for name, i in told_apart(labels, volumes, heads).items(): assert i.low < .5 < i.high, f"{name}: {i}"


@pytest.mark.parametrize("name,leak", [("grain", lambda hu: (hu + np.roll(hu, 1, 2))/2), ("histogram", lambda hu: hu + 3)])
def test_the_control_would_find_a_leak(controls, name, leak):
    "Ill heads resampled once more (half a voxel aside), or 3 HU brighter: the control fails, as it should."
    labels, volumes, heads = controls
    i = told_apart(labels, [leak(hu) if ill else hu for ill, hu in zip(labels, volumes)], heads)[name]
    assert not i.low <= .5 <= i.high, f"{name}: {i}"


@pytest.mark.parametrize("family,sign", [("haemorrhage", 1), ("ischaemia", -1), ("cavernoma", 1), ("atrophy", -1)])
def test_each_family_changes_the_numbers_the_right_way(pair, family, sign):
    ill, twin = pair(family)
    change = ill["ct"].astype(float) - twin["ct"]
    assert np.array_equal(ill["head"], twin["head"]) and np.array_equal(ill["brain"], twin["brain"])
    where = ill["mask"] > 0 if family != "atrophy" else np.abs(change) > 3
    assert sign*change[where].mean() > 1 and not change[twin["head"] == 0].any()


def test_the_same_lesion_as_in_the_brain_cohort(pair):
    from anomaly_nb.data.lesions import draw_lesion
    a = subject_anatomy((0, "someone-haemorrhage-A"), 4.0, "A")
    drawn = draw_lesion("haemorrhage", a.tissues, rng_of("brain lesion", 0, "someone-haemorrhage-A"), 4.0)
    assert pair("haemorrhage")[0]["mask"].sum() == pytest.approx(drawn.mask.sum(), rel=.1)


def test_a_lesion_of_one_voxel_survives_the_tilt():
    x = np.tensordot(head.rotation(.1, .03, .15).astype(np.float32), head.head_offsets(4.0), 1)
    for at in ((20, 24, 20), (15, 30, 11), (25, 20, 28)):
        mask = np.zeros((40, 48, 40), bool); mask[at] = True
        assert 1 <= head._moved_mask(mask, x, 4.0).sum() <= 2
    assert not head._moved_mask(np.zeros((40, 48, 40), bool), x, 4.0).any()


# ---------- windows

def volume_record(tmp_path, hu, **meta):
    from anomaly_nb.data.records import plain_affine, write_volume
    write_volume(tmp_path/"v.nii.gz", hu.astype(np.int16), plain_affine((1.0, 1.0, 1.0)))
    return Record("v", "v", (str(tmp_path/"v.nii.gz"),), meta=meta)


def test_windows_clip_and_scale(tmp_path):
    hu = np.linspace(-1000, 1500, 4*5*6).reshape(4, 5, 6).round()
    r = volume_record(tmp_path, hu, hu_windows=[[80, 40], [2800, 600]])
    image = apply_transforms(load_record(r), wanted_transforms([r]))["image"]
    assert image.shape == (2, 4, 5, 6) and image.dtype == np.float32
    for channel, (low, high) in zip(image, ((0, 80), (-800, 2000))): assert np.allclose(channel, (np.clip(hu, low, high) - low)/(high - low), atol=1e-6)


def test_windows_are_one_for_all_and_positive(tmp_path):
    r = volume_record(tmp_path, np.arange(8).reshape(2, 2, 2))
    with pytest.raises(DataError, match="width above 0"): Window(((-80, 40),))(load_record(r))
    a, b = (Record(n, n, ("x",), meta={"hu_windows": w}) for n, w in (("a", [[80, 40]]), ("b", [[40, 40]])))
    with pytest.raises(DataError, match="different windows"): wanted_transforms([a, b])
    assert wanted_transforms([a, a], (1, 2, 3))[0] == Window(((80.0, 40.0),)) and len(wanted_transforms([a, a], (1, 2, 3))) == 2


def test_chest_films_with_a_named_window_are_left_alone():
    assert wanted_transforms([Record("x", "x", ("f",), meta={"window": "several"})]) == ()


# ---------- plans and records

def test_the_mix_of_the_paper():
    who = {p: plan("coarse", p, mix="paper") for p in ("train", "val", "test")}
    ill = [s for s in who["test"] if s.family != "healthy"]
    assert [len(who["train"]), len(who["val"]), len(who["test"]) - len(ill), len(ill)] == [119, 30, 30, 44]
    found = {f: sum(s.family == f for s in ill) for f in FAMILIES}
    assert found == {"atrophy": 20, "haemorrhage": 12, "ischaemia": 9, "cavernoma": 1, "aneurysm": 1, "glioma": 1}         # eleven bleedings and one "bleed"
    assert sum(PAPER.values()) == 44 and len({s.name for s in ill}) == 44
    assert set(s.name for s in who["val"]) <= set(s.name for s in plan("coarse", "val"))                                     # the same people as in the balanced mix


@pytest.mark.parametrize("size", SIZES)
def test_no_name_twice_and_both_sites_everywhere(size):
    for mix in ("balanced", "paper"):
        everyone = [s for p in POOLS for s in plan(size, p, mix=mix)]
        assert len({s.name for s in everyone}) == len(everyone)
        for p in ("train", "val", "test"): assert {s.site for s in plan(size, p, mix=mix)} == {"A", "B"}
    assert {s.site for s in plan(size, "train", train_site="A")} == {"A"}


def test_held_out_families_are_met_in_the_test_only():
    assert "glioma" not in {s.family for p in ("weak", "unlabelled", "val_anomalous") for s in plan("demo", p, FAMILIES, held_out=("glioma",))}
    assert "glioma" in {s.family for s in plan("demo", "test", FAMILIES, held_out=("glioma",))}


def test_records_slices_and_labels(root):
    made = ct_records("tiny", ("test",), mix="paper", families=("atrophy", "haemorrhage"), site="A", root=root, processes=1)
    test = made["test"]
    assert {f: sum(r.meta["family"] == f for r in test) for f in ("healthy", "atrophy", "haemorrhage")} == {"healthy": 4, "atrophy": 2, "haemorrhage": 2}
    assert all(r.mask_known != (r.meta["family"] == "atrophy") and (r.mask is None) == (r.meta["family"] != "haemorrhage") for r in test)
    slices = SliceSet(VolumeSet(test, (*wanted_transforms(test), zscore), cache=False), min_foreground=.02)
    assert slices.shape == (64, 64) and slices.channels == 1
    family = {r.subject: r.meta["family"] for r in test}
    for name, label in zip(slices.subjects, slices.labels):
        if family[name] != "haemorrhage": assert label == (family[name] == "atrophy")
    bleeds = slices.labels[[family[n] == "haemorrhage" for n in slices.subjects]]
    assert 0 < bleeds.sum() < len(bleeds)


def test_bad_names_and_dials_are_refused_before_anything_is_made(tmp_path):
    for bad in (dict(size="huge"), dict(mix="papper"), dict(window="brian"), dict(window="brain+bne"), dict(foreground="skull"), dict(families=("ms",)), dict(families=("bleed",)), dict(site="C"), dict(train_site="C"),
                dict(lesion_contrast=-1), dict(lesion_size=True), dict(pools=("tset",)), dict(held_out=("glimoa",))):
        with pytest.raises(ParameterError): ct_records(**bad, root=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ParameterError, match="does not divide"): head.head_offsets(3.0)


def test_windows_are_those_of_the_books():
    assert WINDOWS["brain"] == (80, 40) and WINDOWS["subdural"] == (200, 80) and WINDOWS["stroke"] == (40, 40) and WINDOWS["bone"][0] > 2000
    assert ct.read_windows("") == [] and ct.read_windows("brain+subdural") == [[80, 40], [200, 80]] == ct.read_windows(("brain", "subdural"))
