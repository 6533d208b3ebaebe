# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The data module: pools, and who may see what
#
# > Keeps training, validation and test apart, hides labels where they must be hidden, and makes random tasks repeatable.

# %%
#| default_exp data.module

# %% [markdown]
# A detector that has seen the test subjects is excellent, and worthless. Nearly all ways to cheat by accident go through the data: a subject with two
# scans in two splits, "normal" training images with a lesion, a mask that travels along in a batch because nobody removed it, a synthetic anomaly
# pasted from a test image. So everything a model is given comes from one object that knows six **pools**:
#
# | pool | holds | a model sees |
# |---|---|---|
# | `train` | normals | images |
# | `val` | normals: early stopping, thresholds | images |
# | `test` | normals and ill | images; masks and labels only in the metrics |
# | `weak` | normals and ill | images and *image-level* labels, never a mask |
# | `unlabelled` | a mixture | images, nothing else |
# | `val_anomalous` | some ill, for choices that are declared | everything |
#
# The second job is **randomness**. The generator of a sample is derived from where it stands,
# $$\xi = \mathrm{rng}(\text{seed},\ \text{split},\ \text{epoch},\ \text{index}),$$
# so neither the number of worker processes nor the order of loading changes anything. About ten seconds, 700 MB.

# %%
#| export
import tempfile
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from fastcore.basics import patch
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from anomaly_nb.core import DataError, LeakageError, ParameterError, PoolError, choose, collate, rng_of, write_aside
from anomaly_nb.data.records import records_manifest

# %%
import dataclasses
from dataclasses import replace

import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_fail

from anomaly_nb.data.brain import brain_records
from anomaly_nb.data.records import load_record, write_volume
from anomaly_nb.data.sets import PatchSet, SliceSet, VolumeSet
from anomaly_nb.viz import TRUTH, show_image

torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp(prefix="module-"))
cohort = brain_records("tiny", contrast="FLAIR", pools=("train", "val", "test", "weak", "unlabelled"))
def named(*ids): return [r for pool in cohort.values() for r in pool if r.id in ids]
def slices(records, **how): return SliceSet(VolumeSet(records, cache=folder/"cache", **how), min_foreground=.2)

train, val = slices(cohort["train"][:4]), slices(cohort["val"][:2])
healthy, ill = [[r for r in cohort["test"] if r.label == label] for label in (0, 1)]
test = slices(healthy[:2] + ill[:1])
weak, unlabelled = slices(cohort["weak"][:2]), slices(cohort["unlabelled"][:2])


# %% [markdown]
# ## Order and epochs
#
# A sampler normally yields an index. Ours yields `(epoch, index)`: the epoch travels *inside* the request, so that a worker
# process that was started long ago still knows which epoch it is working for. Lightning calls `set_epoch`; a plain loop need not: each new iteration is the next
# epoch. A `fixed` sampler (validation, test) stays in epoch 0 for ever.

# %%
#| export
class EpochSampler(Sampler):
    "Yields (epoch, index). `shuffle`: an order that depends on seed, split and epoch only. `fixed`: always epoch 0. `length`: how many indices there are, or a list of those to take."
    def __init__(self, length, shuffle=False, seed=0, split=0, fixed=False):
        self.indices = np.arange(length) if isinstance(length, int) else np.asarray(length)
        self.shuffle, self.seed, self.split, self.fixed, self.epoch = shuffle, seed, split, fixed, 0

    def __len__(self): return len(self.indices)

    def set_epoch(self, epoch): self.epoch = int(epoch)

    def __iter__(self):
        epoch = 0 if self.fixed else self.epoch
        self.epoch += 1
        order = rng_of("order", self.seed, self.split, epoch).permutation(self.indices) if self.shuffle else self.indices
        return iter([(epoch, int(i)) for i in order])


# %%
sampler = EpochSampler(8, shuffle=True)
for _ in range(3): print(*sampler)

