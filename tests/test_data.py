"""The data module from files to batches: faults, leakage, hidden labels, repeatable randomness, the way back to volumes."""
import dataclasses
import errno
import gc
import gzip
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from anomaly_nb.core import DataError, LeakageError, ParameterError, PoolError, check_sample
from anomaly_nb.data import cache as cache_module
from anomaly_nb.data.cache import cached, content_hash
from anomaly_nb.data.formats import load_npy
from anomaly_nb.data.module import AnomalyDataModule
from anomaly_nb.data.records import Record, load_record, read_manifest, read_volume, records_manifest, write_manifest, write_volume
from anomaly_nb.data.sets import PatchSet, SliceSet, VolumeSet, assemble_volumes
from anomaly_nb.data.transforms import CropOrPad, PadToMultiple, ZScore, apply_transforms
from anomaly_nb.tasks.task import Task, check_task

SHAPE = (10, 14, 12)
AFFINE = np.array([[0, 0, -4, 20], [0, -4, 0, 30], [4, 0, 0, -18], [0, 0, 0, 1]], dtype=float)


def make(folder, name, ill=False, shape=SHAPE, channels=1, seed=None):
    rng = np.random.default_rng(sum(map(ord, name)) if seed is None else seed)
    head = sum(g**2 for g in np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")) < 0.9
    mask = np.zeros(shape, dtype=bool)
    mask[4:7, 5:8, 5:9] = ill
    images = []
    for c in range(channels):
        images.append(str(folder / f"{name}-{c}.nii.gz"))
        write_volume(images[-1], ((50 + 10 * rng.normal(size=shape) + 40 * mask) * head).astype("float32"), AFFINE)
    for key, array in (("mask", mask), ("head", head)):
        write_volume(folder / f"{name}-{key}.nii.gz", array, AFFINE)
    return Record(f"{name}-T1", name, tuple(images), int(ill), str(folder / f"{name}-mask.nii.gz"), foreground=str(folder / f"{name}-head.nii.gz"), meta={"family": "cube" if ill else "healthy", "site": "A"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def records(folder):
    return {n: make(folder, n, ill=n.startswith("ill")) for n in ("a", "b", "c", "v", "w", "t", "ill1", "ill2", "ill3", "u")}


@pytest.fixture(scope="module")
def volumes(records, folder):
    return lambda *names, **how: VolumeSet([records[n] for n in names], **{"cache": folder / "cache", **how})


@pytest.fixture(scope="module")
def slices(volumes):
    return lambda *names, **how: SliceSet(volumes(*names), **how)


# ---------- files ----------
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_any_orientation_of_an_oblique_scan_is_the_same_anatomy(tmp_path, order, flips):
    rng = np.random.default_rng(1)
    stored = rng.normal(size=(5, 6, 7)).astype("float32")
    a = np.deg2rad(25)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]) @ np.diag([1.0, 2.0, 3.0])
    affine[:3, 3] = 7, -3, 11
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "plain.nii.gz")
    ornt = np.array(list(zip(order, flips)), dtype=float)
    turned = nib.Nifti1Image(nib.orientations.apply_orientation(stored, ornt), affine @ nib.orientations.inv_ornt_aff(ornt, stored.shape))
    nib.save(turned, tmp_path / "turned.nii")
    (one, one_affine), (two, two_affine) = read_volume(tmp_path / "plain.nii.gz"), read_volume(tmp_path / "turned.nii")
    assert np.array_equal(one, two) and np.allclose(one_affine, two_affine, atol=1e-4)
    assert "".join(nib.aff2axcodes(one_affine)) == "SPL"


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int16", "bool"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_write_and_read_again(tmp_path, dtype, ending):
    array = (np.random.default_rng(0).random((3, 4, 5)) * 90).astype(dtype)
    path = tmp_path / f"x{ending}"
    write_volume(path, array, np.diag([2.0, 3, 4, 1]))
    bytes_before = path.read_bytes()
    write_volume(path, array, np.diag([2.0, 3, 4, 1]))
    assert path.read_bytes() == bytes_before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    back, affine = read_volume(path)
    assert back.dtype == np.float32 and np.array_equal(np.sort(back.ravel()), np.sort(array.astype("float32").ravel()))
    write_volume(path, array, AFFINE)
    back, affine = read_volume(path)
    assert np.array_equal(back, array) and np.allclose(affine, AFFINE)


