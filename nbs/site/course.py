"""The course as the site sees it: its parts, its pages in order, and what a notebook says of itself."""
import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SITE = Path(__file__).resolve().parent
NBS = SITE.parent
ROOT = NBS.parent
LIBRARY = ROOT/"anomaly_nb"

PARTS = {      # name of the page: (title, folder below nbs/ with the beginning of its numbers, what it is about)
    "ground": ("Ground", ".", "0", "What everything else stands on: the sample, a plain dict with named keys; components, distances and patches of arrays; what cheap annotations can say; pictures."),
    "data": ("Data", "data", "1", "From files to samples. An embedded cohort of brains with drawn lesions that needs no download, readers of public data sets, your own scans, preprocessing, and the module that deals people to pools."),
    "tasks": ("Tasks", "tasks", "2", "Anomalies that are invented so that a network can learn without a single ill image, each with its label."),
    "models": ("Models", "models", "3", "One contract, one function that trains, and then the networks: from the mean image to diffusion."),
    "detectors": ("Detectors", "detectors", "4", "One-class detectors on vectors: for all people, for one patient, for each place of the brain."),
    "metrics": ("Metrics", "metrics", "5", "How good is a map? Numbers that are exact, fast, and say by which protocol they were made."),
    "methods": ("Methods", "methods", "6", "Compositions: published methods that are more than one network, and studies of what helps."),
    "floor": ("The floor above", ".", "7", "What knows everything below: names, experiments, reports, sweeps, the command line."),
    "tutorials": ("Tutorials", "tutorials", "8", "Walkthroughs with exercises: open one in JupyterLab and write the missing lines yourself."),
    "experiments": ("Experiments", "experiments", "", "Notebooks with parameters, executed by `anomaly-nb run NAME -p parameter=value`. They define nothing and store no outputs: a run keeps its own copy."),
}


@dataclass(frozen=True)
class Notebook:
    "A notebook of the course. `doc`: its page, as a path below nbs/ without ending."
    path: Path
    part: str = ""

    @cached_property
    def cells(self): return json.loads(self.path.read_text(encoding="utf-8"))["cells"]

    @property
    def doc(self): return self.path.relative_to(NBS).with_suffix("").as_posix()

    @property
    def number(self): return next(iter(re.findall(r"^\d+", self.path.stem)), "")

    @cached_property
    def title(self): return re.match(r"# (.+)", text(self.cells[0])).group(1).strip()

    @property
    def name(self):
        "Number and title, for lists."
        title = self.title.removeprefix("Tutorial: ").removeprefix("Experiment: ")
        return f"{self.number} {title if title == self.title else title[0].upper() + title[1:]}".strip()

    @cached_property
    def line(self): return next(iter(re.findall(r"^> (.+)$", text(self.cells[0]), re.M)), "")

    @cached_property
    def module(self): return next((m for c in self.cells if c["cell_type"] == "code" for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", text(c), re.M)), None)

    @property
    def figures(self):
        "[(cell, PNG as base64 text)] of the stored figures."
        return [(c, "".join(o["data"]["image/png"])) for c in self.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]


def text(cell): return "".join(cell["source"])


def notebooks():
    "Every notebook of the course, in reading order; the index is not among them."
    found = []
    for part, (_, folder, digit, _) in PARTS.items():
        found += [Notebook(p, part) for p in sorted((NBS/folder).glob(f"{digit}*.ipynb" if digit else "*.ipynb"))]
    return found


def words_of(source):
    "Texts that name a figure: string constants given to titles, labels and legends in a cell, in their order."
    try: tree = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M))
    except SyntaxError: return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = [k.value for k in node.keywords if k.arg in ("title", "titles", "suptitle")] + (node.args if name in ("set_title", "suptitle", "title") else [])
        if name in ("show_image", "show_map"): given += node.args[2:4]
        for value in given:
            for part in ([value] if isinstance(value, ast.Constant) else getattr(value, "elts", [])):
                if isinstance(part, ast.Constant) and isinstance(part.value, str): found.append((part.lineno, part.col_offset, part.value))
            if isinstance(value, ast.JoinedStr): found.append((value.lineno, value.col_offset, "".join(p.value if isinstance(p, ast.Constant) else "\u2026" for p in value.values)))
    return list(dict.fromkeys(" ".join(re.sub(r"\$([^$]*)\$", lambda m: m.group(1).replace("\\", ""), t).split()) for _, _, t in sorted(found) if t.strip(" \u2026")))


def alt_of(heading, source):
    "Words for those who do not see a figure: the section it stands in, and what its titles say."
    said = words_of(source)
    return (f"Figure: {heading}" + (f". Titles: {'; '.join(said)}" if said else ""))[:400]
