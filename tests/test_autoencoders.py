"""The autoencoders and the Student mixture: their formulas against independent implementations, bad input, and trainings that go wrong."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.losses import SSIMLoss
from scipy.optimize import minimize
from scipy.stats import multivariate_t, spearmanr
from sklearn.mixture import GaussianMixture

sys.path.insert(0, str(Path(__file__).parent))
from test_contract import module  # noqa: E402
from test_models import batch_of  # noqa: E402

from anomaly_nb.core import DataError, ParameterError, seed_everything  # noqa: E402
from anomaly_nb.detectors.oneclass import fit_detector  # noqa: E402
from anomaly_nb.detectors.student import NU, StudentByBIC, StudentMixture, next_nu, student  # noqa: E402
from anomaly_nb.models.autoencoder import CRITERIA, AutoencoderModel, drawing_loss  # noqa: E402
from anomaly_nb.models.checks import answers_of, check_model, readied  # noqa: E402
from anomaly_nb.models.fit import fit  # noqa: E402
from anomaly_nb.models.memory import MemAE, Memory, address_entropy, hard_shrink  # noqa: E402
from anomaly_nb.models.structure import dissimilarity, ssim  # noqa: E402
from anomaly_nb.models.uncertain import UncertainAutoencoder, soft_floor, uncertain_loss, weighted_error  # noqa: E402

torch.set_num_threads(1)
SMALL = dict(widths=(4, 8), latent=4)
MAKERS = {"ae l1": lambda **kw: AutoencoderModel(criterion="l1", **SMALL, **kw), "ae l2": lambda **kw: AutoencoderModel(**SMALL, **kw), "ae ssim": lambda **kw: AutoencoderModel(criterion="ssim", **SMALL, **kw),
          "ae spatial": lambda **kw: AutoencoderModel(dense=False, **SMALL, **kw), "uncertain": lambda **kw: UncertainAutoencoder(**SMALL, **kw), "uncertain spatial": lambda **kw: UncertainAutoencoder(dense=False, **SMALL, **kw),
          "memory": lambda **kw: MemAE(slots=20, threshold=0.1, **SMALL, **kw), "memory dense": lambda **kw: MemAE(dense=True, slots=20, threshold=0.0, **SMALL, **kw)}


# ---- structure

@pytest.mark.parametrize("shape", [(1, 2, 24, 20), (2, 1, 14, 13, 12)])
def test_ssim_agrees_with_monai(shape):
    x, y = torch.rand(shape, generator=torch.Generator().manual_seed(0)), torch.rand(shape, generator=torch.Generator().manual_seed(1))
    theirs = SSIMLoss(spatial_dims=len(shape) - 2, win_size=11, kernel_sigma=1.5, data_range=1.0, reduction="none")(x, y)
    inner = (..., *(slice(5, n - 5) for n in shape[2:]))
    assert torch.allclose(1 - ssim(x, y)[inner].flatten(1).mean(1), theirs.flatten(1).mean(1), atol=1e-4)


def test_the_gradient_of_ssim_is_its_slope_and_is_zero_at_the_image():
    x = torch.rand(1, 1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.rand(1, 1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ssim(x, v).mean(), y)
    at = x.clone().requires_grad_()
    slope, = torch.autograd.grad(ssim(x, at).mean(), at)
    assert slope.abs().max() < 1e-10                                                     # a maximum


def test_dissimilarity_of_a_constant_image_is_finite_and_has_a_finite_slope():
    x, inside = torch.zeros(2, 1, 9, 8), torch.ones(2, 1, 9, 8, dtype=torch.bool)
    drawn = (0.1 * torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = drawing_loss(x, drawn, inside, "ssim")
    slope, = torch.autograd.grad(loss, drawn)
    assert loss.isfinite() and slope.isfinite().all()


def test_losses_count_foreground_voxels_alone():
    x, drawn = torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    inside = torch.rand(3, 1, 9, 8) > 0.5
    where = inside.expand_as(x)
    for c, expected in (("l1", (x - drawn)[where].abs().mean()), ("l2", ((x - drawn)[where]**2).mean()), ("ssim", dissimilarity(x, drawn, inside)[where].mean())):
        assert torch.isclose(drawing_loss(x, drawn, inside, c), expected, rtol=1e-4), c
        spoiled = torch.where(where, x, torch.full_like(x, 1e4)), torch.where(where, drawn, torch.full_like(x, -1e4))
        assert torch.isclose(drawing_loss(*spoiled, inside, c), expected, rtol=1e-4), c


# ---- AE-U

def test_the_loss_is_the_likelihood_and_its_slopes_are_the_closed_forms():
    x, mu, logvar = (torch.randn(2, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mu.requires_grad_(); logvar.requires_grad_()
    whole = torch.ones(2, 1, 5, 4, dtype=torch.bool)
    loss = uncertain_loss(x, mu, logvar, whole)
    normal = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    assert torch.isclose(loss, (-2 * normal.log_prob(x) - np.log(2 * np.pi)).mean())
    d_mu, d_logvar = torch.autograd.grad(loss, (mu, logvar))
    assert torch.allclose(d_mu, -2 * (x - mu) * torch.exp(-logvar) / x.numel()) and torch.allclose(d_logvar, (1 - weighted_error(x, mu, logvar)) / x.numel())


def test_weighted_scores_of_draws_from_the_model_are_one_on_average():
    mu, logvar = torch.randn(1, 1, 200, 200), torch.randn(1, 1, 200, 200)
    x = mu + (0.5 * logvar).exp() * torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    assert abs(weighted_error(x, mu, logvar).mean() - 1) < 0.03


def test_the_floor_holds_after_training_on_images_without_any_error():
    batch = batch_of((12, 12), 1)
    batch["image"] = torch.zeros_like(batch["image"])
    model, _ = readied(lambda: UncertainAutoencoder(shape=(12, 12), floor=-3.0, lr=0.1, **SMALL), batch, steps=60)
    with torch.no_grad(): logvar = model.distribution(batch)[1]
    assert -3 <= logvar.min() and logvar[batch["foreground"]].mean() < -2.5              # it went down to the floor, and stayed on it
    assert all(a["anomaly_map"].isfinite().all() for a in answers_of(model, batch).values())
    assert soft_floor(torch.tensor(-1e4), -3.0) == -3.0


# ---- MemAE

@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.2])
def test_shrinkage_and_entropy_follow_their_formulas(threshold):
    w = torch.randn(200, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    slow = []
    for row in w.tolist():
        kept = [max(v - threshold, 0) * v / (abs(v - threshold) + 1e-12) for v in row]
        slow.append([v / sum(kept) for v in kept] if sum(kept) > 0 else row)
    ours = hard_shrink(w, threshold)
    assert torch.allclose(ours, torch.tensor(slow, dtype=torch.float64), atol=1e-10) and torch.allclose(ours.sum(1), torch.ones(200, dtype=torch.float64))
    entropy = [-sum(v * np.log(v) for v in row if v > 0) for row in slow]
    assert np.allclose(address_entropy(ours), entropy, atol=1e-9)
    assert np.isclose(address_entropy(torch.full((30,), 1 / 30)).item(), np.log(30), atol=1e-5) and abs(address_entropy(torch.eye(30)).max()) < 1e-6


def test_an_undecided_query_still_learns():
    memory = Memory(10, 3, threshold=0.9)                                                # nothing will reach 90 %
    z = torch.zeros(2, 3, requires_grad=True)
    answer, w = memory(z)
    assert torch.allclose(w, torch.full((2, 10), 0.1))
    answer.sum().backward()
    assert z.grad.abs().max() > 0 and memory.weight.grad.abs().max() > 0


def test_answers_lie_in_the_hull_of_the_items_and_cells_do_not_mix():
    memory, z = Memory(5, 3, 0.2), 10 * torch.randn(2, 3, 4, 5, 6)
    with torch.no_grad():
        answer, w = memory(z)
        other = z.clone(); other[:, :, 0, 0, 0] += 5
        changed = (memory(other)[0] - answer).abs().sum(1) > 0
    assert torch.allclose(torch.einsum("bdhwn,nc->bcdhw", w, memory.weight), answer, atol=1e-5)
    assert (answer.amax((0, 2, 3, 4)) <= memory.weight.amax(0) + 1e-5).all() and (answer.amin((0, 2, 3, 4)) >= memory.weight.amin(0) - 1e-5).all()
    assert not changed[:, 1:].any() and not changed[:, 0, 1:].any()


def test_addresses_are_computed_in_full_precision_under_autocast():
    memory, z = Memory(50, 16, 0.03), torch.randn(4, 16, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): inside = memory(z)
    with torch.no_grad(): outside = memory(z)
    assert torch.equal(inside[0], outside[0]) and torch.equal(inside[1], outside[1])


# ---- all of them

@pytest.mark.parametrize("name", ["ae ssim", "uncertain spatial", "memory dense"])       # the others are defaults of the catalog
def test_shared_check(name):
    batch = batch_of((21, 18), 1)
    report = check_model(lambda: MAKERS[name](shape=(21, 18), lr=1e-2), batch)
    assert report["losses"]["train"][1] < report["losses"]["train"][0]


@pytest.mark.parametrize("name", ["ae ssim", "uncertain", "memory", "memory dense"])
def test_bf16_maps_keep_their_order(name):
    batch = batch_of((21, 18), 1)
    model, _ = readied(lambda: MAKERS[name](shape=(21, 18), lr=1e-2), batch, 30)
    exact = answers_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16): coarse = answers_of(model, batch)
    for kind in model.kinds:
        assert coarse[kind]["anomaly_map"].dtype == torch.float32
        assert spearmanr(*(a[kind]["anomaly_map"][batch["foreground"]] for a in (exact, coarse))).statistic >= 0.99, kind


@pytest.mark.parametrize("name", MAKERS)
def test_constant_images_a_batch_of_one_and_odd_sizes(name):
    for shape in ((9, 14), (7, 9, 11)):
        batch = batch_of(shape, 1, count=1)
        batch["image"] = batch["image"] * 0 + 2.0
        model, losses = readied(lambda: MAKERS[name](spatial_dims=len(shape), shape=shape), batch, steps=3)
        assert np.isfinite(losses["train"]).all()
        for answer in answers_of(model, batch).values(): assert answer["anomaly_map"].shape == batch["foreground"].shape and answer["anomaly_map"].isfinite().all()
        nothing = batch | {"foreground": torch.zeros_like(batch["foreground"])}
        assert model.loss(nothing).isfinite() and model.score(nothing)["anomaly_score"].tolist() == [0.0]
        where = model.embed(batch)
        assert where["embedding"].shape[:2] == (1, 4) and (where["embedding"].ndim == 2) == ("grid_stride" not in where)


@pytest.mark.parametrize("name", ["ae ssim", "uncertain", "memory"])
def test_a_nan_stops_by_name_and_the_last_good_state_is_kept(name, tmp_path):
    base = type(MAKERS[name](shape=(12, 12)))

    class Burst(base):
        broken, steps = True, 0
        def loss(self, batch):
            self.steps += self.training
            return super().loss(batch) * (float("nan") if self.broken and self.steps == 5 else 1)

    data = module()
    per_epoch = len(data.loader("train"))
    hparams = dict(shape=(12, 12), epochs=6, **SMALL)
    seed_everything(0)
    with pytest.raises(ParameterError, match="Burst, stage 'train', epoch .*, step 5: the training loss is nan"): fit(Burst(**hparams), data, tmp_path, checkpoint_seconds=0)
    assert not (tmp_path/"model.safetensors").exists()
    state = torch.load(tmp_path/"stage0.resume", weights_only=True)
    assert state["epoch"] == 4 // per_epoch and all(v.isfinite().all() for v in state["weights"].values())
    Burst.broken = False                                                                 # with the fault gone it goes on from there
    history = fit(Burst(**hparams), data, tmp_path, checkpoint_seconds=0)
    assert [h["epoch"] for h in history] == list(range(6)) and np.isfinite([h["train_loss"] for h in history]).all()


@pytest.mark.parametrize("make, message", [
    (lambda: AutoencoderModel(shape=(12, 12), criterion="ssmi"), "did you mean 'ssim'"), (lambda: AutoencoderModel(), "needs the image's size"), (lambda: UncertainAutoencoder(shape=(12, 12), floor=1.0), "log variance"),
    (lambda: MemAE(shape=(12, 12), slots=0), "at least one"), (lambda: MemAE(shape=(12, 12), threshold=1.0), "a share from 0"), (lambda: MemAE(shape=(12, 12), entropy=-1e-4), "at least 0"), (lambda: MemAE(dense=True), "needs the image's size")])
def test_hyper_parameters_are_checked(make, message):
    with pytest.raises(ParameterError, match=message): make()


def test_every_criterion_is_offered(): assert set(CRITERIA) == {"l1", "l2", "ssim"} and AutoencoderModel.kinds[0] == "residual"


# ---- Student mixture

def drawn(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    a = multivariate_t([0, 0, 0], np.diag([1, 2, 0.5]), df=3, seed=rng).rvs(n)
    b = multivariate_t([8, -6, 5], [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 1]], df=12, seed=rng).rvs(n)
    return np.where(rng.random((n, 1)) < 0.3, b, a)


def test_the_density_is_that_of_scipy():
    X, model = drawn(), StudentMixture(2, random_state=1).fit(drawn())
    parts = [np.log(w) + multivariate_t(m, c, df=nu).logpdf(X) for w, m, c, nu in zip(model.weights_, model.means_, model.covariances_, model.nu_)]
    assert np.allclose(model.score_samples(X), np.logaddexp(*parts), atol=1e-9)
    order = np.argsort(-model.weights_)
    assert np.allclose(model.weights_[order], [0.7, 0.3], atol=0.03) and np.allclose(model.means_[order], [[0, 0, 0], [8, -6, 5]], atol=0.2)
    assert 2.3 < model.nu_[order[0]] < 4 < 7 < model.nu_[order[1]]
    p = 1 + 2 * 3 + 2 * 6 + 2
    assert np.isclose(model.bic(X), -2 * np.logaddexp(*parts).sum() + p * np.log(len(X)))


def test_em_rises_and_ends_at_the_maximum_of_the_likelihood():
    X = multivariate_t([1, 2], [[2, 0.5], [0.5, 1]], df=4, seed=0).rvs(400)
    model = StudentMixture(1, tol=1e-10, max_iter=2000, reg_covar=0).fit(X)
    assert (np.diff(model.history_) > -1e-10).all() and model.converged_

    def negative(p):
        L = np.array([[np.exp(p[2]), 0], [p[3], np.exp(p[4])]])
        return -multivariate_t(p[:2], L @ L.T, df=np.exp(p[5])).logpdf(X).mean()
    best = minimize(negative, [1, 2, 0.3, 0.3, 0, 1.4], method="Nelder-Mead", options=dict(maxiter=6000, maxfev=6000, xatol=1e-8, fatol=1e-12))
    assert np.isclose(-best.fun, model.score_samples(X).mean(), atol=1e-6) and np.isclose(np.exp(best.x[5]), model.nu_[0], rtol=0.01)


def test_many_degrees_of_freedom_are_a_gaussian_mixture():
    X = drawn(800)
    X = X[np.abs(X).max(1) < 15]
    ours, theirs = StudentMixture(2, nu=1e8, tol=1e-10, max_iter=1000).fit(X), GaussianMixture(2, reg_covar=1e-5, tol=1e-8, max_iter=1000, n_init=3, random_state=0).fit(X)
    assert np.allclose(ours.score_samples(X), theirs.score_samples(X), atol=1e-2)


def test_the_weighting_is_not_moved_by_linear_maps():
    X, A = drawn(600), np.random.default_rng(3).normal(size=(3, 3))
    one, two = (StudentMixture(1, reg_covar=0, tol=1e-9).fit(Z) for Z in (X, X @ A.T + 5))
    assert np.allclose(one.score_samples(X), two.score_samples(X @ A.T + 5) + np.log(abs(np.linalg.det(A))), atol=1e-3)


def test_degrees_of_freedom_stay_in_their_bounds():
    tau = np.ones(50)
    nu = 10.0
    for _ in range(300): nu = next_nu(tau, np.ones(50), nu, 2)                           # no vector is far: a Gaussian
    assert nu == NU[1]
    assert next_nu(tau, np.geomspace(1e-12, 1, 50), 1.0, 2) == NU[0]
    assert StudentMixture(1).fit(np.random.default_rng(0).normal(size=(2000, 2))).nu_[0] > 30


def test_a_mixture_by_bic_is_an_estimator():
    X = drawn(600)
    model = fit_detector(student((1, 2, 4)), X)
    assert model[-1].n_components_ == min(model[-1].bic_, key=model[-1].bic_.get) == 2
    assert model.score_samples(np.array([[1e4, 0, 0]]))[0] < model.score_samples(X).min()
    assert StudentByBIC().set_params(components=(1,)).get_params()["components"] == (1,)
    for bad in (np.ones((20, 2)), np.full((20, 2), np.nan)):
        with pytest.raises(DataError): fit_detector(student((1,)), bad)
    with pytest.raises(ParameterError, match="as many components"): fit_detector(student(), X[:4])
    duplicated = np.repeat(X[:5], 20, 0)
    assert np.isfinite(fit_detector(student((1, 4)), duplicated).score_samples(duplicated)).all()      # components that sit on one vector
