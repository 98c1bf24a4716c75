"""The extractor `math`: what a solution in LaTeX, or in plain formulas, states as its intermediate results."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from functools import lru_cache
from typing import NamedTuple

from dail_jax import latex
from dail_jax.data.records import Row

# Drawings, tables, pictures, code and HTML. No alternative may run past where another could begin, so that searching
# stays linear: see _COLLAPSE.
_FIGURES = re.compile(
    r"\\?\[asy\\?\].*?(?:\\?\[/asy\\?\]|\Z)|<asy>.*?(?:</asy>|\Z)|```.*?(?:```|\Z)|\\includegraphics[^{}\\]*\{[^{}]*\}"
    r"|\\begin\{(?:asy|tikzpicture|center|tabular|array|[bpvV]?matrix)\}.*?"
    r"(?:\\end\{(?:asy|tikzpicture|center|tabular|array|[bpvV]?matrix)\}|\Z)|\[img[^\[\]]*\].*?(?:\[/img\]|\Z)"
    r"|!\[[^\[\]]*\]\([^()]*\)|https?://\S+"
    r"|</?(?:a|b|big|blockquote|br|center|code|div|em|font|h[1-6]|hr|i|img|li|math|nowiki|ol|p|pre|s|small|span|strong"
    r"|su[bp]|t[dhr]|table|tbody|tt|u|ul)(?:\s+[\w:-]+=(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>]+))*\s*/?>",
    re.DOTALL | re.IGNORECASE,
)
_EQUATIONS = re.compile(r"\\begin\{array\}\s*(?:\[\w\]\s*)?\{[rlc\s]*\}[^=]*=")  # an array that is not a table
_LIST_MARK = re.compile(r"^[ \t]*(?:\(?\d{1,3}[.)]|\(?[a-zA-Z][.)]|\(?[ivx]{1,4}\)|[*-])[ \t]+", re.MULTILINE)
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:(?:,|\{,\}|,\\!|\\,)\d{3})++(?P<rest>(?:,*\d)*+)")
# Nearly every pattern here allows blanks. In a run of thousands of them, a pattern would try every blank as a start, in
# time quadratic in the length of the run. So runs are collapsed before any text is read.
_COLLAPSE = re.compile(r"\s{2,}|[\t\r\f\v]")
_COMMA = "\ue000"  # stands for the comma in 10,000, since other commas separate

CONTINUED = re.compile(r"\\\\(?:\[[^\[\]\\]*\])?(?=[&\s]*(?:=|\\equiv|\\approx))")  # a row break inside a chain
_COLUMN = re.compile(r"(?<=[\w})\]!])\s*&[&\s]*(?=[\w({\[]|\\(?:[dt]?frac|sqrt|text|mathrm|mbox|left))")  # not `&=`
_ROWS = re.compile(r"\\\\(?:\[[^\[\]\\]*\])?|\\(?:newline|cr)(?![a-zA-Z])|\n\s*\n")
# Words inside a formula, and the exponent of a unit after them, as in `\text{ m/s}^2`.
WORDS = re.compile(
    r"\\(?:text(?:rm|bf|it|sf)?|mbox|hbox|intertext|mathrm|operatorname|mathit)\s*\{([^{}]*)\}(\s*\^\s*(?:\d|\{-?\d\}))?"
)
_CLUTTER = re.compile(
    r"\\begin\s*\{array\}\s*(?:\[\w\]\s*)?\{[^{}]*\}|\\(?:tag\*?|label|eqref|ref|color|begin|end)\s*\{[^{}]*\}|\\(?:hline|newline|therefore|because|noindent)(?![a-zA-Z])"
)
_MOD = (
    r"(?:\\(?:pmod|bmod|mod|pod)(?![a-zA-Z])|\\(?:text|mathrm|operatorname)\{[\s(]*mod(?:ulo)?[\s)]*\}"
    r"|(?<![\\a-zA-Z])mod(?![a-zA-Z]))"
)
_MODULUS = re.compile(rf"\(\s*{_MOD}(?:[^()]|\([^()]{{0,40}}\)){{0,40}}\)|{_MOD}\s*(?:\{{[^{{}}]*\}}|\d+)?")

_BEFORE = re.compile(r"\A[\s?$]*+(?:\.(?!\d)\s*)?")  # what may stand before a side of an equation

_EQUAL = {"=", r"\equiv", r"\approx", r"\simeq", r"\doteq", r"\longequal"}
_BOUND = {"<", ">", r"\lt", r"\gt", r"\le", r"\leq", r"\leqslant", r"\ge", r"\geq", r"\geqslant"}
_BREAK = {
    ",",
    ";",
    ":",
    r"\to",
    r"\implies",
    r"\Rightarrow",
    r"\Longrightarrow",
    r"\iff",
    r"\Leftrightarrow",
    r"\rightarrow",
    r"\longrightarrow",
    r"\quad",
    r"\qquad",
    r"\ne",
    r"\neq",
    r"\in",
    r"\mid",
    r"\nmid",
    r"\parallel",
    r"\perp",
    r"\sim",
    r"\cong",
    r"\land",
    r"\lor",
    r"\wedge",
    r"\vee",
    r"\subset",
    r"\Longleftrightarrow",
    r"\mapsto",
    r"\propto",
    r"\subseteq",
    r"\colon",
    r"\leadsto",
    r"\Leftarrow",
    r"\longleftrightarrow",
}
_PIECE = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENS = {
    ")": "(",
    "]": "[",
    "}": "{",
    r"\}": r"\{",
    r"\rfloor": r"\lfloor",
    r"\rceil": r"\lceil",
    r"\rangle": r"\langle",
}
_UP, _DOWN = set(_OPENS.values()), set(_OPENS)
_HALF_OPEN = re.compile(r"\([^()\[\],]+,[^()\[\],]+\]|\[[^()\[\],]+,[^()\[\],]+\)")

_NUMBER = re.compile(rf"[-+]?(?:[\d{_COMMA}]+(?:\.\d+)?|\.\d+)(?:\^\{{?\\circ\}}?|\\%)?")
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|Delta|sin|cos|tan)\s*)?\{?(?:\\?[a-zA-Z]+'*|\[[A-Z]+\]|\|[^|]*\|)\}?"
    r"(?:_(?:\w|\{[^{}]*\}))?(?:\([^()]*\))?|\[[A-Z']+\]|"
)
# Words before a value that mark it as a result, and words that mark it as something else.
_RESULT = re.compile(
    r"\b(?:is|are|be|was|equals?|gets?|gives?|giving|gave|obtain(?:s|ed|ing)?|yields?|yielding|totals?|totall?ing|we\s+have"
    r"|find|makes?|making|become[s]?|leaves?|leaving|into|approximately|result[s]?|(?:total|sum|value|area|length"
    r"|product|count|volume|radius|number|probability)\s+of|to\s+(?:be|get)|comes?\s+(?:out\s+)?to)"
    r"(?:\s+(?:us|that|then|thus|therefore|just|only|exactly|simply|now|also|about|equal|to|a\s+total\s+of|of|again"
    r"|clearly|the|in\s+total|hence|indeed|actually)){0,3}\s*[:(]?\s*\Z",
    re.IGNORECASE,
)
_CONDITION = re.compile(
    r"\b(?:cases?|for|if|when|whenever|suppose|assume|assuming|where|consider|step|solution|equations?|eqn?|fig(?:ure)?|problem|part"
    r"|(?:is|are|does|can)\s+not|(?:not|cannot|can't)\s+(?:be|equal)|never|lemma|theorem|claim|example|section|page|chapter|method|note|remark|row|mod(?:ulo)?|base|unless|until|from|with|case:)"
    r"\.?\s*(?:that\s+|\()?\Z",
    re.IGNORECASE,
)

_GROUP = r"\{(?:[^{}\n]|\{[^{}\n]{0,40}\}){1,60}\}"
_ATOM = (
    rf"(?:\\?sqrt\s*(?:\([^()\n]{{1,40}}\)|{_GROUP}|\d+)|\\[dt]?frac\s*{_GROUP}\s*{_GROUP}|\\pi\b"
    rf"|\d{{1,3}} \d{{1,2}}/\d{{1,3}}(?![\d/])|\d[\d{_COMMA}]*+(?:\.\d++|,\d++(?![,\d]))?%?"
    rf"|[a-zA-Z](?![a-zA-Z])|\([^()\n]{{1,40}}\)|{_GROUP})"
)
_PROSE_EXPRESSION = re.compile(
    rf"\s*[-+]?\s*{_ATOM}(?:\s*(?:[-+]|(?:[*/^]|\\cdot\b|\\times\b)\s*-?)\s*{_ATOM}|{_ATOM})*+"
)
_DATE = re.compile(r"\d+/\d+/\d+|(?:1[89]|20)\d\d/\d\d(?:\d\d)?")
_PLAIN = [
    (re.compile(pattern), tex)
    for pattern, tex in (
        (r"\\?sqrt\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}"),
        (r"\^(-\d+|\d{2,})", r"^{\1}"),
        (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
        (r"%", r"\\%"),
    )
]
_CONTINUES = re.compile(r"\s*=\s*[-+]?\s*(?:[\d(\\]|sqrt)")  # a chain with another value to come
_PROSE_EVENT = re.compile(rf"\\(?:approx|equiv)(?![a-zA-Z])|(?<![<>!])=+(?!>)|(?<![\w.{{{_COMMA}$/-])(?:\d|sqrt)")


def mathematical(row: Row) -> list[str]:
    """Right-hand sides, fractions, roots, powers and stated numbers, in order of appearance.

    Numbers that only label something (steps, cases, lists, years) are left out, and so is what the problem gives. Of
    equal values, the shortest spelling is kept. If a sum or a product yields the final answer, its parts count as well:
    the answer itself does not tell how it was reached.
    """
    answer = row.answer or latex.last_boxed(row.solution)
    known = _Known(_givens(row.problem), _key(answer.strip()) if answer else None)
    found: list[str] = []
    before = ""
    for is_formula, text in _chained(_prepared(row.solution)):
        if is_formula:
            found += _from_formula(text, before, known)
        else:
            found += _from_prose(text, known)
            before = text[-60:]
    shortest: dict[Hashable, str] = {}  # in order of first appearance
    for item in (item.replace(_COMMA, ",") for item in found):
        key = latex.canonical(item)
        if key not in shortest or len(item) < len(shortest[key]):
            shortest[key] = item
    return list(shortest.values())


def without_figures(text: str) -> str:
    """The text without drawings, tables, pictures and code."""
    return _FIGURES.sub(lambda m: m[0] if _EQUATIONS.match(m[0]) else " ", text)


def collapsed(text: str) -> str:
    """The text with each run of whitespace as a space, a line break if it has one, or two if it has more."""
    return _COLLAPSE.sub(lambda m: "\n\n" if m[0].count("\n") > 1 else "\n" if "\n" in m[0] else " ", text)


def _prepared(text: str) -> str:
    text = _LIST_MARK.sub("", without_figures(latex.unbox(latex.signs(collapsed(text)), "=")))
    return collapsed(_THOUSANDS.sub(_joined, text))


def _joined(match: re.Match[str]) -> str:
    """A number with _COMMA for any separator of its thousands; `1,000,00` is not one and stays."""
    return match[0] if match["rest"] else re.sub(r"\{,\}|,\\!|\\,|,", _COMMA, match[0])


def _chained(text: str) -> Iterator[tuple[bool, str]]:
    """`latex.spans`, with the formulas of a chain joined: `$a = b$ $= c$`, and `$a =$ $b$`."""
    chain: list[str] = []
    for is_formula, piece in latex.spans(text):
        if is_formula:
            if chain and not (piece.lstrip().startswith("=") or chain[-1].rstrip().endswith("=")):
                yield True, "".join(chain)
                chain = []
            chain.append(piece)
        elif piece.strip():
            if chain:
                yield True, "".join(chain)
                chain = []
            yield False, piece
    if chain:
        yield True, "".join(chain)


class _Known(NamedTuple):
    """What does not count as a result: the keys of what the problem states, and that of the final answer."""

    given: frozenset[Hashable]
    answer: Hashable

    def has(self, key: Hashable) -> bool:
        return key == self.answer or key in self.given


@lru_cache(maxsize=4)
def _givens(problem: str) -> frozenset[Hashable]:
    """What the problem states: the keys of its numbers and formulas, and its equations as text."""
    keys: set[Hashable] = set()
    text = _prepared(problem)
    for is_formula, piece in latex.spans(text):
        for statement in _statements(piece) if is_formula else ():
            keys.update(_key(side) for _, side in statement)
            keys.add(re.sub(r"[\s{}]", "", "".join(relation + side for relation, side in statement)))
    keys.update(_key(match[0]) for match in re.finditer(rf"\d[\d{_COMMA}]*(?:\.\d+)?", text))
    return frozenset(keys)


def _key(text: str) -> Hashable:
    return latex.canonical(text.replace(_COMMA, ""))


def _statements(formula: str) -> list[list[tuple[str, str]]]:
    """A formula's statements, each a chain of (relation, side); the first relation of a chain is empty."""
    text = _ROWS.sub(" ; ", CONTINUED.sub(" ", formula))
    text = latex.tidy(_COLUMN.sub(" ; ", _CLUTTER.sub(" ", text)))
    text = WORDS.sub(_word, _MODULUS.sub(" ; ", text))
    chains: list[list[tuple[str, list[str]]]] = [[("", [])]]
    depth = 0
    for piece in _PIECE.findall(text):
        depth = 0 if piece == ";" else max(0, depth + (piece in _UP) - (piece in _DOWN))
        if depth == 0 and piece in _BREAK:
            chains.append([("," if piece == "," else "", [])])
        elif depth == 0 and (piece in _EQUAL or piece in _BOUND):
            chains[-1].append((piece, []))
        else:
            chains[-1][-1][1].append(piece)
    statements = [[(relation, _trimmed("".join(side))) for relation, side in chain] for chain in chains]
    return [chain for chain in statements if any(side for _, side in chain)]


