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
# # Task folds: cross-validation over invented anomalies
#
# > Ties each synthetic task to a part of the normal people, trains on some pairs and validates on the others.

# %%
#| default_exp methods.folds

# %% [markdown]
# A segmenter that learns from synthetic anomalies gets better at finding *those*. When should it stop? Its loss on its own task falls for ever; a validation set of real
# anomalies does not exist, by the definition of the problem. Baugh et al. (MICCAI 2023) answer with a second kind of invention: **validate on tasks that the network
# was not trained on**. A task is to the model what an unknown disease is: somebody else's idea of wrong.
#
# With five tasks and five parts of the training people, cross-validating both would need $5\binom{5}{T}$ networks. The paper ties task $k$ to part $k$ and is left with
# $\binom{5}{T}$: five for $T=1$ and $T=4$, ten for $T=2$ and $T=3$.
#
# ```
#                part 0     part 1     part 2     part 3     part 4
#                intra      inter      sink       source     smooth
# T=1, fold 0    TASK       people     people     people     people       task of part 0, people of the larger side
# T=4, fold 0    both       both       both       both       validation
# ```
#
# One detail changes what the numbers mean: the *people* of the larger side are always the training people. With $T=1$ the network learns one task on four fifths of the
# people and is validated with four tasks on one fifth. About half a minute, 1 GB.

# %%
#| export
import itertools
from dataclasses import dataclass

import numpy as np

from anomaly_nb.core import DataError, ParameterError

# %%
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_fail
from math import comb

NAMES = ("intra", "inter", "sink", "source", "smooth")


# %% [markdown]
# ## Which tasks, which people
#
# $T$ of the names are trained on, the others validate; fold $i$ is the $i$-th combination in lexical order, as in the authors' code. People are **sorted** by name before they are
# cut into contiguous parts (the authors take the order of the directory, so that their folds depend on the file system).

# %%
#| export
def task_splits(names, trained):
    "All ways to train on `trained` of the task `names`: a list of (train names, validation names), in lexical order of positions (Baugh et al. 2023). Errors: `ParameterError`."
    if len(set(names)) < len(names): raise ParameterError("tasks", f"names a task twice: {', '.join(names)}", "different tasks")
    if isinstance(trained, bool) or not isinstance(trained, int) or not 0 < trained < len(names):
        raise ParameterError("trained", f"is {trained!r}, there are {len(names)} tasks", f"a number from 1 to {len(names) - 1}: at least one task must be left for the validation")
    return [(chosen, tuple(n for n in names if n not in chosen)) for chosen in itertools.combinations(names, trained)]


# %%
for chosen, left in task_splits(NAMES, 1): print("+".join(chosen), "|", "+".join(left))

# %%
test_eq([len(task_splits(NAMES, t)) for t in (1, 2, 3, 4)], [5, 10, 10, 5])
for t in (1, 2, 3, 4):
    found = task_splits(NAMES, t)
    test_eq(len({frozenset(a) for a, _ in found}), comb(5, t))
    for a, b in found: assert not set(a) & set(b) and len(a) + len(b) == 5 and len(a) == t
test_fail(lambda: task_splits(NAMES, 5), contains="at least one task must be left")


# %%
#| export
def subject_parts(subjects, count):
    "Sorted unique `subjects` in `count` contiguous parts, the first ones larger by one where they do not divide. Errors: `DataError` for fewer subjects than parts."
    who = sorted(set(subjects))
    if len(who) < count: raise DataError("task folds", f"have {len(who)} subjects for {count} parts", f"at least {count} training subjects")
    return [list(map(str, part)) for part in np.array_split(np.array(who), count)]


# %%
#| export
@dataclass(frozen=True)
class Fold:
    "One network of the cross-validation: what it is trained and validated on. `split` reads '1/4' for one task trained and four validated."
    split: str
    index: int
    train_tasks: tuple
    val_tasks: tuple
    train_subjects: tuple
    val_subjects: tuple