# %%
sampler.set_epoch(0)
first = list(sampler)
assert [i for _, i in first] != [i for _, i in sampler] and {i for _, i in first} == set(range(8))    # another order, all of them
test_eq({i for _, i in EpochSampler([2, 3, 5], shuffle=True)}, {2, 3, 5})
test_eq(list(EpochSampler(8, shuffle=True)), first)               # same seed, same order
assert [i for _, i in EpochSampler(50, True, seed=1)] != [i for _, i in EpochSampler(50, True, seed=2)]
fixed = EpochSampler(3, fixed=True); list(fixed); test_eq(list(fixed), [(0, 0), (0, 1), (0, 2)])

# %% [markdown]
# ## What a pool shows
#
# In `weak`, the mask is emptied *and* declared unknown, and so is everything that would betray the place: `valid` and all of `meta` except a short list. In `unlabelled`
# the label goes too (its 0 means nothing there).

# %%
#| export
POOLS = ("train", "val", "test", "weak", "unlabelled", "val_anomalous")
_FIXED = ("val", "test", "val_anomalous")        # the same in every epoch
_HIDDEN = ("weak", "unlabelled")                 # masks reach nobody
_META = ("volume", "volume_shape", "origin", "extent", "spacing", "affine", "site", "contrast", "modality", "pool")

def hide(sample, pool):
    "What a model may see of a sample in this pool: no mask in `weak`, neither mask nor label in `unlabelled`."
    if pool not in _HIDDEN: return sample
    shown = (*_META, "volume_label") if pool == "weak" else _META
    meta = {k: sample["meta"][k] for k in shown if k in sample["meta"]}
    sample = sample | dict(mask=np.zeros_like(sample["mask"]), valid=np.ones_like(sample["valid"]), mask_known=False, meta=meta)
    return sample | dict(label=0) if pool == "unlabelled" else sample


# %%
sick = weak[int(np.flatnonzero(weak.labels)[10])]
for pool in ("test", "weak", "unlabelled"):
    s = hide(sick, pool)
    print(f"{pool:11} label {s['label']}, lesion voxels {s['mask'].sum():2}, mask known {s['mask_known']}, meta: {', '.join(k for k in s['meta'] if k not in _META) or '(place, site, contrast)'}")
assert sick["mask"].any() and not hide(sick, "weak")["mask"].any() and "family" not in hide(sick, "weak")["meta"]


# %% [markdown]
# ## A pool
#
# A `Pool` is a data set with that curtain in front, and perhaps a task behind it. `pool[(epoch, index)]` and `pool[index]` (epoch 0) both work.

# %%
#| export
class Pool(Dataset):
    "One split: hides what must be hidden, then calls the task with `default_rng([seed, split, epoch, index])`. `fixed`: the same in every epoch (default: of validation and test)."
    def __init__(self, dataset, name, seed=0, task=None, fixed=None):
        self.dataset, self.name, self.seed, self.task = dataset, name, seed, task
        self.fixed = name in _FIXED if fixed is None else fixed
        self.split = POOLS.index(name)
        self.ids, self.subjects, self.shape, self.channels = dataset.ids, list(dataset.subjects), dataset.shape, dataset.channels
        self.spatial_dims, self.spacing = dataset.spatial_dims, dataset.spacing
        self.labels = np.full(len(dataset), -1) if name == "unlabelled" else dataset.labels
        self._members = set(self.subjects)

    def __len__(self): return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = hide(self.dataset[index], self.name)
        if self.task is None: return sample
        sample = self.task(sample, np.random.default_rng([self.seed, self.split, 0 if self.fixed else epoch, index]))
        if sample["subject"] not in self._members: raise LeakageError(f"pool {self.name!r}", f"the task brought in subject {sample['subject']!r}", "samples of this pool only")
        return sample

    @property
    def volumes(self):
        "The whole volumes with their true masks, for metrics; refused for `weak` and `unlabelled`."
        if self.name in _HIDDEN: raise PoolError(f"pool {self.name!r}", "shows no volumes: their masks are hidden", "the samples themselves")
        return self.dataset.volumes


