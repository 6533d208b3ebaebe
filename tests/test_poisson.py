"""Poisson blending, splines and deformations against sparse solvers and scipy; bad input; whole tasks in 2D and 3D; the benchmark's reference at parity."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

from anomaly_nb.core import DataError, InputError, ParameterError, PoolError
from anomaly_nb.tasks import deformation, poisson, splines
from anomaly_nb.tasks.deformation import Sink, Source, push_factor, radial_coordinates, radial_move, sink, source
from anomaly_nb.tasks.intensity import SmoothIntensity
from anomaly_nb.tasks.poisson import InterBlend, IntraBlend, poisson_blend, random_patch, solve_dirichlet
from anomaly_nb.tasks.shapes import make_shape, sample_shape
from anomaly_nb.tasks.task import check_task

CASES = [((40,), (17,), (9,)), ((30, 34), (12, 15), (7, 9)), ((16, 18, 20), (7, 9, 8), (4, 5, 6)), ((12, 13, 14), (3, 4, 3), (0, 9, 11))]


def at(box, corner):
    return (slice(None), *(slice(c, c + n) for c, n in zip(corner, box)))


class Set(list):
    "Samples as a data set."
    def __init__(self, spatial, count=3, channels=1, name="s"):
        grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in spatial), indexing="ij")
        organ = sum(g**2 for g in grid)[None] < 0.9
        for k in range(count):
            image = ndimage.gaussian_filter(np.random.default_rng([k, len(name)]).normal(size=(channels, *spatial)), (0, *(1.5,) * len(spatial)))
            image = np.where(organ, image / image.std(), 0).astype(np.float32)
            self.append(dict(image=image, foreground=organ, valid=np.ones_like(organ), mask=np.zeros_like(organ), mask_known=True, label=0, id=f"{name}{k}", subject=f"{name}{k}", meta={}))
        self.subjects, self.spatial_dims, self.channels = [s["subject"] for s in self], len(spatial), channels


# ---------------------------------------------------------------- the solver

def direct(target, source, mask, corner, mixed):
    "The same discrete problem for one channel, assembled voxel by voxel from the definition and solved as one sparse system."
    box = mask.shape
    t, out = target[at(box, corner)[1:]], target.copy()
    inner = np.zeros(box, bool); inner[(slice(1, -1),) * len(box)] = True
    number = np.full(box, -1); number[inner] = np.arange(inner.sum())
    M = mask & inner
    rows, columns, values, b = [], [], [], np.zeros(inner.sum())

    def guidance(p, axis):
        q = list(p); q[axis] += 1; q = tuple(q)
        gt, gs = t[q] - t[p], source[q] - source[p]
        return gs if M[p] and (not mixed or abs(gs) > abs(gt)) else gt

    for p in map(tuple, np.argwhere(inner)):
        k = number[p]
        rows.append(k); columns.append(k); values.append(-2.0 * len(box))
        for axis in range(len(box)):
            before = list(p); before[axis] -= 1; before = tuple(before)
            b[k] += guidance(p, axis) - guidance(before, axis)
            for step in (-1, 1):
                q = list(p); q[axis] += step; q = tuple(q)
                if inner[q]: rows.append(k); columns.append(number[q]); values.append(1.0)
                else: b[k] -= t[q]
    f = t.copy(); f[inner] = spsolve(sparse.csc_array((values, (rows, columns))), b)
    out[at(box, corner)[1:]] = f
    return out


@pytest.mark.parametrize("spatial, box, corner", CASES)
@pytest.mark.parametrize("mixed", [True, False])
def test_blending_equals_a_sparse_direct_solve(spatial, box, corner, mixed):
    rng = np.random.default_rng(len(spatial))
    target, patch, mask = rng.normal(size=(2, *spatial)), rng.normal(size=(2, *box)), rng.random(box) < 0.7
    mask[tuple(n // 2 for n in box)] = True
    new = poisson_blend(target, patch, mask, corner, mixed)
    expected = np.stack([direct(t, s, mask, corner, mixed) for t, s in zip(target, patch)])
    assert np.abs(new - expected).max() < 1e-10
    assert np.abs(new - target).max() > 0.1                                   # and something happened
    float32 = poisson_blend(target.astype(np.float32), patch, mask, corner, mixed)
    assert float32.dtype == np.float32
    smooth = poisson_blend(target.astype(np.float32).astype(float), patch, mask, corner, mixed)
    assert np.abs(float32 - smooth).max() < 1e-5


@pytest.mark.parametrize("shape", [(1,), (50,), (40, 33), (1, 1), (20, 17, 25), (2, 261), (3, 2, 300)])
def test_round_trip_through_the_laplacian(shape):
    u = np.random.default_rng(0).normal(size=(2, *shape))
    padded = np.pad(u, [(0, 0)] + [(1, 1)] * len(shape))
    laplacian = sum(np.roll(padded, s, a) for s in (-1, 1) for a in range(1, u.ndim)) - 2 * len(shape) * padded
    assert np.abs(solve_dirichlet(laplacian[(slice(None), *(slice(1, -1),) * len(shape))]) - u).max() <= 1e-10


@pytest.mark.parametrize("spatial, box, corner", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_faces_and_surroundings_are_untouched_to_the_bit(spatial, box, corner, dtype):
    rng = np.random.default_rng(1)
    target, patch, mask = rng.normal(size=(1, *spatial)).astype(dtype), rng.normal(size=(1, *box)).astype(dtype), np.ones(box, bool)
    kept = target.copy(), patch.copy(), mask.copy()
    new = poisson_blend(target, patch, mask, corner)
    inner = np.zeros(spatial, bool); inner[tuple(slice(c + 1, c + n - 1) for c, n in zip(corner, box))] = True
    assert np.array_equal(new[:, ~inner], target[:, ~inner]) and new is not target
    assert all(np.array_equal(a, b) for a, b in zip((target, patch, mask), kept))           # the mask too
    same = poisson_blend(target, target[at(box, corner)], mask, corner)
    assert np.array_equal(same, target)


def test_a_constant_added_to_the_source_is_invisible():
    rng = np.random.default_rng(2)
    target, patch = rng.normal(size=(1, 30, 30)), rng.normal(size=(1, 12, 12))
    mask = np.ones((12, 12), bool)
    for mixed in (True, False): assert np.abs(poisson_blend(target, patch, mask, (5, 6), mixed) - poisson_blend(target, patch + 7, mask, (5, 6), mixed)).max() < 1e-10


def test_only_the_mask_guides():
    rng = np.random.default_rng(3)
    target, patch, mask = rng.normal(size=(1, 30, 30)), rng.normal(size=(1, 14, 14)), np.zeros((14, 14), bool)
    mask[4:8, 5:9] = True
    other = patch.copy(); other[0][~ndimage.binary_dilation(mask)] = 1e3      # a gradient reaches one voxel beyond the mask
    assert np.array_equal(poisson_blend(target, patch, mask, (8, 8)), poisson_blend(target, other, mask, (8, 8)))


BAD = {
    "leaves the image": dict(corner=(15, 3)), "leaves the image ": dict(corner=(-1, 3)), "2 axes each": dict(corner=(1, 2, 3)),
    "the mask is empty": dict(mask=np.zeros((6, 6), bool)), "the mask is empty ": dict(mask=np.pad(np.zeros((4, 4), bool), 1, constant_values=True)),
    "at least 3 voxels": dict(source=np.ones((1, 2, 6)), mask=np.ones((2, 6))), "do not go together": dict(source=np.ones((2, 6, 6))),
    "do not go together ": dict(source=np.ones((1, 6, 6, 6))), "beside a source": dict(mask=np.ones((5, 6))),
    "in the target": dict(target=np.full((1, 20, 20), np.nan)), "in the source": dict(source=np.full((1, 6, 6), np.inf)),
    "1 to 3 spatial axes": dict(target=np.ones((1, 5, 5, 5, 5)), source=np.ones((1, 3, 3, 3, 3)), mask=np.ones((3, 3, 3, 3)), corner=(0, 0, 0, 0)),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_of_blending_is_named(words):
    given = dict(target=np.zeros((1, 20, 20)), source=np.ones((1, 6, 6)), mask=np.ones((6, 6), bool), corner=(3, 3)) | BAD[words]
    with pytest.raises(DataError, match=words.strip()): poisson_blend(**given)


# ---------------------------------------------------------------- splines and patches

@pytest.mark.parametrize("shape", [(31,), (20, 31), (9, 12, 10), (2, 5), (300, 7)])
def test_splines_equal_scipy(shape):
    rng, d = np.random.default_rng(4), len(shape)
    box, M, o = rng.normal(size=(2, *shape)), np.eye(3), np.zeros(3)
    M[3 - d:, 3 - d:] = np.diag(rng.uniform(0.2, 0.9, d))
    o[3 - d:] = (1 - np.diag(M)[3 - d:]) * (np.array(shape) - 1) * rng.random(d)
    ours = splines.sample_affine(splines.spline_coefficients(box), M, o, np.empty((2, *(1,) * (3 - d), *shape))).reshape(box.shape)
    theirs = np.stack([ndimage.affine_transform(c, M[3 - d:, 3 - d:], o[3 - d:], order=3, mode="nearest") for c in box])
    assert np.abs(ours - theirs).max() < 1e-6


def test_products_do_not_depend_on_the_number_of_threads():
    "The same bits with one BLAS thread and with two: worker processes and the main one must agree."
    code = "import numpy as np, hashlib; from anomaly_nb.tasks.poisson import solve_dirichlet as s; x = np.random.default_rng(0).normal(size=(1, 60, 70, 50)).astype('float32'); print(hashlib.sha256(s(x).tobytes()).hexdigest())"
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    import os
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {n: str(k) for n in names}).stdout for k in (1, 2)}
    assert len(seen) == 1


def test_patches_stay_inside_the_donor_and_its_range():
    for spatial, box in (((20, 24), (16, 19)), ((14, 12, 13), (11, 9, 10)), ((9, 9), (30, 30))):
        image = np.random.default_rng(5).normal(size=(2, *spatial)).astype(np.float32)
        for seed in range(20):
            patch = random_patch(image, np.ones((1, *spatial), bool), box, np.random.default_rng(seed))
            assert patch.shape == (2, *box) and np.isfinite(patch).all()
            axes = tuple(range(1, image.ndim))
            assert (patch.min(axes) >= image.min(axes)).all() and (patch.max(axes) <= image.max(axes)).all()


def test_the_centre_of_a_patch_lies_in_the_foreground():
    organ = np.zeros((40, 40), bool); organ[12:18, 20:30] = True
    for seed in range(50):
        centre, matrix = poisson.place_patch(organ, np.eye(2), (9, 9), np.random.default_rng(seed))
        assert organ[tuple(np.rint(centre).astype(int))]
    with pytest.raises(DataError, match="foreground is empty"): random_patch(np.ones((1, 40, 40)), np.zeros((40, 40)), (9, 9), np.random.default_rng(0))
    speck = np.zeros((40, 40), bool); speck[20, 20] = True                       # found without an endless loop
    assert np.array_equal(poisson.place_patch(speck, np.eye(2), (9, 9), np.random.default_rng(0))[0], (20, 20))


# ---------------------------------------------------------------- sink and source

@pytest.mark.parametrize("kind", ["box", "ellipse"])
@pytest.mark.parametrize("sides", [(31,), (30, 21), (19, 14, 23)])
def test_coordinate_maps(kind, sides):
    rng, d = np.random.default_rng(6), len(sides)
    s = make_shape(kind, sides, np.eye(d) + 0.2 * rng.normal(size=(d, d)))
    c, p = np.argwhere(s.mask)[s.mask.sum() // 3].astype(float), np.argwhere(s.mask).astype(float)
    u = rng.normal(size=(40, d)); u /= np.sqrt((u**2).sum(1))[:, None]
    edge = c + s.reach(c, u)[:, None] * u
    for f in (1.34, 2.0, 4.0):
        there = radial_move(p, c, s.reach, f, "source")
        assert np.abs(radial_move(there, c, s.reach, 1 / f, "source") - p).max() <= 1e-10
        for way in ("source", "sink"):
            q = radial_move(p, c, s.reach, f, way)
            assert s.inside(c + (q - c) * (1 - 1e-9)).all()
            assert np.abs(radial_move(edge, c, s.reach, f, way) - edge).max() < 1e-9
            assert np.array_equal(radial_move(c[None], c, s.reach, f, way), c[None])
            line = np.sqrt((((q - c) - ((q - c) * (p - c)).sum(1, keepdims=True) / np.maximum(((p - c)**2).sum(1, keepdims=True), 1e-12) * (p - c))**2).sum(1))
            assert line.max() < 1e-9                                              # always on its own ray


def test_nothing_outside_of_the_mask_is_looked_at_without_a_formula():
    yy, xx = np.indices((60, 60))
    mask = (yy - 30)**2 / 20**2 + (xx - 28)**2 / 13**2 < 1
    for kind in ("source", "sink"):
        _, places = radial_coordinates(mask, (26, 30), 3.0, kind)
        assert ndimage.map_coordinates(mask.astype(float), places.T, order=1).min() >= 0.5 - 1e-5


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("way", [sink, source])
def test_deforming_an_image(dims, way):
    spatial = (60, 50, 40)[:dims] if dims < 3 else (20, 22, 18)
    rng, grid = np.random.default_rng(7), np.indices(spatial)
    middle = np.array(spatial) // 2
    mask = sum(((g - m) / (0.35 * n))**2 for g, m, n in zip(grid, middle, spatial)) <= 1
    image, kept = rng.normal(size=(2, *spatial)), None
    kept = image.copy()
    new = way(image, mask, middle, 2.0)
    assert np.array_equal(image, kept) and np.array_equal(new[:, ~mask], image[:, ~mask])
    assert np.abs(new - image)[:, mask].mean() > 0.1
    assert np.abs(new[(slice(None), *middle)] - image[(slice(None), *middle)]).max() < 1e-12
    assert np.abs(way(image, mask, middle, 1.0) - image).max() < 1e-10
    ramp = grid[0][None].astype(float)                                         # a cubic spline reads the coordinate itself back
    voxels, places = radial_coordinates(mask, middle, 2.0, way.__name__)
    deep = ndimage.distance_transform_edt(np.pad(mask, 1))[(slice(1, -1),) * dims] > 5
    got, expected = way(ramp, mask, middle, 2.0)[0], np.full(spatial, np.nan)
    expected[tuple(voxels.T)] = places[:, 0]
    if deep.any() and way is source: assert np.abs(got - expected)[deep].max() < 1e-2


BAD_DEFORM = {
    "the mask is empty": dict(mask=np.zeros((20, 20))), "the mask is full": dict(mask=np.ones((20, 20))), "beside an image": dict(mask=np.ones((19, 20))),
    "not in the mask": dict(center=(1, 1)), "not in the mask ": dict(center=(np.nan, 10)), "not in the mask  ": dict(center=(10,)),
    "NaN": dict(image=np.full((1, 20, 20), np.nan)), "1 to 3 spatial axes": dict(image=np.ones((1, 2, 2, 2, 2))),
    "a positive number": dict(factor=0), "a positive number ": dict(factor=-2.0), "a positive number  ": dict(factor=np.inf),
    "at least 3 voxels": dict(mask=np.pad(np.ones((2, 8)), ((9, 9), (6, 6))), center=(9, 9)),
}


@pytest.mark.parametrize("words", BAD_DEFORM)
@pytest.mark.parametrize("way", [sink, source])
def test_bad_input_of_deforming_is_named(words, way):
    given = dict(image=np.zeros((1, 20, 20)), mask=np.pad(np.ones((10, 10)), 5), center=(10, 10), factor=2.0) | BAD_DEFORM[words]
    with pytest.raises(InputError, match=words.strip()): way(**given)


def test_push_factor():
    for a in (2.0, 9.0, 40.0):
        for share in (0.1, 0.5, 0.9):
            q = share * a / np.sqrt(2)
            f, k = push_factor(q, a), q / (np.sqrt(2) * a)
            assert abs((0.5 + k)**f - (0.5 - k)) < 1e-12
    assert abs(push_factor(0.1 / np.sqrt(2), 1) - 1.34) < 0.01 and abs(push_factor(0.9 / np.sqrt(2), 1) - 58.4) < 0.1
    with pytest.raises(ParameterError): push_factor(1, 1)
    with pytest.raises(ParameterError): push_factor(-1, 10)


# ---------------------------------------------------------------- whole tasks

@pytest.mark.parametrize("spatial", [(40, 48), (22, 26, 24)])
@pytest.mark.parametrize("kind", [IntraBlend, InterBlend, Sink, Source])
@pytest.mark.parametrize("channels", [1, 2])
def test_tasks_keep_the_contract(spatial, kind, channels):
    samples, strangers = Set(spatial, channels=channels), Set(tuple(n + 7 for n in spatial), channels=channels, name="far")
    task = kind().bind(samples).with_external(strangers)
    for seed in range(4):
        made = check_task(task, samples[0], seed)
        assert made["target"].max() > 0 and (made["image"] != made["clean"]).any()
        if "Blend" in kind.__name__:
            axes = tuple(range(1, made["image"].ndim))
            assert (made["image"].min(axes) >= samples[0]["image"].min(axes)).all() and (made["image"].max(axes) <= samples[0]["image"].max(axes)).all()
        again = task(samples[0], np.random.default_rng(seed))
        assert again["image"].tobytes() == made["image"].tobytes() and again["target"].tobytes() == made["target"].tobytes()


def test_tasks_refuse_what_does_not_match():
    flat, deep = Set((30, 30)), Set((20, 20, 20))
    with pytest.raises(PoolError): IntraBlend()(flat[0], np.random.default_rng(0))
    with pytest.raises(PoolError): InterBlend()(flat[0], np.random.default_rng(0))
    with pytest.raises(InputError): InterBlend().with_external(deep)(flat[0], np.random.default_rng(0))
    with pytest.raises(InputError): InterBlend().with_external(Set((30, 30), channels=2))(flat[0], np.random.default_rng(0))
    with pytest.raises(DataError, match="channel"): IntraBlend().bind(Set((30, 30), channels=2))(dict(flat[0], subject="x"), np.random.default_rng(0))
    with pytest.raises(ParameterError): Sink(factor="pull")
    with pytest.raises(ParameterError): Source(push=(5, 1))
    for task in (Sink(), IntraBlend().bind(flat)):
        for broken in (dict(image=flat[0]["image"] * np.nan), dict(image=flat[0]["image"] * 0), dict(foreground=flat[0]["foreground"] & False)):
            with pytest.raises(DataError): task(dict(flat[0], **broken), np.random.default_rng(0))


def test_tiny_shapes_do_no_harm():
    "A shape of three voxels a side, every centre, both ways: finite, and never a change outside of the mask."
    for kind in ("box", "ellipse"):
        s = make_shape(kind, (3, 3, 3))
        content = np.random.default_rng(8).normal(size=(1, *s.mask.shape)).astype(np.float32)
        for c in np.argwhere(s.mask):
            for way in ("sink", "source"):
                new = deformation.warp_shape(content, s, c, 3.0, way)
                assert np.isfinite(new).all() and np.array_equal(new[0][~s.mask], content[0][~s.mask])
            assert np.isfinite(Source().draw_factor(s.mask, c, np.random.default_rng(0)))
    one = np.zeros((3, 3), bool); one[1, 1] = True
    assert Source().draw_factor(one, (1, 1), np.random.default_rng(0)) == 1.0


@pytest.mark.parametrize("spatial", [(64, 72), (24, 30, 26)])
def test_the_reference_of_the_benchmark_gives_the_same_anomalies(spatial, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    from reference_tasks import REFERENCE
    samples, strangers = Set(spatial), Set(spatial, name="far")
    for name, kind in dict(intra=IntraBlend, inter=InterBlend, sink=Sink, source=Source, smooth=SmoothIntensity).items():
        task = kind().bind(samples).with_external(strangers)
        for seed in range(5):
            ours = task(samples[0], np.random.default_rng(seed))
            image, target = REFERENCE[name](task, samples[0], np.random.default_rng(seed))
            assert np.quantile(np.abs(ours["image"] - image), 0.999) <= 1e-3, (name, seed)
            assert np.quantile(np.abs(ours["target"] - target), 0.999) <= 1e-3, (name, seed)
            assert np.abs(ours["image"] - ours["clean"]).max() > 0.01
