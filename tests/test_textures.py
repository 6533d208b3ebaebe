"""The embedded textures as files: regions that never meet, masks that are the change, the same bytes from the seed, whole or not at all."""
import csv
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from anomaly_nb.core import DataError, ParameterError
from anomaly_nb.data import textures
from anomaly_nb.data.folder import folder_records
from anomaly_nb.data.mvtec import mvtec_records
from anomaly_nb.data.records import load_record
from anomaly_nb.data.sets import SliceSet, VolumeSet
from anomaly_nb.data.textures import CATEGORIES, CROP, DEFECT_SOURCES, DEFECTS, SIZES, TASK_SOURCES, cohort_folder, draw_defect, plan, texture_records


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("textures")


def category_of(records):
    return Path(records["train"][0].images[0]).parents[2]


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def photograph(name):
    "Read independently of the library."
    return np.asarray(Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png"))


def pixels(path):
    return np.asarray(Image.open(path))


def rows(folder):
    with open(folder / "crops.csv", newline="") as lines: return list(csv.DictReader(lines))


@pytest.mark.parametrize("category", CATEGORIES)
def test_regions_never_meet_and_lie_a_crop_apart(root, category):
    records, photo, used = texture_records("tiny", category, root=root), photograph(category), {}
    folder = category_of(records)
    for row in rows(folder):
        y, x, picture = int(row["row"]), int(row["column"]), pixels(folder / row["file"])
        crop = photo[y:y + CROP, x:x + CROP]
        changed = picture != crop
        mask = pixels(folder / row["mask"]) if row["mask"] else np.zeros_like(crop)
        assert set(np.unique(mask)) <= {0, 255} and np.array_equal(changed, mask > 0), row["file"]       # by content: the crop is where the list says, and changed where the mask says
        used.setdefault(row["region"], set()).update(range(x, x + CROP))
    for a, b in (("train", "val"), ("val", "test")): assert min(used[b]) - max(used[a]) > CROP
    for pool, items in records.items(): assert {next(r["region"] for r in rows(folder) if r["file"] == Path(i.images[0]).relative_to(folder).as_posix()) for i in items} == {pool}


def test_counts_of_every_size():
    for size, n in SIZES.items():
        where = [p.folder for p in plan(size)]
        assert where.count("train/good") == n.train + n.val and where.count("test/good") == n.test and all(where.count(f"test/{f}") == n.ill for f in DEFECTS)
    c = SIZES["claims"]
    assert c.train >= 60 and c.val >= 100 and c.test >= 100 and c.ill >= 40


def test_the_same_bytes_from_the_seed_and_others_from_another(root, tmp_path):
    folder = category_of(texture_records("tiny", root=root))
    textures.photograph.cache_clear()
    assert content(category_of(texture_records("tiny", root=tmp_path))) == content(folder)
    other = content(category_of(texture_records("tiny", seed=1, root=tmp_path)))
    assert other.keys() == content(folder).keys() and sum(other[k] == v for k, v in content(folder).items() if k.endswith(".png")) == 0


def test_sizes_share_pictures(root):
    tiny, demo = (texture_records(s, root=root) for s in ("tiny", "demo"))
    for pool in ("train", "val"):
        for a, b in zip(tiny[pool], demo[pool]): assert Path(a.images[0]).read_bytes() == Path(b.images[0]).read_bytes()


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("family", DEFECTS)
def test_defects_change_what_the_mask_says_fade_and_vanish(category, family):
    rng, photo = np.random.default_rng(5), photograph(category).astype(float)
    for i in range(12):
        y, x = rng.integers(0, 512 - CROP, 2)
        crop = photo[y:y + CROP, x:x + CROP]
        draw = lambda **dials: draw_defect(crop, family, np.random.default_rng(i), **dials)
        full, mask = draw()
        half, same = draw(contrast=0.5)
        none, still = draw(contrast=0)
        assert np.array_equal(full != crop, mask) and np.array_equal(none, crop) and np.array_equal(mask, same) and np.array_equal(mask, still)
        assert np.abs(half - crop).mean() == pytest.approx(np.abs(full - crop).mean() / 2, rel=0.15, abs=0.02)
        small, large = (draw(size=s)[1].sum() for s in (0.5, 1.25))
        assert 0 < small < mask.sum() < large and not mask.all(0).any()


def test_a_defect_is_more_than_its_brightness():
    "Foreign texture keeps the mean of what it covers; and no defect is one grey level."
    photo = photograph("gravel").astype(float)
    shift = []
    for i in range(30):
        crop = photo[10 * i:10 * i + CROP, 5 * i:5 * i + CROP]
        for family in DEFECTS: assert len(np.unique(draw_defect(crop, family, np.random.default_rng(i))[0][draw_defect(crop, family, np.random.default_rng(i))[1]])) > 15
        full, mask = draw_defect(crop, "foreign_texture", np.random.default_rng(i))
        shift.append(abs(full[mask].mean() - crop[mask].mean()) / crop.std())
    assert np.median(shift) < 0.15


def test_contrast_zero_is_the_good_crop_on_disk(root):
    full, none = (texture_records("tiny", "grass", defect_contrast=c, root=root) for c in (1.0, 0.0))
    photo, folder = photograph("grass"), category_of(none)
    assert [r.id for r in full["test"]] == [r.id for r in none["test"]] and content(category_of(full))["crops.csv"] == content(folder)["crops.csv"]
    for row in rows(folder):
        y, x = int(row["row"]), int(row["column"])
        assert np.array_equal(pixels(folder / row["file"]), photo[y:y + CROP, x:x + CROP])
    for a, b in zip(full["test"], none["test"]): assert (Path(a.images[0]).read_bytes() == Path(b.images[0]).read_bytes()) == (not a.label)


def test_sources_of_defects_are_not_sources_of_tasks(monkeypatch):
    assert not set(DEFECT_SOURCES) & set(TASK_SOURCES) and not set(CATEGORIES) & {*DEFECT_SOURCES, *TASK_SOURCES}
    seen, read = set(), textures.photograph
    monkeypatch.setattr(textures, "photograph", lambda name: seen.add(name) or read(name))
    for i in range(40): textures.foreign_texture(np.asarray(photograph("brick")[:CROP, :CROP], float), np.random.default_rng(i))
    assert seen == set(DEFECT_SOURCES)


def test_two_readers_agree(root):
    "The folder reader of a person's own scans understands the same folder."
    records = texture_records("tiny", "brick", root=root)
    own = folder_records(category_of(records))
    assert {(Path(r.images[0]).name, r.label, r.meta["family"]) for r in own["test"]} == {(Path(r.images[0]).name, r.label, r.meta["family"]) for r in records["test"]}
    raw = mvtec_records(category_of(records).parent, "brick", side=0)
    assert {p: [r.files for r in i] for p, i in raw.items()} == {p: [r.files for r in i] for p, i in records.items()}


def test_records_say_what_they_are(root, tmp_path):
    records = texture_records("tiny", "brick", pools=("train", "val", "val_anomalous", "test", "weak"), root=root)
    assert set(records) == {"train", "val", "test"} and all(r.meta["cohort"] == "embedded textures" for items in records.values() for r in items)
    subjects = [r.subject for items in records.values() for r in items]
    assert len(set(subjects)) == len(subjects) == 60
    slices = SliceSet(VolumeSet(records["test"], cache=tmp_path))
    assert slices.shape == (CROP, CROP) and slices.channels == 1 and slices.labels.sum() == 20 and len(slices) == 30


def _build(root):
    texture_records("tiny", "brick", root=root)


def test_two_processes_build_one_cohort(tmp_path, root):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_build, args=(tmp_path,)) for _ in range(2)]
    for p in both: p.start()
    for p in both: p.join()
    assert [p.exitcode for p in both] == [0, 0]
    folder = cohort_folder("tiny", root=tmp_path)
    assert content(folder / "brick") == content(category_of(texture_records("tiny", root=root))) and sorted(p.name for p in folder.iterdir()) == [".lock", "brick"]


