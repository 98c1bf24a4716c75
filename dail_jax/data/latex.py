"""LaTeX as it stands in solutions: balanced boxes, formulas apart from prose, and exact comparison of values.

`canonical` compares values by exact arithmetic on polynomials with rational coefficients and square roots. It is a
parser of our own with limits on size and depth: nothing is evaluated that could run, loop or grow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator
from fractions import Fraction

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
# Exact comparison
# ---------------------------------------------------------------------------------------------------

# A polynomial: {(squarefree radicand, ((variable, exponent), ...)): coefficient}
Poly = dict[tuple[int, tuple[tuple[str, int], ...]], Fraction]

MAX_LENGTH, MAX_DEPTH, MAX_TERMS, MAX_BITS = 400, 24, 60, 2000
CONSTANTS = {r"\pi", r"\circ", r"\%"}

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d|[a-zA-Z]|\S")
_SPACING = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|nolimits|nonumber|notag|big[lr]?|Big[lr]?|bigg[lr]?|Bigg[lr]?"
    r"|hspace\{[^{}]*\}|vspace\{[^{}]*\}|phantom\{[^{}]*\}|(?:text)?color\s*\{[^{}]*\})(?![a-zA-Z])"
    r"|\\(?:mathbf|mathsf|boldsymbol|bm|underline)(?=\s*\{)|\\[,!;:> ]|~|(?<!\\)&|[_^]?\{\s*\}"
)


class _Unknown(Exception):
    """Not a polynomial that we know."""


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


def canonical(formula: str) -> Hashable:
    """A key that is equal for equal values: exact for polynomials over square roots, else the bare characters."""
    poly = polynomial(formula)
    if poly is not None:
        return frozenset(poly.items())
    text = re.sub(r"\s+", "", tidy(formula))
    if len(text) <= MAX_LENGTH and re.fullmatch(r"\(.*,.*\)", text):
        return tuple(canonical(part) for part in split_top(text[1:-1], ","))
    return re.sub(r"\{(.)\}", r"\1", text)


def polynomial(formula: str) -> Poly | None:
    """The formula as a polynomial, or None where it is none that we know."""
    text = re.sub(r"(\d),(?=\d{3}(?!\d))", r"\1", tidy(re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d)", ",", formula)))
    if len(text) > MAX_LENGTH:
        return None
    text = re.sub(r"^(?:[\s,;:]|\.(?!\d))+|[\s.,;:]+$", "", text)
    parser = _Parser(_TOKEN.findall(re.sub(r"(\d) +(?=[\d.])", r"\1\\ ", text)))
    try:
        poly = parser.sum(0)
        return poly if parser.position == len(parser.tokens) and parser.tokens else None
    except (_Unknown, ZeroDivisionError):
        return None


def is_closed(poly: Poly) -> bool:
    """Whether a polynomial has a value: no variables besides constants such as pi."""
    return all(name in CONSTANTS for _, names in poly for name, _ in names)


def split_top(text: str, separator: str) -> list[str]:
    """Splits at a one-character separator outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _constant(poly: Poly) -> Fraction:
    if any(key != (1, ()) for key in poly):
        raise _Unknown
    return poly.get((1, ()), Fraction(0))


def _number(value: Fraction | int) -> Poly:
    return {(1, ()): Fraction(value)} if value else {}


def _add(a: Poly, b: Poly, sign: int = 1) -> Poly:
    total = dict(a)
    for key, value in b.items():
        total[key] = total.get(key, Fraction(0)) + sign * value
    return _checked(total)


