"""Heatmaps, the chain of levels, named instances and calibration: against slow loops, brute force and scikit-learn, and with bad input."""
import functools
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import brier_score_loss, cohen_kappa_score

from anomaly_nb.core import DataError, ParameterError
from anomaly_nb.metrics.calibration import brier_score, expected_calibration_error, quadratic_kappa, reliability
from anomaly_nb.metrics.instances import bootstrap_instances, detection_rate, extra_instances, identification_rate, instance_intervals, localisation_error, match_instances
from anomaly_nb.metrics.uncertainty import bootstrap_statistic, subject_weights
from anomaly_nb.models.heatmaps import gaussian_targets, heatmap_loss, local_maxima
from anomaly_nb.models.levels import assign_levels, chain_value, order_upwards

torch.set_num_threads(1)


# ---- heatmaps

@pytest.mark.parametrize("shape, spacing", [((9, 7), (1.0, 1.0)), ((9, 7), (3.0, 0.7)), ((6, 7, 5), (1.0, 1.0, 1.0)), ((6, 7, 4), (1.5, 1.5, 4.0))])
def test_targets_equal_the_slow_loop(shape, spacing):
    rng = np.random.default_rng(0)
    B, K, C, sigma = 3, 5, 3, 2.5
    centres, channels = rng.uniform(-2, np.multiply(shape, spacing) + 2, (B, K, len(shape))), rng.integers(-1, C, (B, K))
    wanted = np.zeros((B, C, *shape))
    for b, k in np.ndindex(B, K):
        c = channels[b, k]
        if c < 0: continue
        for v in np.ndindex(*shape):
            wanted[(b, c, *v)] = max(wanted[(b, c, *v)], np.exp(-((np.multiply(v, spacing) - centres[b, k])**2).sum() / (2 * sigma**2)))
    for b, k in np.ndindex(B, K):
        at = np.floor(centres[b, k] / spacing + 0.5).astype(int)
        if channels[b, k] >= 0 and (at >= 0).all() and (at < shape).all(): wanted[(b, channels[b, k], *at)] = 1
    found = gaussian_targets(torch.tensor(centres), torch.tensor(channels), C, shape, spacing, sigma)
    assert found.dtype == torch.float32 and abs(found.numpy() - wanted).max() < 1e-6


def test_targets_do_not_depend_on_padding_or_order():
    centres, channels = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)) * 10, torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    plain = gaussian_targets(centres, channels, 2, (10, 10, 10), (1, 1, 1), 2.0)
    padded = gaussian_targets(torch.cat([centres, torch.full((2, 3, 3), torch.nan)], 1), torch.cat([channels, torch.full((2, 3), -1)], 1), 2, (10, 10, 10), (1, 1, 1), 2.0)
    assert torch.equal(plain, padded) and torch.equal(plain, gaussian_targets(centres.flip(1), channels.flip(1), 2, (10, 10, 10), (1, 1, 1), 2.0))
    assert gaussian_targets(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.long), 2, (3, 3, 3), (1, 1, 1), 2.0).shape == (2, 2, 3, 3, 3)


@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_the_slow_loop(masked):
    rng = np.random.default_rng(1)
    logits, target = torch.tensor(rng.normal(0, 2, (2, 2, 4, 5, 3))), gaussian_targets(rng.uniform(0, 3, (2, 2, 3)), [[0, 1], [1, -1]], 2, (4, 5, 3), (1, 1, 1), 1.0)
    known = torch.tensor(rng.random((2, 1, 4, 5, 3)) < 0.8)
    total, peaks = 0.0, 0
    for at in np.ndindex(*logits.shape):
        if masked and not known[(at[0], 0, *at[2:])]: continue
        p, y = 1 / (1 + np.exp(-logits[at].item())), target[at].item()
        total -= (1 - p)**2 * np.log(p) if y == 1 else (1 - y)**4 * p**2 * np.log(1 - p)
        peaks += y == 1
    assert heatmap_loss(logits, target, known if masked else None).item() == pytest.approx(total / max(peaks, 1), rel=1e-5)


