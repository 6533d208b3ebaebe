"""The report as a reader relies on it: known numbers, planted and null differences, joined seeds, text from data that stays text, and run folders that lack something."""
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from anomaly_nb import breakdown, figures, judgement, ranking, report, results
from anomaly_nb.core import InputError, write_json
from anomaly_nb.page import SCRIPT, text
from anomaly_nb.ledger import Ledger
from anomaly_nb.evaluation import Case, read_slices, save_case_histograms, save_map_slices, save_slices
from anomaly_nb.methods import fold_table, task_table
from anomaly_nb.metrics.binned import bin_histograms, bootstrap_binned
from anomaly_nb.metrics.streaming import ScoreHistograms, fit_scale
from anomaly_nb.metrics.uncertainty import bootstrap_histograms, subject_weights

PICTURES = report.picture


@pytest.fixture(autouse=True)
def pictures(monkeypatch, request):
    "Figures are drawn and not stored, but where a test is about them: it is most of a report's time."
    def quick(source, about, **more):
        if not hasattr(source, "savefig"): return PICTURES(source, about, **more)
        plt.close(source)
        return f'<figure><img alt="{text(about)}" src="data:image/png;base64,iVBORw0KGgo="><figcaption>{text(about)}</figcaption></figure>'
    if "needs_nothing_else" not in request.node.name: monkeypatch.setattr(report, "picture", quick)


BAD = '<script>alert(1)</script><img src=x onerror=alert(2)>"\'&'
SHAPE = (3, 8, 8)


def people(n, family="glioma"):
    "Truth of n healthy and n ill subjects: the same for every method of a test."
    rng, found = np.random.default_rng(5), []
    for i in range(2 * n):
        mask = np.zeros(SHAPE, bool)
        if i % 2: mask[1, 2:5, 2:5] = True
        found.append((f"s{i:03d}", mask, rng.normal(), family if i % 2 else "normal"))
    return found


def write_run(place, model, skill, seed=0, n=30, baseline=False, maps=True, slices=False, histograms=True, name=None, mark="", family="glioma", shift=None, **metrics):
    "A run folder as `evaluate` leaves it, and the pooled (label, score) of its voxels. `skill`: distance of lesion scores from healthy ones; `shift`: skill of this seed only; `mark`: put before ids."
    own = np.random.default_rng([seed, *map(ord, model)])
    folder, cases, rows = place/(name or f"evaluate-{model}-{seed}"), [], []
    (folder/"scores").mkdir(parents=True); (folder/"figures").mkdir(); (folder/"maps").mkdir()
    for k, (subject, mask, hard, kind_of) in enumerate(people(n, family)):
        score = own.normal(size=SHAPE) + mask * (skill + (shift or 0)) * (1 + 0.3 * hard)
        np.save(folder/"maps"/f"{k}.npy", score.astype(np.float32)[None])
        about = {"family": kind_of if mask.any() else None, "site": f"{mark}{'AB'[k // 2 % 2]}"}
        cases.append(Case(mark + subject, mark + subject, int(mask.any()), True, about, score[None].astype(np.float32), mask, np.ones(SHAPE, bool), {"residual": folder/"maps"/f"{k}.npy"}))
        rows.append({"kind": "residual", "id": mark + subject, "subject": mark + subject, "label": int(mask.any()), "family": kind_of, "site": about["site"], "mask_known": True,
                     "score": own.normal(skill * mask.any() + 0.3 * hard), "voxels": mask.size, "lesion_voxels": mask.sum(), "marked_voxels": int((score > 2).sum()), "dice": 0.1 if mask.any() else None, "ap": average_precision_score(mask.ravel(), score.ravel()) if mask.any() else None})
    label, score = np.concatenate([c.mask.ravel() for c in cases]), np.concatenate([c.map("residual").ravel() for c in cases])
    numbers = {"method": model, "baseline": baseline, "image": {"auroc": 0.6}, "counts": {"subjects": 2 * n, "anomalous": n, "mask_unknown": 0}, "protocol": {"text": f"all voxels {mark}", "image_score_from": "fixed", "fpr": 0.01},
               "subject": {"auroc": roc_auc_score([r["label"] for r in rows], [r["score"] for r in rows])}}
    if maps:
        ap = average_precision_score(label, score)
        numbers |= {"pixel": {"ap": ap, "prevalence": label.mean()}, "families": {family: {"subjects": n, "pixel_ap": ap, "prevalence": label.mean()}}}
        if histograms: save_case_histograms(cases, cases[::2], "residual", folder/"scores"/"residual.npz")
        if slices: save_slices(cases, folder/"scores"/"slices.npz"); save_map_slices(cases, cases[::2], "residual", folder/"scores"/"slices-residual.npz")
    pd.DataFrame(rows).to_csv(folder/"scores"/"subjects.csv", index=False)
    if not baseline: pd.DataFrame({"stage": f"train{mark}", "epoch": range(3), "train_loss": [3., 2, 1], "val_loss": [3., 2, 2]}).to_csv(folder/"scores"/"history.csv", index=False)
    write_json(folder/"metrics.json", {"dataset": "toy", "size": "tiny", "contrast": "T1", "dims": 3, "model": model, "model_options": "", "seed": seed, "baseline": baseline, "kinds": {"residual": numbers}, **metrics})
    write_json(folder/"params.json", {"parameters": {"model": model, "seed": seed, "epochs": 3, "path": f"/elsewhere/{folder.name}"}})
    write_json(folder/"provenance.json", {"commit": "c0ffee" + mark, "dirty": True, "wall_seconds": 3.0, "peak_memory_mib": 100, "device": f"cpu{mark}", "versions": {"torch": "2"}, "data_manifest": {"test": "cafe"}})
    return folder


