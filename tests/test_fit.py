"""`fit` and `predict` under bad conditions: a killed process, a NaN, a wrong folder, a damaged file, a missing pool."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from test_contract import Auto, Blocks, Gradient, TwoStages, Weak, module  # noqa: E402

from anomaly_nb.core import InputError, ParameterError, PoolError, seed_everything  # noqa: E402
from anomaly_nb.models.fit import fit, predict  # noqa: E402
from anomaly_nb.models.model import Stage  # noqa: E402

torch.set_num_threads(1)


class Dropped(TwoStages):
    "Random numbers in every step, an epoch-wise schedule, two stages: everything that a resumed training can get wrong. Kills its process at one step if told to."
    def __init__(self, channels=1, spatial_dims=2, shape=(12, 12), lr=1e-2, epochs=6):
        super().__init__(channels, spatial_dims, shape, lr, epochs)
        self.steps = 0

    def draw(self, image): return super().draw(torch.nn.functional.dropout(image, 0.3, self.training))

    def loss(self, batch):
        self.steps += self.training
        if os.environ.get("KILL_AT") == str(self.steps): os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))]


class Chosen(Dropped):
    "Gets worse after two epochs (the rate explodes), keeps the best one, and has little patience."
    def stages(self): return [Stage("network", self, epochs=8, best=True, patience=16)]

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 3000.0)]


def judge(model):
    "Likes small weights, whatever the loss; uses random numbers, as judges may."
    assert not model.training and not torch.is_grad_enabled()
    return -float(model.down.bias.abs().sum()) + 1e-3 * float(torch.rand(()))


MODELS, JUDGES = {"Dropped": Dropped, "Chosen": Chosen}, {"": None, "judge": judge}


def train(folder, model_seed=0, workers=0, model="Dropped", judged="", **settings):
    "One training as a process would run it."
    data = module()
    data.workers = workers
    seed_everything(model_seed)
    return fit(MODELS[model](), data, folder, checkpoint_seconds=0, seed=3, judge=JUDGES[judged], **settings)


def timeless(history):
    "Histories without the share of waiting, which a clock measures."
    return [{k: v for k, v in row.items() if k != "wait"} for row in history]


def in_process(folder, kill_at=None, workers=0, **more):
    "`train` in a process of its own; returns its exit status."
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_fit; test_fit.train({str(folder)!r}, model_seed={0 if kill_at else 99}, workers={workers}, **{more!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"KILL_AT": str(kill_at)} if kill_at else {})
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=HERE.parent).returncode


@pytest.mark.parametrize("kill_at, workers", [(14, 0), (14, 2)])
def test_killed_in_the_middle_ends_with_the_same_weights(tmp_path, kill_at, workers):
    train(tmp_path/"whole")
    assert in_process(tmp_path/"killed", kill_at, workers) == -signal.SIGKILL          # step 14 is the second of epoch 3
    left = {p.name for p in (tmp_path/"killed").iterdir()}
    assert "stage0.resume" in left and "model.safetensors" not in left
    assert in_process(tmp_path/"killed", workers=workers) == 0                         # other initial weights: they must not matter
    whole, resumed = (load_file(tmp_path/name/"model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    histories = [json.loads((tmp_path/name/"history.json").read_text()) for name in ("whole", "killed")]
    assert timeless(histories[0]) == timeless(histories[1]) and all(0 <= r["wait"] <= 1 for h in histories for r in h)
    assert not list((tmp_path/"killed").glob("stage*"))


@pytest.mark.parametrize("judged", ["", "judge"])
def test_killed_after_the_best_epoch_still_ends_with_it(tmp_path, judged):
    history = train(tmp_path/"whole", model="Chosen", judged=judged)
    worth = [r["judged"] if judged else -r["val_loss"] for r in history]
    best = int(np.argmax(worth))
    assert 0 < len(history) - 1 - best, "the best epoch must not be the last one here"
    if not judged: assert len(history) < 8 and history[-1]["step"] - history[best]["step"] >= 16 > history[-2]["step"] - history[best]["step"]
    kill_at = history[-1]["step"] - 1                                                   # in the last epoch: the best one lies behind
    assert in_process(tmp_path/"killed", kill_at, model="Chosen", judged=judged) == -signal.SIGKILL
    assert in_process(tmp_path/"killed", model="Chosen", judged=judged) == 0
    whole, resumed = (load_file(tmp_path/name/"model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert timeless(history) == timeless(json.loads((tmp_path/"killed"/"history.json").read_text()))
    seed_everything(0)
    last = Chosen()
    last.stages = lambda: [Stage("network", last, epochs=len(history))]
    fit(last, module(), seed=3)
    assert not torch.equal(last.state_dict()["down.weight"], whole["down.weight"])      # the last weights are others


def test_a_judge_disturbs_nothing(tmp_path):
    "The same weights with a judge that always says the same and without one, up to the epoch that is kept: the first."
    kept = {}
    for epochs, chosen in ((1, None), (4, lambda m: 1.0)):
        seed_everything(0)
        model = Auto(1, 2, (12, 12), epochs=epochs)
        history = fit(model, module(), seed=3, judge=chosen)
        kept[epochs] = model.state_dict()
        assert ("judged" in history[0]) == (chosen is not None) and model.training is False
    assert all(torch.equal(kept[1][k], kept[4][k]) for k in kept[1])
    losses = []
    for chosen in (None, judge):
        seed_everything(0)
        losses.append([r["train_loss"] for r in fit(Dropped(epochs=2), module(), seed=3, judge=chosen) if r["stage"] == "network"])   # the second stage begins from the epoch that is kept
    assert losses[0] == losses[1]


def test_wrong_judges_and_folders(tmp_path):
    with pytest.raises(ParameterError, match="the judge of Auto: said nan"): fit(Auto(1, 2, (12, 12), epochs=1), module(), judge=lambda m: float("nan"))
    fit(Auto(1, 2, (12, 12), epochs=1), module(), tmp_path, judge=judge)
    with pytest.raises(ParameterError, match="another judge"): fit(Auto(1, 2, (12, 12), epochs=1), module(), tmp_path)
    with pytest.raises(ParameterError, match="another judge"): fit(Auto(1, 2, (12, 12), epochs=1), module(), tmp_path, judge=lambda m: 0.0)
    model = Auto(1, 2, (12, 12))
    model.stages = lambda: [Stage("train", model, best=True, val=None)]
    with pytest.raises(ParameterError, match="keeps its best epoch and has no validation pool"): fit(model, module())


def test_waiting_is_measured():
    "A loader that sleeps is nearly all of the time; one that does not is little."
    import time
    class Sleepy(Blocks):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)
    from anomaly_nb.data.module import AnomalyDataModule
    pools = {"val": Blocks("val", 4, shape=(12, 12))}
    slow = fit(Auto(1, 2, (12, 12), epochs=1), AnomalyDataModule(train=Sleepy("train", 24, shape=(12, 12)), batch_size=8, **pools))
    assert slow[0]["wait"] > 0.5
    class Busy(Auto):
        def loss(self, batch):
            time.sleep(0.2)
            return super().loss(batch)
    assert fit(Busy(1, 2, (12, 12), epochs=1), AnomalyDataModule(train=Blocks("train", 24, shape=(12, 12)), batch_size=8, **pools))[0]["wait"] < 0.5


def test_stopped_between_stages_goes_on_with_the_second(tmp_path):
    class Stop(BaseException): pass
    def stop(row):
        if row["stage"] == "prior" and row["epoch"] == 4: raise Stop
    with pytest.raises(Stop): train(tmp_path/"stopped", on_epoch=stop)
    assert (tmp_path/"stopped"/"stage0.safetensors").exists()
    seen = []
    history = train(tmp_path/"stopped", model_seed=7, on_epoch=seen.append)
    assert {r["stage"] for r in seen} == {"prior"} and seen[0]["epoch"] == 4
    assert timeless(history) == timeless(train(tmp_path/"whole"))
    whole, again = (load_file(tmp_path/name/"model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_complete_fit_is_loaded_not_repeated(tmp_path):
    history, called = train(tmp_path), []
    assert train(tmp_path, model_seed=5, on_epoch=called.append) == history and not called


def test_a_folder_of_another_training_is_refused(tmp_path):
    fit(Auto(1, 2, (12, 12), epochs=1), module(), tmp_path)
    with pytest.raises(ParameterError, match="another hyper_parameters"): fit(Auto(1, 2, (12, 12), epochs=1, lr=0.5), module(), tmp_path)
    with pytest.raises(ParameterError, match="another class"): fit(Gradient(1, 2, (12, 12), epochs=1), module(), tmp_path)
    with pytest.raises(ParameterError, match="another seed"): fit(Auto(1, 2, (12, 12), epochs=1), module(), tmp_path, seed=1)


@pytest.mark.parametrize("name", ["stage0.resume", "model.safetensors"])
def test_a_damaged_state_is_an_error_with_the_name_of_the_file(tmp_path, name):
    class Stop(BaseException): pass
    def stop(row):
        if name == "stage0.resume" and row["epoch"] == 2: raise Stop
    try: train(tmp_path, on_epoch=stop)
    except Stop: pass
    file = tmp_path/name
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=name): train(tmp_path)


def test_a_nan_is_named(tmp_path):
    class Burst(Auto):
        steps = 0
        def loss(self, batch):
            self.steps += self.training
            return super().loss(batch) * (float("nan") if self.steps == 7 else 1)
    with pytest.raises(ParameterError, match=r"Burst, stage 'train', epoch 1, step 7: the training loss is nan.*smaller learning rate"): fit(Burst(1, 2, (12, 12)), module(), tmp_path)
    assert not (tmp_path/"model.safetensors").exists()


def test_wrong_data_is_refused_before_training():
    with pytest.raises(PoolError, match="Weak: needs the pool weak"): fit(Weak(), module())
    with pytest.raises(ParameterError, match="was made for channels 2, the data have 1"): fit(Auto(2, 2, (12, 12)), module())
    with pytest.raises(ParameterError, match="spatial_dims 3"): fit(Auto(1, 3, None), module())
    with pytest.raises(ParameterError, match="shape"): fit(Auto(1, 2, (8, 8)), module())


def test_gradients_work_under_predict(tmp_path):
    model = Gradient(1, 2, (12, 12), epochs=1)
    fit(model, module())
    rows = predict(model, module().loader("test"), tmp_path, kinds=["gradient"])
    assert all(np.load(r["map"]).any() for r in rows)
    assert all(p.grad is None for p in model.parameters()) and model.training is False


def test_the_budget_is_shared_by_the_stages():
    stages = {r["stage"] for r in fit(TwoStages(1, 2, (12, 12), epochs=100_000), module(), max_seconds=1.0)}
    assert stages == {"network", "prior"}


def test_nothing_is_printed(capfd):
    fit(Auto(1, 2, (12, 12), epochs=1), module())
    out, err = capfd.readouterr()
    assert out == "" and "GPU" not in err and "Tip" not in err
    assert not Path("lightning_logs").exists()


def test_pieces_that_come_shuffled_are_refused(tmp_path):
    blocks = Blocks("piece", 6, shape=(12, 12))
    for n, sample in enumerate(blocks.items): sample["meta"] |= dict(volume=f"v{n % 2}", volume_shape=(3, 12, 12), origin=(n // 2, 0, 0), extent=(1, 12, 12))
    from torch.utils.data import DataLoader
    from anomaly_nb.core import DataError, collate
    with pytest.raises(DataError, match="comes back after another one"): predict(Auto(1, 2, (12, 12)), DataLoader(blocks, batch_size=2, collate_fn=collate), tmp_path)
    assert not (tmp_path/"rows.json").exists()