def damaged(path, how, raw):
    if how == "missing": path.unlink()
    elif how == "folder": path.unlink(), path.mkdir()
    elif how == "half": path.write_bytes(raw[: len(raw) // 2])
    elif how == "short": path.write_bytes(gzip.compress(gzip.decompress(raw)[:600]))
    elif how == "text": path.write_text("hello")
    elif how == "empty": path.write_bytes(b"")
    elif how == "header": path.write_bytes(gzip.compress(b"\x5c\x01\x00\x00" + b"\xff" * 1000))
    else:
        array, affine = read_volume(path)
        if how == "nan": array[1, 1, 1] = np.nan
        if how == "inf": array[1, 1, 1] = np.inf
        if how == "constant": array[:] = 3
        if how == "grid": array = array[1:]
        if how == "moved": affine[0, 3] += 2
        if how == "values": array = array * 2
        if how == "nothing": array[:] = 0
        write_volume(path, array, affine)


@pytest.mark.parametrize("key,how", [("images", h) for h in ("missing", "folder", "half", "short", "text", "empty", "header", "nan", "inf", "constant")]
                         + [("mask", h) for h in ("missing", "half", "grid", "moved", "values", "nan")] + [("foreground", h) for h in ("grid", "moved", "nothing", "values")])
def test_a_broken_file_is_named(tmp_path, key, how):
    record = make(tmp_path, "x", ill=True)
    path = record.images[0] if key == "images" else getattr(record, key)
    damaged(tmp_path / path.rsplit("/")[-1], how, (tmp_path / path.rsplit("/")[-1]).read_bytes())
    with pytest.raises(DataError) as error: load_record(record)
    assert path in str(error.value)
    with pytest.raises(DataError) as error: VolumeSet([record], cache=tmp_path / "cache")
    assert path in str(error.value)
    assert not list((tmp_path / "cache").rglob("sample.json"))


def test_records_that_contradict_themselves(records):
    with pytest.raises(DataError, match="labelled normal"): load_record(replace(records["ill1"], label=0))
    with pytest.raises(DataError, match="no mask file"): load_record(replace(records["ill1"], mask=None))
    with pytest.raises(DataError, match="has 1 channels"): load_record(records["a"], channels=2)
    assert not load_record(replace(records["ill1"], mask=None, mask_known=False))["mask_known"]


def test_manifest_follows_contents_not_paths(tmp_path, records):
    (tmp_path / "moved").mkdir()
    moved = make(tmp_path / "moved", "a")
    assert records_manifest([moved]) == records_manifest([records["a"]])
    assert records_manifest([make(tmp_path / "moved", "a", seed=5)]) != records_manifest([records["a"]])
    write_manifest(tmp_path / "list.csv", [moved])
    assert "moved/a-0.nii.gz" in (tmp_path / "list.csv").read_text() and str(tmp_path) not in (tmp_path / "list.csv").read_text()
    assert read_manifest(tmp_path / "list.csv")[0] == replace(moved, images=tuple(str(tmp_path.resolve() / "moved" / p.rsplit("/")[-1]) for p in moved.images))


# ---------- transforms and cache ----------
def test_transforms_leave_their_input_and_know_their_place(records):
    sample = load_record(records["ill1"])
    before = pickle.dumps(sample)
    out = apply_transforms(sample, (ZScore(background=-5), PadToMultiple(8), CropOrPad((14, 14, 14))))
    assert pickle.dumps(sample) == before
    check_sample(out)
    inside = out["foreground"][0]
    assert abs(out["image"][0][inside].mean()) < 1e-5 and out["mask"].sum() == sample["mask"].sum()
    v, w = (np.argwhere(s["mask"][0])[0] for s in (sample, out))
    assert np.allclose(np.array(sample["meta"]["affine"]) @ (*v, 1), np.array(out["meta"]["affine"]) @ (*w, 1))
    assert out["meta"]["volume_shape"] == (14, 14, 14)


def test_a_full_disk_leaves_no_entry_and_is_named(tmp_path, records, monkeypatch):
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(cache_module.np, "save", full)
        with pytest.raises(DataError, match="No space left"): cached(records["a"], (), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "volumes").rglob("*.npy")) and not list((tmp_path / "cache").rglob(".part*"))
    assert np.array_equal(cached(records["a"], (), tmp_path / "cache").image, load_record(records["a"])["image"])


def test_cache_made_by_many_at_once(tmp_path, records):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: np.array(cached(records["a"], (ZScore(),), tmp_path / "cache").image), range(16)))
    assert all(np.array_equal(f, found[0]) for f in found)