class Seen(HTMLParser):
    "What a browser would make of a page: names of elements and of event attributes, addresses, and the text."
    def __init__(self, page):
        super().__init__()
        self.tags, self.events, self.links, self.text = set(), set(), [], ""
        self.feed(page.replace(f"<script>{SCRIPT}</script>", "", 1))             # the page's own; any other is seen

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.events |= {a for a, _ in attrs if a.startswith("on")}
        self.links += [v for a, v in attrs if a in ("src", "href", "srcset", "action", "data", "poster")]

    def handle_data(self, data): self.text += data


def write(folders, place, **more):
    "(table, page) of a report."
    table = report.write_report(folders, place/"report.html", n_boot=more.pop("n_boot", 150), **more)
    return table, (place/"report.html").read_text(encoding="utf-8")


def group_of(folders):
    found, = results.comparable([results.read_result(f) for f in folders])
    return found


def test_known_numbers_a_planted_and_a_null_difference(tmp_path):
    folders = [write_run(tmp_path, "good", 2.5), write_run(tmp_path, "twin1", 1.2), write_run(tmp_path, "twin2", 1.2), write_run(tmp_path, "base", 0.3, baseline=True)]
    group = group_of(folders)
    found = ranking.scores(group)
    for f in folders:                                                       # the truth is scikit-learn's on the pooled voxels
        m = json.loads((f/"metrics.json").read_text())
        assert found[m["model"]]["voxel AP", ""].value == pytest.approx(m["kinds"]["residual"]["pixel"]["ap"], abs=1e-6)
        assert found[m["model"]]["subject AUROC", ""].value == pytest.approx(m["kinds"]["residual"]["subject"]["auroc"])
    said = lambda a, b: ranking.verdict(ranking.versus(found[a]["voxel AP", ""], found[b]["voxel AP", ""]))
    assert said("good", "twin1") == "better" and said("base", "good") == "worse"
    assert said("twin1", "twin2") == "undecided"
    table, page = write(folders, tmp_path)
    assert table["method"].tolist()[0] == "good" and table.set_index("method").loc["good", "against"] == "better"
    assert "good has the highest" in page and "is better than the best baseline, base" in page and "It is better than every other method here." in page
    assert "one training seed" in page and "One training seed:" in page


def test_intervals_are_those_of_the_exact_bootstrap(tmp_path):
    "The thousand levels of the report against all 65 536, on the same draws."
    folder = write_run(tmp_path, "good", 1.0)
    result = results.read_result(folder)
    from anomaly_nb.metrics.streaming import load_histograms
    exact = load_histograms(folder/"scores"/"residual.npz")
    weights = subject_weights(60, 300, strata=[bool(exact.regions[s]) for s in exact.subjects])
    slow, fast = bootstrap_histograms(exact, weights)["ap"], bootstrap_binned(ranking.read_binned(result, "residual"), weights)["ap"]
    assert np.abs(slow - fast).max() < 0.003


def test_equal_methods_are_never_ordered_in_words(tmp_path):
    "Six pairs of methods without a difference: at most two are decided, and an undecided one is never called better."
    decided = 0
    for k in range(6):
        folders = [write_run(tmp_path/str(k), f"a{k}", 1.0), write_run(tmp_path/str(k), f"b{k}", 1.0)]
        group = group_of(folders)
        found = ranking.scores(group, n_boot=300)
        names, pairs = ranking.compare(group, found)
        undecided = ranking.verdict(pairs[tuple(names)]) == "undecided"
        decided += not undecided
        assert ("better than every" in judgement.summary(group, found)[0]) == (not undecided)
    assert decided <= 2


def test_seeds_are_joined_and_widen_the_interval(tmp_path):
    "Three trainings of very different luck: one row, the mean, and an interval that knows about training; a missing seed is said."
    folders = [write_run(tmp_path, "net", 1.5, seed=s, shift=shift) for s, shift in enumerate((-0.9, 0.0, 0.9))] + [write_run(tmp_path, "other", 1.2, seed=s) for s in (0, 1)] + [write_run(tmp_path, "base", 0.2, baseline=True)]
    group = group_of(folders)
    joined = ranking.scores(group)["net"]["voxel AP", ""]
    each = [json.loads((f/"metrics.json").read_text())["kinds"]["residual"]["pixel"]["ap"] for f in folders[:3]]
    assert joined.value == pytest.approx(np.mean(each), abs=1e-6)
    single = ranking.scores(group_of(folders[1:2]))["net"]["voxel AP", ""]
    assert np.ptp(np.quantile(joined.draws, [.025, .975])) > 1.5 * np.ptp(np.quantile(single.draws, [.025, .975]))
    table, page = write(folders, tmp_path)
    assert table["method"].tolist().count("net") == 1 and table.set_index("method")["seeds"].to_dict() == {"net": 3, "other": 2, "base": 1}
    assert "3 training seeds" in page and "Without training seed 2: other." in page
    assert "Without training seed 1, 2: base" not in page                     # a baseline needs one run


