"""`outputs.py store [NOTEBOOK ...]`: execute chapters and keep their outputs; `outputs.py readme`: README.md from the index."""
import base64
import io
import json
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


def store(paths):
    "Executes chapters with nbdev-test, cleans them, and records what their outputs were made from."
    bins = Path(sys.executable).parent
    for path in paths:
        subprocess.run([bins/"nbdev-test", "--save", "--n-workers", "1", "--timing", str(path)], cwd=house.ROOT, check=True)
        subprocess.run([bins/"nbdev-clean", "--fname", str(path)], cwd=house.ROOT, check=True)
        nb = json.loads(path.read_text(encoding="utf-8"))
        for output in (o for c in nb["cells"] for o in c.get("outputs", [])):
            if "image/png" in output.get("data", {}): output["data"]["image/png"] = lighten("".join(output["data"]["image/png"]))
        nb["metadata"]["anomaly_nb"] = {"outputs": house.outputs_key(house.ROOT, path)}
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["store"]:
        named = [Path(p).resolve() for p in sys.argv[2:]]
        stale = [p for p in house.notebooks(house.ROOT) if house.keeps_outputs(p)]
        store(named or stale)
        house.readme_from_index(house.ROOT, write=True)
    elif sys.argv[1:] == ["readme"]: house.readme_from_index(house.ROOT, write=True)
    else: sys.exit(__doc__)