def test_loss_is_finite_at_the_ends_and_in_low_precision():
    target = gaussian_targets([[[2.0, 2]], [[0.0, 0]]], [[0], [-1]], 1, (5, 5), (1, 1), 1.0)
    for value in (-1e4, -90.0, 0.0, 90.0, 1e4):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.full((2, 1, 5, 5), value, dtype=dtype, requires_grad=True)
            loss = heatmap_loss(logits, target)
            loss.backward()
            assert loss.isfinite() and loss >= 0 and logits.grad.isfinite().all()
    assert heatmap_loss(torch.zeros(2, 1, 5, 5), target, torch.zeros(2, 1, 5, 5, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("shape, spacing, sigma, radius", [((30, 34), (1.0, 1.0), 2.0, 6.0), ((30, 34), (3.0, 1.0), 4.0, 9.0), ((20, 22, 18), (1.0, 1.0, 1.0), 2.0, 5.0), ((26, 28, 8), (1.5, 1.5, 4.0), 4.0, 9.0)])
def test_centres_come_back(shape, spacing, sigma, radius):
    rng, spacing = np.random.default_rng(2), np.array(spacing)
    margin = np.minimum(3, (np.array(shape) - 1) / 2 - 1)
    for _ in range(12):
        c = rng.uniform(margin, np.array(shape) - 1 - margin) * spacing
        centres, values = local_maxima(gaussian_targets(c[None, None], [[0]], 1, shape, spacing, sigma)[0, 0], spacing, radius, 0.3)
        assert len(centres) == 1 and values[0] == 1 and (abs(centres[0].numpy() - c) / spacing).max() < 0.1


@pytest.mark.parametrize("shape, spacing", [((14, 15), (2.0, 1.0)), ((8, 9, 7), (1.0, 2.0, 3.0))])
def test_suppression_against_a_slow_one(shape, spacing):
    rng = np.random.default_rng(3)
    for digits in (1, 6):                                                     # one digit: many ties
        heat = np.round(rng.random(shape), digits).astype(np.float32)
        voxels = [v for v in np.ndindex(*shape) if heat[v] >= 0.5 and heat[v] >= heat[tuple(slice(max(i - 1, 0), i + 2) for i in v)].max()]
        kept = []
        for v in sorted(voxels, key=lambda v: (-heat[v], v)):
            if all(np.linalg.norm(np.multiply(v, spacing) - np.multiply(u, spacing)) > 4 for u in kept): kept.append(v)
        centres, values = local_maxima(heat, spacing, 4.0, 0.5, refine=False)
        assert np.allclose(centres.numpy(), np.multiply(kept, spacing)) and np.array_equal(values.numpy(), [heat[v] for v in kept])
        again = local_maxima(torch.tensor(heat), spacing, 4.0, 0.5), local_maxima(heat, spacing, 4.0, 0.5)
        assert torch.equal(again[0][0], again[1][0]) and torch.equal(again[0][1], values)
        inside = again[0][0].numpy()
        assert (inside >= 0).all() and (inside <= (np.array(shape) - 1) * spacing).all() and (abs(inside - centres.numpy()) <= 4 + 1e-4).all()


def test_a_thin_volume_and_its_border():
    for c in ([0.0, 5.0, 4.0], [9.0, 5.2, 0.0], [4.4, 0.3, 8.0]):
        found = local_maxima(gaussian_targets([[c]], [[0]], 1, (10, 12, 3), (1, 1, 4), 2.5)[0, 0], (1, 1, 4), 5.0, 0.3)[0]
        assert len(found) == 1 and (abs(found[0].numpy() - c) / (1, 1, 4)).max() <= 0.5
    one = local_maxima(torch.ones(1, 1, 1), (1, 1, 1), 2.0, 0.5)
    assert one[0].tolist() == [[0.0, 0.0, 0.0]] and one[1].tolist() == [1.0]


@pytest.mark.parametrize("call, said", [
    (lambda: gaussian_targets(torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long), 1, (4, 4, 4), (1, 1, 1), 1.0), r"\[B,K,3\] mm"),
    (lambda: gaussian_targets(torch.zeros(1, 2, 2), torch.zeros(1, 2), 1, (4, 4), (1, 1), 1.0), "integers"),
    (lambda: gaussian_targets(torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long), 1, (4, 4), (1, 1), 0.0), "sigma"),
    (lambda: gaussian_targets(torch.zeros(1, 2, 2), torch.full((1, 2), -2), 1, (4, 4), (1, 1), 1.0), "-1"),
    (lambda: local_maxima(torch.zeros(4, 4), (1, float("nan")), 1.0, 0.5), "spacing"),
    (lambda: local_maxima(torch.zeros(4, 4), (1, 1), float("nan"), 0.5), "radius_mm"),
    (lambda: local_maxima(torch.full((4, 4), float("inf")), (1, 1), 1.0, 0.5), "infinity"),
    (lambda: assign_levels(np.zeros((2, 0))), "L >= 1"), (lambda: assign_levels(np.full((2, 2), np.inf)), "infinity"),
    (lambda: assign_levels(np.zeros((2, 2)), gap=float("nan")), "gap"), (lambda: assign_levels(np.zeros((2, 2)), reject=float("inf")), "reject"),
    (lambda: chain_value(np.zeros((2, 2)), [0, 2]), "from -1 to 1"), (lambda: chain_value(np.zeros((2, 2)), [0.0, 1.0]), "integers"),
    (lambda: order_upwards(np.zeros((2, 3)), axis=3), "axis 3")])