def test_runs_of_other_data_are_never_in_one_table(tmp_path):
    folders = [write_run(tmp_path, "net", 1.0), write_run(tmp_path, "net", 1.0, name="T2", contrast="T2"), write_run(tmp_path, "net", 1.0, name="options", data_options="lesion_contrast=0.5"), write_run(tmp_path, "net", 1.0, name="set")]
    write_json(folders[3]/"provenance.json", {"data_manifest": {"test": "another"}})
    groups = results.comparable([results.read_result(f) for f in folders])
    assert len(groups) == 4 and len({g.heading for g in groups}) == 4 and all(len(g.methods) == 1 for g in groups)
    table, page = write([folders[0], folders[3]], tmp_path)                            # one name, two test sets
    assert table["data"].nunique() == 2 and "2 groups of runs" in page
    assert page.count('class="summary"') == 2 and "minus the leader" not in page       # nothing to compare within a group


def test_text_from_data_stays_text(tmp_path):
    name = 'evaluate-<b>x"-onerror=1'
    folder = write_run(tmp_path, f"net {BAD}", 1.5, name=name, mark=BAD, family=f"fam {BAD}", slices=True, model_options=f"path={BAD}", contrast=BAD)
    other = write_run(tmp_path, "base", 0.2, mark=BAD, family=f"fam {BAD}", baseline=True, slices=True, contrast=BAD)
    (folder/"figures"/"panel-<i>&.png").write_bytes(b"\x89PNG small")
    table, page = write([folder, other], tmp_path, failed=[(f"run {BAD}", f"cell 3\nValueError: {BAD}\n\nTraceback {BAD}\n  last {BAD}")])
    seen = Seen(page)
    assert not seen.tags & {"script", "iframe", "object", "embed", "link", "i", "base", "form"} and not seen.events
    assert BAD in seen.text and "ValueError: " + BAD in seen.text               # and what was written is read
    assert page.count("<script") == 1 and "<img src=x" not in page and "<b>x" not in page
    assert BAD in " ".join(table["method"])


def test_the_page_needs_nothing_else(tmp_path):
    table, page = write([write_run(tmp_path, "net", 1.5, slices=True), write_run(tmp_path, "base", 0.5, baseline=True, slices=True)], tmp_path)
    links = Seen(page).links
    assert links and all(v.startswith(("data:image/png;base64,", "#", "report-tables/")) for v in links)      # the tables lie beside the page; nothing is loaded
    written = re.sub(r'src="data:[^"]*"', "", page).replace(SCRIPT, "")          # pictures may spell anything
    assert not any(word in written for word in ("http:", "https:", "url(", "@import", "//"))
    anchors = {v[1:] for v in links if v.startswith("#")}
    assert anchors and all(f'id="{a}"' in page for a in anchors)                # the contents lead somewhere
    assert len(page) < 8e6 and "Contour: truth." in page and "<figure>" in page.split("Cases</h3>")[1][:40]


def test_a_method_without_maps_is_named_and_stays_out_of_voxel_tables(tmp_path):
    folders = [write_run(tmp_path, "net", 1.5), write_run(tmp_path, "labels", 2.5, maps=False), write_run(tmp_path, "base", 0.3, baseline=True)]
    table, page = write(folders, tmp_path)
    row = table.set_index("method").loc["labels"]
    assert row["voxel AP"] is None or np.isnan(row["voxel AP"])
    assert np.isfinite(row["subject AUROC"]) and row["subject AUROC interval"] is not None
    assert "Without maps, and so in no voxel table: labels." in page
    group = group_of(folders)
    found = ranking.scores(group)
    assert "labels" not in ranking.best_kinds(group, found) and "labels" in ranking.best_kinds(group, found, "subject AUROC")
    assert "labels" not in breakdown.part_html(group, ranking.scores(group, ranking.test_parts(group), n_boot=50), "family", "voxel AP", ["net", "labels", "base"])
    write([folders[1]], tmp_path)                                              # alone, too


def test_failed_runs_are_told_with_the_end_of_their_traceback(tmp_path):
    long = "cell 4\nRuntimeError: out of memory\n\n" + "\n".join(f"line {i}" for i in range(100))
    _, page = write([write_run(tmp_path, "net", 1.0)], tmp_path, failed=[("evaluate-brain-vae", long), ("evaluate-brain-ae", "ended by signal 9"), ("silent", "")])
    said = Seen(page).text
    assert "3 failed" in said and "RuntimeError: out of memory" in said and "line 99" in said and "line 50" not in said
    assert "ended by signal 9" in said and "no message" in said


