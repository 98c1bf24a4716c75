"""Answers as text: taking them out of a completion, spellings that mean the same, and what needs no algebra.

Every rule is linear in the length of the text, since a model may write a megabyte of anything.
"""

from __future__ import annotations

import re
from typing import Literal

AnswerType = Literal["math", "integer", "choice"]

MAX_LENGTH = 2000  # characters of an answer
MAX_DIGITS = 1000  # of one number
MAX_DEPTH = 40  # of nested brackets

# ---------------------------------------------------------------------------------------------------
# Extraction
# ---------------------------------------------------------------------------------------------------

# TeX boxes one token where there is no brace; digits that follow each other are meant as one number.
_BOX_TOKENS = re.compile(r"\\boxed\s*(?:\{|(\d++|\b[A-Za-z])(?![\w/^]|[.,]\d))|\\.|[{}]", re.DOTALL)

# Statements are read without markup. Item numbers of a list are markup, too.
_MARKUP = re.compile(
    r"[*_`#$~{}]|\\(?:text|math)?(?:bf|it|rm|sf|tt)?(?![A-Za-z])[()\[\],;:! ]?|^[ \t*]*\d+[.)]\**[ \t]+(?=\S)", re.M
)
_ANSWER = re.compile(r"\b(?:answer|correct (?:option|choice))\b", re.IGNORECASE)
_STATED = r"[ \t]*(?:(?i:is)\b|[:=]|\n)[\s:]*+"
_SUM = r"(?:(?:\\[a-z]++|(?![A-Za-z]{2})[^\n.,;:<>!\\])*=\s*+)?"  # "m + n = " before the number, without words
_AFTER = r"\Z|\n|(?:because|since)\b|[.;](?:\s|\Z)|,\s+(?!or\b|and\b)[a-z]{2}"  # what ends a statement
_HEDGE = r"\W*(?:or|and)\b|(?:\W*\b(?:or|and|[A-H])\b)+\W*\Z"  # more choices after the first
_STATED_INTEGER = re.compile(rf"{_STATED}{_SUM}([+-]?\d++(?:,\d+)*+)(?=[ \t)]*+(?:{_AFTER}))")
_STATED_CHOICE = re.compile(rf"{_STATED}(?i:option|choice)?\s*+\(?\s*+([A-H])(?=[ \t]*+(?:{_AFTER}|[).:](?!{_HEDGE})))")
_LETTER = re.compile(
    rf"(?i:option|choice)?\s*+\(?\s*+(?:([A-Z])\s*+(?:[).:](?!{_HEDGE}).*)?|([a-z])\s*+\)?\s*+\.?)", re.DOTALL
)


def extract(
    text: str, answer_type: AnswerType = "math", *, forced: str | None = None, tag: str = "think"
) -> str | None:
    """The answer in a completion, or None: the balanced `\\boxed{...}` of the answer part that opens last.

    The answer part follows the last `</think>` (or other `tag`). Where a text opens its thoughts and never closes
    them there is none: a box among thoughts is not an answer. `forced` is the text that closed the thinking of a
    cut sample and what was drawn after it; then only this counts. For integers and choices a statement that ends with
    it, "the answer is 3 + 9 = 12." or "Answer: (C)", serves where there is no box. A choice comes back as its capital
    letter.
    """
    _, closed, after = text.rpartition(f"</{tag}>")
    if forced is None and not closed and f"<{tag}>" in text:
        return None
    part = forced if forced is not None else after
    box = last_box(part)
    if box is not None:
        return choice_letter(box) if answer_type == "choice" else box.strip() or None
    if answer_type == "math" or "\\boxed" in part:  # a box that was never closed: the answer may have gone on
        return None
    return _stated(part, _STATED_CHOICE if answer_type == "choice" else _STATED_INTEGER)


