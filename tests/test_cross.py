"""Two data sets joined: slices free of lesions, who becomes a control, who may not be there twice, and what has no control at all."""
import json
from dataclasses import replace

import numpy as np
import pytest

from anomaly_nb.core import DataError, LeakageError, ParameterError
from anomaly_nb.data.cross import cross_records, lesion_free, same_slices
from anomaly_nb.data.public_sets import PUBLIC_SETS, about_set, compare_counts
from anomaly_nb.data.records import Record, load_record, plain_affine, read_manifest, write_manifest, write_volume

SHAPE, STEP = (12, 6, 7), (5., 1., 2.)       # slices of 5 mm: a margin in voxels, or along another axis, gives other slices


def person(folder, name, lesions=(), subject=None, step=STEP, label=None, other=(), foreground=True, first=1, last=11, **more):
    "A record in NIfTI: organ in slices first to last - 1, a lesion voxel in each slice of `lesions`, one that is not valid in each of `other`."
    rng, affine = np.random.default_rng(sum(map(ord, name))), plain_affine(step)
    def write(what, array):
        write_volume(folder/f"{name}_{what}.nii.gz", array, affine)
        return str(folder/f"{name}_{what}.nii.gz")
    inside, mask, valid = np.zeros(SHAPE, "uint8"), np.zeros(SHAPE, "uint8"), np.ones(SHAPE, "uint8")
    inside[first:last, 1:5, 1:6] = 1
    mask[list(lesions), 2, 3], valid[list(other), 3, 3] = 1, 0
    ill = int(bool(lesions)) if label is None else label
    given = dict(mask=write("mask", mask) if ill else None, foreground=write("brain", inside) if foreground else None, valid=write("valid", valid) if len(other) else None)
    return Record(name, subject or name, (write("image", rng.normal(100, 10, SHAPE).astype("float32")),), ill, meta={"family": "ms" if ill else "healthy", "site": "x"}, **given | more)


def slices(record): return np.flatnonzero(load_record(record)["foreground"][0].any((1, 2))).tolist()


@pytest.fixture
def source(tmp_path): return {pool: [person(tmp_path, f"s-{pool}{i}") for i in range(2)] for pool in ("train", "val", "test")}


def patients(folder, n, **more): return {"test": [person(folder, f"p{i}", (3,), **more) for i in range(n)]}


def joined(source, target, folder, **more): return cross_records(source, target, ("in", "out"), cache=folder/"cache", **more)


def of(records, site, label): return [r for r in records if (r.meta["site"], r.label) == (site, label)]


@pytest.mark.parametrize("margin, kept", [(0, [1, 2, 4, 5, 6, 7, 8, 9, 10]), (4.9, [1, 2, 4, 5, 6, 7, 8, 9, 10]), (5, [1, 5, 6, 7, 8, 9, 10]), (10, [6, 7, 8, 9, 10]), (12, [6, 7, 8, 9, 10]), (20, [8, 9, 10])])
def test_margin_is_in_mm_from_slice_to_slice(tmp_path, margin, kept):
    ill = person(tmp_path, "a", (3,))
    free = lesion_free(ill, margin, cache=tmp_path/"cache")
    assert slices(free) == kept
    sample = load_record(free)
    assert sample["label"] == 0 and not sample["mask"].any() and (sample["image"] == load_record(ill)["image"]).all() and sample["mask_known"]
    assert free.subject == ill.subject and free.id != ill.id
    json.dumps(free.meta)


def test_two_lesions_and_the_space_between(tmp_path):
    assert lesion_free(person(tmp_path, "b", (2, 9)), 10, cache=tmp_path/"cache") is None             # 2 slices are left, 3 are asked for
    assert slices(lesion_free(person(tmp_path, "c", (2, 9)), 10, least=2, cache=tmp_path/"cache")) == [5, 6]


