"""Exact values: polynomials with rational coefficients over square roots, read from LaTeX.

The parser limits size and depth, and never evaluates anything that could run code, loop or grow without bound.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from dail_jax.latex.spell import tidy

# A polynomial: {(squarefree radicand, ((variable, exponent), ...)): coefficient}
Poly = dict[tuple[int, tuple[tuple[str, int], ...]], Fraction]

MAX_LENGTH, MAX_DEPTH, MAX_TERMS, MAX_BITS = 400, 24, 60, 2000
CONSTANTS = {r"\pi", r"\circ", r"\%"}
_FUNCTIONS = set("fghFGH")  # letters that name a function when a power and a bracket follow: f^{-1}(x)

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d|[a-zA-Z]|\S")


class _Unknown(Exception):
    """Raised for a formula that is not a polynomial this parser can read."""


def polynomial(formula: str) -> Poly | None:
    """The formula as a polynomial, or None if it cannot be read as one."""
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


def approximate(formula: str) -> float | None:
    """The value of a formula as a float; None if it cannot be read, has variables, or overflows."""
    poly = polynomial(formula)
    if poly is None or any(name != r"\pi" for _, names in poly for name, _ in names):
        return None
    try:
        return math.fsum(
            float(value) * math.sqrt(radicand) * math.pi ** sum(exponent for _, exponent in names)
            for (radicand, names), value in poly.items()
        )
    except OverflowError:
        return None


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
    if len(poly) == 2 and not any(names for _, names in poly):  # removes roots: 1/(a+b) = (a-b)/(a^2-b^2)
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
        raise _Unknown  # it may still have a larger square as a factor
    if math.isqrt(rest) ** 2 == rest:
        rest, outside = 1, outside * math.isqrt(rest)
    return {(rest, ()): Fraction(outside, value.denominator)}


class _Parser:
    """Recursive descent over the tokens of one formula; raises _Unknown for anything it cannot read."""

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
                # Ambiguous: `2\frac12` means 2.5 to some and 1 to others; `2 3` has no meaning at all.
                if (token == r"\frac" and before.isdecimal()) or token.isdecimal():
                    raise _Unknown
                total = _multiply(total, self.power(depth))
            before = token
        return total

    def power(self, depth: int) -> Poly:
        letter = self.peek()
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
                if self.peek() == "(" and letter in _FUNCTIONS:  # f^{-1}(x)
                    raise _Unknown
        return base

    def small(self, poly: Poly, limit: int) -> int:
        value = _constant(poly)
        if value.denominator != 1 or not 0 <= value <= limit:
            raise _Unknown
        return int(value)

    def argument(self, depth: int) -> Poly:
        """A TeX argument: a group, or a single character or command."""
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
            return self.applied(name, depth) if self.peek() == "(" else {(1, ((name, 1),)): Fraction(1)}
        raise _Unknown

    def applied(self, name: str, depth: int) -> Poly:
        """A name before a bracket: `n(n+1)` is a product (a function never takes itself), `f(n+1)` a value of f."""
        arguments: list[Poly] = []
        while not arguments or self.peek() == ",":
            self.take()
            arguments.append(self.sum(depth + 1))
        if self.take() != ")":
            raise _Unknown
        factor: Poly = {(1, ((name, 1),)): Fraction(1)}
        if len(arguments) == 1 and any(name == other for _, names in arguments[0] for other, _ in names):
            return _multiply(factor, arguments[0])
        shown = "; ".join(" + ".join(f"{c} {key}" for key, c in sorted(poly.items())) for poly in arguments)
        if len(shown) > MAX_LENGTH:
            raise _Unknown
        return {(1, ((f"{name}({shown})", 1),)): Fraction(1)}

    def subscript(self) -> str:
        text = self.take()
        if text == "{":
            text = ""
            while (token := self.take()) != "}":
                if token == "{":
                    raise _Unknown
                text += token
        return text
