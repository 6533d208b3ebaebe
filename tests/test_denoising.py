"""Coarse noise, the denoising autoencoder and post-processing: second implementations of what they are made of, odd sizes, bad input."""
import json
import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from anomaly_nb.core import DataError, ParameterError, collate, rng_of, seed_everything
from anomaly_nb.methods.postprocess import STEPS, eroded, median_inside, opened, postprocess, read_steps, smoothed
from anomaly_nb.models.checks import check_model
from anomaly_nb.models.denoising import DenoisingAutoencoder
from anomaly_nb.tasks.noise import CoarseNoise, stretch, value_range
from anomaly_nb.tasks.task import check_task

SPATIAL = [(40, 40), (21, 18), (10, 13, 9), (7, 20, 1)]


def person(spatial, channels=1, seed=0):
    "Smooth noise in a round organ, nothing outside."
    rng = np.random.default_rng(seed)
    organ = (sum(g**2 for g in np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in spatial), indexing="ij")) < .8)[None]
    image = ndimage.gaussian_filter(rng.normal(size=(channels, *spatial)), (0,) + (1,)*len(spatial))
    return dict(image=(image/image.std()*organ).astype(np.float32), foreground=organ, valid=np.ones_like(organ), mask=np.zeros_like(organ), mask_known=True, label=0, id=f"p{seed}", subject=f"s{seed}", meta={})


def scores(spatial, seed=0, levels=None):
    "A map [*spatial], with plateaus if `levels`, and an organ with a ragged edge and islands."
    rng = np.random.default_rng(seed)
    A = ndimage.gaussian_filter(rng.normal(size=spatial), 0.8)
    A = (A - A.min()) / np.ptp(A)
    if levels: A = np.floor(A * levels) / levels
    return A.astype(np.float32), ndimage.gaussian_filter(rng.normal(size=spatial), 1.5) > -0.1


# --- post-processing

def opened_slowly(A, inside, n):
    "The definition: at every level that occurs, threshold, label, keep what is large."
    out = np.where(inside, min(0, A[inside].min()), A)
    for level in np.unique(A[inside]):
        labels, count = ndimage.label(inside & (A >= level), np.ones((3,) * A.ndim))
        large = np.flatnonzero(np.bincount(labels.ravel(), minlength=count + 1)[1:] >= n) + 1
        out[np.isin(labels, large)] = level
    return out


