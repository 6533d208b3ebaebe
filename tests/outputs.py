"""`outputs.py store [NOTEBOOK ...]`: execute chapters and keep their outputs and what they cost; `measure [NOTEBOOK ...]`: only what they cost;
`costs`: what they say they cost beside what they did; `checkpoints`: train again what lies in nbs/checkpoints; `readme`: README.md from the index."""
import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import house


def lighten(png, colours=256, width=1000):
    "A PNG (base64 text) at most `width` wide, with a palette of `colours`: a third of the size. The palette covers rare colours too: a scale's ends, a single point."
    from PIL import Image
    image, small = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    if image.width > width: image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    image.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode() + "\n" if len(small.getvalue()) < len(base64.b64decode(png)) else png


def execute(path, **env):
    "Executes a notebook with nbdev-test, keeping its outputs; returns (CPU seconds, GB of memory at most) of all its processes."
    child = subprocess.Popen([BINS/"nbdev-test", "--save", "--n-workers", "0", str(path)], cwd=house.ROOT, env=os.environ | env)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode: raise subprocess.CalledProcessError(child.returncode, ["nbdev-test", str(path)])
    subprocess.run([BINS/"nbdev-clean", "--fname", str(path)], cwd=house.ROOT, check=True)
    return round(used.ru_utime + used.ru_stime, 1), round(used.ru_maxrss/1e6, 1)                       # Linux counts kilobytes


def said(path):
    "(seconds, GB) that a chapter says it takes, or None."
    text = "\n".join(house.source(c) for c in house.cells(path) if c["cell_type"] == "markdown")
    line = re.search(r"\*\*It takes\*\*[^\n]*? to read(?P<rest>[^\n]*)", text)
    seconds, memory = (re.search(pattern, line["rest"]) if line else None for pattern in (r"([\d.]+) (s|seconds?|minutes?)\b", r"([\d.]+) GB"))
    return (float(seconds[1])*(60 if seconds[2].startswith("m") else 1), float(memory[1])) if seconds and memory else None


def drift(path):
    "What a chapter costs, what it says, and a word where the two are far apart: a line to print. Nobody's test fails of it: machines differ."
    cost, words = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("anomaly_nb", {}).get("cost"), said(path)
    far = cost and words and (max(cost[0], 4) > 2*max(words[0], 4) or max(words[0], 4) > 2*max(cost[0], 4) or abs(cost[1] - words[1]) > 0.5 + words[1]/2)
    return f"{str(path.relative_to(house.ROOT/'nbs')):<44}{'says ' + '{:g} s, {:g} GB'.format(*words) if words else 'says nothing':<22}{'took {:g} s, {:g} GB'.format(*cost) if cost else 'not measured':<24}{'DRIFTED' if far else ''}".rstrip()


def store(paths):
    "Executes chapters with nbdev-test, cleans them, and records what their outputs were made from and what they cost."
    for path in paths:
        cost = execute(path)
        nb = json.loads(path.read_text(encoding="utf-8"))
        for output in (o for c in nb["cells"] for o in c.get("outputs", [])):
            if "image/png" in output.get("data", {}): output["data"]["image/png"] = lighten("".join(output["data"]["image/png"]))
        nb["metadata"]["anomaly_nb"] = {"outputs": house.outputs_key(house.ROOT, path), "cost": cost}
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        print(drift(path))


def measure(paths):
    "Executes chapters for what they cost alone: their outputs stay as they are."
    for path in paths:
        kept = path.read_bytes()
        try: cost = execute(path)
        finally: path.write_bytes(kept)
        nb = json.loads(kept)
        nb["metadata"].setdefault("anomaly_nb", {})["cost"] = cost
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        print(drift(path), flush=True)


def checkpoints(paths=()):
    "Trains all that lies in nbs/checkpoints again (or what these notebooks load), by executing the notebooks, and writes down where each file comes from."
    from anomaly_nb.models.checkpoints import checkpoint_table
    folder = house.ROOT/"nbs"/"checkpoints"
    for name, path in house.checkpoint_users(house.ROOT).items():
        if not paths or path in paths: (folder/f"{name}.safetensors").unlink()
    for path in paths or house.loading(house.ROOT):
        kept = path.read_bytes()
        try: execute(path, ANOMALY_NB_COMPUTE_CHECKPOINTS="make")
        finally: path.write_bytes(kept)                                          # its stored outputs are those of a reader, who loads
    rows, users = checkpoint_table(folder), house.checkpoint_users(house.ROOT)
    lines = [f"| {r['name']} | {r['model']} | {r['epochs']} | {r['seconds']:.0f} | {r['kilobytes']} | [{users[r['name']].stem}](../{users[r['name']].relative_to(house.ROOT/'nbs')}) |" for r in rows]
    (folder/"README.md").write_text("# Trained networks beside the notebooks\n\nWeights that the cell of a notebook trained and loads (chapter [312](../models/312_checkpoints.ipynb)), from the embedded cohorts alone: nobody's data, nobody else's weights. Each file says in its header what it was made from. "
                                    f"`make checkpoints` trains all of them again and writes this page.\n\n| file | model | epochs | seconds of training | kB | made and loaded by |\n|---|---|---|---|---|---|\n" + "\n".join(lines) + f"\n\nTogether {sum(r['kilobytes'] for r in rows)} kB; torch {', '.join(sorted({r['torch'] for r in rows}))}.\n", encoding="utf-8")


BINS = Path(sys.executable).parent

if __name__ == "__main__":
    if sys.argv[1:2] == ["store"]:
        named = [Path(p).resolve() for p in sys.argv[2:]]
        stale = [p for p in house.notebooks(house.ROOT) if house.keeps_outputs(p)]
        store(named or stale)
        house.readme_from_index(house.ROOT, write=True)
    elif sys.argv[1:2] == ["measure"]: measure([Path(p).resolve() for p in sys.argv[2:]] or [p for p in house.notebooks(house.ROOT) if house.keeps_outputs(p)])
    elif sys.argv[1:] == ["costs"]: print(*(drift(p) for p in house.notebooks(house.ROOT) if house.keeps_outputs(p)), sep="\n")
    elif sys.argv[1:2] == ["checkpoints"]: checkpoints([Path(p).resolve() for p in sys.argv[2:]])
    elif sys.argv[1:] == ["readme"]: house.readme_from_index(house.ROOT, write=True)
    else: sys.exit(__doc__)