def _trimmed(side: str) -> str:
    """A side of an equation without punctuation around it, and without braces around all of it."""
    side = _BEFORE.sub("", side).rstrip().rstrip("?$. \n")
    return re.sub(r"\A\{([^{},]*)\}\Z", r"\1", side)


def _word(match: re.Match[str]) -> str:
    """What remains of a word in a formula: a letter or number is part of the formula, anything else splits it."""
    word = match[1].strip()
    return word + (match[2] or "") if len(match[1]) < 2 or word.isdecimal() else ";"


def _balanced(side: str) -> bool:
    """Whether all brackets match; those of half-open intervals count as matching."""
    waiting: list[str] = []
    for piece in _PIECE.findall(side):
        if piece in _UP:
            waiting.append(piece)
        elif piece in _DOWN and (not waiting or waiting.pop() != _OPENS[piece]):
            return _HALF_OPEN.fullmatch(side) is not None
    return not waiting and side.count("|") % 2 == 0


def _kind(side: str) -> str | None:
    """`number`, `closed` (a value that is more than a number), `symbolic`, or None for what cannot be a result."""
    if not side or len(side) > 70 or not _balanced(side) or re.search(r"\\[lc]?dots|\\infty|\.\.\.|\\sum|\\prod", side):
        return None
    if _NUMBER.fullmatch(side):
        return "number"
    poly = latex.polynomial(side.replace(_COMMA, ""))
    if poly is not None and latex.is_closed(poly):
        return None if re.fullmatch(r"\(\d+\)|\D*", side) else "closed"
    if _NAME.fullmatch(side) or re.match(r"[(\s]*\\(?:times|cdot)(?![a-z])|\\[a-z]+_(?:\d|\{[^{}]*\})\Z", side):
        return None
    letters = re.sub(r"\\[a-zA-Z]+", "", side)
    if poly is None and re.search(r"\d", side) and not re.search(r"[a-zA-Z=]", letters):
        return "closed" if re.search(r"[\d}\])!]\Z|\\r(?:floor|ceil)\Z|\\circ\Z", side) else None
    if re.fullmatch(r"[A-Z]{2,3}'?\s*\^\s*(?:\d|\{\d\})", side):
        return None  # the square of a segment
    return "symbolic" if len(side) <= 40 and re.search(r"\d|\\frac|\\sqrt", side) and "=" not in side else None


