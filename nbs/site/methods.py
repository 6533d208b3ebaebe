"""The table of methods, made from the catalog: what can be named in an experiment, what it is, where it was published, which chapter builds it."""
from anomaly_nb import catalog

import bibliography_links


def dims(entry): return " and ".join(f"{d}D" for d in entry.dims)


def table(head, rows):
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def row(name, entry, by_module, papers):
    module, target = entry.target.split(":")
    page = by_module.get(module.removeprefix("anomaly_nb."))
    return [f"{{py:obj}}`{name} <{module}.{target}>`", entry.about, papers(page) if page else "", f"[{page.name}](../{page.doc}.ipynb)" if page else "", dims(entry)]


def page(pages):
    "The page as Markdown."
    by_module, papers = {p.module: p for p in pages if p.module}, bibliography_links.papers()
    head = ["name", "what it is", "paper", "chapter", "works in"]
    said = ["# Methods", "Every component that an experiment can name, from the catalog of the library: `anomaly-nb run evaluate -p model=sae -p detector=ocsvm`. A name leads to its reference, a paper to the bibliography."]
    said += ["## Models", "Grouped as reports group them: by what a method takes for normal."]
    for approach, about in catalog.APPROACHES.items():
        rows = [row(n, e, by_module, papers) for n, e in catalog.MODELS.items() if e.approach == approach]
        if rows: said += [f"### {approach.capitalize()}", about[0].upper() + about[1:] + ".", table(head, rows)]
    for title, about, entries in (("Detectors", "One-class detectors on the vectors of a model (`detector=`).", catalog.DETECTORS), ("Tasks", "Invented anomalies, and questions whose answer is known (`task=`).", catalog.TASKS),
                                  ("Data sets", "Embedded cohorts are made on first use; all others are read from your own copies (`dataset=`).", catalog.DATASETS)):
        columns = [0, 1, 2, 3] if title == "Data sets" else [0, 1, 2, 3, 4]
        said += [f"## {title}", about, table([head[c] for c in columns], [[row(n, e, by_module, papers)[c] for c in columns] for n, e in entries.items()])]
    return "\n\n".join(said) + "\n"