def _stated(text: str, pattern: re.Pattern[str]) -> str | None:
    """What the last statement of an answer says; it ends with the number or choice, or is none."""
    for piece in reversed(_ANSWER.split(_plain(text))[1:]):
        if match := pattern.match(piece):
            return match[1]
    return None


def _plain(text: str) -> str:
    return _MARKUP.sub(" ", text.replace("\u2212", "-").replace("{,}", ","))


def last_box(text: str) -> str | None:
    """The content of the balanced `\\boxed{...}` that opens last, in one pass over the text."""
    stack: list[int | None] = []  # for each open brace: where the box's content starts, None for other braces
    best: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[1]:
            best = token.span(1)
        elif token[0].startswith("\\boxed"):
            stack.append(token.end())
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


def choice_letter(text: str) -> str | None:
    """The letter of a box, of which trailing text is the choice's; None where there are several."""
    match = _LETTER.fullmatch(_plain(tidy(text)).strip())
    return (match[1] or match[2]).upper() if match else None


# ---------------------------------------------------------------------------------------------------
# Forms that need no algebra
# ---------------------------------------------------------------------------------------------------

_SYMBOLS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u2026": r"\ldots ",
        "\u2248": r"\approx ",
        "\u221e": r"\infty ",
        "\u2205": r"\emptyset ",
        "\u00b0": r"^\circ ",
        "\u00bd": r"\frac{1}{2}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
    }
)
# Spellings that math-verify does not read, or reads as something else.
_SPELLINGS = [
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"\u221a ?(\d++|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\u221a", r"\\sqrt "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\[cl]?dots[bcimo]?(?![A-Za-z])|\.{3,}", r"\\ldots"),
        (r"\A\\approx(?![A-Za-z]) ?", ""),
        (r"\A([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})\Z", r"\1\\cdot 10^{\2}"),
        (
            r"(?<!\d)(\d*+)\.(\d*+)\\(?:overline|bar) ?\{(\d++)\}",  # 0.1\overline{6} = (16 - 1) / 90
            lambda m: rf"\frac{{{m[1]}{m[2]}{m[3]}-0{m[1]}{m[2]}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}}",
        ),
    )
]
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?) ?\^ ?(?:\\circ|\{ ?\\circ ?\})")
_ROW_BREAK = r"(\\\\)"  # stays: it is not a backslash and a blank
_DROP = re.compile(
    _ROW_BREAK + r"(?:\*? ?\[-?[\d.]+ ?[a-z]{2}\])?"
    r"|\\(?:left|right|displaystyle|limits)(?![A-Za-z])|\\[!()\[\]]|\\?\$"
)
_BLANK = re.compile(_ROW_BREAK + r"|(?:\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_INTEGER = re.compile(r"([+-]?)(\d++)(?:\.0++)?")  # possessive, as below: linear in hostile lengths
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?: \d{3})+")
_ROW = re.compile(r"[+-]?\d+(?: [+-]?\d+)+")
_LIST = re.compile(r"\(? ?([+-]?\d+(?:(?: ?[,;] ?| )[+-]?\d+)*) ?\)?")
_WORDS = re.compile(r"[A-Za-z]+(?:(?:, ?| |-)[A-Za-z]+)*")
_BASED = re.compile(r"\(?([A-F]*\d[\dA-F]*+)\)?(?:_\{?(\d+)\}?)?")
_POINTS = re.compile(r"([A-Z]{3,}+)")
_UNIT = re.compile(r"(?!\A)\\(?:text|mathrm|textrm) ?\{ ?([A-Za-z]{1,2}) ?\}(?:\^\{?\d\}?)?\Z")
_TOWER = re.compile(r"\^[{(]*\d+\^[{(]*\d+\^|\^[{(]*\d{7}|\d{6}[})]*!|!!!")


