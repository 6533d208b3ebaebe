"""The variational family against independent truth: finite differences, Monte Carlo, the law of the masks, descent; and bad input."""
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from anomaly_nb.core import ParameterError, seed_everything
from anomaly_nb.models.cevae import CEVAE, draw_squares, hide
from anomaly_nb.models.gmvae import GMVAE, mixture_bound
from anomaly_nb.models.restoration import VAERestoration, energy, restore, total_variation
from anomaly_nb.models.vae import VAE, minmax, smooth
from test_models import batch_of

torch.set_num_threads(1)
SHAPES = {2: (13, 10), 3: (8, 9, 7)}


def made(cls, dims=2, channels=1, **settings):
    "A model in double precision whose batch normalisation has seen something, and a batch for it."
    seed_everything(0)
    model, batch = cls(channels, dims, SHAPES[dims], widths=(4, 8), latent=5, **settings), batch_of(SHAPES[dims], channels, 3)
    with torch.no_grad():
        for _ in range(20): model.train().loss(batch)
    return model.double().eval(), batch | {"image": batch["image"].double()}


def numerical(f, x, h=1e-6):
    "Central differences of f: [N,C,*spatial] -> [N] in every voxel of x [1,C,*spatial]; all moved images are one batch."
    moves = h * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape[1:])
    with torch.no_grad(): return ((f(x + moves) - f(x - moves)) / (2 * h)).view_as(x)


