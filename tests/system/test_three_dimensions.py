"""The memory of one training step in three dimensions at the paper's size. Too long for every test run."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ONE_STEP = """
import json, resource, sys, time, torch
from anomaly_nb.models.segmenter import Segmenter
torch.set_num_threads(2)
model = Segmenter(1, 3, (80, 112, 80), size="mri", flip=0.0)
optimizer = model.configure_optimizers()["optimizer"]
rng = torch.Generator().manual_seed(0)
batch = dict(image=torch.randn(1, 1, 80, 112, 80, generator=rng), target=torch.rand(1, 1, 80, 112, 80, generator=rng), foreground=torch.ones(1, 1, 80, 112, 80, dtype=torch.bool))
began = time.perf_counter()
loss = model.loss(batch)
loss.backward()
optimizer.step()
print(json.dumps(dict(loss=float(loss.detach()), seconds=time.perf_counter() - began, gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, weights=sum(p.numel() for p in model.parameters()))))
"""


def test_one_step_of_the_papers_size_needs_less_than_6_gib():
    "80 x 112 x 80, batch 1, the paper's network: forward, backward and AdamW, in a process of its own."
    done = subprocess.run([sys.executable, "-c", ONE_STEP], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert np.isfinite(found["loss"]) and found["gib"] < 6
