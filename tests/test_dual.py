"""f-AnoGAN and dual-distribution discrepancy: independent truth, unions of pools, and faults."""
import numpy as np
import pytest
import torch
from torch import nn

from anomaly_nb.core import ParameterError, PoolError, collate, rng_of, seed_everything
from anomaly_nb.data.brain import brain_records
from anomaly_nb.data.module import AnomalyDataModule, pools_of
from anomaly_nb.data.sets import SliceSet, VolumeSet
from anomaly_nb.methods.ddad import DDAD, DDADRefined
from anomaly_nb.models.checks import check_model
from anomaly_nb.models.fanogan import FAnoGAN, gradient_norms
from anomaly_nb.models.fit import fit

torch.set_num_threads(1)
SMALL = dict(widths=(4, 8), latent=8)


def sample(name, shape=(20, 17), bump=0.0):
    "A disc with smooth texture; `bump` is added to a square of it."
    rng, axes = rng_of(name), np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = (sum(a**2 for a in axes) < 0.8)[None]
    image = (np.sin(3 * axes[0] * rng.normal()) + 0.1 * rng.normal(size=shape))[None] * inside
    mask = np.zeros_like(inside)
    if bump: mask[:, 8:12, 6:10] = True
    return dict(image=(image + bump * mask).astype("float32"), foreground=inside, valid=inside, mask=mask, mask_known=True, label=0, id=name, subject=name, meta={})


def batch_of(count=6, shape=(20, 17)): return collate([sample(f"b{i}", shape) for i in range(count)])


class Toy:
    "The interface of the data module that `fit` uses."
    channels, spatial_dims, shape = 1, 2, (20, 17)
    def __init__(self, **pools): self.pools = {k: [sample(f"{k}{i}", bump=3.0 * (k == "unlabelled" and i % 2)) for i in range(n)] for k, n in pools.items()}
    def require(self, needs, who):
        for name in needs:
            if name not in self.pools: raise PoolError(who, f"needs the pool {name}", "data with it")
    def loader(self, pool, task=False, shuffle=False, batch_size=8):
        items = [s for p in pool.split("+") for s in self.pools[p]]
        order = rng_of("order", len(items)).permutation(len(items)) if shuffle else range(len(items))
        return torch.utils.data.DataLoader([items[i] for i in order], batch_size=batch_size, collate_fn=collate)


def test_slope_against_finite_differences():
    "The norm of the critic's slope, and the slope of that norm with respect to a weight."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(3 * 9, 1))
    x, h = torch.randn(1, 1, 5, 5), 1e-3
    norm = gradient_norms(lambda v: net(v)[:, 0], x)
    slope = torch.stack([(net(x + h * e.view_as(x)) - net(x - h * e.view_as(x)))[0, 0] / (2 * h) for e in torch.eye(25)])
    assert torch.isclose(norm[0], slope.norm(), rtol=1e-3)
    norm.sum().backward()
    wanted, weight = net[0].weight.grad[0, 0, 0, 0].item(), net[0].weight
    values = []
    for step in (h, -h):
        with torch.no_grad(): weight[0, 0, 0, 0] += step
        values.append(gradient_norms(lambda v: net(v)[:, 0], x).item())
        with torch.no_grad(): weight[0, 0, 0, 0] -= step
    assert np.isclose(wanted, (values[0] - values[1]) / (2 * h), rtol=2e-2, atol=1e-4)


def test_critic_estimates_wasserstein_distance():
    "Two clouds of constant images at a known distance: the trained critic's gap is that distance, the generator's side untouched."
    seed_everything(0)
    model = FAnoGAN(1, 2, (8, 8), widths=(8,), latent=2)
    gan, optimizer = model.gan, torch.optim.Adam(model.gan.critic.parameters(), lr=5e-3, betas=(0.5, 0.9))
    real, fake = torch.zeros(16, 1, 8, 8), torch.full((16, 1, 8, 8), 0.25)          # |difference| = 0.25 * 8 = 2
    for _ in range(150):
        eps = torch.rand(16, 1, 1, 1)
        loss = gan.critic(fake).mean() - gan.critic(real).mean() + 10 * ((gradient_norms(gan.critic, eps * real + (1 - eps) * fake) - 1)**2).mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    gap = (gan.critic(real).mean() - gan.critic(fake).mean()).item()
    assert abs(gap - 2.0) < 0.35, gap               # lambda = 10 allows slopes a little above 1