# %%
print(len(Pool(train, "train")), Pool(train, "train")[0]["id"], Pool(train, "train")[(7, 0)]["id"])
test_eq(set(Pool(unlabelled, "unlabelled").labels), {-1})
test_fail(lambda: Pool(weak, "weak").volumes, contains="hidden")


# %% [markdown]
# ### Ready anomalies
#
# A task can cost more than the network's step that learns from it. `ReadyPool` makes the first `ready` epochs once and shows them again and again: epoch $e$ is epoch $e \bmod$ `ready`.
# Fewer different anomalies, no waiting. Two worker processes that make the same sample write the same bytes, so the last one wins and nothing is lost.

# %%
#| export
class ReadyPool(Pool):
    "A pool with a task whose samples of the first `ready` epochs are kept in `folder` (made on first use) and shown again in later epochs."
    def __init__(self, dataset, name, seed, task, ready, folder):
        super().__init__(dataset, name, seed, task)
        self.ready, self.folder = ready, Path(folder)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        file = self.folder/f"{epoch % self.ready}-{index}.npz"
        if not file.exists():
            sample = super().__getitem__((epoch % self.ready, index))
            with write_aside(file) as aside, open(aside, "wb") as stream: np.savez(stream, **{k: sample[k] for k in ("image", "target", "positive", "pretext") if k in sample})
            return sample
        sample = hide(self.dataset[index], self.name)
        with np.load(file, allow_pickle=False) as kept: return sample | {"clean": sample["image"]} | {k: kept[k] if kept[k].ndim else kept[k].item() for k in kept.files}


# %% [markdown]
# ## Checks before anything starts
#
# Four plain functions. Each names the subjects, because "leakage detected" helps nobody at two in the morning.

# %%
#| export
def _some(names, n=5):
    "The first few names, as text."
    names = sorted(set(map(str, names)))
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")

def check_pools(pools):
    "Every pool is a data set with samples, `train` and `val` are there. Errors: `DataError`."
    for name, dataset in pools.items():
        if isinstance(dataset, (list, tuple)) and dataset: raise DataError(f"pool {name!r}", f"is a {type(dataset).__name__}", "a VolumeSet, SliceSet or PatchSet")
        if not len(dataset): raise DataError(f"pool {name!r}", "is empty", "at least one sample")
    for name, what in (("train", "no normal training data"), ("val", "no normal validation data")):
        if name not in pools: raise DataError(f"pool {name!r}", what, "a data set of normals")


# %%
#| export
def check_leakage(pools):
    "No subject stands in two pools. Errors: `LeakageError` with the subjects' names."
    names = list(pools)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            both = set(pools[a].subjects) & set(pools[b].subjects)
            if both: raise LeakageError(f"pools {a!r} and {b!r}", f"share {len(both)} subject{'s'*(len(both) > 1)}: {_some(both)}", "no subject in two pools")


# %%
#| export
def check_grids(pools):
    "All pools have the channels, axes, shape and (where common) spacing of the first. Errors: `DataError` with the subjects' names."
    first, reference = next(iter(pools.items()))
    for name, dataset in pools.items():
        if dataset.shape is None:
            odd = next(i for i, s in enumerate(dataset.volumes.shapes) if s != dataset.volumes.shapes[0])
            raise DataError(f"pool {name!r}", f"subject {dataset.volumes.subjects[odd]!r} has the grid {dataset.volumes.shapes[odd]}, {dataset.volumes.subjects[0]!r} has {dataset.volumes.shapes[0]}", "one grid (CropOrPad)")
        for what in ("channels", "spatial_dims", "shape"):
            mine, its = getattr(reference, what), getattr(dataset, what)
            if mine != its: raise DataError(f"pool {name!r} (subjects {_some(dataset.subjects)})", f"has {what} {its}", f"{mine}, as pool {first!r} (subjects {_some(reference.subjects)})")
        if dataset.spacing and reference.spacing and not np.allclose(dataset.spacing, reference.spacing, rtol=.01):
            raise DataError(f"pool {name!r} (subjects {_some(dataset.subjects)})", f"has voxels of {dataset.spacing} mm", f"{reference.spacing} mm, as pool {first!r}")


