"""make gpu-check: one-class SVMs of 1.5 million locations, then every model of the catalog, on a CUDA device against the CPU. Exit status 0 passed, 1 failed, 2 NOT RUN (no device).

Needs torch, pytorch-lightning, numpy, scipy, scikit-learn; data are smooth random images made here, so neither nilearn nor nbdev is needed."""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def smooth_batch(n, shape, channels=1):
    "A batch of smooth random images in a disk of foreground, half of them with a bright spot."
    import numpy as np
    from anomaly_nb.core import collate
    from scipy.ndimage import gaussian_filter
    rng, samples = np.random.default_rng(0), []
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, s) for s in shape], indexing="ij"))
    foreground = (grid**2).sum(0)[None] < 0.8
    for i in range(n):
        image = np.stack([gaussian_filter(rng.normal(size=shape), 3) * 10 for _ in range(channels)]).astype(np.float32) * foreground
        meta = {"volume": f"v{i}", "volume_shape": (1, *shape)[-3:], "origin": (0,) * 3, "extent": (1, *shape)[-3:]}
        samples.append(dict(image=image, foreground=foreground, valid=np.ones_like(foreground), mask=np.zeros_like(foreground), mask_known=True, label=0, id=f"s{i}", subject=f"s{i}", meta=meta))
    return collate(samples)


