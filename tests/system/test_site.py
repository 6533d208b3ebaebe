"""The web site of the course: built once from the stored outputs, every link followed, and looked at by headless Chromium. Without Chromium that part is listed as NOT RUN, and fails where CI is set."""
import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from anomaly_nb import catalog

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/"nbs"
sys.path.append(str(NBS/"site"))       # at the end: its build.py is not the package build
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="NOT RUN: no Chromium on this machine")
if subprocess.run([sys.executable, "-c", "import furo, myst_nb"], capture_output=True).returncode:
    if os.environ.get("CI"): pytest.fail("NOT RUN: the extra docs is not installed, and CI is set", pytrace=False)
    pytest.skip("NOT RUN: the extra docs is not installed (make docs)", allow_module_level=True)
import formulas
import terms
from course import notebooks


class Page(HTMLParser):
    "What a page holds: anchors, links, what is loaded, images, terms; and the text outside of code."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.images, self.terms, self.inside, self.text = set(), [], [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        if "id" in given: self.ids.add(given["id"])
        if name == "a" and "name" in given: self.ids.add(given["name"])
        if name == "a" and given.get("href") is not None: self.links.append(given["href"])
        if name in ("script", "img", "iframe", "source", "video", "embed") and given.get("src"): self.loaded.append(given["src"])
        if name == "link" and set(given.get("rel", "").split()) & {"stylesheet", "icon", "preload", "shortcut"}: self.loaded.append(given["href"])
        elif name == "link" and given.get("href"): self.links.append(given["href"])
        if name == "img": self.images.append(given)
        if name == "a" and "term" in given.get("class", "").split(): self.terms.append((given["href"], tuple(n for n, _ in self.inside)))
        if name not in ("img", "br", "hr", "input", "meta", "link", "source", "wbr", "col", "path", "use", "circle", "line", "rect", "polyline", "polygon"): self.inside.append((name, given.get("class", "")))

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if self.inside and self.inside[-1][0] == name: self.inside.pop()

    def handle_endtag(self, name):
        if any(n == name for n, _ in self.inside):
            while self.inside.pop()[0] != name: pass

    def handle_data(self, text):
        if not {"code", "pre", "script", "style", "svg", "title"} & {n for n, _ in self.inside}: self.text.append(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out, began = tmp_path_factory.mktemp("site")/"_docs", time.monotonic()
    done = subprocess.run([sys.executable, NBS/"site"/"build.py", out], capture_output=True, text=True, timeout=900)
    print(f"built in {time.monotonic() - began:.0f} s")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out


@pytest.fixture(scope="module")
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob("*.html"))}