@pytest.mark.parametrize("batches, every, wanted", [(3, 4, [4, 8]), (4, 2, [2, 4, 6, 8, 10, 12]), (4, 1, list(range(1, 13)))])
def test_generator_learns_every_few_batches(monkeypatch, batches, every, wanted):
    "Counted through three epochs, also when an epoch is shorter than `critic_steps`."
    from anomaly_nb.models.fanogan import WGAN
    steps, now = [], []
    teach, old = WGAN.teach_critic, WGAN.teach_generator
    monkeypatch.setattr(WGAN, "teach_critic", lambda self, x, number: (now.append(number), teach(self, x, number))[1])
    monkeypatch.setattr(WGAN, "teach_generator", lambda self, count: (steps.append(now[-1]), old(self, count))[1])
    fit(FAnoGAN(1, 2, (20, 17), **SMALL, critic_steps=every, gan_epochs=3, epochs=1), Toy(train=8 * batches, val=2))
    assert now == list(range(1, 3 * batches + 1)) and steps == wanted


def test_divergence_names_its_step():
    seed_everything(0)
    with pytest.raises(ParameterError, match=r"stage 'gan', epoch \d+, step \d+.*diverges.*gan_lr"):
        fit(FAnoGAN(1, 2, (20, 17), **SMALL, gan_lr=3.0, gan_epochs=40, epochs=1), Toy(train=16, val=2))
    for wrong in (dict(critic_steps=0), dict(limit=-1.0), dict(gan_lr=0.0)):
        with pytest.raises(ParameterError, match=next(iter(wrong))): FAnoGAN(1, 2, (20, 17), **wrong)
    with pytest.raises(ParameterError, match="image's size"): FAnoGAN(1, 2)


def test_stages_leave_each_other_alone():
    "The first trains generator and critic only, the second the encoder only."
    seed_everything(0)
    model, seen = FAnoGAN(1, 2, (20, 17), **SMALL, critic_steps=1, gan_epochs=2, epochs=2), []
    fit(model, Toy(train=16, val=2), on_epoch=lambda row: seen.append((row["stage"], {k: v.clone() for k, v in model.state_dict().items()})))
    (_, g0), (_, g1), (_, e0), (_, e1) = seen
    moved = lambda a, b: {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])}
    assert moved(g0, g1) == {"gan"} and moved(e0, e1) == {"encoder"} and moved(g1, e1) == {"encoder"}


@pytest.mark.parametrize("make", [lambda: FAnoGAN(1, 3, (9, 10, 7), **SMALL), lambda: DDAD(1, 3, (9, 10, 7), **SMALL), lambda: DDAD(1, 2, (20, 17), base="uncertain", **SMALL), lambda: DDAD(1, 2, (20, 17), base="memory", **SMALL)])
def test_poor_images(make):
    "Constant images, an image without organ and a batch of one give finite maps."
    model = make().eval()
    batch = batch_of(3, model.hparams.shape)
    batch["image"][0], batch["foreground"][1] = 0.5, False
    for kind in model.kinds:
        with torch.no_grad(): many, one = model.score(batch, kind), model.score({k: v[:1] for k, v in batch.items()}, kind)
        assert all(v.isfinite().all() for v in many.values()) and not many["anomaly_map"][1].any()
        assert torch.allclose(one["anomaly_map"][0], many["anomaly_map"][0], atol=1e-5)


@pytest.mark.parametrize("base", ["ae", "uncertain", "memory"])
def test_ddad_shared_check(base):
    batch = batch_of()
    check_model(lambda: DDAD(1, 2, (20, 17), base=base, **SMALL), {"train": batch, "train+unlabelled": batch}, exempt=("reproducible", "loss_falls"), steps=3)