def _multiply(a: Poly, b: Poly) -> Poly:
    total: Poly = {}
    for (r1, names1), c1 in a.items():
        for (r2, names2), c2 in b.items():
            common = math.gcd(r1, r2)  # both squarefree, so sqrt(r1 r2) = common sqrt(r1 r2 / common^2)
            exponents = dict(names1)
            for name, exponent in names2:
                exponents[name] = exponents.get(name, 0) + exponent
            key = (r1 * r2 // common**2, tuple(sorted((n, e) for n, e in exponents.items() if e)))
            total[key] = total.get(key, Fraction(0)) + c1 * c2 * common
    return _checked(total)


def _checked(poly: Poly) -> Poly:
    poly = {key: value for key, value in poly.items() if value}
    if len(poly) > MAX_TERMS or any(
        v.numerator.bit_length() + v.denominator.bit_length() > MAX_BITS for v in poly.values()
    ):
        raise _Unknown
    return poly


def _inverse(poly: Poly) -> Poly:
    if not poly:
        raise ZeroDivisionError
    if len(poly) == 2 and not any(names for _, names in poly):  # 1/(a+b) = (a-b)/(a^2-b^2), where roots are left
        first, (key, value) = poly.items()
        conjugate = dict([first, (key, -value)])
        return _multiply(conjugate, _inverse(_multiply(poly, conjugate)))
    if len(poly) > 1:
        raise _Unknown
    ((radicand, names), value) = next(iter(poly.items()))
    return {(radicand, tuple((n, -e) for n, e in names)): 1 / (value * radicand)}


def _power(poly: Poly, exponent: Fraction) -> Poly:
    if exponent.denominator != 1:
        return _power(_root(poly, exponent.denominator), Fraction(exponent.numerator))
    if abs(exponent) > 200:
        raise _Unknown
    base = poly if exponent >= 0 else _inverse(poly)
    result = _number(1)
    for _ in range(abs(int(exponent))):
        result = _multiply(result, base)
    return result


def _root(poly: Poly, degree: int = 2) -> Poly:
    value = _constant(poly)
    if degree != 2:
        roots = [round(n ** (1 / degree)) if 0 <= n <= 10**12 else 0 for n in (value.numerator, value.denominator)]
        if degree > 40 or not roots[1] or Fraction(roots[0], roots[1]) ** degree != value:
            raise _Unknown
        return _number(Fraction(roots[0], roots[1]))
    rest, outside, factor = value.numerator * value.denominator, 1, 2
    if rest < 0 or rest > 10**12:
        raise _Unknown
    if rest == 0:
        return {}
    while factor**2 <= rest and factor < 2000:
        while rest % factor**2 == 0:
            rest //= factor**2
            outside *= factor
        factor += 1
    if rest > 4_000_000 and math.isqrt(rest) ** 2 != rest and rest > 2000**3:
        raise _Unknown  # a larger square might still hide in it
    if math.isqrt(rest) ** 2 == rest:
        rest, outside = 1, outside * math.isqrt(rest)
    return {(rest, ()): Fraction(outside, value.denominator)}


class _Parser:
    """Recursive descent over the tokens of one formula; raises _Unknown at whatever it does not know."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.position = tokens, 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise _Unknown
        self.position += 1
        return token

    def sum(self, depth: int) -> Poly:
        if depth > MAX_DEPTH:
            raise _Unknown
        sign = 1
        while self.peek() in ("+", "-") and self.peek():
            sign *= -1 if self.take() == "-" else 1
        total = _add({}, self.product(depth), sign)
        while self.peek() in ("+", "-") and self.peek():
            sign = -1 if self.take() == "-" else 1
            total = _add(total, self.product(depth), sign)
        return total

    def product(self, depth: int) -> Poly:
        before = self.peek()
        total = self.power(depth)
        while (token := self.peek()) and token not in ("+", "-", ")", "]", "}", ","):
            if token in ("*", r"\cdot", r"\times", r"\ast"):
                self.take()
                sign = -1 if self.peek() == "-" and self.take() else 1
                total = _add({}, _multiply(total, self.power(depth)), sign)
            elif token in ("/", r"\div"):
                self.take()
                total = _multiply(total, _inverse(self.power(depth)))
            else:
                # `2\frac12` is two and a half for some and one for others; `2 3` is nothing at all
                if (token == r"\frac" and before.isdecimal()) or token.isdecimal():
                    raise _Unknown
                total = _multiply(total, self.power(depth))
            before = token
        return total

    def power(self, depth: int) -> Poly:
        base = self.atom(depth)
        while self.peek() in ("^", "!", r"\%"):
            token = self.take()
            if token == r"\%":
                base = _multiply(base, {(1, ((r"\%", 1),)): Fraction(1)})
            elif token == "!":
                base = _number(math.factorial(self.small(base, 40)))
            elif self.peek() == r"\circ" or self.tokens[self.position : self.position + 3] == ["{", r"\circ", "}"]:
                self.position += 3 if self.peek() == "{" else 1
                base = _multiply(base, {(1, ((r"\circ", 1),)): Fraction(1)})
            else:
                base = _power(base, _constant(self.argument(depth)))
        return base

    def small(self, poly: Poly, limit: int) -> int:
        value = _constant(poly)
        if value.denominator != 1 or not 0 <= value <= limit:
            raise _Unknown
        return int(value)

    def argument(self, depth: int) -> Poly:
        """What TeX takes as an argument: a group, or one character or command."""
        if self.peek().isdecimal():
            return _number(int(self.take()))
        return self.atom(depth)

    def atom(self, depth: int) -> Poly:
        token = self.take()
        if token.isdecimal() or token == ".":
            digits = token
            while self.peek().isdecimal() or (self.peek() == "." and "." not in digits):
                digits += self.take()
            if len(digits) > 400 or digits == ".":
                raise _Unknown
            return _number(Fraction(digits + "0" if digits.endswith(".") else digits))
        if token in ("(", "[", "{"):
            inner = self.sum(depth + 1)
            if self.take() != {"(": ")", "[": "]", "{": "}"}[token]:
                raise _Unknown
            return inner
        if token == r"\frac":
            above = self.argument(depth + 1)
            return _multiply(above, _inverse(self.argument(depth + 1)))
        if token == r"\binom":
            n = self.small(self.argument(depth + 1), 200)
            return _number(math.comb(n, self.small(self.argument(depth + 1), 200)))
        if token == r"\sqrt":
            degree = self.small(self.atom(depth + 1), 40) if self.peek() == "[" else 2
            return _power(self.argument(depth + 1), Fraction(1, degree))
        if token == r"\pi":
            return {(1, ((token, 1),)): Fraction(1)}
        if len(token) == 1 and token.isalpha() and token.isascii():
            name = token
            while self.peek() == "'":
                name += self.take()
            if self.peek() == "_":
                self.take()
                name += "_" + self.subscript()
            return {(1, ((name, 1),)): Fraction(1)}
        raise _Unknown

    def subscript(self) -> str:
        text = self.take()
        if text == "{":
            text = ""
            while (token := self.take()) != "}":
                if token == "{":
                    raise _Unknown
                text += token
        return text