def spoilt(batch):
    "What a synthetic task adds to a batch, made with torch alone: a brighter box in each image, its label, and a pretext class."
    import torch
    box = torch.zeros_like(batch["image"][:, :1])
    for n in range(len(box)): box[n, 0][tuple(slice(s // 4 + n % 4, s // 2 + n % 4) for s in box.shape[2:])] = 1
    return {"clean": batch["image"], "image": batch["image"] + 2 * box, "target": box, "pretext": torch.arange(len(box)) % 3}


def annotated(n, shape):
    "`instances` of n images: three vertebrae, one above the other, the middle one ill."
    import torch
    spacing, regions = (2.0, 2.0) if len(shape) == 2 else (5.0, 2.0, 2.0), torch.zeros(n, 3, *shape, dtype=torch.uint8)
    rows = [int(shape[-2] * share) for share in (0.75, 0.5, 0.25)]
    for k, row in enumerate(rows): regions[:, k][(..., slice(row - 2, row + 3), slice(shape[-1] // 3, 2 * shape[-1] // 3))] = 1
    middle = [*([shape[0] // 2] if len(shape) == 3 else []), 0, shape[-1] // 2]
    centres = torch.tensor([[row if a == len(shape) - 2 else m for a, m in enumerate(middle)] for row in rows]) * torch.tensor(spacing)
    return {"ids": torch.arange(1, 4).repeat(n, 1), "centres": centres.repeat(n, 1, 1), "labels": torch.eye(3)[[0, 2, 1]].repeat(n, 1, 1), "weights": torch.ones(n, 3), "votes": torch.tensor([0, 2, 1])[:, None].repeat(n, 1, 1), "regions": regions,
            "present": torch.ones(n, 3, dtype=torch.bool)}


def check(name, entry, dims, device):
    "Trains every stage of a model a little on the device; compares its scores with the CPU's on the same weights, float32 and bf16. Returns the rows."
    import numpy as np
    import torch
    from anomaly_nb.models.checks import check_loss_falls
    from anomaly_nb.models.model import on_device
    shape = (48, 56) if dims == 2 else (24, 32, 24)
    torch.manual_seed(0)
    batch = smooth_batch(16 if dims == 2 else 4, shape)
    if "weak" in entry.needs: batch["label"] = torch.arange(len(batch["image"])) % 2
    if entry.instances: batch["instances"] = annotated(len(batch["image"]), shape)
    if entry.task == "pairs": batch["positive"] = batch["image"].flip(0)
    elif entry.task: batch |= spoilt(batch)
    model = entry.load()(**({"channels": 1, "spatial_dims": dims, "shape": shape} | entry.defaults))
    started = time.perf_counter()
    losses = check_loss_falls(model, batch, 30, -np.inf, seed=1, accelerator="cpu" if device.type == "cpu" else "gpu")
    seconds, moved = time.perf_counter() - started, on_device(batch, device)
    model.to(device)
    model.eval()
    with torch.no_grad():
        model.fit_statistics([moved])
        return [compared(name, model, kind, dims, batch, moved, losses, seconds, f"bf16:{kind}" in entry.exempt) for kind in model.kinds]


def compared(name, model, kind, dims, batch, on_device, losses, seconds, loose):
    "One row: the scores of one kind on the device against the CPU's; `loose`: the catalog exempts this kind from the comparison in bf16. `losses`: {stage: (first, lowest), or None where it is optimised by hand}."
    import copy
    import torch
    device = on_device["image"].device
    torch.manual_seed(2)
    gpu = model.score(on_device, kind)["anomaly_map"].detach().cpu()
    torch.manual_seed(2)
    cpu = copy.deepcopy(model).cpu().score(batch, kind)["anomaly_map"].detach()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.manual_seed(2)
        half = model.score(on_device, kind)["anomaly_map"].detach().float().cpu()
    inside = batch["foreground"]
    def agreement(a, b):
        "Correlation inside the foreground; of constant maps, whether they are equal."
        a, b = a[inside], b[inside]
        return float(torch.allclose(a, b)) if float(b.std()) == 0 else float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    same, low = agreement(gpu, cpu), agreement(half, cpu)
    known = [pair for pair in losses.values() if pair]
    fell = all(first - lowest >= 0.1 * abs(first) for first, lowest in known)
    said = ", ".join(f"{first:.4g} -> {lowest:.4g}" for first, lowest in known[:2]) or "none"
    return (name, kind, dims, same, low, said, seconds, same > 0.999 and (loose or low > 0.95) and fell and bool(torch.isfinite(gpu).all()))


def check_located(device, L):
    "One-class SVMs of `L` locations on the device: seconds a million, and scores of 40 of them against scikit-learn's. Returns whether they agree."
    import numpy as np
    from sklearn.svm import OneClassSVM
    from anomaly_nb.detectors.smo_batch import score_batch, solve_batch
    rng, n, d, nu = np.random.default_rng(0), 75, 16, 0.03
    X, Z = rng.normal(size=(L, n, d)).astype(np.float32), rng.normal(0, 1.3, (L, 1, d)).astype(np.float32)
    gamma = 1 / (d * X.reshape(L, -1).var(1, dtype=np.float64))
    solve_batch(X[:64], gamma[:64], nu * n, device=device)
    started = time.perf_counter()
    alpha, rho, steps = solve_batch(X, gamma, nu * n, device=device)
    fitted = time.perf_counter()
    kept = alpha > 0
    scores = score_batch(Z, X[kept], alpha[kept], np.concatenate([[0], np.cumsum(kept.sum(1))]), gamma, device=device)
    scored = time.perf_counter()
    peers = [OneClassSVM(nu=nu, gamma=g, tol=1e-8).fit(x.astype(np.float64)) for x, g in zip(X[:40], gamma)]
    off = max(abs(scores[l, 0] - peer.score_samples(Z[l].astype(np.float64))[0]) for l, peer in enumerate(peers))
    print(f"one OC-SVM a location, {L} locations, n={n}, d={d}: fit {fitted - started:.2f} s, score of one subject {scored - fitted:.2f} s, {steps.mean():.0f} steps, scores off by {off:.0e}: {'ok' if off < 1e-3 else 'FAILED'}", flush=True)
    return off < 1e-3


def check_translation(device, dry=False):
    "The paper's translation (4 channels, 256 x 256, level 500, every step a move): a training step of denoiser and classifier, and a full translation in float32 and in bf16, with images per second. Returns whether all is finite."
    import torch
    from anomaly_nb.models.translation import Translation
    shape, count, how = ((32, 32), 2, dict(level=4, moves=4)) if dry else ((256, 256), 8, dict(preset="paper", level=500, moves=500, classifier_widths=(32, 64, 128, 256)))
    torch.manual_seed(0)
    model = Translation(4, 2, shape, scale=100.0, **how).to(device)
    batch = to(smooth_batch(count, shape, 4) | {"label": torch.arange(count) % 2}, device)
    good, said = True, []
    def seconds(work):
        work()                                                                   # warm
        if device.type == "cuda": torch.cuda.synchronize()
        began = time.perf_counter()
        found = work()
        if device.type == "cuda": torch.cuda.synchronize()
        return time.perf_counter() - began, found
    for name, part in (("denoiser", model), ("classifier", model.classifier)):
        optimizer = part.configure_optimizers()
        def step():
            optimizer.zero_grad()
            loss = part.loss(batch)
            (loss["loss"] if isinstance(loss, dict) else loss).backward()
            optimizer.step()
            return loss
        taken, _ = seconds(step)
        said.append(f"step of the {name} {taken:.3f} s")
    model.eval()
    maps, start = {}, model.hparams.moves
    for precision in ("float32", "bfloat16"):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            began = time.perf_counter()
            maps[precision] = model.score(batch)["anomaly_map"]
            if device.type == "cuda": torch.cuda.synchronize()
            said.append(f"{precision} {count / (time.perf_counter() - began):.3f} images/s")
        good &= bool(maps[precision].isfinite().all())
    inside = batch["foreground"]
    same = float(torch.corrcoef(torch.stack([m[inside].float() for m in maps.values()]))[0, 1])
    print(f"translation, {count} images of 4 x {shape[0]} x {shape[1]}, level {start}, {start} moves: {', '.join(said)}, bf16~f32 {same:.4f}: {'ok' if good else 'FAILED'}", flush=True)
    return good


def main():
    import torch
    from anomaly_nb.catalog import MODELS
    dry = sys.argv[1:] == ["--dry-run"]
    if not torch.cuda.is_available() and not dry:
        print("gpu-check: NOT RUN, torch sees no CUDA device")
        return 2
    device = torch.device("cpu" if dry else "cuda")
    print(f"gpu-check on {'the CPU (a dry run of this script: says nothing about a GPU)' if dry else torch.cuda.get_device_name(0)}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    good = check_located(device, 2000 if dry else 1_500_000)
    good &= check_translation(device, dry)
    print(f"{'model':<17}{'score':<17}{'dims':<6}{'gpu~cpu':<10}{'bf16~f32':<10}{'loss of the first stages':<46}{'seconds':<10}")
    for name, entry in MODELS.items():
        for dims in entry.dims:
            for row in check(name, entry, dims, device):
                good &= row[-1]
                print(f"{row[0]:<17}{row[1]:<17}{row[2]:<6}{row[3]:<10.5f}{row[4]:<10.5f}{row[5]:<46}{row[6]:<10.2f}{'ok' if row[-1] else 'FAILED'}", flush=True)
    print("gpu-check: passed" if good else "gpu-check: FAILED")
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main())
