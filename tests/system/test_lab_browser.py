"""The widgets in a real JupyterLab: a server of its own, headless Chromium, real mouse and keyboard events, and every number on the page against numpy.

Without Chromium or JupyterLab it is listed as NOT RUN, and fails where CI is set. Pictures of the page are kept when a test fails, and always in the folder that LAB_SCREENSHOTS names."""
import base64
import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from house import ROOT
from test_tutorials import steps

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
try:
    import jupyterlab
    import websocket
except ImportError: jupyterlab = None
if CHROMIUM is None or jupyterlab is None:
    missing = "Chromium" if CHROMIUM is None else "JupyterLab"
    if os.environ.get("CI"): pytest.fail(f"NOT RUN: no {missing}, and CI is set", pytrace=False)
    pytest.skip(f"NOT RUN: no {missing} on this machine", allow_module_level=True)

# what the notebook shows, and what the test computes by itself
SCENE = """
import numpy as np
rng = np.random.default_rng(0)
rows, columns = np.indices((24, 24))
organ = np.stack([(rows - 12)**2 + (columns - 12)**2 < 110]*8)
def person(ill):
    mask = np.zeros(organ.shape, bool)
    if ill: mask[2:6] = (rows - 9)**2 + (columns - 15)**2 < 12
    image = rng.normal(size=organ.shape)*.3 + mask
    return image, mask, np.abs(image)
images, masks, maps = zip(*[person(n < 2) for n in range(3)])
normals, organs = [person(False)[2] for _ in range(2)], [organ]*3
def noisy(level): return {"image": images[0][4] + level*rows/24}, {"mean": float((images[0][4] + level*rows/24).mean())}
def lift(sample, rng): return sample | dict(clean=sample["image"], image=sample["image"] + (rows + rng.integers(9) < 8))
def darken(sample, rng): return sample | dict(clean=sample["image"], image=sample["image"] - .5*(columns < 3 + rng.integers(9)))
sample = dict(image=images[2][4][None])
bank, codes = rng.normal(size=(50, 4)), rng.normal(size=(4, 6, 6))
def far(X): return np.linalg.norm(X, axis=1)
def plant(contrast, size):
    mask = (rows - 12)**2 + (columns - 8)**2 <= size**2
    return images[2][4] + contrast*mask, mask
detectors = {"brightness": lambda x: x, "distance": np.abs}
"""
CELLS = [SCENE, "from anomaly_nb.explorers import dial, latent_explorer, lesion_dial, playground\nfrom anomaly_nb.widgets import look, map_browser, panel, threshold_slider",
         "map_browser(images[0], maps[0], masks[0], organ)", "threshold_slider(maps, masks, normals, organs, organs[:2], images)", "dial(noisy, (0., .5, 1., 2.), 'level')", "playground({'lift': lift, 'darken': darken}, sample, seeds=10)",
         "latent_explorer(images[0][4], codes, bank, rng.normal(size=(50, 5, 5)), {'far': far}, origin=2, stride=4, window=5)", "lesion_dial(plant, detectors, (0., .5, 1., 2.), (1, 2, 4), organ[0])",
         "import ipywidgets\npanel(lambda place, n: {'inverse': 1/n}, lambda: {'n': ipywidgets.IntSlider(3, 0, 5, **look('n'))}, {'one': {'n': 1}})"]