# %%
#| export
def check_normals(pools):
    "`train` and `val` hold pieces of normal volumes only. Errors: `DataError` with the names."
    for name in ("train", "val"):
        volumes = pools[name].volumes
        wrong = [volumes.ids[i] for i in np.flatnonzero(volumes.labels)]
        if wrong: raise DataError(f"pool {name!r}", f"holds {len(wrong)} anomalous: {_some(wrong)}", "normals only (ill ones go to 'weak', 'unlabelled', 'val_anomalous' or 'test')")


# %%
def said(check, pools):
    "The error's text."
    try: check(pools)
    except DataError as error: print(f"{type(error).__name__}: {error}\n"); return str(error)
    raise AssertionError("accepted")

base = dict(train=train, val=val, test=test)
assert "train-healthy-003A" in said(check_leakage, base | dict(test=slices([cohort["train"][3]] + ill[:2])))
assert ill[0].id in said(check_normals, base | dict(train=slices([cohort["train"][0], ill[0]])))
sample = load_record(healthy[2])                                   # the same head with two more rows of air
write_volume(folder/"big.nii.gz", np.pad(sample["image"][0], ((0, 0), (1, 1), (0, 0))), np.asarray(sample["meta"]["affine"]))
big = replace(healthy[2], id="big", subject="big", images=(str(folder/"big.nii.gz"),), foreground=None)
assert "big" in said(check_grids, base | dict(test=slices([big])))
assert "big" in said(check_grids, base | dict(test=VolumeSet([healthy[0], big], cache=folder/"cache")))
assert "validation" in said(check_pools, dict(train=train))
assert "empty" in said(check_pools, base | dict(test=[]))
for check in (check_pools, check_leakage, check_grids, check_normals): check(base)


# %% [markdown]
# A slice *without* lesion from an ill subject is refused in `train` as well. Healthy-looking is not healthy.
#
# ## The module
#
# `AnomalyDataModule` is a `LightningDataModule`, so that Lightning can use it; `loader` gives the same to everybody else.

# %%
#| export
class AnomalyDataModule(pl.LightningDataModule):
    """Pools of one experiment, checked when it is made. `task`: synthetic anomalies or a pretext task, bound to each split; `val_task`: another one for the validation.

    `ready`: keep the anomalies of that many epochs and repeat them (0: always new ones); `resample_val`: new validation anomalies in every epoch. Errors: `DataError`, `LeakageError`."""
    def __init__(self, train, val, test=None, weak=None, unlabelled=None, val_anomalous=None, task=None, batch_size=16, workers=0, seed=0, val_task=None, ready=0, resample_val=False):
        super().__init__()
        if isinstance(ready, bool) or not isinstance(ready, int) or ready < 0: raise ParameterError("ready", f"is {ready!r}", "a number of epochs, 0 for always new anomalies")
        given = dict(zip(POOLS, (train, val, test, weak, unlabelled, val_anomalous)))
        given = {name: dataset for name, dataset in given.items() if dataset is not None}
        for check in (check_pools, check_grids, check_leakage, check_normals): check(given)
        self.pools = {name: Pool(dataset, name, seed) for name, dataset in given.items()}
        self.batch_size, self.workers, self.seed, self.task, self.val_task = batch_size, workers, seed, task, val_task or task
        self.ready, self.resample_val, self._kept = ready, resample_val, None
        self.channels, self.spatial_dims, self.shape = train.channels, train.spatial_dims, train.shape

    def require(self, needs, who):
        "Raises `PoolError` naming `who` and the pools that it needs and that are missing."
        for name in needs: choose(name, POOLS, "pool")
        missing = [name for name in needs if name not in self.pools]
        if missing: raise PoolError(who, f"needs the pool{'s'*(len(missing) > 1)} {', '.join(missing)}", f"a data set that has it; here are {', '.join(self.pools)}")

    def train_dataloader(self): return self.loader("train", task=self.task is not None, shuffle=True)
    def val_dataloader(self): return self.loader("val", task=self.task is not None)
    def test_dataloader(self): return self.loader("test")
    def predict_dataloader(self): return self.loader("test")


