"""MetaImage and SPIDER: damaged files, impossible label maps, tables with every quirk, labels of vertebrae, and who may be trained on."""
import shutil
from collections import Counter

import nibabel as nib
import numpy as np
import pytest

from anomaly_nb.core import DataError, LeakageError, ParameterError, rng_of
from anomaly_nb.data import spider
from anomaly_nb.data.folder import folder_records
from anomaly_nb.data.formats import ENDINGS, ending, stem
from anomaly_nb.data.gradings import GRADES, check_votes, read_gradings, read_overview, read_raters, vertebra_labels, vote_labels
from anomaly_nb.data.metaimage import read_mha, write_mha
from anomaly_nb.data.records import load_record, read_volume, write_volume
from anomaly_nb.data.spider import POOLS, centres_of, check_sagittal, check_upright, pool_of, read_labels, spider_counts, spider_records, structures

HEAD = ",".join(("Patient", "IVD label", *GRADES))
PLACE = np.array([[0, 0, -5., 20], [0, -2, 0, 30], [2, 0, 0, -40], [0, 0, 0, 1]])          # (d,h,w) -> RAS mm


def column(vertebrae=4, lost=(), partial=False):
    "A label map [D,H,W] int16: blocks from below, discs under them, a canal behind."
    labels = np.zeros((12*vertebrae + 14, 24, 5), "int16")
    labels[:, 18:22, 1:4] = 100
    for v in range(1, vertebrae + 1 + partial):
        for code, start, stop in ((200 + v, 12*v - 10, 12*v - 6), (v if v <= vertebrae else 100 + v, 12*v - 6, 12*v + 2)):
            if code not in lost: labels[start:stop, 4:16, 1:4] = code
    return labels


def picture(labels, seed=0):
    return (labels % 100 + rng_of("picture", seed).normal(size=labels.shape)).astype("float32")


def rows(up, low=None, modic=None, patient="1"):
    "Lines of radiological_gradings.csv of one patient, from disc 1 upwards; `-` is an empty cell."
    cell = lambda text, d: "0" if text is None else text[d].replace("-", "")
    return [f"{patient},{d + 1},{cell(modic, d)},{cell(up, d)},{cell(low, d)},0,0,0,0,3" for d in range(len(up))]


def write(root, overview, gradings, head=HEAD):
    root.mkdir(parents=True, exist_ok=True)
    (root/"overview.csv").write_text("\n".join(["new_file_name,subset,sex,age", *overview]) + "\n", encoding="utf-8")
    (root/"radiological_gradings.csv").write_text("\n".join([head, *gradings]) + "\n", encoding="utf-8")
    return root


def put(root, name, labels, affine=PLACE, seed=0):
    write_mha(root/"images"/f"{name}.mha", picture(labels, seed), affine)
    write_mha(root/"masks"/f"{name}.mha", labels, affine)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "Thirty patients with T1 and T2; every third is ill, every fifth is for validation."
    root = tmp_path_factory.mktemp("spider")
    overview, gradings = [], []
    for p in range(1, 31):
        for contrast in ("t1", "t2"): put(root, f"{p}_{contrast}", column(), seed=p); overview.append(f"{p}_{contrast},{'validation' if p % 5 == 0 else 'training'},{'F ' if p % 2 else 'M'},{20 + p}")
        gradings += rows("0100" if p % 3 == 0 else "0000", patient=p)
    return write(root, overview, gradings)


@pytest.fixture
def copy(tree, tmp_path):
    shutil.copytree(tree, tmp_path/"copy")
    return tmp_path/"copy"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def refused(words, do, error=DataError):
    with pytest.raises(error) as caught: do()
    for word in [words] if isinstance(words, str) else words: assert word in str(caught.value), str(caught.value)


# ---------- MetaImage

