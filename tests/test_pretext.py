"""Patch swapping, geometric transforms, the pretext model and the CT table: against independent truth, and with bad input."""
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import average_precision_score, roc_auc_score
from test_models import batch_of

from anomaly_nb.core import DataError, InputError, ParameterError, collate, rng_of, seed_everything
from anomaly_nb.data.module import AnomalyDataModule
from anomaly_nb.methods import ct_table
from anomaly_nb.models.checks import check_model
from anomaly_nb.models.fit import fit
from anomaly_nb.models.pretext import TRANSFORMS, PretextVAE, moved, read_transforms, shift_index, step_of, transform_index
from anomaly_nb.models.vae import VAE
from anomaly_nb.tasks.swap import PatchSwap, patch_size, two_corners
from anomaly_nb.tasks.task import check_task

torch.set_num_threads(1)


# ---- swaps

def sample_of(shape, channels=1, seed=0, organ=None):
    "A sample in which every voxel is unique."
    rng = np.random.default_rng(seed)
    image = rng.permutation(channels * int(np.prod(shape))).reshape(channels, *shape).astype(np.float32)
    inside = np.ones((1, *shape), bool) if organ is None else organ[None]
    return dict(image=image, foreground=inside, valid=inside, mask=np.zeros_like(inside), mask_known=True, label=0, id="s", subject="s", meta={})


@pytest.mark.parametrize("shape, channels", [((24, 24), 1), ((21, 18), 2), ((10, 13, 9), 1), ((5, 3), 1)])
@pytest.mark.parametrize("times", [1, 7])
def test_swaps_keep_every_voxel_and_channels_together(shape, channels, times):
    sample = sample_of(shape, channels)
    for seed in range(20):
        made = check_task(PatchSwap(times=times), sample, seed)
        for c in range(channels): assert np.array_equal(np.sort(made["image"][c], None), np.sort(sample["image"][c], None))
        order = np.argsort(sample["image"][0].ravel())[np.searchsorted(np.sort(sample["image"][0].ravel()), made["image"][0].ravel())]     # from where each voxel came
        for c in range(channels): assert np.array_equal(sample["image"][c].ravel()[order].reshape(shape), made["image"][c])
        if times == 1: assert made["target"].sum() == 2 * np.prod(patch_size(shape))


def test_patches_stay_inside_and_apart_for_organs_at_the_edge():
    organ = np.zeros((20, 30), bool); organ[0] = organ[:, -1] = True
    size = patch_size(organ.shape, 0.3)
    for seed in range(200):
        a, b = two_corners(np.flatnonzero(organ), organ.shape, size, np.random.default_rng(seed))
        marked = np.zeros(organ.shape, int)
        for corner in (a, b):
            box = marked[tuple(slice(c, c + s) for c, s in zip(corner, size))]
            assert box.shape == size
            box += 1
        assert marked.max() == 1


def test_an_organ_without_room_stays_as_it_is():
    organ = np.zeros((20, 20), bool); organ[9:11, 9:11] = True
    made = PatchSwap(share=0.4)(sample_of((20, 20), organ=organ), np.random.default_rng(0))
    assert np.array_equal(made["image"], made["clean"]) and not made["target"].any()


# ---- transforms

def slow(x, triple, border="background"):
    "One transform of a plane, voxel by voxel."
    k, down, right = triple
    n, step = len(x), step_of(len(x))
    turned, out = np.rot90(x, k), np.zeros_like(x)
    for r in range(n):
        for c in range(n):
            if 0 <= r - down * step < n and 0 <= c - right * step < n: out[r, c] = turned[r - down * step, c - right * step]
            if border == "frame" and not (step <= r < n - step and step <= c < n - step): out[r, c] = 0
    return out


@pytest.mark.parametrize("n", [8, 17, 24])
@pytest.mark.parametrize("border", ["background", "frame"])
def test_transforms_agree_with_a_slow_loop(n, border):
    x = torch.randn(1, 2, n, n)
    for triple, index in zip(TRANSFORMS["36"], transform_index(n, "36", border)):
        found = moved(x, index[None])[0]
        for c in range(2): assert np.array_equal(found[c].numpy(), slow(x[0, c].numpy(), triple, border))