# %% [markdown]
# A task needs some organ to work on, and the pools that are scored hold every slice with a single voxel of it. With a task, slices with less than 5 % of organ are left out,
# and a validation takes at most 512 samples, evenly spread over people and heights: it is asked after every epoch.
#
# Binding throws away whatever source the task came with and gives it the pool's own samples, through the curtain. Ill or held-out images are never
# spoilt: asking for tasks on `test` is an error.

# %%
#| export
@patch
def bound_task(self: AnomalyDataModule, pool):
    "The task, bound to the samples of this pool only. Errors: `ParameterError` without a task or for held-out pools, `LeakageError` if it keeps a foreign source."
    task = self.val_task if pool == "val" else self.task
    if task is None: raise ParameterError("task", "this training needs a task and the data module has none", "AnomalyDataModule(..., task=...)")
    if pool in ("test", "val_anomalous"): raise ParameterError("task", f"cannot run on the pool {pool!r}", "train, val, weak or unlabelled")
    own = self.pools[pool]
    task = task.bind(own) if hasattr(task, "bind") else task
    foreign = set(getattr(getattr(task, "source", None), "subjects", ())) - set(own.subjects)
    if foreign: raise LeakageError(f"task {type(task).__name__}", f"draws from subjects outside of {pool!r}: {_some(foreign)}", "bind(source) must replace its source")
    return task


# %%
#| export
LEAST = 0.05   # share of organ that a slice needs for a task
MOST = 512     # samples of a validation with a task

