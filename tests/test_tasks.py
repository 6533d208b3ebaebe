"""Shapes, labels, the recipe, smooth intensity, and many tasks in one: bad input, hard cases, and the way through the data module. What a reader should believe stands in the chapters."""
import time

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import reconstruction

from anomaly_nb.core import DataError, ParameterError, PoolError
from anomaly_nb.data.brain import brain_records
from anomaly_nb.data.module import AnomalyDataModule
from anomaly_nb.data.sets import SliceSet, VolumeSet
from anomaly_nb.tasks.intensity import SmoothIntensity, capped_distance, smooth_intensity
from anomaly_nb.tasks.labels import binary, close_label, flipped_gaussian, interpolation_factor, logistic
from anomaly_nb.tasks.many import NAMES, ManyTasks, task_names
from anomaly_nb.tasks.recipe import merge_boxes
from anomaly_nb.tasks.shapes import free_corners, make_shape, place_shape, sample_shape
from anomaly_nb.tasks.task import check_task


def normal(name, spatial, channels=1, seed=0):
    "A smooth random image in a round organ."
    rng = np.random.default_rng(seed)
    organ = (sum(g**2 for g in np.meshgrid(*(np.linspace(-1, 1, n) for n in spatial), indexing="ij")) < .85)[None]
    image = np.stack([ndimage.gaussian_filter(rng.normal(size=spatial), 1.5) for _ in range(channels)])
    return dict(image=np.where(organ, image/image.std(), 0).astype(np.float32), foreground=organ, valid=np.ones_like(organ), mask=np.zeros_like(organ), mask_known=True, label=0, id=name, subject=name, meta={})


class Samples(list):
    "A data set of samples, as a task sees it."
    subjects = property(lambda self: [s["subject"] for s in self])


SPATIAL = {2: (48, 40), 3: (24, 28, 20)}


def every_task(name, d, channels=1):
    source = Samples(normal(f"s{n}", SPATIAL[d], channels, n) for n in range(1, 4))
    external = Samples(normal(f"e{n}", tuple(n + 6 for n in SPATIAL[d]), channels, n) for n in range(9, 11))     # a grid of its own
    return ManyTasks(name).bind(source).with_external(external)


# ---------------------------------------------------------------- every task, the contract

@pytest.mark.parametrize("d", (2, 3))
@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("name", (*NAMES, "+".join(NAMES)))
def test_contract(name, d, channels):
    for seed in range(3): check_task(every_task(name, d, channels), normal("s0", SPATIAL[d], channels), seed)


@pytest.mark.parametrize("name", NAMES)
def test_grey_levels_stay_in_range_and_read_only_input_is_enough(name):
    sample = normal("s0", SPATIAL[2])
    for key in ("image", "foreground", "mask", "valid"): sample[key].flags.writeable = False
    for seed in range(10):
        made = every_task(name, 2)(sample, np.random.default_rng(seed))
        if name in ("intra", "inter", "smooth"): assert made["image"].min() >= sample["image"].min() and made["image"].max() <= sample["image"].max()
        assert np.isfinite(made["image"]).all() and 0 <= made["target"].min() <= made["target"].max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_no_label_far_from_a_change(name):
    "Where neither a voxel nor one within the closing's reach changed, and no hole is enclosed, the label is 0; where it is high, something near changed."
    for seed in range(10):
        made = every_task(name, 2)(normal("s0", SPATIAL[2]), np.random.default_rng(seed))
        changed = (made["image"] != made["clean"]).any(0)
        reach = ndimage.binary_fill_holes(ndimage.binary_dilation(changed, iterations=2))
        assert not made["target"][0][~reach].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change, message", (
    (lambda s: s | {"image": np.full_like(s["image"], np.nan)}, "holds NaN"),
    (lambda s: s | {"image": np.where(np.arange(s["image"].size).reshape(s["image"].shape) == 7, np.float32(np.inf), s["image"])}, "infinite"),
    (lambda s: s | {"image": np.full_like(s["image"], 2)}, "constant"),
    (lambda s: s | {"foreground": s["foreground"] & False}, "empty foreground"),
    (lambda s: s | {"foreground": s["foreground"][..., 1:]}, "foreground"),
    (lambda s: s | {"image": s["image"][:, 0], "foreground": s["foreground"][:, 0]}, "[C,H,W] or [C,D,H,W]"),
))
def test_bad_samples_are_named(name, change, message):
    with pytest.raises(DataError, match="s0") as error: every_task(name, 2)(change(normal("s0", SPATIAL[2])), np.random.default_rng(0))
    assert message in str(error.value)