@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_an_oblique_flipped_image_is_the_same_as_nifti_and_as_metaimage(tmp_path, order, flips):
    import SimpleITK
    a = np.deg2rad(17)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, np.cos(a), np.sin(a)], [0, -np.sin(a), np.cos(a)]])
    A = np.eye(4)
    A[:3, :3], A[:3, 3] = (turn @ np.diag(flips))[:, list(order)] * (2., 3., 4.), (7, -8, 9)
    scan = rng_of("scan", order, flips).normal(size=(5, 6, 7)).astype("float32")
    nib.save(nib.Nifti1Image(scan, A), tmp_path/"a.nii.gz")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path/"a.nii.gz")), str(tmp_path/"a.mha"))           # ITK's own reading of the NIfTI
    (a, its), (b, other) = read_volume(tmp_path/"a.nii.gz"), read_volume(tmp_path/"a.mha")
    assert np.array_equal(a, b) and np.allclose(its, other, atol=1e-4)
    write_mha(tmp_path/"b.mha", scan.transpose(2, 1, 0), A @ np.eye(4)[[2, 1, 0, 3]])
    c, third = read_mha(tmp_path/"b.mha")
    assert np.array_equal(a, c) and np.allclose(its, third, atol=1e-4)


def test_metaimage_is_an_ending_like_any_other(tmp_path, cache):
    assert ".mha" in ENDINGS and (stem("a/12_t2_SPACE.mha"), ending("X.MHA")) == ("12_t2_SPACE", ".mha")
    for name in ("p1", "p2", "p3"): write_mha(tmp_path/"all"/"normal"/f"{name}.mha", picture(column(), name), PLACE)
    write_mha(tmp_path/"all"/"fracture"/"p4.mha", picture(column()), PLACE)
    write_mha(tmp_path/"all"/"fracture"/"p4_mask.mha", column() == 2, PLACE)
    records = folder_records(tmp_path/"all", cache=cache)
    ill = next(r for items in records.values() for r in items if r.label)
    assert sum(map(len, records.values())) == 4 and np.array_equal(load_record(ill)["mask"][0], column() == 2)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "float32", "float64"])
def test_equal_arrays_are_equal_files_and_nothing_is_left_behind(tmp_path, dtype):
    values = (50*rng_of(dtype).random((4, 5, 6))).astype(dtype)
    for name in ("a.mha", "b.mha"): write_mha(tmp_path/name, values, PLACE)
    assert (tmp_path/"a.mha").read_bytes() == (tmp_path/"b.mha").read_bytes() and sorted(p.name for p in tmp_path.iterdir()) == ["a.mha", "b.mha"]
    assert np.array_equal(read_mha(tmp_path/"a.mha")[0], values.astype("float32"))


def test_a_damaged_metaimage_is_never_read(tmp_path, capfd):
    path = tmp_path/"a.mha"
    write_mha(path, picture(column()), PLACE)
    raw, truth = path.read_bytes(), read_mha(path)[0]
    start, taken = raw.index(b"LOCAL\n") + 6, 0
    for at in range(start, len(raw), (len(raw) - start)//40):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1:])
        try: taken += 1; assert np.array_equal(read_mha(path)[0], truth)
        except DataError as error: taken -= 1; assert str(path) in str(error)
    assert taken <= 2
    for n in (0, 5, 100, start, start + 10, len(raw)//2, len(raw) - 1):
        path.write_bytes(raw[:n])
        refused(str(path), lambda: read_mha(path))
    assert capfd.readouterr().err == ""                                                                   # nothing but the error


@pytest.mark.parametrize("old, new, words", [(b"DimSize = 5 24 62", b"DimSize = 5 24 63", "header asks for"), (b"MET_SHORT", b"MET_FLOAT", "header asks for"), (b"DimSize = 5 24 62", b"DimSize = 5 24 x", "DimSize"), (b"LOCAL", b"a.raw", "a.raw"),
                                             (b"NDims = 3", b"ElementNumberOfChannels = 3\nNDims = 3", "3 values a voxel"), (b"DimSize = 5 24 62", b"DimSize = 5 24 31 2", "4 axes"), (b"DimSize = 5 24 62", b"DimSize = 0 24 62", "0 x 24")])
def test_a_header_that_does_not_fit_names_the_file(tmp_path, old, new, words):
    path = tmp_path/"a.mha"
    write_mha(path, column(), PLACE)
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))
    refused([str(path), words], lambda: read_mha(path))


# ---------- label maps