@patch
def loader(self: AnomalyDataModule, pool, task=False, shuffle=False, batch_size=None, workers=None):
    "A `DataLoader` of collated batches from one pool; with `task=True` the module's task is applied. Errors: `ParameterError`, `PoolError`."
    choose(pool, POOLS, "pool")
    self.require([pool], "loader")
    own = self.pools[pool]
    fixed = pool in _FIXED and not (task and self.resample_val)
    dataset = Pool(own.dataset, pool, self.seed, self.bound_task(pool), fixed) if task else own
    if task and self.ready and not fixed: dataset = self.ready_pool(dataset)
    workers = self.workers if workers is None else workers
    shares = getattr(own.dataset, "shares", None)
    which = np.flatnonzero(shares >= LEAST) if task and shares is not None else np.arange(len(dataset))
    if task and fixed and len(which) > MOST: which = which[np.linspace(0, len(which) - 1, MOST).round().astype(int)]
    if not len(which): raise DataError(f"pool {pool!r}", f"has no slice with {LEAST:.0%} of organ", "something for the task to work on")
    sampler = EpochSampler(which, shuffle, self.seed, own.split, fixed=fixed)
    return DataLoader(dataset, batch_size=batch_size or self.batch_size, sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


# %%
#| export
@patch
def ready_pool(self: AnomalyDataModule, pool):
    "`pool` with its task's samples kept in a temporary folder, which goes with this data module."
    self._kept = self._kept or tempfile.TemporaryDirectory(prefix="anomaly_nb-ready-")
    folder = Path(self._kept.name)/pool.name
    folder.mkdir(exist_ok=True)
    return ReadyPool(pool.dataset, pool.name, self.seed, pool.task, self.ready, folder)


# %%
#| export
@patch
def summary(self: AnomalyDataModule):
    "One dict a pool: samples, volumes, subjects, ill volumes, ill samples (None where hidden), masks unknown."
    rows = []
    for name, pool in self.pools.items():
        volumes, shown = pool.dataset.volumes, name != "unlabelled"
        rows.append(dict(pool=name, samples=len(pool), volumes=len(volumes), subjects=len(set(pool.subjects)), ill_volumes=int(volumes.labels.sum()) if shown else None,
                         ill_samples=int((pool.labels > 0).sum()) if shown else None, masks_unknown=sum(not i["mask_known"] for i in volumes.infos) if name not in _HIDDEN else None))
    return rows

@patch
def manifest(self: AnomalyDataModule):
    "Hash of the records of each pool: what a result belongs to."
    return {name: records_manifest(pool.dataset.volumes.records) for name, pool in self.pools.items()}


# %%
import pandas as pd
data = AnomalyDataModule(train, val, test, weak=weak, unlabelled=unlabelled, batch_size=8)
print("channels", data.channels, " shape", data.shape)
table = pd.DataFrame(data.summary(), dtype=object).set_index("pool")
table.where(table.notna(), "hidden")

# %%
batch = next(iter(data.loader("train", shuffle=True)))
print({k: tuple(v.shape) if torch.is_tensor(v) else type(v).__name__ for k, v in batch.items()})
print(batch["id"])

# %%
for b in data.loader("weak"): assert not b["mask"].any() and not b["mask_known"].any() and b["valid"].all()
assert sum(int(b["label"].sum()) for b in data.loader("weak")) == weak.labels.sum() > 0
assert sum(int(b["label"].sum()) for b in data.loader("unlabelled")) == 0
data.require(("train", "weak"), "some model")
test_fail(lambda: data.require(("val_anomalous",), "a supervised model"), contains="a supervised model: needs the pool val_anomalous")
test_fail(lambda: data.loader("trian"), contains="'train'")
test_fail(lambda: data.loader("train", task=True), contains="needs a task")
test_fail(lambda: AnomalyDataModule(train, None, test), contains="no normal validation data")
test_eq(sum(len(b["id"]) for b in data.predict_dataloader()), len(test))


# %% [markdown]
# ## A task in the module
#
# A toy task that pastes a square from *another* image of its source. We hand it over with a planted source, the test set, as a careless author might.

# %%
@dataclasses.dataclass
class Paste:
    "Replaces a random square, as far as it lies in the organ, by somebody else's."
    size: int = 10
    source = None
    def bind(self, source):
        new = replace(self); new.source = source; return new
    def __call__(self, sample, rng):
        others = np.flatnonzero(np.array(self.source.subjects) != sample["subject"])
        other, square = self.source[int(rng.choice(others))], np.zeros_like(sample["foreground"])
        i, j = rng.integers(10, 26, size=2)
        square[:, i:i+self.size, j:j+self.size] = True
        image = np.where(square & sample["foreground"], other["image"], sample["image"])
        return sample | dict(clean=sample["image"], image=image, target=(image != sample["image"]).astype("float32"), meta=sample["meta"] | dict(donor=other["subject"]))

data = AnomalyDataModule(train, val, test, weak=weak, task=Paste().bind(test), batch_size=8, seed=3)
batch = next(iter(data.loader("train", task=True, shuffle=True)))
fig, axes = plt.subplots(2, 5, figsize=(10, 5.2), dpi=70, layout="constrained")
for b in range(5):
    show_image(batch["image"][b], axes[0, b], f"subject {batch['subject'][b][-4:]}\nsquare from {batch['meta'][b]['donor'][-4:]}", foreground=batch["foreground"][b])
    axes[0, b].contour(batch["target"][b, 0], [.5], colors=TRUTH, linewidths=1)
    show_image(batch["target"][b], axes[1, b], "target", vmin=0, vmax=1)
fig.suptitle("Embedded cohort: training slices with a foreign square, and the target");

# %% [markdown]
# All donors are training subjects. The toy itself is poor: the donor's slice may come from another height, and where the donor has air the square is flat
# and grey. What makes a *good* task is the subject of the chapters on tasks; the data module only sees to it that nobody's test subject is in it.

# %%
for pool, source in (("train", train), ("val", val), ("weak", weak)):
    donors = {m["donor"] for _ in range(3) for b in data.loader(pool, task=True) for m in b["meta"]}
    assert donors <= set(source.subjects)                          # the planted test subjects never appear
test_fail(lambda: data.loader("test", task=True), contains="cannot run on the pool 'test'")

class Stubborn(Paste):
    "A task that ignores what it is bound to."
    def bind(self, source): return self

stubborn = Stubborn(); stubborn.source = test
test_fail(lambda: AnomalyDataModule(train, val, test, task=stubborn).loader("train", task=True), contains="outside of 'train': test-")

# %%
thin = AnomalyDataModule(train, SliceSet(VolumeSet(cohort["val"][:2], cache=folder/"cache"), min_foreground=1e-9), test, task=Paste(), batch_size=8)
seen = [float(f.float().mean()) for b in thin.loader("val", task=True) for f in b["foreground"]]
assert min(seen) >= 0.05 and len(seen) < len(thin.pools["val"]) == sum(len(b["id"]) for b in thin.loader("val"))          # scored: all of them; learned from: those with organ

# %% [markdown]
# `val_task` gives the validation another task than the training: what a network learned from squares is asked about something else. And with `ready`, the third epoch repeats the first:

# %%
two = AnomalyDataModule(train, val, test, task=Paste(), val_task=Paste(size=4), batch_size=8)
sizes = {pool: float(next(iter(two.loader(pool, task=True)))["target"].flatten(1).sum(1).max()) for pool in ("train", "val")}
print("largest target [pixels]:", sizes)
assert sizes["val"] <= 16 < sizes["train"]

kept = AnomalyDataModule(train, val, test, task=Paste(), batch_size=8, seed=3, ready=2)
again, plain = kept.loader("train", task=True, shuffle=True), AnomalyDataModule(train, val, test, task=Paste(), batch_size=8, seed=3).loader("train", task=True, shuffle=True)
def by_id(loader): return {i: (b["image"][n].numpy(), b["target"][n].numpy(), b["clean"][n].numpy()) for b in loader for n, i in enumerate(b["id"])}
epochs = []
for _ in range(4): epochs.append(by_id(again))
for e, fresh in enumerate((by_id(plain), by_id(plain))):                        # the first two epochs are the ordinary ones, the next two repeat them
    for i in fresh:
        for a, b, c in zip(fresh[i], epochs[e][i], epochs[e + 2][i]): assert np.array_equal(a, b) and np.array_equal(b, c)
assert any(not np.array_equal(epochs[0][i][0], epochs[1][i][0]) for i in epochs[0])
moving = AnomalyDataModule(train, val, test, task=Paste(), batch_size=8, resample_val=True).loader("val", task=True)
assert any(not np.array_equal(a[1], b[1]) for a, b in zip(by_id(moving).values(), by_id(moving).values()))     # the re-sampled variant of the validation
test_fail(lambda: AnomalyDataModule(train, val, task=Paste(), ready=-1), contains="ready")


# %% [markdown]
# ### Workers change nothing, epochs do
#
# The classical bug: a data set that keeps one generator. Every worker process gets a copy of it in the *same* state, and the "random" numbers repeat.
# (With numpy's global state it was so for years; torch now seeds that one in each worker. Then nothing repeats, but two workers still draw other numbers than three.)

# %%
class OneGenerator(Dataset):
    "Draws a number for each sample from a generator of its own: what not to do."
    def __init__(self): self.rng = np.random.default_rng(0)
    def __len__(self): return 8
    def __getitem__(self, index): return int(self.rng.integers(1000))

drawn = {workers: [int(n) for n in torch.cat(list(DataLoader(OneGenerator(), batch_size=2, num_workers=workers)))] for workers in (0, 2)}
for workers, numbers in drawn.items(): print(f"{workers} workers:", numbers)
assert len(set(drawn[2])) == len(set(drawn[0]))//2                 # each number twice


# %% [markdown]
# Ours, with the toy task, which draws a donor and a place for each sample:

# %%
def epoch(loader): return [{k: v.numpy() if torch.is_tensor(v) else v for k, v in b.items()} for b in loader]
def same(a, b): return len(a) == len(b) and all(np.array_equal(x[k], y[k]) if isinstance(x[k], np.ndarray) else x[k] == y[k] for x, y in zip(a, b) for k in x)

alone, helped = data.loader("train", task=True, shuffle=True), data.loader("train", task=True, shuffle=True, workers=2)
a1, a2, b1, b2 = epoch(alone), epoch(alone), epoch(helped), epoch(helped)
del helped
print("epoch 1, no worker against two workers:", same(a1, b1), "  epoch 2:", same(a2, b2), "  epoch 1 against 2:", same(a1, a2))

# %%
assert same(a1, b1) and same(a2, b2) and not same(a1, a2)
v = data.loader("val", task=True)
assert same(epoch(v), epoch(v))                                    # validation is fixed
other = AnomalyDataModule(train, val, test, task=Paste(), batch_size=8, seed=4)
assert not same(epoch(other.loader("train", task=True)), epoch(data.loader("train", task=True)))
images = lambda loader: np.concatenate([b["image"] for b in epoch(loader)])
test_eq(images(data.loader("train", task=True, batch_size=3)), images(data.loader("train", task=True, batch_size=8)))    # nor does the batch size


# %% [markdown]
# Under Lightning, the same: it calls `set_epoch` before every epoch.

# %%
class Watch(pl.LightningModule):
    "Learns nothing, remembers what it was shown."
    def __init__(self): super().__init__(); self.w, self.seen, self.checked = torch.nn.Parameter(torch.zeros(())), [], []
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.)
    def training_step(self, batch, _): self.seen.append((self.current_epoch, batch["image"].sum().item(), batch["id"][0])); return self.w*0
    def validation_step(self, batch, _): self.checked.append(batch["image"].sum().item())

