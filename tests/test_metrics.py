"""Property tests of anomaly_nb.metrics: against scikit-learn, against slow second implementations, under monotone transforms, in pieces."""
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn import metrics as sk

from anomaly_nb.core import DataError, ParameterError
from anomaly_nb.metrics import detection, localization, regions, streaming, uncertainty

SETTINGS = settings(max_examples=80, deadline=None)
DTYPES = (np.float32, np.float64, np.float16, np.int8, np.uint8, np.int16, np.int64)


@st.composite
def scored(draw, max_size=60, both=True):
    "(label, score): ties (few values), constants, signed, integer and float dtypes, single positives."
    n = draw(st.integers(2, max_size))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(("few", "constant", "many")))
    if kind == "constant": score = np.full(n, draw(st.integers(-3, 3)), np.float64)
    elif kind == "few": score = np.array(draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n)), np.float64)
    else: score = np.array(draw(st.lists(st.floats(-100, 100, width=16), min_size=n, max_size=n)))
    if np.dtype(dtype).kind == "u": score = np.abs(score)
    label = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    if both:
        label[draw(st.integers(0, n - 1))] = True
        assume(not label.all())
    return label, score.astype(dtype)


def best_f1(label, score):
    "Dice over every distinct threshold, one by one."
    return max(2 * (label & (score >= t)).sum() / (label.sum() + (score >= t).sum()) for t in np.unique(score))


@SETTINGS
@given(scored())
def test_equal_to_scikit_learn(pair):
    label, score = pair
    s = score.astype(np.float64)
    assert abs(detection.auroc(label, score) - sk.roc_auc_score(label, s)) < 1e-9
    assert abs(detection.average_precision(label, score) - sk.average_precision_score(label, s)) < 1e-9
    assert abs(detection.sweep(detection.rank(label, score)).best_dice - best_f1(label, score)) < 1e-9
    fpr, tpr, t = sk.roc_curve(label, s, drop_intermediate=False)
    ours = detection.roc_curve(label, score)
    assert np.allclose(ours[0], fpr, atol=1e-12) and np.allclose(ours[1], tpr, atol=1e-12) and np.array_equal(ours[2][1:], t[1:])
    for wanted in (0.01, 0.5, 0.95, 1.0):
        assert abs(detection.fpr_at_tpr(label, score, wanted) - fpr[np.argmax(tpr >= wanted)]) < 1e-9
    recall, precision, _ = detection.pr_curve(label, score)
    p, r, _ = sk.precision_recall_curve(label, s)
    assert np.allclose(precision, p[-2::-1]) and np.allclose(recall, r[-2::-1])


@SETTINGS
@given(scored(max_size=12, both=False))
def test_missing_classes(pair):
    label, score = pair
    for l in (label, label & False, label | True):
        P, N = l.sum(), (~l).sum()
        assert math.isnan(detection.auroc(l, score)) == (P == 0 or N == 0)
        assert math.isnan(detection.fpr_at_tpr(l, score)) == (P == 0 or N == 0)
        assert math.isnan(detection.average_precision(l, score)) == (P == 0)
        assert math.isnan(localization.best_dice(l, score)) == (P == 0)
        if P and not N:
            assert detection.average_precision(l, score) == 1 and localization.best_dice(l, score) == 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert abs(sk.average_precision_score(l, score) - 1) < 1e-9


@SETTINGS
@given(scored(), st.sampled_from((np.exp, np.cbrt, lambda s: 3 * s - 7, lambda s: s**3)))
def test_only_the_order_counts(pair, transform):
    label, score = pair
    a, b = score.astype(np.float64), transform(score.astype(np.float64))
    assume(len(np.unique(a)) == len(np.unique(b)))
    assert detection.auroc(label, a) == detection.auroc(label, b)
    assert detection.average_precision(label, a) == detection.average_precision(label, b)
    assert detection.fpr_at_tpr(label, a) == detection.fpr_at_tpr(label, b)
    assert localization.best_dice(label, a) == localization.best_dice(label, b)
    assert abs(detection.auroc(label, -a) - (1 - detection.auroc(label, a))) < 1e-12