@pytest.mark.parametrize("new, words", [(26, "26"), (99, "99"), (126, "126"), (200, "200"), (226, "226"), (-1, "-1"), (2.5, "2.5"), (np.nan, "nan"), (65537, "65537")])
def test_unknown_labels_are_named_with_the_file(tmp_path, new, words):
    path = tmp_path/"1_t2.mha"
    write_mha(path, np.where(column() == 3, np.float64(new), column()), PLACE)
    refused([str(path), words], lambda: read_labels(path))


def test_all_labels_of_spider_are_known(tmp_path):
    labels = np.array([0, *range(1, 26), 100, *range(101, 126), *range(201, 226)], "int16").reshape(-1, 1, 1)
    write_volume(tmp_path/"all.nii.gz", labels, np.eye(4))                                                # another format, the same reader
    assert sorted(read_labels(tmp_path/"all.nii.gz")[0].ravel()) == sorted(labels.ravel())


def test_centres_are_where_scipy_finds_them():
    from scipy import ndimage
    labels = column(partial=True)
    found = centres_of(labels, PLACE)
    assert set(found) == set(np.unique(labels)) - {0}
    for code, centre in found.items(): assert np.allclose(centre, (PLACE @ [*ndimage.center_of_mass(labels == code), 1])[:3])


@pytest.mark.parametrize("spacing, words", [((5, 1, 1), "axial"), ((1, 5, 1), "coronal"), ((1, 1, 5), None), ((1, 1, 1), None), ((.5, .5, .9), None)])
def test_only_sagittal_and_isotropic_stacks_pass(spacing, words):
    affine = PLACE @ np.diag([*np.array(spacing)/(2, 2, 5), 1])
    if words: refused(["1_t2.mha", words, "4 x 3 x 2"], lambda: check_sagittal("1_t2.mha", (4, 3, 2), affine))
    else: check_sagittal("1_t2.mha", (4, 3, 2), affine)


def test_upside_down_and_out_of_order_are_two_errors():
    upside, swapped, labels = PLACE @ np.diag([-1, 1, 1, 1]), column(partial=True), column(partial=True)
    swapped[labels == 2], swapped[labels == 3] = 3, 2
    refused(["m.mha", "upside down", "vertebra 5 lies 96 mm under vertebra 1"], lambda: check_upright("m.mha", centres_of(labels, upside)))
    refused(["m.mha", "out of order"], lambda: check_upright("m.mha", centres_of(swapped, PLACE)))
    check_upright("m.mha", centres_of(labels, PLACE))
    check_upright("m.mha", centres_of(np.where(labels == 2, 2, 0), upside))                               # one vertebra
    check_upright("m.mha", centres_of(np.where(labels > 99, labels, 0) * (labels != 105), upside))          # none


# ---------- tables

@pytest.mark.parametrize("sep, bom, end", [(",", "", "\n"), (";", "\ufeff", "\r\n"), ("\t", "\ufeff", "\n")])
def test_quirks_of_real_tables_are_read(tmp_path, sep, bom, end):
    text = end.join(["new_file_name,subset , sex,age,Manufacturer,", "1_t1,training,F ,64,x,", " 1_t2_SPACE.mha,Training,M,,,", ",,,,,", "2_t2,validation,F,nan,x,"]).replace(",", sep)
    (tmp_path/"o.csv").write_bytes((bom + text).encode())
    frame = read_overview(tmp_path/"o.csv")
    assert frame[["id", "patient", "contrast", "subset", "sex"]].values.tolist() == [["1_t1", "1", "T1", "training", "F"], ["1_t2_SPACE", "1", "T2_SPACE", "training", "M"], ["2_t2", "2", "T2", "validation", "F"]]
    assert frame.age[0] == 64 and frame.age.isna().tolist() == [False, True, True]
    lines = [HEAD, "1.0,1,0,0,1,0,0,0,0,4", "1,0,0,9,0,0,0,0,0,0", "1, 2 ,,1,0,0,0,0,0,3.0", "1,2,,1,0,0,0,0,0,3"]
    (tmp_path/"g.csv").write_bytes((bom + end.join(lines).replace(",", sep)).encode())
    graded, counts = read_gradings(tmp_path/"g.csv")
    assert graded[["Patient", "IVD label", "LOW endplate"]].values.tolist() == [["1", 1, 1], ["1", 2, 0]] and graded.Modic.isna().tolist() == [False, True]
    assert counts == Counter(grading_rows=4, grading_rows_ivd_0=1, grading_rows_repeated=1)