def task_folds(subjects, trained, names):
    "The folds for `trained` of the tasks `names`: task k belongs to part k of the people; the larger side's people are trained on, whichever tasks they belong to."
    parts, folds = subject_parts(subjects, len(names)), []
    for index, (chosen, left) in enumerate(task_splits(names, trained)):
        mine, others = ([s for k, name in enumerate(names) if name in side for s in parts[k]] for side in (chosen, left))
        if len(chosen) < len(left): mine, others = others, mine
        folds.append(Fold(f"{len(chosen)}/{len(left)}", index, chosen, left, tuple(mine), tuple(others)))
    return folds


# %%
#| export
def one_fold(subjects, trained, index, names):
    "Fold number `index` of `task_folds`. Errors: `ParameterError`."
    folds = task_folds(subjects, trained, names)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(folds): raise ParameterError("fold", f"is {index!r}", f"0 to {len(folds) - 1} for {trained} of {len(names)} tasks")
    return folds[index]


# %% [markdown]
# Twenty people, all 30 networks. Rows are networks, columns are people; dark is trained on, light validates, and the letter says which tasks the row learns.

# %%
people = [f"p{n:02d}" for n in range(20)]
folds = [f for t in (1, 2, 3, 4) for f in task_folds(people[::-1], t, NAMES)]
table = np.array([[1.0 if p in f.train_subjects else 0.35 for p in people] for f in folds])
fig, axes = plt.subplots(1, 2, figsize=(11, 6), dpi=70, sharey=True, width_ratios=(5, 3), layout="constrained")
axes[0].imshow(table, cmap="Blues", vmin=0, vmax=1.2, aspect="auto"); axes[0].set(title="people (dark: trained on)", xlabel="person", ylabel="network")
axes[1].imshow([[1.0 if n in f.train_tasks else 0.35 for n in NAMES] for f in folds], cmap="Oranges", vmin=0, vmax=1.2, aspect="auto")
axes[1].set(title="tasks (dark: trained on)", xticks=range(5), xticklabels=NAMES, yticks=[0, 5, 15, 25], yticklabels=["1/4", "2/3", "3/2", "4/1"])
for ax in axes:
    for y in (4.5, 14.5, 24.5): ax.axhline(y, color="k", lw=0.8)

# %%
for f in folds:
    assert not set(f.train_subjects) & set(f.val_subjects) and set(f.train_subjects) | set(f.val_subjects) == set(people)
    share = len(f.train_subjects)/len(people)
    assert share == {1: 0.8, 2: 0.6, 3: 0.6, 4: 0.8}[len(f.train_tasks)]                    # 4/5 of the people for T=1 and T=4, 3/5 between
first = task_folds(people, 1, NAMES)[0]
test_eq(first.val_subjects, tuple(people[:4]))                     # T=1: the people of the *trained* task validate
test_eq(task_folds(people, 4, NAMES)[0].val_subjects, tuple(people[16:]))                   # T=4: those of the task that is left out
test_eq(task_folds(people, 2, NAMES), task_folds(people[::-1], 2, NAMES))                   # the order in which people are found does not matter
test_eq(one_fold(people, 1, 0, NAMES), first)
test_fail(lambda: one_fold(people, 1, 5, NAMES), contains="0 to 4")
test_fail(lambda: subject_parts(people[:4], 5), contains="at least 5 training subjects")


# %% [markdown]
# A fold's people as records. Nobody may be lost on the way.

# %%
#| export
def fold_records(fold, records):
    "(train, val) of the training pool's `records`, whole subjects. Errors: `DataError` for a subject that the fold does not know."
    strangers = sorted({r.subject for r in records} - {*fold.train_subjects, *fold.val_subjects})
    if strangers: raise DataError("task folds", f"do not know the subject {strangers[0]!r}", "the people that the folds were made of")
    return [r for r in records if r.subject in set(fold.train_subjects)], [r for r in records if r.subject in set(fold.val_subjects)]


