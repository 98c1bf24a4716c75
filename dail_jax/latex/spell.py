r"""Spellings: reduces the many ways to write a formula in LaTeX to one, without commands that only style it.

Every rule takes time linear in the length of the text.
"""

from __future__ import annotations

import re

# Unicode signs and the LaTeX for them that the rest of this package understands.
_SIGNS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ",
        "\u221a": r"\sqrt ",
        "\u2248": r"\approx ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2260": r"\ne ",
        "\u2261": r"\equiv ",
        "\u21d2": r"\implies ",
        "\u2192": r"\to ",
        "\u2026": r"\ldots ",
        "\u221e": r"\infty ",
        "\u2205": r"\emptyset ",
        "\u03c0": r"\pi ",
        "\u00b0": r"^\circ ",
        "\u00bd": r"\frac{1}{2}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
        "\u00a0": " ",
        "\u2009": r"\,",
        "\u202f": r"\,",
    }
)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207d\u207e\u207f"
_RAISED_RUN, _LEVEL = re.compile(f"[{_RAISED}]+"), str.maketrans(_RAISED, "0123456789+-()n")
_ROOT = re.compile(r"\u221a ?(\d++|[A-Za-z])")


def signs(text: str) -> str:
    """The text with Unicode signs as LaTeX; superscripts in a row form one exponent, and a root covers all digits."""
    text = _RAISED_RUN.sub(lambda m: f"^{{{m[0].translate(_LEVEL)}}}", text)
    return _ROOT.sub(r"\\sqrt{\1}", text).translate(_SIGNS)


# Digits in groups of three. Plain commas and spaces do not join groups: `1,234` may be a list, `155 465` two answers.
_GAP = r"(?:\\[,!:;]|\{(?:,|\\[,!:; ])\}|\{\})++"
_GROUPS = re.compile(rf"(?<!\d)(?<!\d[.,])\d{{1,3}}(?:{_GAP}\d{{3}})++(?!\d)")

# Commands without mathematical meaning: styling (together with its own arguments), sizes and spacing.
_STYLE = re.compile(
    r"\\(?:"
    r"(?:text)?color\s*+(?:\[[^\[\]]*\]\s*+)?\{[^{}]*\}|colorbox\s*+\{[^{}]*\}|fcolorbox\s*+\{[^{}]*\}\s*+\{[^{}]*\}"
    r"|bbox\s*+(?:\[[^\[\]]*\])?(?=\s*\{)"
    r"|(?:[hv]?phantom|[hv]space\*?|tag\*?|label)\s*+\{[^{}]*\}"
    r"|(?:(?:mathbf|mathsf|mathtt|mathnormal|boldsymbol|bold|bm|pmb|underline|uline|ensuremath"
    r"|left|right|middle|[bB]igg?[lrm]?|limits|nolimits|displaystyle|textstyle|scriptstyle|scriptscriptstyle"
    r"|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
    r"|bf|rm|it|sf|tt|bfseries|rmfamily|itshape|boldmath|normalfont|nonumber|notag|strut|mathstrut)(?![a-zA-Z]))"
    r")"
)
# Text in any font, `{\rm cm}` included: all of it becomes `\text`.
_WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|up|md|normal)|emph|[mh]box)\s*+(?=\{)|\{\s*\\(?:rm|bf|it|sf|tt)\s(?=[^{}\\]*\})"
)
_WORDLESS = re.compile(r"\\(?:text|mathrm|mathit|operatorname)\s*\{([^{}A-Za-z\\$]*)\}")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_BINOMIAL = re.compile(r"\\[dt]binom(?![a-zA-Z])")


def plain(formula: str) -> str:
    r"""A formula in a standard spelling, without mere styling: `\textcolor{blue}{\dfrac12}` becomes `{\frac12}`.

    Unicode signs become LaTeX, `10\,000` becomes `10000`, `\textbf` becomes `\text`, and `\text{25}` becomes `{25}`. Row
    breaks, column separators and blanks are kept.
    """
    text = _GROUPS.sub(lambda m: re.sub(r"\D", "", m[0]), signs(formula))
    text = _WORDS.sub(lambda m: r"\text{" if m[0].startswith("{") else r"\text", text)
    text = _STYLE.sub(" ", text)
    text = _WORDLESS.sub(lambda m: f"{{{m[1]}}}" if m[1].strip().isalnum() else m[1], text)
    return _BINOMIAL.sub(r"\\binom", _FRACTION.sub(r"\\frac", text))


_SPACING = re.compile(r"\\[,!;:> ]|~|(?<!\\)&|[_^]?\{\s*\}")
_CHOOSE = re.compile(
    r"\{\s*(?:\{([^{}]{1,40})\}|([^{}]{1,40}?))\s*\\choose\s*(?:\{([^{}]{1,40})\}|([^{}]{1,40}?))\s*\}"
)


def tidy(formula: str) -> str:
    r"""`plain`, also without spacing commands, column separators and needless blanks; `\choose` becomes `\binom`."""
    text = re.sub(r"\s+", " ", _SPACING.sub(" ", plain(formula)))  # first, since _CHOOSE is quadratic in runs of blanks
    text = re.sub(r"\\over(?=\s*\d)", "/", text)
    text = re.sub(r"\{\s*(\\cdot|\\times|=)\s*\}", r"\1 ", text)
    text = _CHOOSE.sub(lambda m: rf"\binom{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    return re.sub(r"(\\[a-zA-Z]+) +(?![a-zA-Z])", r"\1", re.sub(r" +", " ", text)).strip()