@pytest.mark.parametrize("lines, words", [(["1,1,0,0,0,0,0,0,0,6"], ["line 2", "'Pfirrman grade' is '6'", "from 1 to 5"]), (["1,1,0,0,0,0,0,0,0,3", "1,2,4,0,0,0,0,0,0,3"], ["line 3", "'Modic' is '4'"]), (["1,1,I,0,0,0,0,0,0,3"], ["line 2", "'I'"]),
                                          (["1,1,inf,0,0,0,0,0,0,3"], ["line 2", "inf"]), (["1,1,0,0.5,0,0,0,0,0,3"], ["'UP endplate' is '0.5'"]), (["1,26,0,0,0,0,0,0,0,3"], ["'IVD label' is '26'"]), (["1,-1,0,0,0,0,0,0,0,3"], ["'IVD label' is '-1'"]),
                                          (["1,,0,0,0,0,0,0,0,3"], ["'IVD label' is empty"]), ([",1,0,0,0,0,0,0,0,3"], ["'Patient' is empty"]), (["1,1,0,0"], ["line 2", "4 cells"]), (["1,1,0,0,0,0,0,0,0,3", "1,1,0,1,0,0,0,0,0,3"], ["line 3", "second time"])])
def test_bad_gradings_name_file_and_line(tmp_path, lines, words):
    path = write(tmp_path, [], lines)/"radiological_gradings.csv"
    refused([str(path), *words], lambda: read_gradings(path))


def test_missing_columns_name_the_nearest(tmp_path):
    path = write(tmp_path, [], [], HEAD.replace("Pfirrman", "Pfirrmann"))/"radiological_gradings.csv"
    refused([str(path), "no column 'Pfirrman grade' (is 'Pfirrmann grade' meant?)"], lambda: read_gradings(path))
    (tmp_path/"o.csv").write_text("file_name,subset\n1_t2,training\n")
    refused("no column 'new_file_name' (is 'file_name' meant?)", lambda: read_overview(tmp_path/"o.csv"))
    refused("the file is missing", lambda: read_overview(tmp_path/"none.csv"))
    (tmp_path/"latin.csv").write_bytes("new_file_name,subset\n1_t2,trainé\n".encode("latin-1"))
    refused("UTF-8", lambda: read_overview(tmp_path/"latin.csv"))
    (tmp_path/"void.csv").write_bytes(b"")
    refused("no column", lambda: read_overview(tmp_path/"void.csv"))


@pytest.mark.parametrize("lines, words", [(["1_t1,training,F,1", "1_t2,validation,F,1"], "patient 1 is in 'validation' here and in 'training'"), (["1_t1,training,F,1", "1_t1,training,F,1"], "again"), (["1_t1,test,F,1"], "'test'"), (["1_pd,training,F,1"], "1_pd"), (["1_t1,training,F,young"], "young"), ([], "no lines")])
def test_bad_overviews_name_file_and_line(tmp_path, lines, words):
    path = write(tmp_path, lines, [])/"overview.csv"
    refused([str(path), words], lambda: read_overview(path))


def test_a_patient_in_both_subsets_is_a_leak(tmp_path):
    refused("patient 1", lambda: read_overview(write(tmp_path, ["1_t1,training,F,1", "1_t2,validation,F,1"], [])/"overview.csv"), LeakageError)


# ---------- what the discs say

WHOLE = [*range(1, 5), *range(201, 206)]


def said(up, low=None, modic=None, codes=WHOLE, what="endplate", **how):
    graded = [{"IVD label": d + 1, **{c: None if t is None or t[d] == "-" else int(t[d]) for c, t in (("UP endplate", up), ("LOW endplate", low or "0"*len(up)), ("Modic", modic or "0"*len(up)))}} for d in range(len(up)) if up[d] != "x"]
    found, counts = vertebra_labels(graded, codes, what, **how)
    assert counts["labelled"] == len(found) and counts["vertebrae"] == counts["labelled"] + counts["half_graded"] + counts["not_graded"]
    return {e["id"]: e["label"][1] for e in found}, counts


