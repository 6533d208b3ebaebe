"""The shared check over every model of the catalog, in each dimension that it says it works in."""
import inspect

import numpy as np
import pytest
import torch

from gpu_check import annotated

from anomaly_nb import catalog
from anomaly_nb.core import InputError, collate, rng_of, seed_everything
from anomaly_nb.data.brain import brain_records
from anomaly_nb.data.module import AnomalyDataModule
from anomaly_nb.data.sets import SliceSet, VolumeSet
from anomaly_nb.experiment import make_task
from anomaly_nb.metrics.localization import pixel_ap
from anomaly_nb.models.checks import check_detects, check_loss_falls, check_model

torch.set_num_threads(1)


def cases():
    "(name, dims, channels): 2D with one channel; where class and defaults were not met yet, also 3D with two."
    seen, found = set(), []
    for name, entry in catalog.MODELS.items():
        same = (entry.target, repr(entry.defaults))
        found += [(name, dims, channels) for dims, channels in ((2, 1), (3, 2)) if dims in entry.dims and (same not in seen or dims == 2)]
        seen.add(same)
    return found


def batch_of(shape, channels, count=6):
    "Ball-shaped organs with smooth texture, two channels, a size that no network likes."
    samples, axes = [], np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    for i in range(count):
        rng = rng_of("batch", i)
        inside = (sum(a**2 for a in axes) < rng.uniform(0.6, 0.9))[None]
        image = np.stack([np.sin(3 * axes[0] * rng.normal() + c) + 0.3 * rng.normal(size=shape) for c in range(channels)]) * inside
        samples.append(dict(image=image.astype(np.float32), foreground=inside, valid=inside, mask=~inside & inside, mask_known=True, label=0, id=f"b{i}", subject=f"b{i}", meta={}))
    return collate(samples)


def with_task(name, batch):
    "The batch after the task that a model's training needs, bound to the batch itself."
    samples = [{k: v[i].numpy() if isinstance(v, torch.Tensor) and v.ndim > 1 else v[i] for k, v in batch.items()} for i in range(len(batch["id"]))]
    samples = [s | dict(label=0, mask_known=True) for s in samples]
    source = Listed(samples)
    task = catalog.build(catalog.TASKS, name, "task").bind(source)
    if task.needs_external: task = task.with_external(source)
    return collate([task(s, rng_of("task", i)) for i, s in enumerate(samples)])


class Listed(list):
    "Samples as a data set: a list that knows its subjects, axes and channels."
    @property
    def subjects(self): return [s["subject"] for s in self]
    @property
    def channels(self): return len(self[0]["image"])
    @property
    def spatial_dims(self): return self[0]["image"].ndim - 1


QUICK = {"preset": "tiny", "classifier_widths": (8, 16), "moves": 2}     # a diffusion model is as wrong with small networks as with large ones


def quick(entry):
    "The options of QUICK that the model takes."
    return {k: v for k, v in QUICK.items() if k in inspect.signature(entry.load()).parameters}


@pytest.mark.parametrize("name, dims, channels", cases())
def test_shared_check(name, dims, channels):
    entry, shape = catalog.MODELS[name], (21, 18) if dims == 2 else (10, 13, 9)
    batch = batch_of(shape, channels, 6 if dims == 2 else 4)
    if entry.task: batch = with_task(entry.task, batch)
    if entry.instances: batch["instances"] = annotated(len(batch["id"]), shape)
    weak = batch | {"label": torch.arange(len(batch["id"])) % 2}
    batches = {"train": batch, "weak": weak, "unlabelled": batch, "train+unlabelled": batch, "train+weak": weak}
    check_model(lambda: catalog.build(catalog.MODELS, name, "model", quick(entry), channels=channels, spatial_dims=dims, shape=shape), batches, exempt=entry.exempt)


def distinct():
    "One name for each class and defaults of the catalog."
    return list({(e.target, repr(e.defaults)): name for name, e in reversed(catalog.MODELS.items())}.values())


@pytest.mark.parametrize("name", distinct())
def test_poor_batches(name):
    """A batch of one trains, or is refused in words; a blank image, and one without an organ, get finite scores."""
    entry, batch = catalog.MODELS[name], batch_of((21, 18), 1)
    if entry.task: batch = with_task(entry.task, batch)
    if entry.instances: batch["instances"] = annotated(len(batch["id"]), (21, 18))
    seed_everything(0)
    model = catalog.build(catalog.MODELS, name, "model", quick(entry), channels=1, spatial_dims=2, shape=(21, 18))
    one = {k: {n: w[:1] for n, w in v.items()} if isinstance(v, dict) else v[:1] for k, v in batch.items()}
    try: check_loss_falls(model, one, steps=2, share=-np.inf)
    except InputError as error: assert "1" in str(error) or "one" in str(error), error
    model.eval()
    with torch.no_grad(): model.fit_statistics([dict(batch)])
    poor = {k: v.clone() if isinstance(v, torch.Tensor) else v if isinstance(v, dict) else list(v) for k, v in batch.items()}
    poor["image"][0] = 1.5
    poor["foreground"][1] = False
    with torch.no_grad():
        for kind in model.kinds:
            for key, value in model.score(poor, kind).items(): assert value.isfinite().all(), f"{name}, {kind}: {key} is not finite"


@pytest.fixture(scope="module")
def tiny():
    records = brain_records("tiny", "FLAIR", pools=("train", "val", "test", "unlabelled"))
    return {pool: SliceSet(VolumeSet(found[::2] if pool == "test" else found), min_foreground=0.05 if pool in ("train", "unlabelled") else 1e-9) for pool, found in records.items()}


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n, e in catalog.MODELS.items() if "detects" not in e.exempt])
def test_finds_cohort_lesions(name, tiny):
    """After three seconds of training, or, if that was too little, after twelve (`many`, of ten networks: eight, thirty)."""
    data = AnomalyDataModule(**tiny, task=make_task(name))
    for seconds in (8, 30) if name == "many" else (3, 12):
        seed_everything(0)
        model = catalog.build(catalog.MODELS, name, "model", channels=data.channels, spatial_dims=2, shape=data.shape)
        try: found = check_detects(model, data, pixel_ap, max_seconds=seconds)
        except AssertionError:
            if seconds in (12, 30): raise
        else: return print(found)