def test_arrays_are_read_by_many_threads_at_once(tmp_path):
    """Python's parser (numpy reads headers with it) counts its depth in one place for all threads up to 3.11.7: cpython 106905."""
    class Slow:
        def __del__(self): os.stat("/")     # garbage whose end lets go of the lock of the interpreter, in the middle of parsing
    def one(_):
        slow = Slow(); slow.me = slow
        return load_npy(tmp_path / "a.npy").shape
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    before, interval = gc.get_threshold(), sys.getswitchinterval()
    try:
        gc.set_threshold(50); sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as pool: assert set(pool.map(one, range(6000))) == {(3, 4)}
    finally: gc.set_threshold(*before); sys.setswitchinterval(interval)


def test_contents_are_not_hashed_twice(tmp_path, records, monkeypatch):
    first = content_hash(records["a"].images[0], tmp_path)
    monkeypatch.setattr(cache_module, "file_hash", lambda _: pytest.fail("was read again"))
    assert content_hash(records["a"].images[0], tmp_path) == first


def test_a_cache_deleted_in_the_middle_is_made_again(tmp_path, records):
    import shutil
    v = VolumeSet([records["a"], records["b"]], cache=tmp_path / "cache")
    first = v[0]["image"]
    v._open.clear()
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(v[0]["image"], first)


# ---------- sets ----------
def test_two_channels(tmp_path):
    v = VolumeSet([make(tmp_path, "a", channels=2), make(tmp_path, "b", channels=2)], cache=False)
    assert v.channels == 2 and SliceSet(v)[0]["image"].shape == (2, *SHAPE[1:]) and PatchSet(v, 6)[0]["image"].shape == (2, 6, 6, 6)
    with pytest.raises(DataError, match="has 1 channels"): VolumeSet([*v.records, make(tmp_path, "c")], cache=False)


@pytest.mark.parametrize("view", [lambda v: v, *(lambda v, a=a: SliceSet(v, min_foreground=0, axis=a) for a in range(3)), lambda v: PatchSet(v, 6, 4), lambda v: PatchSet(v, (4, 1, 5), (3, 1, 5))])
@pytest.mark.parametrize("cache", [False, None])
def test_every_voxel_finds_its_way_home(volumes, folder, view, cache):
    data = view(volumes("a", "ill1", cache=False if cache is False else folder / "cache"))
    order = np.random.default_rng(0).permutation(len(data))
    number = np.arange(np.prod(SHAPE), dtype="float32").reshape(SHAPE)
    pieces = []
    for i in order:
        s = check_sample(data[int(i)])
        box = tuple(slice(o, o + e) for o, e in zip(s["meta"]["origin"], s["meta"]["extent"]))
        pieces.append(s | {"anomaly_map": number[box].reshape(1, *s["image"].shape[1:])})
    for array in assemble_volumes(pieces).values():
        seen = ~np.isnan(array)
        assert seen[0][volumes("a")[0]["foreground"][0]].all() and np.array_equal(array[seen], number[None][seen])


