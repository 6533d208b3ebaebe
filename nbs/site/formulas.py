r"""LaTeX to MathML while the site is built: browsers draw MathML by themselves, so no script and no font is fetched when a page is read.

What is known is what the notebooks use: letters, scripts, fractions, roots, accents, braces, fences and their sizes, sums, texts, cases. Anything else is an error that names the page: write it otherwise, or add it here."""
import html
import re
import unicodedata

from docutils.nodes import SkipNode
from sphinx.util.logging import getLogger

logger = getLogger(__name__)
TOKEN = re.compile(r"\\(?:operatorname\*|[A-Za-z]+|.)|\d+(?:\.\d+)?|\s+|.", re.S)
GREEK = {n: unicodedata.lookup(f"GREEK SMALL LETTER {n.upper()}") for n in "alpha beta gamma delta zeta eta theta iota kappa mu nu xi pi rho sigma tau upsilon chi psi omega".split()}
GREEK |= {"lambda": "λ", "epsilon": "ϵ", "varepsilon": "ε", "phi": "ϕ", "varphi": "φ", "vartheta": "ϑ", "varrho": "ϱ"}
CAPITALS = {n: unicodedata.lookup(f"GREEK CAPITAL LETTER {n.upper()}") for n in "Gamma Delta Theta Xi Pi Sigma Upsilon Phi Psi Omega".split()} | {"Lambda": "Λ"}
ORDINARY = {"ell": "ℓ", "infty": "∞", "partial": "∂", "nabla": "∇", "varnothing": "∅", "emptyset": "∅", "exists": "∃", "forall": "∀", "top": "⊤", "dots": "…", "ldots": "…", "cdots": "⋯", "hbar": "ℏ", "#": "#", "%": "%", "&": "&", "$": "$", "_": "_", "degree": "°", "prime": "′"}
BINARY = {"cdot": "⋅", "times": "×", "pm": "±", "mp": "∓", "odot": "⊙", "oplus": "⊕", "otimes": "⊗", "cup": "∪", "cap": "∩", "setminus": "∖", "circ": "∘", "ast": "∗", "wedge": "∧", "vee": "∨", "div": "÷"}
RELATIONS = {"in": "∈", "notin": "∉", "ni": "∋", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "ll": "≪", "gg": "≫", "approx": "≈", "sim": "∼", "simeq": "≃", "equiv": "≡", "propto": "∝", "to": "→", "rightarrow": "→",
             "leftarrow": "←", "gets": "←", "mapsto": "↦", "Rightarrow": "⇒", "Leftarrow": "⇐", "Leftrightarrow": "⇔", "Longleftrightarrow": "⟺", "iff": "⟺", "implies": "⟹", "leftrightarrow": "↔", "uparrow": "↑", "downarrow": "↓",
             "subset": "⊂", "subseteq": "⊆", "supset": "⊃", "mid": "|", "parallel": "∥", "perp": "⊥", "colon": ":"}
LARGE = {"sum": "∑", "prod": "∏", "bigcup": "⋃", "bigcap": "⋂"}
INTEGRALS = {"int": "∫", "iint": "∬", "oint": "∮"}
LIMITS = {"max", "min", "sup", "inf", "lim", "det", "argmax", "argmin"}
FUNCTIONS = {"log", "ln", "exp", "sin", "cos", "tan", "tanh", "cosh", "sinh", "arg", "arctan", "arccos", "arcsin", "deg", "dim", "ker", "Pr"}
SPACES = {",": 1/6, ":": 2/9, ">": 2/9, ";": 5/18, "!": -1/6, " ": 1/4, "quad": 1, "qquad": 2, "\n": 1/4}
ACCENTS = {"hat": "^", "widehat": "^", "tilde": "~", "widetilde": "~", "bar": "¯", "dot": "˙", "ddot": "¨", "vec": "→"}
OPEN = {"(": "(", "[": "[", r"\{": "{", r"\lbrace": "{", r"\langle": "⟨", r"\lfloor": "⌊", r"\lceil": "⌈", r"\lvert": "|", r"\lVert": "‖"}
CLOSE = {")": ")", "]": "]", r"\}": "}", r"\rbrace": "}", r"\rangle": "⟩", r"\rfloor": "⌋", r"\rceil": "⌉", r"\rvert": "|", r"\rVert": "‖"}
EITHER = {"|": "|", r"\|": "‖", r"\vert": "|", r"\Vert": "‖", "/": "/"}
SIZES = {"big": 1.2, "Big": 1.623, "bigg": 2.047, "Bigg": 2.47}
ALPHABETS = {"mathbb": "DOUBLE-STRUCK", "mathcal": "SCRIPT", "mathscr": "SCRIPT", "mathbf": "BOLD", "boldsymbol": "BOLD", "bm": "BOLD", "mathfrak": "FRAKTUR"}


