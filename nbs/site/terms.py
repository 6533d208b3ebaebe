"""Terms of the glossary become links where a page names them first: in text, never in code, headings, formulas or other links."""
import re

from docutils import nodes
from sphinx.util.nodes import make_refnode

PAGE = "site/glossary"
SKIP = (nodes.literal, nodes.literal_block, nodes.reference, nodes.title, nodes.math, nodes.math_block, nodes.raw, nodes.image, nodes.caption, nodes.rubric)


def linked(docname):
    "Whether terms are linked on this page."
    return docname != PAGE and not docname.startswith(("site/api/", "site/gallery", "site/methods", "site/parts/"))


def terms_of(doctree):
    "{term: (anchor, what it is)} of the glossary page: items of definition lists, in the order of the page."
    found = {}
    for item in doctree.findall(nodes.definition_list_item):
        for term in item.findall(nodes.term):
            if not term["ids"]: continue
            name, about = term.astext().split("\n")[0].strip(), re.sub(r": \d{3}\b.*$", ".", " ".join(item[-1].astext().split()))      # up to the number of the chapter
            for spoken in spellings(name): found.setdefault(spoken, (term["ids"][0], about))
    return found


def spellings(name):
    "`average precision (AP)` is spoken `average precision` and `AP`; `a, b` are two terms; `sink, source deformation` are `sink deformation` and `source deformation`: no link from every sink."
    parts, inside = re.split(r", | / ", re.sub(r"\s*\([^)]*\)", "", name).strip()), re.findall(r"\(([^)]+)\)", name)
    last = parts[-1].split()
    heads = [p if len(p.split()) >= len(last) else f"{p} {last[-1]}" for p in parts]
    return [s.strip() for part in [*heads, *inside] for s in part.split(",") if len(s.strip()) > 1]


def pattern(terms):
    "Matches a term, longest first, with a plural; a term with a capital after its first letter is matched as it is written, others in either case."
    words = sorted(terms, key=len, reverse=True)
    exact = lambda w: any(c.isupper() for c in w)
    said = "|".join((re.escape(w) if exact(w) else f"(?i:{re.escape(w)})").replace("\\ ", r"\s+") for w in words)
    return re.compile(rf"(?<![\w-])({said})(s|es)?(?![\w-])") if words else None


def link(app, doctree, docname):
    if app.builder.format != "html" or not linked(docname) or PAGE not in app.env.all_docs: return
    if not hasattr(app.env, "course_terms"):
        terms = terms_of(app.env.get_doctree(PAGE))
        app.env.course_terms = (terms, {k.lower(): k for k in terms}, pattern(terms))
    terms, by_lower, matcher = app.env.course_terms
    if matcher is None: return
    seen = set()
    for node in list(doctree.findall(nodes.Text)):
        parent = node.parent
        if any(isinstance(a, SKIP) or "whereabouts" in a.get("classes", ()) for a in _above(parent)): continue
        said, at, new = node.astext(), 0, []
        for match in matcher.finditer(said):
            name = by_lower[" ".join(match.group(1).lower().split())]
            anchor, about = terms[name]
            if anchor in seen: continue
            seen.add(anchor)
            refnode = make_refnode(app.builder, docname, PAGE, anchor, nodes.Text(match.group(0)), about[:200] + ("..." if len(about) > 200 else ""))
            refnode["classes"].append("term")
            new += [nodes.Text(said[at:match.start()])] * (match.start() > at) + [refnode]
            at = match.end()
        if new: parent.replace(node, new + [nodes.Text(said[at:])] * (at < len(said)))


def _above(node):
    while isinstance(node, nodes.Element):
        yield node
        node = node.parent


def anchors(app, doctree):
    "The class `tag_at-ID` of a cell becomes its anchor."
    for cell in doctree.findall(nodes.container):
        for name in [c for c in cell["classes"] if c.startswith("tag_at-")]:
            cell["classes"].remove(name)
            cell["ids"].append(name.removeprefix("tag_at-"))


def setup(app):
    app.connect("doctree-read", anchors)
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