@pytest.mark.parametrize("n", [1, 2])
def test_one_subject_decides_nothing(tmp_path, n):
    folders = [write_run(tmp_path, "net", 3.0, n=n, slices=True), write_run(tmp_path, "base", 0.1, n=n, baseline=True, slices=True)]
    table, page = write(folders, tmp_path)
    assert table["against"].tolist() == ["undecided", ""] and "every order of methods is undecided" in page
    assert "is better than" not in page and "One family of anomalies: glioma." in page


def test_a_healthy_test_set_has_no_ranking_and_a_page(tmp_path):
    "A person's own healthy scans: no lesion, no AP, no AUROC; the share of marked voxels is what there is to say."
    folder = write_run(tmp_path, "net", 1.0)
    metrics = json.loads((folder/"metrics.json").read_text())
    numbers = metrics["kinds"]["residual"]
    numbers |= {"pixel": {"ap": None, "prevalence": 0.0}, "subject": {"auroc": None}, "families": {}, "image": {"auroc": None}}
    write_json(folder/"metrics.json", metrics)
    rows = pd.read_csv(folder/"scores"/"subjects.csv")
    rows[rows["label"] == 0].drop(columns=["ap", "dice"]).assign(marked_voxels=48).to_csv(folder/"scores"/"subjects.csv", index=False)
    table, page = write([folder], tmp_path)
    assert "not known for any method" in page and table["healthy marked"][0] == pytest.approx(0.25)
    assert ">25.0<" in page


def test_a_patient_without_a_mask_is_shown(tmp_path):
    "Own scans: healthy ones and a patient whose lesion nobody drew. No AP, but a case with its map, marked unknown."
    folder = write_run(tmp_path, "net", 1.0, slices=True)
    metrics, path = json.loads((folder/"metrics.json").read_text()), folder/"scores"/"subjects.csv"
    metrics["kinds"]["residual"] |= {"pixel": {"ap": None, "prevalence": 0.0}, "subject": {"auroc": 0.9}, "families": {"glioma": {"subjects": 1, "subject_auroc": 0.9}}}
    write_json(folder/"metrics.json", metrics)
    rows = pd.read_csv(path)
    rows = pd.concat([rows[rows["label"] == 0], rows[rows["label"] == 1].iloc[:1].assign(mask_known=False, ap=np.nan, dice=np.nan, lesion_voxels=np.nan)])
    rows.to_csv(path, index=False)
    group = group_of([folder])
    fig, rule = figures.panel_figure(group, ["net"])
    assert fig is not None and "cases by the score of net" in rule
    table, page = write([folder], tmp_path)
    assert "Voxel AP: not known for any method" in page and "every order of methods is undecided" in page


def test_methods_stand_under_their_approach(tmp_path):
    folders = [write_run(tmp_path, m, skill, name=f"evaluate-{m}", baseline=m == "mean") for m, skill in (("vae", 1.0), ("cevae", 2.0), ("ae", 0.5), ("mean", 0.3), ("gone", 0.2))]
    report.write_report(folders, tmp_path/"page.html", n_boot=50)
    page = (tmp_path/"page.html").read_text()
    start = page.rindex("By approach<")
    part = Seen(page[start:page.index("Sites<", start)]).text
    places = [part.index(w) for w in ("no learning", "mean", "autoencoder", "variational", "cevae", "other", "gone")]
    assert places == sorted(places) and part.index("cevae") < part.index("vae", part.index("cevae") + 5)          # the catalog's order; within an approach the better first
    alike = [write_run(tmp_path/"alike", m, 1.0, name=f"evaluate-{m}", baseline=m == "mean") for m in ("vae", "cevae", "mean")]
    report.write_report(alike, tmp_path/"alike.html", n_boot=50)
    assert "By approach" not in (tmp_path/"alike.html").read_text()                                                # one approach: nothing to group


def test_run_folders_that_lack_something(tmp_path):
    "No scores at all, no slices, no history, an older metrics.json: a page nevertheless; a broken file is named."
    bare = write_run(tmp_path, "bare", 1.0)
    for path in (bare/"scores").iterdir(): path.unlink()
    old = write_run(tmp_path, "old", 1.0, histograms=False)
    metrics = json.loads((old/"metrics.json").read_text())
    for key in ("protocol", "counts", "families", "method", "baseline"): metrics["kinds"]["residual"].pop(key)
    write_json(old/"metrics.json", metrics)
    table, page = write([bare, old, write_run(tmp_path, "net", 1.0)], tmp_path)
    assert set(table["method"]) == {"bare", "old", "net"} and "no panels" in page
    assert table.set_index("method").loc["bare", "voxel AP interval"] is None
    with pytest.raises(InputError, match="no runs"): report.write_report([], tmp_path/"none.html")
    assert not (tmp_path/"none.html").exists()


