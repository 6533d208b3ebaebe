"""The reference: every public function, class and constant of the library, read from the exported modules without importing them, each with the cell that defines it."""
import ast
import re
import textwrap
from dataclasses import dataclass

from course import LIBRARY, PARTS


@dataclass
class Thing:
    "A public name of a module: its node, the cell of the notebook that defines it, methods that are patched in (node, cell)."
    name: str
    node: ast.AST
    cell: str
    patched: list


def public(tree):
    "`__all__` of a module."
    return next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])


def things(source):
    "(things in the order of the file, patched methods of classes that are defined elsewhere) of a module's text."
    tree = ast.parse(source)
    marks = [(n, m.group(1)) for n, line in enumerate(source.splitlines(), 1) if (m := re.match(r"# %% \S+ #(\S+)", line))]
    cell = lambda node: next((c for n, c in reversed(marks) if n < node.lineno), "")
    names, found, elsewhere = public(tree), {}, []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("patch" in ast.unparse(d).split("(")[0] for d in node.decorator_list) and node.args.args and node.args.args[0].annotation is not None:
            if node.name.startswith("_") and node.name != "__call__": continue
            owner = ast.unparse(node.args.args[0].annotation).split(".")[-1].strip("'\"")
            (found[owner].patched if owner in found else elsewhere).append((owner, node, cell(node)))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name in names: found[node.name] = Thing(node.name, node, cell(node), [])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in getattr(target, "elts", [target]):
                    if getattr(part, "id", "") in names: found.setdefault(part.id, Thing(part.id, node, cell(node), []))
    return list(found.values()), [e for e in elsewhere if not e[0].startswith("_")]


def escaped(text):
    return re.sub(r"([\\*_|`<>])", r"\\\1", text)


def told(docstring, index, indent):
    "A docstring as reStructuredText: paragraphs and lists, code in `backticks`, nothing else is markup."
    out = []
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(docstring.expandtabs()).strip()):
        first, _, rest = paragraph.partition("\n")
        lines = [first.strip(), *textwrap.dedent(rest).splitlines()]
        items, current = [], []
        for line in lines:
            if re.match(r"\s*- ", line) and current: items.append(current); current = []
            current.append(line.strip())
        for item in [*items, current]:
            body = " ".join(item)
            bullet = body.startswith("- ")
            pieces = re.split(r"(``[^`]+``|`[^`]+`)", body[2:] if bullet else body)
            for n, piece in enumerate(pieces):
                if n % 2:
                    code = piece.strip("`")
                    target = index.get(code) if re.search(r"[A-Z_]", code) else None
                    pieces[n] = "\\ " + (f":py:obj:`{code} <{target}>`" if target else f"``{code}``" if code.strip() == code and "\\" not in code else escaped(code)) + "\\ "
                else: pieces[n] = escaped(piece)
            out.append(("- " if bullet else "\\ ") + "".join(pieces))
    return textwrap.indent("\n\n".join(out), " " * indent)


def arguments(node, method):
    "The signature of a function as text; `method`: without its first argument."
    args = ast.parse(f"def f({ast.unparse(node.args)}): pass").body[0].args
    if method and not any(ast.unparse(d) == "staticmethod" for d in node.decorator_list): (args.posonlyargs or args.args or [None]).pop(0)
    back = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(args)}){back}"


def fields(node):
    "Of a dataclass: its arguments as text and [(field, comment)]; of another class (None, [])."
    if not any("dataclass" in ast.unparse(d) for d in node.decorator_list): return None, []
    own = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    given = [f"{n.target.id}: {ast.unparse(n.annotation)}" + (f" = {ast.unparse(n.value)}" if n.value else "") for n in own if "ClassVar" not in ast.unparse(n.annotation)]
    return f"({', '.join(given)})", own


def origin(page, cell, indent):
    "A line that leads to the cell which defines something."
    return f"{' ' * indent}`cell <../../{page.doc}.html{'#' + cell if cell else ''}>`__\n"