import logging, warnings
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
watch = Watch()
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*LeafSpec")                   # torch 2.13 about a line inside Lightning 2.6
    pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0).fit(watch, data)
per_epoch = [[s for e, *s in watch.seen if e == n] for n in (0, 1)]
plain = [[b["image"].sum().item(), b["id"][0]] for b in data.loader("train", task=True, shuffle=True)]
print(f"{len(per_epoch[0])} batches an epoch; epochs differ: {per_epoch[0] != per_epoch[1]}; epoch 1 as in a plain loop: {per_epoch[0] == plain}; validation fixed: {watch.checked[:len(watch.checked)//2] == watch.checked[len(watch.checked)//2:]}")

# %%
assert per_epoch[0] != per_epoch[1] and per_epoch[0] == plain
half = len(watch.checked)//2
test_eq(watch.checked[:half], watch.checked[half:])


# %% [markdown]
# Volumes and patches go through the same module:

# %%
def view(make): return AnomalyDataModule(*(make(VolumeSet(records, cache=folder/"cache")) for records in (cohort["train"][:2], cohort["val"][:1], cohort["test"][:2])), batch_size=2)
for name, make in (("volumes", lambda v: v), ("patches", lambda v: PatchSet(v, 16, 12)), ("flat patches", lambda v: PatchSet(v, (1, 16, 16), (1, 12, 12)))):
    d = view(make)
    print(f"{name:13} shape {str(d.shape):14} spatial_dims {d.spatial_dims}  batch {tuple(next(iter(d.loader('train')))['image'].shape)}")
    test_eq(next(iter(d.loader("test")))["image"].shape[2:], d.shape)

# %% [markdown]
# ## What goes wrong
#
# - **One person, two names.** The leakage check compares subject names. If a data set lists a person twice under two numbers, no check of names
#   can know.
# - **The held-out test set is looked at too often.** Nothing in the code prevents the hundredth choice of a parameter by test AP.
# - **`val` without ill subjects cannot choose between maps.** Use it for thresholds and early stopping; a choice made on `val_anomalous` must be declared.
#
# **Questions**
#
# 1. Why is validation fixed, with a random task? *So that two epochs are compared on the same spoilt images; otherwise the curve shows the luck of the draw.*
# 2. Why is `valid` reset in `weak`? *Voxels taken out of `valid` lie where a lesion's crumb is. It would be a mask by another name.*
# 3. The epoch travels with the index. What would happen if a worker counted epochs for itself? *With two workers each would count on its own pace, and
#    persistent workers would differ from new ones: the result would depend on the machine.*
