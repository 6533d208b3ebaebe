"""The small networks beside the notebooks are what their cells train today: each is trained once more, in a copy of the tree, and its curve compared with the stored one."""
import json
import os
import shutil

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import house
from house import ROOT

STORED = ROOT/"nbs"/"checkpoints"
READERS = house.loading(ROOT)
USERS = house.checkpoint_users(ROOT, READERS)


def curve(file):
    "Training losses in the order of the epochs, from the header of a checkpoint."
    from anomaly_nb.models.model import read_checkpoint
    return np.array([h["train_loss"] for h in json.loads(read_checkpoint(file)[0]["history"]) if h["train_loss"] is not None])


@pytest.mark.parametrize("path", list(READERS), ids=lambda p: p.stem)
def test_a_network_is_what_its_cell_trains(path, tmp_path, monkeypatch):
    names = [n for n, p in USERS.items() if p == path]
    copy = tmp_path/path.relative_to(ROOT)
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT/"settings.ini", tmp_path)
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if c.cell_type == "code" and not c.source.startswith(("#| exercise", "#| slow", "#| gpu", "#| notest"))]
    last = max(i for i, c in enumerate(nb.cells) if "load_or_train(" in c.source)
    nb.cells = nb.cells[:last + 1]                                                    # what comes after needs no training
    for key, value in {"COMPUTE_CHECKPOINTS": "make", "PATHS_COHORTS": ROOT/"data"/"cohorts", "PATHS_CACHE": ROOT/"data"/"cache"}.items(): monkeypatch.setenv(f"ANOMALY_NB_{key}", str(value))
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(copy.parent)}}).execute()
    for name in names:
        made = tmp_path/"nbs"/"checkpoints"/f"{name}.safetensors"
        assert made.is_file(), f"{path.name} does not make {name}"
        ours, stored = curve(made), curve(STORED/made.name)
        assert ours.shape == stored.shape
        np.testing.assert_allclose(ours, stored, rtol=.05, err_msg=f"{name}: another curve than the stored one; was its model changed? make checkpoints")
