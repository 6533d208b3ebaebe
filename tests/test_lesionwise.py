"""FROC, PIMO, surface distances, thirds of lesions and thresholds with a promise against slow second implementations."""
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from anomaly_nb.core import DataError
from anomaly_nb.methods.dial import half_points
from anomaly_nb.methods.clusters import THIRDS, lesion_table, thirds_of
from anomaly_nb.metrics.conformal import benjamini_hochberg, conformal_p, subject_threshold
from anomaly_nb.metrics.detectability import Psychometric, bootstrap_psychometric, fit_psychometric
from anomaly_nb.metrics.froc import Detections, bootstrap_froc, detections_of, froc
from anomaly_nb.metrics.pimo import aupimo
from anomaly_nb.metrics.regions import region_counts
from anomaly_nb.metrics.surface import surface_distances

SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def maps(draw, n=3, side=7, dims=2):
    "Masks with diagonal neighbours, maps with few levels (ties everywhere)."
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    shape = (n, *(side,) * dims)
    return rng.random(shape) < draw(st.sampled_from([0.1, 0.25])), rng.integers(0, draw(st.sampled_from([2, 4, 30])), shape).astype(np.float32), rng.random(shape) < 0.9


def slow_froc(masks, scores, inside, threshold, k):
    "Each cluster by itself, each cut by itself; full connectivity."
    full, clusters, lesions = np.ones((3,) * masks[0].ndim), [], []
    for m, s, f in zip(masks, scores, inside):
        marks, C = ndimage.label((s >= threshold) & f, full)
        truth, R = ndimage.label(m & f, full)
        found = [(s[marks == c].max(), set(np.unique(truth[marks == c])) - {0}) for c in range(1, C + 1)]
        clusters += [value for value, met in found if not met]
        lesions += [max((value for value, met in found if r in met), default=-np.inf) for r in range(1, R + 1)]
    best = 0.0
    for t in [*{*clusters, *lesions} - {-np.inf}]:
        if sum(v >= t for v in clusters) / len(masks) <= k: best = max(best, sum(v >= t for v in lesions) / len(lesions))
    return best


@SETTINGS
@given(drawn=maps(), k=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_froc_counts_as_one_does_by_hand(drawn, k):
    masks, scores, inside = drawn
    assume((masks & inside).any())
    found = [detections_of(m, s, 1.0, f) for m, s, f in zip(masks, scores, inside)]
    assert froc(found).at(k) == pytest.approx(slow_froc(masks, scores, inside, 1.0, k))
    assert bootstrap_froc(found, np.ones((1, len(found)), int), k)[0] == pytest.approx(froc(found).at(k))


@SETTINGS
@given(drawn=maps(n=4), weights=st.lists(st.integers(0, 3), min_size=4, max_size=4), k=st.sampled_from([0.0, 0.6, 2.0]))
def test_a_weighted_froc_is_that_of_repeated_people(drawn, weights, k):
    masks, scores, inside = drawn
    assume(sum(weights))
    found = [detections_of(m, s, 1.0, f) for m, s, f in zip(masks, scores, inside)]
    repeated = [d for d, w in zip(found, weights) for _ in range(w)]
    ours = bootstrap_froc(found, np.array([weights]), k)[0]
    if sum(len(d.lesion_sizes) for d in repeated): assert ours == pytest.approx(froc(repeated).at(k))
    else: assert math.isnan(ours)


@SETTINGS
@given(drawn=maps(n=2), seed=st.integers(0, 99), levels=st.sampled_from([3, 50]))
def test_aupimo_is_its_definition(drawn, seed, levels):
    "Thresholds one by one; on a step function the mean over rates evenly spaced in the logarithm converges to the area."
    masks, _, _ = drawn
    rng, low, high = np.random.default_rng(seed), 0.05, 0.6
    normal, scores = rng.integers(0, levels, (3, 8, 8)).astype(float), rng.integers(0, levels + 3, masks.shape).astype(float)
    assume(all(m.any() for m in masks))
    t = np.unique(normal)[::-1]
    F = np.array([np.mean([(x >= v).mean() for x in normal]) for v in t])
    if F[0] > low:
        with pytest.raises(DataError, match="lower limit"): aupimo(masks, scores, normal, limits=(low, high))
        return
    z = np.exp(np.linspace(math.log(low), math.log(high), 4001))
    last = np.searchsorted(F, z, "right")                                       # how many thresholds are allowed
    bound = np.append(t, -np.inf)[last]
    for m, s, area in zip(masks, scores, aupimo(masks, scores, normal, limits=(low, high))):
        assert area == pytest.approx(np.mean([(s[m] > b).mean() for b in bound]), abs=3e-3)


@SETTINGS
@given(m=st.integers(5, 60), alpha=st.sampled_from([0.05, 0.1, 0.2, 0.5]), seed=st.integers(0, 99), levels=st.sampled_from([3, 1000]))
def test_a_subject_threshold_alarms_where_the_p_value_does(m, alpha, seed, levels):
    rng = np.random.default_rng(seed)
    calibration = rng.integers(0, levels, m).astype(float)
    if m < math.ceil(1 / alpha - 1e-9) - 1:
        with pytest.raises(DataError, match="at least"): subject_threshold(calibration, alpha)
        return
    t = subject_threshold(calibration, alpha)
    for score in np.arange(-1, levels + 1) if levels < 10 else rng.uniform(-1, levels, 30): assert (score > t) == (conformal_p(score, calibration) <= alpha + 1e-12)


@SETTINGS
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=30), q=st.sampled_from([0.05, 0.2]))
def test_benjamini_hochberg_is_its_definition(p, q):
    p = np.array(p)
    k = max((i for i in range(1, len(p) + 1) if np.sort(p)[i - 1] <= q * i / len(p)), default=0)
    assert benjamini_hochberg(p, q).tolist() == [bool(k) and v <= np.sort(p)[k - 1] for v in p]