def test_twenty_and_thirty_six_are_closed_under_the_inverse():
    for name in ("20", "36"):
        for k, down, right in TRANSFORMS[name]:
            inverse = -k % 4
            back = np.array([-down, -right])
            for _ in range(inverse): back = np.array([-back[1], back[0]])                       # a quarter turn to the left of (down, right)
            assert (inverse, *back.tolist()) in TRANSFORMS[name]
            x = torch.zeros(1, 1, 32, 32); x[..., 8:24, 8:24] = torch.randn(16, 16)
            there = moved(x, transform_index(32, [(k, down, right), (0, 0, 0) if (k, down, right) != (0, 0, 0) else (1, 0, 0)])[:1])
            other = (0, 0, 0) if (inverse, *back) != (0, 0, 0) else (1, 0, 0)
            assert torch.equal(moved(there, transform_index(32, [(inverse, *back.tolist()), other])[:1]), x)


def test_one_class_a_sample_in_a_batch_and_in_three_dimensions():
    index, q, x = transform_index(12, "20"), torch.arange(20) % 20, torch.randn(20, 2, 3, 12, 12)
    found = moved(x, index[q])
    for i in range(20):
        for d in range(3): assert torch.equal(found[i, :, d], moved(x[i, :, d][None], index[q[i]][None])[0])


def test_jitter_is_a_shift_without_a_turn():
    x, by = torch.randn(5, 1, 16, 16), ([0, 3, -2, 16, -1], [0, -1, 2, 0, -15])
    found = moved(x, shift_index(16, *map(torch.tensor, by)))
    for i, (down, right) in enumerate(zip(*by)): assert np.array_equal(found[i, 0].numpy(), ndimage.shift(x[i, 0].numpy(), (down, right), order=0, cval=0))


def test_the_border_alone_does_not_tell_the_class():
    "Pictures without background: with a frame the ring is at chance, without it it tells nearly everything."
    rng, n, K = np.random.default_rng(0), 24, 20
    pictures = torch.as_tensor(np.stack([ndimage.gaussian_filter(rng.normal(size=(n, n)), 2) + 2 for _ in range(90)]), dtype=torch.float32)[:, None]
    ring = np.ones((n, n), bool); ring[3:-3, 3:-3] = False
    right = {}
    for border in ("background", "frame"):
        X = torch.cat([moved(pictures, i.expand(90, -1)) for i in transform_index(n, "20", border)]).numpy()[:, 0][:, ring].reshape(K, 90, -1)
        y = np.repeat(np.arange(K), 60), np.repeat(np.arange(K), 30)
        right[border] = RidgeClassifier().fit(X[:, :60].reshape(-1, X.shape[2]), y[0]).score(X[:, 60:].reshape(-1, X.shape[2]), y[1])
    assert right["frame"] == pytest.approx(1 / K) and right["background"] > 4 / K                # the shifts; quarter turns of noise look alike


@pytest.mark.parametrize("bad, words", [([(0, 0, 0)], "two or more"), ([(0, 0, 0), (0, 0, 2)], "quarter turns"), ([(0, 0), (1, 0)], "triples"), ("21", "20"), ([(0, 0, 0)] * 3, "of them 1 different")])
def test_bad_lists_of_transforms(bad, words):
    with pytest.raises(ParameterError, match=words): read_transforms(bad)
    with pytest.raises(ParameterError, match=words): PretextVAE(1, 2, (16, 16), transforms=bad)


# ---- the model

def swapped(batch):
    "The batch after the task swap."
    samples = [{k: v[i].numpy() if isinstance(v, torch.Tensor) and v.ndim > 1 else v[i] for k, v in batch.items()} | dict(label=0, mask_known=True) for i in range(len(batch["id"]))]
    return collate([PatchSwap()(s, rng_of("swap", i)) for i, s in enumerate(samples)])