def test_labels_of_slices(volumes, records, folder):
    v = volumes("ill1", "a")
    some, many = SliceSet(v, label_area=12), SliceSet(v, label_area=13)
    assert some.labels.sum() == 3 and many.labels.sum() == 0
    crumb = next(s for s in many if s["meta"]["origin"][0] == 5)
    assert crumb["label"] == 0 and not crumb["mask"].any() and (~crumb["valid"]).sum() == 12 and crumb["meta"]["volume_label"] == 1
    unknown = SliceSet(VolumeSet([replace(records["ill1"], mask=None, mask_known=False)], cache=folder / "cache"))
    assert unknown.labels.all() and not unknown[0]["mask_known"]


def test_a_set_travels_to_other_processes_without_its_arrays(slices):
    s = slices("a", "b")
    s[0]
    assert len(pickle.dumps(s)) < 20_000 and np.array_equal(pickle.loads(pickle.dumps(s))[3]["image"], s[3]["image"])


# ---------- the module ----------
@dataclasses.dataclass
class Swap(Task):
    "A foreign square somewhere, with noise."
    size: int = 4
    needs_source = True

    def apply(self, sample, rng):
        other, image, target = self.other(sample, rng), sample["image"].copy(), np.zeros_like(sample["foreground"], dtype="float32")
        corner = [int(rng.integers(n - self.size)) for n in image.shape[1:]]
        box = (slice(None), *(slice(c, c + self.size) for c in corner))
        image[box], target[box] = other["image"][box] + rng.normal(), 1
        return dict(image=image, target=target, meta=sample["meta"] | {"donor": other["subject"]})


def test_the_toy_task_is_a_task(slices):
    check_task(Swap().bind(slices("a", "b")), slices("a")[0])


def batches(loader):
    return [{k: v.numpy() if torch.is_tensor(v) else v for k, v in b.items()} for b in loader]


def equal(a, b):
    return len(a) == len(b) and all(np.array_equal(x[k], y[k]) if isinstance(x[k], np.ndarray) else x[k] == y[k] for x, y in zip(a, b, strict=True) for k in x)


@pytest.mark.parametrize("view", [lambda v: v, SliceSet, lambda v: PatchSet(v, 6, 4)])
def test_workers_change_nothing_and_epochs_do(volumes, view):
    data = AnomalyDataModule(view(volumes("a", "b", "c")), view(volumes("v", "w")), task=Swap(), batch_size=5)
    alone, helped = data.loader("train", task=True, shuffle=True), data.loader("train", task=True, shuffle=True, workers=2)
    one, two = [batches(alone) for _ in range(2)], [batches(helped) for _ in range(2)]
    assert equal(one[0], two[0]) and equal(one[1], two[1]) and not equal(*one)
    fixed = data.val_dataloader()
    assert equal(batches(fixed), batches(fixed))
    alone.sampler.set_epoch(0)
    assert equal(batches(alone), one[0])


def test_a_planted_foreign_subject_never_appears(slices):
    train, val, test, weak = slices("a", "b"), slices("v", "w"), slices("t", "ill1"), slices("u", "ill2")
    data = AnomalyDataModule(train, val, test, weak=weak, task=Swap().bind(test))
    for pool, own in (("train", train), ("val", val), ("weak", weak)):
        donors = {m["donor"] for _ in range(2) for b in data.loader(pool, task=True) for m in b["meta"]}
        assert donors == set(own.subjects)
    assert data.task.source is test and data.bound_task("train").source.subjects == train.subjects
    with pytest.raises(ParameterError, match="test"): data.loader("test", task=True)


def test_a_task_that_keeps_a_foreign_source_is_refused(slices):
    class Stubborn(Swap):
        def bind(self, source): return self
    task = Stubborn()
    task.source = slices("t")
    data = AnomalyDataModule(slices("a", "b"), slices("v"), slices("t"), task=task)
    with pytest.raises(LeakageError, match="outside of 'train': t"): data.loader("train", task=True)


def test_a_task_that_returns_a_foreign_sample_is_refused(slices):
    stranger = slices("t")[0]
    data = AnomalyDataModule(slices("a", "b"), slices("v"), task=lambda sample, rng: stranger)
    with pytest.raises(LeakageError, match="brought in subject 't'"): next(iter(data.loader("train", task=True)))


