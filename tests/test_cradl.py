"""Contrastive learning and CRADL: against slow formulas, scikit-learn and finite differences, and on bad input."""
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, median_filter
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler

from anomaly_nb.core import DataError, ParameterError, seed_everything
from anomaly_nb.methods.cradl import CRADL, fit_mixture, masked_median, mixture_nll
from anomaly_nb.models.checks import check_model
from anomaly_nb.models.model import load_model, save_model
from anomaly_nb.models.predict import trainer_of
from anomaly_nb.models.simclr import SimCLR, SimCLRNet, draw_view, nt_xent, random_crop, random_masks, random_mirror, random_noise, warm_cosine

torch.set_num_threads(1)


def organ(shape, count=6, channels=1, seed=0):
    "Images of waves in balls of different size: a batch."
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = 0.6 + 0.3 * torch.rand(count, generator=generator)
    foreground = torch.stack([(sum(a**2 for a in axes) < r)[None] for r in radius])
    image = torch.stack([torch.stack([torch.sin(3 * axes[0] * w + c) for c in range(channels)]) for w in torch.randn(count, generator=generator)])
    return {"image": image * foreground + 0.1 * torch.randn(image.shape, generator=generator), "foreground": foreground, "id": [str(i) for i in range(count)]}


def fitted(**settings):
    "A CRADL of random weights with a mixture of many images, and a batch."
    seed_everything(0)
    batch = organ((21, 18), 40)
    model = CRADL(shape=(21, 18), latent=4, widths=(4, 8), **settings).eval()
    with torch.no_grad(): model.fit_statistics([batch])
    return model, {k: v[:6] for k, v in batch.items()}


@pytest.mark.parametrize("tau, N, D", [(0.5, 2, 3), (0.07, 7, 16), (2.0, 1, 4)])
def test_nt_xent_against_a_slow_loop(tau, N, D):
    rng = np.random.default_rng(N)
    a, b = rng.normal(size=(2, N, D))
    z, total = np.concatenate([a, b]), 0.0
    cosine = lambda u, v: float(u @ v / np.sqrt(u @ u) / np.sqrt(v @ v))
    for i in range(2 * N):
        partner = i + N if i < N else i - N
        strangers = [math.exp(cosine(z[i], z[k]) / tau) for k in range(2 * N) if k != i]
        total -= math.log(math.exp(cosine(z[i], z[partner]) / tau) / sum(strangers))
    assert float(nt_xent(torch.tensor(a), torch.tensor(b), tau)) == pytest.approx(total / (2 * N), rel=1e-5, abs=1e-6)


def test_nt_xent_symmetry_gradient_and_bf16():
    a, b = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(nt_xent(a, b), nt_xent(b, a)) and torch.allclose(nt_xent(a, b), nt_xent(a[order], b[order]))
    assert not torch.allclose(nt_xent(a, b), nt_xent(a, b[order]))                     # who is whose partner matters
    with torch.autocast("cpu", torch.bfloat16): coarse = nt_xent(a, b)
    assert coarse.dtype == torch.float32 and torch.equal(coarse, nt_xent(a, b))
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    nt_xent(x, y).backward()
    assert torch.allclose((x.grad * x).sum(1), torch.zeros(8), atol=1e-6)              # lengths do not count: no slope along z
    assert torch.isfinite(nt_xent(torch.zeros(3, 4), torch.zeros(3, 4)))               # a dead network is no NaN


def test_nt_xent_refuses():
    for a, b in ((torch.zeros(3, 4), torch.zeros(2, 4)), (torch.zeros(3, 4, 2), torch.zeros(3, 4, 2))):
        with pytest.raises(DataError, match="same shape"): nt_xent(a, b)
    with pytest.raises(ParameterError, match="above 0"): nt_xent(torch.zeros(2, 2), torch.zeros(2, 2), -0.1)