def test_refined_shared_check():
    batch = batch_of()
    target = torch.zeros_like(batch["image"]); target[:, :, 6:12, 5:11] = 0.7
    batch |= dict(clean=batch["image"].clone(), target=target, image=torch.where(target > 0, batch["image"] * 0.3 + 1, batch["image"]))
    report = check_model(lambda: DDADRefined(1, 2, (20, 17), **SMALL, refine_lr=5e-3), {"train": batch, "train+unlabelled": batch}, exempt=("reproducible",))
    assert set(report["losses"]) == {"a 0", "a 1", "b 0", "b 1", "refine"}


def test_inter_finds_what_the_archive_holds():
    "An archive with bumps: inter is high at the bump, in images of the test; without bumps in the archive it is not."
    def contrast(bumps):
        seed_everything(0)
        data = Toy(train=24, val=2, unlabelled=24)
        if not bumps: data.pools["unlabelled"] = [sample(f"plain{i}") for i in range(24)]
        model = DDAD(1, 2, (20, 17), **SMALL, lr=5e-3, epochs=10)
        fit(model, data)
        ill = collate([sample(f"test{i}", bump=3.0) for i in range(8)])
        with torch.no_grad(): found = model.score(ill, "inter")["anomaly_map"]
        return (found[ill["mask"]].mean() / found[ill["foreground"] & ~ill["mask"]].mean()).item()
    with_bumps, without = contrast(True), contrast(False)
    assert with_bumps > 2 and with_bumps > 1.5 * without, (with_bumps, without)


def test_ddad_asks_for_its_pools():
    with pytest.raises(PoolError, match="DDAD: needs the pool unlabelled"): fit(DDAD(1, 2, (20, 17), **SMALL), Toy(train=8, val=2))
    for members in (1, 0, 2.0, True):
        with pytest.raises(ParameterError, match="members"): DDAD(1, 2, (20, 17), members=members)
    with pytest.raises(ParameterError, match="without 'clean'"): DDADRefined(1, 2, (20, 17), **SMALL).loss(batch_of(2))


def test_union_of_pools():
    "The same for any number of workers, task randomness as alone, each pool behind its own curtain."
    records = brain_records("tiny", "FLAIR", pools=("train", "val", "unlabelled", "weak"))
    sets = {k: SliceSet(VolumeSet(v[:2]), min_foreground=0.2) for k, v in records.items()}

    class Noise:
        def bind(self, source): return self
        def __call__(self, sample, rng): return sample | {"clean": sample["image"], "image": sample["image"] + rng.normal()}

    data = AnomalyDataModule(**sets, task=Noise(), batch_size=8, seed=1)
    def read(pool, **how): return [(i, x.numpy(), bool(k), int(l)) for b in data.loader(pool, **how) for i, x, k, l in zip(b["id"], b["image"], b["mask_known"], b["label"])]
    union, helped = read("train+unlabelled", task=True, shuffle=True), read("train+unlabelled", task=True, shuffle=True, workers=2)
    assert [r[0] for r in union] == [r[0] for r in helped] and all(np.array_equal(a[1], b[1]) for a, b in zip(union, helped))
    alone = {r[0]: r for pool in ("train", "unlabelled") for r in read(pool, task=True)}
    assert len(alone) == len(union) and all(np.array_equal(r[1], alone[r[0]][1]) for r in union)
    assert {r[0].startswith("unlabelled"): r[2:] for r in union} == {True: (False, 0), False: (True, 0)}
    assert [r[0] for r in read("train", shuffle=True)] == [r[0] for r in read("train", shuffle=True)]
    assert [r[0] for r in read("train+weak", shuffle=True)] != [r[0] for r in read("weak+train", shuffle=True)]
    for wrong, words in {"train+test": "held-out", "train+train": "twice", "train+": "pool", "": "pool", "weak+val": "held-out"}.items():
        with pytest.raises(ParameterError, match=words): pools_of(wrong)
    with pytest.raises(PoolError, match="needs the pool"): AnomalyDataModule(sets["train"], sets["val"]).loader("train+unlabelled")
