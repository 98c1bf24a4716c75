"""Waypoint extractors, final answers, and the exact comparison of values behind them."""

import random
import re
import time

import pytest

from dail_jax import config, latex
from dail_jax.data.records import Row
from dail_jax.data.waypoints import EXTRACTORS, final_answer, waypoints
from dail_jax.errors import UserError


def found(solution, problem="?", answer=None, **cfg):
    return waypoints(Row("r", problem, solution, answer, 0), config.Waypoints(**cfg))


@pytest.mark.parametrize(
    "solution, want",
    [
        (r"+B=551; ~=155; *3=465; \boxed{465}", ["551", "155"]),
        (
            r"We see $x = 3$, so $y = \frac{x}{2} = \frac 32$ and $z=\sqrt{8}=2\sqrt{2}$.",
            ["3", r"\frac32", r"2\sqrt{2}"],
        ),
        (r"There are ${40 \choose 2} = 780$ pairs, thus $2^{780}$ outcomes.", ["780", "2^{780}"]),
        (r"It takes $1+\frac{10}{9}+\frac{10}{8}=\frac{121}{36}$ days.", [r"\frac{121}{36}"]),
        (r"\begin{align*} P(0)&=\frac14, \\ P(1)&=\frac13(1-P(0))&&=\frac16 \end{align*}", [r"\frac14", r"\frac16"]),
        (r"\begin{align*} S &= 3(2+5) \\ &= 3\cdot 7 \\ &= 21 \end{align*}", ["21"]),
        (r"\[(a,b)=\left(\frac{2}{3}, \frac{1}{3}\right)\]", [r"(\frac{2}{3}, \frac{1}{3} )"]),
        (r"$AD=100\sqrt 2\approx 141.42$ so $\lfloor AD\rfloor=\boxed{141}$", [r"100\sqrt2", "141.42"]),
        (r"$N = 7 \equiv 2 \pmod{5}$ and $\angle ABC = 30^\circ$", ["7", "2", r"30^\circ"]),
        (r"$p = 15,\ 20$ and $x \le \frac{1}{2}$", ["15", "20", r"\frac{1}{2}"]),
        (r"There are $10{,}000$ codes, and 1,234,567 = 1{,}234{,}567.", ["10{,}000", "1{,}234{,}567"]),
        (r"The sum is \boxed{12}, of which the half is \boxed{6}.", ["12"]),
        (r"so $y^4-106y^2+2745=0$ and $a_{n} = 2a_{n-1}+1$", ["y^4-106y^2+2745 = 0", "2a_{n-1}+1"]),
        ("Plain: 3 + 4 = 7, then x = 35/2, and sqrt(5) is left.", ["7", "35/2", r"\sqrt{5}"]),
        (r"$V = 12\pi \text{ cm}$, which costs \$45.50.", [r"12\pi"]),
        (r"x = \frac{3}{4} and y = \sqrt{5}, outside of dollars", [r"\frac{3}{4}", r"\sqrt{5}"]),
    ],
)
def test_math(solution, want):
    got = found(solution)
    assert [latex.canonical(x) for x in got] == [latex.canonical(x) for x in want], got


@pytest.mark.parametrize(
    "solution",
    [
        "1. First.\n2) Second.\n(3) Third.\nStep 4. Case 5: Theorem 6.",
        "This is from the 2008 AIME, as in AMC 10 and in 1999; see (2) and Solution 3.",
        "[asy] size(200); pair A=(0,0), B=(5,7); draw(A--B); [/asy] A figure.",
        "\\begin{tikzpicture}\\draw (0,0) -- (5,7);\\end{tikzpicture}```python\nx = 55\n```",
        "For $k = 7$ and if $n=12$, case $m = 3$: nothing.",
        "On days $1, 2, 3, \\ldots, 9$ it rains, and $5$ cats and $x = y$.",
        "Using digits $0-9$ with $CA^2 = CB^2$ and equation $(3)$. ~ user_2",
    ],
)
def test_math_leaves_out_what_is_no_result(solution):
    assert found(solution) == []


