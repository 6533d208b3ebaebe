"""The table of methods, made from the catalog: what can be named in an experiment, what it is, where it was published, which chapter builds it."""
import re

from anomaly_nb import catalog

import api
from course import LIBRARY, SITE

PAPERS = {      # name in the catalog: keys of the bibliography; "" where nothing is published, or only what every textbook says. A name that is not here: what its docstring cites.
    "random": "", "intensity": "meissen2021", "mean": "", "pca": "", "trivial": "", "ae": "baur2021 bergmann2019", "vae": "kingma2014 zimmerer2019", "sae": "alaverdyan2020", "aeu": "mao2020", "memae": "gong2019",
    "cevae": "zimmerer2018", "vae-restoration": "you2019 chen2020restoration", "gmvae": "jiang2017 you2019", "vqvae": "vandenoord2017 pinaya2022transformers", "vqvae-prior": "pinaya2022transformers", "dae": "kascenas2022",
    "fanogan": "schlegl2019", "cradl": "lueth2023", "ddad": "cai2022", "ddad-asr": "cai2023", "vae-context": "chen2019 venkatakrishnan2020", "multitask": "venkatakrishnan2020", "many": "baugh2023", "fpi": "tan2020", "pii": "tan2021",
    "nsa": "schlueter2022", "cutpaste-seg": "li2021 schlueter2022", "pseudo": "cho2022 baugh2023", "cutpaste": "li2021", "draem": "zavrtanik2021", "ddpm": "ho2020", "anoddpm": "wyatt2022", "ddpm-patched": "behrendt2023patched",
    "ddpm-conditioned": "behrendt2023conditioned", "latent-diffusion": "pinaya2022diffusion", "classifier": "wargnier2023", "constrained": "wargnier2023", "translation": "wolleb2022", "translation-free": "ho2022 sanchez2022", "spine": "",
    "combination": "wolleb2022 wargnier2023", "ocsvm": "schoelkopf2001", "lof": "breunig2000", "mixture": "", "student": "peel2000", "mahalanobis": "", "knn": "ramaswamy2000", "lof_exact": "breunig2000", "lof_approximate": "breunig2000",
    "ocsvm_nystroem": "schoelkopf2001 williams2001", "mixture_batches": "cappe2009", "pairs": "alaverdyan2020", "intra": "perez2003 baugh2023", "inter": "perez2003 baugh2023", "sink": "baugh2023", "source": "baugh2023", "smooth": "baugh2023",
    "perlin": "zavrtanik2021", "noise": "kascenas2022", "swap": "chen2019 venkatakrishnan2020", "brain": "billot2023", "ct": "", "textures": "", "mvtec": "bergmann2021", "chest": "", "torso": "", "photos": "",
    "vindr": "nguyen2022", "spider": "vandergraaf2024", "chexpert": "irvin2019", "wmh": "kuijf2019", "brats": "menze2015 bakas2017 baid2021", "isles": "maier2017", "mslub": "lesjak2017", "msseg": "commowick2021", "msseg2008": "styner2008",
    "isbi": "carass2017", "ixi": "", "hcp": "vanessen2012", "mood_brain": "zimmerer2022", "mood": "zimmerer2022", "cross": "", "folder": "",
}
ENTRY = re.compile(r"^\((\w+)\)=\n\*\*(.+?) \((\d{4})\)\.\*\*", re.M)
CITED = re.compile(r"([A-ZÀ-Ž][\w'’-]+)(?:,? (?:et al\.|and others|(?:and|&) [A-ZÀ-Ž]\w+))?(?:,[^.;()\d]{0,40})?[ (]{1,2}(\d{4})")


class Papers:
    "The bibliography by key: `{key: (short name, first author, year)}`."
    def __init__(self):
        self.said = {}
        for key, authors, year in ENTRY.findall((SITE/"bibliography.md").read_text(encoding="utf-8")):
            names = [re.sub(r"^(?:\w[\w-]*\.[ -]?)+ ?", "", a.strip()) for a in re.split(r", | and ", authors)]
            self.said[key] = (names[0] + (" et al." if len(names) > 2 or "and others" in authors else f" and {names[1]}" if len(names) == 2 else "") + f" {year}", names[0].split()[-1].lower(), year)

    def of(self, name, docstring):
        "Links to the papers of a component. Errors: `KeyError` for a key that the bibliography does not have."
        cited = [k for who, year in CITED.findall(docstring) for k, (_, author, y) in self.said.items() if (who.lower(), year) == (author, y)]
        keys = PAPERS[name].split() if name in PAPERS else list(dict.fromkeys(cited))
        return ", ".join(f"[{self.said[k][0]}](bibliography.md#{k})" for k in keys)


def docstring(entry):
    "Of the component, read without importing it; where it is a function or class of its module."
    module, name = entry.target.split(":")
    found, _ = api.things((LIBRARY.parent/f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    return next((api.ast.get_docstring(t.node) or "" for t in found if t.name == name), "")


def table(head, rows):
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def page(pages):
    "The page as Markdown."
    by_module, papers = {p.module: p for p in pages if p.module}, Papers()
    shared = [e.target for e in catalog.MODELS.values()]

    def row(name, entry):
        module, target = entry.target.split(":")
        chapter = by_module[module.removeprefix("anomaly_nb.")]
        learns = catalog.TASKS.get(entry.task) if shared.count(entry.target) > 1 else None        # fpi, pii, nsa are one network and another task
        taught = by_module[learns.target.split(":")[0].removeprefix("anomaly_nb.")] if learns else None
        chapters = ", ".join(f"[{c.name}](../{c.doc}.ipynb)" for c in (chapter, taught) if c)
        return [f"{{py:obj}}`{name} <{module}.{target}>`", entry.about, papers.of(name, docstring(entry)), chapters, ", ".join(f"{d}D" for d in entry.dims)]

    head = ["name", "what it is", "paper", "chapter", "works in"]
    said = ["# Methods", "Every component that an experiment can name, from the catalog of the library: `anomaly-nb run evaluate -p model=sae -p detector=ocsvm`. A name leads to its reference, a paper to the bibliography."]
    said += ["## Models", "Grouped as reports group them: by what a method takes for normal."]
    for approach, about in catalog.APPROACHES.items():
        rows = [row(n, e) for n, e in catalog.MODELS.items() if e.approach == approach]
        if rows: said += [f"### {approach.capitalize()}", about[0].upper() + about[1:] + ".", table(head, rows)]
    for title, about, entries in (("Detectors", "One-class detectors on the vectors of a model (`detector=`).", catalog.DETECTORS), ("Tasks", "Invented anomalies, and questions whose answer is known (`task=`).", catalog.TASKS),
                                  ("Data sets", "Embedded cohorts are made on first use; all others are read from your own copies (`dataset=`).", catalog.DATASETS)):
        columns = slice(0, 4 if title in ("Data sets", "Detectors") else 5)
        said += [f"## {title}", about, table(head[columns], [row(n, e)[columns] for n, e in entries.items()])]
    return "\n\n".join(said) + "\n"