@pytest.mark.parametrize("name, content", [("binned-residual.npz", b"broken"), ("slices.npz", b"PK"), ("slices-residual.npz", b""), ("history.csv", b'a,b\n1,"2'), ("history.csv", b""), ("subjects.csv", b"\xff\xfe"), ("subjects.csv", b""),
                                           ("paper_table.csv", b"part,split\n"), ("paper_table.csv", b""), ("../metrics.json", b"{"), ("../metrics.json", b'{"kinds": {"residual": {"pixel": 3}}}'), ("../metrics.json", b'{"kinds": {"../../x": {}}}'), ("../provenance.json", b"[]"), ("../provenance.json", b"")])
def test_a_broken_stored_file_costs_its_own_run(tmp_path, name, content):
    "It is named, with what to do; the other runs have their page. Alone, it is an error and nothing is written."
    whole, broken = write_run(tmp_path, "whole", 1.0, slices=True), write_run(tmp_path, f"broken {BAD}", 2.0, slices=True, name="broken-run")
    (broken/"scores"/name).write_bytes(content)
    table, page = write([whole, broken], tmp_path)
    assert table["method"].tolist() == ["whole"] and [n for n, _ in table.attrs["left_out"]] == ["broken-run"]
    said = Seen(page).text
    assert "broken-run" in said and Path(name).name in said and "stand in no table" in said
    with pytest.raises(InputError, match="no readable runs"): report.write_report([broken], tmp_path/"none.html")
    assert not (tmp_path/"none.html").exists()


def test_a_broken_picture_is_named_and_costs_nothing_else(tmp_path):
    folder = write_run(tmp_path, "net", 1.0)
    (folder/"figures"/"panel-residual.png").write_bytes(b"\x89PNG" + b"0" * 100_000)
    table, page = write([folder], tmp_path)
    assert "panel-residual.png cannot be read" in page and table.attrs["left_out"] == []


def test_one_site_has_no_section_and_one_subject_is_no_plural(tmp_path):
    folders = [write_run(tmp_path, "net", 3.0, n=1), write_run(tmp_path, "base", 0.1, n=1, baseline=True)]
    for f in folders:
        rows = pd.read_csv(f/"scores"/"subjects.csv")
        rows.assign(site="A").to_csv(f/"scores"/"subjects.csv", index=False)
    _, page = write(folders, tmp_path)
    assert "Sites</h3>" not in page and "1 subject with" in page and "1 subjects" not in page
    _, page = write([write_run(tmp_path/"two", "net", 1.0)], tmp_path)
    assert "Sites</h3>" in page
    assert all(re.search(r"<(p|ul|div|table|figure|h4|details|pre)", part) for part in re.split(r"<h[23][^>]*>[^<]*</h[23]>", page)[1:])       # no heading over nothing


def test_a_run_with_a_section_of_its_own(tmp_path):
    "Its words, figure and table, escaped; alone too; a broken section is named."
    run = tmp_path/"asks"
    (run/"scores").mkdir(parents=True); (run/"figures").mkdir()
    write_json(run/"metrics.json", {"kinds": {}})
    section = {"title": f"Is it so? {BAD}", "text": f"Yes. {BAD}", "figures": ["scatter"], "tables": {"choices": f"By rule {BAD}"}}
    write_json(run/"section.json", section)
    (run/"figures"/"scatter.png").write_bytes(b"\x89PNG small")
    pd.DataFrame({BAD: ["last", BAD], "AP": [0.12345, None]}).to_csv(run/"scores"/"choices.csv", index=False)
    for folders in ([run], [run, write_run(tmp_path, "net", 1.0)]):
        table, page = write(folders, tmp_path)
        seen = Seen(page)
        assert not seen.tags & {"script"} and not seen.events and f"Is it so? {BAD}" in seen.text and f"By rule {BAD}" in seen.text and "0.123" in seen.text
        assert len(table) == len(folders) - 1 and f"{len(folders)} run" in seen.text
        report.print_table(table)
    for wrong in ({"title": 3}, section | {"figures": ["../../etc"]}, section | {"tables": {"none": "x"}}, [1]):
        write_json(run/"section.json", wrong)
        table, page = write([run, tmp_path/"evaluate-net-0"], tmp_path)
        assert [n for n, _ in table.attrs["left_out"]] == ["asks"] and "cannot be read as a section" in page


def write_folds(folder, seed=0, n=40, skill=0.8, mark=""):
    "A table over folds beside the scores of a run: two splits of three tasks, the last fold of 2/1 missing."
    rng, masks = np.random.default_rng(seed), [np.zeros((1, 8, 8), bool) for _ in range(n)]
    for m in masks[1::2]: m[0, 2:5, 2:5] = True
    label, rows = [m.any() for m in masks], []
    parts, weights = fold_table.parts_of(label, [("", f"cyst{mark}", "", "bleed")[i % 4] for i in range(n)]), fold_table.people_weights(range(n), label, 100)
    for split, folds in (("1/2", 3), ("2/1", 2)):
        maps = [[rng.normal(0, 0.5, m.shape) + skill * m for m in masks] for _ in range(folds)]
        single = [fold_table.measured_row(split, "fold", task_table.condense(masks, one), parts, weights, k, f"sink{mark}") for k, one in enumerate(maps)]
        joint = task_table.condense(masks, [np.mean(m, 0) for m in zip(*maps)])
        rows += [*single, fold_table.mean_row(single), fold_table.measured_row(split, "ensemble", joint, parts, weights, folds=folds)]
    frame = fold_table.table_of([*rows, fold_table.random_row(joint, parts, weights)], parts, label)
    frame.to_csv(folder/"scores"/"paper_table.csv", index=False)
    fold_table.save_draws(rows, folder/"scores"/"paper_draws.npz")
    return frame