def test_endplates_of_both_discs_count_and_only_on_the_vertebra_s_side():
    assert said("00000")[0] == {1: 0, 2: 0, 3: 0, 4: 0}
    assert said("01000")[0] == {1: 0, 2: 1, 3: 0, 4: 0}                      # the upper side of disc 2 is vertebra 2
    assert said("00000", "01000")[0] == {1: 1, 2: 0, 3: 0, 4: 0}             # its lower side vertebra 1
    assert said("00000", "10000")[0] == {1: 0, 2: 0, 3: 0, 4: 0}             # the lower side of disc 1: the sacrum
    assert said("10001")[0] == {1: 1, 2: 0, 3: 0, 4: 0}


def test_modic_does_not_say_which_side():
    assert said("00000", modic="00000", what="modic")[0] == {1: 0, 2: 0, 3: 0, 4: 0}
    assert said("00000", modic="01300", what="modic")[0] == {1: .5, 2: .75, 3: .5, 4: 0}
    entry = vertebra_labels([{"IVD label": 1, "Modic": 1}, {"IVD label": 2, "Modic": 0}], [1, 201, 202], "modic")[0]
    assert entry == [dict(id=1, label=[.5, .5], weight=1.0, votes=[])]


def test_discs_not_segmented_discs_not_graded_and_cells_left_empty():
    labels, counts = said("01000", codes=[1, 2, 3, 4, 201, 203, 204, 205])   # disc 2 is not segmented: its grading is dropped
    assert labels == {3: 0, 4: 0} and counts["discs_graded_not_segmented"] == 1 and counts["half_graded"] == 2 and counts["ill_left_out"] == 0
    labels, counts = said("1x000")                                           # disc 2 is not graded; vertebra 1 is ill by disc 1 alone
    assert labels == {3: 0, 4: 0} and counts["discs_segmented_not_graded"] == 1 and counts["ill_left_out"] == 1
    assert said("1x000", half=True)[0] == {1: 1, 3: 0, 4: 0}
    assert said("0-000")[0] == {1: 0, 3: 0, 4: 0}                            # only the upper side of disc 2 is unknown
    assert said("00000", "0-000")[0] == {2: 0, 3: 0, 4: 0}


def test_all_gradings_missing_one_vertebra_and_partial_ones():
    labels, counts = said("")
    assert labels == {} and counts["not_graded"] == 4 and counts["discs_segmented_not_graded"] == 5
    assert said("10", codes=[1, 201, 202])[0] == {1: 1} and said("10", codes=[1, 201])[0] == {}
    assert 5 not in said("000011", codes=[*WHOLE, 105, 206])[0]              # partly visible
    with pytest.raises(ParameterError): vertebra_labels([], WHOLE, "endplates")


# ---------- raters

def test_votes_have_one_place_for_each_rater(tmp_path):
    (tmp_path/"r.csv").write_text("Patient;rater;vertebra;grade\n1;B;2;0\n1;A;2;2\n1;A;3;\n2;C;1;1\n")
    votes, names = read_raters(tmp_path/"r.csv", 3)
    assert names == ["A", "B", "C"] and votes == {"1": {2: [2, 0, None], 3: [None, None, None]}, "2": {1: [None, None, 1]}}
    found, counts = vote_labels(votes["1"], [1, 2, 3], 3)
    assert found == [dict(id=2, label=[.5, 0, .5], weight=1.0, votes=[2, 0, None])] and (counts["not_graded"], counts["votes_missing"]) == (2, 4)
    refused("vertebra 7 has 3 votes and vertebra 2 has 2", lambda: check_votes({2: [0, 1], 5: [0, None], 7: [0, 1, 1]}))
    refused("vertebra 7", lambda: vote_labels({2: [0, 1], 7: [0]}, [2, 7]))


