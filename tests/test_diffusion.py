"""What the chapters on diffusion and attribution cannot show in a notebook: labels that reach only whom they may, refusals by name, weights that come back into the right class."""
import numpy as np
import pytest
import torch

from anomaly_nb.core import InputError, ParameterError, seed_everything
from anomaly_nb.experiment import load_records, make_data, make_model
from anomaly_nb.methods.combination import Combination
from anomaly_nb.models.fit import fit
from anomaly_nb.models.model import Stage, load_model, save_model, seen_truth
from anomaly_nb.models.translation import FreeTranslation, Translation

torch.set_num_threads(1)
SMALL = "preset=tiny level=40 moves=2"


@pytest.fixture(scope="module")
def data():
    return make_data(load_records("brain", "tiny", "FLAIR", "families=('glioma','ms')", "translation"), 2, 32)


def test_labels_reach_weak_supervision_only():
    assert seen_truth("weak") == seen_truth("train+weak") == ("label",)
    assert seen_truth("train") == seen_truth("unlabelled") == seen_truth("weak+unlabelled") == ()


class Curious(Translation):
    "Notes what its trainings are shown."
    seen = []
    def loss(self, batch):
        self.seen.append((sorted(set(batch) & {"mask", "mask_known", "label"}), set(batch["label"].tolist())))
        return super().loss(batch)

    def stages(self): return [Stage("denoiser", self, pool="train+weak", epochs=1, val=None)]


def test_a_union_with_weak_shows_labels_and_no_mask(data):
    seed_everything(0)
    model = Curious(data.channels, 2, data.shape, preset="tiny", epochs=1)
    fit(model, data, seed=0)
    assert all(keys == ["label"] for keys, _ in Curious.seen) and set.union(*(labels for _, labels in Curious.seen)) == {0, 1}


def test_one_class_is_refused(data, monkeypatch):
    weak = data.pools["weak"]
    for value, word in ((0, "normal"), (1, "ill")):
        monkeypatch.setattr(weak, "labels", np.full(len(weak), value))
        with pytest.raises(ParameterError, match=f"only {word} images.*both classes"): fit(make_model("classifier", data, epochs=1), data)


@pytest.mark.parametrize("cls", [Translation, FreeTranslation, Combination])
def test_weights_come_back(cls, tmp_path):
    """Also where a class takes fewer options than its parent; a checkpoint of another preset is refused in words."""
    seed_everything(0)
    model = cls(1, 2, (16, 16), preset="tiny", level=30, moves=2)
    path = save_model(model, tmp_path/"m.safetensors")
    again = load_model(path, cls)
    assert again.hparams.level == 30 and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    from anomaly_nb.models.model import read_checkpoint, set_state
    with pytest.raises(InputError, match="m.safetensors.*does not fit"): set_state(cls(1, 2, (16, 16), preset="laptop", level=30, moves=2), read_checkpoint(path)[1], path)


@pytest.mark.parametrize("options, word", [("scale=0.0", "scale"), ("scale=-3.0", "target=1"), ("level=2000", "schedule has 1000"), ("level=10 moves=20", "moves")])
def test_dials_are_checked(data, options, word):
    for name in ("translation", "combination"):
        with pytest.raises(ParameterError, match=word): make_model(name, data, f"preset=tiny {options}")


@pytest.mark.long
def test_the_constrained_half_shares_the_denoiser(data):
    """What the experiment diffusion_verdict relies on: with no epochs the denoiser stays as it was given, and the classifiers are trained."""
    seed_everything(0)
    first = make_model("combination", data, f"{SMALL} classifier_widths=(8,16) classifier_epochs=1 weight=0.0", epochs=1)
    fit(first, data, seed=0)
    second = make_model("combination", data, f"{SMALL} classifier_widths=(8,16) classifier_epochs=1 weight=0.01", epochs=0)
    second.net.load_state_dict(first.net.state_dict())
    second.average.load_state_dict(first.average.state_dict())
    before = {k: v.clone() for k, v in second.state_dict().items()}
    fit(second, data, seed=0)
    after = second.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith(("net.", "average.")))
    assert any(not torch.equal(v, after[k]) for k, v in before.items() if k.startswith("classifier.")) and any(not torch.equal(v, after[k]) for k, v in before.items() if k.startswith("clean."))
    assert torch.isfinite(second.tau)


def test_the_noisy_classifier_learns_at_the_times_it_guides_at(monkeypatch):
    batch = {"image": torch.randn(64, 1, 16, 16), "foreground": torch.ones(64, 1, 16, 16, dtype=torch.bool), "label": torch.arange(64) % 2}
    for level, known in ((None, 30), (1000, 1000)):
        model, drawn = Translation(1, 2, (16, 16), preset="tiny", level=30, moves=2, classifier_level=level), []
        noised = model.process.noised
        monkeypatch.setattr(model.classifier.process, "noised", lambda x, eps, t: drawn.extend(t.tolist()) or noised(x, eps, t))
        for _ in range(5): model.classifier.loss(batch)
        assert known * 0.8 < max(drawn) < known and min(drawn) < 0.1 * known
    with pytest.raises(ParameterError, match="learned at times below 30"): Translation(1, 2, (16, 16), preset="tiny", level=30, moves=2).path(40)
    with pytest.raises(ParameterError, match="classifier_level"): Translation(level=200, classifier_level=100, preset="tiny")