def test_other_pathology_is_not_healthy(tmp_path):
    "WMH label 2: not valid, and no slice of a healthy person; outside of the organ it says nothing."
    assert slices(lesion_free(person(tmp_path, "a", (1,), other=(10,)), 10, cache=tmp_path/"cache")) == [4, 5, 6, 7]
    outside = person(tmp_path, "b", (1,), other=(11,))
    assert slices(lesion_free(outside, 10, cache=tmp_path/"cache")) == [4, 5, 6, 7, 8, 9, 10]
    assert lesion_free(outside, 10, cache=tmp_path/"cache").valid == outside.valid


def test_empty_mask_of_an_ill_person_frees_nothing(tmp_path):
    assert lesion_free(person(tmp_path, "a", label=1), 0, cache=tmp_path/"cache") is None


def test_without_foreground_and_with_another_axis_order(tmp_path):
    assert slices(lesion_free(person(tmp_path, "a", (3,), foreground=False), 10, cache=tmp_path/"cache")) == [0, 6, 7, 8, 9, 10, 11]
    import nibabel as nib
    ill = person(tmp_path, "b", (3,))
    for file in ill.files:                                                                         # stored with other axes, the same in the world
        image = nib.load(file)
        image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
        nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("ASR"))), file)
    assert slices(lesion_free(ill, 10, cache=tmp_path/"cache")) == [6, 7, 8, 9, 10]


def test_npz_with_its_mask_inside(tmp_path):
    "No mask file, spacing in meta: the lesion must be found, and the healthy record must not find it again."
    mask = np.zeros(SHAPE, "uint8")
    mask[3, 2, 3] = 1
    np.savez(tmp_path/"a.npz", image=np.random.default_rng(0).normal(size=(1, *SHAPE)).astype("float32"), mask=mask)
    ill = Record("a", "a", (str(tmp_path/"a.npz"),), 1, meta={"spacing": STEP})
    assert load_record(ill)["mask"].sum() == 1
    free = lesion_free(ill, 10, cache=tmp_path/"cache")
    assert slices(free) == [0, 6, 7, 8, 9, 10, 11] and not load_record(free)["mask"].any()


def test_cache_notices_what_changed(tmp_path):
    a = person(tmp_path, "a", (3,))
    one = lesion_free(a, 10, cache=tmp_path/"cache")
    assert lesion_free(a, 10, cache=tmp_path/"cache") == one and lesion_free(a, 5, cache=tmp_path/"cache").foreground != one.foreground
    assert slices(lesion_free(person(tmp_path, "a", (9,)), 10, cache=tmp_path/"cache")) == [1, 2, 3, 4, 5, 6]


def test_bad_input_of_lesion_free(tmp_path):
    ill = person(tmp_path, "a", (3,))
    for margin in (-1, np.nan, np.inf):
        with pytest.raises(ParameterError, match="margin_mm"): lesion_free(ill, margin, cache=tmp_path)
    for r in (person(tmp_path, "b"), replace(ill, mask_known=False), replace(ill, mask=None)):
        with pytest.raises(DataError, match="no known lesions"): lesion_free(r, cache=tmp_path)
    other = replace(ill, mask=person(tmp_path, "c", (3,), step=(4., 1., 2.)).mask)
    with pytest.raises(DataError, match="c_mask.nii.gz.*elsewhere"): lesion_free(other, cache=tmp_path/"cache")
    (tmp_path/"file").write_text("")
    with pytest.raises(DataError, match="cache"): lesion_free(ill, cache=tmp_path/"file"/"cache")


def test_same_slices_goes_by_height_of_the_organ(tmp_path):
    ill = person(tmp_path, "a", (3,))                                                              # organ 1..10, kept 6..10: the upper half
    free = lesion_free(ill, 10, cache=tmp_path/"cache")
    cut = same_slices(person(tmp_path, "h", first=4, last=8), free, ill, cache=tmp_path/"cache")
    assert slices(cut) == [6, 7] and cut.label == 0 and cut.id == "h-as-a-free"
    with pytest.raises(DataError, match="is ill"): same_slices(ill, free, ill, cache=tmp_path/"cache")


