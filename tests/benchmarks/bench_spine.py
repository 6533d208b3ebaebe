"""What the attribution constraint of a vertebra costs: a training step with each of its three ways against a plain one, middle slices of 88 x 48 voxels, eight people, one thread. The aim is at most 3 times."""
import time

import torch

from anomaly_nb.core import collate, seed_everything
from anomaly_nb.data.spine import spine_records
from anomaly_nb.data.spine_set import SpineSet
from anomaly_nb.methods.spine_multitask import ATTRIBUTIONS, SpineMultitask

torch.set_num_threads(1)
ROUNDS, AIM = 7, 3.0


def main():
    people = SpineSet(spine_records("tiny", pools=("weak",), view="spine")["weak"], (88, 48), (3.0, 3.0))
    batch, ways, times = collate([people[n] for n in range(8)]), {}, {}
    for name, options in {"plain": {}, **{how: {"weight": 0.1, "attribution": how} for how in ATTRIBUTIONS}}.items():
        seed_everything(0)
        model = SpineMultitask(spacing=(3.0, 3.0), tasks="", **options).train()
        ways[name], times[name] = (model, torch.optim.AdamW(model.parameters())), []
    for n in range(ROUNDS + 1):                                          # interleaved; the first round warms up
        for name, (model, optimizer) in ways.items():
            began = time.process_time()
            optimizer.zero_grad(); model.loss(batch)["loss"].backward(); optimizer.step()
            if n: times[name].append(time.process_time() - began)
    middle = {name: sorted(found)[ROUNDS // 2] for name, found in times.items()}
    ratios = {name: middle[name] / middle["plain"] for name in ATTRIBUTIONS}
    good = all(r <= AIM for r in ratios.values())
    print(f"a step of 8 people: {middle['plain']:.3f} s, 300 of them {300 * middle['plain']:.0f} s; with the constraint " + ", ".join(f"{name} {r:.2f}x" for name, r in ratios.items()) + f" (aim at most {AIM:g}): {'ok' if good else 'ABOVE THE AIM'}")
    return 0 if good else 1


if __name__ == "__main__": raise SystemExit(main())