def test_only_tags_are_tags():
    assert found(r"$0<x$ we get $y = 37$ and $w=\frac57$, so $z>5$") == ["37", r"\frac57"]
    assert found(r"$a<b$ and $y = 38$ and $c>d$, $e<a and y = 139, y>b$") == ["38", "139"]
    assert found("<p class='x=1'>so $y = 38$<br/> <a href=\"?y=40\">$y = 41$</a></p>") == ["38", "41"]


def test_what_the_problem_gives_is_no_result():
    problem = r"Let $AB = 14$ and $BC=\frac{1}{3}$. There are 25 cats."
    assert found(
        r"Since $AB = 14$ and $\frac{1}{3}$ of them, there are $25$ cats, so $x = 25$ and $y=16$.", problem
    ) == [
        "25",
        "16",
    ]


def test_equal_values_are_merged_into_the_simplest():
    solution = r"$a = \frac{10}{4}, b = \frac{5}{2}, c = 2.5, d=\sqrt{2}\cdot\sqrt{6}, e=2\sqrt3, f=x+1, g=1+x$"
    assert found(solution) == ["2.5", r"2\sqrt3", "x+1"]


def test_the_final_answer_is_listed_apart():
    row = Row("r", "?", r"$x = 7$, $x^2 = 49$, $m = \boxed{007}$", "7", 0)
    assert final_answer(row) == "7" and waypoints(row, config.Waypoints()) == ["49"]
    assert (
        final_answer(Row("r", "?", r"\boxed{1} or \boxed{\frac{1}{\sqrt{2}}} \boxed{", None, 0))
        == r"\frac{1}{\sqrt{2}}"
    )
    assert final_answer(Row("r", "?", r"\boxed 5", None, 0)) == "5"
    assert final_answer(Row("r", "?", "a proof", None, 0)) is None
    for name in ("reference", "math", "text"):
        assert "7" not in waypoints(row, config.Waypoints(extractor=name))


@pytest.mark.parametrize(
    "solution, want",
    [
        ("x^{12} + 2x + n+1 = 345, 2x+1", ["1", "12", "2x", "2x+1", "345", "n+1", "x^{12}"]),
        (r"$x^2$, 2^{10}, e^{-x}, 3.5^2, ab^c", ["10", "2", "2^{10}", "3.5", "3.5^2", "ab^c", "e^{-x}", "x^2"]),
        # An exponent without braces continues; one in braces ends at the first unknown character.
        ("x^2+3y^2, x^2y^3, x^2^3", ["2", "2y", "3", "3y", "x^2", "x^2+3y", "x^2y"]),
        (r"e^{2 + x}, x^{a_1}, z^{2n-1}", ["1", "2", "2n", "2n-1", "e^{2", "x^{a", "z^{2n-1}"]),
        (r"(n+1)^2, x^{}, x^{\frac12}, y^ 2", ["1", "2", "n+1"]),
        ("10,000, 1.5e-3, 3.5cm, .5, -7, 5-3, 2e6x", ["-7", ".5", "000", "1.5e-3", "10", "3", "5", "5e", "5e-3"]),
        (
            "2e, 12ab, a_1, é3, 2x_1, 3n-12, k-1a, 4k-1b, 1.2.3",
            ["1.2", "12", "1a", "1b", "2e", "3", "3n", "3n-12", "4k"],
        ),
        ("no figures here", []),
    ],
)
def test_reference_finds_its_categories_sorted_as_text(solution, want):
    assert found(solution, extractor="reference") == sorted(want)