def test_controls_are_dealt_by_person_with_all_scans(tmp_path, source):
    "Two scans a person: never one healthy and one ill, also where only one of them has slices that are far enough."
    scans = [person(tmp_path, f"p{i}-{k}", (1,) if k == 0 or i % 2 else (1, 3, 5, 7, 9), subject=f"p{i}") for i in range(6) for k in range(2)]
    for seed in range(5):
        test = joined(source, {"test": scans}, tmp_path, share=.5, seed=seed)["test"]
        free, ill = ({r.subject for r in of(test, "out", label)} for label in (0, 1))
        assert free == {"out-p1", "out-p3", "out-p5"} and not free & ill
        assert len(test) == 2 + len(scans) and len({r.id for r in test}) == len(test)


@pytest.mark.parametrize("n, share, controls", [(2, .01, 1), (2, .99, 1), (3, 1/3, 1), (6, 1/3, 2), (4, .99, 3)])
def test_at_least_one_control_and_one_ill(tmp_path, source, n, share, controls):
    test = joined(source, patients(tmp_path, n), tmp_path, share=share)["test"]
    assert len(of(test, "out", 0)) == controls and len(of(test, "out", 1)) == n - controls
    assert all(load_record(r)["label"] == r.label for r in test)


def test_dealing_depends_on_names_and_seed_only(tmp_path, source):
    target = patients(tmp_path, 8)
    def controls(target, seed=0): return {r.id for r in of(joined(source, target, tmp_path, seed=seed)["test"], "out", 0)}
    assert controls(target) == controls({"test": target["test"][::-1]}) and len({frozenset(controls(target, seed)) for seed in range(6)}) > 1


def test_no_control_is_an_error(tmp_path, source):
    unknown = {"test": [replace(r, mask=None, mask_known=False) for r in patients(tmp_path, 3)["test"]]}
    for target in (unknown, patients(tmp_path, 1)):
        with pytest.raises(DataError, match="out: has no healthy people"): joined(source, target, tmp_path)
    with pytest.raises(DataError, match="smaller margin_mm"): joined(source, patients(tmp_path, 3), tmp_path, margin_mm=100)


def test_unknown_masks_and_broken_files_stay_ill(tmp_path, source):
    target = patients(tmp_path, 4)["test"]
    target[0] = replace(target[0], mask=None, mask_known=False)
    (tmp_path/"p1_mask.nii.gz").write_bytes(b"nothing")
    test = joined(source, {"test": target}, tmp_path, share=.9)["test"]
    assert {r.subject for r in of(test, "out", 0)} == {"out-p2", "out-p3"} and {r.subject for r in of(test, "out", 1)} == {"out-p0", "out-p1"}


def test_healthy_people_of_the_target_come_first(tmp_path, source):
    target = patients(tmp_path, 3)
    healthy = [person(tmp_path, f"h{i}") for i in range(2)]
    for own in ({"test": target["test"] + healthy}, target | {"val": healthy}, target | {"val": [], "train": healthy}):
        found = joined(source, own, tmp_path)
        assert [r.id for r in of(found["test"], "out", 0)] == ["out-h0", "out-h1"] and len(of(found["test"], "out", 1)) == 3
        assert {r.meta["site"] for pool in ("train", "val") for r in found[pool]} == {"in"}


def test_nothing_is_learned_or_chosen_on_the_target(tmp_path, source):
    more = {pool: [person(tmp_path, f"{pool}{i}", (3,)) for i in range(2)] for pool in ("val_anomalous", "weak")}
    source = source | {"val_anomalous": [person(tmp_path, "chosen", (3,))], "test": source["test"] + [person(tmp_path, "s-ill", (3,))]}
    found = joined(source, patients(tmp_path, 3) | more, tmp_path)
    assert list(found) == ["train", "val", "test", "weak"] and {r.meta["site"] for r in found["weak"]} == {"out"} and not of(found["test"], "in", 1)
    only = joined(source, more, tmp_path)                                                          # no test: these are the test
    assert list(only) == ["train", "val", "test"] and len(only["test"]) == 2 + 4
    for pool, items in found.items(): assert all(r.meta["pool"] == pool and r.meta["own_site"] == "x" and r.meta["cohort"] == r.meta["site"] for r in items)


