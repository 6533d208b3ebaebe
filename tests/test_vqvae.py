"""The quantiser against MONAI's layer and scikit-learn, the prior over codes against its definition, and bad input to both models."""
import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from anomaly_nb.core import ParameterError, seed_everything
from anomaly_nb.models.code_prior import ORDERS, VQPrior, code_order, resample, unlikelihood
from anomaly_nb.models.fit import fit
from anomaly_nb.models.model import load_model, save_model
from anomaly_nb.models.quantizer import Quantizer, perplexity, spread_seeds, usage
from anomaly_nb.models.vqvae import VQVAE, organ_cells
from test_models import batch_of

torch.set_num_threads(1)


def twins(dims, seed=0, **settings):
    "MONAI's layer and ours, with the same codes."
    from monai.networks.layers.vector_quantizer import EMAQuantizer
    seed_everything(seed)
    theirs, ours = EMAQuantizer(dims, 8, 4, **settings), Quantizer(8, 4, restart=0, beta=settings.get("commitment_cost", 0.25), decay=settings.get("decay", 0.99))
    ours.codebook.copy_(theirs.embedding.weight); ours.sums.copy_(theirs.ema_w)
    return theirs, ours


@pytest.mark.parametrize("dims, settings", [(2, {}), (3, {}), (2, dict(commitment_cost=1.0, decay=0.8))])
def test_quantizer_follows_monai_over_steps(dims, settings):
    theirs, ours = twins(dims, **settings)
    for step in range(5):
        z = torch.randn(3, 4, *(5, 6, 2)[:dims]) + step
        mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        (z_q, loss, k), (their_q, their_loss, their_k) = ours(mine), theirs(other)
        weight = torch.randn_like(z)
        ((z_q * weight).sum() + loss).backward(); ((their_q * weight).sum() + their_loss).backward()
        assert torch.equal(k, their_k) and torch.allclose(z_q, their_q)
        torch.testing.assert_close(loss, their_loss)
        torch.testing.assert_close(mine.grad, other.grad)                                       # straight through, plus commitment
        torch.testing.assert_close(mine.grad - weight, 2 * ours.beta * (z - z_q.detach()) / z.numel(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(ours.codebook, theirs.embedding.weight)
        torch.testing.assert_close(ours.sizes, theirs.ema_cluster_size)


def test_perplexity_is_that_of_monais_wrapper():
    from monai.networks.layers.vector_quantizer import VectorQuantizer
    theirs, ours = twins(2)
    wrapper, z = VectorQuantizer(theirs), torch.randn(2, 4, 9, 9)
    wrapper(z)
    assert perplexity(usage(ours(z)[2], 8)).item() == pytest.approx(wrapper.perplexity.item(), rel=1e-4)


def test_nearest_agrees_with_a_search_tree():
    q, z = Quantizer(17, 3), torch.randn(2, 3, 5, 4, 3)
    distance, k = NearestNeighbors(n_neighbors=1).fit(q.codebook.numpy()).kneighbors(z.movedim(1, -1).reshape(-1, 3).numpy())
    found, gaps = q.nearest(z)
    assert (found.flatten().numpy() == k[:, 0]).all() and np.allclose(gaps.flatten(), distance[:, 0], atol=1e-3)


def test_distances_keep_float32_under_autocast():
    q = Quantizer(4, 2)
    q.codebook += 1000
    z = q.embed(torch.tensor([[[0, 3]]])) + 0.5
    with torch.autocast("cpu", torch.bfloat16): assert torch.allclose(q.nearest(z)[1], q.nearest(z)[1].new_full((1, 1, 2), 0.5**0.5), atol=0.3)


@pytest.mark.parametrize("restart, alive", [(0.03, True), (0, False)])
def test_a_dead_code_comes_back_only_with_restart(restart, alive):
    seed_everything(0)
    q, z = Quantizer(4, 2, restart=restart, decay=0.5), 0.1 * torch.randn(1, 2, 40) + torch.tensor([1.0, 1.0])[:, None]
    for _ in range(3): q(z)
    q.codebook[2], q.sizes[2], q.sums[2] = 1e4, 0.0, 0.0
    for _ in range(3): q(z)
    assert (q.codebook[2].norm() < 10) == alive or (not alive and not q.codebook[2].any())
    assert ((usage(q.eval()(z)[2], 4) > 0)[2].item()) == alive


def test_seeds_spread_to_rare_groups():
    vectors = torch.cat([torch.zeros(990, 2), torch.tensor([[50.0, 0], [0, 50.0]]).repeat(5, 1)])     # 99 % background
    for seed in range(5):
        seed_everything(seed)
        assert len(spread_seeds(vectors, 3, vectors[:0]).unique(dim=0)) == 3
        assert spread_seeds(vectors, 2, torch.zeros(1, 2)).norm(dim=1).min() > 40


def test_constant_and_broken_batches():
    q = Quantizer(4, 2)
    q(torch.ones(2, 2, 3, 3))                                                     # nothing to spread
    assert q.codebook.isfinite().all()
    before = q.codebook.clone()
    assert q(torch.full((1, 2, 3, 3), torch.nan))[1].isnan() and torch.equal(q.codebook, before)


@pytest.mark.parametrize("make, words", [
    (lambda: Quantizer(1), "at least 2"), (lambda: Quantizer(decay=1.0), "decay < 1"), (lambda: VQVAE(embedding="codes"), "histogram"), (lambda: VQPrior(), "image's size"),
    (lambda: VQPrior(shape=(16, 16), order="spiral"), "snake"), (lambda: VQPrior(shape=(16, 16), unlikely=0), "share"), (lambda: VQPrior(shape=(16, 16), draws=0), "at least 1"),
    (lambda: VQPrior(spatial_dims=3, shape=(128, 128, 128)), "at most 4096")])
def test_bad_parameters_are_named(make, words):
    with pytest.raises(ParameterError, match=words): make()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [(4, 3), (2, 3, 4)])
def test_orders_tell_every_cell_once(order, grid):
    assert sorted(code_order(grid, order).tolist()) == list(range(np.prod(grid)))


def test_a_snake_steps_to_a_neighbour():
    for grid in ((5, 4), (3, 4, 5)):
        path = np.stack(np.unravel_index(code_order(grid, "snake").numpy(), grid), 1)
        assert (np.abs(np.diff(path, axis=0)).sum(1) == 1).all()


@pytest.fixture(scope="module")
def prior():
    "An untrained prior of 7 codes and 12 places."
    seed_everything(0)
    return VQPrior(1, 2, (16, 12), codes=7, dim=4, widths=(8, 8), blocks=1, width=16, heads=2).eval()


def test_likelihoods_sum_to_one_over_codes_and_sequences(prior):
    sequence = torch.randint(7, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose((-unlikelihood(prior.prior, 7, sequence)).exp().sum(1), torch.ones(3, 12), atol=1e-5)
        pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))              # all beginnings of two codes
        whole = unlikelihood(prior.prior, 7, pairs).gather(1, pairs[:, None])[:, 0].sum(1)
    assert (-whole).exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_later_code_does_not_change_an_earlier_likelihood(prior, place):
    sequence = torch.randint(7, (2, 12), generator=torch.Generator().manual_seed(1))
    other = sequence.clone(); other[:, place] = (other[:, place] + 1) % 7
    with torch.no_grad(): a, b = (unlikelihood(prior.prior, 7, s) for s in (sequence, other))
    assert torch.allclose(a[..., :place + 1], b[..., :place + 1], atol=1e-6)         # its own place included: it depends on those before
    assert place == 11 or (a[..., place + 1] - b[..., place + 1]).abs().max() > 1e-4   # and the later ones do change


