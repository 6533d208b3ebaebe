"""Votes of several raters and loose outlines: second slow implementations, closed forms, and that what is not known changes nothing."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anomaly_nb.core import DataError, ParameterError
from anomaly_nb.annotations import box_map, box_of, point_map, trimap
from anomaly_nb.models.outlines import box_losses, known_loss, projection_loss, size_loss
from anomaly_nb.models.raters import HomoscedasticWeights, RaterConfusion, confidence_weights, dawid_skene, heteroscedastic_loss, majority, rater_accuracy, soft_cross_entropy, task_weighted, vote_share


def some_votes(n=30, raters=4, classes=3, missing=0.3, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    votes = np.where(rng.random((n, raters)) < 0.7, truth[:, None], rng.integers(0, classes, (n, raters)))
    return np.where(rng.random((n, raters)) < missing, -1, votes)


def gen(seed=0): return torch.Generator().manual_seed(seed)


# --- votes

def dawid_skene_slowly(votes, classes, iterations, smoothing):
    "One rater, one vertebra, one grade at a time; products instead of logarithms."
    n, R = votes.shape
    T = np.array([[sum(v == c for v in row) / max(sum(v >= 0 for v in row), 1) if max(row) >= 0 else 1 / classes for c in range(classes)] for row in votes])
    for _ in range(iterations):
        A, p = np.full((R, classes, classes), float(smoothing)), np.full(classes, float(smoothing))
        for i, r, c in itertools.product(range(n), range(R), range(classes)):
            if votes[i, r] >= 0: A[r, c, votes[i, r]] += T[i, c]
        for i in range(n):
            if max(votes[i]) >= 0: p += T[i]
        for r, c in itertools.product(range(R), range(classes)): A[r, c] /= A[r, c].sum()
        p /= p.sum()
        for i in range(n):
            for c in range(classes): T[i, c] = p[c] * math.prod(A[r, c, votes[i, r]] for r in range(R) if votes[i, r] >= 0)
            T[i] /= T[i].sum()
    return T, A, p


@pytest.mark.parametrize("classes, raters, missing, smoothing", [(2, 3, 0.0, 1.0), (3, 4, 0.3, 0.5), (4, 2, 0.6, 2.0), (2, 1, 0.5, 1.0)])
def test_dawid_skene_against_loops(classes, raters, missing, smoothing):
    votes = some_votes(25, raters, classes, missing)
    for ours, slow in zip(dawid_skene(votes, classes, 7, smoothing), dawid_skene_slowly(votes, classes, 7, smoothing)): np.testing.assert_allclose(ours, slow, atol=1e-10)


def test_many_raters_do_not_underflow():
    "2,000 raters: the product of their probabilities is no float any more."
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 40)
    votes = np.where(rng.random((40, 2000)) < 0.6, truth[:, None], 1 - truth[:, None])
    T, A, prior = dawid_skene(votes, 2, 5)
    assert np.isfinite(T).all() and (T.argmax(1) == truth).all() and np.isfinite(A).all()


def test_majority_and_share_against_loops():
    votes = some_votes(60, 5, 3, 0.5)
    weights = np.array([0.5, 2.0, 0.0, 1.0, 0.25])
    for row, hard, hw, soft, sw in zip(votes, *majority(votes, 3), *vote_share(votes, 3, weights)):
        counts, mass = [sum(v == c for v in row) for c in range(3)], np.array([sum(w for v, w in zip(row, weights) if v == c) for c in range(3)])
        assert hw == (sum(counts) > 0) and sw == (mass.sum() > 0)
        np.testing.assert_allclose(hard, np.eye(3)[counts.index(max(counts))] if hw else np.full(3, 1/3))
        np.testing.assert_allclose(soft, mass / mass.sum() if sw else np.full(3, 1/3))


@pytest.mark.parametrize("estimate", [lambda v: majority(v, 3)[0], lambda v: vote_share(v, 3)[0], lambda v: dawid_skene(v, 3)[0]])
def test_rows_and_raters_without_votes_change_nothing(estimate):
    votes = some_votes()
    more = np.full((40, 6), -1)
    more[5:35, 1:5] = votes
    before, after = votes.copy(), estimate(more)
    np.testing.assert_allclose(after[5:35], estimate(votes), atol=1e-12)
    np.testing.assert_allclose(after.sum(1), 1)
    assert (votes == before).all()                                                                   # inputs are left alone


def test_order_of_raters_and_of_rows_does_not_matter():
    votes = some_votes()
    rows, raters = np.random.default_rng(1).permutation(30), [2, 0, 3, 1]
    T, A, p = dawid_skene(votes, 3)
    T2, A2, p2 = dawid_skene(votes[rows][:, raters], 3)
    np.testing.assert_allclose(T2, T[rows], atol=1e-9); np.testing.assert_allclose(A2, A[raters], atol=1e-9); np.testing.assert_allclose(p2, p, atol=1e-9)


def test_weights_are_log_odds_for_symmetric_raters():
    "For a symmetric rater, the weighted share orders grades as Bayes does."
    rng = np.random.default_rng(0)
    truth, right = rng.integers(0, 3, 4000), np.array([0.9, 0.7, 0.5, 1/3])
    votes = np.where(rng.random((4000, 4)) < right, truth[:, None], (truth[:, None] + rng.integers(1, 3, (4000, 4))) % 3)
    np.testing.assert_allclose(confidence_weights(votes, 3), np.log(right * 2 / (1 - right)), atol=0.35)
    T, A, prior = dawid_skene(votes, 3)
    np.testing.assert_allclose(rater_accuracy(A, prior), right, atol=0.05)


@pytest.mark.parametrize("votes, error, says", [([[0, 3]], DataError, "grades 0..2"), ([[0, -2]], DataError, "grades 0..2"), ([0, 1], DataError, "integers"), ([[0.5]], DataError, "integers"), ([[None, 1]], DataError, "integers")])
def test_bad_votes_are_named(votes, error, says):
    for fn in (majority, vote_share, dawid_skene, confidence_weights):
        with pytest.raises(error, match=says): fn(np.array(votes), 3)


# --- losses of raters

def test_confusion_loss_against_a_hand_computation():
    votes, logits = torch.tensor(some_votes(8, 3, 3)), torch.randn(8, 3, generator=gen())
    module = RaterConfusion(3, 3, 0.8)
    with torch.no_grad(): module.logits.add_(torch.randn(3, 3, 3, generator=gen(1)))
    A = [[[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in m] for m in module.logits.tolist()]
    p = logits.double().softmax(1).tolist()
    terms = [-math.log(sum(p[i][c] * A[r][c][v] for c in range(3))) + 0.2 * sum(A[r][c][c] for c in range(3)) / 3 for i, row in enumerate(votes.tolist()) for r, v in enumerate(row) if v >= 0]
    assert math.isclose(module.loss(logits, votes, 0.2).item(), sum(terms) / len(terms), rel_tol=1e-5)
    assert torch.allclose(module.matrices().sum(2), torch.ones(3, 3))


def test_missing_votes_change_nothing_in_the_losses():
    votes, logits = torch.tensor(some_votes(8, 3, 3)), torch.randn(8, 3, generator=gen())
    logits[2], votes[2] = float("nan"), -1                                                          # nobody graded it: it may be anything
    known = (votes >= 0).any(1)
    module, x = RaterConfusion(3, 3), logits.clone().requires_grad_()
    cost = module.loss(x, votes)
    cost.backward()
    assert math.isclose(cost.item(), RaterConfusion(3, 3).loss(logits[known], votes[known]).item(), rel_tol=1e-6)
    assert (x.grad[~known] == 0).all() and (x.grad[known] != 0).all() and module.logits.grad.isfinite().all()
    labels, weights = (torch.tensor(a) for a in vote_share(votes.numpy(), 3))
    x.grad = None
    soft_cross_entropy(x, labels, weights).backward()
    assert (x.grad[~known] == 0).all() and x.grad[known].isfinite().all()
    assert math.isclose(soft_cross_entropy(logits, labels, weights).item(), F.cross_entropy(logits[known], labels[known].float()).item(), rel_tol=1e-6)
    x.grad = None
    heteroscedastic_loss(x, x, labels, weights, 3, gen()).backward()
    assert (x.grad[~known] == 0).all() and x.grad[known].isfinite().all()


@pytest.mark.parametrize("cost", [lambda x: soft_cross_entropy(x, torch.full((4, 2), 0.5), torch.zeros(4)), lambda x: heteroscedastic_loss(x, x, torch.full((4, 2), 0.5), torch.zeros(4)), lambda x: RaterConfusion(3, 2).loss(x, torch.full((4, 3), -1))])
def test_nothing_known_costs_nothing(cost):
    x = torch.randn(4, 2, generator=gen()).requires_grad_()
    value = cost(x)
    value.backward()
    assert value.item() == 0 and (x.grad == 0).all()


def test_heteroscedastic_without_variance_is_soft_cross_entropy():
    mean, labels, weights = torch.randn(7, 4, generator=gen()), torch.rand(7, 4, generator=gen(1)).softmax(1), torch.rand(7, generator=gen(2))
    plain = soft_cross_entropy(mean, labels, weights).item()
    for logvar in (-40.0, -float("inf")): assert math.isclose(heteroscedastic_loss(mean, torch.full((7, 4), logvar), labels, weights, 5, gen()).item(), plain, rel_tol=1e-5)


def test_heteroscedastic_against_quadrature():
    "Two grades: the difference of the logits is Gaussian, and the mean of its sigmoid an integral of one variable."
    mean, logvar = torch.tensor([[0.3, 1.5], [2.0, -1.0]]), torch.tensor([[0.2, -0.5], [1.0, 0.7]])
    nodes, heights = np.polynomial.hermite_e.hermegauss(80)
    p = [(heights / heights.sum() / (1 + np.exp(-(m[1] - m[0] + np.sqrt(np.exp(v).sum()) * nodes)))).sum() for m, v in zip(mean.double().numpy(), logvar.double().numpy())]
    labels, weights = torch.tensor([[0.0, 1.0], [0.25, 0.75]]), torch.tensor([1.0, 3.0])
    exact = -(np.log(p[0]) + 3 * (0.25 * np.log(1 - p[1]) + 0.75 * np.log(p[1]))) / 4
    assert math.isclose(heteroscedastic_loss(mean, logvar, labels, weights, 200_000, gen()).item(), exact, rel_tol=0.01)
    assert heteroscedastic_loss(mean, logvar, labels, weights, 5, gen(3)) == heteroscedastic_loss(mean, logvar, labels, weights, 5, gen(3))


def test_all_is_float32_under_autocast():
    logits, votes = torch.randn(16, 3, generator=gen()).bfloat16(), torch.tensor(some_votes(16, 3, 3))
    labels, weights = (torch.tensor(a) for a in vote_share(votes.numpy(), 3))
    module, image = RaterConfusion(3, 3), torch.randn(2, 1, 9, 8, generator=gen())
    sure, boxes = torch.rand(2, 1, 9, 8, generator=gen(1)) > 0.3, torch.tensor([[[1, 6], [2, 7]]]).expand(2, 1, 2, 2)
    for cost in (lambda: soft_cross_entropy(logits, labels, weights), lambda: module.loss(logits, votes), lambda: heteroscedastic_loss(logits, logits, labels, weights, 4, gen()), lambda: HomoscedasticWeights(["a"])({"a": logits[0, 0]}),
                 lambda: known_loss(image.bfloat16(), (image > 0).float(), sure), lambda: sum(box_losses(image.bfloat16().sigmoid(), boxes, torch.ones(2, 1, dtype=torch.bool)).values())):
        plain = cost()
        with torch.autocast("cpu", torch.bfloat16): assert torch.equal(cost(), plain) and plain.dtype == torch.float32


def test_task_weights():
    module = HomoscedasticWeights(["a", "b", "c"])
    with torch.no_grad(): module.s["a"].fill_(0.5); module.s["b"].fill_(-1.0)
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)
    total = module({"a": a, "b": b, "c": None})
    total.backward()
    assert math.isclose(total.item(), 2 * math.exp(-0.5) + 0.5 + 3 * math.e - 1, rel_tol=1e-6) and math.isclose(a.grad.item(), math.exp(-0.5), rel_tol=1e-6)
    assert math.isclose(module.s["b"].grad.item(), 1 - 3 * math.e, rel_tol=1e-6) and module.s["c"].grad is None
    assert math.isclose(task_weighted({"a": a, "b": b}, {k: v.detach() for k, v in module.s.items()}).item(), total.item(), rel_tol=1e-6)
    assert task_weighted({}, module.s).item() == 0 and module.weights()["c"] == 1.0
    with pytest.raises(ParameterError, match="no log variance for d"): module({"d": a})


# --- outlines

@pytest.mark.parametrize("shape, spacing", [((9, 13), (3.1, 0.9)), ((9, 13), 1.3), ((5, 7, 6), (4.2, 0.7, 1.1)), ((1, 12), (2.0, 1.1))])
@pytest.mark.parametrize("inner, outer", [(0, 0), (1.77, 0), (0, 2.93), (2.31, 3.17), (50, 50)])
def test_trimap_against_every_pair_of_voxels(shape, spacing, inner, outer):
    rng = np.random.default_rng(0)
    region = rng.random(shape) < 0.85
    region[tuple(slice(n // 2, None) for n in shape)] = False
    where = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape)) * np.broadcast_to(spacing, len(shape))
    far = np.sqrt(((where[:, None] - where)**2).sum(-1))
    flat = region.ravel()
    slow = np.where(far[:, ~flat].min(1) > inner, 1, np.where(far[:, flat].min(1) > outer, 0, 2)) if inner or outer else flat
    found = trimap(region, inner, outer, spacing)
    assert found.dtype == np.uint8 and (found == slow.reshape(shape)).all()


def test_points_and_boxes_against_loops():
    shape, spacing, centre = (6, 9, 5), (3.0, 1.1, 2.3), (7.3, 4.4, 2.0)
    m = point_map(centre, shape, spacing, 2.7, 6.1)
    for at in np.ndindex(shape):
        far = math.dist([i * s for i, s in zip(at, spacing)], centre)
        assert m[at] == (1 if far <= 2.7 else 2 if far <= 6.1 else 0)
    region = np.zeros(shape, bool)
    region[2, 3:5, 4] = region[4, 7, 1] = True
    assert box_of(region).tolist() == [[2, 5], [3, 8], [1, 5]]
    expected = np.zeros(shape); expected[1:6, 1:9, :] = 2                                            # 2.2 mm: one voxel of 3 mm, two of 1.1 mm, one of 2.3 mm
    assert (box_map(region, 2.2, spacing) == expected).all()
    assert (box_map(region, 0, spacing)[2:5, 3:8, 1:5] == 2).all() and (box_map(region, 0, spacing) == 2).sum() == 60
    assert not box_map(np.zeros(shape), 1, 1).any()


@pytest.mark.parametrize("bad", [lambda: trimap(np.ones((3, 3)), 1, float("nan"), 1), lambda: trimap(np.ones((3, 3)), 1, 1, (1, 0)), lambda: box_map(np.ones((3, 3)), -1, 1), lambda: point_map((1, 1, 1), (3, 3), 1, 1, 2),
                                 lambda: point_map((1, float("nan")), (3, 3), 1, 1, 2), lambda: size_loss(torch.rand(3), -1, 2)])
def test_bad_lengths_are_refused(bad):
    with pytest.raises(ParameterError): bad()


@pytest.mark.parametrize("shape, box", [((12, 15), [(2, 7), (4, 15)]), ((6, 8, 7), [(0, 3), (2, 8), (3, 4)]), ((5, 5), [(0, 5), (0, 5)])])
def test_projection_is_zero_for_its_box_alone(shape, box):
    filled = torch.zeros(shape); filled[tuple(slice(*b) for b in box)] = 1
    assert projection_loss(filled, torch.tensor(box)).item() == 0 == projection_loss(filled, box_of(filled.numpy() > 0)).item()
    for axis, (start, stop) in enumerate(box):
        for moved in ((start + 1, stop), (start, stop - 1), (start - 1, stop), (start, stop + 1)):
            if not 0 <= moved[0] < moved[1] <= shape[axis]: continue
            other = torch.zeros(shape); other[tuple(slice(*b) for b in (*box[:axis], moved, *box[axis + 1:]))] = 1
            assert projection_loss(other, box).item() > 0.01
    assert projection_loss(0.9 * filled, box).item() > 0 and projection_loss(torch.zeros(shape), box).item() == 1


@pytest.mark.parametrize("shape", [(14, 11), (7, 9, 8)])
def test_box_losses_are_those_of_each_box(shape):
    rng, dim = np.random.default_rng(0), len(shape)
    prob = torch.rand(3, 1, *shape, generator=gen()).requires_grad_()
    starts = rng.integers(0, 3, (3, 4, dim)); boxes = torch.tensor(np.stack([starts, starts + rng.integers(1, 5, (3, 4, dim))], -1))
    present = torch.tensor(rng.random((3, 4)) < 0.6); present[1] = False; present[0, 0] = True
    boxes[~present] = -7                                                                             # padding may be anything
    parts, outside = [], torch.ones_like(prob, dtype=torch.bool); outside[~present.any(1)] = False
    for b, k in present.nonzero().tolist():
        at = (b, 0, *(slice(*c) for c in boxes[b, k].tolist()))
        outside[at] = False
        parts.append((projection_loss(prob[at], [(0, n) for n in prob[at].shape]).item(), size_loss(prob[at], 0.55 * prob[at].numel(), 0.6 * prob[at].numel()).item()))
    found = box_losses(prob, boxes, present, fill=(0.55, 0.6))
    np.testing.assert_allclose([found["projection"].item(), found["size"].item()], np.mean(parts, 0), rtol=1e-5)
    assert math.isclose(found["outside"].item(), F.binary_cross_entropy(prob[outside], torch.zeros(outside.sum())).item(), rel_tol=1e-5)
    slope, = torch.autograd.grad(sum(found.values()), prob, retain_graph=True)
    assert (slope[~present.any(1)] == 0).all() and slope.isfinite().all()
    inside_only, = torch.autograd.grad(sum(box_losses(prob, boxes, present, outside=False).values()), prob)
    assert (inside_only[outside] == 0).all() and inside_only.any()


@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 7)])
def test_ignored_voxels_send_nothing_back(shape):
    z, t = torch.randn(3, 1, *shape, generator=gen()), torch.rand(3, 1, *shape, generator=gen(1))       # soft targets
    known = torch.rand(3, 1, *shape, generator=gen(2)) > 0.4
    known[1] = False
    grads = []
    for rest in (float("nan"), float("inf"), 5.0):
        x = torch.where(known, z, rest).requires_grad_()
        known_loss(x, torch.where(known, t, float("nan")), known).backward()
        assert (x.grad[~known] == 0).all() and x.grad[known].isfinite().all()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_known_loss_by_hand():
    z, known = torch.randn(2, 1, 6, 5, generator=gen()), torch.rand(2, 1, 6, 5, generator=gen(1)) > 0.3
    t = (torch.rand(2, 1, 6, 5, generator=gen(2)) > 0.5).float()
    t[1] = 0                                                                                            # no object: only cross-entropy
    p, k = z.sigmoid()[0][known[0]], t[0][known[0]]
    slow = F.binary_cross_entropy(z.sigmoid()[known], t[known]) + 1 - 2 * (p * k).sum() / (p.sum() + k.sum())
    assert math.isclose(known_loss(z, t, known).item(), slow.item(), rel_tol=1e-4)
    with pytest.raises(DataError, match="one shape"): known_loss(z, t, known[:1])