@pytest.mark.parametrize("dims, channels", [(2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("cls, settings", [(VAE, {"beta": 0.3}), (VAE, {"criterion": "l1"}), (CEVAE, {}), (GMVAE, {"components": 3})])
def test_gradient_scores_equal_finite_differences(cls, settings, dims, channels):
    model, batch = made(cls, dims, channels, smooth_sigma=0.0, **settings)
    image, inside, beta = batch["image"][:1], batch["foreground"][:1], model.hparams.beta
    exact = {kind: numerical(lambda x: sum(w * t for w, t in zip(weights, model.terms(x, inside, sample=False))), image) for kind, weights in
             {"elbo_gradient": (1, beta), "kl_gradient": (0, 1), "rec_gradient": (1, 0)}.items()}
    model.float()
    one = {"image": image.float(), "foreground": inside}
    for kind in set(exact) & set(model.kinds):
        found, truth = model.score(one, kind)["anomaly_map"], (exact[kind].abs().mean(1, keepdim=True) * inside).float()
        assert truth.max() > 1e-4
        assert (found - truth).abs().max() < 2e-3 * truth.max(), kind
    if "combined" in model.kinds:
        residual = (one["image"] - model.terms(one["image"], inside, sample=False)[2]).abs().mean(1, keepdim=True).detach()
        slope = exact["kl_gradient"].abs().mean(1, keepdim=True)
        low, high = slope[inside].min(), slope[inside].max()
        truth = (((slope - low) / (high - low)).float() * residual * inside)
        assert torch.allclose(model.score(one, "combined")["anomaly_map"], truth, atol=3e-3 * truth.max().item())


def test_image_scores_are_the_terms():
    model, batch = made(VAE, beta=0.5)
    model.float()
    batch["image"] = batch["image"].float()
    voxels = batch["foreground"].flatten(1).sum(1)
    with torch.no_grad(): rec, kl, drawn = model.terms(batch["image"], batch["foreground"], sample=False)
    bound = (rec + 0.5 * kl) / voxels
    residual = ((batch["image"] - drawn).abs() * batch["foreground"]).flatten(1).sum(1) / voxels
    for kind, truth in {"residual": residual, "elbo_gradient": bound, "kl_gradient": kl, "rec_gradient": rec / voxels, "combined": bound}.items():
        assert torch.allclose(model.score(batch, kind)["anomaly_score"], truth, rtol=1e-4), kind


@pytest.mark.parametrize("cls, settings", [(VAE, {}), (VAE, {"criterion": "l1"}), (GMVAE, {"components": 1})])
def test_elbo_agrees_with_monte_carlo(cls, settings):
    "E_q[log q(z|x) - log p(z) - log p(x|z)], every density written by torch.distributions, against the closed form and against `terms`."
    model, batch = made(cls, **settings)
    image, inside, n = batch["image"][:1], batch["foreground"][:1], 3000
    with torch.no_grad():
        mu, logvar = model.net.encode(image * inside)
        q = torch.distributions.Normal(mu[0], (0.5 * logvar[0]).exp())
        z = q.sample((n,))
        prior = torch.distributions.Normal(model.prior.means[0], (0.5 * model.prior.logvars[0]).exp()) if cls is GMVAE else torch.distributions.Normal(torch.zeros(5), torch.ones(5))
        drawn = model.net.decoder(z, image.shape[2:])
        likelihood = (torch.distributions.Laplace if settings.get("criterion") == "l1" else torch.distributions.Normal)(drawn, torch.ones_like(drawn))
        constant = math.log(2) if settings.get("criterion") == "l1" else 0.5 * math.log(2 * math.pi)
        log_x = ((likelihood.log_prob(image.expand_as(drawn)) + constant) * inside).flatten(1).sum(1)
        samples = q.log_prob(z).sum(1) - prior.log_prob(z).sum(1) - log_x
        torch.manual_seed(1)
        rec, kl, _ = model.terms(image.expand(n, *image.shape[1:]), inside.expand(n, *inside.shape[1:]), sample=True)
    error = (samples.std() / n**0.5).item() + ((rec + kl).std() / n**0.5).item()
    assert abs(samples.mean() - (rec + kl).mean()) < 4 * error and error < 0.02 * samples.mean().abs()


def test_elbo_bounds_the_likelihood():
    "-log p(x) by importance sampling lies below the mean negative ELBO, and above the smallest sampled one."
    model, batch = made(VAE)
    image, inside, n = batch["image"][:1], batch["foreground"][:1], 3000
    with torch.no_grad():
        rec, kl, _ = model.terms(image.expand(n, *image.shape[1:]), inside.expand(n, *inside.shape[1:]), sample=True)
        mu, logvar = model.net.encode(image * inside)
        torch.manual_seed(0)
        q = torch.distributions.Normal(mu[0], (0.5 * logvar[0]).exp())
        z = q.sample((n,))
        log_x = -model.error(image.expand(n, *image.shape[1:]), model.net.decoder(z, image.shape[2:]), inside.expand(n, *inside.shape[1:]))
        weights = log_x + torch.distributions.Normal(0, 1).log_prob(z).sum(1) - q.log_prob(z).sum(1)
    nll = -(weights.logsumexp(0) - math.log(n))
    assert -weights.max() < nll < (rec + kl).mean()


@pytest.mark.parametrize("components", [2, 5])
def test_mixture_bound(components):
    generator = torch.Generator().manual_seed(components)
    def normal(*shape): return torch.randn(*shape, generator=generator, dtype=torch.double)
    mu, logvar, means, logvars, logits = normal(4, 3), normal(4, 3) - 1, 2 * normal(components, 3), normal(components, 3), normal(components)
    weights = logits.log_softmax(0)
    bound, guess = mixture_bound(mu, logvar, means, logvars, weights)
    z = mu + (0.5 * logvar).exp() * normal(30_000, 4, 3)
    log_q = stats.norm(mu, (0.5 * logvar).exp()).logpdf(z).sum(2)                                                      # scipy's densities
    log_k = np.stack([stats.norm(m, np.exp(0.5 * v)).logpdf(z).sum(2) for m, v in zip(means.numpy(), logvars.numpy())], 2) + weights.numpy()
    joint = (log_q + (guess.numpy() * (np.log(guess.numpy()) - log_k)).sum(2)).mean(0)
    true = (log_q - np.logaddexp.reduce(log_k, axis=2)).mean(0)
    assert np.allclose(bound, joint, rtol=0.03, atol=0.03)
    assert (true <= bound.numpy() + 0.03).all()
    far = mixture_bound(torch.zeros(1, 3), torch.zeros(1, 3), torch.full((2, 3), 1e4), torch.zeros(2, 3), torch.tensor([0.5, 0.5]).log())
    assert far[0].isfinite() and torch.allclose(far[1].sum(1), torch.ones(1))                                          # far from all clouds: no overflow


@pytest.mark.parametrize("shape", [(48, 40), (16, 20, 12)])
def test_law_of_the_masks(shape):
    corner, side, there = draw_squares(30_000, shape, generator=torch.Generator().manual_seed(1))
    largest = math.ceil(min(shape) / 2)
    assert stats.chisquare(np.bincount(there.sum(1), minlength=3)).pvalue > 1e-3                                       # 0, 1, 2 equally likely
    assert stats.chisquare(np.bincount(side[:, 0], minlength=largest)).pvalue > 1e-3                                   # int(U(0, N/2))
    assert (there[:, 0] >= there[:, 1]).all()
    fixed = side[:, 0] == 3
    for axis, size in enumerate(shape): assert stats.chisquare(np.bincount(corner[fixed, 0, axis], minlength=size - 3 + 1)).pvalue > 1e-3      # every place where it fits
    assert stats.pearsonr(corner[fixed, 0, 0], corner[fixed, 1, 0]).pvalue > 1e-3                                      # two squares of one side lie independently
    assert stats.pearsonr(corner[fixed, 0, 0], corner[fixed, 0, 1]).pvalue > 1e-3


def test_hidden_squares_are_squares_of_one_grey():
    generator = torch.Generator().manual_seed(3)
    image, inside = torch.randn(200, 2, 24, 20, generator=generator), torch.ones(200, 1, 24, 20, dtype=torch.bool)
    corner, side, there = squares = draw_squares(200, (24, 20), most=1, generator=generator)
    grey = torch.rand(200, 1, generator=generator) + 10
    masked = hide(image, inside, squares, grey)
    for before, after, value, n, s in zip(image, masked, grey, there.sum(1), side[:, 0]):
        changed = before != after
        assert torch.equal(changed[0], changed[1]) and changed[0].sum() == n * s**2
        if changed.any():
            (rows, columns), = ndimage.find_objects(changed[0].numpy().astype(int))
            assert rows.stop - rows.start == columns.stop - columns.start == s and (after[changed] == value).all()
    assert not torch.equal(image, masked)


def test_greys_lie_between_the_extremes_of_the_batch_and_the_draw_is_seeded():
    model, batch = made(CEVAE, squares=3)
    image = batch["image"] * batch["foreground"]
    def masked(seed):
        torch.manual_seed(seed)
        return torch.cat([model.masked(image, batch["foreground"]) for _ in range(30)])
    found = masked(0)
    assert found.min() >= image.min() and found.max() <= image.max()
    assert torch.equal(found, masked(0)) and not torch.equal(found, masked(1))
    assert not found[~batch["foreground"].repeat(30, 1, 1, 1)].any()


def test_cevae_without_context_is_the_vae():
    model, batch = made(CEVAE, ce=0.0)
    plain = made(VAE)[0]
    plain.load_state_dict(model.state_dict())
    with torch.no_grad(): a, b = (np.mean([m.loss(batch).item() for _ in range(100)]) for m in (model, plain))
    assert abs(a / b - 1) < 0.03
    model.hparams.ce = 1.0                                                             # the context term alone: no KL, nothing sampled
    torch.manual_seed(5)
    with torch.no_grad():
        loss = model.loss(batch).item()
        torch.manual_seed(5)
        image = batch["image"] * batch["foreground"]
        drawn = model.net(model.masked(image, batch["foreground"]), sample=False)[0]
        truth = (model.error(image, drawn, batch["foreground"]).mean() / batch["foreground"].flatten(1).sum(1).double().mean()).item()
    assert abs(loss / truth - 1) < 1e-6


@pytest.mark.parametrize("dims", [2, 3])
def test_total_variation(dims):
    shape = SHAPES[dims]
    generator = torch.Generator().manual_seed(0)
    d, inside = torch.randn(2, 1, *shape, generator=generator, dtype=torch.double), torch.rand(2, 1, *shape, generator=generator) < 0.8
    for n in range(2):                                                                # voxel by voxel
        total, values, where = 0.0, d[n, 0].numpy(), inside[n, 0].numpy()
        for place in np.argwhere(where):
            squares = 0.0
            for axis in range(dims):
                ahead = place.copy(); ahead[axis] += 1
                if ahead[axis] < shape[axis] and where[tuple(ahead)]: squares += (values[tuple(ahead)] - values[tuple(place)])**2
            total += math.sqrt(squares + 0.1**2) - 0.1
        assert abs(total_variation(d, inside)[n].item() - total) < 1e-9
    assert not total_variation(torch.full_like(d, 7.0), inside).any()


@pytest.mark.parametrize("cls", [VAERestoration, GMVAE])
@pytest.mark.parametrize("dims, channels", [(2, 2), (3, 1)])
def test_restoration_descends(cls, dims, channels):
    model, batch = made(cls, dims, channels)
    y, inside = batch["image"], batch["foreground"]
    x, energies = restore(model, y, inside, 0.05, 20, 0.25)
    assert (energies.diff(dim=0) < 0).all()
    with torch.no_grad(): assert (energy(model, x, y, inside, 0.25) < energies[-1]).all()
    assert torch.equal((x - y) * ~inside, torch.zeros_like(y))
    slope = numerical(lambda at: energy(model, at, y[:1], inside[:1], 0.25), x[:1].clone())
    with torch.enable_grad():
        at = x[:1].clone().requires_grad_()
        g, = torch.autograd.grad(energy(model, at, y[:1], inside[:1], 0.25).sum(), at)
    assert (g - slope).abs().max() < 1e-3 * slope.abs().max()
    if cls is VAERestoration:
        model.hparams.step, model.hparams.steps = 0.05, 20
        model.float()
        found = model.score(batch | {"image": y.float()}, "restoration")["anomaly_map"]
        assert torch.allclose(found, ((y - x).abs().mean(1, keepdim=True) * inside).float(), atol=1e-3)


@pytest.mark.parametrize("cls", [VAE, CEVAE, VAERestoration, GMVAE])
def test_odd_input(cls):
    "Constant images, an empty foreground, a batch of one: finite maps, and nothing where there is no organ."
    model = cls(1, 2, (11, 7), widths=(4, 8), latent=3).eval()
    batch = {"image": torch.full((2, 1, 11, 7), 3.0), "foreground": torch.ones(2, 1, 11, 7, dtype=torch.bool)}
    batch["foreground"][1] = False
    for kind in model.kinds:
        many, one = model.score(batch, kind), model.score({k: v[:1] for k, v in batch.items()}, kind)
        assert all(v.isfinite().all() for v in many.values()) and not many["anomaly_map"][1].any()
        assert torch.allclose(one["anomaly_map"], many["anomaly_map"][:1], atol=1e-5)
    assert model.loss(batch).isfinite()


def test_errors_name_what_is_wrong():
    for make, words in ((lambda: VAE(1, 2, (8, 8), criterion="l3"), "criterion"), (lambda: CEVAE(1, 2, (8, 8), ce=-0.1), "ce"), (lambda: CEVAE(1, 2, (8, 8), squares=0), "squares"),
                        (lambda: VAERestoration(1, 2, (8, 8), step=0.0), "step"), (lambda: GMVAE(1, 2, (8, 8), components=0), "components")):
        with pytest.raises(ParameterError, match=words): make()
    model, batch = made(VAERestoration)
    with pytest.raises(ParameterError, match="a step shorter than"): restore(model.float(), batch["image"].float(), batch["foreground"], 1e3, 60, 0.25)


def test_minmax_and_smooth_stay_inside():
    generator = torch.Generator().manual_seed(0)
    values, inside = torch.rand(3, 1, 9, 8, generator=generator), torch.rand(3, 1, 9, 8, generator=generator) < 0.5
    scaled = minmax(values, inside)
    for v, s, f in zip(values, scaled, inside):
        assert np.allclose(s[f], (v[f] - v[f].min()) / (v[f].max() - v[f].min()), atol=1e-6) and not s[~f].any()
    assert torch.allclose(smooth(values, 1.0, inside), smooth(torch.where(inside, values, 99.0), 1.0, inside))           # what lies outside does not come in