def test_reference_agrees_with_its_categories_taken_literally():
    number, letter = r"[-+]?(\d*\.)?\d+([eE][-+]?\d+)?", r"[a-zA-Z]"
    categories = [  # (pattern, whether an adjacent word character rules it out)
        (number, True),
        (r"[a-zA-Z0-9.]+\^(\{[a-zA-Z0-9.+-]+\}|\{?[a-zA-Z0-9.+-]+\}?)", False),
        (rf"\d+{letter}", True),
        (rf"{letter}[-+]\d+", True),
        (rf"\d+{letter}[-+]\d+", True),
    ]
    word = re.compile(r"\w")

    def literally(text):
        entities = set()
        for category, bounded in categories:
            start = 0
            while start < len(text):  # the longest match that begins here; continue at its end
                for end in range(len(text), start, -1):
                    beside = text[start - 1 : start] + "\n" + text[end : end + 1]
                    if re.fullmatch(category, text[start:end]) and not (bounded and word.search(beside)):
                        entities.add(text[start:end])
                        start = end - 1
                        break
                start += 1
        return sorted(entities)

    rng = random.Random(0)
    texts = ["".join(rng.choices("111223 ..+--xxe^^{}_E²٣", k=rng.randint(6, 14))) for _ in range(500)]
    assert sum(map(len, map(literally, texts))) > 600
    for text in texts:
        assert EXTRACTORS["reference"](Row("r", "?", text, None, 0)) == literally(text), text


def test_reference_keeps_equal_values_apart():
    assert found("so 2^2 = 4, 2^{2} = 4.0, a = 1", extractor="reference") == ["1", "2", "2^2", "2^{2}", "4", "4.0"]


def test_text_finds_spans_without_symbols():
    problem = "Why did the republic fall?"
    solution = (
        "Marius opened the army to men without land, so the soldiers depended on their generals. "
        'Sulla marched on Rome with 35,000 men. "The die is cast" was said later. '
        "Therefore the loyalty of the legions decided who ruled, and the rest is known."
    )
    got = found(solution, problem, extractor="text")
    assert "the loyalty of the legions decided who ruled" in got and "35,000 men" in got and "The die is cast" in got
    assert "the soldiers depended on their generals" in got and "Rome" in got
    assert [solution.index(span) for span in got] == sorted(solution.index(span) for span in got)
    assert all(len(span.split()) <= 14 for span in got) and not any(span == "republic" for span in got)


@pytest.mark.parametrize(
    "solution, answer, want",
    [
        (r"Therefore the distance is $a^2 + b^2 = \boxed{026}$.", "26", []),
        (r"Therefore the distance is \[a^2 + b^2 = 26.\]", "26", []),
        (r"Thus the sum is $3+4 = 7 \implies 26$. Hence it equals $\boxed{26}$ by symmetry.", "26", []),
        (
            r"Thus we have $\frac{(n+1)!}{n!} = 5.5, 6$ and more.",
            "9",
            [r"$\frac{(n+1)!}{n!} = 5.5, 6$ and more"],
        ),
        (r"Hence $f(x. y) = \sqrt{2}$; that is all.", "9", [r"$f(x. y) = \sqrt{2}$"]),
        (
            r"Thus the area is \begin{align*} K &= 3 \\ &= x, \\ y &= 2. \end{align*}",
            "9",
            ["the area is $K = 3 = x, y = 2$"],
        ),
        (
            r"Hence it is \frac{1}{2} of \textbf{all the area} (see the figure",
            "9",
            [r"it is \frac{1}{2} of all the area"],
        ),
        (r"Thus the point ($P$ is on it) lies inside) the circle.", "9", ["the point ($P$ is on it) lies inside"]),
        (r"\begin{itemize}\item $\sqrt{2} \mathrm{frac}$ \end{itemize}", "9", []),
        (
            "There were 3 of them in 2019, the army; 45, received 35,000 men and 5.5 km/h or 40% less.",
            "9",
            ["35,000 men", "5.5 km/h", "40%"],
        ),
        (r"Thus $m-n = 1000 \equiv 7 \pmod{1000}$.", "7", []),
        ("Thus the speed is 19.8 m/s.", r"19.8\text{ m/s}", []),
    ],
)
def test_text_keeps_formulas_whole_and_the_final_answer_out(solution, answer, want):
    assert found(solution, answer=answer, extractor="text") == want