@pytest.mark.parametrize("lines, words", [("1,A,2,0\n1,A,2,0", "line 3: rater 'A' grades vertebra 2 of patient 1 a second time"), ("1,A,2,3", "'grade' is '3'"), ("1,A,2,-1", "'grade' is '-1'"), ("1,A,0,1", "'vertebra' is '0'"), ("1,,2,1", "no rater"), ("1,A,,1", "no vertebra")])
def test_bad_votes_name_file_and_line(tmp_path, lines, words):
    path = tmp_path/"raters.csv"
    path.write_text(f"Patient,rater,vertebra,grade\n{lines}\n")
    refused([str(path), words], lambda: read_raters(path, 3))


# ---------- records

def test_the_split_is_by_subject_for_every_seed_and_contrast(tree, cache):
    seen = set()
    for seed in range(4):
        pools = {contrast: {pool: {r.subject for r in items} for pool, items in spider_records(tree, contrast, seed=seed, cache=cache).items()} for contrast in ("T1", "T2")}
        assert pools["T1"] == pools["T2"]
        for a in POOLS: assert not any(pools["T2"][a] & pools["T2"][b] for b in POOLS if b != a)
        assert set.union(*pools["T2"].values()) == {str(p) for p in range(1, 31)} and pools["T2"]["test"] == {str(p) for p in range(5, 31, 5)}
        seen.add(tuple(sorted(pools["T2"]["train"])))
    assert len(seen) > 1


def test_only_the_healthy_train_and_the_ill_have_unknown_masks(tree, cache):
    records = spider_records(tree, cache=cache)
    for pool, items in records.items():
        for r in items:
            ill = int(r.subject) % 3 == 0
            assert r.label == ill and r.mask_known == (not ill) and r.meta["pool"] == pool and r.meta["family"] == ("ill" if ill else "healthy") and r.meta["cohort"] is None
            assert pool not in (("val_anomalous",) if not ill else ("train", "val"))
            assert [e["id"] for e in r.meta["vertebrae"]] == [1, 2, 3] and r.meta["regions"].endswith(f"masks/{r.id}.mha") and (r.meta["sex"], r.meta["age"]) == ("F" if int(r.subject) % 2 else "M", 20 + int(r.subject))
        for r in items[:1]: assert load_record(r)["label"] == r.label
    assert spider_records(tree, pools="test", cache=cache).keys() == {"test"}
    with pytest.raises(ParameterError): spider_records(tree, pools=("tests",), cache=cache)


def test_one_patient_more_moves_nobody(copy, tree, cache):
    before = {r.subject: pool for pool, items in spider_records(tree, cache=cache).items() for r in items}
    put(copy, "31_t2", column(), seed=31)
    (copy/"overview.csv").write_text((copy/"overview.csv").read_text() + "31_t2,training,F,50\n")
    after = {r.subject: (pool, r.meta["state"]) for pool, items in spider_records(copy, cache=cache).items() for r in items}
    assert after.pop("31") == ("unlabelled", "unknown") and {s: p for s, (p, _) in after.items()} == before     # and one without gradings is not healthy


def test_what_is_missing_is_counted(copy, cache):
    (copy/"images"/"1_t2.mha").unlink()
    put(copy, "77_t2", column())
    (copy/"radiological_gradings.csv").write_text("\n".join([HEAD, *rows("0000", patient=5), *rows("1000", patient=2), "2,0,0,0,0,0,0,0,0,1", *rows("00", patient=88)]) + "\n")
    counts, records = spider_counts(copy, cache=cache), spider_records(copy, cache=cache)
    assert [counts[k] for k in ("series", "series_without_file", "files_without_row", "patients", "patients_without_gradings", "patients_graded_without_series", "grading_rows_ivd_0")] == [30, 1, 1, 29, 27, 1, 1]
    assert {r.subject for r in records["test"]} == {"5"} and counts["validation_left_out"] == 5             # those of whom nothing is known cannot be judged
    assert {"1", "77", "88"}.isdisjoint(r.subject for items in records.values() for r in items)
    assert counts["not_graded"] == 4*27 and counts["half_graded"] == 2 and counts["labelled"] == 6


