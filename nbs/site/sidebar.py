"""The tree at the side: all parts, and below the part of the page what it holds. (Furo's own unfolds all of the course on every page: half a thousand links each, and minutes of building.)"""
import functools
import html

import furo
from sphinx import addnodes
from sphinx.search.en import SearchEnglish


def trees(app, env):
    "Keeps {page: [(caption, [(title, page below)])]} of all toctrees."
    env.course_tree = {}
    for doc, below in env.toctree_includes.items():
        if not below: continue
        env.course_tree[doc] = [(t.get("caption") or "", [(title or env.titles[ref].astext(), ref) for title, ref in t["entries"]]) for t in env.get_doctree(doc).findall(addnodes.toctree)]


def listing(tree, entries, chain, pathto, level=1):
    out = []
    for title, doc in entries:
        here, open_ = doc == chain[-1], doc in chain and doc in tree
        below = "".join(listing(tree, e, chain, pathto, level + 1) for _, e in tree[doc]) if open_ else ""
        marks = f"toctree-l{level}" + " current" * (doc in chain) + " current-page" * here
        out.append(f'<li class="{marks}"><a class="reference internal{" current" * (doc in chain)}" href="{html.escape(pathto(doc))}">{html.escape(title)}</a>{below}</li>')
    return f'<ul class="{"current" if any(d in chain for _, d in entries) else ""}">{"".join(out)}</ul>' if out else ""


def context(app, pagename, templatename, context, doctree):
    tree, parent = app.env.course_tree, {d: p for p, trees in app.env.course_tree.items() for _, e in trees for _, d in e}
    chain = [pagename]
    while chain[0] in parent and parent[chain[0]] not in chain: chain.insert(0, parent[chain[0]])
    def toctree(**options):
        return "".join(f'<p class="caption" role="heading"><span class="caption-text">{html.escape(c)}</span></p>' * bool(c) + listing(tree, e, chain, context["pathto"]) for c, e in tree[app.config.root_doc])
    context["toctree"] = toctree


furo.get_navigation_tree = str                                              # the tree needs no switches: it is unfolded where the page is
SearchEnglish.stem = functools.lru_cache(100_000)(SearchEnglish.stem)       # the same words stand on every page


def setup(app):
    app.connect("env-updated", lambda app, env: trees(app, env))
    app.connect("html-page-context", context, priority=10)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