@pytest.mark.parametrize("shape", [(13, 9), (7, 9, 5)])
def test_alterations_keep_their_law(shape):
    one = torch.rand(1, 2, *shape, generator=torch.Generator().manual_seed(0))
    x, inside = one.repeat(600, *[1] * (one.ndim - 1)), torch.ones(600, 1, *shape)
    generator = torch.Generator().manual_seed(1)
    flips = [one.flip([a + 2 for a in range(len(shape)) if n >> a & 1]) for n in range(2**len(shape))]
    mirrored = random_mirror(x, generator)
    counts = torch.stack([(mirrored == f).flatten(1).all(1).sum() for f in flips])
    assert counts.sum() == 600 and counts.min() > 600 / len(flips) * 0.6               # all mirror images, about equally often, and nothing else
    spread = (random_noise(x, inside, 0.4, generator) - x).flatten(1).std(1)
    assert abs(spread.mean() - 0.2) < 0.02 and spread.max() < 0.5
    masked = random_masks(x, inside, 1, 0.5, generator)
    hit = (masked != x).any(1)
    assert (hit.flatten(1).float().mean(1) <= 0.5**len(shape) * 1.9).all() and 0.25 < hit.flatten(1).any(1).float().mean() <= 0.62
    for image, where in zip(masked, hit):
        assert not where.any() or len(image[:, where].unique()) == 1                   # one value in all channels
    assert masked.min() >= x.min() and masked.max() <= x.max()


def test_crop_is_a_box_of_the_image():
    ramp = torch.stack(torch.meshgrid(torch.arange(40.), torch.arange(30.), indexing="ij"))[None].repeat(200, 1, 1, 1)
    cropped = random_crop(ramp, 0.5, torch.Generator().manual_seed(0))[:, :, 1:-1, 1:-1]        # the outermost voxels may touch the zeros outside
    steps = (cropped[:, 0, 1:] - cropped[:, 0, :-1], cropped[:, 1, :, 1:] - cropped[:, 1, :, :-1])
    sides = [s.flatten(1).mean(1) for s in steps]
    assert torch.allclose(sides[0], sides[1], atol=1e-3) and sides[0].min() >= 0.5 and sides[0].max() <= 1       # one zoom for all axes
    assert all((s.flatten(1).std(1) < 2e-2).all() for s in steps)                                # linear
    assert cropped.min() >= 0 and cropped[:, 0].max() <= 39 and cropped[:, 1].max() <= 29
    assert torch.allclose(random_crop(ramp, 1.0), ramp, atol=1e-3)


def test_views_do_not_see_outside_and_do_not_change_their_input():
    batch = organ((21, 18), channels=2)
    image, foreground = batch["image"], batch["foreground"]
    before, view = image.clone(), lambda x: draw_view(x, foreground, generator=torch.Generator().manual_seed(2))
    assert torch.equal(view(image), view(torch.where(foreground, image, 99.0))) and torch.equal(image, before)
    empty = draw_view(image, torch.zeros_like(foreground), generator=torch.Generator().manual_seed(2))
    assert not empty.any()                                                             # an empty foreground gives an empty picture


def test_learning_rate_warms_up_and_falls():
    factors = [warm_cosine(e, 20, 4) for e in range(21)]
    assert factors[0] == pytest.approx(0.2) and np.all(np.diff(factors[:5]) > 0) and factors[4] == 1 and np.all(np.diff(factors[4:]) < 0) and factors[20] == pytest.approx(0)
    assert warm_cosine(0, 1, 0) == 1 and warm_cosine(0, 1, 5) > 0