@pytest.mark.parametrize("options", [dict(multitask=False), dict(border="frame", jitter=0.1, transforms="36", pretrain=False)])
def test_shared_check_of_variants(options):
    "The default is checked with the whole catalog."
    check_model(lambda: PretextVAE(1, 2, (21, 18), widths=(8, 16), square="pad", **options), swapped(batch_of((21, 18), 1)), exempt=("reproducible",))


def test_without_head_and_pretraining_it_is_a_vae():
    batch, losses = batch_of((20, 20), 1), []
    for make in (lambda: VAE(1, 2, (20, 20)), lambda: PretextVAE(1, 2, (20, 20), pretrain=False, multitask=False)):
        seed_everything(3)
        model = make()
        losses.append(model.loss(batch))
    assert torch.equal(*losses)


def test_optimiser_steps_are_the_same_and_validation_normals_set_the_scale():
    pools = {pool: Pictures(pool, n) for pool, n in (("train", 12), ("val", 8))}
    data, steps = AnomalyDataModule(**pools, task=PatchSwap(), batch_size=4), []
    for options in (dict(pretrain=False, multitask=False), dict(multitask=False), dict(), dict(pretrain_share=0.0), dict(pretrain_share=1.0)):
        seed_everything(0)
        model = PretextVAE(1, 2, (20, 20), widths=(4, 8), latent=4, epochs=5, **options)
        history = fit(model, data, accelerator="cpu")
        steps.append(sum(max(h["step"] for h in history if h["stage"] == stage) for stage in {h["stage"] for h in history}))
        if not model.hparams.multitask: continue
        assert model.held_out_
        with torch.no_grad(): s = np.stack([np.concatenate([model.parts(b)[n].numpy() for b in data.loader("val")]) for n in (0, 1)])
        assert np.allclose(model.normals_.numpy(), [s[0].mean(), s[0].std(), s[1].mean(), s[1].std()], rtol=1e-3)
        with torch.no_grad(): z = np.concatenate([model.score(b, "combined")["anomaly_score"].numpy() for b in data.loader("val")])
        assert abs(z.mean()) < 1e-3
    assert set(steps) == {15}
    alone = AnomalyDataModule(train=pools["train"], val=pools["val"], task=PatchSwap(), batch_size=4)
    del alone.pools["val"]                                                                       # no validation pool: the training normals, and it says so
    model = PretextVAE(1, 2, (20, 20), widths=(4, 8), latent=4, epochs=2)
    fit(model, alone, accelerator="cpu")
    assert not model.held_out_ and model.normals_.isfinite().all()


class Pictures:
    "Noisy discs as a set that a data module takes."
    channels, spatial_dims, shape, spacing = 1, 2, (20, 20), None
    def __init__(self, pool, n):
        batch, rng = batch_of(self.shape, 1, n), rng_of("pictures", pool)
        self.ids = self.subjects = [f"{pool}{i}" for i in range(n)]
        self.labels, self.volumes, self.records, self.infos = np.zeros(n, int), self, [], [{"mask_known": True}] * n
        self.samples = [{k: v[i].numpy() if isinstance(v, torch.Tensor) and v.ndim > 1 else v[i] for k, v in batch.items()} | dict(label=0, mask_known=True, id=self.ids[i], subject=self.ids[i]) for i in range(n)]
        for s in self.samples: s["image"] = s["image"] + rng.normal(0, 0.3, s["image"].shape).astype(np.float32)
    def __len__(self): return len(self.samples)
    def __getitem__(self, i): return dict(self.samples[i])