def test_bad_input_is_named(call, said):
    with pytest.raises(ParameterError, match=said): call()


# ---- levels

@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_chain_against_brute_force(data):
    N, L = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
    scores = np.array(data.draw(st.lists(st.sampled_from([0.0, -0.5, -1.0, -2.0, -3.5, -7.0, -np.inf, 1.0]), min_size=N * L, max_size=N * L)), float).reshape(N, L)
    reject, gap = data.draw(st.sampled_from([0.0, 0.5, 2.0, 5.0])), data.draw(st.sampled_from([0.0, 0.5, 2.0]))
    best = max(chain_value(scores, np.array(a, int), reject, gap) for a in itertools.product(range(-1, L), repeat=N))
    found = assign_levels(scores, reject, gap)
    assert found.shape == (N,) and chain_value(scores, found, reject, gap) == pytest.approx(best, abs=1e-9)


def test_long_chains_against_a_plain_recursion():
    rng = np.random.default_rng(0)
    for _ in range(8):
        N, L = rng.integers(8, 16), rng.integers(6, 14)
        scores, reject, gap = rng.normal(-3, 2, (N, L)), rng.uniform(0, 5), rng.uniform(0, 4)

        @functools.cache
        def best(i, last):
            "The best value of candidates i.. after `last` was accepted (-1: none yet)."
            if i == N: return 0.0
            return max([best(i + 1, last) - reject] + [scores[i, l] - (gap * (l - last - 1) if last >= 0 else 0) + best(i + 1, l) for l in range(last + 1, L)])
        assert chain_value(scores, assign_levels(scores, reject, gap), reject, gap) == pytest.approx(best(0, -1), abs=1e-9)


def test_chain_does_not_see_a_shift_of_all_levels_when_ends_are_free():
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores = rng.normal(-3, 1, (6, 8))
        wide = np.full((6, 14), -np.inf); wide[:, 3:11] = scores
        found, moved = assign_levels(scores), assign_levels(wide)
        assert np.array_equal(np.where(found >= 0, found + 3, -1), moved)