def test_training_with_batches_of_one_is_refused():
    one = organ((16, 16), 1)
    part = SimCLR(shape=(16, 16), latent=4, widths=(4,))
    loader = torch.utils.data.DataLoader([0, 0], batch_size=1, collate_fn=lambda _: dict(one))
    with pytest.raises(ParameterError, match="every batch held one image"):
        trainer_of("cpu", "32-true", max_epochs=1, limit_val_batches=0).fit(part, loader, loader)
    two = torch.utils.data.DataLoader([2, 1], batch_size=1, collate_fn=lambda n: {k: v[:1].repeat(n[0], 1, 1, 1) if torch.is_tensor(v) else v for k, v in one.items()})
    trainer_of("cpu", "32-true", max_epochs=1, limit_val_batches=0).fit(part, two, two)  # a last batch of one is no fault
    with pytest.raises(ParameterError, match="crop"): SimCLR(shape=(16, 16), crop=0)


def test_networks_take_any_size():
    assert SimCLRNet(1, 2, None, (4, 8), 5, 6, dense=False)(torch.rand(2, 1, 33, 50)).shape == (2, 6)
    assert SimCLRNet(2, 3, (9, 8, 7), (4,), 5, 6)(torch.rand(2, 2, 9, 8, 7)).shape == (2, 6)


@pytest.mark.parametrize("K", [1, 3])
def test_likelihood_against_scikit_learn(K):
    rng = np.random.default_rng(K)
    Z = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) * 5 + 8 * rng.integers(0, K, size=(300, 1)) + 100
    found, bic = fit_mixture(Z, (K,))
    scaler = StandardScaler().fit(Z)
    theirs = GaussianMixture(K, reg_covar=1e-5, random_state=0).fit(scaler.transform(Z))
    new = rng.normal(size=(40, 6)) * 30 + 100
    nll = mixture_nll((torch.tensor(new) - found["shift"]) / found["scale"], found["pi"], found["mu"], found["P"])
    np.testing.assert_allclose(nll.numpy(), -theirs.score_samples(scaler.transform(new)), rtol=1e-8)
    assert bic == {K: pytest.approx(theirs.bic(scaler.transform(Z)))}


def test_mixture_refuses():
    for Z, error in ((np.full((9, 2), np.nan), "not finite"), (np.ones((9, 2)), "the same"), (np.ones((1, 2)), "at least two")):
        with pytest.raises((DataError, ParameterError), match=error): fit_mixture(Z)


def test_fitted_model_equals_scikit_learn_from_image_to_nats():
    model, batch = fitted()
    everything = organ((21, 18), 40)
    with torch.no_grad(): h = model.encode(everything["image"], everything["foreground"]).double().numpy()
    scaler = StandardScaler().fit(h)
    K = len(model.pi_)
    theirs = GaussianMixture(K, reg_covar=1e-5, random_state=0).fit(scaler.transform(h))
    np.testing.assert_allclose(model.nll(everything["image"], everything["foreground"]).detach().numpy(), -theirs.score_samples(scaler.transform(h)), rtol=1e-3, atol=1e-3)
    assert K == min(model.bic_, key=model.bic_.get)


def test_slope_against_finite_differences_voxel_by_voxel(monkeypatch):
    model, batch = fitted(runs=1, jitter=0.0, median=1, smooth_sigma=0.0)
    model.double()
    monkeypatch.setattr(CRADL, "encode", lambda self, image, foreground: self.contrast.net.encode(image * foreground))
    x, inside, h = batch["image"][:1].double(), batch["foreground"][:1], 1e-6
    slope = model.slope(x, inside)
    voxels = [tuple(v) for v in inside[0, 0].nonzero()[::17].tolist()] + [(0, 0)]
    for v in voxels:
        step = torch.zeros_like(x); step[0, 0][v] = h
        difference = ((model.nll(x + step, inside) - model.nll(x - step, inside)) / (2 * h)).abs().item()
        assert difference == pytest.approx(slope[0, 0][v].item(), rel=1e-3, abs=1e-5)
    assert slope[0, 0][0, 0] == 0 and max(slope[0, 0][v] for v in voxels) > 0.01        # outside nothing, inside something