def test_every_notebook_has_a_page(site):
    wanted = {p.relative_to(NBS).with_suffix(".html") for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert len(wanted) > 200 and not [w for w in wanted if not (site/w).is_file()]
    assert not (site/"_sources").exists() or not list((site/"_sources").rglob("*.txt"))


def broken(site, pages):
    "Links and anchors that lead nowhere, and what would be loaded from elsewhere."
    problems, outside = [], set()
    for name, page in pages.items():
        for link in page.links + page.loaded:
            url = urlsplit(link)
            if url.scheme in ("http", "https", "mailto"):
                (outside.add(link) if link in page.links else problems.append(f"{name}: loads {link}"))
                continue
            if url.scheme == "data" or link.startswith("javascript:") and link == "javascript:void(0)": continue
            target = (site/name).parent/unquote(url.path) if url.path else site/name
            target = target.resolve()
            if target.is_dir(): target /= "index.html"
            if not target.is_file() or not target.is_relative_to(site): problems.append(f"{name}: {link} is not there")
            elif url.fragment and target.suffix == ".html" and unquote(url.fragment) not in pages[target.relative_to(site).as_posix()].ids: problems.append(f"{name}: {link} has no such anchor")
    return sorted(set(problems)), sorted(outside)


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_fetched(site, pages):
    problems, outside = broken(site, pages)
    print(f"{sum(len(p.links) for p in pages.values())} links on {len(pages)} pages; {len(outside)} lead out of the site, not followed:", *outside, sep="\n")
    assert problems == []
    for style in site.rglob("*.css"): assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style
    for script in ("searchtools.js", "doctools.js", "sphinx_highlight.js"): assert not re.search(r"(fetch|import)\(['\"]https?:", (site/"_static"/script).read_text(encoding="utf-8"))


def test_the_check_of_links_sees_what_is_broken(tmp_path):
    (tmp_path/"b.html").write_text('<h2 id="here">x</h2>')
    (tmp_path/"a.html").write_text('<a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.html">3</a><a href="../x.html">4</a><a href="https://x.org">5</a><script src="https://cdn.org/x.js"></script><a href="#nowhere">6</a>')
    found, outside = broken(tmp_path, {n: Page(tmp_path/n) for n in ("a.html", "b.html")})
    assert len(found) == 5 and outside == ["https://x.org"] and not [f for f in found if "#here" in f]


@pytest.mark.parametrize("said, whole", [("[a](b.md), $x^2$", True), ("[a](gone.ipynb)", False), ("[a](b.md#gone)", False), (r"$\unheardof x$", False)])
def test_a_page_that_is_wrong_fails_the_build_and_the_old_site_stays(tmp_path, said, whole):
    (tmp_path/"_docs").mkdir()
    (tmp_path/"_docs"/"old.html").write_text("old")
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import build; from pathlib import Path\n"
              "def stage(into):\n into.mkdir()\n (into/'index.md').write_text(f'# A\\n\\n{sys.argv[3]}\\n\\n```{{toctree}}\\nb\\n```\\n')\n (into/'b.md').write_text('# B\\n')\n return []\n"
              "build.stage = stage; sys.exit(build.build(Path(sys.argv[2])))")
    done = subprocess.run([sys.executable, "-c", script, NBS/"site", tmp_path/"_docs", said], capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == whole, done.stderr
    assert (tmp_path/"_docs"/"old.html").exists() != whole and [p.name for p in tmp_path.iterdir()] == ["_docs"]


def test_every_picture_has_words_or_says_that_it_needs_none(site, pages):
    bare = [(name, i.get("src", "")[:80]) for name, page in pages.items() for i in page.images if "alt" not in i or re.search(r"\.(png|svg|jpe?g)$", i["alt"])]
    assert bare == []
    figures = [i for name, page in pages.items() if not name.startswith("site/") for i in page.images if "_images/" in i.get("src", "")]
    assert len(figures) > 400 and all(i["alt"].strip() for i in figures)


def test_formulas_are_drawn_and_none_is_left_as_text(pages):
    left = {name: said for name, page in pages.items() if not name.startswith(("genindex", "py-modindex")) and (said := re.findall(r"\$\$|\\(?:frac|sum|text|mathcal|begin|big)\b[^\n]{0,40}", " ".join(page.text)))}
    assert left == {}


@pytest.mark.parametrize("tex, holds", [(r"\tfrac12 k", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"), (r"\hat x_i^2", "<msubsup><mover"), (r"x'", "′"), (r"\sum_{i=1}^n i", "<munderover><mo>∑</mo>"), (r"\int_0^1 f", "<msubsup><mo>∫</mo>"),
                                        (r"-1", 'form="prefix"'), (r"a-1", "<mo>−</mo>"), (r"\big(x\big)^2", "1.2em"), (r"\mathcal L \in \mathbb R", "ℝ"), (r"\text{if } x", "<mtext>if\u00a0</mtext>"), (r"\begin{cases}1 & a\\2 & b\end{cases}", "<mtable"),
                                        (r"\operatorname*{mean}_i a", "<munder><mo"), (r"\underbrace{a}_{b}", "⏟"), (r"\left|\frac{a}{b}\right|", "<mfrac>"), (r"\sqrt[3]{x}", "<mroot>"), (r"a < b", "<mo>&lt;</mo>")])
def test_a_formula_becomes_mathml(tex, holds):
    made = formulas.mathml(tex)
    assert holds in made and made.startswith("<math>")
    Check = HTMLParser(); Check.feed(made)


@pytest.mark.parametrize("tex", [r"\unheardof x", r"\frac{a}", "{a", "a}", r"\left( a", "x_1_2", r"\begin{cases} a", "`"])
def test_a_formula_that_is_not_understood_is_an_error(tex):
    with pytest.raises(formulas.FormulaError): formulas.mathml(tex)


def test_terms_lead_to_the_glossary_once_a_page_and_never_from_code_or_headings(pages):
    chapters = {n: p for n, p in pages.items() if not n.startswith("site/") and p.terms}
    assert len(chapters) > 150
    for name, page in chapters.items():
        anchors = [href.partition("#")[2] for href, _ in page.terms]
        assert len(anchors) == len(set(anchors)), name
        assert not [inside for _, inside in page.terms if {"h1", "h2", "h3", "code", "pre", "math"} & set(inside) or "a" in inside], name
    assert not pages["site/glossary.html"].terms


@pytest.mark.parametrize("term, said", [("twin", ["twin"]), ("average precision (AP)", ["average precision", "AP"]), ("true positive rate, sensitivity, recall", ["true positive rate", "sensitivity", "recall"]), ("sink, source deformation", ["sink deformation", "source deformation"])])
def test_how_a_term_is_spoken(term, said): assert terms.spellings(term) == said


def test_a_term_is_found_with_its_plural_and_not_within_words():
    matcher = terms.pattern(["twin", "anomaly map", "AP", "pixel AP", "AUROC"])
    assert [m.group(0) for m in matcher.finditer("Twins and twinned: anomaly\nmaps, pixel AP, AP, ap, APs, AUROC-like, co-twin, the map")] == ["Twins", "anomaly\nmaps", "pixel AP", "AP", "APs"]


def test_the_tables_and_the_reference_are_complete(site, pages):
    methods = (site/"site"/"methods.html").read_text(encoding="utf-8")
    named = set(re.findall(r'<span class="pre">([\w-]+)</span>', methods))
    assert not [n for table in catalog.TABLES.values() for n in table if n not in named]
    gallery = (site/"site"/"gallery.html").read_text(encoding="utf-8")
    assert not [p.doc for p in notebooks() if p.figures and f'href="../{p.doc}.html"' not in gallery]
    for p in (p for p in notebooks() if p.module):
        tree = ast.parse((ROOT/"anomaly_nb"/f"{p.module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        public = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")
        page = pages[f"site/api/anomaly_nb.{p.module}.html"]
        assert not [n for n in public if f"anomaly_nb.{p.module}.{n}" not in page.ids], p.module
        assert f"../../{p.doc}.html" in {link.partition("#")[0] for link in page.links}, p.module


def test_the_site_shows_no_widgets_and_no_marks(site):
    for p in notebooks():
        said = (site/f"{p.doc}.html").read_text(encoding="utf-8")
        assert "vnd.jupyter" not in said and "#| export" not in said and not re.search(r'<span class="c1">#\|', said), p.doc


def browse(place, *more):
    return subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--allow-file-access-from-files", f"--user-data-dir={place}", *more], capture_output=True, text=True, timeout=600)


def visit(site, place, names, script, width, theme):
    "Opens pages one after another in a frame as wide as asked for, in light or dark; `{page: what script(doc, win) returns}`."
    harness = site/"harness.html"
    harness.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0"><pre id="out"></pre><script>(async () => {{ localStorage.setItem("theme", "{theme}"); const said = {{}}; for (const name of {json.dumps(names)}) {{'
                       f'const f = document.createElement("iframe"); f.style = "width:{width}px;height:900px;border:0"; f.src = name; await new Promise(r => {{ f.onload = r; document.body.append(f); }}); const win = f.contentWindow, doc = win.document; {script.startswith("await") and "await new Promise(r => setTimeout(r, 1500));" or ""}'
                       f'try {{ said[name] = (() => {{ {script.removeprefix("await")} }})(); }} catch (e) {{ said[name] = String(e); }} f.remove(); }} document.getElementById("out").textContent = JSON.stringify(said); document.title = "done"; }})();</script>', encoding="utf-8")
    try: done = browse(place, f"--window-size={width},900", "--virtual-time-budget=600000", "--dump-dom", harness.as_uri())
    finally: harness.unlink()
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


@needs_chromium
@pytest.mark.parametrize("width, theme", [(1300, "light"), (390, "dark")])
def test_every_page_fits_a_screen_and_a_telephone(site, pages, tmp_path, width, theme):
    "No page is wider than the screen: code, tables and formulas scroll in their own boxes."
    names = [n for n in pages if not n.startswith("site/api/") or n == "site/api/anomaly_nb.models.siamese.html" or n == "site/api/index.html"]
    said = visit(site, tmp_path, names, 'return [doc.documentElement.scrollWidth, win.getComputedStyle(doc.body).backgroundColor];', width, theme)
    assert set(said) == set(names)
    assert {n: w for n, (w, _) in said.items() if w > width} == {}
    light = {sum(map(int, re.findall(r"\d+", colour)[:3])) > 380 for _, colour in said.values()}
    assert light == {theme == "light"}


@needs_chromium
def test_figures_have_a_light_ground_in_the_dark(site, tmp_path):
    name = "models/350_siamese.html"
    said = visit(site, tmp_path, [name], 'const i = doc.querySelector(".cell_output img"), m = doc.querySelector("math"); return [win.getComputedStyle(i).backgroundColor, i.naturalWidth > 0 || i.loading, m.getBoundingClientRect().width > 5, win.getComputedStyle(m).color];', 1300, "dark")[name]
    assert said[0] == "rgb(255, 255, 255)" and said[1] and said[2] and sum(map(int, re.findall(r"\d+", said[3])[:3])) > 380


@needs_chromium
def test_the_search_finds_a_chapter(site, tmp_path):
    name = "search.html?q=siamese"
    said = visit(site, tmp_path, [name], 'await return [...doc.querySelectorAll("#search-results li a")].map(a => a.getAttribute("href"));', 1300, "light")[name]
    assert any("350_siamese" in href for href in said[:10]), said
