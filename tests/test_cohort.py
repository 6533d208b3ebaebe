"""The embedded brain cohort as files: the same bytes everywhere, whole after a kill, refused where it cannot be written."""
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from filelock import FileLock

from anomaly_nb.core import InputError
from anomaly_nb.data.brain import POOLS, Job, Subject, Variant, brain_records, build, misregistration_field, template_locations
from anomaly_nb.data.records import load_record

MAKE = "import sys; from anomaly_nb.data.brain import brain_records; brain_records('tiny', 'FLAIR', pools=('val',), root=sys.argv[1], processes=int(sys.argv[2]))"


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.nii.gz"))}


def make(folder, processes):
    return subprocess.Popen([sys.executable, "-c", MAKE, str(folder), str(processes)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    assert make(folder, 1).wait(120) == 0
    return folder


def test_the_same_bytes_from_two_processes(made, tmp_path):
    assert make(tmp_path, 2).wait(120) == 0
    assert digests(tmp_path) == digests(made) and len(digests(made)) == 12


def test_a_killed_build_goes_on(made, tmp_path):
    child = make(tmp_path, 1)
    def whole(): return [p for p in tmp_path.rglob("*.nii.gz") if not p.name.startswith(".part-")]
    while len(whole()) < 2 and child.poll() is None: time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert 2 <= len(whole()) < 12, "killed too late to say anything"
    assert make(tmp_path, 1).wait(120) == 0
    assert digests(tmp_path) == digests(made) and not list(tmp_path.rglob(".part-*"))


def test_lists_wait_for_a_build_beside_them(tmp_path):
    "A build sweeps away what a killed one left half-written, so nobody else may be writing meanwhile."
    def records(): return brain_records("tiny", "FLAIR", pools=("val",), root=tmp_path)
    folder = Path(records()["val"][0].images[0]).parents[1]
    lists = list((folder/"manifests").glob("*.csv"))
    assert len(lists) == 1
    lists[0].unlink()
    with FileLock(folder/".lock"):
        beside = Thread(target=records)
        beside.start()
        time.sleep(0.5)
        assert beside.is_alive() and not list((folder/"manifests").iterdir())
    beside.join(30)
    assert lists[0].is_file()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(InputError, match="file.*cannot be written"): brain_records("tiny", "FLAIR", pools=("val",), root=tmp_path/"file")


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    from anomaly_nb.data import brain
    def full(path, *rest, **more): raise OSError(28, "No space left on device")
    monkeypatch.setattr(brain, "write_volume", full)
    with pytest.raises(InputError, match="No space left"): brain_records("tiny", "FLAIR", pools=("val",), root=tmp_path, processes=1)
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_a_damaged_anatomy_is_named(made, tmp_path):
    job = Job(str(tmp_path), Subject("someone", "val", "A"), ("T1",), Variant(), 4.0)
    build([job])
    stored = next(tmp_path.rglob("*.npy.gz"))
    stored.write_bytes(stored.read_bytes()[:100])
    job.file("T1").unlink()
    with pytest.raises(InputError, match="damaged"): build([job])


def test_a_further_contrast_keeps_the_anatomy(tmp_path):
    subject = Subject("someone", "val", "A")
    build([Job(str(tmp_path), subject, ("T1",), Variant(), 4.0)])
    anatomy = next(tmp_path.rglob("*.npy.gz"))
    before = anatomy.stat().st_mtime_ns
    both = Job(str(tmp_path), subject, ("T1", "CT"), Variant(), 4.0)
    build([both])
    assert anatomy.stat().st_mtime_ns == before and both.file("CT").is_file()


def test_no_subject_in_two_pools_and_every_size_plans_the_same_people():
    from anomaly_nb.data.brain import plan, visible_families
    families = visible_families(("FLAIR",))
    for size in ("tiny", "demo", "claims"):
        names = [s.name for pool in POOLS for s in plan(size, pool, families)]
        assert len(names) == len(set(names))
    claims = plan("claims", "test", families)
    assert sum(s.family == "healthy" for s in claims) >= 100
    assert all(sum(s.family == f for s in claims) >= 40 for f in families)
    assert len(plan("claims", "train", families)) >= 60 and len(plan("claims", "val", families)) >= 100


@pytest.mark.parametrize("rms", [0.5, 1.5, 3.0])
def test_misregistration_is_as_dialled(rms):
    field = misregistration_field("someone", rms)
    assert np.sqrt((field**2).sum(0)[template_locations(4.0)].mean()) == pytest.approx(rms, rel=1e-3)


def test_template_space_brings_ventricles_together():
    "Registered subjects agree on where the brain is; native ones do not. A wrong inverse would fail here."
    def agreement(space):
        found = np.stack([load_record(r)["image"][0] for r in brain_records("tiny", "FLAIR", pools=("val",), space=space, misregistration=0.0)["val"]])
        dark = np.stack([(x < 0.45 * np.median(x[x > 0])) & (x > 0) for x in found])[:, 14:24, 16:34, 12:28]
        return np.mean([(a & b).sum() / max(1, (a | b).sum()) for i, a in enumerate(dark) for b in dark[:i]])
    assert agreement("template") > 1.3 * agreement("native")


def test_files_are_ordinary_nifti():
    import nibabel
    record = brain_records("tiny", "FLAIR", pools=("val",))["val"][0]
    image = nibabel.load(record.images[0])
    assert image.header.get_zooms()[:3] == (4.0, 4.0, 4.0) and nibabel.aff2axcodes(image.affine)
    assert Path(record.foreground).is_file()