def slow_resample(net, codes, sequence, threshold, may, noise):
    "Place by place, image by image."
    sequence, replaced = sequence.clone(), torch.zeros_like(may)
    for b in range(len(sequence)):
        for i in range(sequence.shape[1]):
            nll = unlikelihood(net, codes, sequence[b:b + 1])[0, :, i]
            if not may[b, i] or nll[sequence[b, i]] <= threshold: continue
            allowed = [k for k in range(codes) if nll[k] <= max(threshold, nll.min())]
            sequence[b, i], replaced[b, i] = max(allowed, key=lambda k: noise[k, i] - nll[k]), True
    return sequence, replaced


@pytest.mark.parametrize("threshold", [1.0, 1.95, 2.2, torch.inf])
def test_resampling_is_the_sequential_one(prior, threshold):
    generator = torch.Generator().manual_seed(2)
    sequence, may = torch.randint(7, (4, 12), generator=generator), torch.rand(4, 12, generator=generator) > 0.2
    noise = -torch.log(-torch.log(torch.rand(7, 12, generator=generator)))
    with torch.no_grad():
        fast, slow = (f(prior.prior, 7, sequence, torch.tensor(threshold), may, noise) for f in (resample, slow_resample))
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    assert fast[1].any() == (threshold < torch.inf) and not fast[1][~may].any()
    assert torch.equal(fast[0][~fast[1]], sequence[~fast[1]])