# %%
from anomaly_nb.data.brain import brain_records

cohort = brain_records("tiny", "FLAIR", pools=("train", "val", "test"))
fold = task_folds([r.subject for r in cohort["train"]], 1, NAMES)[2]
train, val = fold_records(fold, cohort["train"])
print(f"fold {fold.index} of {fold.split}: learns {'+'.join(fold.train_tasks)} on {len(train)} people, validates {'+'.join(fold.val_tasks)} on {len(val)}")
assert len(train) + len(val) == len(cohort["train"]) and not {r.subject for r in train} & {r.subject for r in val}
test_fail(lambda: fold_records(fold, cohort["test"]), contains="do not know")

# %% [markdown]
# ## What the two tasks of one fold are for
#
# The task that teaches and the tasks that choose the epoch go into one data module: `task` for the training people, `val_task` for the others. Here fold 2 of 1/4, a sink for the pupils, four other tasks
# for the examiners:

# %%
from anomaly_nb.experiment import build_task, make_data
from anomaly_nb.viz import show_image

taught, asked = (build_task("many", f"tasks={'+'.join(names)}") for names in (fold.train_tasks, fold.val_tasks))
data = make_data({"train": train, "val": val}, task=taught, val_task=asked, pools=("train", "val"))
fig, axes = plt.subplots(2, 6, figsize=(12, 4.6), dpi=70, layout="constrained")
for row, pool in zip(axes, ("train", "val")):
    batch = next(iter(data.loader(pool, task=True, shuffle=pool == "train", batch_size=64)))
    visible = np.argsort(-batch["target"].flatten(1).amax(1).numpy(), kind="stable")[:6]
    for ax, n in zip(row, visible):
        show_image(batch["image"][n], ax, f"{pool}: {batch['meta'][n]['task']}", foreground=batch["foreground"][n])
        ax.contour(batch["target"][n, 0], [0.5], colors="tab:red", linewidths=1)
fig.suptitle("Embedded cohort: what the network of this fold learns, and what chooses its epoch (red: label above 1/2)");


# %%
def met(pool): return {m["task"] for b in data.loader(pool, task=True) for m in b["meta"]}
assert met("train") == set(fold.train_tasks) and met("val") == set(fold.val_tasks)
def people_of(pool): return set(data.pools[pool].subjects)
assert people_of("train") <= set(fold.train_subjects) and people_of("val") <= set(fold.val_subjects)

# %% [markdown]
# `experiments/task_folds` trains one such network; `sweeps/task_folds.yaml` all thirty of them for three training seeds; and `experiments/task_table` averages the raw outputs of a split's networks to its **ensemble**.
#
# ## What goes wrong
#
# - **The examiner resembles the teacher.** A sink and a source are both deformations; intra and inter are both Poisson blends. A fold that learns one and is examined on the other is examined a little too kindly.
# - **The split changes two things at once.** From $T=1$ to $T=2$ a network sees more tasks *and* fewer people (4/5, then 3/5). A difference between the rows of the paper's table is not the tasks' alone.
# - **Networks of one split share people and tasks.** The five networks of 4/1 have three of four tasks in common with each other, so their mean wins less than the mean of the five of 1/4, which have none.
# - **The validation pool is not the examiner.** The threshold of a run comes from people of the pool `val`, whom no fold has seen; the examiner's people are training people.
#
# **Questions**
#
# 1. Why does task $k$ belong to part $k$ of the people, and not to all of them? *So that neither the tasks nor the people of the examination were seen in training, at the price of $\binom5T$ networks and not $5\binom5T$.*
# 2. With $T=4$, what examines a network? *One task, on a fifth of the people. The choice of the epoch then hangs on one idea of wrong.*
# 3. Two folders hold the same people in another order. Are the folds the same? *Here yes, people are sorted by name. In the authors' code they are not.*