@SETTINGS
@given(drawn=maps(), overlap=st.sampled_from([0.0, 0.3, 0.7]), min_size=st.sampled_from([1, 3]))
def test_false_clusters_are_those_of_the_counts_at_one_threshold(drawn, overlap, min_size):
    "A cluster that touches a lesion is never false, however much of it is asked for."
    masks, scores, inside = drawn
    found = [detections_of(m, s, 1.0, f, min_size=min_size, overlap=overlap) for m, s, f in zip(masks, scores, inside)]
    counts = region_counts(masks, scores, 1.0, inside, overlap, min_size)
    assert sum(d.false.sum() for d in found) == counts.false_marks
    assert sum(np.isfinite(d.found_at).sum() for d in found) <= counts.found      # one cluster alone has to cover the share here


@SETTINGS
@given(ml=st.lists(st.integers(1, 6), min_size=1, max_size=40))
def test_thirds_keep_equal_volumes_together_where_their_middle_rank_lies(ml):
    ml, third = np.array(ml, float), thirds_of(np.array(ml, float))
    for v in np.unique(ml):
        ranks = np.flatnonzero(np.sort(ml) == v)
        middle = (ranks[0] + ranks[-1] + 1) / 2
        assert set(third[ml == v]) == {sum(3 * middle >= n * len(ml) for n in (1, 2))}
    assert (np.diff(third[np.argsort(ml, kind="stable")]) >= 0).all()


def test_the_thirds_of_a_table_hold_every_lesion_once():
    rng, found = np.random.default_rng(0), []
    for i in range(30):
        sizes = rng.choice([2, 5, 9, 40], rng.integers(0, 4))
        found.append((SimpleNamespace(id=f"c{i}", subject=f"s{i // 2}", meta={"family": "a" if i % 2 else "b", "spacing": (1.0, 1.0, 1.0)}),
                      Detections(np.ones(2), np.ones(2, int), np.array([True, False]), sizes, np.where(rng.random(len(sizes)) < 0.5, 1.0, -np.inf))))
    table = lesion_table(found, n_boot=20).set_index("group")
    thirds = table.loc[[name for name in THIRDS if name in table.index]]
    assert thirds["lesions"].sum() == table.loc["all", "lesions"] == sum(len(d.lesion_sizes) for _, d in found)
    assert (thirds["ml_low"].to_numpy()[1:] > thirds["ml_high"].to_numpy()[:-1]).all()
    assert table.loc["all", "people"] <= 15                                        # two cases a person
    assert np.average(thirds["sensitivity"], weights=thirds["lesions"]) == pytest.approx(table.loc["all", "sensitivity"])