def dies_with_us():
    "For Linux: the process gets SIGTERM when pytest is killed and no fixture can end it."
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def end(process, kind=signal.SIGTERM):
    "Ends a process and all it has started: asked first, then killed. Returns those that had to be killed."
    try: family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess: return []
    family[0].send_signal(kind)
    _, left = psutil.wait_procs(family, 15)
    for p in left:
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    psutil.wait_procs(left, 5)
    return [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


class Lab:
    "A JupyterLab with a token, on a free port, with folders of its own: no setting of this machine's user, no news, no shop for extensions."
    def __init__(self, place):
        self.root, self.token = place/"notebooks", secrets.token_hex(16)
        self.root.mkdir()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{s.getsockname()[1]}"
        folders = {f"JUPYTER{name}_DIR": str(place/name.lower().strip("_")) for name in ("_CONFIG", "_DATA", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}
        quiet = Path(folders["JUPYTERLAB_SETTINGS_DIR"])/"@jupyterlab"/"apputils-extension"/"notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
        env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | folders | {"IPYTHONDIR": str(place/"ipython")} | {f"{n}_NUM_THREADS": "1" for n in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
        self.log = open(place/"lab.log", "w+")
        self.process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={self.url.split(':')[-1]}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
                                         f"--ServerApp.root_dir={self.root}", "--LabApp.extension_manager=readonly", "--LabApp.news_url=None"], cwd=self.root, env=env, stdout=self.log, stderr=self.log, preexec_fn=dies_with_us)

    def ask(self, path, method="GET"):
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", method=method, headers={"Authorization": f"token {self.token}"}), timeout=5) as answer: return json.loads(answer.read() or "null")

    def kernels(self):
        "The kernels; none while one is being started, when the server may answer with an error."
        with contextlib.suppress(OSError): return self.ask("/api/kernels")
        return []

    def ready(self, seconds=60):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError): return self.ask("/api/status")
            if self.process.poll() is not None: break
            time.sleep(.1)
        self.log.seek(0)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read()[-3000:]}")

    def stop(self):
        left = end(self.process)
        self.log.close()
        return left