@pytest.mark.parametrize("spatial", ((17, 22), (7, 9, 8), (1, 30), (3, 3)))
@pytest.mark.parametrize("levels", (None, 4))
@pytest.mark.parametrize("n", (2, 3, 7, 30, 10**6))
def test_area_opening_against_every_threshold(spatial, levels, n):
    A, inside = scores(spatial, n % 13, levels)
    inside[tuple(s // 2 for s in spatial)] = True              # never empty
    np.testing.assert_array_equal(opened(A, inside, n), opened_slowly(A, inside, n))
    np.testing.assert_array_equal(opened(A - 2, inside, n), opened_slowly(A - 2, inside, n))    # negative scores


def test_area_opening_joins_nothing_across_the_image_border_or_outside():
    A = np.zeros((4, 6), np.float32)
    A[0, 5] = A[1, 0] = 1                                        # neighbours in memory, not in the image
    assert not opened(A, np.ones_like(A, bool), 2).any()
    A = np.array([[1, 1, 0, 1, 1]], np.float32)
    assert not opened(A, A > 0, 3).any()


@pytest.mark.parametrize("spatial, flat", (((17, 22), False), ((7, 9, 8), False), ((7, 9, 8), True), ((2, 5), False)))
@pytest.mark.parametrize("n", (3, 5))
def test_median_against_a_loop(spatial, flat, n):
    A, inside = scores(spatial)
    half = [0 if flat and axis < A.ndim - 2 else n // 2 for axis in range(A.ndim)]
    expected = A.copy()
    for p in np.argwhere(inside):
        box = tuple(slice(max(c - h, 0), c + h + 1) for c, h in zip(p, half))
        expected[tuple(p)] = np.median(A[box][inside[box]])
    np.testing.assert_allclose(median_inside(A, inside, n, flat, rows=50), expected, atol=1e-6)


def test_smoothing_against_a_sum():
    A, inside = scores((15, 12))
    where = np.argwhere(inside)
    for p in where[::7]:
        weight = np.exp(-((where - p)**2 / (2 * 1.2**2)).sum(1)) * (np.abs(where - p).max(1) <= int(4 * 1.2 + .5))
        assert smoothed(A, inside, 1.2)[tuple(p)] == pytest.approx((A[inside] * weight).sum() / weight.sum(), abs=1e-5)
    np.testing.assert_array_equal(smoothed(A, inside, 1.2)[~inside], A[~inside])


def test_erosion_against_a_structuring_element():
    A, inside = scores((9, 12, 11), 3)
    for n in (1, 2):
        np.testing.assert_array_equal(eroded(A, inside, n)[1], ndimage.binary_erosion(inside, np.ones((2*n + 1,)*3)))
        np.testing.assert_array_equal(eroded(A, inside, n, flat=True)[1], ndimage.binary_erosion(inside, np.ones((1, 2*n + 1, 2*n + 1))))


@pytest.mark.parametrize("steps", ("erode=1", "slice_erode=1", "median=3", "slice_median=3", "smooth=1", "components=4", "erode=1 median=3 smooth=0.7 components=4"))
def test_outside_stays_lowest_and_input_untouched(steps):
    A, inside = scores((9, 12, 11), 5)
    for shift in (0, -3):
        B, F = (A + np.float32(shift)), inside.copy()
        before = B.copy()
        B.flags.writeable = F.flags.writeable = False
        out = postprocess(B, F, steps)
        assert out.dtype == np.float32 and out.shape == B.shape and np.isfinite(out).all()
        assert (out[~F] <= out[F].min()).all() and (shift or not out[~F].any())
        np.testing.assert_array_equal(B, before)
    np.testing.assert_array_equal(postprocess(A * np.where(inside, 1, np.nan), inside, steps), postprocess(A * inside, inside, steps))   # what lies outside has no say


def test_a_constant_map_stays_constant():
    inside = scores((9, 12, 11), 5)[1]
    for steps in ("median=5", "smooth=2", "components=2"):
        labels, _ = ndimage.label(inside, np.ones((3, 3, 3)))
        alone = inside & (np.bincount(labels.ravel())[labels] < 2)
        np.testing.assert_allclose(postprocess(np.full(inside.shape, 2.0), inside, steps)[inside & ~alone], 2.0, rtol=1e-6)


def test_steps_in_the_order_written():
    A, inside = scores((20, 20))
    one, two = postprocess(A, inside, "erode=1 median=3"), postprocess(A, inside, "median=3 erode=1")
    assert (one != two).any()
    B, left = eroded(np.where(inside, A, 0), inside, 1)
    np.testing.assert_array_equal(one, median_inside(B, left, 3))


@pytest.mark.parametrize("text, message", (("erod=1", "did you mean 'erode'"), ("erode", "no value"), ("erode=", "''"), ("erode=one", "'one'"), ("median=6", "odd"), ("median=2.5", "whole"), ("components=1", "from 2"),
                                           ("smooth=-1", "from 0.001"), ("smooth=inf", "inf"), ("=3", "there is no ''"), ("none erode=1", "there is no 'none'")))
def test_wrong_steps_are_named(text, message):
    with pytest.raises(ParameterError, match="postprocess") as error: read_steps(text)
    assert message in str(error.value)


def test_every_step_can_be_switched_off():
    assert read_steps(" ".join(f"{name}=0" for name in STEPS)) == ()
    assert read_steps([("median", 3)]) == (("median", 3),)


@pytest.mark.parametrize("change, message", ((dict(foreground=np.zeros((8, 8), bool)), "empty"), (dict(anomaly_map=np.full((8, 8), np.nan)), "NaN"), (dict(anomaly_map=np.ones((8, 9))), "one shape"),
                                             (dict(anomaly_map=np.ones(8), foreground=np.ones(8)), "2 or 3 axes"), (dict(steps="erode=4"), "leaves nothing of a foreground of 64")))
def test_bad_maps_are_named(change, message):
    with pytest.raises(DataError, match="postprocess") as error: postprocess(**(dict(anomaly_map=np.ones((8, 8)), foreground=np.ones((8, 8), bool), steps="median=3") | change))
    assert message in str(error.value)


# --- noise

@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("channels", (1, 3))
def test_noise_keeps_the_contract_of_tasks(spatial, channels):
    for seed in range(3): check_task(CoarseNoise(), person(spatial, channels, seed), seed)


def test_noise_is_the_papers():
    "In an image with the range 1, against the formula step by step with torch; the same draws in the same order."
    sample = person((128, 128), 2)
    sample["image"] /= value_range(sample["image"], sample["foreground"][0]).reshape(2, 1, 1).astype(np.float32)
    made, rng = CoarseNoise()(sample, np.random.default_rng(4)), np.random.default_rng(4)
    eps = torch.tensor(rng.normal(size=(2, 16, 16))) * 0.2
    wide = torch.nn.functional.interpolate(eps[None], size=(128, 128), mode="bilinear", align_corners=True)[0]
    noise = torch.roll(wide, [int(rng.integers(128)), int(rng.integers(128))], [1, 2]).numpy() * sample["foreground"]
    np.testing.assert_allclose(made["image"] - sample["image"], noise, atol=2e-6)


def test_noise_is_normal_centred_and_everywhere_alike():
    sample, task = person((24, 20)), CoarseNoise(cells=5)
    inside = sample["foreground"][0]
    draws = np.stack([(task(sample, np.random.default_rng(i))["image"] - sample["image"])[0] for i in range(500)])
    each = draws[:, inside]
    assert abs(each.mean()) < 0.08 * each.std()
    assert each.std(0).max() < 1.2 * each.std() and each.std(0).min() > 0.8 * each.std()       # no voxel is spared: the roll
    fixed = np.stack([(CoarseNoise(cells=5, roll=False)(sample, np.random.default_rng(i))["image"] - sample["image"])[0] for i in range(500)])[:, inside]
    assert fixed.std(0).min() < 0.7 * fixed.std(0).max()
    assert stats.kurtosis(fixed[:, 0]) == pytest.approx(0, abs=0.5)


def test_noise_of_nothing():
    sample = person((20, 20))
    for changed in (sample | {"foreground": np.zeros_like(sample["foreground"])}, sample | {"image": np.full_like(sample["image"], 3)}):
        made = check_task(CoarseNoise(), changed)
        np.testing.assert_array_equal(made["image"], changed["image"])
        assert not made["target"].any()
    assert stretch(np.ones((1, 3, 3)), (1, 7)).shape == (1, 1, 7)


@pytest.mark.parametrize("bad", (dict(sigma=-1), dict(sigma=float("inf")), dict(cells=0), dict(cells=1.5), dict(width=0)))
def test_wrong_noise_is_named(bad):
    with pytest.raises(ParameterError, match=f"CoarseNoise: {next(iter(bad))}"): CoarseNoise(**bad)


# --- the model

def noisy(spatial, channels=1, count=6): return collate([CoarseNoise()(person(spatial, channels, i), rng_of("noise", i)) for i in range(count)])


@pytest.mark.parametrize("spatial, channels, predict", (((21, 18), 1, "noise"), ((21, 18), 2, "image"), ((10, 13, 9), 1, "noise")))
def test_shared_check(spatial, channels, predict):
    check_model(lambda: DenoisingAutoencoder(channels, len(spatial), spatial, widths=(4, 8, 8), predict=predict), noisy(spatial, channels))


def test_loss_is_the_mean_over_the_organ_and_channels():
    batch = noisy((16, 19), 2, 3)
    seed_everything(0)
    model = DenoisingAutoencoder(2, 2, widths=(4, 8)).eval()
    with torch.no_grad(): f, loss = model.restore(batch["image"] * batch["foreground"]), model.loss(batch)
    inside = batch["foreground"].expand_as(f)
    assert float(loss) == pytest.approx(float(((f - batch["clean"])[inside]**2).mean()), rel=1e-5)
    with torch.no_grad(): A = model.score(batch | {"image": batch["clean"]})["anomaly_map"]
    with torch.no_grad(): expected = (batch["clean"] - model.restore(batch["clean"])).abs().mean(1, keepdim=True)
    torch.testing.assert_close(A[batch["foreground"]], expected[batch["foreground"]])


def test_loss_reaches_the_floor_of_the_conditional_mean_and_not_below():
    "White tissue of variance 1 and white noise of variance 1/2: nothing better than tau^2 s^2 / (tau^2 + s^2) = 1/3 can be learned, a copy has 1/2."
    seed_everything(0)
    model, losses = DenoisingAutoencoder(1, 2, widths=(4, 8)), []
    optimizer, F = torch.optim.Adam(model.parameters(), lr=1e-2), torch.ones(8, 1, 16, 16, dtype=torch.bool)
    for _ in range(100):
        clean = torch.randn(8, 1, 16, 16)
        loss = model.loss(dict(image=clean + 0.5**0.5 * torch.randn_like(clean), clean=clean, foreground=F))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(0.5, abs=0.1) and 0.31 < np.mean(losses[-20:]) < 0.4


def test_missing_clean_and_wrong_parameters_are_named():
    batch = noisy((16, 16), count=2)
    with pytest.raises(ParameterError, match="task=noise"): DenoisingAutoencoder().loss({k: v for k, v in batch.items() if k != "clean"})
    with pytest.raises(ParameterError, match="predict"): DenoisingAutoencoder(predict="x")
    with pytest.raises(ParameterError, match="widths"): DenoisingAutoencoder(widths=(4,))


def test_empty_foreground_and_constant_images_give_finite_numbers():
    batch = noisy((16, 16), count=2)
    model = DenoisingAutoencoder(widths=(4, 8)).eval()
    nothing = batch | {"foreground": torch.zeros_like(batch["foreground"])}
    with torch.no_grad():
        assert float(model.loss(nothing)) == 0 and not model.score(nothing)["anomaly_map"].any()
        flat = model.score(batch | {"image": torch.full_like(batch["image"], 2.0)})
    assert flat["anomaly_map"].isfinite().all() and flat["anomaly_score"].isfinite().all()


def test_a_folder_of_maps_is_processed_once_more(tmp_path):
    """A folder that `predict` filled: the same maps as one by one, scores of slices that make up their volume's, a second call in place of the first."""
    from anomaly_nb.experiment import load_records, make_data, make_model
    from anomaly_nb.methods.postprocess import postprocess_folder
    from anomaly_nb.models.fit import predict
    records = load_records("brain", "tiny", "FLAIR")
    data = make_data({pool: items[:2] for pool, items in records.items()}, batch_size=64)
    predict(make_model("random", data), data.loader("test"), tmp_path)
    slices = data.pools["test"].dataset if hasattr(data.pools["test"], "dataset") else data.pools["test"]
    rows = {(r["id"], r["kind"]): r for r in postprocess_folder(tmp_path, slices, "erode=1 smooth=1")}
    assert {kind for _, kind in rows} == {"random", "random-post"} and len(rows) == 4
    pieces = [p for p in json.loads((tmp_path / "pieces.json").read_text()) if p["kind"] == "random-post"]
    assert len(pieces) == len(slices)
    volume = slices.volumes[0]
    inside, row = volume["foreground"][0], rows[volume["id"], "random-post"]
    direct = postprocess(np.load(rows[volume["id"], "random"]["map"])[0], inside, "erode=1 smooth=1")
    assert np.array_equal(np.load(row["map"])[0], direct) and row["score"] == pytest.approx(direct[inside].mean(), rel=1e-5)
    own = [slices[i] for i in range(len(slices)) if slices[i]["meta"]["volume"] == volume["id"]]
    mean = {p["id"]: p["score"] for p in pieces}
    assert sum(mean[s["id"]] * s["foreground"].sum() for s in own) == pytest.approx(direct[inside].sum(), rel=1e-4)
    assert len(postprocess_folder(tmp_path, slices, "erode=1")) == 4
