"""Volumes as large as those of BraTS (240 x 240 x 155, four contrasts, compressed): preparing them in two processes (time and memory), and an epoch of shuffled slices from the cache against the same from the NIfTI files. Aims: under 3 GiB, at least 20 times."""
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from anomaly_nb.data.brats import brats_records
from anomaly_nb.data.prepare import prepare_records
from anomaly_nb.data.records import load_record, plain_affine, write_volume
from anomaly_nb.data.sets import SliceSet, VolumeSet
from anomaly_nb.data.transforms import ZScore

SCANS, STEPS, SHAPE, DRAWN, GIB, FASTER, WHOLE = 6, "bias=4 resample=2", (155, 240, 240), 12, 3.0, 20.0, 170


def write(root):
    "Round heads of noise with a bright ball, 1 mm, background 0, in the layout of 2021."
    z, y, x = np.ogrid[tuple(slice(-1, 1, n*1j) for n in SHAPE)]
    head, ball = z*z + y*y/.6 + x*x/.5 < .8, (z - .1)**2 + (y - .2)**2 + (x - .2)**2 < .02
    for n in range(SCANS):
        rng, name = np.random.default_rng(n), f"BraTS2021_{n:05d}"
        noise = ndimage.gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), 1)
        for c, end in enumerate(("flair", "t1", "t1ce", "t2")): write_volume(root/name/f"{name}_{end}.nii.gz", ((300 + 50*c + 200*noise + 200*ball)*head).astype(np.int16), plain_affine())
        write_volume(root/name/f"{name}_seg.nii.gz", ball.astype(np.uint8), plain_affine())


def below(parent):
    "GiB of resident memory of `parent` and of all processes below it, now."
    tree, total = {}, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try: tree[int(folder.name)] = int((folder/"stat").read_text().rpartition(")")[2].split()[1]), int((folder/"statm").read_text().split()[1])
        except (OSError, IndexError): pass
    for pid, (_, pages) in tree.items():
        at = pid
        while at in tree and at != parent: at = tree[at][0]
        total += pages*(at == parent)
    return total*os.sysconf("SC_PAGE_SIZE")/2**30


class Watch(threading.Thread):
    "The peak of `below` while it runs."
    def __init__(self): super().__init__(daemon=True); self.peak, self.done = 0.0, threading.Event()
    def run(self):
        while not self.done.wait(.1): self.peak = max(self.peak, below(os.getpid()))


def main():
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write(place/"raw")
        records = brats_records(place/"raw", "FLAIR+T1+T1CE+T2", cache=place/"cache")
        watch, began = Watch(), time.perf_counter()
        watch.start()
        prepare_records(records, STEPS, place/"copy", processes=2, cache=place/"cache")
        seconds = (time.perf_counter() - began)/SCANS
        watch.done.set()
        flat = [r for items in records.values() for r in items]
        slices = SliceSet(VolumeSet(flat, (ZScore(),), cache=place/"cache"), min_foreground=0.05)
        rng = np.random.default_rng(0)
        order = rng.permutation(len(slices))
        began = time.perf_counter()
        for i in order: slices[int(i)]["image"].sum()                                       # the voxels are read, not only mapped
        cached = (time.perf_counter() - began)/len(slices)
        began = time.perf_counter()
        for i in order[:DRAWN]:
            sample = ZScore()(load_record(flat[int(i) % len(flat)]))                       # a shuffled slice means its whole file, decompressed
            sample["image"][:, 77].copy()
        raw = (time.perf_counter() - began)/DRAWN
        once = raw*len(flat)/(cached*len(slices))                                          # every file read once an epoch, its slices in order: no shuffling over people
        good = raw/cached >= FASTER and watch.peak <= GIB
        print(f"preparing ({STEPS}): {seconds:.1f} s a scan with two processes, {WHOLE} scans {WHOLE*seconds/60:.0f} minutes, {watch.peak:.2f} GiB at most, all processes together; a shuffled slice: {1000*cached:.1f} ms from the cache, {raw:.2f} s from NIfTI, "
              f"{raw/cached:.0f}x (aim {FASTER:g}); against an epoch that reads every file once, in order: {once:.1f}x: {'ok' if good else 'SHORT OF THE AIM'}")
        return 0 if good else 1


if __name__ == "__main__": raise SystemExit(main())