def test_blocks_and_threads_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    label = rng.random(50_000) < 0.3
    score = rng.integers(0, 200, 50_000).astype("f4")
    whole = detection.sweep(detection.rank(label, score))
    monkeypatch.setattr(detection, "_BLOCK", 97)
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        ranked = detection.rank(label, score)
        assert len(ranked.neg) == int(threads)
        found = detection.sweep(ranked)
        assert found.auroc == whole.auroc and found.best_dice == whole.best_dice and abs(found.ap - whole.ap) < 1e-12
    assert abs(whole.ap - sk.average_precision_score(label, score)) < 1e-9


@SETTINGS
@given(scored(), st.sampled_from((1e-45, 1.0, 1e30, 3e36)), st.sampled_from((0.0, 0.1, 0.5, 1.0)))
def test_thinned_counts_are_exact(pair, size, limit):
    label, score = pair
    if np.dtype(score.dtype) == np.float32: score = (score.astype("f8") * size).astype("f4")
    full = detection.rank(label, score, every=True)
    thinned = detection.thin(detection.flat_cases([(label, score, None)]), full.pos, limit)
    assert thinned.N == full.N
    for found, truth in zip(thinned.false_alarms(full.pos), full.false_alarms(full.pos)):
        inside = full.false_alarms(full.pos)[1] <= limit * full.N
        assert np.array_equal(found[inside], truth[inside]) and (found[~inside] > limit * full.N).all()