def test_an_organ_without_room_is_refused_soon():
    sample = normal("s0", (64, 64))
    sample["foreground"] = np.zeros_like(sample["foreground"]); sample["foreground"][0, 5, 5] = True
    start = time.perf_counter()
    for name in NAMES:
        with pytest.raises(DataError, match="'s0'.*no place"): every_task(name, 2)(sample, np.random.default_rng(0))
    assert time.perf_counter() - start < 5


def test_images_of_a_few_voxels():
    with pytest.raises(DataError, match="no room"): SmoothIntensity()(normal("s0", (3, 40)), np.random.default_rng(0))
    check_task(SmoothIntensity(), normal("s0", (6, 7)))


# ---------------------------------------------------------------- many tasks

@pytest.mark.parametrize("text", ("", "+", "sink+sink", "sinc", "intra+inter+sink+source+smooth+sixth", "5"))
def test_wrong_names(text):
    with pytest.raises(ParameterError): ManyTasks(text)


def test_order_of_names_does_not_matter():
    assert task_names("smooth + intra") == ("intra", "smooth")
    a, b = (every_task(text, 2)(normal("s0", SPATIAL[2]), np.random.default_rng(4)) for text in ("sink+smooth", "smooth+sink"))
    assert a["image"].tobytes() == b["image"].tobytes()


def test_needs_and_strangers():
    sample = normal("s0", SPATIAL[2])
    with pytest.raises(PoolError, match="source"): ManyTasks("intra")(sample, np.random.default_rng(0))
    with pytest.raises(PoolError, match="another data set"): ManyTasks("inter")(sample, np.random.default_rng(0))
    for other, message in ((normal("e", SPATIAL[3]), "3 axes"), (normal("e", SPATIAL[2], 2), r"2 channel")):
        with pytest.raises(DataError, match=message): ManyTasks("inter").with_external([other])(sample, np.random.default_rng(0))
    with pytest.raises(DataError, match="empty"): ManyTasks("inter").with_external([])
    with pytest.raises(PoolError, match="no subject but"): ManyTasks("intra").bind(Samples([sample]))(sample, np.random.default_rng(0))


@pytest.mark.parametrize("field, value", (("label", "gausian"), ("sigma", 0), ("most", 0), ("again", -1), ("share", 2), ("push", (3, 1)), ("strength", 0)))
def test_parameters_reach_the_members(field, value):
    with pytest.raises(ParameterError): ManyTasks(**{field: value})


def test_settings_are_handed_on():
    members = ManyTasks(most=2, sigma=.5, push=[1, 3], mix=False, strength=.4, outside="torso").members
    assert {t.most for t in members.values()} == {2} and {t.sigma for t in members.values()} == {.5}
    assert tuple(members["sink"].push) == tuple(members["source"].push) == (1, 3) and members["smooth"].strength == .4
    assert not members["intra"].mix and not members["inter"].mix and members["inter"].outside == "torso"


def test_through_the_data_module():
    "Drawn from its own split only; the same batch from 0 and from 2 workers; two epochs differ, validation does not."
    pools = {pool: SliceSet(VolumeSet(items), min_foreground=.3) for pool, items in brain_records("tiny", "T1").items() if pool in ("train", "val")}
    external = Samples(normal(f"e{n}", (40, 40), seed=n) for n in range(3))
    data = AnomalyDataModule(**pools, task=ManyTasks().with_external(external), batch_size=24)
    bound = data.bound_task("train")
    assert bound.members["intra"].source.subjects == data.pools["train"].subjects and bound.members["inter"].external is external
    assert set(data.bound_task("val").members["intra"].source.subjects) == set(pools["val"].subjects)
    first, second = (next(iter(data.loader("train", task=True, workers=workers))) for workers in (0, 2))
    assert first["image"].equal(second["image"]) and first["target"].equal(second["target"])
    assert {meta["task"] for meta in first["meta"]} <= set(NAMES) and len({meta["task"] for meta in first["meta"]}) > 2
    loader = data.loader("train", task=True)
    assert not next(iter(loader))["target"].equal(next(iter(loader))["target"])
    loader = data.loader("val", task=True)
    assert next(iter(loader))["target"].equal(next(iter(loader))["target"])


# ---------------------------------------------------------------- shapes