def _from_formula(formula: str, before: str, known: _Known) -> list[str]:
    """The results that one formula states; `before` is the prose that leads to it."""
    found: list[str] = []
    conditional = _CONDITION.search(before) is not None
    in_list = False  # after `x = 2,` a bare `3` is a result too
    statements = _statements(formula)
    listing = re.search(r"\\[lc]?dots|\.\.\.", formula) is not None
    for statement in statements:
        relation, first = statement[0]
        if len(statement) > 1:
            results = _results(statement, conditional, known)
            in_list = bool(results) and not listing
            found += results
            continue
        kind = _kind(first)
        if kind == "number":
            stated = len(statements) == 1 and _RESULT.search(before) and not conditional
            if (in_list and relation == ",") or (stated and _key(first) not in known.given):
                found.append(first)
        else:
            in_list = False
            stated = kind == "symbolic" and len(statements) == 1 and _RESULT.search(before) and not conditional
            telling = kind == "closed" and not listing and not _is_named(first)
            if (stated or telling) and _key(first) not in known.given:
                found.append(first)
    return found


def _is_named(side: str) -> bool:
    """Whether a difference names something, as `0-9` a range and `30-60-90` a triangle: its value is not positive."""
    chain = re.sub(r"\^\{?\\circ\}?", "", side)
    if not re.fullmatch(r"\d+(?: ?-+ ?\d+)+", chain):
        return False
    first, *others = map(int, re.findall(r"\d+", chain))
    return first <= sum(others)