def test_order_upwards():
    centres = np.array([[30.0, 1], [10, 2], [30, 3], [20, 0]])
    assert order_upwards(centres).tolist() == [1, 3, 0, 2] and order_upwards(torch.tensor(centres), axis=-1).tolist() == [3, 0, 1, 2]
    assert order_upwards(centres, axis=-2, rising=False).tolist() == [0, 2, 3, 1]                  # rows that run downwards; ties keep their order


# ---- instances

def test_rows_against_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(60):
        dim = rng.integers(2, 4)
        truth = {int(i): rng.uniform(0, 60, dim) for i in rng.permutation(9)[:rng.integers(0, 6)]}
        found = {int(i): rng.uniform(0, 60, dim) for i in rng.permutation(9)[:rng.integers(0, 6)]}
        rows = match_instances(found, truth, limit=25.0, subject="a")
        assert [r["id"] for r in rows] == sorted(truth) and extra_instances(found, truth) == sorted(set(found) - set(truth))
        for r in rows:
            gaps = {i: np.linalg.norm(c - truth[r["id"]]) for i, c in found.items()}
            assert r["found"] == (r["id"] in found) and r["nearest"] == pytest.approx(min(gaps.values(), default=np.inf))
            assert not gaps or gaps[r["nearest_id"]] == min(gaps.values())
            if not r["found"]: assert np.isnan(r["error"]) and not r["identified"]
            else:
                home = min(truth, key=lambda j: np.linalg.norm(truth[j] - found[r["id"]]))
                assert r["error"] == pytest.approx(gaps[r["id"]]) and r["identified"] == (gaps[r["id"]] <= 25 and home == r["id"])


def test_instances_by_weights_and_by_repetition():
    rng, rows = np.random.default_rng(1), []
    for s in range(9):
        truth = {i: np.array([30.0 * i, 0, 0]) for i in range(rng.integers(1, 6))}
        rows += match_instances({i + (s == 2): c + rng.normal(0, 8, 3) for i, c in truth.items() if rng.random() < 0.7}, truth, subject=s)
    W, names = subject_weights(9, 40, seed=1), sorted({str(r["subject"]) for r in rows})
    draws = bootstrap_instances(rows, W)
    for f in (localisation_error, identification_rate, detection_rate):
        slow = bootstrap_statistic(lambda picks: f([r for s in picks for r in rows if str(r["subject"]) == names[s]]), W)
        assert np.allclose(draws[f.__name__], slow, equal_nan=True)
    assert instance_intervals(rows, W)["identification_rate"].n_subjects == 9
    none = instance_intervals(match_instances({}, {1: [0.0, 0]}, subject="a"))
    assert np.isnan(none["localisation_error"].estimate) and none["localisation_error"].undefined == 1000 and none["identification_rate"].estimate == 0


# ---- calibration

def cases(seed, n=80, C=4):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(C), n), rng.integers(0, C, n), rng.integers(0, C, n), rng.integers(0, 4, (6, n))


@pytest.mark.parametrize("seed", range(4))
def test_brier_and_kappa_equal_scikit_learn(seed):
    p, a, b, W = cases(seed)
    every, kappas = brier_score(p, a, W), quadratic_kappa(a, b, 4, W)
    assert every.shape == kappas.shape == (6,)
    for w, s, k in zip(W, every, kappas):
        assert s == pytest.approx(brier_score_loss(a, p, sample_weight=w, labels=range(4), scale_by_half=False)) == brier_score(p, a, w)
        assert k == pytest.approx(cohen_kappa_score(a, b, weights="quadratic", sample_weight=w, labels=range(4))) == quadratic_kappa(a, b, 4, w)
    q, y = p[:, 0], a == 0
    assert brier_score(np.stack([1 - q, q], 1), y) == pytest.approx(2 * brier_score_loss(y, q))
    assert quadratic_kappa(a, b, 7) == pytest.approx(quadratic_kappa(a, b, 4))                    # classes nobody has change nothing


