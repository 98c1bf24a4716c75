"""Answers as text: answers stated in a completion, equivalent spellings, and comparisons that need no algebra.

Every rule takes time linear in the length of the text, since a model may write a megabyte of anything.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import NamedTuple

from dail_jax import latex

MAX_LENGTH = 2000  # characters of an answer
MAX_DIGITS = 1000  # of one number
MAX_DEPTH = 40  # of nested brackets


class Verdict(NamedTuple):
    """Whether an answer is right, and why: see `grading` for the reasons of mathematical answers."""

    correct: bool
    reason: str


# ---------------------------------------------------------------------------------------------------
# Statements and letters
# ---------------------------------------------------------------------------------------------------

# Markup is removed before statements are read; the item numbers of a list count as markup.
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


def stated_integer(text: str) -> str | None:
    """The integer that the last statement of an answer ends with, as in "the answer is 3 + 9 = 12."."""
    return _stated(text, _STATED_INTEGER)


def stated_choice(text: str) -> str | None:
    """The letter that the last statement of an answer ends with, as in "Answer: (C)"."""
    return _stated(text, _STATED_CHOICE)


def _stated(text: str, pattern: re.Pattern[str]) -> str | None:
    """The number or choice in the last statement of an answer; only statements that end with one count."""
    for piece in reversed(_ANSWER.split(_plain(text))[1:]):
        if match := pattern.match(piece):
            return match[1]
    return None


def _plain(text: str) -> str:
    return _MARKUP.sub(" ", text.replace("\u2212", "-").replace("{,}", ","))


def choice_letter(text: str) -> str | None:
    """The letter of the choice in a box, perhaps followed by the text of the choice; None if there are several."""
    match = _LETTER.fullmatch(_plain(spelled(text)).strip())
    return (match[1] or match[2]).upper() if match else None


# ---------------------------------------------------------------------------------------------------
# Forms that need no algebra
# ---------------------------------------------------------------------------------------------------

# Words that introduce a number, as in `\text{The answer is }25`, unless they negate it: "The answer is not".
_NOUN = (
    r"(?:answer|result|solution|value|total|sum|difference|product|quotient|remainder|ratio|number|count|probability"
    r"|maximum|minimum|area|volume|perimeter|length|distance|radius)s?"
)
_LEAD = re.compile(
    rf"\A\s*(?P<open>(?:\\text\w*\s*\{{)?)\s*+(?:[A-Za-z]+,?\s+){{0,5}}?{_NOUN}(?:\s+(?:of|for|in|to|the|all|this|such|is)"
    r"(?:\s+\w+){0,3}?){0,3}?\s*(?:\s(?:is|are|equals|is\s+equal\s+to)\s*:?|[:=])\s*(?=\}?\s*[-+\d\\($.{\[])",
    re.IGNORECASE,
)
_HEDGE_WORDS = re.compile(
    r"\b(?:not|no|never|neither|nor|least|most|more|less|than|either|or|except|false|wrong|incorrect|impossible|if)\b",
    re.IGNORECASE,
)
_BEFORE = re.compile(r"\A(?:=|\\(?:approx|therefore|implies|(?:Long)?[rR]ightarrow|to)(?![A-Za-z])| )+")
_BEHIND = re.compile(r"(?: |\\(?:checkmark|blacksquare|blacklozenge|square|Box|qed|qedhere)(?![A-Za-z])){1,6}\Z")
# Spellings that math-verify cannot read, or reads as something else.
_SPELLINGS = [
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"\\text ?\{ ?\}", ""),
        (r"\\(?:mathrm|text) ?\{ ?([ei]) ?\}(?= ?\^|\\pi)", r"\1 "),
        (r"\A\*\*? ?([^*]+?) ?\*\*?\Z", r"\1"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\[cl]?dots[bcimo]?(?![A-Za-z])|\.{3,}", r"\\ldots"),
        (r"\A([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})\Z", r"\1\\cdot 10^{\2}"),
        (
            r"(?<!\d)(\d*+)\.(\d*+)\\(?:overline|bar) ?\{(\d++)\}",  # 0.1\overline{6} = (16 - 1) / 90
            lambda m: rf"\frac{{{m[1]}{m[2]}{m[3]}-0{m[1]}{m[2]}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}}",
        ),
    )
]
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?) ?\^ ?(?:\\circ|\{ ?\\circ ?\})")
_ROW_BREAK = r"(\\\\)"  # kept: it is not a backslash followed by a blank
_DROP = re.compile(_ROW_BREAK + r"(?:\*? ?\[-?[\d.]+ ?[a-z]{2}\])?|\\[!()\[\]]|\\?\$")
_BLANK = re.compile(_ROW_BREAK + r"|(?:\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+")
_TEXT = re.compile(r"\\(?:text|mathrm|mathit|operatorname)\s*\{([^{}]*)\}")
_INTEGER = re.compile(r"([+-]?)(\d++)(?:\.0++)?")  # possessive, like those below: linear on hostile input
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?: \d{3})+")
_ROW = re.compile(r"[+-]?\d+(?: [+-]?\d+)+")
_LIST = re.compile(r"\(? ?([+-]?\d+(?:(?: ?[,;] ?| )[+-]?\d+)*) ?\)?")
_WORDS = re.compile(r"[A-Za-z]+(?:(?:, ?| |-)[A-Za-z]+)*")
_BASED = re.compile(r"\(?([A-F]*\d[\dA-F]*+)\)?(?:_\{?(\d+)\}?)?")
_RESIDUE = re.compile(
    r"(?:(?P<name>[^=,;]{0,60}?) ?(?:\\equiv(?![A-Za-z])|=) ?)?(?P<value>[+-]?\d++) ?\(? ?"
    r"(?:\\(?:[pb]mod|mod|pod)(?![A-Za-z])|\\(?:text|mathrm|operatorname) ?\{ ?\(? ?mod(?:ulo)? ?\}|mod(?:ulo)?(?![A-Za-z]))"
    r" ?\{? ?(?P<modulus>\d++) ?\}? ?\)?"
)
_POINTS = re.compile(r"([A-Z]{3,}+)")
_UNIT = re.compile(r"(?!\A)\\(?:text|mathrm) ?\{ ?([A-Za-z]{1,2}) ?\}(?:\^\{?\d\}?)?\Z")
_TOWER = re.compile(r"\^[{(]*\d+\^[{(]*\d+\^|\^[{(]*\d{7}|\d{6}[})]*!|!!!")


def normalise(text: str) -> str:
    """One form for all spellings of an answer: spaces, delimiters, `\\dfrac`, `1,234`, `(007)`, `5.0`."""
    text = _unwrap(spelled(text))
    if _ROW.fullmatch(text):
        return text
    text = re.sub(r" ?([^\w ]) ?", r"\1", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    return canonical_integer(inner) or text


def spelled(answer: str) -> str:
    """An answer in a standard spelling, without layout and introductory words; runs of blanks become one space."""
    answer = re.sub(r"[ \t\r\n\f\v]+", " ", answer)
    lead = _LEAD.match(answer)
    text = answer if lead is None or _HEDGE_WORDS.search(lead[0]) else lead["open"] + answer[lead.end() :]
    text = latex.plain(text).replace("{,}", ",")
    text = _BLANK.sub(lambda m: m[1] or " ", _DROP.sub(r"\1", text)).strip()
    text = _without_outer_braces(_BEHIND.sub("", _BEFORE.sub("", text)))
    for pattern, instead in _SPELLINGS:
        text = pattern.sub(instead, text)
    if _TRIGONOMETRY.search(text):  # elsewhere the degree sign makes no difference
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    return text[:-1].rstrip() if text.endswith(".") else text


def _without_outer_braces(text: str) -> str:
    """The text without any braces that enclose all of it."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    if not text.startswith("{"):
        return text
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    first, last = 0, len(text) - 1
    while first <= last and (text[first] == " " or text[last] == " " or closing.get(first) == last):
        group = closing.get(first) == last
        first += group or text[first] == " "
        last -= group or (first <= last and text[last] == " ")
    return text[first : last + 1]


def _unwrap(text: str) -> str:
    """The content of `\\text{...}` if that is the whole text; otherwise the text."""
    match = _TEXT.fullmatch(text)
    return match[1].strip() if match else text


def canonical_integer(text: str) -> str | None:
    """An integer in canonical form, or None; it stays text, since Python refuses to convert very long ones."""
    match = _INTEGER.fullmatch(text)
    if not match:
        return None
    digits = match[2].lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


def marks_agree(gold: str, prediction: str) -> bool | None:
    """Compares marks that math-verify ignores: dots, a number's base, the order of points in ABC, a unit.

    None if these do not decide. Units are abbreviations of one or two letters: longer words have too many spellings to
    tell whether two units differ.
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
    """Compares rows of integers side by side, which math-verify would add; None if neither answer is such a row."""
    if not _ROW.fullmatch(gold) and not _ROW.fullmatch(prediction):
        return None

    def parts(text: str) -> list[str | None]:
        match = _LIST.fullmatch(text)
        return [canonical_integer(part) for part in re.split(r"[ ,;]+", match[1])] if match else [text]

    # `10 000` is one number, unless the gold answer is itself a row.
    if canonical_integer(gold) and _GROUPED.fullmatch(prediction):
        return canonical_integer(gold) == canonical_integer(prediction.replace(" ", ""))
    return parts(gold) == parts(prediction)


def residues_agree(gold: str, prediction: str) -> bool | None:
    """Compares integers with a modulus, as in `25 \\pmod{1000}`; None if neither answer has one.

    A gold answer without a modulus asks for the remainder itself: 25 and no other representative. A gold answer with a
    modulus asks for the residue class, which a bare number does not name.
    """
    one, other = _RESIDUE.fullmatch(gold), _RESIDUE.fullmatch(prediction)
    if one is None:
        integer, remainder = canonical_integer(gold), _remainder(prediction)
        return remainder == integer if other is not None and integer else None
    if other is None:
        return False
    if one["name"] and other["name"] and one["name"] != other["name"]:
        return None
    modulus = int(one["modulus"])
    return modulus == int(other["modulus"]) > 0 and (int(one["value"]) - int(other["value"])) % modulus == 0


def _remainder(text: str) -> str | None:
    """The remainder that `25 \\pmod{1000}` names, as text; None if it names none, such as `1025 \\pmod{1000}`."""
    match = _RESIDUE.fullmatch(text)
    return str(int(match["value"])) if match and 0 <= int(match["value"]) < int(match["modulus"]) else None


def words_agree(gold: str, prediction: str) -> bool | None:
    """Compares answers in words, which math-verify would read as products of letters; None if they are not words."""
    plain = [_TEXT.sub(r" \1 ", text) for text in (gold, prediction)]
    words = [re.split(r"[ ,-]+", text.strip().casefold()) for text in plain]
    if not all(_WORDS.fullmatch(" ".join(w)) for w in words):
        return None
    if "\\" in gold + prediction or any(len(w) > 3 or w in ("yes", "no") for ws in words for w in ws):
        return words[0] == words[1]
    return None


def refusal(text: str) -> str | None:
    """Why an answer must not reach the algebra, judged from its text alone; None if it may."""
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


def quick(gold: str, prediction: str) -> Verdict | None:
    """The verdict on a mathematical answer if that needs no algebra, otherwise None."""
    if prediction.strip() == gold.strip():
        return Verdict(True, "equal")
    if len(prediction) > MAX_LENGTH:
        return Verdict(False, "too long")
    one, other = normalise(gold), normalise(prediction)
    if one == other and one:
        return Verdict(True, "equal")
    reason = refusal(prediction)
    if reason is None and refusal(gold) is not None:
        reason = "gold"
    if reason is not None:
        return Verdict(False, reason)
    if canonical_integer(one) and canonical_integer(other):
        return Verdict(False, "different")
    gold, prediction = spelled(gold), spelled(prediction)
    for rule in (residues_agree, marks_agree, rows_agree, words_agree):
        agree = rule(gold, prediction)
        if agree is not None:
            return Verdict(agree, "equal" if agree else "different")
    return None


def is_certain(text: str) -> bool:
    """Whether these rules can compare other answers with this one (as `spelled`), without any algebra."""
    if canonical_integer(normalise(text)) or _RESIDUE.fullmatch(text):
        return True
    return bool(rows_agree(text, text) or words_agree(text, text))


def is_small(answer: str) -> bool:
    """Whether an answer may reach the algebra at all."""
    return len(answer) <= MAX_LENGTH and refusal(answer) is None


def key(answer: str) -> Hashable:
    """A cheap key that answers share only if they are the same."""
    text = normalise(answer)
    if not is_small(answer):
        return text
    text = _remainder(spelled(answer)) or re.sub(r" ?\\%\Z", "", text)
    words = _TEXT.sub(r" \1 ", text).strip()
    if _WORDS.fullmatch(words):
        return words.casefold()
    based = _BASED.fullmatch(text)
    if _POINTS.search(text) or _UNIT.search(text) or _ROW.fullmatch(text) or (based and not canonical_integer(text)):
        return text
    return latex.canonical(text)
