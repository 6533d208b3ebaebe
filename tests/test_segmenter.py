"""U-Net, segmenter, ensemble, DRAEM and CutPaste's classifier: against second implementations, under bad input, in three dimensions, and within their budgets."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from test_models import batch_of, with_task  # noqa: E402

from anomaly_nb.core import ParameterError, rng_of, seed_everything  # noqa: E402
from anomaly_nb.data.module import AnomalyDataModule  # noqa: E402
from anomaly_nb.models.cutpaste import CutPasteClassifier  # noqa: E402
from anomaly_nb.models.draem import DRAEM  # noqa: E402
from anomaly_nb.models.ensemble import Ensemble  # noqa: E402
from anomaly_nb.models.fit import fit  # noqa: E402
from anomaly_nb.models.model import load_model, save_model  # noqa: E402
from anomaly_nb.models.segmenter import Segmenter, rate_factor  # noqa: E402
from anomaly_nb.models.unet import UNet, fourier_features  # noqa: E402
from anomaly_nb.tasks.many import ManyTasks  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


class PlainUNet(nn.Module):
    "The same network written down plainly, with the weights of the other: position concatenated to the image, normalisation and GELU by formula, nothing kept."
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        net, dims = self.net, x.ndim - 2
        conv, up = (nn.functional.conv2d, "bilinear") if dims == 2 else (nn.functional.conv3d, "trilinear")
        def normed(x, module):
            mean, var = x.mean(tuple(range(2, x.ndim)), keepdim=True), x.var(tuple(range(2, x.ndim)), unbiased=False, keepdim=True)
            shape = (1, -1, *[1] * dims)
            x = (x - mean) / torch.sqrt(var + 1e-5) * module[0].weight.view(shape) + module[0].bias.view(shape)
            return 0.5 * x * (1 + torch.erf(x / 2**0.5))
        def block(x, module):
            x = normed(conv(x, module[0].weight, module[0].bias, stride=module[0].stride, padding=1), module[1])
            return normed(conv(x, module[2].weight, module[2].bias, padding=1), module[3])
        axes = torch.meshgrid(*[torch.arange(n).double() for n in x.shape[2:]], indexing="ij")
        place = torch.stack([-1 + 2 * a / (n - 1) for a, n in zip(axes, x.shape[2:])])
        v = torch.stack([a / n for a, n in zip(axes, x.shape[2:])])
        angle = 2 * np.pi * torch.einsum("kd,d...->k...", net.frequencies.double(), v)
        code = torch.cat([place, angle.sin(), angle.cos()]).float().expand(len(x), *[-1] * (dims + 1))
        x = torch.cat([x, code], 1)
        x = normed(conv(x, net.entrance.conv.weight, net.entrance.conv.bias, padding=1), net.first[0])
        levels = [normed(conv(x, net.first[1].weight, net.first[1].bias, padding=1), net.first[2])]
        for module in net.down: levels.append(block(levels[-1], module))
        x = levels.pop()
        for module in net.up: x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2, mode=up), levels.pop()], 1), module)
        return conv(x, net.head.weight)


@pytest.mark.parametrize("shape", [(24, 16), (16, 16, 24)])
def test_unet_is_the_plain_network(shape):
    torch.manual_seed(0)
    net = UNet(2, 3, len(shape), (4, 6, 8, 10))
    for p in net.parameters(): p.data.add_(0.1 * torch.randn_like(p))                     # scales and offsets of the normalisation count too
    x = torch.randn(3, 2, *shape)
    fast, slow = net(x), PlainUNet(net)(x)
    assert torch.allclose(fast, slow, atol=1e-4), (fast - slow).abs().max()
    grads = []
    for run in (net, PlainUNet(net)):
        net.zero_grad()
        (run(x)**2).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.allclose(grads[0], grads[1], atol=1e-4 * float(grads[1].abs().max()))


def test_frequencies_are_those_of_the_seed_and_saved(tmp_path):
    torch.manual_seed(1)
    a = UNet(widths=(4, 8))
    torch.manual_seed(2)
    assert torch.equal(a.frequencies, UNet(widths=(4, 8)).frequencies) and not torch.equal(a.frequencies, UNet(widths=(4, 8), seed=43).frequencies)
    assert abs(float(UNet(fourier=4000).frequencies.std()) - 12) < 0.3
    model = Segmenter(widths=(4, 8))
    model.net.frequencies.mul_(0.5)                                                       # a network that was trained with others reads others
    again = load_model(save_model(model, tmp_path/"m.safetensors"), Segmenter)
    assert torch.equal(again.net.position((9, 7))[0, 2:, :9, :7], fourier_features((9, 7), model.net.frequencies))


def test_position_follows_the_image_size():
    net = UNet(widths=(4, 8)).eval()
    x = torch.randn(1, 1, 12, 10)
    first = net(x)
    net(torch.randn(1, 1, 20, 14))
    assert torch.equal(net(x), first)                                                     # the kept code of another size is not used


def test_the_rate_of_every_step_of_a_training():
    "The schedule as the optimiser sees it, step by step, through `fit`."
    rates = []
    class Spy(Segmenter):
        def on_train_batch_start(self, batch, index): rates.append(self.optimizers().param_groups[0]["lr"])
    module = volumes(shape=(8, 8, 8))
    fit(Spy(spatial_dims=3, widths=(4, 8), lr=0.01, warmup=4, decay=10, epochs=3), module)
    assert len(rates) == 9 and np.allclose(rates, [0.01 * rate_factor(t, 4, 10, 0.05) for t in range(9)])
    assert rates[0] == pytest.approx(1e-4) and rates[4] == pytest.approx(0.01) and rates[8] == pytest.approx(0.01 * 10**-0.4)


class Balls:
    "Noisy balls as volumes, some with a bright block."
    def __init__(self, name, count, ill=0, shape=(8, 8, 8)):
        self.shape, self.channels, self.spatial_dims, self.spacing = shape, 1, len(shape), (1.0,) * len(shape)
        self.items = []
        for i in range(count):
            rng, mask = rng_of(name, i), np.zeros((1, *shape), bool)
            if i < ill: mask[(0, *(slice(n // 3, n // 3 + 3) for n in shape))] = True
            inside = np.ones_like(mask)
            image = (rng.normal(0, 1, mask.shape) + 3 * mask).astype(np.float32)
            self.items.append(dict(image=image, foreground=inside, valid=inside, mask=mask, mask_known=True, label=int(i < ill), id=f"{name}{i}", subject=f"{name}{i}", meta={}))
        self.ids = self.subjects = [s["id"] for s in self.items]
        self.labels, self.volumes, self.infos, self.records = np.array([s["label"] for s in self.items]), self, [{"mask_known": True}] * count, []

    def __len__(self): return len(self.items)

    def __getitem__(self, index): return self.items[index]


def volumes(shape, task="smooth", workers=0):
    return AnomalyDataModule(train=Balls("train", 12, shape=shape), val=Balls("val", 4, shape=shape), task=ManyTasks(tasks=task), batch_size=4, workers=workers)


def test_workers_change_nothing_but_the_waiting():
    weights = []
    for workers in (0, 2):
        seed_everything(0)
        model = Segmenter(spatial_dims=3, widths=(4, 8), epochs=2)
        fit(model, volumes((8, 10, 8), workers=workers), seed=1)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_validation_anomalies_are_the_same_in_every_epoch():
    module = volumes((8, 8, 8))
    loader = module.loader("val", task=True)
    first, second = ([b["image"] for b in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    train = module.loader("train", task=True)
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(list(train), list(train)))


@pytest.mark.parametrize("loss", ["mse", "bce", "focal"])
def test_losses_learn_and_save(tmp_path, loss):
    batch = with_task("smooth", batch_of((21, 18), 1))
    seed_everything(0)
    model = Segmenter(shape=(21, 18), loss=loss, widths=(4, 8))
    made = model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for step in range(60):
        value = model.loss(batch)
        if step == 0: first = float(value.detach())
        optimizer.zero_grad(); value.backward(); optimizer.step(); schedule.step()
    assert float(value.detach()) < 0.8 * first
    model.eval()
    with torch.no_grad():
        found, again = model.score(batch), load_model(save_model(model, tmp_path/"m.safetensors"), Segmenter).score(batch)
    assert torch.equal(found["anomaly_map"], again["anomaly_map"]) and 0 <= found["anomaly_map"].min() and found["anomaly_map"].max() <= 1


@pytest.mark.parametrize("make, missing, words", [
    (lambda: Segmenter(shape=(21, 18), widths=(4, 8)), "target", "a synthetic task"),
    (lambda: DRAEM(shape=(21, 18), restore=(4, 8), mark=(4, 8)), "clean", "clean"),
    (lambda: CutPasteClassifier(shape=(21, 18), widths=(4, 8)), "pretext", "the task 'cutpaste'")])
def test_batches_without_a_task_are_refused(make, missing, words):
    batch = {k: v for k, v in with_task("cutpaste", batch_of((21, 18), 1)).items() if k != missing}
    with pytest.raises(ParameterError, match=words): make().loss(batch)


@pytest.mark.parametrize("dims, shape", [(2, (21, 18)), (3, (10, 13, 9))])
def test_an_ensemble_is_checked_like_any_model(dims, shape):
    from anomaly_nb.models.checks import check_model
    batch = with_task("smooth", batch_of(shape, 1))
    check_model(lambda: Ensemble(spatial_dims=dims, shape=shape, members=[dict(widths=(4, 8), lr=1e-2), dict(widths=(4, 8, 8), lr=1e-2)]), batch)


def test_an_ensemble_of_one_is_that_one():
    batch = batch_of((21, 18), 2)
    seed_everything(0)
    one = Segmenter(2, 2, (21, 18), widths=(4, 8)).eval()
    with torch.no_grad(): assert torch.equal(Ensemble.of([one]).score(batch)["anomaly_map"], one.score(batch)["anomaly_map"])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_named_members_answer_alone_and_the_ensemble_is_their_mean(dims, loss):
    seed_everything(0)
    nets = [Segmenter(1, dims, widths=(4, 8), loss=loss).eval() for _ in range(3)]
    batch = {"image": torch.randn(2, 1, *(24,) * dims), "foreground": torch.rand(2, 1, *(24,) * dims) > 0.2}
    named = Ensemble.of(nets, "abc", "all")
    with torch.no_grad():
        for net, kind in zip(nets, "abc"): assert torch.equal(named.score(batch, kind)["anomaly_map"], net.score(batch)["anomaly_map"])
        mean = np.mean([net.raw(batch).numpy().astype(float) for net in nets], 0)
        truth = (mean.clip(0, 1) if loss == "mse" else 1 / (1 + np.exp(-mean))) * batch["foreground"].numpy()
        assert np.allclose(named.score(batch, "all")["anomaly_map"].numpy(), truth, atol=1e-6) and torch.equal(Ensemble.of(nets).score(batch)["anomaly_map"], named.score(batch, "all")["anomaly_map"])


def test_kept_outputs_are_never_those_of_another_batch_or_network():
    seed_everything(0)
    named, plain = (Ensemble.of([Segmenter(1, 2, widths=(4, 8)), Segmenter(1, 2, widths=(4, 8))], names) for names in ("ab", None))
    plain.load_state_dict(named.state_dict())
    batch = {"image": torch.randn(2, 1, 16, 16), "foreground": torch.ones(2, 1, 16, 16, dtype=torch.bool)}
    def same():
        "The answer, and whether it is that of a model that keeps nothing."
        plain._seen = None
        plain.load_state_dict(named.state_dict())
        with torch.no_grad(): return torch.equal(named.score(batch, "segmentation")["anomaly_map"], plain.score(batch)["anomaly_map"])
    assert same()
    batch["image"][0] += 1                                                     # written into
    assert same()
    batch["foreground"][:, :, :4] = False
    assert same()
    optimizer = torch.optim.AdamW(named.parameters(), lr=0.1)
    named.raw(batch).mean().backward()                                         # with gradients nothing is kept
    optimizer.step()
    assert same()
    with torch.inference_mode(): assert named.score({k: v.clone() for k, v in batch.items()}, "a")["anomaly_map"].shape == (2, 1, 16, 16)


@pytest.mark.parametrize("make, said", [
    (lambda one: Ensemble.of([]), "members: are none"), (lambda one: Ensemble.of([one, one], ["a"]), "names: are 1 for 2 members"), (lambda one: Ensemble.of([one, one], ["a", "a"]), "names: hold 'a' twice"),
    (lambda one: Ensemble.of([one], ["segmentation"]), "names: hold 'segmentation' twice"), (lambda one: Ensemble.of([one, nn.Conv2d(1, 1, 1)]), "member 1: is of the class Conv2d"),
    (lambda one: Ensemble.of([one, Segmenter(1, 3, widths=(4, 8))]), "member 1: was made for the spatial_dims 3, member 0 for 2"), (lambda one: Ensemble.of([one, Segmenter(widths=(4, 8), loss="bce")]), "losses bce, mse")])
def test_an_ensemble_says_what_does_not_fit(make, said):
    with pytest.raises(ParameterError, match=said): make(Segmenter(widths=(4, 8)))
