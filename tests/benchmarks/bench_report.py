"""The report of 200 runs (64 methods of three trainings, 8 baselines; 100 healthy and 120 ill people of three families, two sites, 24 stored cases): seconds and size of the page. Aim: under 20 s. `bench_report.py N`: about N runs."""
import os
import sys
import tempfile
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"): os.environ.setdefault(name, "1")

import numpy as np
import pandas as pd

from anomaly_nb.core import write_json
from anomaly_nb.metrics.binned import Binned, bootstrap_binned, save_binned
from anomaly_nb.metrics.detection import auroc
from anomaly_nb.report import write_report

AIM, PEOPLE, ILL, LEVELS, CASES, SIDE, FAMILIES = 20.0, 220, 120, 1000, 24, (56, 48), ("glioma", "ms", "stroke")


def people():
    "Labels, families, sites and lesion sizes: the same for every run."
    rng, label = np.random.default_rng(0), np.r_[np.zeros(PEOPLE - ILL, int), np.ones(ILL, int)]
    return label, [FAMILIES[i % 3] if l else "normal" for i, l in enumerate(label)], ["AB"[i % 2] for i in range(PEOPLE)], np.where(label, rng.lognormal(6, 1, PEOPLE).astype(int) + 1, 0)


def smooth(rng, shape, high):
    "Pictures that are no noise: patches of 4 x 4 pixels."
    return np.kron(rng.integers(0, high, (shape[0], shape[1]//4, shape[2]//4), dtype=np.uint8), np.ones((1, 4, 4), np.uint8))


def write_run(place, model, skill, seed, baseline):
    "A run folder as `evaluate` leaves it, its histograms drawn at once in a thousand levels."
    folder, rng = place/f"evaluate-brain-{model}-{seed}", np.random.default_rng([seed, *map(ord, model)])
    label, family, site, size = people()
    level, names = np.linspace(6, -4, LEVELS), [f"p{i:03d}" for i in range(PEOPLE)]
    density = lambda mean: (p := np.exp(-(level - mean)**2/2))/p.sum()
    own = skill*(1 + .3*rng.normal(size=PEOPLE))
    pos = np.array([rng.multinomial(n, density(m)) for n, m in zip(size, own)])
    binned = Binned(tuple(names), pos, rng.multinomial(40_000, density(0), PEOPLE))
    (folder/"scores").mkdir(parents=True); (folder/"figures").mkdir()
    save_binned(binned, folder/"scores"/"binned-residual.npz")
    ap = lambda keep: float(bootstrap_binned(binned, np.ones((1, len(keep))), keep, ("ap",))["ap"][0])
    score, marked = rng.normal(skill*label), rng.binomial(40_000, .01, PEOPLE)
    pd.DataFrame({"kind": "residual", "id": names, "subject": names, "label": label, "family": family, "site": site, "mask_known": True, "score": score, "voxels": 40_000 + size, "lesion_voxels": size, "marked_voxels": marked,
                  "dice": np.where(label, .3, np.nan), "ap": np.where(label, rng.random(PEOPLE), np.nan)}).to_csv(folder/"scores"/"subjects.csv", index=False)
    shape = (CASES, *SIDE)
    shown = [i for i in range(0, PEOPLE, PEOPLE//CASES)][:CASES]
    counted = np.ones(shape, bool)
    np.savez_compressed(folder/"scores"/"slices.npz", id=[names[i] for i in shown], subject=[names[i] for i in shown], label=label[shown], family=[family[i] for i in shown], site=[site[i] for i in shown], mask_known=[True]*CASES, slice=[10]*CASES,
                        shape=[SIDE]*CASES, image=smooth(np.random.default_rng(1), shape, 255), mask=np.zeros(shape, bool), counted=counted)
    np.savez_compressed(folder/"scores"/"slices-residual.npz", id=[names[i] for i in shown], code=smooth(rng, shape, 160), rarest=4.0, healthy_voxels=10_000)
    if not baseline: pd.DataFrame({"stage": "train", "epoch": range(20), "train_loss": np.geomspace(1, .1, 20), "val_loss": np.geomspace(1, .2, 20)}).to_csv(folder/"scores"/"history.csv", index=False)
    prevalence = size.sum()/(40_000*PEOPLE)
    numbers = {"method": model, "baseline": baseline, "image": {"auroc": .6}, "counts": {"subjects": PEOPLE, "anomalous": ILL, "mask_unknown": 0}, "protocol": {"text": "pixels: the foreground", "image_score_from": "fixed", "fpr": 0.01}, "threshold": 2.0,
               "subject": {"auroc": auroc(label, score)}, "pixel": {"ap": ap(names), "prevalence": prevalence, "dice": .2, "aupro": .5, "auroc": .8, "best_dice_oracle": .25},
               "families": {f: {"subjects": ILL//3, "pixel_ap": ap([n for n, g in zip(names, family) if g in ("normal", f)]), "prevalence": prevalence} for f in FAMILIES}}
    write_json(folder/"metrics.json", {"dataset": "brain", "size": "claims", "contrast": "FLAIR", "dims": 2, "model": model, "seed": seed, "baseline": baseline, "parameters": 100_000, "kinds": {"residual": numbers}})
    write_json(folder/"params.json", {"experiment": "evaluate", "parameters": {"model": model, "seed": seed, "epochs": 20}})
    write_json(folder/"provenance.json", {"commit": "c0ffee", "wall_seconds": 60.0, "peak_memory_mib": 900, "device": "cpu", "versions": {"torch": "2"}, "data_manifest": {"train": "feed", "test": "cafe"}, "samples": {"train": 80}})
    return folder


def main(wanted=200):
    with tempfile.TemporaryDirectory() as place:
        place, trained = Path(place), max(1, (wanted - 8)//3)
        folders = [write_run(place, f"net{i:02d}", .4 + 2*i/trained, seed, False) for i in range(trained) for seed in range(3)] + [write_run(place, f"base{i}", .1*i, 0, True) for i in range(8)]
        began, worked = time.perf_counter(), time.process_time()
        write_report(folders, place/"report.html", failed=[("evaluate-brain-lost", "cell 7\nMemoryError")])
        seconds, work, size = time.perf_counter() - began, time.process_time() - worked, (place/"report.html").stat().st_size/2**20
    print(f"report of {len(folders)} runs: {seconds:.1f} s, {work:.1f} s of them on the processor (one thread), page of {size:.1f} MiB (aim: under {AIM:.0f} s)")
    return int(work >= AIM and wanted <= 200)                        # the processor's: neighbours on the machine do not count


if __name__ == "__main__": sys.exit(main(*map(int, sys.argv[1:])))