def test_lambda_zero_and_one_give_the_parts_and_the_cross_entropy_is_that_of_torch():
    batch = batch_of((20, 20), 1)
    seed_everything(0)
    model = PretextVAE(1, 2, (20, 20)).eval()
    with torch.no_grad():
        model.fit_statistics([batch])
        s_g, s_r, _ = model.parts(batch)
        slow = torch.stack([torch.nn.functional.cross_entropy(model.head(model.net.encode(moved(batch["image"] * batch["foreground"], i.expand(6, -1)))[0]), torch.full((6,), q), reduction="none") for q, i in enumerate(model.index)]).mean(0)
        assert torch.allclose(s_g, slow, atol=1e-5) and torch.equal(model.score(batch, "geometric")["anomaly_score"], s_g) and torch.equal(model.score(batch, "residual")["anomaly_score"], s_r)
        found = {}
        for lam in (0.0, 0.3, 1.0):
            model.hparams.lam = lam
            found[lam] = model.score(batch)["anomaly_score"]
        assert torch.allclose(found[0.0], (s_g - s_g.mean()) / s_g.std(correction=0), atol=1e-3) and torch.allclose(found[1.0], (s_r - s_r.mean()) / s_r.std(correction=0), atol=1e-3)
        assert torch.allclose(found[0.3], 0.7 * found[0.0] + 0.3 * found[1.0], atol=1e-4)
        assert torch.equal(model.score(batch)["anomaly_map"], model.score(batch, "geometric")["anomaly_map"])


def test_a_sure_and_right_head_gives_no_geometric_score():
    model, batch = PretextVAE(1, 2, (20, 20)).eval(), batch_of((20, 20), 1)
    K = len(model.index)
    model.answers = lambda b: torch.log_softmax(50 * torch.eye(K).expand(len(b["image"]), K, K), 2)
    assert torch.allclose(model.parts(batch)[0], torch.zeros(6), atol=1e-6)


def test_poor_input_is_scored_or_refused_in_words():
    batch = swapped(batch_of((20, 20), 1))
    model = PretextVAE(1, 2, (20, 20)).eval()
    with torch.no_grad(): model.fit_statistics([batch])
    poor = batch | {"image": torch.full_like(batch["image"], 1.5), "foreground": batch["foreground"].clone()}
    poor["foreground"][1] = False
    with torch.no_grad():
        for kind in model.kinds: assert model.score(poor, kind)["anomaly_score"].isfinite().all() and not model.score(poor, kind)["anomaly_map"][1].any()
    for options, words in ((dict(shape=(20, 18)), "not square"), (dict(shape=(4, 20, 18), spatial_dims=3), "not square"), (dict(shape=(20, 20), lam=1.2), "0 to 1"), (dict(shape=(20, 20), jitter=0.9), "0 to 0.25"), (dict(shape=(20, 20), border="wrap"), "border")):
        with pytest.raises(ParameterError, match=words): PretextVAE(**options)
    with pytest.raises(ParameterError, match="planes of 20 x 18"): model.score({k: v[..., :18] if k in ("image", "foreground") else v for k, v in batch.items()})
    with pytest.raises(ParameterError, match="task 'swap'"): model.restoration_loss({k: v for k, v in batch.items() if k != "clean"})


# ---- the table

def slices(seed=0, people=30):
    rng, rows = np.random.default_rng(seed), []
    for i in range(people):
        family = ("", "bleed", "atrophy")[i % 3]
        for h in range(8):
            hit = bool(family) and (family == "atrophy" or h in (3, 4))
            for kind, gain in (("residual", 2.0 * (family == "bleed")), ("geometric", 1.5 * (family == "atrophy"))):
                rows.append(dict(id=f"p{i}_z{h:03d}", subject=f"p{i}", volume=f"p{i}", family=family or None, volume_label=int(bool(family)), label=int(hit), mask_known=family != "atrophy", kind=kind, score=rng.normal() + gain * hit + 0.1 * h))
    return ct_table.slices_of(rows)