@pytest.mark.parametrize(
    "solution, want",
    [
        # Recurring phrases count as terms; single words and phrases that occur once do not.
        ("We consider the possible distances. The side is long, in two ways.", []),
        ("The shrinking path is long. A shrinking path ends, as every shrinking path does.", ["shrinking path"]),
        # The author's signature is not a name.
        ("so the sum is $7x$.\n~coolmath2017\n~Lucas", ["the sum is $7x$"]),
        ("so the sum is $7x$. - Spacesam", ["the sum is $7x$"]),
        (
            "so the sum is $7x$.\n-Solution and LaTeX by Jackshi\nThe problems are copyrighted by the Association.",
            ["the sum is $7x$"],
        ),
        # A sentence ends with the formula that it displays.
        (r"Thus the area is \[K = 12.\] Next we draw a line.", ["the area is $K = 12$"]),
        (r"Thus the area is \[K = 12\] Next we draw a line.", ["the area is $K = 12$"]),
        ("Thus the area is\n\\[K = 12\\]\nin all the cases.", ["the area is $K = 12$ in all the cases"]),
        # A clause that states nothing is not a conclusion.
        ("Therefore we discard it as a possibility. Thus a contradiction. Hence it follows.", []),
        ("Therefore Mr. Caiden pays for all of the roof.", ["Mr. Caiden pays for all of the roof"]),
        # Measures that are results, not inputs, with the thing that is measured.
        (
            "He swims 12 laps/day * 5 days/week = 60 laps/week, or 200 x 3, 27 dandelion puffs.",
            ["60 laps/week", "27 dandelion puffs"],
        ),
        ("Thus 90 x 3 = 999 people can take classes.", []),  # the final answer
    ],
)
def test_text_leaves_out_what_is_no_result(solution, want):
    assert found(solution, answer="999", extractor="text") == want


def test_file_limit_and_unknown_names():
    row = Row("r", "?", "s", "9", 0, "one\n\n two \n9\nthree\nfour\nfive")
    assert waypoints(row, config.Waypoints(extractor="file")) == ["one", "two", "three", "four", "five"]
    assert waypoints(row, config.Waypoints(extractor="file", limit=3)) == ["one", "three", "five"]
    assert waypoints(row, config.Waypoints(extractor="file", limit=1)) == ["one"]
    with pytest.raises(UserError, match="r:waypoints: got no waypoints"):
        found("s", extractor="file")
    with pytest.raises(UserError, match=r"got 'maths', want one of .* did you mean 'math'"):
        found("s", extractor="maths")


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", r"\frac{2}{4}"),
    ("007", "7"),
    ("10,000", "10{,}000"),
    ("2x+1", "1+2x"),
    (r"2\sqrt{8}", r"4\sqrt2"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt 2}{2}"),
    (r"\sqrt{63^2+84^2}", "105"),
    (r"\frac{\sqrt6+\sqrt2}{4}", r"\frac14\left(\sqrt 2+\sqrt 6\right)"),
    (r"{40 \choose 2}", "780"),
    ("5!", "120"),
    (r"75^\circ", r"75^{\circ}"),
    (r"(\frac{2}{4}, 3)", r"\left(\frac12,3\right)"),
    (r"2 \times 3", r"2\cdot3"),
    ("(a+b)^2", "a^2+2ab+b^2"),
    ("3²", "9"),
    ("2¹⁰", "2^{10}"),
    ("10²³", "10^{23}"),
    ("x⁻²", "x^{-2}"),
    (".25", "0.25"),
    (r"\sqrt[3]{8}", "2"),
    (r"\sqrt[4]{\frac{16}{81}}", r"\frac23"),
    ("8^{2/3}", "4"),
    (r"3\,000", "3000"),
    (r"\frac{1}{\sqrt2+1}", r"\sqrt2-1"),
    (r"\frac{1}{\sqrt5-\sqrt3}", r"\frac{\sqrt5+\sqrt3}{2}"),
    (r"\mathbf{42}", "42"),
    (r"2{ \cdot}3", "6"),
    ("10,\\!000", "10000"),
    (" 5.", "5"),
]
DIFFERENT = [
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("12", "1 2"),
    ("1,2", "12"),
    ("x^2", "2x"),
    ("5", r"5^\circ"),
    ("a_1", "a_2"),
    (r"\sqrt{2}", "1.414"),
    (r"2\frac12", "1"),
    ("AB", "ABC"),
    ("30", r"30\%"),
    (r"\sin 2", "2"),
    ("(1,2)", "(2,1)"),
    (".25", "25"),
    (".6", "6"),
    (r"\sqrt[3]{9}", "2"),
    (r"\sqrt[0]{5}", "5"),
    (r"\frac{1}{x+1}", "x-1"),
]


