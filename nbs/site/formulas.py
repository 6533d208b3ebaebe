"""LaTeX to MathML while the site is built: the browser draws formulas by itself, no script and no font is fetched. Converter: docutils; what it lacks of amsmath is added here."""
import html
import re

from docutils.utils.math import MathError, latex2mathml
from docutils.utils.math.mathml_elements import mo, mtext
from sphinx.errors import SphinxError

_SIZES = {"big": "1.2em", "Big": "1.623em", "bigg": "2.047em", "Bigg": "2.470em"}
_SYMBOLS = {"dots": "\u2026", "iff": "\u27fa", "lVert": "\u2016", "rVert": "\u2016", "lvert": "|", "rvert": "|"}
_FENCES = {"lVert": "prefix", "lvert": "prefix", "rVert": "postfix", "rvert": "postfix"}
_DELIMITERS = {r"\{": "{", r"\}": "}", r"\|": "\u2016", r"\lVert": "\u2016", r"\rVert": "\u2016", r"\lfloor": "\u230a", r"\rfloor": "\u230b", r"\langle": "\u27e8", r"\rangle": "\u27e9"}
_docutils = latex2mathml.handle_cmd


def _command(name, node, string):
    "docutils' handler of one command, after those that it does not know or takes for others."
    if name in _SIZES:                                                 # \big( without l or r: a delimiter of one size
        sign, string = latex2mathml.tex_token_or_group(string)
        return node.append(mo(_DELIMITERS.get(sign, sign), minsize=_SIZES[name], maxsize=_SIZES[name], symmetric=True, stretchy=True, lspace="0", rspace="0")), string
    if name in _FENCES: return node.append(mo(_SYMBOLS[name], form=_FENCES[name], stretchy=False, lspace="0", rspace="0")), string
    if name in _SYMBOLS: return node.append(mo(_SYMBOLS[name])), string
    if name == "texttt":
        text, string = latex2mathml.tex_token_or_group(string)
        return node.append(mtext(text.replace(r"\_", "_"), CLASS="texttt")), string
    if name == "textstyle": return node, string                        # in the middle of a formula: the size of a sum, nothing else
    if name == "operatorname" and string.startswith("*"):
        text, string = latex2mathml.tex_token_or_group(string[1:])
        return node.append(mo(text, movablelimits=True, lspace="0", rspace="0.17em")), string
    return _docutils(name, node, string)


latex2mathml.handle_cmd = _command


def mathml(tex, block=False):
    "MathML of a formula. Errors: `MathError`."
    tex = re.sub(r"(\\[dt]?frac\s*)(\d)(?=[\d\\{\s]?)(\d)", r"\1{\2}{\3}", tex)      # \tfrac12 is a half, not twelve over what follows
    return re.sub(r">\s+<", "><", latex2mathml.tex2mathml(tex.strip(), as_block=block))


def _write(translator, node, block):
    tex = node.astext()
    try: made = mathml(tex, block)
    except (MathError, AttributeError, IndexError, ValueError) as error: raise SphinxError(f"{translator.builder.current_docname}: no MathML of {tex!r}: {error}") from None
    made = made.replace("<math ", f'<math alttext="{html.escape(tex.strip(), quote=True)}" ', 1)
    translator.body.append(f'<div class="formula" tabindex="0">{made}</div>\n' if block else f'<span class="formula">{made}</span>')


def _inline(translator, node):
    _write(translator, node, False)
    raise _skip()


def _display(translator, node):
    _write(translator, node, True)
    raise _skip()


def _skip():
    from docutils.nodes import SkipNode
    return SkipNode()


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