def test_every_table_over_folds_has_its_section(tmp_path):
    "Per cent, joined over seeds, text as text, missing folds said; a table of other parameters is another section."
    folders = [write_run(tmp_path, "many", 1.0, seed=s) for s in (0, 1)] + [write_run(tmp_path, "other", 1.0), write_run(tmp_path, "plain", 1.0)]
    frames = [write_folds(f, s, mark=BAD) for s, f in enumerate(folders[:3])]
    _, page = write(folders, tmp_path)
    seen = Seen(page)
    assert not seen.tags & {"script", "iframe"} and not seen.events and f"family cyst{BAD}" in seen.text
    assert page.count("Task folds</h3>") == 1 and page.count("Task folds, table 2</h3>") == 1
    first, second, third = (f[(f["part"] == "all") & (f["split"] == "1/2") & (f["row"] == "ensemble")]["pixel_ap"].item() for f in frames)
    assert f"{50 * (first + second):.1f} ± {100 * np.std([first, second], ddof=1):.1f}" in seen.text and f"{100 * third:.1f}" in seen.text
    assert "ensemble of 2/1: 2 of 3" in seen.text and "fold 2" in seen.text and "chance" in seen.text
    assert "ensemble<br><small>minus 1/2 mean" in page or "1/2 ensemble" in seen.text


def test_a_table_without_draws_and_one_of_a_single_split(tmp_path):
    folder = write_run(tmp_path, "many", 1.0)
    frame = write_folds(folder)
    frame[(frame["split"] != "2/1") & (frame["part"] == "all") & (frame["row"] != "random")].to_csv(folder/"scores"/"paper_table.csv", index=False)
    (folder/"scores"/"paper_draws.npz").unlink()
    _, page = write([folder], tmp_path)
    assert "Task folds</h3>" in page and "Differences, in points" not in page and "AP / AUROC" not in page


def test_textures_and_pictures_are_no_population(tmp_path):
    _, page = write([write_run(tmp_path, "net", 1.0, dataset="textures")], tmp_path)
    assert "crops of one photograph" in page and "nothing about a population" in page and "embedded cohort" in page
    _, page = write([write_run(tmp_path, "net", 1.0, dataset="mvtec", name="mvtec")], tmp_path)
    assert "Intervals are over pictures" in page and "embedded cohort" not in page


def test_the_terminal_table(tmp_path, monkeypatch):
    "Names with brackets are names; one line a method; the columns fit."
    table, _ = write([write_run(tmp_path, "net [red]x[/red]", 1.5, seed=s) for s in (0, 1)] + [write_run(tmp_path, "base", 0.2, baseline=True)], tmp_path)
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    report.print_table(table)
    lines = out.getvalue().splitlines()
    assert sum("net [red]x[/red]" in line for line in lines) == 1 and max(map(len, lines)) <= 130
    assert "0.0" in out.getvalue() and "better" in out.getvalue() and "and seeds" in out.getvalue()


def test_stored_slices_of_pictures_and_odd_sizes(tmp_path):
    "Single pictures (D = 1) of different sizes, one larger than is kept; rarity is in [0, 4] and 0 where nothing counts."
    rng, cases = np.random.default_rng(0), []
    for k, (h, w) in enumerate(((20, 30), (33, 12), (600, 400))):
        value = rng.normal(size=(1, 1, h, w)).astype(np.float32)
        inside = np.ones((1, h, w), bool); inside[0, :3] = False
        value[0][~inside] = np.nan
        np.save(tmp_path/f"{k}.npy", value)
        mask = np.zeros((1, h, w), bool); mask[0, 10, 5] = k > 0
        cases.append(Case(f"{BAD}{k}", f"{k}", int(k > 0), True, {"family": "cut"}, np.nan_to_num(value), mask, inside, {"map": tmp_path/f"{k}.npy"}))
    save_slices(cases, tmp_path/"scores"/"slices.npz"); save_map_slices(cases, cases[:1], "map", tmp_path/"scores"/"slices-map.npz")
    kept, rarity = read_slices(tmp_path), read_slices(tmp_path, "map")
    assert kept[f"{BAD}2"]["shape"] == (200, 134) and kept[f"{BAD}2"]["mask"].sum() == 1 and kept[f"{BAD}0"]["mask"].sum() == 0
    for i, r in rarity.items():
        assert r.min() >= 0 and r.max() <= np.log10(20 * 30) and (r[~kept[i]["counted"]] == 0).all()