@pytest.mark.parametrize("spatial", ((16, 200), (64, 64), (20, 56, 40), (9, 9, 9)))
def test_shapes_keep_their_promises(spatial):
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = sample_shape(spatial, rng)
        assert all(3 <= n <= max(3, round(.8*N)) for n, N in zip(shape.mask.shape, spatial))
        assert all(np.ptp(where) >= 2 for where in np.nonzero(shape.mask))              # three rows of voxels along each axis, at least
        assert ndimage.label(shape.mask, np.ones((3,)*len(spatial)))[1] == 1            # in one piece
        np.testing.assert_array_equal(shape.mask, shape.mask[(slice(None, None, -1),)*len(spatial)])      # symmetric about its centre


def test_reach_ends_where_the_mask_ends():
    "Half a step before the boundary there is mask or a voxel beside it, a voxel and a half beyond there is none: from every mask voxel, without the inside test."
    rng = np.random.default_rng(1)
    for n in range(20):
        shape = sample_shape((40, 48, 44)[:2 + n % 2], rng)
        d = shape.mask.ndim
        near, padded = ndimage.binary_dilation(np.pad(shape.mask, 3), np.ones((3,)*d)), np.pad(shape.mask, 3)
        u = rng.normal(size=(10, d)); u /= np.linalg.norm(u, axis=1, keepdims=True)
        c = rng.choice(np.argwhere(shape.mask))
        t = shape.reach(c, u)
        assert (t >= 0).all()
        at = np.rint(c + t[:, None]*u + 3).astype(int)
        assert near[tuple(np.clip(at, 0, np.array(near.shape) - 1).T)].all()
        inner = np.rint(c + .98*np.maximum(t - .9, 0)[:, None]*u + 3).astype(int)
        assert near[tuple(inner.T)].all() and padded[tuple((c + 3))]


@pytest.mark.parametrize("call", (
    lambda: make_shape("box", (3, 4), np.eye(3)), lambda: make_shape("box", (3, -1)), lambda: make_shape("box", (3, np.nan)), lambda: make_shape("box", (3,)*4),
    lambda: make_shape("box", (3, 4), np.zeros((2, 2))), lambda: make_shape("box", (3, 4)).reach((9, 9), [(0, 1)]),
    lambda: place_shape(make_shape("box", (5, 5)), np.zeros((9, 9), bool), np.random.default_rng(0)), lambda: place_shape(make_shape("box", (5, 5)), np.ones((4, 9), bool), np.random.default_rng(0)),
    lambda: place_shape(make_shape("box", (5, 5)), np.ones((1, 9, 9), bool), np.random.default_rng(0)), lambda: sample_shape((2, 50), np.random.default_rng(0))))
def test_bad_shapes(call):
    with pytest.raises(DataError): call()


def test_a_place_is_drawn_evenly():
    "Trial and correlation give one distribution: every free corner about as often."
    foreground = np.zeros((12, 14), dtype=bool); foreground[2:9, 3:12] = True
    shape = make_shape("ellipse", (5, 6))
    free = {tuple(c) for c in free_corners(shape.mask, foreground).tolist()}
    for tries in (0, 1000):
        rng = np.random.default_rng(0)
        drawn = [place_shape(shape, foreground, rng, tries=tries) for _ in range(60*len(free))]
        counts = np.array([drawn.count(c) for c in free])
        assert set(drawn) == free and ((counts - 60)**2/60).sum() < len(free) + 5*np.sqrt(2*len(free))     # chi-square
    before = foreground.copy()
    place_shape(shape, foreground, rng)
    assert (foreground == before).all()


# ---------------------------------------------------------------- labels

def slow(y, mask):
    "Closing by scipy and reconstruction by scikit-image, one component after the other, the box found by hand."
    out, (labels, count) = np.zeros(y.shape, dtype=np.float32), ndimage.label(mask, np.ones((3,)*mask.ndim))
    for n in range(1, count + 1):
        where = np.nonzero(labels == n)
        box = tuple(slice(w.min(), w.max() + 1) for w in where)
        part = np.pad(np.where(labels[box] == n, y[box], 0), 1)
        closed = ndimage.grey_closing(part, footprint=ndimage.generate_binary_structure(mask.ndim, 2))
        seed = np.full_like(closed, closed.max())
        for axis in range(mask.ndim):
            for end in (0, -1): np.moveaxis(seed, axis, 0)[end] = np.moveaxis(closed, axis, 0)[end]
        out[box] = np.maximum(out[box], reconstruction(seed, closed, method="erosion")[(slice(1, -1),)*mask.ndim])
    return out