def test_many_scores_are_thinned_and_equal(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(detection, "_BLOCK", 500)
    cases = [(rng.random((30, 40)) < 0.02, rng.standard_normal((30, 40)).astype(kind), rng.random((30, 40)) < 0.9) for kind in ("f4", "f8", "f2") * 4]
    thinned, full = detection.rank_cases(cases), detection.rank_cases(cases, every=True)
    assert type(thinned) is detection.Thinned and type(full) is detection.Ranked and sum(map(len, thinned.neg)) < full.N / 2
    assert detection.sweep(thinned) == detection.sweep(full)
    label, score = np.concatenate([l[f] for l, _, f in cases]), np.concatenate([s[f] for _, s, f in cases])
    assert abs(detection.sweep(thinned).ap - sk.average_precision_score(label, score)) < 1e-9
    score[np.flatnonzero(~label)[7]] = np.nan
    with pytest.raises(DataError, match="NaN or infinity"): detection.rank(label, score)


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_scores_that_are_no_numbers(bad):
    label, score = np.arange(20) < 5, np.arange(20.0)
    for where in (0, 10, 19):
        s = score.copy(); s[where] = bad
        for f in (detection.auroc, detection.average_precision, detection.fpr_at_tpr, detection.roc_curve, detection.pr_curve,
                  localization.pixel_ap, localization.pixel_auroc, localization.best_dice, lambda l, x: localization.dice_at(l, x, 3.0)):
            with pytest.raises(DataError, match="NaN or infinity"): f(label, s)
        m, x = label.reshape(1, 4, 5), s.reshape(1, 4, 5)
        for f in (regions.aupro, regions.pro_curve, lambda l, x: regions.region_counts(l, x, 3.0)):
            with pytest.raises(DataError, match="NaN or infinity"): f(m, x)
        with pytest.raises(DataError): streaming.fit_scale(s)
        with pytest.raises(DataError): uncertainty.bootstrap_images(label, s)
        with pytest.raises(DataError): localization.normal_threshold(x)
        with pytest.raises(DataError): localization.image_score(x[0])


def test_wrong_shapes_and_labels():
    with pytest.raises(DataError, match="one label"): detection.auroc([0, 1], [1.0])
    with pytest.raises(DataError, match="0 normal, 1 anomalous"): detection.auroc([0, 2], [1.0, 2.0])
    with pytest.raises(DataError, match="0 normal, 1 anomalous"): detection.auroc([0, 0.5], [1.0, 2.0])
    with pytest.raises(DataError, match="nothing to count"): detection.auroc([], [])
    with pytest.raises(DataError, match="foreground"): localization.pixel_ap(np.zeros((2, 3, 3)), np.zeros((2, 3, 3)), np.ones((3, 3)))
    with pytest.raises(DataError, match="cases"): localization.pixel_ap([np.zeros((3, 3))], [np.zeros((3, 3))] * 2)
    with pytest.raises(DataError, match="leading case axis"): regions.aupro(np.eye(4), np.eye(4))
    with pytest.raises(ParameterError, match="did you mean"): localization.pixel_ap(np.eye(4)[None], np.eye(4)[None], reduce="batch2")


@SETTINGS
@given(st.data())
def test_pixel_metrics_reductions(data):
    n = data.draw(st.integers(1, 45))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shapes = [(3, 4) if data.draw(st.booleans()) else (5, 2) for _ in range(n)]
    mask = [rng.random(s) < rng.choice([0, 0.3]) for s in shapes]
    fg = [rng.random(s) < 0.8 for s in shapes]
    maps = [rng.integers(-4, 5, s).astype("f4") for s in shapes]
    for m, f in zip(maps, fg): m[~f] = np.nan
    assume(any(f.any() for f in fg))
    flat = lambda i: (np.concatenate([mask[k][fg[k]] for k in i]), np.concatenate([maps[k][fg[k]] for k in i]))
    for reduce, pots in (("pooled", [range(n)]), ("case", [[i] for i in range(n)]), ("batch20", [range(i, min(i + 20, n)) for i in range(0, n, 20)])):
        pots = [flat(p) for p in pots]
        pots = [p for p in pots if p[0].any()]
        wanted = np.mean([sk.average_precision_score(*p) for p in pots]) if pots else math.nan
        assert np.isclose(localization.pixel_ap(mask, maps, fg, reduce=reduce), wanted, atol=1e-9, equal_nan=True)
        two = [p for p in pots if not p[0].all()]
        wanted = np.mean([sk.roc_auc_score(*p) for p in two]) if two else math.nan
        assert np.isclose(localization.pixel_auroc(mask, maps, fg, reduce=reduce), wanted, atol=1e-9, equal_nan=True)
        wanted = np.mean([best_f1(*p) for p in pots]) if pots else math.nan
        assert np.isclose(localization.best_dice(mask, maps, fg, reduce=reduce), wanted, atol=1e-9, equal_nan=True)
        wanted = np.mean([2 * (l & (s >= 2)).sum() / (l.sum() + (s >= 2).sum()) for l, s in pots]) if pots else math.nan
        assert np.isclose(localization.dice_at(mask, maps, 2, fg, reduce=reduce), wanted, atol=1e-9, equal_nan=True)
    t = localization.best_dice_threshold(mask, maps, fg)
    if not math.isnan(t): assert abs(localization.dice_at(mask, maps, t, fg) - localization.best_dice(mask, maps, fg)) < 1e-12


def test_array_and_sequence_and_channel_axis_agree():
    rng = np.random.default_rng(1)
    mask, maps, fg = rng.random((3, 6, 7)) < 0.2, rng.random((3, 6, 7)).astype("f4"), rng.random((3, 6, 7)) < 0.9
    for f in (localization.pixel_ap, localization.pixel_auroc, localization.best_dice, regions.aupro):
        assert abs(f(mask, maps, fg) - f(list(mask), list(maps), list(fg))) < 1e-12
        assert abs(f(mask, maps, fg) - f(mask[:, None], maps[:, None], fg[:, None])) < 1e-12
    before = maps.copy(); regions.aupro(mask, maps, fg); localization.pixel_metrics(mask, maps, fg)
    assert np.array_equal(before, maps)


@SETTINGS
@given(hnp.arrays(np.float32, st.integers(1, 200), elements=st.integers(-5, 5).map(float)), st.floats(0, 0.99))
def test_normal_threshold_is_the_lowest_allowed(scores, fpr):
    t = localization.normal_threshold(scores[None, :, None], fpr=fpr)
    assert (scores >= t).mean() <= fpr + 1e-9
    lower = scores[scores < t].max()
    assert (scores >= lower).mean() > fpr


def slow_aupro(mask, score, foreground, L):
    "The definition: every threshold, every region, trapezoid, cut at L by interpolation."
    labels, R = [], 0
    for m, f in zip(mask, foreground):
        found, n = ndimage.label(m & f, np.ones((3,) * m.ndim))
        labels.append(np.where(found, found + R, 0).ravel()); R += n
    labels = np.concatenate(labels)
    score, keep = np.concatenate([s.ravel() for s in score]), np.concatenate([f.ravel() for f in foreground])
    normal = keep & (labels == 0)
    if not R or not normal.any(): return math.nan
    fpr, pro = [0.0], [0.0]
    for t in np.unique(score[keep])[::-1]:
        fpr.append((score[normal] >= t).mean())
        pro.append(np.mean([(score[labels == r] >= t).mean() for r in range(1, R + 1)]))
    grid = np.append(np.array(fpr)[np.array(fpr) < L], L)
    return sum(area(fpr, pro, a, b) for a, b in zip(grid[:-1], grid[1:])) / L


def area(fpr, pro, a, b):
    "Trapezoid between two consecutive FPRs of the polygon; at a jump the upper value on the left, the lower one on the right."
    left = pro[max(i for i, f in enumerate(fpr) if f == a)]
    k = min(i for i, f in enumerate(fpr) if f >= b)
    j = k - 1
    right = pro[k] if fpr[k] == b else pro[j] + (pro[k] - pro[j]) * (b - fpr[j]) / (fpr[k] - fpr[j])
    return (b - a) * (left + right) / 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(((4, 5), (3, 3, 4))), st.sampled_from((2, 6, 5000)), st.sampled_from((0.01, 0.05, 0.3, 1.0)))
