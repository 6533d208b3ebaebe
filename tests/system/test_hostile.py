"""A data set whose names are an attack: from the manifest to the page, nothing of it is executed, and nothing is written elsewhere."""
import csv

import numpy as np
from PIL import Image

from project import call

NAMES = ["<script>alert(1)</script>", '=HYPERLINK("http://x","y")', "../../../../evil", "a/b\\c", "+1+1", '"; DROP TABLE runs; --', "x"*180, "nul."]


def test_names_that_attack(tmp_path):
    home, scans, rng = tmp_path/"home"/"deep", tmp_path/"home"/"deep"/"scans", np.random.default_rng(0)
    scans.mkdir(parents=True)
    rows = [["path", "subject", "id", "label", "mask", "family", "split", "site"]]
    for i in range(24):
        name, ill, mask = NAMES[i % len(NAMES)], i >= 16, np.zeros((32, 32), "uint8")
        mask[5:12, 5:12] = 255
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype="uint8")).save(scans/f"{i}.png")
        Image.fromarray(mask).save(scans/f"{i}_mask.png")
        rows.append([f"{i}.png", f"{name}{i}", f"{name}{i}", int(ill), f"{i}_mask.png" if ill else "", name if ill else "", "train" if i < 8 else "val" if i < 12 else "test", name])
    with open(scans/"manifest.csv", "w", newline="") as out: csv.writer(out).writerows(rows)
    (home/"settings.ini").write_text("[paths]\ncohorts = cohorts\ncache = cache\n[runs]\nfolder = runs\n")
    (home/"mine.yaml").write_text(f"fixed: {{dataset: folder, path: {scans}}}\nruns: [{{model: mean}}, {{model: random}}]")
    outside = {p for p in tmp_path.rglob("*") if home not in p.parents}
    done = call(home, "sweep", "mine.yaml")
    assert done.returncode == 0, done.stderr
    page = (home/"runs"/"report-mine.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    for table in (home/"runs").glob("report-mine-tables/*.csv"):
        for row in csv.reader(open(table, newline="")): assert not any(cell.startswith(("=", "@")) for cell in row), table
    assert {p for p in tmp_path.rglob("*") if home not in p.parents} == outside
    assert {p.name for p in home.iterdir()} <= {"cache", "cohorts", "mine.yaml", "runs", "scans", "settings.ini"}