@pytest.mark.parametrize("shape, spacing", [((16, 18), (1.0, 2.5)), ((9, 12, 11), (3.0, 1.0, 1.5))])
def test_surface_distances_are_the_metrics_of_monai(shape, spacing):
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    def blob(seed): return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2) > 0.02
    masks, marks = np.stack([blob(i) for i in range(6)]), np.stack([blob(i + 50) for i in range(6)])
    inside = np.ones(masks.shape, bool); inside[..., :2] = False
    for percentile, tolerance in ((95, 2.0), (100, 0.0), (50, 3.5)):
        ours = surface_distances(masks, marks, spacing, tolerance, inside, percentile)
        a, b = (torch.from_numpy((x & inside)[:, None]) for x in (masks, marks))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)                         # MONAI hands itself an argument that it has deprecated
            far = compute_hausdorff_distance(b, a, include_background=True, percentile=percentile, spacing=spacing)[:, 0]
            near = compute_surface_dice(b, a, [tolerance], include_background=True, spacing=spacing)[:, 0]
        assert [d.hausdorff95 for d in ours] == pytest.approx(far.tolist(), rel=1e-5)
        assert [d.surface_dice for d in ours] == pytest.approx(near.tolist(), rel=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_a_psychometric_fit_is_the_likeliest_of_a_fine_grid(seed):
    "Few lesions, guessing above and below the shares found: several hills, flat and separated data."
    rng = np.random.default_rng(seed)
    guess, levels = rng.choice([0, 0.1, 0.3, 0.6]), np.linspace(-4, 2, rng.integers(3, 8))
    x = np.repeat(levels, rng.integers(1, 12))
    found = rng.random(len(x)) < Psychometric(rng.uniform(-5, 5), rng.uniform(0.1, 1.5), guess * rng.choice([0.3, 1]))(x)
    fit = fit_psychometric(x, found, guess)
    def cost(share): return -np.where(found, np.log(np.clip(share, 1e-9, 1)), np.log(np.clip(1 - share, 1e-9, 1))).mean()
    best = min(cost(Psychometric(x50, 0.06 + w, guess)(x)) for x50 in np.r_[np.linspace(-8, 6, 113), -60, 60] for w in (0, 0.02, 0.1, 0.3, 1, 3, 10, 30))
    assert cost(fit(x)) < best + 1e-4


def test_a_share_below_the_guess_may_still_have_a_threshold():
    x = np.repeat(np.arange(7.0), 20)
    assert 5 < fit_psychometric(x, x == 6, 0.2).x50 < 6
    assert fit_psychometric(x, x == 0, 0.2).x50 == math.inf and fit_psychometric(x, x < 0, 0.2).x50 == math.inf and fit_psychometric(x, x >= 0, 0.2).x50 == -math.inf
    with pytest.raises(DataError, match="weights"): fit_psychometric(x, x == 6, weights=np.full(len(x), np.nan))


def test_a_draw_of_people_has_its_own_guess():
    rng = np.random.default_rng(0)
    x, who, found = np.tile(np.arange(5.0), 20), np.repeat(np.arange(20), 5), rng.random(100) < 0.6
    weights = rng.multinomial(20, np.full(20, 1 / 20), 6)
    guesses = np.array([0.0, 0.1, 0.2, 0.3, 0.0, 0.1])
    assert bootstrap_psychometric(x, found, who, weights, guesses).tolist() == [bootstrap_psychometric(x, found, who, w[None], g)[0] for w, g in zip(weights, guesses)]
    with pytest.raises(DataError, match="one a draw"): bootstrap_psychometric(x, found, who, weights, guesses[:2])


def test_half_points_with_nothing_to_find_and_beyond_the_dial():
    rows = pd.DataFrame([{"kind": "k", "family": "f", "subject": f"s{s}", "value": v, "found": v > 0 or s < 5} for s in range(20) for v in (0.0, 0.5, 1.0)])
    all_found, chance, nothing = (half_points(rows.assign(found=f), "contrast", 40).iloc[0] for f in (rows["found"], True, rows["value"] == 0))
    assert (all_found["half"], all_found["low"], all_found["high"], all_found["guess"]) == (0, 0, 0, 0.25)
    assert np.isnan([chance["half"], chance["low"], chance["high"]]).all() and chance["guess"] == 1
    assert np.isnan(nothing["half"])
    assert math.isinf(half_points(rows.assign(found=(rows["value"] == 0) & rows["found"]), "contrast", 40)["half"][0])


def test_a_threshold_of_nan_is_refused():
    with pytest.raises(DataError, match="NaN"): subject_threshold([*range(30), math.nan])