def entry(thing, page, index, lines):
    "One public name as reStructuredText."
    node, out = thing.node, []
    where = f"   .. container:: origin\n\n{origin(page, thing.cell, 6)}"
    if isinstance(node, ast.FunctionDef):
        return "\n\n".join([f".. py:function:: {thing.name}{arguments(node, False)}", where, told(ast.get_docstring(node) or "", index, 3)])
    if isinstance(node, ast.ClassDef):
        signature, own = fields(node)
        maker = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        signature = signature or (arguments(maker, True) if maker else "")
        out = [f".. py:class:: {thing.name}{signature}", where]
        if node.bases: out.append("   Bases: " + ", ".join(f":py:obj:`{b} <{index[b]}>`" if b in index else f"``{b}``" for b in (ast.unparse(n) for n in node.bases)))
        out.append(told(ast.get_docstring(node) or "", index, 3))
        for n in own:
            comment = re.search(r"#\s*(.+)$", lines[n.end_lineno - 1])
            if comment: out.append(f"   - ``{n.target.id}``: " + told(comment.group(1), index, 0).removeprefix("\\ "))
        methods = [(n, "") for n in node.body if isinstance(n, ast.FunctionDef) and (not n.name.startswith("_") or n.name == "__call__")] + [(n, c) for _, n, c in thing.patched]
        for n, cell in methods:
            doc = ast.get_docstring(n)
            if not doc: continue
            said = {ast.unparse(d) for d in n.decorator_list}
            is_property = "property" in said or "cached_property" in said or any("as_prop" in s for s in said)
            kind = "py:property" if is_property else "py:method"
            options = "\n      :classmethod:" if "classmethod" in said or any("cls_method" in s for s in said) else "\n      :staticmethod:" if "staticmethod" in said else ""
            out.append(f"   .. {kind}:: {n.name}{'' if is_property else arguments(n, True)}{options}")
            if cell and cell != thing.cell: out.append(f"      .. container:: origin\n\n{origin(page, cell, 9)}")
            out.append(told(doc, index, 6))
        return "\n\n".join(out)
    comment = re.search(r"\s#\s*([^'\"]+)$", lines[node.lineno - 1])
    said = [told(comment.group(1), index, 3)] if comment else []
    if node.end_lineno - node.lineno < 15 and not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)):
        said.append("   .. code-block:: python\n\n" + textwrap.indent("\n".join(lines[node.lineno - 1:node.end_lineno]), " " * 6))
    return "\n\n".join([f".. py:data:: {thing.name}", where, *said])


def pages(notebooks):
    "{name of the page: reStructuredText} of all modules, and the index of them."
    made, parsed, index = {}, {}, {}
    for p in (p for p in notebooks if p.module):
        source = (LIBRARY/f"{p.module.replace('.', '/')}.py").read_text(encoding="utf-8")
        parsed[p] = (*things(source), source.splitlines(), ast.get_docstring(ast.parse(source)) or "")
        for thing in parsed[p][0]: index[thing.name] = None if thing.name in index else f"anomaly_nb.{p.module}.{thing.name}"
    index = {k: v for k, v in index.items() if v}
    for p, (found, elsewhere, lines, doc) in parsed.items():
        name = f"anomaly_nb.{p.module}"
        out = [f"{name}\n{'=' * len(name)}", f".. py:module:: {name}", told(doc, index, 0), f"Built, shown at work and tested in :doc:`{p.name} </{p.doc}>`."]
        out += [entry(t, p, index, lines) for t in found]
        for owner, node, cell in elsewhere:
            if ast.get_docstring(node): out.append(f".. py:method:: {owner}.{node.name}{arguments(node, True)}\n\n   .. container:: origin\n\n{origin(p, cell, 6)}\n\n{told(ast.get_docstring(node), index, 3)}")
        made[name] = "\n\n".join(out) + "\n"
    listed = []
    for part, (title, *_, about) in PARTS.items():
        own = [p for p in parsed if p.part == part]
        if not own: continue
        rows = [f":doc:`anomaly_nb.{p.module} <anomaly_nb.{p.module}>`\n   {told(p.line, index, 0)}" for p in own]
        made[part] = "\n\n".join([f"{title}\n{'=' * len(title)}", "\n\n".join(rows), ".. toctree::\n   :hidden:\n\n" + "\n".join(f"   {p.module} <anomaly_nb.{p.module}>" for p in own)]) + "\n"
        listed.append(f":doc:`{title} <{part}>`\n   {told(about, index, 0)}")
    made["index"] = "\n\n".join(["Reference\n=========", "The public functions, classes and constants of the library, with their docstrings. *Cell* leads to the cell of the notebook that defines a thing: there it is explained, used and tested. "
                                  "All names: :ref:`genindex`; all modules: :ref:`modindex`.", "\n\n".join(listed), ".. toctree::\n   :hidden:\n\n" + "\n".join(f"   {part}" for part in PARTS if part in made)]) + "\n"
    return made
