"""The paper's metrics against scikit-learn on plain loops; rows, seeds and differences over folds; networks read from run folders; the experiment from end to end."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from anomaly_nb import runner
from anomaly_nb.core import DataError, InputError, ParameterError, write_json
from anomaly_nb.methods.fold_networks import join_predictions, read_members
from anomaly_nb.methods.fold_table import (differences_of, expected_folds, join_seeds, mean_row, measured_row, parts_of, people_weights, random_row, read_table, save_draws,
                                           table_of)
from anomaly_nb.methods.task_table import METRICS, batch_ap, batches_of, condense, cradl_region, draws_of, metrics_of, paper_metrics, pooled
from anomaly_nb.metrics.uncertainty import subject_weights
from anomaly_nb.models.model import save_model
from anomaly_nb.models.segmenter import Segmenter


def volumes(n, shape=(4, 9, 7), seed=0, ties=False, ill=0.5):
    "Masks and maps of n volumes of (for every third: other) size."
    rng, masks, maps = np.random.default_rng(seed), [], []
    for i in range(n):
        size = (shape[0] + i % 3, *shape[1:]) if shape[0] > 1 else shape
        mask = (rng.random(size) < 0.1) & (rng.random() < ill)
        score = rng.normal(0, 1, size) + mask
        masks.append(mask); maps.append((np.round(score) if ties else score).astype(np.float32))
    return masks, maps


def plainly(masks, maps, seed=0):
    "The seven numbers by loops and scikit-learn, as the paper's code has them; batches without lesions left out."
    def both(label, score): return (average_precision_score(label, score), roc_auc_score(label, score)) if 0 < sum(label) < len(label) else (math.nan, math.nan)
    slices = [(float(np.mean(m)) > 5 / 128**2, float(np.mean(s, dtype=np.float64))) for mask, score in zip(masks, maps) for m, s in zip(mask, score)]
    pixels = np.concatenate([m.ravel() for m in masks]), np.concatenate([s.ravel() for s in maps])
    samples = [(bool(m.max()), float(np.mean(s, dtype=np.float64))) for m, s in zip(masks, maps)]
    shuffles = []
    for r in range(10):
        order, found = np.random.default_rng([seed, r]).permutation(len(masks)), []
        for start in range(0, len(order), 20):
            label, score = (np.concatenate([part[i].ravel() for i in order[start:start + 20]]) for part in (masks, maps))
            if label.any(): found.append(average_precision_score(label, score))
        shuffles.append(np.mean(found))
    return dict(zip(METRICS, (*both(*zip(*slices)), both(*pixels)[0], np.mean(shuffles), both(*pixels)[1], *both(*zip(*samples)))))


@pytest.mark.parametrize("n, shape, ties", [(7, (4, 9, 7), False), (20, (4, 9, 7), True), (47, (3, 6, 6), False), (41, (1, 12, 10), True), (63, (1, 5, 5), False)])
def test_the_seven_numbers_are_those_of_scikit_learn(n, shape, ties):
    masks, maps = volumes(n, shape, seed=n, ties=ties)
    found, truth = paper_metrics(masks, maps), plainly(masks, maps)
    assert found == pytest.approx(truth, abs=1e-10)
    assert len({round(v, 6) for v in found.values()}) > 4                        # no number stands in for another


def test_inputs_stay_and_order_does_not_matter_but_for_the_shuffles():
    masks, maps = volumes(30)
    before = [m.copy() for m in masks], [m.copy() for m in maps]
    first, turned = paper_metrics(masks, maps), paper_metrics(masks[::-1], maps[::-1])
    assert all(np.array_equal(a, b) for part, old in zip((masks, maps), before) for a, b in zip(part, old))
    assert first.pop("pixel_ap_batches") == pytest.approx(turned.pop("pixel_ap_batches"), abs=0.02)
    assert first == pytest.approx(turned, abs=1e-12)
    assert paper_metrics(masks, maps, seed=1)["pixel_ap_batches"] != paper_metrics(masks, maps)["pixel_ap_batches"]
    few = [m[:15] for m in (masks, maps)]
    assert paper_metrics(*few)["pixel_ap_batches"] == paper_metrics(*few)["pixel_ap"]      # one batch


def test_shuffles_are_ten_different_permutations_in_batches_of_twenty():
    found = batches_of(47)
    assert len(found) == 10 and [[len(b) for b in row] for row in found] == [[20, 20, 7]] * 10
    assert len({tuple(np.concatenate(row)) for row in found}) == 10 and all(sorted(np.concatenate(row)) == list(range(47)) for row in found)


def test_healthy_only_ill_only_and_nothing():
    masks, maps = volumes(24, ill=0.0)
    assert all(math.isnan(v) for v in paper_metrics(masks, maps).values())
    ill = [np.ones_like(m) for m in masks]
    assert paper_metrics(ill, maps)["sample_ap"] == 1 and math.isnan(paper_metrics(ill, maps)["pixel_auroc"]) and paper_metrics(ill, maps)["pixel_ap"] == 1
    with pytest.raises(DataError, match="0 masks beside 0 maps"): paper_metrics([], [])
    with pytest.raises(DataError, match="2 masks beside 1 maps"): paper_metrics(masks[:2], maps[:1])
    with pytest.raises(DataError, match=r"case 1: has a mask \(4, 9, 7\) and a map"): paper_metrics([masks[0], masks[0]], [maps[0], maps[1]])
    with pytest.raises(DataError, match="case 0: has a map .* NaN or infinity"): paper_metrics(masks[:1], [np.full_like(maps[0], np.inf)])
    with pytest.raises(ParameterError, match="region: there is no 'brain'"): paper_metrics(masks, maps, region="brain")


def test_a_constant_map_is_chance():
    masks, maps = volumes(40)
    found = paper_metrics(masks, [np.zeros_like(m) for m in maps])
    prevalence = sum(m.sum() for m in masks) / sum(m.size for m in masks)
    assert found["pixel_ap"] == pytest.approx(prevalence) and found["pixel_auroc"] == found["sample_auroc"] == found["slice_auroc"] == 0.5
    assert found["sample_ap"] == pytest.approx(np.mean([m.any() for m in masks]))


def test_the_organ_only_counts_the_organ():
    masks, maps = volumes(26, (4, 9, 7))
    organs = [np.zeros_like(m) for m in masks]
    for o in organs: o[1:, 2:7, 1:6] = True
    found = paper_metrics(masks, maps, organs, "foreground")
    label, score = (np.concatenate([part[i][organs[i]] for i in range(26)]) for part in (masks, maps))
    assert (found["pixel_ap"], found["pixel_auroc"]) == pytest.approx((average_precision_score(label, score), roc_auc_score(label, score)))
    sample = [float(s[o].mean(dtype=np.float64)) for s, o in zip(maps, organs)]
    assert found["sample_auroc"] == pytest.approx(roc_auc_score([m.any() for m in masks], sample))
    rows = [((m[d] & o[d]).mean() > 5 / 128**2, s[d][o[d]].mean(dtype=np.float64)) for m, s, o in zip(masks, maps, organs) for d in range(len(m)) if o[d].any()]
    assert found["slice_ap"] == pytest.approx(average_precision_score(*zip(*rows)))


@pytest.mark.long
def test_cradls_region_is_the_centre_at_another_size():
    "Against torch's interpolation of the cropped slices."
    rng = np.random.default_rng(0)
    volume = rng.random((40, 130, 110)).astype(np.float32)
    found = cradl_region(volume, (2, 2, 2))
    crop = volume[5:35, (130 - 95) // 2:(130 - 95) // 2 + 95, (110 - 78) // 2:(110 - 78) // 2 + 78]
    truth = torch.nn.functional.interpolate(torch.as_tensor(crop)[:, None], size=(129, 129), mode="bilinear")[:, 0, :-1, :-1].numpy()
    assert found.shape == (30, 128, 128) and np.abs(found - truth).max() < 1e-5
    mask = volume > 0.7
    assert np.array_equal(cradl_region(mask, (2, 2, 2)), torch.nn.functional.interpolate(torch.as_tensor(mask[5:35, 17:112, 16:94]).float()[:, None], size=(129, 129), mode="bilinear")[:, 0, :-1, :-1].numpy() >= 0.5 - 1e-6)
    small = cradl_region(rng.random((20, 48, 40)).astype(np.float32))                                  # shares of the frame, no spacing
    assert small.shape == (20 - 2 * round(10 * 20 / 155), 128, 128)
    with pytest.raises(DataError, match="leaves no slice"): paper_metrics([np.zeros((1, 64, 64), bool)], [np.zeros((1, 64, 64), np.float32)], region="cradl", spacing=(1, 1, 1))
    masks, maps = volumes(12, (30, 60, 50))
    assert paper_metrics(masks, maps, region="cradl")["pixel_ap"] == pytest.approx(plainly(*([cradl_region(v) for v in part] for part in (masks, maps)))["pixel_ap"])


def test_cases_without_a_known_mask_count_as_samples_only():
    masks, maps = volumes(25)
    label = [m.any() for m in masks]
    label[3] = True
    hidden = [None if i == 3 else m for i, m in enumerate(masks)]
    rest = [i for i in range(25) if i != 3]
    found, truth = paper_metrics(hidden, maps, labels=label), plainly([masks[i] for i in rest], [maps[i] for i in rest])
    for name in ("slice_ap", "slice_auroc", "pixel_ap", "pixel_auroc", "pixel_ap_batches"): assert found[name] == pytest.approx(truth[name])
    assert found["sample_auroc"] == pytest.approx(roc_auc_score(label, [m.mean(dtype=np.float64) for m in maps]))
    assert np.isfinite(draws_of(condense(hidden, maps, labels=label), subject_weights(25, 20, strata=label))["pixel_ap"]).all()


def test_draws_are_the_metrics_of_the_drawn_cases():
    "Each draw by repeating cases and asking scikit-learn; voxels within the coarseness of a thousand levels."
    masks, maps = volumes(36, (2, 9, 9))
    condensed, label = condense(masks, maps), [m.any() for m in masks]
    weights = subject_weights(36, 25, strata=label)
    draws = draws_of(condensed, weights)
    for b, w in enumerate(weights):
        rows = np.repeat(np.arange(36), w)
        truth = plainly([masks[i] for i in rows], [maps[i] for i in rows])
        for name in METRICS:
            if name != "pixel_ap_batches": assert draws[name][b] == pytest.approx(truth[name], abs=0.004 if name.startswith("pixel") else 1e-9), name
    assert draws["pixel_ap_batches"].mean() == pytest.approx(np.mean([plainly([masks[i] for i in r], [maps[i] for i in r])["pixel_ap_batches"] for r in (np.repeat(np.arange(36), w) for w in weights)]), abs=0.01)
    assert np.ptp(draws["pixel_ap_batches"]) > 0.01


def test_parts_are_measured_as_if_alone():
    masks, maps = volumes(45)
    some = list(range(0, 45, 2))
    assert metrics_of(condense(masks, maps), some) == pytest.approx(paper_metrics([masks[i] for i in some], [maps[i] for i in some]), abs=1e-12)
    assert pooled(condense(masks, maps), []) == pytest.approx((math.nan, math.nan), nan_ok=True) and math.isnan(batch_ap(condense(masks, maps), []))


# --- rows ------------------------------------------------------------------------------------------------------------------------------------------------------------------

def study(seed=0, n=40, splits=(("1/2", 3), ("2/1", 3)), boot=60):
    masks, _ = volumes(n, (2, 8, 8), seed=1)
    label, rng, rows = [bool(m.any()) for m in masks], np.random.default_rng(seed), []
    parts, weights = parts_of(label, ["x" if i % 4 else "y" for i in range(n)], ["AB"[i % 2] for i in range(n)]), people_weights(range(n), label, boot)
    for split, folds in splits:
        maps = [[rng.normal(0, 0.6, m.shape) + 0.8 * m for m in masks] for _ in range(folds)]
        single = [measured_row(split, "fold", condense(masks, one), parts, weights, k, "sink") for k, one in enumerate(maps)]
        joint = condense(masks, [np.mean(m, 0) for m in zip(*maps)])
        rows += [*single, mean_row(single), measured_row(split, "ensemble", joint, parts, weights, folds=folds)]
    return [*rows, random_row(joint, parts, weights)], parts, label


def saved(folder, rows, parts, label):
    (folder/"scores").mkdir(parents=True)
    table_of(rows, parts, label).to_csv(folder/"scores"/"paper_table.csv", index=False)
    save_draws(rows, folder/"scores"/"paper_draws.npz")
    return read_table(folder)


def test_a_table_survives_its_file(tmp_path):
    rows, parts, label = study()
    table, draws = saved(tmp_path, rows, parts, label)
    pd.testing.assert_frame_equal(table, table_of(rows, parts, label), check_dtype=False)
    assert len(table) == len(rows) * len(parts) and set(draws) == {(p, r.split, r.what) for r in rows if r.what != "fold" for p in parts}
    assert table["split"].tolist().count("") == len(parts)                       # chance belongs to no split, and is text, not NaN
    for m in METRICS: assert (table[f"{m}_low"] <= table[f"{m}_high"]).all()


def test_random_scores_are_near_the_row_of_chance():
    masks, _ = volumes(60, (2, 10, 10), seed=3)
    label = [bool(m.any()) for m in masks]
    parts, weights = parts_of(label), people_weights(range(60), label, 200)
    rng = np.random.default_rng(0)
    noise = [metrics_of(condense(masks, [rng.random(m.shape) for m in masks])) for _ in range(12)]
    chance = random_row(condense(masks, masks), parts, weights).values["all"]
    for m in METRICS: assert np.mean([v[m] for v in noise]) == pytest.approx(chance[m], abs=0.04), m


def test_differences_are_paired_and_undecided_for_few():
    rows, parts, label = study(n=80)
    table, draws = table_of(rows, parts, label), {(p, r.split, r.what): np.array([r.draws[p][m] for m in METRICS]) for r in rows if r.what != "fold" for p in parts}
    found = differences_of(table, draws)
    assert set((a, b) for a, b, _ in found) == {(("1/2", "ensemble"), ("1/2", "mean")), (("2/1", "ensemble"), ("2/1", "mean")), (("1/2", "ensemble"), ("2/1", "ensemble")), (("1/2", "mean"), ("2/1", "mean"))}
    assert found[("1/2", "ensemble"), ("1/2", "mean"), "pixel_ap"].verdict == "a is higher"
    few, parts, label = study(n=24)
    small = differences_of(table_of(few, parts, label), {(p, r.split, r.what): np.array([r.draws[p][m] for m in METRICS]) for r in few if r.what != "fold" for p in parts})
    assert {d.verdict for d in small.values()} == {"undecided"}


def test_a_seed_that_lacks_a_split_and_people_that_differ(tmp_path):
    whole, other = (saved(tmp_path/str(k), *study(k, splits=splits)) for k, splits in enumerate(((("1/2", 3), ("2/1", 3)), (("1/2", 2),))))
    table, draws = join_seeds([whole, other])
    line = table[(table["part"] == "all") & (table["row"] == "ensemble")].set_index("split")
    assert line.loc["1/2", "folds"] == 2 and line.loc["2/1", "folds"] == 3 and ("all", "2/1", "ensemble") not in draws and math.isnan(line.loc["2/1", "pixel_ap_low"])
    with pytest.raises(DataError, match="other people"): join_seeds([whole, saved(tmp_path/"x", *study(0, n=44))])
    assert expected_folds("2/3") == 10


# --- networks of runs ------------------------------------------------------------------------------------------------------------------------------------------------------

def member(folder, fold=0, split="1/4", seed=0, channels=1, dims=2, **options):
    torch.manual_seed(fold)
    write_json(folder/"metrics.json", {"model": "many", "split": split, "fold": fold, "train_tasks": ["sink"], "seed": seed})
    net = Segmenter(channels, dims, widths=(8, 16), **options)
    save_model(net, folder/"model.safetensors")
    return net.eval()


@pytest.mark.parametrize("broken, said", [
    (lambda f: (f/"metrics.json").unlink(), "is no trained fold"), (lambda f: (f/"metrics.json").write_text("{"), "is no trained fold"),
    (lambda f: write_json(f/"metrics.json", {"kinds": {}}), "is no trained fold"), (lambda f: (f/"model.safetensors").unlink(), "holds no model.safetensors")])
def test_a_folder_that_is_no_member_is_named(tmp_path, broken, said):
    member(tmp_path/"one")
    broken(tmp_path/"one")
    with pytest.raises(InputError, match=said) as caught: read_members("one", tmp_path, 0)
    assert str(tmp_path/"one") in str(caught.value)


def test_joined_predictions_lack_nothing_that_was_asked_for(tmp_path):
    for name in ("one", "two"):
        for part in ("rows", "pieces"): write_json(tmp_path/name/f"{part}.json", [{"id": "p", "kind": k, "map": k and f"maps/p.{k}.npy"} for k in (name, "single")])
    found = join_predictions([tmp_path/"one", tmp_path/"two"], ["one", "two"], tmp_path/"both")
    assert [(r["kind"], r["map"]) for r in found] == [(k, str(tmp_path/k/"maps"/f"p.{k}.npy")) for k in ("one", "two")] and json.loads((tmp_path/"both"/"rows.json").read_text()) == found
    with pytest.raises(InputError, match="hold 'three', which none"): join_predictions([tmp_path/"one", tmp_path/"two"], ["one", "three"], tmp_path/"both")
    (tmp_path/"two"/"rows.json").write_text("[")
    with pytest.raises(InputError, match="lack a readable rows.json"): join_predictions([tmp_path/"one", tmp_path/"two"], ["one"], tmp_path/"both")


# --- the experiment --------------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.long
def test_the_experiment_makes_the_table_of_the_runs_it_is_given(tmp_path):
    "Two folds of five, one of another seed, in two splits, untrained: the table says what it lacks, and its ensemble stands among the kinds."
    for name, fold, split, seed in (("a", 0, "1/4", 0), ("b", 1, "1/4", 0), ("c", 0, "4/1", 0), ("d", 2, "1/4", 7)): member(tmp_path/name, fold, split, seed)
    run = runner.execute(runner.Run("task_table", {"inputs": "a,b,c,d", "n_boot": 50}), tmp_path)
    assert run.status == "done", run.message
    table, draws = read_table(run.folder)
    lines = table[table["part"] == "all"]
    assert list(zip(lines["split"], lines["row"])) == [("1/4", "fold"), ("1/4", "fold"), ("1/4", "mean"), ("1/4", "ensemble"), ("4/1", "fold"), ("4/1", "mean"), ("4/1", "ensemble"), ("", "random")]
    assert lines["folds"].tolist() == [1, 1, 2, 2, 1, 1, 1, 0] and draws["all", "1/4", "ensemble"].shape == (len(METRICS), 50)
    metrics = json.loads((run.folder/"metrics.json").read_text())
    assert {k: m["method"] for k, m in metrics["kinds"].items()} == {"ensemble-1-4": "many 1/4 ensemble of 2 folds", "ensemble-4-1": "many 4/1 ensemble of 1 folds"}
    assert metrics["folds"] == {"1/4": [0, 1], "4/1": [0]}
    alone = lines.set_index(["split", "row"]).loc[("4/1", "fold")], lines.set_index(["split", "row"]).loc[("4/1", "ensemble")]
    assert [alone[0][m] for m in METRICS] == pytest.approx([alone[1][m] for m in METRICS])           # an ensemble of one is that one
    failed = runner.execute(runner.Run("task_table", {"inputs": "a,nobody"}), tmp_path)
    assert failed.status == "failed" and "nobody: is no trained fold" in failed.message