def test_exact_comparison():
    for a, b in EQUAL:
        assert latex.canonical(a) == latex.canonical(b), (a, b)
    for a, b in DIFFERENT:
        assert latex.canonical(a) != latex.canonical(b), (a, b)


@pytest.mark.parametrize("value", ["3²", "2¹⁰", "x⁻²", "10²³", "①", "٣", "½", "5⁴₂", "²", "⁽³"])
def test_superscripts_and_odd_digits(value):
    for name in EXTRACTORS:
        solution = f"We get $x={value}$, so $y = {value} + 1$. The answer is {value}. \\boxed{{{value}}}"
        for answer in (None, value):
            own = value if name == "file" else None
            waypoints(Row("r", value, solution, answer, 0, own), config.Waypoints(extractor=name))


def test_superscripts_have_the_value_that_they_show():
    assert found("We get $x=2¹⁰$, $y = 10⁵$, $z = 2⁴ = 16$ and w = 5⁻³.") == ["2^{10}", "10^{5}", "16", "5^{-3}"]
    assert found("so $x = 9$ and $y=8$", answer="3²") == ["8"]


@pytest.mark.parametrize(
    "solution, want",
    [
        (r"$g=9.8\text{ m/s}^2$, $A=12\ \mathrm{cm}^{2}$, $F = 3\text{ kg m s}^{-2}$", ["9.8", "12", "3"]),
        (r"$3^5\equiv 43\ (\text{mod}\ 100)$", ["43"]),
        (r"$3^5\equiv 43\ (\mathrm{mod}\ 100)$ and $n \equiv 7 \text{ (mod } 11)$", ["43", "7"]),
        (r"$3^5\equiv 43\ (\bmod\ 100)$ and $n \equiv 7 (\mod 11)$", ["43", "7"]),
        (r"$3^5\equiv 43\ (mod\ 100)$ and $n \equiv 7 \pmod{11}$ and $m \equiv 8 \bmod 11$", ["43", "7", "8"]),
        (r"$3^5\equiv 43\ (\operatorname{mod}\ (p-1))$", ["43"]),
        (r"$A=[2,3)$ and $B=(0,5]$ and $C = (1,2)$", ["[2,3)", "(0,5]", "(1,2)"]),
        (r"$x = 5)$ and $(0 \mod n, m \mod n)$ and $y = (3 + 4$ and $z = [\frac{1}{2})$ and $w = 9$", ["9"]),
        (r"so $x=\mathbf{42}$ and $y = \color{red}{43}$ and $z=\underline{\frac{1}{2}}$", ["42", "43", r"\frac{1}{2}"]),
        (r"so $x=3\,000$ and $y = 3000$ and $z=30{,}000$", ["3000", "30{,}000"]),
    ],
)
def test_math_units_moduli_brackets_and_styles(solution, want):
    got = found(solution)
    assert [latex.canonical(x) for x in got] == [latex.canonical(x) for x in want], got