def test_aupro_against_the_definition(seed, shape, values, L):
    rng = np.random.default_rng(seed)
    mask = [rng.random(shape) < rng.choice([0, 0.15, 0.4]) for _ in range(3)]
    fg = [rng.random(shape) < 0.8 for _ in range(3)]
    maps = [(rng.integers(0, values, shape) - values // 2).astype("f4") for _ in range(3)]
    assume(any(f.any() for f in fg))
    assert np.isclose(regions.aupro(mask, maps, fg, fpr_limit=L), slow_aupro(mask, maps, fg, L), atol=1e-9, equal_nan=True)


def test_aupro_chance_perfect_diagonal():
    rng = np.random.default_rng(0)
    mask = np.zeros((2, 40, 40), bool); mask[0, 5:9, 5:9] = mask[0, 20:30, 20:25] = True
    for L in (0.05, 0.3, 1.0):
        assert abs(regions.aupro(mask, np.zeros(mask.shape), fpr_limit=L) - L / 2) < 1e-12
        assert regions.aupro(mask, mask.astype("f4"), fpr_limit=L) == pytest.approx(1)
    assert abs(np.mean([regions.aupro(mask, rng.random(mask.shape)) for _ in range(100)]) - 0.15) < 0.02
    # a diagonal and a block: with 8 (26) neighbours two regions, half the weight each
    for d in (2, 3):
        mask = np.zeros((1,) + (12,) * d, bool)
        mask[(0,) + (np.arange(6),) * d] = True
        block = (0,) + (slice(9, 11),) * d
        mask[block] = True
        assert regions.regions_of(mask[0])[2] == 2
        only_block = np.zeros(mask.shape); only_block[block] = 1
        assert regions.aupro(mask, only_block, fpr_limit=1e-9) == pytest.approx(0.5, abs=1e-6)


def test_region_counts_against_loops():
    rng = np.random.default_rng(0)
    full = np.ones((3, 3))
    for _ in range(20):
        mask, maps, fg = rng.random((2, 12, 12)) < 0.1, rng.random((2, 12, 12)), rng.random((2, 12, 12)) < 0.9
        total = found = marks = false = 0
        for m, s, f in zip(mask & fg, maps, fg):
            p = (s >= 0.8) & f
            a, n = ndimage.label(m, full); b, k = ndimage.label(p, full)
            total += n; found += sum(p[a == r].mean() > 0.4 for r in range(1, n + 1))
            marks += k; false += sum(not m[b == r].any() for r in range(1, k + 1))
        assert regions.region_counts(mask, maps, 0.8, fg, overlap=0.4) == regions.RegionCounts(2, total, found, marks, false)


def test_16_bits_order_preserving():
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype in ("float16", "int16", "uint16"):
        values = every.view(dtype); values = np.sort(values[np.isfinite(values)])
        code = streaming.Bits16(dtype).code(values).astype(int)
        assert ((np.diff(code) > 0) == (np.diff(values.astype(float)) > 0)).all() and (np.diff(code) >= 0).all()


@SETTINGS
@given(st.integers(0, 2**32 - 1), st.sampled_from(("float16", "int16", "uint16")), st.sampled_from((3, 50, 30_000)))
def test_streaming_exact_for_16_bits(seed, dtype, spread):
    rng = np.random.default_rng(seed)
    score = (rng.standard_normal(300) * spread).clip(0 if dtype == "uint16" else -30_000, 30_000).astype(dtype)
    label, fg = rng.random(300) < 0.2, rng.random(300) < 0.9
    assume((label & fg).any())
    found = streaming.sweep_histogram(*streaming.histogram16(label, score, fg))
    truth = detection.sweep(detection.rank(label, score, fg))
    for name in ("auroc", "ap", "best_dice", "P", "N"): assert abs(getattr(found, name) - getattr(truth, name)) < 1e-12
    assert abs(found.ap - sk.average_precision_score(label[fg], score[fg].astype(float))) < 1e-9
    bits = streaming.Bits16(dtype)
    assert bits.value(found.threshold) == truth.threshold


@SETTINGS
@given(hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32)), st.integers(0, 2**32 - 1))
def test_scale_is_monotone_for_anything(normal, seed):
    scale = streaming.fit_scale(normal)
    rng = np.random.default_rng(seed)
    s = np.sort(np.concatenate([normal, normal * 3, rng.standard_normal(200).astype("f4"), np.array([-3.4e38, 3.4e38, 0.0, -0.0], "f4")]))
    code = scale.code(s).astype(int)
    assert (np.diff(code) >= 0).all() and code[-1] > code[0]
    for level in code[::40]: assert np.array_equal(code >= level, s >= np.float32(scale.value(level)))