class Page:
    "A page of headless Chromium, spoken to over the DevTools protocol; the name of every machine but this one leads nowhere."
    def __init__(self, place):
        profile = place/"profile"
        self.process = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                                         "--window-size=1300,1000", f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=dies_with_us)
        self.count, self.asked, self.socket = 0, [], None
        try:
            for _ in range(600):
                if (profile/"DevToolsActivePort").is_file() and "\n" in (profile/"DevToolsActivePort").read_text(): break
                time.sleep(.1)
            port = (profile/"DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer: first = next(p for p in json.load(answer) if p["type"] == "page")
            self.socket = websocket.create_connection(first["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
            for domain in ("Page", "Runtime", "Network"): self.call(f"{domain}.enable")
        except BaseException:
            self.stop()
            raise

    def call(self, method, **params):
        mine = self.count = self.count + 1
        self.socket.send(json.dumps({"id": mine, "method": method, "params": params}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("method") == "Network.requestWillBeSent": self.asked.append(said["params"]["request"]["url"])
            if said.get("method") == "Page.javascriptDialogOpening":                       # "leave without saving?": yes
                self.count += 1
                self.socket.send(json.dumps({"id": self.count, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}))
            if said.get("id") == mine:
                assert "error" not in said, said
                return said["result"]

    def js(self, code):
        said = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def until(self, what, seconds=30, why=""):
        "Waits until `what`, a line of JavaScript or a function, is true, and returns it."
        end_ = time.monotonic() + seconds
        while time.monotonic() < end_:
            found = what() if callable(what) else self.js(what)
            if found: return found
            time.sleep(.1)
        raise AssertionError(f"waited {seconds} s for {why() if callable(why) else why or what}")

    def middle(self, element):
        "The middle of an element (JavaScript), once it lies still in view and nothing lies over it."
        look = f"(async () => {{ const e = {element}; if (!e) return 0; const at = () => {{ const b = e.getBoundingClientRect(); return [b.x + b.width/2, b.y + b.height/2] }}, frame = () => new Promise(requestAnimationFrame); e.scrollIntoView({{block: 'center'}}); await frame(); const a = at(); await frame(); await frame(); const b = at();"
        return self.until(look + " const top = document.elementFromPoint(...b); return a.join() === b.join() && e.contains(top) && b })()", 15, f"{element} in view")

    def mouse(self, kind, x, y, **more): self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", **more)

    def click(self, element):
        x, y = self.middle(element)
        self.mouse("Moved", x, y); self.mouse("Pressed", x, y, clickCount=1, buttons=1); self.mouse("Released", x, y, clickCount=1)

    def drag(self, element, right):
        "Takes an element with the mouse, moves it to the right, and lets go."
        x, y = self.middle(element)
        self.mouse("Moved", x, y); self.mouse("Pressed", x, y, clickCount=1, buttons=1)
        for part in (.3, .6, 1): self.mouse("Moved", x + part*right, y, buttons=1)
        self.mouse("Released", x + right, y, clickCount=1)

    def key(self, name):
        code = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "End": 35, "Home": 36, "Space": 32, "Tab": 9}[name]
        key = dict(key=" " if name == "Space" else name, code=name, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyDown", **key, **({"text": " "} if name == "Space" else {})); self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def picture(self): return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def stop(self):
        if self.socket: self.socket.close()
        return end(self.process)


class Widget:
    "The n-th widget of the page: its controls by their label, its numbers, its picture."
    def __init__(self, page, n): self.page, self.me = page, f"document.querySelectorAll('.anomaly-nb-live')[{n}]"

    def control(self, label, part): return f"[...{self.me}.querySelectorAll('.widget-label, .widget-label-basic')].find(e => e.textContent === {json.dumps(label)}).closest('.widget-inline-hbox').querySelector({json.dumps(part)})"
    def handle(self, label, n=0): return self.control(label, ".noUi-base") + f".querySelectorAll('.noUi-handle')[{n}]"
    def reads(self, label): return self.page.js(self.control(label, ".widget-readout") + ".textContent")
    def text(self): return self.page.js(f"{self.me}.textContent")
    def image(self, n=-1):
        "The pixels that are shown, as a number."
        return self.page.until(f"(() => {{ const i = [...{self.me}.querySelectorAll('img')].at({n}); if (!i?.complete || !i.naturalWidth) return 0; const c = document.createElement('canvas'); [c.width, c.height] = [i.naturalWidth, i.naturalHeight]; const d = c.getContext('2d'); d.drawImage(i, 0, 0);"
                               f" return [...d.getImageData(0, 0, c.width, c.height).data].reduce((a, v) => (31*a + v) | 0, 7) + ':' + c.width + 'x' + c.height }})()", 15, "a picture")

    def numbers(self):
        "{label: text} of the table."
        heads, values = self.page.js(f"['th', 'td'].map(t => [...{self.me}.querySelectorAll('table ' + t)].map(e => e.textContent))")
        return {h: v.replace("\u202f", "") for h, v in zip(heads, values)}

    def shows(self, expected):
        "Waits until these {label: number} stand there, to three figures."
        def said(value): return f"{value:.3g}" if isinstance(value, float) else str(value)
        wanted = {k: said(v) for k, v in expected.items()}
        self.page.until(lambda: wanted.items() <= self.numbers().items(), 30, lambda: f"{wanted}; there is {self.numbers()}")

    def changed(self, before, n=-1): return self.page.until(lambda: (now := self.image(n)) != before and now, 30, "another picture")


@contextlib.contextmanager
def lab_page(place):
    "A JupyterLab and a page, both ended whatever happens; whoever is left over is an error."
    lab, page, left = None, None, []
    try:
        lab = Lab(place)
        page = Page(place)
        lab.ready()
        yield lab, page
        assert not (foreign := [url for url in page.asked if not url.startswith((lab.url, "data:", "blob:", "about:"))]), f"asked for on other machines: {foreign[:5]}"
    finally:
        for one in filter(None, (page, lab)): left += one.stop()
    assert not left, f"still running: {left}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    with lab_page(tmp_path_factory.mktemp("lab")) as both: yield both


@contextlib.contextmanager
def watched(page, name, place):
    "Keeps pictures of the page: on failure beside the test's files, always where LAB_SCREENSHOTS says. Yields a function that takes one more."
    kept = os.environ.get("LAB_SCREENSHOTS")
    def take(more, folder=kept):
        if not folder: return None
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = Path(folder)/f"{name}-{more}.png"
        file.write_bytes(page.picture())
        return file
    try: yield take
    except BaseException as error:
        with contextlib.suppress(Exception): error.add_note(f"the page: {take('failed', kept or place)}")
        raise


def notebook(path, cells):
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, "cells": [{"cell_type": "code", "id": f"c{n}", "metadata": {}, "source": text, "outputs": [], "execution_count": None} for n, text in enumerate(cells)]}), encoding="utf-8")


@contextlib.contextmanager
def run_all(lab, page, name, cells, seconds):
    "Opens a notebook, runs it by the menu, waits until the kernel is idle again; ends its kernel afterwards."
    page.call("Page.navigate", url=f"{lab.url}/lab/tree/{name}?token={lab.token}&reset")
    page.until("!!document.querySelector('.jp-Notebook .jp-CodeCell')", 60, "the notebook")
    page.until(lambda: any(k["execution_state"] == "idle" and k["connections"] for k in lab.kernels()), 60, "a kernel")
    page.until("/Python/.test(document.querySelector('.jp-KernelName')?.textContent)")
    try:
        item = "[...document.querySelectorAll('{}')].find(e => e.textContent.startsWith('{}'))"
        page.click(item.format(".lm-MenuBar-itemLabel", "Run"))
        page.until("!!" + item.format(".lm-Menu-itemLabel", "Run All Cells"))
        page.click(item.format(".lm-Menu-itemLabel", "Run All Cells"))
        page.until(f"[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].filter(e => /\\[\\d+\\]/.test(e.textContent)).length >= {cells} || !!document.querySelector('.jp-OutputArea-output[data-mime-type*=stderr] .ansi-red-fg, .jp-RenderedText[data-mime-type*=\"error\"]')", seconds, f"{cells} cells of {name}")
        assert not (errors := page.js("[...document.querySelectorAll('[data-mime-type=\"application/vnd.jupyter.error\"], [data-mime-type=\"application/vnd.jupyter.stderr\"] .ansi-red-fg')].map(e => e.textContent.slice(-400))")), errors
        yield
    finally:
        for kernel in lab.kernels(): lab.ask(f"/api/kernels/{kernel['id']}", "DELETE")


def test_every_widget_answers_mouse_and_keyboard(desk, tmp_path):
    from anomaly_nb.metrics.localization import dice_at, normal_threshold
    lab, page = desk
    s = {}
    exec(SCENE, s)
    notebook(lab.root/"toys.ipynb", CELLS)
    with watched(page, "toys", tmp_path) as take, run_all(lab, page, "toys.ipynb", len(CELLS), 60):
        page.until("document.querySelectorAll('.anomaly-nb-live img').length >= 7", 20, "the widgets")

        browser = Widget(page, 0)
        before = browser.image()
        page.drag(browser.handle("slice"), 30)
        before = browser.changed(before)
        z = int(browser.reads("slice"))
        page.key("ArrowRight")                                                     # the handle has the focus
        before = browser.changed(before)
        assert int(browser.reads("slice")) == z + 1
        page.click(browser.handle("map limits")); page.key("ArrowRight")
        browser.changed(before)
        low, coloured = float(browser.numbers()["map limits"].split(" to ")[0]), browser.numbers()["coloured voxels"]
        assert abs(int(coloured) - ((s["maps"][0][z + 1] > low) & s["organ"][z + 1]).sum()) <= 3           # three figures of the limit are shown
        browser.shows({"outline": int(s["masks"][0][z + 1].sum()), "slice": z + 1})
        take("browser")
        before = browser.image()
        page.click(browser.control("map opacity", ".noUi-handle")); page.key("Home")
        before = browser.changed(before)
        page.click(f"{browser.me}.querySelector('input[type=checkbox]')")
        without = browser.changed(before)
        page.key("Space")
        assert browser.changed(without) == before                                  # the outline is back, by the keyboard
        assert page.js("document.querySelector('.jp-mod-active .jp-InputPrompt').textContent") == "[3]:"       # no key has led out of the cell

        slider = Widget(page, 1)
        before = slider.image()
        page.drag(slider.handle("healthy quantile"), 40)
        before = slider.changed(before)
        for press in (None, "ArrowLeft", "End"):
            if press:
                page.key(press)
                before = slider.changed(before)
            q = round(float(slider.reads("healthy quantile").rstrip(" %"))/100, 6)
            t = normal_threshold(s["normals"], s["organs"][:2], fpr=1 - q)
            marked = [(m >= t) & s["organ"] for m in s["maps"]]
            slider.shows({"threshold": t, "Dice": float(dice_at(s["masks"], s["maps"], t, s["organs"])), "TP": int(sum((m & k).sum() for m, k in zip(marked, s["masks"]))), "FP": int(sum((m & ~k).sum() for m, k in zip(marked, s["masks"])))})
        assert q == .9999
        page.click(slider.handle("person")); page.key("End")
        slider.changed(before); slider.shows({"person shown": "person 2"})
        take("threshold")

        dial = Widget(page, 2)
        before = dial.image()
        page.click(dial.handle("level")); page.key("End")
        dial.changed(before); dial.shows({"mean": s["noisy"](2.)[1]["mean"]})
        page.drag(dial.handle("level"), -500)
        dial.shows({"mean": s["noisy"](0.)[1]["mean"]})
        assert dial.image() == before                                              # back at 0: the same picture, to the byte
        take("dial")

        play = Widget(page, 3)
        before = play.image()
        page.click(play.handle("task")); page.key("ArrowRight")
        play.changed(before); play.shows({"task": "darken"})
        page.click(play.handle("seed")); page.key("Home"); page.key("ArrowRight")
        page.until(lambda: play.reads("seed") == "1")
        page.click(play.handle("strength")); page.key("ArrowLeft")
        page.until(lambda: play.reads("strength") == "0.90")
        change = .9*np.abs(s["darken"](s["sample"], np.random.default_rng(1))["image"] - s["sample"]["image"])[0]
        play.shows({"changed voxels": int((change > 1e-6).sum()), "mean change": float(change[change > 1e-6].mean())})
        take("playground")

        latent = Widget(page, 4)
        before, board = latent.image(), latent.image(0)
        page.click(f"{latent.me}.querySelector('button[title=\"row 4, column 1\"]')")                # a click on the picture
        before = latent.changed(before); latent.changed(board, 0)
        assert (latent.reads("row"), latent.reads("column")) == ("4", "1")
        for press in (None, "ArrowLeft"):
            if press:
                page.click(latent.handle("row")); page.key(press)
                latent.changed(before)
            row, code = int(latent.reads("row")), s["codes"][:, int(latent.reads("row")), 1]
            latent.shows({"cell": f"row {row}, column 1", "far": float(np.linalg.norm(code)), "nearest at": float(np.linalg.norm(s["bank"] - code, axis=1).min()), "far rank": f"{(np.linalg.norm(s['bank'], axis=1) < np.linalg.norm(code)).mean():.1%}"})
        take("latent")

        lesion = Widget(page, 5)
        before = lesion.image()
        page.drag(lesion.handle("contrast"), -45)
        before = lesion.changed(before)
        page.click(lesion.handle("size")); page.key("Home")
        lesion.changed(before)
        image, mask = s["plant"](float(lesion.reads("contrast")), 1)
        inside = s["organ"][0]
        ranks = {f"rank, {name}": float(np.mean([((f(image)[inside] < v).mean() + (f(image)[inside] <= v).mean())/2 for v in f(image)[mask & inside]])) for name, f in s["detectors"].items()}
        lesion.shows({"lesion voxels": int((mask & inside).sum())} | ranks)
        take("lesion")

        broken = Widget(page, 6)
        page.click(broken.handle("n")); page.key("Home")
        page.until(lambda: "ZeroDivisionError" in broken.text(), 15, "the error, said where the numbers stand")
        take("error")


def test_the_first_tutorial_as_a_whole(desk, tmp_path):
    "Tutorial 800, its exercises solved, from the first cell to the last."
    lab, page = desk
    cells = []
    for kind, *texts in steps(next((ROOT/"nbs"/"tutorials").glob("800_*.ipynb"))):
        cells += texts if kind == "code" else [f"{texts[0]}\n\n{texts[2]}", texts[1]]              # stub and solution, then the check
    notebook(lab.root/"tutorial.ipynb", cells)
    with watched(page, "tutorial", tmp_path) as take, run_all(lab, page, "tutorial.ipynb", len(cells), 240):
        assert page.js("document.querySelectorAll('.anomaly-nb-live').length") == 2
        browser, slider = Widget(page, 0), Widget(page, 1)
        before = browser.image()
        page.click(browser.handle("slice")); page.key("ArrowRight")
        browser.changed(before); browser.shows({"slice": browser.reads("slice")})
        assert page.js("document.querySelectorAll('.jp-RenderedImage img').length") >= 2                 # the figures of pyplot are there, too
        take("browser")
        before = slider.image()
        page.click(slider.handle("healthy quantile")); page.key("Home")
        slider.changed(before)
        low = slider.numbers()
        page.key("End")
        page.until(lambda: slider.numbers()["TP"] != low["TP"])
        high = slider.numbers()
        for n in (low, high):
            TP, FP, FN = (int(n[k]) for k in ("TP", "FP", "FN"))
            assert abs(float(n["Dice"]) - 2*TP/(2*TP + FP + FN)) < 6e-4
        assert int(low["TP"]) > int(high["TP"]) and int(low["FP"]) > int(high["FP"])
        take("threshold")


def test_make_lab_opens_the_map(tmp_path):
    "The second command of a newcomer: JupyterLab opens on the index without a question, and a click leads to the first tutorial."
    asked = tmp_path/"asked"
    (tmp_path/"browser").write_text(f"#!/bin/sh\necho \"$1\" > {asked}.part && mv {asked}.part {asked}\n")
    (tmp_path/"browser").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | {"BROWSER": f"{tmp_path/'browser'} %s", "IPYTHONDIR": str(tmp_path/"ipython")} | {f"JUPYTER{n}_DIR": str(tmp_path/f"jupyter{n}") for n in ("_CONFIG", "_DATA", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}
    page, left = None, []
    with open(tmp_path/"make.log", "w+") as log:
        make = subprocess.Popen(["make", "lab"], cwd=ROOT, env=env, stdout=log, stderr=log, preexec_fn=dies_with_us)
        try:
            page = Page(tmp_path)
            page.until(lambda: asked.is_file() or make.poll() is not None, 90, "JupyterLab to ask for a browser")
            assert asked.is_file(), (tmp_path/"make.log").read_text()[-2000:]
            door = Path(asked.read_text().strip().removeprefix("file://")).read_text()               # a page that leads on, with the token
            with watched(page, "lab", tmp_path) as take:
                page.call("Page.navigate", url=re.search(r'href="([^"]+)"', door)[1].replace("localhost", "127.0.0.1"))
                page.until("document.querySelector('.jp-Notebook h1')?.textContent.startsWith('anomaly_nb')", 60, "the index")
                time.sleep(1)                                                      # a question would come now
                assert not page.js("document.querySelectorAll('.jp-Dialog, .Toastify__toast').length")
                take("index")
                page.click("[...document.querySelectorAll('.jp-RenderedMarkdown a')].find(a => a.getAttribute('href')?.includes('800_') || a.textContent === 'first anomaly map')")
                page.until("[...document.querySelectorAll('.jp-Notebook h1')].some(h => h.textContent.startsWith('Tutorial: first anomaly map'))", 60, "the first tutorial")
                page.until("!!document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell .cm-lineWrapping')", 15, "wrapped lines")
                take("tutorial")
        finally:
            if page: left += page.stop()
            left += end(make)
    assert not left, f"still running: {left}"


def test_nothing_is_left_after_a_failure(tmp_path):
    "A server and a browser that a failing test started are gone when it has failed."
    seen = []
    with pytest.raises(RuntimeError, match="a test fails"):
        with lab_page(tmp_path) as (lab, page):
            notebook(lab.root/"empty.ipynb", ["1"])
            lab.ask("/api/kernels", "POST")
            seen = [psutil.Process(p.process.pid) for p in (lab, page)]
            seen += [child for p in seen for child in p.children(recursive=True)]
            assert len(seen) > 3
            raise RuntimeError("a test fails")
    assert not [p for p in seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