def test_the_same_subjects_are_drawn_for_methods_and_others_are_not_compared(tmp_path):
    one, two = write_run(tmp_path, "one", 1.0), write_run(tmp_path, "two", 1.0, n=29)
    group = group_of([one, two])                                              # the same hash by mistake, other subjects
    found = ranking.scores(group, n_boot=100)
    assert ranking.versus(found["one"]["voxel AP", ""], found["two"]["voxel AP", ""]) is None
    table, page = write([one, two], tmp_path)
    assert "not comparable" in page


def test_binned_levels_are_exact_where_nothing_can_be_joined():
    "Few scores: every level stays alone but for ties, so the AP is that of scikit-learn."
    rng = np.random.default_rng(0)
    label, score = rng.random((6, 1, 4, 4)) < 0.3, rng.normal(size=(6, 1, 4, 4)).astype(np.float32)
    h = ScoreHistograms(fit_scale(score))
    for i in range(6): h.add(f"s{i}", label[i], score[i])
    assert bootstrap_binned(bin_histograms(h), np.ones((1, 6)))["ap"][0] == pytest.approx(average_precision_score(label.ravel(), score.ravel()), abs=1e-6)


def test_colours_are_distinct_for_twelve_methods(tmp_path):
    folders = [write_run(tmp_path, f"net{i}", 1.0, n=2) for i in range(7)] + [write_run(tmp_path, f"base{i}", 1.0, n=2, baseline=True) for i in range(5)]
    group = group_of(folders)
    styles = figures.line_styles(group, [m.name for m in group.methods])
    assert len({(s["color"], str(s["linestyle"])) for s in styles.values()}) == 12


def test_tables_beside_the_page_are_numbers_and_harmless_text(tmp_path):
    "A method, a family and ids that a spreadsheet would run, LaTeX that would read a file: text in every format; the files have the names of the code."
    evil = '=HYPERLINK("http://x","y")\r@SUM(1)\\input{/etc/passwd}'
    folders = [write_run(tmp_path/"runs", evil, 1.5, seed=s, name=f"evaluate-{s}", mark="=1+", family="+cmd|x!A0") for s in (0, 1)] + [write_run(tmp_path/"runs", "base", 0.3, baseline=True, mark="=1+", family="+cmd|x!A0")]
    table, page = write(folders, tmp_path, failed=[("../../@lost", "-2+3")], n_boot=100)
    place = tmp_path/"report-tables"
    assert {p.name for p in place.iterdir() if p.suffix != ".parquet"} == {"ranking.csv", "ranking.tex", "pairs.csv", "parts.csv", "trainings.csv", "thresholds.csv", "not_run.csv"} and sorted(p.name for p in tmp_path.iterdir()) == ["report-tables", "report.html", "runs"]
    for file in place.glob("*.csv"):
        cells = [c for row in csv.reader(io.StringIO(file.read_text(encoding="utf-8"), newline="")) for c in row]
        assert not [c for c in cells if re.match(r"\s*[=+@\t-]", c) and not re.fullmatch(r"-?[\d.e+-]+", c)] and not any("\r" in c or "\n" in c for c in cells)
    ranked = pd.read_csv(place/"ranking.csv")
    assert ranked["method"].tolist() == ["'" + evil.replace("\r", " "), "base"] and ranked["voxel AP"].tolist() == pytest.approx(table["voxel AP"].tolist()) and ranked["voxel AP group"].tolist() == ["a", "b"]
    pairs = pd.read_csv(place/"pairs.csv")
    assert (pairs["alone"] == "better").all() and pairs["told apart at once"].all() and (pairs["low"] > 0).all()
    tex = (place/"ranking.tex").read_text(encoding="utf-8")
    assert r"\input" not in tex and r"\textbackslash{}input\{/etc" in tex
    assert "report-tables/ranking.csv" in Seen(page).links and ("pyarrow is not installed" in page) != (place/"ranking.parquet").exists()


def test_tables_that_cannot_be_written_cost_nothing_else(tmp_path):
    (tmp_path/"report-tables").write_text("a file is in the way")
    table, page = write([write_run(tmp_path/"runs", "net", 1.0)], tmp_path, n_boot=50)
    assert "The tables could not be written" in page and len(table) == 1


def test_what_did_not_run_is_named_with_its_state(tmp_path):
    "From the list given, the folders of unfinished runs and the ledger; a page over some runs of a folder tells only of its own."
    runs = tmp_path/"runs"
    done = [write_run(runs, m, 1.0) for m in ("net", "other")]
    for name, state in (("failed/vae", {"state": "oom", "message": f"9 GiB {BAD}", "seconds": 61, "attempts": 3}), (".partial-ae", {"state": "timeout", "message": "after 60 s"}), (".partial-gan", {"state": BAD})): (runs/name).mkdir(parents=True); write_json(runs/name/"state.json", state)
    ledger = Ledger(runs)
    for name in ("waiting", "evaluate-net-0"): ledger.queue(name, "evaluate", {})
    _, page = write(done, tmp_path, failed=[("vae", "MemoryError"), (f"../{BAD}", "")], n_boot=50)
    seen = Seen(page)
    assert "2 runs, 2 failed, 1 oom, 1 timeout, 1 queued" in seen.text and "oom, after 61 s, 3 attempts" in seen.text and "after 60 s" in seen.text and "queued, its turn had not come: waiting" in seen.text
    assert "script" not in seen.tags and "evaluate-net-0 " not in seen.text[seen.text.rindex("Not run"):]
    _, page = write(done[:1], tmp_path, failed=[("vae", "MemoryError")], n_boot=50)                     # a sweep of its own in this folder
    assert "1 run, 1 oom" in page and "waiting" not in page
    (runs/"ledger.sqlite").write_bytes(b"broken" * 1000)
    assert "1 timeout" in write(done, tmp_path, n_boot=50)[1]