def drawn_histograms(rng, scale, shape=(9, 9), subjects=8):
    h, cases = streaming.ScoreHistograms(scale), []
    for i in range(subjects):
        case = (rng.random(shape) < (0.1 if i % 2 else 0), rng.standard_normal(shape).astype("f4"), rng.random(shape) < 0.9)
        h.add(f"s{i:02d}", *case); cases.append(case)
    return h, cases


@pytest.mark.parametrize("shape", ((9, 9), (5, 6, 7)))
def test_histograms_merge_save_and_equal_the_voxels(shape, tmp_path):
    rng = np.random.default_rng(3)
    scale = streaming.fit_scale(rng.standard_normal(10_000))
    h, cases = drawn_histograms(rng, scale, shape)
    mask, maps, fg = zip(*cases)
    coded = [scale.code(m) for m in maps]
    assert abs(streaming.sweep_of(h).ap - localization.pixel_ap(mask, coded, fg)) < 1e-12
    assert abs(streaming.aupro_of(h) - regions.aupro(mask, coded, fg)) < 1e-12
    parts = [streaming.ScoreHistograms(scale) for _ in range(3)]
    for i, case in enumerate(cases): parts[i % 3].add(f"s{i:02d}", *case)
    merged = streaming.ScoreHistograms(scale)
    for k in (2, 0, 1): merged.merge(parts[k])
    streaming.save_histograms(merged, tmp_path/"h.npz")
    again = streaming.load_histograms(tmp_path/"h.npz")
    for other in (merged, again):
        assert streaming.sweep_of(other) == streaming.sweep_of(h) and abs(streaming.aupro_of(other) - streaming.aupro_of(h)) < 1e-12
        assert other.subjects == h.subjects
    with np.load(tmp_path/"h.npz", allow_pickle=False) as f: assert all(f[k].dtype != object for k in f)
    (tmp_path/"bad.npz").write_bytes((tmp_path/"h.npz").read_bytes()[:100])
    for name in ("bad.npz", "none.npz"):
        with pytest.raises(DataError, match=name): streaming.load_histograms(tmp_path/name)
    with pytest.raises(DataError, match="scales"): merged.merge(streaming.ScoreHistograms(streaming.Bits16()))


