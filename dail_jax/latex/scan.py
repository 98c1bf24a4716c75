r"""The scanner: LaTeX as it stands in solutions and answers, with its boxes, its formulas and one spelling of each.

Every rule is linear in the length of the text, since a model may write a megabyte of anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Unicode signs as the LaTeX that the rest of this file knows.
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
        "\u03c0": r"\pi ",
        "\u00b0": r"^\circ ",
        "\u00bd": r"\frac12 ",
        "\u00bc": r"\frac14 ",
        "\u00be": r"\frac34 ",
        "\u00a0": " ",
    }
)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207d\u207e\u207f"
_RAISED_RUN, _LEVEL = re.compile(f"[{_RAISED}]+"), str.maketrans(_RAISED, "0123456789+-()n")


def signs(text: str) -> str:
    """The text with LaTeX for Unicode signs; a run of superscripts is one exponent."""
    return _RAISED_RUN.sub(lambda m: f"^{{{m[0].translate(_LEVEL)}}}", text).translate(_SIGNS)


# ---------------------------------------------------------------------------------------------------
# Boxes and braces
# ---------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")


def pairs(text: str) -> dict[int, int]:
    """{index of an opening brace: index of the one that closes it}; escaped and unclosed braces are left out."""
    closing: dict[int, int] = {}
    waiting: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            waiting.append(match.start())
        elif match[0] == "}" and waiting:
            closing[waiting.pop()] = match.start()
    return closing


def boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""(start, end, content) of every outermost `\boxed{...}` with balanced braces; `\boxed 5` counts as well."""
    end, closing = 0, pairs(text)
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue
        if text[match.end() : match.end() + 1] == "{":
            if match.end() in closing:
                end = closing[match.end()] + 1
                yield match.start(), end, text[match.end() + 1 : end - 1].strip()
        elif bare := re.compile(r"[^\s{}$\\]").match(text, match.end()):
            end = bare.end()
            yield match.start(), end, bare[0]


def last_boxed(text: str) -> str | None:
    """The content of the last box that is not empty."""
    return next((content for _, _, content in reversed(list(boxes(text))) if content), None)


def unbox(text: str, mark: str = "") -> str:
    """The text with every outermost box replaced by its content, after the mark where it stands in the open."""
    parts, end = [], 0
    for start, stop, content in boxes(text):
        inside = text[end:start].rstrip().endswith(("{", "("))
        parts += [text[end:start], " " if inside else f" {mark} ", content, " "]
        end = stop
    return "".join([*parts, text[end:]])


# ---------------------------------------------------------------------------------------------------
# Formulas and prose
# ---------------------------------------------------------------------------------------------------

_OPEN = re.compile(
    r"\\\$|\$\$|\$|\\\(|\\\[|\\begin\{(equation|align|alignat|gather|multline|eqnarray|flalign|displaymath|math|array)(\*?)\}"
)
_TWO_WORDS = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{2,}\s+[a-z]{3,}(?![a-zA-Z}])")


def spans(text: str) -> Iterator[tuple[bool, str]]:
    """(is it a formula, its text) for the pieces of a text, in order. Dollar signs of prices are prose."""
    position = searched = 0
    absent: set[str] = set()  # closers that occur no more: keeps the scan linear
    while match := _OPEN.search(text, searched):
        if match[0] == r"\$":
            searched = match.end()
            continue
        closer = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}.get(match[0]) or rf"\end{{{match[1]}{match[2]}}}"
        end = -1 if closer in absent else text.find(closer, match.end())
        while closer == "$" and end > 0 and text[end - 1] == "\\":
            end = text.find(closer, end + 1)
        if end < 0:
            absent.add(closer)
            searched = match.end()
            continue
        inner = text[match.end() : end]
        if match[0] == "$" and (_TWO_WORDS.search(re.sub(r"\\text\w*\{[^{}]*\}", "", inner)) or r"\$" in inner[1:]):
            searched = match.end()
            continue
        if match[1] in ("alignat", "array"):
            inner = re.sub(r"^\s*\{[^{}]*\}", "", inner)
        yield False, text[position : match.start()]
        yield True, inner
        position = searched = end + len(closer)
    yield False, text[position:]


# ---------------------------------------------------------------------------------------------------
# Spellings
# ---------------------------------------------------------------------------------------------------

_SPACING = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|nolimits|nonumber|notag|big[lr]?|Big[lr]?|bigg[lr]?|Bigg[lr]?"
    r"|hspace\{[^{}]*\}|vspace\{[^{}]*\}|phantom\{[^{}]*\}|(?:text)?color\s*\{[^{}]*\})(?![a-zA-Z])"
    r"|\\(?:mathbf|mathsf|boldsymbol|bm|underline)(?=\s*\{)|\\[,!;:> ]|~|(?<!\\)&|[_^]?\{\s*\}"
)


def tidy(formula: str) -> str:
    """A formula without spacing commands, with `\\frac` for its relatives and `\\binom` for `\\choose`."""
    text = _SPACING.sub(" ", signs(formula))
    text = re.sub(r"\\([dtc]frac|over(?=\s*\d))(?![a-zA-Z])", lambda m: "/" if m[1] == "over" else r"\frac", text)
    text = re.sub(r"\{\s*(\\cdot|\\times|=)\s*\}", r"\1 ", re.sub(r"\\[dt]binom(?![a-zA-Z])", r"\\binom", text))
    text = re.sub(
        r"\{\s*(?:\{([^{}]{1,40})\}|([^{}]{1,40}?))\s*\\choose\s*(?:\{([^{}]{1,40})\}|([^{}]{1,40}?))\s*\}",
        lambda m: rf"\binom{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}",
        text,
    )
    text = re.sub(r"(\\[a-zA-Z]+)\s+(?![a-zA-Z])", r"\1", re.sub(r"\s+", " ", text))
    return text.strip()


def split_top(text: str, separator: str) -> list[str]:
    """Splits at a one-character separator outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
