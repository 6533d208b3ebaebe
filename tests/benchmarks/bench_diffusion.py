"""Sampling with `precision = bf16-mixed` and channels last, as `predict` does it, against MONAI's network as it comes in float32: to level 200 and back in eight moves, 64 x 64, one thread. The aim is 1.8 times, and maps that rank voxels alike."""
import time

import torch
from scipy.stats import spearmanr

from anomaly_nb.models.denoiser import Diffusion

torch.set_num_threads(1)
ROUNDS, AIM, ALIKE = 5, 1.8, 0.99


def batch_of(count=16, side=64):
    "Smooth images [count,1,side,side] in a full foreground."
    image = torch.nn.functional.avg_pool2d(torch.randn(count, 1, side + 8, side + 8, generator=torch.Generator().manual_seed(0)), 9, 1) * 9
    return {"image": image, "foreground": torch.ones(count, 1, side, side, dtype=torch.bool)}


def main():
    torch.manual_seed(0)
    model, batch = Diffusion(1, 2, (64, 64), preset="tutorial", level=200, moves=8).eval(), batch_of()
    optimizer = model.configure_optimizers()
    for _ in range(20):                                                  # so that eps is no longer 0: MONAI begins with an empty last layer
        optimizer.zero_grad(); model.loss(batch).backward(); optimizer.step(); model.on_train_batch_end(None, batch, 0)
    peer = Diffusion(1, 2, (64, 64), preset="tutorial", level=200, moves=8).eval()
    peer.load_state_dict(model.state_dict())
    peer.to(memory_format=torch.contiguous_format)
    ways, times, maps = {"float32": (peer, False), "bf16": (model, True)}, {"float32": [], "bf16": []}, {}
    for n in range(ROUNDS + 1):                                          # interleaved; the first round warms up
        for name, (net, half) in ways.items():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                began = time.process_time()
                maps[name] = net.score(batch)["anomaly_map"]
                if n: times[name].append(time.process_time() - began)
    slow, fast = (sorted(times[name])[ROUNDS // 2] for name in ways)
    rank = float(spearmanr(*(m.flatten().numpy() for m in maps.values())).statistic)
    good = slow / fast >= AIM and rank >= ALIKE
    print(f"16 images of 64 x 64, 8 passes: float32 {slow:.2f} s, bf16 + channels last {fast:.2f} s: {slow / fast:.2f}x (aim {AIM}), Spearman of the maps {rank:.4f} (aim {ALIKE}): {'ok' if good else 'BELOW THE AIM'}")
    return 0 if good else 1


if __name__ == "__main__": raise SystemExit(main())