@pytest.mark.parametrize(
    "solution, want",
    [
        ("so x = 3.3\u00d710^{-9}", [r"3.3\times 10^{-9}"]),
        ("x = 5.7\u00d710^-5, y = 10^-5 and z = 2 * -3", [r"5.7\times 10^{-5}", "10^{-5}", "2 * -3"]),
        ("x = 6.02 \u00d7 10^23 or 6.03·10²³ of them", [r"6.02 \times 10^{23}", r"6.03\cdot 10^{23}"]),
        ("on 12/25/2020, as in 1994/95 and 2007/2008, 3/4 came", ["3/4"]),
        ("It is 3 1/2 miles, or x = 8 3/4", [r"3\frac{1}{2}", r"8\frac{3}{4}"]),
        ("Das ist = 15,7 cm, und x = √10", ["15,7", r"\sqrt{10}"]),
    ],
)
def test_math_in_plain_writing(solution, want):
    assert found(solution) == want


@pytest.mark.parametrize(
    "solution, want",
    [
        (r"a $30-60-90$ and a $13-14-15$ triangle, $45^\circ-45^\circ-90^\circ$ and $90-45-45$", []),
        (r"$100-30-20$ remain", ["100-30-20"]),
        (r"\[f(n)=\begin{cases} n/2 & n \text{ even}\\ 3n+1 & n \text{ odd}\end{cases}\]", ["n/2"]),
        (r"\[\begin{array}{rcl} f&=&90\\ g&=&91\end{array}\]", ["90", "91"]),
        (r"\begin{array}{ll} f=90 & g = 91\end{array}", ["90", "91"]),
        (r"\[\begin{array}{|c|c|} \hline n & f(n)=2 \\ 3&4\end{array}\]", []),
        (r"\[\begin{array}{ccc} & 1 & 2 \\ \times & 3 & 4 \end{array}\]", []),
        (r"\begin{align*} x & + y = 12 & x & = 5 \\ z & \equiv 7 \end{align*}", ["12", "5", "7"]),
    ],
)
def test_math_triangles_cases_and_arrays(solution, want):
    assert found(solution) == want


@pytest.mark.parametrize(
    "solution, answer",
    [
        (r"so $x=\mathbf{42}$ and $y=\underline{42}$ and $z=\textcolor{red}{42}$", "42"),
        (r"so $v=19.8$", r"19.8\text{ m/s}"),
        (r"so $v=19.8\text{ m/s}^2$ and $w = 19.8\%$", "19.8"),
        (r"so $x=12$, \boxed{x=12}", None),
        (r"so $\theta=60^\circ$ and $\alpha = (20 + 40) ^{\circ}$", "60"),
        (r"so $\theta=60$", r"60^\circ"),
        (r"so $x=\frac{1}{\sqrt2+1}$", r"\sqrt2-1"),
        ("So $p=.6$", r"\frac{3}{5}"),
        (r"so $x = 3\,500$ and $y=\sqrt[3]{42875000000}$", "3{,}500"),
    ],
)
def test_the_final_answer_is_known_in_other_clothes(solution, answer):
    assert found(solution, answer=answer) == []


@pytest.mark.parametrize(
    "solution, answer, want",
    [
        (r"We obtain $7^3+11^2$ $= 343 + 121 =$ $\boxed{464}$.", "464", ["343", "121"]),
        (r"so $x=30+23{ \cdot}4-3$", "119", ["30", r"23\cdot4", "3"]),
        (r"The solution is $260+129=\boxed{389}$.", None, ["260", "129"]),
        (r"There are $2\cdot 5\cdot 10\cdot 3 = \boxed{300}$ pairs.", None, ["2", "5", "10", "3"]),
        (r"$S = \frac{1}{2}+\frac{2}{3} = \frac{7}{6}$", "7/6", [r"\frac{1}{2}", r"\frac{2}{3}"]),
        (r"$(1 + 2)\times 4 = 12$", "12", ["(1+2)", "4"]),
        ("2 * (12 + 9) = 42 yards\n108 + 42 = 150 yards", "150", ["42", "108"]),
        (r"so $x = 2+3\sqrt{5}$", r"2+3\sqrt{5}", []),  # nothing is left to work out
        (r"$m+n = 5$", "5", []),
    ],
)
def test_what_the_final_answer_is_made_of_is_listed(solution, answer, want):
    got = found(solution, answer=answer)
    assert [latex.canonical(x) for x in got] == [latex.canonical(x) for x in want], got