@pytest.mark.parametrize("spatial", ((30, 37), (12, 15, 11), (1, 9), (1, 1), (2, 3, 2), (40,)))
def test_closing_and_filling_against_scipy_and_skimage(spatial):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        mask = ndimage.binary_opening(rng.random(spatial) < .8) if seed % 3 else rng.random(spatial) < (.1, .4, .9, 1)[seed//3]
        y = rng.choice((0, .2, .5, 1), spatial).astype(np.float32) if seed % 2 else rng.random(spatial, dtype=np.float32)      # with plateaus, and without
        y *= mask
        np.testing.assert_array_equal(close_label(y, mask), slow(y, mask))


def test_labels_of_nothing_and_bad_labels():
    zero, none = np.zeros((5, 6)), np.zeros((5, 6), dtype=bool)
    for f in (flipped_gaussian, logistic, binary): np.testing.assert_array_equal(f(zero + 9, none), zero)
    assert flipped_gaussian(zero, ~none).max() == 0 and flipped_gaussian(zero + 1e6, ~none).min() == 1
    for call in (lambda: flipped_gaussian(zero, none[1:]), lambda: binary(zero, zero), lambda: logistic(zero[None, None], none[None, None])):
        with pytest.raises(DataError): call()
    for call in (lambda: flipped_gaussian(zero, none, sigma=-1), lambda: interpolation_factor(zero, none, 1.5)):
        with pytest.raises(ParameterError): call()


def test_boxes_merge_to_the_same_whatever_their_order():
    rng = np.random.default_rng(0)
    for _ in range(30):
        boxes = [tuple(slice(int(a), int(a + n)) for a, n in zip(rng.integers(0, 30, 2), rng.integers(1, 12, 2))) for _ in range(5)]
        as_set = lambda merged: {tuple((s.start, s.stop) for s in box) for box in merged}
        merged = merge_boxes(boxes)
        assert as_set(merged) == as_set(merge_boxes(boxes[::-1]))
        canvas, labels = np.zeros((45, 45), dtype=bool), None
        for box in boxes: canvas[box] = True
        labels = ndimage.label(canvas, np.ones((3, 3)))[0]
        for n in range(1, labels.max() + 1):                                  # no component is cut in two
            assert sum(bool((labels[box] == n).any()) for box in merged) == 1


# ---------------------------------------------------------------- intensity

@pytest.mark.parametrize("spatial", ((25, 30), (10, 14, 12), (1, 20), (3, 3), (17,)))
def test_distance_against_scipy(spatial):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        mask = ndimage.binary_closing(rng.random(spatial) < .7) | (rng.random(spatial) < (seed/7))
        expected = ndimage.distance_transform_edt(np.pad(mask, 1))[(slice(1, -1),)*mask.ndim]
        for cap in (.5, 1, 3.3, 50): np.testing.assert_allclose(capped_distance(mask, cap), np.minimum(expected, cap), atol=1e-5)


def test_smooth_intensity_against_the_formula():
    rng = np.random.default_rng(0)
    for d in (1, 2, 3):
        image, mask = rng.normal(size=(2, *(20, 22, 18)[:d])), np.zeros((20, 22, 18)[:d], dtype=bool)
        mask[(slice(3, 15),)*d] = True
        change, width, before = np.array([.4, -.7]), 2.5, image.copy()
        damp = np.minimum(ndimage.distance_transform_edt(mask)/width, 1)
        low, high = (getattr(image.reshape(2, -1), f)(1).reshape(2, *(1,)*d) for f in ("min", "max"))
        expected = np.where(mask, np.clip(image + change.reshape(2, *(1,)*d)*damp, low, high), image)
        np.testing.assert_allclose(smooth_intensity(image, mask, change, width), expected, atol=1e-6)
        assert (image == before).all()
        np.testing.assert_array_equal(smooth_intensity(image, mask, change, width, ), smooth_intensity(image.astype(np.float64), mask.astype(np.uint8), list(change), width))


def test_a_width_larger_than_the_mask_still_reaches_the_full_change():
    image, mask = np.linspace(-5, 5, 441).reshape(1, 21, 21), np.zeros((21, 21), dtype=bool)
    mask[8:13, 8:13] = True
    assert abs((smooth_intensity(image, mask, .5, 100) - image).max() - .5) < 1e-6