def test_a_build_that_was_killed_leaves_nothing_behind(tmp_path, monkeypatch, root):
    whole = content(category_of(texture_records("tiny", root=root)))
    monkeypatch.setattr(textures, "draw_defect", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    monkeypatch.setattr(textures, "cohort_folder", lambda *a: tmp_path / "c")
    with pytest.raises(KeyboardInterrupt): texture_records("tiny", root=tmp_path)
    assert not (tmp_path / "c" / "brick").exists() and (tmp_path / "c" / ".part-brick" / "train").is_dir()
    monkeypatch.undo()
    monkeypatch.setattr(textures, "cohort_folder", lambda *a: tmp_path / "c")
    assert content(category_of(texture_records("tiny", root=tmp_path))) == whole and not (tmp_path / "c" / ".part-brick").exists()
    shutil.rmtree(tmp_path / "c" / "brick" / "ground_truth" / "cut")
    assert content(category_of(texture_records("tiny", root=tmp_path))) == whole                       # damaged: made again


@pytest.mark.parametrize("options,said", [({"size": "large"}, "there is no 'large'"), ({"category": "gras"}, "did you mean 'grass'"), ({"defect_contrast": 1.5}, "defect_contrast"), ({"defect_size": "big"}, "defect_size")])
def test_unknown_options(options, said, tmp_path):
    with pytest.raises(ParameterError, match=said): texture_records(**options, root=tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="file.*cannot be written"): texture_records("tiny", root=tmp_path / "file")


def test_nothing_is_downloaded(monkeypatch, tmp_path):
    import socket
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was used"))
    textures.photograph.cache_clear()
    texture_records("tiny", "gravel", root=tmp_path)
    monkeypatch.setattr(skimage, "__file__", str(tmp_path / "skimage" / "__init__.py"))
    textures.photograph.cache_clear()
    with pytest.raises(DataError, match="brick.png: the file is missing"): textures.photograph("brick")
    textures.photograph.cache_clear()