def test_resampled_codes_follow_the_prior(prior):
    "With many draws of the noise, the shares of the drawn codes are the prior's among the likely ones."
    sequence = torch.zeros(1, 12, dtype=torch.int64)
    may = torch.zeros(1, 12, dtype=torch.bool); may[0, 4] = True
    with torch.no_grad():
        nll = unlikelihood(prior.prior, 7, sequence)[0, :, 4]
        threshold = nll.sort().values[3:5].mean()                                     # four are likely
        if nll[0] <= threshold: sequence[0, 4] = nll.argmax()                          # the one that stands there must be unlikely
        generator, drawn = torch.Generator().manual_seed(0), []
        for _ in range(200): drawn.append(resample(prior.prior, 7, sequence, threshold, may, -torch.log(-torch.log(torch.rand(7, 12, generator=generator))))[0][0, 4].item())
    expected = torch.where(nll <= threshold, (-nll).exp(), 0.0)
    assert np.abs(np.bincount(drawn, minlength=7) / 200 - (expected / expected.sum()).numpy()).max() < 0.1


def test_order_and_grid_are_inverse(prior):
    for order in ORDERS:
        model = VQPrior(1, 2, (16, 12), order=order, widths=(8, 8), width=16, heads=2)
        cells = torch.arange(24).view(2, 4, 3)
        assert torch.equal(model.to_grid(model.to_sequence(cells)), cells)
    with pytest.raises(ParameterError, match="grid of"): prior.score(batch_of((20, 12), 1))


class Batches:
    "A data module of one batch; it is its own loader."
    channels = shape = spatial_dims = None
    def __init__(self, batch): self.batch, self.pools = batch, {"train": [batch]}
    def require(self, *names): pass
    def loader(self, pool, **ignored): return self
    def __len__(self): return 1
    def __iter__(self): return iter([dict(self.batch)])


def test_second_stage_leaves_the_first_alone():
    seed_everything(0)
    batch = batch_of((16, 12), 1)
    model = VQPrior(1, 2, (16, 12), codes=7, widths=(8, 8), blocks=1, width=16, heads=2, epochs=3, prior_epochs=3)
    history = fit(model, Batches(batch))
    assert [row["stage"] for row in history] == ["codes"] * 3 + ["prior"] * 3 and torch.isfinite(model.threshold)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    told, part = {k: v.clone() for k, v in model.prior.state_dict().items()}, model.stages()[1].module
    part.train()
    optimizer = part.configure_optimizers()
    for _ in range(3):
        optimizer.zero_grad(); part.loss(batch).backward(); optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.net.state_dict().items())   # codebook, statistics of the norms and weights
    assert any(not torch.equal(v, told[k]) for k, v in model.prior.state_dict().items())


def test_threshold_is_the_quantile_of_the_organs_cells():
    seed_everything(0)
    batch, model = batch_of((40, 44), 1), VQPrior(1, 2, (40, 44), widths=(8, 8), width=16, heads=2, unlikely=0.1)
    model.net(batch["image"])                                                         # fills the codebook
    model.eval()
    with torch.no_grad():
        model.fit_statistics([batch, batch])
        nll = model.surprise(batch)[organ_cells(batch["foreground"], 4)]
    assert len(nll) > 300 and (nll > model.threshold).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_empty_foreground_and_histograms(tmp_path):
    batch = batch_of((16, 12), 1, count=2)
    batch["foreground"][1] = False
    for cls, more in ((VQVAE, {}), (VQPrior, dict(width=16, heads=2))):
        model = cls(1, 2, (16, 12), embedding="histogram", codes=7, widths=(8, 8), **more).eval()
        with torch.no_grad():
            for kind in model.kinds:
                found = model.score(batch, kind)
                assert found["anomaly_map"].isfinite().all() and found["anomaly_score"][1] == 0
            share = model.embed(batch)["embedding"]
        assert share.sum(1).tolist() == pytest.approx([1, 0], abs=1e-5)
        again = load_model(save_model(model, tmp_path/"m.safetensors"), cls)
        assert again.hparams.embedding == "histogram"


def test_a_diverging_loss_names_the_step_and_keeps_the_codebook():
    model = VQVAE(1, 2, (16, 12), codes=7, widths=(8, 8), epochs=2)
    batch = batch_of((16, 12), 1)
    batch["image"][0, 0, 8, 6] = torch.nan
    with pytest.raises(ParameterError, match="step 1"): fit(model, Batches(batch))
    assert model.net.quantizer.codebook.isfinite().all()
