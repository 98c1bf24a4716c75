r"""The scanner: finds the boxes in a text, tells formulas from prose, and splits text outside brackets.

Every rule takes time linear in the length of the text, since a model may write a megabyte of anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------------

_BOX_NAME = r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*+"
_NUMBER = r"[+-]?(?:\d{1,3}(?:(?:,|\{,\})\d{3})++(?!\d)|\d++)(?:\.\d++)?+(?:/\d++)?+"
# What shows that an expression continues.
_FOLLOWS = r"[\w^/]|[.,-]\d|[ \t]*+(?:[*+=<>^]|\\(?:cdot|times|div|pi|sqrt|[dtc]?frac|pm|mp)(?![a-zA-Z]))"
_BOX_TOKENS = re.compile(
    rf"{_BOX_NAME}(?:(?:\[[^\[\]{{}}]{{0,40}}\]\s*+){{0,2}}\{{|((?:{_NUMBER}|[A-Za-z])(?!{_FOLLOWS})))|\\.|[{{}}]",
    re.DOTALL,
)


class Box(NamedTuple):
    """A box is `text[start:end]`, and `text[first:last]` is its content."""

    start: int
    first: int
    last: int
    end: int


def boxes(text: str) -> list[Box]:
    r"""Every complete `\boxed{...}`, `\fbox{...}` and `\framebox{...}` of a text, in the order in which they open.

    Braces must balance; escaped ones do not count. Nested boxes are listed as well. Without a brace, TeX boxes a single
    token, such as the 1 of `\boxed 15`; people mean the number, so a number or letter that stands alone is taken as the
    content. If the expression continues, as in `\boxed 5\cdot 3`, the intended content is unclear, and it is not a box.
    """
    found: list[Box] = []
    stack: list[tuple[int, int] | None] = []  # per open brace: the starts of its box and content, or None
    for token in _BOX_TOKENS.finditer(text):
        if token[1]:
            found.append(Box(token.start(), token.start(1), token.end(1), token.end()))
        elif token[0].endswith("{") and token[0] != r"\{":
            stack.append((token.start(), token.end()) if len(token[0]) > 1 else None)
        elif token[0] == "}" and stack and (opened := stack.pop()):
            found.append(Box(*opened, token.start(), token.end()))
    return sorted(found)


def last_boxed(text: str) -> str | None:
    """The last boxed answer: the content of the last non-empty complete box (by where it opens), or None."""
    contents = (text[box.first : box.last].strip() for box in reversed(boxes(text)))
    return next((content for content in contents if content), None)


def unbox(text: str, mark: str = "") -> str:
    """The text with each box replaced by its content; `mark` precedes outermost boxes not directly after a bracket."""
    edges: list[tuple[int, int, str]] = []  # (start, end) of what is cut out, and its replacement
    outer = 0
    for box in boxes(text):
        edges += [(box.start, box.first, " " if box.start < outer else f" {mark} "), (box.last, box.end, " ")]
        outer = max(outer, box.end)
    parts, end = [], 0
    for start, stop, instead in sorted(edges):
        piece = text[end:start]
        parts += [piece, " " if piece.rstrip().endswith(("{", "(")) else instead]
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
    """Yields (is_formula, piece) for the pieces of a text, in order. Dollar signs of prices count as prose."""
    position = searched = 0
    absent: set[str] = set()  # closers that do not occur again: keeps the scan linear
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


def split_top(text: str, separator: str) -> list[str]:
    """Splits at a one-character separator outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