def test_records_from_raters(copy, cache):
    (copy/"raters.csv").write_text("Patient,rater,vertebra,grade\n" + "".join(f"{p},{n},{v},{int(p % 3 == 0 and v == 2 and n != 'C' or p == 4 and v == 1 and n == 'A')}\n" for p in range(1, 31) for n in "ABC" for v in range(1, 5)))
    records = {r.subject: r for items in spider_records(copy, labels="raters", cache=cache).values() for r in items}
    assert records["3"].label and records["3"].meta["vertebrae"][1]["votes"] == [1, 1, 0] and records["3"].meta["raters"] == ["A", "B", "C"]
    assert records["4"].meta["state"] == "disputed" and not records["4"].label and records["4"].meta["pool"] in ("weak", "unlabelled")


@pytest.mark.parametrize("change, words", [
    (lambda r: shutil.rmtree(r/"images"), "images: the folder is missing"), (lambda r: shutil.rmtree(r/"masks"), "masks: the folder is missing"), (lambda r: (r/"overview.csv").unlink(), "overview.csv: the file is missing"),
    (lambda r: (r/"radiological_gradings.csv").unlink(), "radiological_gradings.csv: the file is missing"), (lambda r: (r/"masks"/"2_t2.mha").unlink(), "files are missing: masks/2_t2.mha"),
    (lambda r: (r/"masks"/"2_t2.mha").write_bytes((r/"masks"/"2_t2.mha").read_bytes()[:-20]), "masks/2_t2.mha: is truncated"), (lambda r: write_mha(r/"masks"/"2_t2.mha", column(), PLACE @ np.diag([-1, 1, 1, 1])), "masks/2_t2.mha: is upside down"),
    (lambda r: write_mha(r/"masks"/"2_t2.mha", column(), PLACE @ np.diag([5, 1, .4, 1])), "masks/2_t2.mha: is an axial"), (lambda r: write_mha(r/"masks"/"2_t2.mha", np.where(column() == 100, 99, column()), PLACE), "unknown label 99"),
    (lambda r: write_mha(r/"masks"/"2_t2.mha", np.where(column() > 99, column(), 0), PLACE), "no whole vertebra"), (lambda r: [p.unlink() for p in (r/"images").glob("*_t2.mha")], "no T2 series")])
def test_faults_of_a_folder_name_the_file(copy, cache, change, words):
    change(copy)
    refused(words, lambda: spider_records(copy, cache=cache))


def test_an_image_without_contrast_of_labels_still_loads_one_vertebra(tmp_path, cache):
    put(tmp_path, "1_t2_SPACE", column(1), PLACE @ np.diag([.5, .5, .2, 1]))
    write(tmp_path, ["1_t2_SPACE,training,F,1"], rows("00"))
    (record,) = [r for items in spider_records(tmp_path, "T2_SPACE", cache=cache).values() for r in items]
    assert record.meta["vertebrae"] == [] and record.meta["state"] == "unknown"                             # its upper disc is not in the image


def test_label_maps_are_opened_once(tmp_path, monkeypatch):
    path = tmp_path/"1_t2.mha"
    write_mha(path, column(), PLACE)
    first = structures(path, tmp_path/"cache")
    monkeypatch.setattr(spider, "read_labels", lambda path: pytest.fail("opened again"))
    second = structures(path, tmp_path/"cache")
    assert first.keys() == second.keys() and all(np.array_equal(first[c], second[c]) for c in first)
    monkeypatch.undo()
    next((tmp_path/"cache"/"spider").iterdir()).write_text('{"centres":')                                   # half a note is made anew
    assert structures(path, tmp_path/"cache").keys() == first.keys()


def test_shares_hold_over_many_patients():
    for state, shares in spider.SHARES.items():
        found = Counter(pool_of("training", state, p, 1) for p in range(600))
        assert abs(sum(shares.values()) - 1) < 1e-9 and all(abs(found[pool]/600 - share) < 0.08 for pool, share in shares.items()) and set(found) == set(shares)
    assert pool_of("validation", "healthy", 1) == pool_of("validation", "disputed", 1) == "test" and pool_of("validation", "unknown", 1) is None