def test_noisy_runs_are_the_same_for_every_image_and_every_call():
    model, batch = fitted(runs=3, jitter=0.2)
    whole, again = (model.score(batch)["anomaly_map"] for _ in range(2))
    assert torch.equal(whole, again)
    twice = {k: torch.cat([v[:1], v[:1]]) for k, v in batch.items() if k != "id"}
    found = model.score(twice)["anomaly_map"]
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[0], whole[0], rtol=1e-3, atol=1e-4 * whole.std())
    torch.manual_seed(5); state = torch.get_rng_state()
    model.score(batch)
    assert torch.equal(state, torch.get_rng_state())                                    # scoring draws from nobody else's generator


def test_filters_against_scipy():
    x = torch.rand(2, 1, 17, 14, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(x, dtype=torch.bool)
    for size in (3, 5):
        edge = size // 2
        ours = masked_median(x, everywhere, size)[..., edge:-edge, edge:-edge]
        theirs = np.stack([median_filter(i[0].numpy(), size) for i in x])[:, edge:-edge, edge:-edge]
        np.testing.assert_allclose(ours[:, 0].numpy(), theirs, rtol=1e-6)
    volume = torch.rand(1, 1, 20, 6, 7)
    np.testing.assert_allclose(masked_median(volume, torch.ones_like(volume, dtype=torch.bool), 3)[0, 0, 1:-1, 1:-1, 1:-1].numpy(), median_filter(volume[0, 0].numpy(), 3)[1:-1, 1:-1, 1:-1], rtol=1e-6)
    model, batch = fitted(runs=1, jitter=0.0)                                            # the map in the middle of a wide organ: median 5, then 7 x 7 Gaussian
    full = torch.ones_like(batch["foreground"])
    raw, found = model.slope(batch["image"], full), model.score(batch | {"foreground": full})["anomaly_map"]
    slow = gaussian_filter(median_filter(raw[0, 0].numpy(), 5), 1.5, radius=3)
    np.testing.assert_allclose(found[0, 0, 5:-5, 5:-5].numpy(), slow[5:-5, 5:-5], rtol=1e-4)


def test_empty_organ_constant_image_and_one_image():
    model, batch = fitted()
    strange = {"image": torch.stack([torch.zeros(1, 21, 18), torch.full((1, 21, 18), 3.0), batch["image"][0]]), "foreground": torch.stack([torch.zeros(1, 21, 18, dtype=torch.bool), torch.ones(1, 21, 18, dtype=torch.bool), batch["foreground"][0]])}
    answer = model.score(strange)
    assert answer["anomaly_map"].isfinite().all() and answer["anomaly_score"].isfinite().all() and not answer["anomaly_map"][0].any()
    assert model.score({k: v[:1] for k, v in strange.items()})["anomaly_map"].shape == (1, 1, 21, 18)
    with torch.no_grad():
        with pytest.raises(DataError, match="the same"): model.fit_statistics([{"image": torch.zeros(4, 1, 21, 18), "foreground": torch.ones(4, 1, 21, 18, dtype=torch.bool)}])


def test_saved_with_another_number_of_components(tmp_path):
    model, batch = fitted(components=3)
    again = load_model(save_model(model, tmp_path/"cradl.safetensors"), CRADL)
    assert len(again.pi_) == 3 and torch.equal(model.score(batch)["anomaly_map"], again.score(batch)["anomaly_map"])
    with pytest.raises(ParameterError, match="no mixture yet"): CRADL(shape=(21, 18)).score(batch)


@pytest.mark.parametrize("shape, channels", [((21, 18), 1), ((10, 13, 9), 2)])
def test_shared_check(shape, channels):
    batch = organ(shape, channels=channels)
    batch |= {"valid": batch["foreground"], "meta": [{}] * 6, "subject": batch["id"]}
    report = check_model(lambda: CRADL(channels=channels, spatial_dims=len(shape), shape=shape), batch)
    print(report)