def test_same_names_in_both_sets_are_different_people(tmp_path, source):
    other = tmp_path/"other"
    target = {"test": [person(other, r.id, (3,)) for r in source["train"] + source["test"]]}
    found = joined(source, target, tmp_path)
    everything = [r for items in found.values() for r in items]
    assert len({r.id for r in everything}) == len(everything) and {r.subject for r in of(found["test"], "out", 1)} | {r.subject for r in of(found["test"], "out", 0)} == {f"out-{r.subject}" for r in target["test"]}


def test_leaks(tmp_path, source):
    target = patients(tmp_path, 4)
    with pytest.raises(LeakageError, match="share 1 image.*s-train0_image"): joined(source, {"test": target["test"] + [replace(source["train"][0], id="q", subject="q")]}, tmp_path)
    with pytest.raises(LeakageError, match="out-p0"): joined(source, target | {"weak": [replace(target["test"][0], id="again")]}, tmp_path)
    with pytest.raises(DataError, match="stand twice: out-p1"): joined(source, {"test": target["test"] + [person(tmp_path, "h"), replace(target["test"][1], subject="z")]}, tmp_path)
    with pytest.raises(DataError, match="stand twice: a-b-1"):                                        # "a" + "b-1", "a-b" + "1"
        cross_records(source | {"test": [person(tmp_path, "b-1")]}, {"test": [person(tmp_path/"t", "1"), *target["test"]]}, ("a", "a-b"), cache=tmp_path/"cache")


def test_bad_sets(tmp_path, source):
    target = patients(tmp_path, 3)
    for pool in ("train", "val", "test"):
        for items in ([], [person(tmp_path, "ill", (3,))]):
            with pytest.raises(DataError, match=f"in: has no healthy people in '{pool}'"): joined(source | {pool: items}, target, tmp_path)
    with pytest.raises(DataError, match="in: has ill people in 'train': ill"): joined(source | {"train": source["train"] + [person(tmp_path, "ill", (3,))]}, target, tmp_path)
    for empty in ({}, {"test": []}, {"test": [person(tmp_path, "h")]}):
        with pytest.raises(DataError, match="out: has no ill people"): joined(source, empty, tmp_path)
    for share in (0, 1, -1, np.nan):
        with pytest.raises(ParameterError, match="share"): joined(source, target, tmp_path, share=share)
    with pytest.raises(ParameterError, match="names"): cross_records(source, target, ("a", "a"))


def test_joined_sets_survive_a_manifest(tmp_path, source):
    found = joined(source, patients(tmp_path, 4), tmp_path)["test"]
    write_manifest(tmp_path/"m.csv", found)
    assert [slices(r) for r in read_manifest(tmp_path/"m.csv")] == [slices(r) for r in found]


def test_public_sets_count_people_or_pictures():
    def some(n, per=1): return {"test": [Record(f"{i}-{k}", str(i), ("x",)) for i in range(n) for k in range(per)]}
    for name, s in PUBLIC_SETS.items():
        for edition, n in s.editions.items():
            if n < 2000: assert compare_counts(name, some(n, 1 + (s.unit == "people")))[1]
        assert s.title in about_set(name)
    assert not compare_counts("ixi", some(580))[1] and "1 fewer than T1" in compare_counts("ixi", some(580))[0]
    assert compare_counts("mvtec", some(292))[0].endswith("(bottle)") and not compare_counts("mvtec", some(291))[1]
    assert sum(n for e, n in PUBLIC_SETS["mvtec"].editions.items() if not e.startswith("all")) == 5354