def _results(statement: list[tuple[str, str]], conditional: bool, known: _Known) -> list[str]:
    """The results of a chain such as `a = b = c \\approx d < e`: one value per run of equal sides."""
    left = statement[0][1]
    name = _NAME.fullmatch(left) is not None
    if re.sub(r"[\s{}]", "", "".join(r + side for r, side in statement)) in known.given:
        return []
    found: list[str] = []
    run: list[str] = [left]
    for relation, side in [*statement[1:], ("end", "")]:
        if relation == "=":
            run.append(side)
            continue
        result = _result(run, name, conditional, known)
        found += [v for v in result if run[0] != "<" or _key(v) not in known.given]  # bounds that the problem sets
        run = [""] if relation in _EQUAL else ["<"]
        if side:
            run.append(side)
    return found


def _result(run: list[str], name: bool, conditional: bool, known: _Known) -> list[str]:
    """The value of one run of equal sides, `[left, side, side, ...]`; an empty list if there is none.

    If the value is the final answer, the parts of the last sum or product before it are listed as well.
    """
    left, sides = run[0], [side for side in run[1:] if side]
    kinds = [_kind(side) for side in sides]
    values = [side for side, kind in zip(sides, kinds, strict=True) if kind in ("number", "closed")]
    numbers = [side for side, kind in zip(sides, kinds, strict=True) if kind == "number"]
    if left == "<":
        return [v for v in values[-1:] if not re.fullmatch(r"-?\d\d?", v)]
    if values:
        best = numbers[-1] if numbers else values[-1]
        if _key(best) == known.answer:
            return [*next((parts for side in reversed(run) if (parts := _parts(side, known))), []), best]
        plain = best in numbers
        if plain and conditional and len(sides) == 1:
            return []
        if plain and not name and re.fullmatch(r"-?0*[01]", best):
            return [f"{left} = {best}"] if best == "0" and _kind(left) == "symbolic" else []
        return [best]
    if sides and _kind(left) == "number" and not re.fullmatch(r"-?\d", left):
        return [left]
    return [sides[-1]] if sides and kinds[-1] == "symbolic" else []