def test_a_scale_that_costs_too_much_is_an_error():
    rng = np.random.default_rng(0)
    label = rng.random(20_000) < 0.05
    score = (rng.standard_normal(20_000) + 2 * label).astype("f4")
    assert abs(streaming.check_scale(label, score, streaming.fit_scale(rng.standard_normal(20_000)), show=None)) < 1e-4
    with pytest.raises(DataError, match="change the AP"):
        streaming.check_scale(label, score, streaming.ScoreScale(np.array([0.0, 1.0], "f4")), show=None)


def test_bootstrap_against_repeated_voxels():
    rng = np.random.default_rng(5)
    scale = streaming.fit_scale(rng.standard_normal(10_000))
    h, cases = drawn_histograms(rng, scale)
    W = uncertainty.subject_weights(8, 30, seed=2)
    found = uncertainty.bootstrap_histograms(h, W, statistics=uncertainty.STATISTICS)
    for b, w in enumerate(W):
        drawn = [i for i in range(8) for _ in range(w[i])]
        mask, maps, fg = zip(*(cases[i] for i in drawn))
        coded = [scale.code(m) for m in maps]
        truth = {"auroc": localization.pixel_auroc(mask, coded, fg), "ap": localization.pixel_ap(mask, coded, fg),
                 "best_dice": localization.best_dice(mask, coded, fg), "aupro": regions.aupro(mask, coded, fg)}
        for name, value in truth.items(): assert np.isclose(found[name][b], value, atol=1e-9, equal_nan=True), name


def test_differences_are_paired_and_few_subjects_undecided():
    W = uncertainty.subject_weights(30, 500)
    rng = np.random.default_rng(0)
    a = rng.random(30); b = a - 0.02
    d = uncertainty.paired_difference(a.mean(), b.mean(), uncertainty.bootstrap_mean(a, W), uncertainty.bootstrap_mean(b, W), 30)
    assert d.verdict == "a is higher" and d.high - d.low < 1e-9 and d.probability == 1
    few = uncertainty.paired_difference(a.mean(), b.mean(), uncertainty.bootstrap_mean(a, W), uncertainty.bootstrap_mean(b, W), 19)
    assert few.verdict == "undecided"
    assert "undecided" in str(uncertainty.interval(0.5, [0.4, 0.6], 19))


@pytest.mark.parametrize("module", ("detection", "localization", "regions", "streaming", "uncertainty"))
def test_imports_numpy_only(module):
    code = (f"import sys, anomaly_nb.metrics.{module}; "
            "print([m for m in ('scipy', 'sklearn', 'torch', 'matplotlib', 'pandas') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