def test_kappa_where_nothing_can_disagree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(quadratic_kappa([1, 1], [1, 1], 3)) and np.isnan(cohen_kappa_score([1, 1], [1, 1], weights="quadratic", labels=range(3)))
    assert quadratic_kappa([0, 0], [2, 2], 3) == 0 == cohen_kappa_score([0, 0], [2, 2], weights="quadratic", labels=range(3))
    assert np.isnan(quadratic_kappa([0, 1], [0, 1], 2, [[1, 0], [0, 0]])).all()


@pytest.mark.parametrize("equal_mass", [False, True])
def test_reliability_equals_the_slow_loop(equal_mass):
    rng = np.random.default_rng(0)
    p, y, w = np.round(rng.random(120), 2), rng.random(120), rng.integers(0, 3, 120)              # two digits: values on the borders
    found = reliability(p, y, 8, equal_mass, w)
    error = 0.0
    for n, (low, high) in enumerate(zip(found["low"], found["high"])):
        inside = (p >= low) & ((p < high) | (n == len(found["low"]) - 1))
        assert found["count"][n] == w[inside].sum()
        if w[inside].sum():
            assert found["confidence"][n] == pytest.approx(np.average(p[inside], weights=w[inside])) and found["frequency"][n] == pytest.approx(np.average(y[inside], weights=w[inside]))
            error += w[inside].sum() / w.sum() * abs(found["confidence"][n] - found["frequency"][n])
    assert found["count"].sum() == w.sum() and expected_calibration_error(p, y, 8, equal_mass, w) == pytest.approx(error)


def test_weights_are_repetition():
    p, a, b, _ = cases(9)
    owner = np.random.default_rng(2).integers(0, 12, 80)
    W = subject_weights(12, 20, seed=5)
    for f in (lambda i, w: brier_score(p[i], a[i], w), lambda i, w: quadratic_kappa(a[i], b[i], 4, w), lambda i, w: expected_calibration_error(p[i, 0], a[i] == 0, w=w), lambda i, w: brier_score(p[i], p[::-1][i], w)):
        every = np.arange(80)
        slow = bootstrap_statistic(lambda picks: f(np.concatenate([np.flatnonzero(owner == s) for s in picks]), None), W)
        assert np.allclose(f(every, W[:, owner]), slow) and f(every, np.ones(80)) == pytest.approx(f(every, None))


@pytest.mark.parametrize("call, said", [
    (lambda: brier_score([0.2, 0.8], [0, 1]), r"\[n,C\]"), (lambda: brier_score([[0.5, 0.4]], [0]), "sums to 0.9"), (lambda: brier_score([[0.5, np.nan]], [0]), "NaN"),
    (lambda: brier_score([[-0.5, 1.5]], [0]), "outside"), (lambda: brier_score([[0.5, 0.5]], [2]), "0 to 1"), (lambda: brier_score([[0.5, 0.5]], [np.nan]), "whole numbers"),
    (lambda: brier_score([[0.5, 0.5]], [[1.0, 0, 0]]), "one shape"), (lambda: brier_score([[0.5, 0.5]], [0], w=[1, 2]), r"\[1\] or \[n_boot,1\]"),
    (lambda: reliability([], []), "at least 1"), (lambda: reliability([0.1, np.nan], [0, 1]), "NaN"), (lambda: expected_calibration_error([0.1], [2]), "outside"),
    (lambda: quadratic_kappa([], [], 3), "at least 1"), (lambda: quadratic_kappa([0, 1], [0, 3], 3), "0 to 2"), (lambda: quadratic_kappa([0], [0], 3, [np.nan]), "NaN"),
    (lambda: match_instances({1: 3.0}, {1: [1.0, 2]}), "shape"), (lambda: match_instances({1: [1.0, np.inf]}, {}), "left out")])
def test_bad_data_is_named(call, said):
    with pytest.raises(DataError, match=said): call()
