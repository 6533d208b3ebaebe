"""The source of the site in one folder: the notebooks as Sphinx shall see them, the site's own pages, and the pages that are made while building."""
import json
import re
import shutil

import api
import gallery
import methods
from course import NBS, PARTS, ROOT, SITE, Notebook, alt_of, notebooks, text

WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json", "application/javascript")
_MARK = re.compile(r"^#\|[ \t]*(\S+).*\n?", re.M)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def outside(source, folder):
    "Links to files of the repository that have no page here become the file's name; CONTRIBUTING.md has one. What does not exist stays as it is: a warning, and the build fails."
    def told(match):
        image, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target): return match.group(0)
        place = (folder/target.partition("#")[0]).resolve()
        if image or not place.exists() or place.is_relative_to(NBS) and place.is_file(): return match.group(0)
        if place == ROOT/"CONTRIBUTING.md": return f"[{label}]({'../' * len(folder.relative_to(NBS).parts)}site/contributing.md)"
        named = place.relative_to(ROOT).as_posix()
        return label if label.strip("`") in (named, place.name, target) else f"{label} (`{named}`)"
    parts = re.split(r"(```.*?```|`[^`\n]*`)", source, flags=re.S)
    return "".join(p if n % 2 else re.sub(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)", told, p) for n, p in enumerate(parts))


def opening(page):
    "What stands below the title of a page: where it is in the course, and what it exports."
    kind, module = PARTS[page.part][0], page.module
    up = "../" * page.doc.count("/")
    said = [f"[{kind}]({up}site/parts/{page.part}.md)", f"`nbs/{page.doc}.ipynb`"]
    if module: said.append(f"exports [`anomaly_nb.{module}`]({up}site/api/anomaly_nb.{module}.rst)")
    return "```{container} whereabouts\n" + " · ".join(said) + "\n```"


def cells_of(page):
    "The cells as the site shows them: no marks of nbdev, no hidden checks, no widgets (what stands beside them is shown), words for each figure, an anchor for each cell."
    cells, heading = [], page.title
    for n, cell in enumerate(page.cells):
        source, tags = text(cell), list(cell["metadata"].get("tags", []))
        cell = {k: v for k, v in cell.items() if k in ("cell_type", "id", "outputs", "execution_count")} | {"metadata": {"tags": tags}}
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.+)$", source, re.M) or [heading])[-1].replace("`", "").replace("*", "")
            source = re.sub(r"(?<=[.)])[ \n](?=\*\*(?:You need|It takes)\*\*)", "\\\\\n", re.sub(r"\n+</details>", "\n\n</details>", source))      # each on a line of its own
            source = outside(source, page.path.parent)
            if not n and page.part: source = re.sub(r"(\n> .+)(?=\n|\Z)", lambda m: f"{m.group(1)}\n\n{opening(page)}", source, count=1)
        elif cell["cell_type"] == "code":
            marks = _MARK.findall(source)
            if {"hide", "default_exp"} & set(marks): continue
            source = _MARK.sub("", source).strip("\n")
            if "hide_input" in tags: tags.append("remove-input")
            tags += [f"mark-{m.rstrip(':')}" for m in marks] + [f"at-{cell['id']}"] * ("id" in cell)
            outputs = []
            for output in cell.get("outputs", []):
                data = {k: v for k, v in output.get("data", {}).items() if k not in WIDGETS}
                if "data" in output and set(output["data"]) & set(WIDGETS) and set(data) <= {"text/plain"}: continue      # a widget alone: its fallback is another output
                if set(data) > {"text/plain"}: data.pop("text/plain")
                if "text/html" in data: data["text/html"] = re.sub(r"<a\b[^>]*href=[\"'](?!https?:)[^>]*>(.*?)</a>", r"<span>\1</span>", "".join(data["text/html"]), flags=re.S)      # a link within the report of a run
                outputs.append(output | ({"data": data, "metadata": {}} if "data" in output else {}))
            cell["outputs"], cell["execution_count"] = outputs, None
            for output in outputs: output.pop("execution_count", None) if output["output_type"] != "execute_result" else output.update(execution_count=None)
            if any(mime.startswith("image/") for o in outputs for mime in o.get("data", {})): cell["metadata"]["mystnb"] = {"image": {"alt": alt_of(heading, source)}}
            if not source and not outputs: continue
        cells.append(cell | {"source": source})
    return cells


def stage_notebook(page, into, more=""):
    cells = cells_of(page) + ([{"cell_type": "markdown", "id": "site-contents", "metadata": {}, "source": more}] if more else [])
    nb = {"cells": cells, "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    write(into/f"{page.doc}.ipynb", json.dumps(nb, ensure_ascii=False))


def toctree(entries, *options):
    return "\n".join(["```{toctree}", *options, "", *entries, "```"])


def part_page(part, pages):
    "A part of the course: what it is about, and its chapters with a line for each."
    title, _, digit, about = PARTS[part]
    head = f"{digit} · {title}" if digit else title
    return "\n\n".join([f"# {head}", about, "\n".join(f"[{p.name}](../../{p.doc}.ipynb)\n: {p.line}\n" for p in pages), toctree([f"{p.name} </{p.doc}>" for p in pages], ":hidden:")]) + "\n"


def contents():
    "The end of the index: every part, and what stands beside the course."
    return "\n\n".join(["## Contents", toctree([f"site/parts/{p}" for p in PARTS], ":maxdepth: 1", ":caption: The course"),
                        toctree(["site/gallery", "site/methods", "site/glossary", "site/bibliography", *["site/contributing"] * (ROOT/"CONTRIBUTING.md").exists(), "site/api/index"], ":maxdepth: 1", ":caption: Reference")])


def stage(into):
    "Writes the whole source into the folder `into`; returns the pages."
    pages = notebooks()
    for page in pages: stage_notebook(page, into)
    stage_notebook(Notebook(NBS/"index.ipynb"), into, contents())
    for picture in (p for ending in ("png", "svg", "jpg", "gif") for p in NBS.rglob(f"*.{ending}")):
        (into/picture.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, into/picture.relative_to(NBS))
    for own in SITE.glob("*.md"): write(into/"site"/own.name, outside(own.read_text(encoding="utf-8"), SITE))
    contributing = ROOT/"CONTRIBUTING.md"
    if contributing.exists(): write(into/"site"/"contributing.md", re.sub(r"\]\(nbs/", "](../", outside(contributing.read_text(encoding="utf-8"), ROOT)))
    for part in PARTS: write(into/"site"/"parts"/f"{part}.md", part_page(part, [p for p in pages if p.part == part]))
    write(into/"site"/"gallery.md", gallery.page(pages, into/"site"/"thumbs"))
    write(into/"site"/"methods.md", methods.page(pages))
    for name, content in api.pages(pages).items(): write(into/"site"/"api"/f"{name}.rst", content)
    return pages
