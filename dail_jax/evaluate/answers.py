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

_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_STATED = r"(?i:answer)\s*(?:(?i:is)|:|=)[\s:*$]*(?:\\\w+\{)?"
_STATED_INTEGER = re.compile(_STATED + r"([+-]?\d[\d,]*+)(?!\.\d)")  # possessive: no backtracking over a megabyte
_STATED_CHOICE = re.compile(_STATED + r"\(?([A-H])\b")
_LETTER = re.compile(r"\(?([A-Z])\)?(?:[.:,)\s].*)?|\(?([a-z])\)?\.?", re.DOTALL)


def extract(
    text: str, answer_type: AnswerType = "math", *, forced: str | None = None, tag: str = "think"
) -> str | None:
    """The answer in a completion, or None: the balanced `\\boxed{...}` of the answer part that opens last.

    The answer part follows the last `</think>` (or other `tag`). Where a text opens its thoughts and never closes
    them there is none: a box among thoughts is not an answer. `forced` is the text that closed the thinking of a
    cut sample and what was drawn after it; then only this counts. For integers and choices an "answer is 12" or
    "Answer: (C)" serves where there is no box. A choice comes back as its capital letter.
    """
    _, closed, after = text.rpartition(f"</{tag}>")
    if forced is None and not closed and f"<{tag}>" in text:
        return None
    part = forced if forced is not None else after
    box = last_box(part)
    if answer_type == "choice":
        if box is not None:
            return choice_letter(box)
        stated = _STATED_CHOICE.findall(part)
        return stated[-1] if stated else None
    if box is None and answer_type == "integer":
        stated = _STATED_INTEGER.findall(part)
        box = stated[-1].rstrip(",") if stated else None
    return box.strip() or None if box is not None else None


def last_box(text: str) -> str | None:
    """The content of the balanced `\\boxed{...}` that opens last, in one pass over the text."""
    stack: list[int | None] = []  # for each open brace: where the box's content starts, None for other braces
    best: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[0].startswith("\\boxed"):
            stack.append(token.end())
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


def choice_letter(text: str) -> str | None:
    match = _LETTER.fullmatch(_unwrap(tidy(text)))
    return (match[1] or match[2]).upper() if match else None


# ---------------------------------------------------------------------------------------------------
# Forms that need no algebra
# ---------------------------------------------------------------------------------------------------

_DROP = re.compile(r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|\\[!()\[\]]|\\?\$")
_BLANK = re.compile(r"(?:\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_INTEGER = re.compile(r"([+-]?)(\d++)(?:\.0++)?")  # possessive, as below: linear in hostile lengths
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?: \d{3})+")
_ROW = re.compile(r"[+-]?\d+(?: [+-]?\d+)+")
_LIST = re.compile(r"\(? ?([+-]?\d+(?:(?: ?[,;] ?| )[+-]?\d+)*) ?\)?")
_WORDS = re.compile(r"[A-Za-z]+(?:(?:, ?| |-)[A-Za-z]+)*")
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
    """Without what only lays out; runs of blanks are one space."""
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("{,}", ",")
    text = _BLANK.sub(" ", _DROP.sub("", text))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).strip()
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