def _parts(side: str, known: _Known) -> list[str]:
    """The values that a side adds up, otherwise those that it multiplies, without those that the problem gives.

    Empty if there is nothing to work out: `2+3\\sqrt{5}` is as short as it gets.
    """
    poly = latex.polynomial(side.replace(_COMMA, ""))
    if poly is None:
        return []
    for signs in (("+", "-"), (r"\cdot", r"\times", "*")):
        parts, depth = [""], 0
        for piece in _PIECE.findall(side):
            depth = max(0, depth + (piece in _UP) - (piece in _DOWN))
            if depth == 0 and piece in signs:
                parts.append("")
            else:
                parts[-1] += piece
        parts = [part.strip() for part in parts if part.strip()]
        if 1 < len(parts) > len(poly):
            return [part for part in parts if _kind(part) in ("number", "closed") and not known.has(_key(part))]
    return []


def _from_prose(text: str, known: _Known) -> list[str]:
    """Results in plain text: what follows an equals sign, and stated numbers, fractions and roots."""
    found: list[str] = []
    end, left = 0, ""  # the side before an equals sign
    for event in _PROSE_EVENT.finditer(text):
        if event.start() < end:
            continue
        relation = not event[0][0].isalnum()
        start = event.end() if relation else event.start()
        match = _PROSE_EXPRESSION.match(text, start)
        if match is None:
            continue
        end = match.end()
        value = " ".join(match[0].split())
        if _CONTINUES.match(text, end):
            left = value
            continue
        date = _DATE.fullmatch(value) is not None
        for pattern, tex in _PLAIN:
            value = pattern.sub(tex, value)
        kind = _kind(value)
        before = text[max(0, event.start() - 60) : event.start()]
        new = _key(value) not in known.given
        stated = kind == "number" and _RESULT.search(before) and not _CONDITION.search(before)
        telling = kind == "closed" and not date and re.search(r"[/^]|sqrt|frac", value)
        if relation and kind and _key(value) == known.answer:
            found += [*_parts(left, known), value]
        elif (relation and kind) or (new and (stated or telling)):
            found.append(value)
        left = ""
    return found
