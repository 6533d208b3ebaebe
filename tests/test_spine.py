"""The spine: cohort on disk, samples, network, constraint, table; what would break if someone got it subtly wrong."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anomaly_nb.core import DataError, ParameterError, collate, rng_of, seed_everything
from anomaly_nb.data.module import AnomalyDataModule, hide
from anomaly_nb.data.spine import POOLS, Job, draw_image, draw_patient, make_patient, plan, spine_records
from anomaly_nb.data.spine_set import SpineSet, make_spine_set, on_grid, outlined
from anomaly_nb.data.spider import read_labels, spider_records
from anomaly_nb.data.spondylitis import RATERS, draw_spots, votes_of
from anomaly_nb.methods.spine_multitask import SpineMultitask, ill_logit
from anomaly_nb.methods.spine_targets import boxes_of, grown, jitter, structure_targets
from anomaly_nb.methods.spine_network import WINDOW, windows
from anomaly_nb.methods.spine_table import ablation_differences, annotate, draw_runs, first_subjects, invented_runs, measure_vertebrae, people_of, read_measured, read_vertebrae, save_measured
from anomaly_nb.metrics.uncertainty import subject_weights

torch.set_num_threads(1)
GRID = {"shape": (88, 48), "spacing": (3.0, 3.0)}


@pytest.fixture(scope="module")
def records(): return spine_records("tiny", pools=POOLS, view="spine")


@pytest.fixture(scope="module")
def weak(records): return SpineSet(records["weak"], **GRID)


@pytest.fixture(scope="module")
def batch(weak): return collate([weak[n] for n in range(4)])


def small(**options): return SpineMultitask(**({"spacing": (3.0, 3.0), "raters": 5, "widths": (4, 8, 8)} | options))


# ---- the cohort

def test_files_are_the_same_bytes_twice_and_a_killed_build_goes_on(tmp_path):
    job = [Job(str(tmp_path/name), plan("tiny", "weak")[1], 3.0, 6.0, 5) for name in "ab"]
    for j in job: make_patient(j)
    for x, y in zip(job[0].files(), job[1].files()): assert x.read_bytes() == y.read_bytes()


def test_the_embedded_cohort_is_read_by_the_reader_of_spider(records):
    folder = Path(records["weak"][0].images[0]).parents[1]
    found = spider_records(folder, "T2", "endplate")
    numbers = {r.subject for rs in found.values() for r in rs}
    assert {r.subject for r in records["test"]} >= {r.subject for r in found["test"]} and numbers <= {r.subject for rs in records.values() for r in rs}
    assert len(numbers) == sum(len(rs) for rs in found.values()) and all(len(v["label"]) == 2 for r in found["weak"] for v in r.meta["vertebrae"])


def test_a_field_of_view_holds_a_lumbar_spine(records):
    seen = [len(r.meta["grades"]) for rs in records.values() for r in rs]
    assert min(seen) >= 4 and np.mean(seen) > 5.5                                             # whole vertebrae


def test_label_maps_lie_where_the_images_do_whatever_the_axis_order(records):
    for r in records["weak"][:4]:
        grades = r.meta["grades"]
        labels, _ = read_labels(r.meta["regions"])
        assert {int(k) for k in grades} == {int(c) for c in np.unique(labels) if 0 < c < 26}
        z = [np.nonzero(labels == int(k))[0].mean() for k in sorted(grades, key=int)]
        assert (np.diff(z) > 0).all()                                                         # up the spine, up the array


def test_a_dial_of_zero_is_the_healthy_image_and_votes_have_their_bias():
    job = Job("", plan("tiny", "val_anomalous")[0], 3.0, 6.0, 5, lesion_contrast=0.0)
    patient = draw_patient(job)
    healthy = patient | {"disease": {k: {"grade": 0, "corners": [], "endplate": 0} for k in patient["disease"]}}
    assert (draw_image(job, patient)[0] == draw_image(job, healthy)[0]).all() and not draw_image(job, healthy)[2].any()
    assert (draw_image(replace(job, lesion_contrast=1.0), patient)[0] != draw_image(job, patient)[0]).any()
    votes = votes_of(np.zeros(4000, int), rng_of("test votes"))
    over = [(v[v >= 0] > 0).mean() for v in votes.T]
    assert over[list(RATERS).index("eager")] > .3 > over[list(RATERS).index("shy")]


def test_the_shortcut_is_in_what_is_learned_from_and_not_in_the_test():
    disease = {k: {"grade": k % 2} for k in range(1, 5)}
    for kappa in (0.0, .9):
        found = np.array([[draw_spots(rng_of("s", i), disease, kappa)[k] for k in disease] for i in range(600)])
        assert abs(found[:, [0, 2]].mean() - (.5 + kappa/2)) < .06 and abs(found[:, [1, 3]].mean() - (.5 - kappa/2)) < .06
    job = Job("", plan("tiny", "test")[-1], 3.0, 6.0, 5)
    assert draw_patient(job)["spots"] == draw_patient(replace(job, shortcut=.9))["spots"]
    weak = Job("", plan("tiny", "weak")[1], 3.0, 6.0, 5)
    assert any(draw_patient(Job("", p, 3.0, 6.0, 5))["spots"] != draw_patient(Job("", p, 3.0, 6.0, 5, shortcut=.9))["spots"] for p in plan("tiny", "weak")) and draw_patient(weak)["disease"] == draw_patient(replace(weak, shortcut=.9))["disease"]


# ---- samples

def test_nothing_of_an_annotation_reaches_a_model_through_the_unlabelled(weak):
    seen = hide(weak[1], "unlabelled")
    assert not any(len(v) for v in seen["instances"].values()) and not {"grades", "spots", "vertebrae"} & set(seen["meta"])
    assert {"grades", "spots"} & set(weak[1]["meta"]) and not {"grades", "spots"} & set(hide(weak[1], "weak")["meta"])     # the truth is in the file, not in what learns


def test_a_balanced_union_shows_each_pool_equally(records, weak):
    data = AnomalyDataModule(train=SpineSet(records["train"], **GRID), val=SpineSet(records["val"], **GRID), weak=SpineSet(records["weak"][:2], **GRID), unlabelled=SpineSet(records["unlabelled"], like=weak, **GRID), batch_size=4)
    ids = [i for b in data.loader("weak+unlabelled", balanced=True) for i in b["id"]]
    mine = {r.id for r in records["weak"][:2]}
    assert sum(i.rpartition("_")[0] in mine for i in ids) == len(ids)/2 == len(records["unlabelled"])
    assert len([i for b in data.loader("weak+unlabelled") for i in b["id"]]) == 2 + len(records["unlabelled"])


def test_one_vertebra_and_none_are_samples_too():
    labels = np.zeros((1, 24, 16), np.int16)
    assert outlined(labels, "trimap", (5.0, 2.0, 2.0)) == {}
    labels[0, 4:12, 4:12] = 3
    for outline in ("trimap", "box", "point"):
        (code, (box, region)), = outlined(labels, outline, (5.0, 2.0, 2.0)).items()
        assert code == 3 and set(np.unique(region)) <= {0, 1, 2, 3} and region[labels[box] == 3].all()


@pytest.mark.parametrize("outline", ["trimap", "box", "point"])
def test_a_weak_outline_does_not_call_bone_background(records, outline):
    exact, weak = (collate([SpineSet(records["weak"], **GRID, outline=o)[n] for n in range(4)])["instances"] for o in ("exact", outline))
    truth = structure_targets(*(exact[k] for k in ("ids", "present", "regions")))[0]
    target, known = structure_targets(*(weak[k] for k in ("ids", "present", "regions")))
    wrong = [float((truth & known & ~target)[:, n].sum()/truth[:, n].sum()) for n in range(2)]
    assert wrong[0] < .12 and wrong[1] < .25, wrong                                           # loose outlines are off by a voxel here and there
    assert bool(boxes_of(weak["present"], weak["regions"])[1].any()) == (outline == "box")


def test_resampling_keeps_distances():
    stack = np.zeros((1, 60, 40), np.float32)
    stack[0, 20:40, 10:30] = 1
    for step in (1.0, 2.0, .5):
        new = on_grid(stack, (4, 1, 1), (4, step, step), (1, round(60/step), round(40/step)))
        assert abs(new.sum()*step**2 - 400) < 25


# ---- the model

def test_a_shift_moves_everything_together(batch):
    seed_everything(3)
    image, moved = jitter(batch["image"], batch["instances"], (3.0, 3.0), gain=0.0, noise=0.0)
    shift = ((moved["centres"] - batch["instances"]["centres"])[0, 0]/3).round().int().tolist()
    assert any(shift)
    y, x = shift
    inner = (slice(None), slice(None), slice(12, -12), slice(12, -12))
    assert torch.equal(image.roll((-y, -x), (2, 3))[inner], batch["image"][inner])
    assert torch.equal(moved["regions"].roll((-y, -x), (2, 3))[inner], batch["instances"]["regions"][inner])


def test_what_nobody_outlined_is_not_background():
    ids, present = torch.tensor([[1, 201]]), torch.ones(1, 2, dtype=torch.bool)
    regions = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    regions[0, 0, 2:4, 2:4], regions[0, 1, 5:7, 5:7] = 1, 3
    target, known = structure_targets(ids, present, regions)
    assert known[0, 0].all() and target[0, 0].sum() == 4                                      # a vertebra, known everywhere
    assert not target[0, 1].any() and (~known[0, 1]).sum() == 4                               # a disc, not known in its box
    assert not known[0, 2].any() and not known[0, 3].any()                                    # no canal, no lesions were outlined
    boxes, is_box = boxes_of(present, regions)
    assert is_box.tolist() == [[False, True]] and boxes[0, 1].tolist() == [[5, 7], [5, 7]]


def test_each_task_and_label_model_learns_and_missing_labels_cost_nothing(batch):
    for options in ({"tasks": ""}, {"tasks": "localisation+segmentation+denoising", "weighting": "learned"}, {"tasks": "", "label_model": "confusion"}, {"tasks": "", "label_model": "heteroscedastic"}):
        seed_everything(0)
        model = small(**options).train()
        total = model.loss(batch)["loss"]
        total.backward()
        assert total.isfinite() and any(p.grad is not None and p.grad.any() for p in model.net.head.parameters()), options
    silent = batch | {"instances": batch["instances"] | {"weights": batch["instances"]["weights"]*0}}
    model = small(tasks="").train()
    model.loss(silent)["loss"].backward()
    assert all(not p.grad.any() for p in model.net.parameters() if p.grad is not None)
    with pytest.raises(DataError, match="without instances"): model.loss({k: v for k, v in batch.items() if k != "instances"})
    with pytest.raises(ParameterError, match="no votes"): small(raters=0, label_model="confusion")
    with pytest.raises(ParameterError, match="does not segment"): small(tasks="localisation", pooling="mask")


@pytest.mark.parametrize("attribution", ["gradient", "expected", "swap"])
def test_the_constraint_asks_for_nothing_inside_and_falls_when_descended(batch, attribution):
    seed_everything(0)
    model = small(tasks="", weight=1.0, attribution=attribution, jitter=False)
    optimizer, prices = torch.optim.Adam(model.net.parameters(), 1e-3), []
    for _ in range(12):
        seed_everything(1)
        model.train()
        price = model.losses(batch["image"], batch["instances"])[1]
        optimizer.zero_grad(); price.backward(); optimizer.step()
        prices.append(float(price))
    assert prices[0] > 0 and prices[-1] < .7*prices[0]
    everything = batch["instances"] | {"regions": torch.ones_like(batch["instances"]["regions"])}           # the vertebra is all there is: nothing lies outside
    assert float(model.losses(batch["image"], everything)[1]) < 1e-9


def test_energy_inside_is_what_a_slow_sum_says(batch):
    seed_everything(0)
    model, i = small(tasks="").eval(), batch["instances"]
    A = model.attributions(batch["image"], i["centres"][:, :2])
    x = batch["image"].clone().requires_grad_()
    y = ill_logit(model.net.grade(model.net(x)["features"], i["centres"][:, :2], (3.0, 3.0)), 3)
    torch.testing.assert_close(A[2, 1], torch.autograd.grad(y[2, 1], x)[0][2], rtol=1e-3, atol=1e-7)         # each vertebra of each image by itself


def test_a_window_is_as_large_as_it_says():
    m = windows(torch.tensor([[[135.0, 72.0]]]), (90, 48), (3.0, 3.0))[0, 0] > .5
    rows, columns = m.any(1).nonzero()[:, 0], m.any(0).nonzero()[:, 0]
    assert abs(len(rows)*3 - 2*WINDOW[2][0]) <= 6 and abs(len(columns)*3 - 2*WINDOW[2][1]) <= 6
    region = torch.zeros(1, 20, 20, dtype=torch.bool); region[0, 10, 10] = True
    assert grown(region, (3.0, 3.0), 6.0).sum() == 25


def test_levels_are_named_from_heatmaps_and_a_chain_needs_no_sacrum():
    model = small()
    heat = torch.full((12, 88, 48), -9.0)
    for level, row in ((3, 70), (4, 57), (5, 44), (6, 31)): heat[level, row, 20] = 4.0                       # numbers 4 to 7, from below
    found = model.named(heat)
    assert sorted(found) == [4, 5, 6, 7] and abs(found[4][0] - 210) < 3 and found[7][0] < found[4][0]
    heat[3, 70, 20], heat[8, 70, 20] = 0.0, 1.0                                                              # the lowest looks most like number 9
    assert sorted(model.named(heat)) != [5, 6, 7, 9]


def test_a_stack_in_3d_and_no_localisation(records):
    volumes = make_spine_set(records["weak"][:2], 3, 4.0, 3)
    b = collate([volumes[0], volumes[1]])
    seed_everything(0)
    model = SpineMultitask(spatial_dims=3, spacing=volumes.spacing, raters=5, widths=(4, 8), tasks="segmentation+denoising", weight=.1).train()
    model.loss(b)["loss"].backward()
    answer = model.eval().scores(b)
    assert answer["grade"]["anomaly_map"].shape == b["image"].shape and answer["grade"]["anomaly_map"].any()
    with pytest.raises(ParameterError, match="not taught to localise"): model.centres(b)


# ---- labels and table

def test_annotations_change_labels_and_nothing_else(records):
    for how in ("majority", "soft", "weighted", "confident", "dawid-skene"):
        made = annotate(records["weak"], how)
        for a, b in zip(records["weak"], made):
            assert a.id == b.id and [v["id"] for v in a.meta["vertebrae"]] == [v["id"] for v in b.meta["vertebrae"]] and [v["votes"] for v in a.meta["vertebrae"]] == [v["votes"] for v in b.meta["vertebrae"]]
            assert all(abs(sum(v["label"]) - 1) < 1e-6 and v["weight"] >= 0 for v in b.meta["vertebrae"])
    assert {max(v["label"]) for r in annotate(records["weak"], "majority") for v in r.meta["vertebrae"]} == {1.0}
    broken = [replace(r, meta=r.meta | {"vertebrae": [v | {"votes": v["votes"][:n + 3]} for n, v in enumerate(r.meta["vertebrae"])]}) for r in records["weak"]]
    with pytest.raises(ParameterError, match="raters"): annotate(broken, "soft")
    kept, rest = first_subjects(records["weak"], 5)
    assert len({r.subject for r in kept}) == 5 and not {r.subject for r in kept} & {r.subject for r in rest}
    with pytest.raises(ParameterError, match="subjects: is 99"): first_subjects(records["weak"], 99)


def test_rows_are_measured_as_a_repetition_of_people_would(records, weak, tmp_path):
    test = SpineSet(records["test"], like=weak, **GRID)
    data = AnomalyDataModule(train=SpineSet(records["train"], **GRID), val=SpineSet(records["val"], **GRID), test=test, batch_size=4)
    seed_everything(0)
    rows, images = read_vertebrae(small(), data.loader("test"), 3, (3.0, 3.0), {r.subject: r.meta["spots"] for r in records["test"]})
    assert len(rows) == sum(len(r.meta["grades"]) for r in records["test"]) and set(rows["grade"]) <= {0, 1, 2}
    assert all(rows[(rows["subject"] == r.subject) & (rows["id"] == int(k))]["grade"].item() == g for r in records["test"] for k, g in r.meta["grades"].items())
    names = people_of(rows)
    w = subject_weights(len(names), 3, 5)
    found = measure_vertebrae(rows, images, w)
    for b in range(3):                                                                         # drawn: people repeated as often as they were drawn
        again = rows.iloc[np.concatenate([np.flatnonzero(rows["subject"] == s) for s, n in zip(names, w[b]) for _ in range(n)])]
        one = measure_vertebrae(again.assign(subject=[f"{i:05d}" for i in range(len(again))]), images.assign(subject="none"), np.ones((1, len(again)), int))
        for m in ("auroc", "ap", "kappa", "brier", "ece", "energy", "identified"):
            assert np.isclose(found[m][1][b], one[m][0], equal_nan=True), m
    drawn = draw_runs([(rows, images), (rows, images)], 10)
    save_measured(tmp_path/"m.npz", {"test": drawn}, {"test": 10})
    parts, people = read_measured(tmp_path/"m.npz")
    assert people == {"test": 10} and np.allclose(parts["test"]["auroc"][1], drawn["auroc"][1], atol=1e-6)


def test_differences_say_which_way_is_better():
    runs = invented_runs(200)
    for n, (recipe, parts, people) in enumerate(runs):
        shift = .5 if recipe["tasks"] else 0.0
        for m in parts["test"]: parts["test"][m] = tuple(v + shift for v in parts["test"][m])
    found = ablation_differences(runs, ("auroc", "brier"))
    assert set(found["ingredient"]) == {"tasks"} and (found["difference"] > .3).all()
    assert set(found[found["metric"] == "auroc"]["verdict"]) == {"better"} and set(found[found["metric"] == "brier"]["verdict"]) == {"worse"}
    assert set(found["a"]) == {"segmentation"} and len(found) == 4