def test_what_is_refused_and_how_it_is_named(slices, volumes, records, folder, tmp_path):
    train, val, test = slices("a", "b", "c"), slices("v"), slices("t", "ill1")
    with pytest.raises(LeakageError, match="'train' and 'test': share 2 subjects: b, c"): AnomalyDataModule(train, val, slices("b", "c", "t"))
    with pytest.raises(LeakageError, match="'weak'.* ill1"): AnomalyDataModule(train, val, test, weak=slices("ill1", "u"))
    twin = replace(records["a"], id="ill1-twin", subject="ill1")
    with pytest.raises(LeakageError, match="ill1"): AnomalyDataModule(SliceSet(VolumeSet([twin], cache=False)), val, test)
    with pytest.raises(DataError, match="'train'.*ill2-T1"): AnomalyDataModule(slices("a", "ill2"), val, test)
    with pytest.raises(DataError, match="'val'.*ill2-T1"): AnomalyDataModule(train, slices("ill2"), test)
    with pytest.raises(DataError, match="no normal validation data"): AnomalyDataModule(train, None, test)
    with pytest.raises(DataError, match="'test'.*empty"): AnomalyDataModule(train, val, [])
    with pytest.raises(DataError, match="empty"): volumes()
    with pytest.raises(DataError, match="empty"): slices("a", min_foreground=1.0)
    big = VolumeSet([make(tmp_path, "big", shape=(10, 16, 12))], cache=False)
    with pytest.raises(DataError, match=r"big.*\(16, 12\).*\(14, 12\).*a, b, c"): AnomalyDataModule(train, val, SliceSet(big))
    with pytest.raises(DataError, match="spatial_dims 3"): AnomalyDataModule(train, val, volumes("t"))
    two = VolumeSet([make(tmp_path, "two", channels=2)], cache=False)
    with pytest.raises(DataError, match="channels 2"): AnomalyDataModule(train, val, SliceSet(two))
    with pytest.raises(DataError, match="grid"): SliceSet(VolumeSet([*big.records, records["a"]], cache=False))


def test_pools_and_what_they_hide(slices):
    data = AnomalyDataModule(slices("a"), slices("v"), slices("t", "ill1"), weak=slices("u", "ill2", label_area=13), unlabelled=slices("ill3"))
    for pool in ("weak", "unlabelled"):
        for b in data.loader(pool):
            assert not b["mask"].any() and not b["mask_known"].any() and b["valid"].all()
            assert all("family" not in m and (pool == "weak" or "volume_label" not in m) for m in b["meta"])
    assert not any(b["label"].any() for b in data.loader("unlabelled")) and set(data.pools["unlabelled"].labels) == {-1}
    assert any(b["mask"].any() for b in data.loader("test")) and data.pools["test"].volumes[1]["mask"].any()
    with pytest.raises(PoolError): data.pools["weak"].volumes
    data.require(("train", "weak"), "a model")
    with pytest.raises(PoolError, match="DDPM: needs the pool val_anomalous"): data.require(("val_anomalous",), "DDPM")
    with pytest.raises(ParameterError, match="did you mean 'unlabelled'"): data.loader("unlabeled")
    with pytest.raises(ParameterError, match="needs a task"): data.loader("train", task=True)


def test_masks_stay_hidden_behind_a_task_too(slices):
    seen = []
    class Spy(Swap):
        def apply(self, sample, rng):
            other = self.other(sample, rng)
            seen.extend([sample["mask"].any(), other["mask"].any()])
            return super().apply(sample, rng)
    data = AnomalyDataModule(slices("a"), slices("v"), weak=slices("u", "ill2"), task=Spy())
    list(data.loader("weak", task=True))
    assert seen and not any(seen)


def test_summary_and_manifest(slices):
    data = AnomalyDataModule(slices("a", "b"), slices("v"), slices("t", "ill1"))
    rows = {r["pool"]: r for r in data.summary()}
    assert rows["test"]["ill_volumes"] == 1 and rows["test"]["ill_samples"] == 3 and rows["train"]["subjects"] == 2
    assert set(data.manifest()) == {"train", "val", "test"} and data.manifest() == AnomalyDataModule(slices("b", "a"), slices("v"), slices("t", "ill1")).manifest()