def test_table_against_scikit_learn_and_a_slow_bootstrap():
    test, val = slices(0), slices(1)[lambda f: f["ill"] == 0]
    parts, weights = ct_table.parts_of(test), ct_table.volume_weights(test, 40)
    score = ct_table.combined(test, val, 0.4)
    line = ct_table.line_of("m", test, score, weights, parts)
    names, W = weights
    for part, use in parts.items():
        label, mine, who = (v[use] for v in (test["label"].to_numpy(), score, test["subject"].to_numpy(str)))
        assert line.values[part]["auroc"] == pytest.approx(roc_auc_score(label, mine)) and line.values[part]["aupr"] == pytest.approx(average_precision_score(label, mine))
        for w, auroc, aupr in zip(W[:5], line.draws[part]["auroc"], line.draws[part]["aupr"]):
            drawn = np.concatenate([np.flatnonzero(who == n) for n, times in zip(names, w) for _ in range(times)])
            assert auroc == pytest.approx(roc_auc_score(label[drawn], mine[drawn])) and aupr == pytest.approx(average_precision_score(label[drawn], mine[drawn]))
    ill = np.array([n for n in names if test[test["subject"] == n]["ill"].any()])
    assert (W[:, np.isin(names, ill)].sum(1) == len(ill)).all()                                  # ill and healthy people apart
    dice = {n: 0.1 * k for k, n in enumerate(ill) if test[test["subject"] == n]["family"].iloc[0] == "bleed"}
    line = ct_table.line_of("m", test, score, weights, parts, dice)
    assert line.values["family bleed"]["dsc"] == pytest.approx(np.mean(list(dice.values()))) and np.isnan(line.values["family atrophy"]["dsc"])


def test_seeds_join_and_the_swept_weight_agrees_with_the_score():
    test, val = slices(0), slices(1)[lambda f: f["ill"] == 0]
    parts, weights = ct_table.parts_of(test), ct_table.volume_weights(test, 30)
    lines = [ct_table.line_of("m", test, ct_table.combined(test, val, lam), weights, parts, seed=n) for n, lam in enumerate((0.2, 0.8))]
    both = ct_table.joined(lines)
    assert both.values["all"]["auroc"] == pytest.approx(np.mean([l.values["all"]["auroc"] for l in lines])) and both.sd["all"]["auroc"] == pytest.approx(np.std([l.values["all"]["auroc"] for l in lines], ddof=1)) and both.seeds == 2
    swept = ct_table.lambda_sweep(test, val, (0.2, 0.8), parts)
    assert [swept[(swept["lam"] == lam) & (swept["part"] == "all")]["auroc"].iloc[0] for lam in (0.2, 0.8)] == pytest.approx([l.values["all"]["auroc"] for l in lines])
    table = ct_table.table_of([both, *lines, ct_table.chance_line(test, weights, parts)], test, parts)
    assert list(table["seed"].isna()) == [True] * len(parts) + [False] * 2 * len(parts) + [True] * len(parts)
    told = ct_table.differences_of([both], test, parts, [("m", "other", "auroc"), ("m", "m", "auroc")])
    assert (told["difference"] == 0).all() and (told["verdict"] == "undecided").all() and len(told) == len(parts)


def test_bad_tables():
    frame = slices()
    with pytest.raises(DataError, match="both ill and healthy"): ct_table.parts_of(frame[frame["ill"] == 0])
    with pytest.raises(ParameterError, match="did you mean 'out'"): ct_table.parts_of(frame, "ou")
    with pytest.raises(DataError, match="that differ"): ct_table.standardised([1.0], [3.0])
    with pytest.raises(DataError, match="finite scores"): ct_table.standardised([1.0], [3.0, np.nan])
    with pytest.raises(InputError, match="a finished prediction"): ct_table.renamed("nowhere", "m")
    assert isinstance(frame, pd.DataFrame) and len(frame) == 240


def test_by_height_removes_what_depends_on_height_alone():
    rng, heights = np.random.default_rng(0), np.repeat(np.arange(20), 300)
    z = ct_table.by_height(heights**2 + rng.normal(size=6000), heights, heights**2 + rng.normal(size=6000), heights, reach=0)
    assert abs(np.corrcoef(z, heights)[0, 1]) < 0.1 and abs(z.std() - 1) < 0.1