def normalise(text: str) -> str:
    """A form in which spellings of the same answer agree: spaces, delimiters, `\\dfrac`, `1,234`, `007`, `5.0`."""
    text = _unwrap(tidy(text))
    if _ROW.fullmatch(text):
        return text
    text = re.sub(r" ?([^\w ]) ?", r"\1", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return canonical_integer(text) or text


def tidy(text: str) -> str:
    """Without what only lays out, in one spelling of several; runs of blanks are one space."""
    text = text.translate(_SYMBOLS).replace("{,}", ",")
    text = _BLANK.sub(lambda m: m[1] or " ", _DROP.sub(r"\1", text)).strip()
    for pattern, instead in _SPELLINGS:
        text = pattern.sub(instead, text)
    if _TRIGONOMETRY.search(text):  # elsewhere 90 degrees are as good as 90
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    return text[:-1].rstrip() if text.endswith(".") else text


def _unwrap(text: str) -> str:
    """The inside of `\\text{...}` where that is all."""
    match = _TEXT.fullmatch(text)
    return match[1].strip() if match else text


def canonical_integer(text: str) -> str | None:
    """A canonical integer, as text: Python refuses to convert very long ones."""
    match = _INTEGER.fullmatch(text)
    if not match:
        return None
    digits = match[2].lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


def marks_agree(gold: str, prediction: str) -> bool | None:
    """For the marks that math-verify skips: dots, a number's base, the order of points in ABC, a unit; None for others.

    Units are abbreviations of one or two letters: longer words have too many spellings to tell two units from one.
    """
    if (r"\ldots" in gold) != (r"\ldots" in prediction):
        return False
    one, other = _BASED.fullmatch(gold), _BASED.fullmatch(prediction)
    if one and other and (one[2] or other[2]):
        return (one[1].lstrip("0"), one[2] or "10") == (other[1].lstrip("0"), other[2] or "10")
    for pattern in (_POINTS, _UNIT):
        marks = [sorted(m[1].casefold() for m in pattern.finditer(text)) for text in (gold, prediction)]
        if all(marks) and marks[0] != marks[1]:
            return False
    return None


def rows_agree(gold: str, prediction: str) -> bool | None:
    """For integers that stand side by side, which math-verify would add; None where neither answer is such a row."""
    if not _ROW.fullmatch(gold) and not _ROW.fullmatch(prediction):
        return None

    def parts(text: str) -> list[str | None]:
        match = _LIST.fullmatch(text)
        return [canonical_integer(part) for part in re.split(r"[ ,;]+", match[1])] if match else [text]

    if canonical_integer(gold) and _GROUPED.fullmatch(prediction):  # 10 000; but a row that is asked for stays a row
        return canonical_integer(gold) == canonical_integer(prediction.replace(" ", ""))
    return parts(gold) == parts(prediction)


def words_agree(gold: str, prediction: str) -> bool | None:
    """For answers in words, which math-verify would multiply letter by letter; None where it is not about words."""
    plain = [_TEXT.sub(r" \1 ", text) for text in (gold, prediction)]
    words = [re.split(r"[ ,-]+", text.strip().casefold()) for text in plain]
    if not all(_WORDS.fullmatch(" ".join(w)) for w in words):
        return None
    if "\\" in gold + prediction or any(len(w) > 3 or w in ("yes", "no") for ws in words for w in ws):
        return words[0] == words[1]
    return None


def refusal(text: str) -> str | None:
    """Why an answer should not be computed with, from a look at it; None where it may."""
    if len(text) > MAX_LENGTH or re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return "too long"
    depth = braces = deepest = 0
    for char in re.findall(r"(?<!\\)[{}]|[()\[\]]", text):
        step = 1 if char in "([{" else -1
        depth += step
        braces += step if char in "{}" else 0
        deepest = max(deepest, depth)
        if braces < 0:
            return "unparseable"
    if deepest > MAX_DEPTH:
        return "too deep"
    if braces:
        return "unparseable"
    return "too large" if _TOWER.search(re.sub(r"\s|\\left|\\right", "", text)) else None
