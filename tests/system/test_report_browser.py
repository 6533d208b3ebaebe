"""The report in a real browser: headless Chromium opens a page of toy runs, and a second page drives it as a reader would. Without Chromium it is listed as NOT RUN, and fails where CI is set."""
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_report import BAD, write_run

from anomaly_nb import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    if os.environ.get("CI"): pytest.fail("NOT RUN: no Chromium, and CI is set", pytrace=False)
    pytest.skip("NOT RUN: no Chromium on this machine", allow_module_level=True)


def browse(place, *more):
    return subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--allow-file-access-from-files", f"--user-data-dir={place/'profile'}", "--virtual-time-budget=8000", *more], capture_output=True, text=True, timeout=120)


def drive(page, script, width=1300):
    "Opens `page` in a frame as wide as asked for, runs `script` there (`doc`, `win`, `said`), and returns what it `said`."
    harness = page.with_name("harness.html")
    harness.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe id="f" src="{page.name}" style="width:{width}px;height:900px;border:0"></iframe><pre id="out"></pre><script>const said = {{}}, problems = [];'
                       'document.getElementById("f").onload = async () => { const win = document.getElementById("f").contentWindow, doc = win.document; win.addEventListener("error", e => problems.push(e.message)); await new Promise(r => setTimeout(r, 300));'
                       f'try {{ {script} }} catch (e) {{ problems.push(String(e)); }} document.getElementById("out").textContent = JSON.stringify({{said, problems}}); }};</script>', encoding="utf-8")
    done = browse(page.parent, f"--window-size={width},900", "--dump-dom", harness.as_uri())
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found and found.group(1), done.stderr[-2000:]
    told = json.loads(html.unescape(found.group(1)))
    assert told["problems"] == []
    return told["said"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("browser")
    folders = [write_run(place/"runs", m, k, seed=s, slices=True, mark=BAD, name=f"evaluate-{i}-{s}") for i, (m, k) in enumerate((("good", 2.5), (f"poor {BAD}", 0.9), ("x" * 3000, 1.2))) for s in (0, 1)]
    folders.append(write_run(place/"runs", "base", 0.3, baseline=True, slices=True, mark=BAD))
    report.write_report(folders, place/"runs"/"report.html", failed=[(f"lost {BAD}", f"ValueError: {BAD}")], n_boot=200)
    return place/"runs"/"report.html"


def test_nothing_from_the_data_runs_and_nothing_is_loaded(page):
    said = drive(page, 'said.alerts = 0; win.alert = () => said.alerts++; said.scripts = doc.scripts.length; said.images = [...doc.images].filter(i => !i.src.startsWith("data:")).length; said.loaded = win.performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;'
                       'const s = doc.createElement("script"); s.textContent = "window.broken = 1"; doc.body.append(s); said.broken = win.broken === undefined; const i = doc.createElement("img"); i.setAttribute("onerror", "window.broken = 2"); i.src = "data:,x"; doc.body.append(i);'
                       'await new Promise(r => setTimeout(r, 200)); said.still = win.broken === undefined; said.text = doc.body.textContent.includes("<script>alert(1)");')
    assert said == {"alerts": 0, "scripts": 1, "images": 0, "loaded": 0, "broken": True, "still": True, "text": True}      # even a script that got in would not run: the policy of the page


def test_a_table_is_sorted_by_mouse_and_keyboard(page):
    said = drive(page, 'const table = doc.querySelector("table.sort"), heads = [...table.tHead.rows[0].cells], at = heads.findIndex(h => h.textContent === "voxel AP"), column = () => [...table.tBodies[0].rows].map(r => r.cells[at].textContent);'
                       'said.before = column(); const b = heads[at].querySelector("button"); b.focus(); said.focus = doc.activeElement === b; b.click(); said.down = column(); said.sort = heads[at].getAttribute("aria-sort"); b.click(); said.up = column(); said.last = [...table.tBodies[0].rows].at(-1).className;'
                       'heads[0].querySelector("button").click(); said.names = [...table.tBodies[0].rows].map(r => r.cells[0].textContent.slice(0, 4)); said.one = table.querySelectorAll("[aria-sort]").length;')
    numbers = lambda column: [float(c[:5]) for c in column[:-1]]
    assert said["focus"] and said["sort"] == "descending" and numbers(said["down"]) == sorted(numbers(said["before"]), reverse=True) and numbers(said["up"]) == sorted(numbers(said["before"]))
    assert said["last"] == "chance" and said["names"][:3] == ["base", "good", "poor"] and said["one"] == 1


def test_cases_are_browsed_and_the_scale_is_shared_or_not(page):
    said = drive(page, 'const v = doc.querySelector(".viewer"), slider = v.querySelector("input[type=range]"), scale = v.querySelector("input[type=checkbox]"), canvas = [...v.querySelectorAll("canvas")], hash = c => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data].reduce((a, b) => (31 * a + b) | 0, 7);'
                       'said.maps = canvas.length; said.shown = v.querySelector(".told").textContent; said.first = canvas.map(hash); scale.click(); said.own = canvas.map(hash); scale.click(); said.back = canvas.map(hash);'
                       'slider.value = 3; slider.dispatchEvent(new win.Event("input")); said.third = v.querySelector(".told").textContent; said.other = hash(canvas[0]) !== said.first[0]; said.spoken = slider.getAttribute("aria-valuetext"); said.label = canvas.every(c => c.getAttribute("aria-label")); said.max = +slider.max; slider.focus(); said.focus = doc.activeElement === slider;')
    assert said["maps"] == 6 and said["shown"].startswith("1 of") and BAD in said["shown"] and said["third"].startswith("3 of") and said["spoken"] == said["third"] and said["other"] and said["label"] and said["focus"] and said["max"] >= 12
    assert said["own"][:2] == said["first"][:2] and all(a != b for a, b in zip(said["own"][2:], said["first"][2:])) and said["back"] == said["first"]      # the scale changes maps, never the image


@pytest.mark.parametrize("width", [1300, 390])
def test_the_page_fits_a_screen_and_a_telephone(page, width):
    "A name of three thousand characters wraps; what is wider scrolls in its own box, which a keyboard reaches; every picture has words."
    said = drive(page, 'said.wide = doc.documentElement.scrollWidth; said.boxes = [...doc.querySelectorAll(".wide")].filter(w => w.scrollWidth > w.clientWidth && w.tabIndex !== 0).length; said.bare = [...doc.images].filter(i => !i.alt && !i.classList.contains("atlas")).length; said.headless = [...doc.querySelectorAll("thead th")].filter(h => h.scope !== "col").length;'
                       'said.lang = doc.documentElement.lang; said.dead = [...doc.querySelectorAll("nav a")].filter(a => !doc.getElementById(a.hash.slice(1))).length;', width)
    assert said["wide"] <= width and (said["boxes"], said["bare"], said["headless"], said["lang"], said["dead"]) == (0, 0, 0, "en", 0)


def test_on_paper_everything_is_open_and_nothing_is_a_control(page):
    said = drive(page, 'win.dispatchEvent(new win.Event("beforeprint")); said.closed = doc.querySelectorAll("details:not([open])").length; win.dispatchEvent(new win.Event("afterprint")); said.open = doc.querySelectorAll("details[open]").length; said.folded = doc.querySelectorAll("details").length;'
                       'const rules = [...doc.styleSheets[0].cssRules].filter(r => r.conditionText === "print").map(r => r.cssText).join(" "); said.hidden = /\\.controls[^{]*\\.viewer[^{]*nav[^{]*\\{[^}]*display: none/.test(rules);')
    assert said["closed"] == 0 and said["open"] == 0 and said["folded"] > 1 and said["hidden"]
    done = browse(page.parent, f"--print-to-pdf={page.with_suffix('.pdf')}", page.as_uri())
    assert page.with_suffix(".pdf").stat().st_size > 50_000, done.stderr[-2000:]


def test_without_its_script_the_page_is_whole(page):
    bare = page.with_name("bare.html")
    bare.write_text(re.sub(r"<script>.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.S), encoding="utf-8")
    said = drive(bare, 'said.rows = doc.querySelectorAll("table tbody tr").length; said.viewer = getComputedStyle(doc.querySelector(".viewer")).display; said.buttons = doc.querySelectorAll("button, input").length; said.answers = doc.querySelectorAll("dl.answers dd").length;')
    assert said["rows"] > 10 and said["viewer"] == "none" and said["buttons"] == 0 and said["answers"] == 4