@pytest.mark.parametrize(
    "solution, want",
    [
        (r"so the area of the sector is $\frac{1}{3}r^2\pi$.", [r"\frac{1}{3}r^2\pi"]),
        (r"because the middle digit cannot be $8$ and is not $12$.", []),
        (r"If it is $2x+1$, nothing follows.", ["2x+1"]),
    ],
)
def test_math_takes_formulas_that_are_stated(solution, want):
    assert found(solution) == want


def test_what_only_ends_in_the_final_answer_is_kept():
    assert found("$x = y+4$, $z = -4$, $w=5^4$, $v = 2^4$, so $u=4$", answer="4") == ["y+4", "-4", "5^4", "2^4"]
    assert found("So $p=.6$, $q=6$", answer="6") == [".6"]


def test_a_box_without_braces_holds_the_number_that_people_mean():
    row = Row("r", "?", r"$y = 1$ and $z = 7$, so $x = \boxed 15$", None, 0)
    assert final_answer(row) == "15" and waypoints(row, config.Waypoints()) == ["1", "7"]


def test_prices_are_prose():
    pieces = list(latex.spans(r"It costs $5 and then $10, \$3; $x=5$ \[y=3\]"))
    assert [piece for is_formula, piece in pieces if is_formula] == ["x=5", "y=3"]


HOSTILE = [
    "9^{9^{9^9}}",
    "(" * 30_000,
    "{" * 30_000,
    r"\boxed{" * 5000,
    "=" * 30_000,
    "$a=1$" * 1000,
    "1+" * 15_000,
    "[asy]" * 6000,
    r"\[ " * 10_000,
    "$" + "1+" * 15_000 + "$",
    "10," * 1500,
    r"\text{" * 5000,
    "1" * 30_000,
    "so x = 1,234" + ",234" * 2500 + "5",
    r"\frac{" * 3000,
    "**a" * 10_000,
    "the total of " * 2000,
    "$9^{200}^{200}^{200}$",
    "$1000000000!$",
    r"\sqrt{10000000000000000000000000000000001}",
    "a. " * 10_000,
    "²" * 30_000,
    "1 1/" * 1000,
    "5,6" * 1500,
    r"\begin{array}{l}" * 2000,
    "$" + "a&" * 4_000 + "$",
    "$" + "(mod " * 4000 + "$",
    r"\text{(mod " * 4000,
    "Thus $a$ (" * 2000,
    "$" + "{" * 15_000 + "$",
    "**$x$" * 2000,
    r"\a{" * 10_000,
    r"\frac{1}{1}" * 3000,
    "x = " + " " * 30_000,
    "Thus it is" + "\n" * 30_000 + "so.",
    "$x = 1" + " \\" * 15_000 + "$",
    "$" + "," * 10_000 + "$",
    "$x = 1" + "." * 30_000 + "y$",
    "![a](" * 6000,
    "[img " * 6000,
    "<a " * 10_000,
    r"\\[" * 10_000,
    "$a=$ " * 3000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_hostile_texts_are_read_in_linear_time(text):
    started = time.process_time()  # a pattern that tries every start and every end would take minutes here
    for name in EXTRACTORS:
        row = Row("r", "?", text, None, 0, text if name == "file" else None)
        waypoints(row, config.Waypoints(extractor=name))
    latex.canonical(text)
    assert time.process_time() - started < 10


def test_text_takes_more_formulas_than_it_has_signs_for():
    assert found("$a$" * 70_000 + "\U000f0005 Thus it is large and round.", extractor="text") == [
        "it is large and round"
    ]


def test_every_extractor_takes_empty_and_odd_rows():
    for name in EXTRACTORS:
        for solution in ("", " \n", "$", r"\boxed{}", "\\", "é∑🎲", "$$ $$", "{}"):
            row = Row("r", "", solution, None, 0, "" if name == "file" else None)
            assert waypoints(row, config.Waypoints(extractor=name)) == []