class FormulaError(ValueError):
    "A formula that is not understood."


def tag(name, content, **attributes): return f"<{name}{''.join(f' {k}={chr(34)}{v}{chr(34)}' for k, v in attributes.items())}>{content}</{name}>"
def mo(sign, **attributes): return tag("mo", html.escape(sign), **attributes)
def space(em): return f'<mspace width="{em:.3g}em"></mspace>'
def row(parts): return parts[0] if len(parts) == 1 else tag("mrow", "".join(parts))


def letter_of(alphabet, letter):
    "A letter of a mathematical alphabet; the letter itself where there is none."
    for name in (f"MATHEMATICAL {alphabet} {'CAPITAL' if letter.isupper() else 'SMALL'} {letter.upper()}", f"{alphabet} CAPITAL {letter.upper()}", f"{alphabet} SMALL {letter.upper()}", f"MATHEMATICAL {alphabet} DIGIT {unicodedata.name(letter, '').removeprefix('DIGIT ')}"):
        try: return unicodedata.lookup(name)
        except KeyError: pass
    return letter


class Parser:
    "One formula. Atoms are (MathML, kind): `ord`, `bin`, `rel`, `open`, `close`, `punct`, `fun` (a name), `lim` (scripts stand below and above), `space`."
    def __init__(self, tex): self.tokens, self.at = TOKEN.findall(tex), 0

    def peek(self):
        while self.at < len(self.tokens) and self.tokens[self.at].isspace(): self.at += 1
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def next(self):
        token = self.peek()
        if token is None: raise FormulaError("ends too early")
        self.at += 1
        return token

    def raw(self):
        "The text of a group {...}, or one token."
        if (token := self.next()) != "{": return token
        depth, found = 1, []
        while depth:
            if self.at >= len(self.tokens): raise FormulaError("a brace is not closed")
            token = self.tokens[self.at]
            self.at += 1
            depth += (token == "{") - (token == "}")
            found.append(token)
        return "".join(found[:-1])

    def argument(self):
        "MathML of a group or of one token: of a number its first digit."
        token = self.next()
        if token == "{": return row(self.row("}"))
        if token[0].isdigit() and len(token) > 1:
            self.tokens[self.at:self.at] = [token[1:]]
            token = token[0]
        return self.atom(token, None)[0]

    def row(self, *until):
        "The atoms up to one of the tokens `until`, which is taken; with scripts, and with the space that names of functions need."
        out, before = [], None
        while True:
            token = self.peek()
            if token is None:
                if None in until or not until: return out or [tag("mrow", "")]
                raise FormulaError(f"{until[0]} is missing")
            if token in until:
                self.at += 1
                self.ended = token
                return out or [tag("mrow", "")]
            self.at += 1
            if token in "^_'": atom, self.at = (tag("mrow", ""), "ord"), self.at - 1
            else: atom = self.atom(token, before)
            if atom is None: continue
            made, kind = self.scripts(*atom)
            if before in ("fun", "lim") and kind in ("ord", "fun", "lim") or kind in ("fun", "lim") and before in ("ord", "close"): out.append(space(1/6))
            out.append(made)
            if kind != "space": before = kind

    def scripts(self, base, kind):
        below = above = None
        primes = 0
        while (token := self.peek()) in ("_", "^", "'"):
            self.at += 1
            if token == "'": primes += 1
            elif token == "_" and below is None: below = self.argument()
            elif token == "^" and above is None: above = self.argument()
            else: raise FormulaError("two scripts at one place")
        if primes: above = row([tag("mi", "′" * primes), *([above] if above else [])])
        if below is None and above is None: return base, "ord" if kind == "brace" else kind
        names = ("munder", "mover", "munderover") if kind in ("lim", "brace", "large") else ("msub", "msup", "msubsup")
        made = tag(names[2], base + below + above) if below and above else tag(names[0], base + below) if below else tag(names[1], base + above)
        return made, "ord" if kind == "brace" else kind

    def fence(self):
        "The sign of a delimiter after \\left, \\right or a size, and its kind."
        token = self.next()
        if token == ".": return "", "open"
        for signs, kind in ((OPEN, "open"), (CLOSE, "close"), (EITHER, "either")):
            if token in signs: return signs[token], kind
        raise FormulaError(f"{token} is no delimiter")

    def text(self, said, **attributes):
        "A text, with the formulas in it; its blanks stay."
        parts = re.split(r"\$([^$]*)\$", re.sub(r"\\([_%#& $])", r"\1", said))
        return row([row(Parser(p).row()) if n % 2 else tag("mtext", html.escape(re.sub(r"^\s|\s$", "\u00a0", p)), **attributes) for n, p in enumerate(parts) if p])

    def rows(self, end):
        "The rows of an environment, up to \\end."
        made, cells = [], []
        while True:
            cells.append(tag("mtd", "".join(self.row("&", "\\\\", "\\end"))))
            if self.ended == "&": continue
            made.append(tag("mtr", "".join(cells)))
            cells = []
            if self.ended == "\\end":
                if self.raw() != end: raise FormulaError(f"\\end{{{end}}} is missing")
                return made

    def atom(self, token, before):
        "(MathML, kind) of what begins with `token`; `before`: the kind of the atom before."
        if token == "{": return row(self.row("}")), "ord"
        if token == "}": raise FormulaError("a brace is closed that was not opened")
        if token[0].isdigit(): return tag("mn", token), "ord"
        if token == "~": return space(1/3), "space"
        if token in OPEN: return mo(OPEN[token], form="prefix", stretchy="false"), "open"
        if token in CLOSE: return mo(CLOSE[token], form="postfix", stretchy="false"), "close"
        if token in EITHER: return mo(EITHER[token], stretchy="false", lspace="0", rspace="0"), "either"
        if token in "+-*" or token[1:] in BINARY:
            sign = {"-": "−", "*": "∗"}.get(token, BINARY.get(token[1:], token))
            return mo(sign, **({} if before in ("ord", "close", "either") else {"form": "prefix", "lspace": "0", "rspace": "0"})), "bin"
        if token in "=<>:": return mo(token), "rel"
        if token in ",;": return mo(token), "punct"
        if token in ".!?": return mo(token, lspace="0", rspace="0"), "ord"
        if len(token) == 1:
            if token.isalpha(): return tag("mi", token), "ord"
            if token in "≤≥≈→×·±∈−": return mo(token), "rel" if token not in "×·±−" else "bin"
            raise FormulaError(f"{token!r} is not known")
        return self.command(token[1:])

    def command(self, name):
        if name in SPACES: return space(SPACES[name]), "space"
        if name in GREEK: return tag("mi", GREEK[name]), "ord"
        if name in CAPITALS: return tag("mi", CAPITALS[name], mathvariant="normal"), "ord"
        if name in ORDINARY: return tag("mi", html.escape(ORDINARY[name]), mathvariant="normal"), "ord"
        if name == "mid": return mo("|", stretchy="false", lspace="0.278em", rspace="0.278em"), "rel"
        if name in RELATIONS: return mo(RELATIONS[name], stretchy="false"), "rel"
        if name in LARGE: return mo(LARGE[name]), "large"
        if name in INTEGRALS: return mo(INTEGRALS[name]), "int"
        if name in LIMITS: return mo(name, movablelimits="true", lspace="0", rspace="0"), "lim"
        if name in FUNCTIONS: return tag("mi", name), "fun"
        if name == "operatorname": return tag("mi", html.escape(self.raw())), "fun"
        if name == "operatorname*": return mo(self.raw(), movablelimits="true", lspace="0", rspace="0"), "lim"
        if name == "bmod": return mo("mod", lspace="0.222em", rspace="0.222em"), "bin"
        if name in ("text", "mbox", "textrm", "textit"): return self.text(self.raw()), "ord"
        if name == "texttt": return self.text(self.raw(), **{"class": "code"}), "ord"
        if name in ("mathrm", "mathit", "mathsf", "mathtt"):
            said = self.raw()
            if re.fullmatch(r"[A-Za-z0-9 .,:/+-]+", said): return tag("mi", said.replace("-", "‐").strip(), mathvariant="normal"), "ord"
            return row(Parser(said).row()), "ord"
        if name in ALPHABETS:
            said = self.raw()
            if re.fullmatch(r"\w+", said): return row([tag("mi", letter_of(ALPHABETS[name], c)) for c in said]), "ord"
            return row(Parser(said).row()), "ord"
        if name in ACCENTS: return tag("mover", self.argument() + mo(ACCENTS[name], stretchy="true" if name.startswith("wide") else "false"), accent="true"), "ord"
        if name == "overline": return tag("mrow", self.argument(), **{"class": "overline"}), "ord"
        if name == "underline": return tag("mrow", self.argument(), **{"class": "underline"}), "ord"
        if name == "underbrace": return tag("munder", self.argument() + mo("⏟", stretchy="true")), "brace"
        if name == "overbrace": return tag("mover", self.argument() + mo("⏞", stretchy="true")), "brace"
        if name in ("xrightarrow", "xleftarrow"): return tag("mover", mo("→" if name == "xrightarrow" else "←", stretchy="true") + self.argument()), "rel"
        if name == "frac": return tag("mfrac", self.argument() + self.argument()), "ord"
        if name in ("tfrac", "dfrac"): return tag("mstyle", tag("mfrac", self.argument() + self.argument()), displaystyle=str(name == "dfrac").lower(), scriptlevel="0"), "ord"
        if name == "binom": return tag("mrow", mo("(") + tag("mfrac", self.argument() + self.argument(), linethickness="0") + mo(")")), "ord"
        if name == "sqrt":
            if self.peek() != "[": return tag("msqrt", self.argument()), "ord"
            self.at += 1
            index = row(self.row("]"))
            return tag("mroot", self.argument() + index), "ord"
        if name == "left":
            sign, _ = self.fence()
            inside = self.row("\\right")
            end, _ = self.fence()
            return tag("mrow", (mo(sign, form="prefix", stretchy="true") if sign else "") + "".join(inside) + (mo(end, form="postfix", stretchy="true") if end else "")), "close"
        if name.rstrip("lrm") in SIZES and name not in FUNCTIONS:
            size, (sign, kind) = SIZES[name.rstrip("lrm")], self.fence()
            form = {"open": {"form": "prefix"}, "close": {"form": "postfix"}}.get(kind, {})
            return tag("mrow", mo(sign, stretchy="true", symmetric="true", minsize=f"{size}em", maxsize=f"{size}em", lspace="0", rspace="0", **form)), kind      # a row of its own keeps its size under a script
        if name in ("displaystyle", "textstyle", "limits", "nolimits", "scriptstyle"): return None      # sizes are the browser's
        if name == "begin":
            kind = self.raw()
            if kind not in ("cases", "aligned", "align", "matrix", "pmatrix", "bmatrix", "array"): raise FormulaError(f"\\begin{{{kind}}} is not known")
            table = tag("mtable", "".join(self.rows(kind)), **{"class": kind})
            around = {"cases": ("{", ""), "pmatrix": ("(", ")"), "bmatrix": ("[", "]")}.get(kind, ("", ""))
            return tag("mrow", "".join([mo(around[0], form="prefix", stretchy="true")] * bool(around[0]) + [table] + [mo(around[1], form="postfix", stretchy="true")] * bool(around[1]))), "ord"
        raise FormulaError(f"\\{name} is not known")


def mathml(tex, block=False):
    "MathML of a formula. Errors: `FormulaError`."
    made = "".join(Parser(tex.strip()).row())
    return tag("math", tag("mrow", made), **({"display": "block"} if block else {}))


def _write(translator, node, block):
    try: made = mathml(node.astext(), block)
    except FormulaError as error:
        logger.warning("the formula %r: %s", node.astext().strip(), error, location=node)
        made = f"<code>{html.escape(node.astext())}</code>"
    translator.body.append(f'<div class="formula">{made}</div>\n' if block else f'<span class="formula{" long" * (len(node.astext()) > 40)}">{made}</span>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (lambda self, node: _write(self, node, False), None), (lambda self, node: _write(self, node, True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