def test_numbers_are_joined_the_same_way_for_parts(tmp_path):
    "Voxel AP and subject AUROC of a family and a site by scikit-learn on the same people."
    folder = write_run(tmp_path, "net", 1.2)
    group, rows = group_of([folder]), pd.read_csv(folder/"scores"/"subjects.csv")
    found = ranking.scores(group, parts := ranking.test_parts(group), n_boot=100)["net"]
    site = next(p for p in parts if p.of == "site" and p.name == "A")
    here = rows[rows["site"] == "A"]
    assert found["subject AUROC", site].value == pytest.approx(roc_auc_score(here["label"], here["score"]))
    maps = {i: np.load(folder/"maps"/f"{k}.npy")[0] for k, i in enumerate(rows["id"])}
    truth = {s: m for s, m, *_ in people(30)}
    assert found["voxel AP", site].value == pytest.approx(average_precision_score(np.concatenate([truth[i].ravel() for i in here["id"]]), np.concatenate([maps[i].ravel() for i in here["id"]])), abs=2e-3)
    assert {p.of for p in parts} == {"family", "site", "control"} and found["subject AUROC", next(p for p in parts if p.of == "control")].n == 15


def test_several_images_of_a_person_are_one_person(tmp_path):
    "Counts, thirds by lesion size, their chance and what is marked in healthy people: all by person, as the draws are."
    folder = write_run(tmp_path, "net", 1.2)
    rows = pd.read_csv(folder/"scores"/"subjects.csv")
    rows["lesion_voxels"] = [3 * (1 + n // 2 % 3) if ill else 0 for n, ill in enumerate(rows["label"])]
    second = rows.assign(id=rows["id"] + "-2", lesion_voxels=2 * rows["lesion_voxels"], marked_voxels=0)
    pd.concat([rows, second, rows.assign(id=rows["id"] + "-3", label=0, lesion_voxels=0, family="normal")]).to_csv(folder/"scores"/"subjects.csv", index=False)
    group = group_of([folder])
    parts = ranking.test_parts(group)
    sizes = [p for p in parts if p.of == "size"]
    table = pd.read_csv(folder/"scores"/"subjects.csv")
    people = [set(table["subject"][p.split(table)[0]]) for p in sizes]
    assert [len(s) for s in people] == [10, 10, 10] and len(set.union(*people)) == 30
    used = table[table["subject"].isin(people[0]) | table["subject"].isin(rows["subject"][rows["label"] == 0])]
    assert judgement.part_prevalence(group, sizes[0]) == pytest.approx(used["lesion_voxels"].sum() / used["voxels"].sum())
    found = ranking.scores(group, parts, n_boot=50)["net"]
    assert found["voxel AP", sizes[0]].n == found["subject AUROC", sizes[0]].n == 10
    asked, share = breakdown.marked_shares(group.methods[0], n_boot=50)
    assert ranking.healthy_marked(group.methods[0]) == pytest.approx(share.estimate)
    _, page = write([folder], tmp_path, n_boot=50)
    assert "60 test subjects, 30 of them anomalous; 180 cases, " in page


def test_told_apart_at_once_is_told_apart_alone(tmp_path):
    "The bar by its definition; a pair beyond it whose own interval holds 0 is not told apart; letters are shared if and only if a pair is not."
    rng = np.random.default_rng(3)
    draws = rng.normal(size=(4, 500)) * 0.02 + (values := np.array([0.5, 0.46, 0.4, 0.2]))[:, None]
    apart, bar, errors = judgement.told_apart_at_once(values, draws)
    i, j = np.triu_indices(4, 1)
    d = draws[i] - draws[j]
    assert bar == pytest.approx(np.quantile((np.abs(d - d.mean(1, keepdims=True)) / d.std(1)[:, None]).max(0), 0.95)) and errors[i, j] == pytest.approx(d.std(1))
    assert (apart[i, j] == (np.abs(values[i] - values[j]) > bar * d.std(1))).all()
    group = group_of([write_run(tmp_path, m, 1.0) for m in ("one", "two")])
    far = np.r_[np.full(960, 0.1), np.full(40, -0.01)]                           # 4 % of draws below 0: the interval holds it, the bar does not
    found = {"one": {("voxel AP", ""): ranking.Score(0.3, 0.2 + far, 30, "same")}, "two": {("voxel AP", ""): ranking.Score(0.2, np.full(1000, 0.2), 30, "same")}}
    assert judgement.told_apart_at_once([0.3, 0.2], [0.2 + far, np.full(1000, 0.2)])[0].any() and not judgement.judge(group, found).apart.any()
