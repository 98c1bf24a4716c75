"""Answers: extraction, equality, and text made to break a grader."""

import subprocess
import sys
import time

import pytest

from dail_jax.evaluate import grading
from dail_jax.evaluate.answers import extract
from dail_jax.evaluate.grading import Grader, Limits, Verdict
from dail_jax.evaluate.rules import normalise, quick, spelled


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as one:
        yield one


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", "math", r"\frac{1}{2}"),
        (r"\boxed{1} no: \boxed {\{1, \{2\}\}} done", "math", r"\{1, \{2\}\}"),
        (r"\boxed{7} and \boxed{8", "math", "7"),  # the last one was cut
        (r"\boxed{so I think \boxed{43}", "math", "43"),
        (r"\boxed{\boxed{5}}", "math", "5"),
        (r"} stray \boxed{5} { open", "math", "5"),
        (r"\boxed{\text{a \} b}}", "math", r"\text{a \} b}"),
        (r"\boxed{ }", "math", None),
        ("the answer is 5", "math", None),
        ("", "math", None),
        ("The answer is 1,204. Thanks", "integer", "1,204"),
        ("The final answer is **204**", "integer", "204"),
        ("The answer is 12.5", "integer", None),
        (r"answer: 3, but \boxed{4}", "integer", "4"),
        (r"\boxed{\text{(C)}}", "choice", "C"),
        (r"\boxed{\textbf{B}}", "choice", "B"),
        (r"\boxed{c}", "choice", "C"),
        (r"\boxed{D. The mass}", "choice", "D"),
        (r"\boxed{Dog}", "choice", None),
        ("Answer: (A)\nThe answer is **D**.", "choice", "D"),
        ("The answer is a mystery", "choice", None),
        (r"so $\boxed 5$.", "math", "5"),  # TeX boxes a single token
        (r"\boxed12, done", "integer", "12"),
        (r"\boxed C", "choice", "C"),
        (r"\boxed 5.5", "math", "5.5"),
        (r"\boxed 5/6", "math", "5/6"),
        (r"\boxed{6} in \boxedstyle", "math", "6"),
    ],
)
def test_extract(text, kind, answer):
    assert extract(text, kind) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The answer is \(42\).", "42"),
        (r"The final answer is: \[ 42 \]", "42"),
        ("The final answer is:\n\n$$42$$\n", "42"),
        ("**Final Answer**: 42", "42"),
        ("### Final Answer\n42", "42"),
        ("The answer is \u221242", "-42"),
        (r"The answer is $1{,}204$", "1,204"),
        (r"The answer is \textbf{42}.", "42"),
        ("The answer is 42, as was to be shown", "42"),
        ("The answer is 42 since 7 + 35 = 42", "42"),
        ("The answer is 25 + 17 = 42.", "42"),
        (r"The answer is $m+n = 6 \cdot 7 = 42$.", "42"),
        ("The answer is not easy. Answer: the answer is 42", "42"),
        ("The answer is 3/4", None),  # 4 and 3 are only parts of the answer
        ("The answer is $2^{10}$", None),
        (r"The answer is $3\sqrt{2}$", None),
        (r"The answer is $\sqrt{49}$", None),
        (r"The answer is $\frac{3}{4}$", None),
        ("The answer is $101_2$", None),
        ("The answer is 5 or 7", None),
        ("The answer is 5, or 7", None),
        ("The answer is 5, 7.", None),
        ("The answer is 3*4", None),
        ("The answer is 5%", None),
        ("The answer is x >= 3", None),
        ("The answer is a = 3 and b = 4", None),
        ("To find the answer:\n1. Take the sum.", None),
        (r"The final answer is \boxed{4 \cdot 3 + \ldots", None),  # never closed: it may have been cut
        (r"The final answer is: $\boxed{12", None),
        (r"The answer is 3, that is, \boxed{3", None),
    ],
)
def test_a_stated_integer_ends_its_statement(text, answer):
    assert extract(text, "integer") == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{\textbf{(A)}\ 42}", "A"),
        (r"\boxed{\text{(A) } 42}", "A"),
        (r"\boxed{\textbf{A. }42}", "A"),
        (r"\boxed{\left(A\right)}", "A"),
        (r"\boxed{\text{Option A}}", "A"),
        (r"\boxed{**A**}", "A"),
        (r"\boxed{\rm A}", "A"),
        (r"\boxed{A: a mixture of B and C}", "A"),
        (r"\boxed{B. A vector}", "B"),
        (r"\boxed{A, C}", None),  # hedged
        (r"\boxed{A \text{ or } B}", None),
        (r"\boxed{(A), (B)}", None),
        (r"\boxed{(A) or (B), who knows}", None),
        (r"\boxed{A. B. C.}", None),
        (r"\boxed{A mixture of B and C}", None),
        (r"\boxed{I think B}", None),
        ("The answer is option A", "A"),
        ("The correct option is A", "A"),
        (r"The correct answer is \(C\)", "C"),
        ("The correct choice is **(C) 42**.", "C"),
        ("### Final Answer\n\n**C**", "C"),
        ("The answer is C, since B is wrong", "C"),
        ("The answer is C. Not B", "C"),
        ("The answer is (C) because B is wrong", "C"),
        ("The answer is A or B.", None),
        ("The answer is (A) or (B).", None),
        ("The answer is A, C.", None),
        (r"The final answer is \boxed{A", None),
    ],
)
def test_a_choice_is_one_letter(text, letter):
    assert extract(text, "choice") == letter


def test_extract_takes_nothing_from_thoughts():
    assert extract(r"<think>\boxed{1}</think> it is \boxed{2}") == "2"
    assert extract(r"\boxed{1}</think> it is \boxed{2}") == "2"
    assert extract(r"<think>\boxed{1}</think> I do not know") is None
    assert extract(r"<think> maybe \boxed{1}, but") is None
    assert extract(r"<r>maybe \boxed{1}, but", tag="r") is None
    assert extract(r"<r>maybe \boxed{1}, but</r> \boxed{2}", tag="r") == "2"
    assert extract(r"a</think>\boxed{1}</think>\boxed{2}") == "2"


def test_extract_from_a_forced_answer():
    force = "\n</think>\n\nThe final answer is \\boxed{"
    assert extract(r"<think> maybe \boxed{1}", forced=force + "42}") == "42"
    assert extract(r"<think> maybe \boxed{1}", forced=force + "42") is None  # never closed: it may have been cut
    assert extract("x", forced=force + r"hm</think> \boxed{43}") == "43"
    assert extract("x", "choice", forced=force + "(B)}") == "B"


def test_reading_is_linear():
    """A quadratic scan would take minutes."""
    size = 70_000
    inside = (
        " ~",
        "a ",
        "- ",
        "\\,",
        "(1",
        "$",
        "\\text",
        "\\\\",
        "A.",
        "The answer is ",
        "\\square",
        "{1",
        "= ",
        "1,",
        "1 ",
    )
    behind = (" ", "\n", "is ", " answer is ", ": 1=", ": \\a", ": A, ", "A. or ")
    hostile = (
        r"\boxed{" * (size // 7),
        "{" * size,
        "answer is " + "7" * size + ".5",
        "answer:" + " " * size + "x",
        "answer:\\" + "a" * size,
        rf"\boxed{{{'0' * size}x}}",
        *(rf"\boxed{{{s * (size // len(s))}x}}" for s in inside),
        *("answer" + s * (size // len(s)) for s in behind),
    )
    started = time.process_time()
    for text in hostile:
        for kind in ("math", "integer", "choice"):
            answer = extract(text, kind) or ""
        quick("5", answer)
        normalise(answer)
    assert time.process_time() - started < 20


EQUAL = [  # gold, prediction; those of the first group need no worker
    ("465", " 465 "),
    ("7", "007"),
    ("0", "-0"),
    ("10,000", "10000"),
    ("10000", r"10{,}000"),
    ("10000", "10 000"),
    ("5", "5."),
    ("5", "5.0"),
    ("-5", "\u22125"),
    ("5", "$5$"),
    ("5", r"\$5"),
    ("5", r"\text{5}"),
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    (r"3\pi", r"3 \, \pi"),
    ("155 465", "155 465"),
    ("155 465", "(155, 465)"),
    ("155 065", "155 65"),
    (r"\begin{pmatrix}1 & 2\\ 3 & 4\end{pmatrix}", r"\begin{pmatrix}1&2\\[4pt]3&4\end{pmatrix}"),
    ("1/\u221e", r"1/\infty"),
    (r"\sqrt{10}", "\u221a10"),
    (r"\frac{1}{2}", "\u00bd"),
    ("42", r"\approx 42"),
    ("42", "\u224842"),
    (r"\emptyset", r"\varnothing"),
    (r"1,\ldots,9", r"1, \dots, 9"),
    (r"1,\ldots,9", "1,...,9"),
    ("101_2", r"(101)_{2}"),
    ("101", "101_{10}"),
    ("10000", r"10\,000"),
    (r"10\,000", "10000"),
    (r"1{,}234{,}567", "1234567"),
    ("10\u202f000", "10000"),
    ("25", r"\textbf{(025)}"),
    ("25", "(025)"),
    ("25", r"\textcolor{blue}{25}"),
    ("25", r"\color{red}{25}"),
    ("25", r"{\color{red} 25}"),
    ("25", r"\color[rgb]{1,0,0}25"),
    ("25", r"\colorbox{yellow}{25}"),
    ("25", r"\fcolorbox{red}{white}{25}"),
    ("25", r"\underline{\underline{25}}"),
    ("25", r"\bold{25}"),
    ("25", r"\mathbf{25}"),
    ("25", r"\boldsymbol{25}"),
    ("25", r"\mathrm{25}"),
    ("25", r"{\bf 25}"),
    ("25", r"\bf 25"),
    ("25", r"\Large 25"),
    ("25", r"{\large \displaystyle 25}"),
    ("25", r"\mbox{25}"),
    ("25", r"\emph{25}"),
    ("25", r"\texttt{25}"),
    ("25", r"\ensuremath{25}"),
    ("25", "{{25}}"),
    ("25", "**25**"),
    ("25", "25."),
    ("25", r"25 \text{.}"),
    ("25", "= 25"),
    ("25", r"\therefore 25"),
    ("25", r"25 \checkmark"),
    ("25", r"25\ \blacksquare"),
    ("25", r"25 \tag{1}"),
    ("25", r"\text{The answer is }25"),
    ("25", r"\text{The final answer is: } 25"),
    ("25", r"\textbf{The answer is 25}"),
    ("25", r"\text{Answer: } 25"),
    ("25", r"\text{So the sum of all values is } 25"),
    ("25", "The answer is 25"),
    ("25", r"25\pmod{1000}"),
    ("25", r"25 \pmod 8000"),
    ("25", r"25 \bmod 1000"),
    ("25", r"25\ (\text{mod } 1000)"),
    ("25", r"25 \mod{1000}"),
    ("25", "25 (mod 1000)"),
    ("25", r"N \equiv 25 \pmod{1000}"),
    (r"5 \pmod{12}", r"n \equiv 17 \pmod{12}"),
    (r"\text{Yes}", "yes"),
    ("even", r"\text{Even}"),
    (r"\text{All primes}", "all primes"),
    ("A", r"\mathrm{A}"),
]
EQUAL_BY_ALGEBRA = [
    ("1/2", "0.5"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\sqrt{8}", r"2\sqrt2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("204", "x = 204"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt 3}"),
    (r"\binom{10}{3}", "120"),
    (r"90^\circ", "90"),
    ("1,2,3", "3,2,1"),
    (r"x \in \{1,2\}", "1,2"),
    ("f(x)=2x+1", "2x+1"),
    ("5", r"5 \text{ apples}"),
    ("1+2i", "2i+1"),
    ("465", r"\boxed{465}"),
    ("60", "60\u00b0"),
    ("2000", "2e3"),
    ("-1500", "-1.5E+3"),
    (r"\frac{1}{3}", r"0.\overline{3}"),
    (r"-\frac{61}{30}", r"-2.0\overline{3}"),
    (r"\cos 60^\circ", r"\frac12"),
    (r"\cos 70^{\circ}", r"\sin(20^\circ)"),
    (r"(2,\infty)", "x>2"),
    ("(0,1)", "0<x<1"),
    (r"(-\infty, 5]", r"x\le 5"),
    ("x>2", r"(2,\infty)"),
    (r"5 \text{ cm}", r"5\,\mathrm{cm}"),
    (r"5 \text{ m}", r"5 \text{ meters}"),
    (r"5 \text{ cm}", "5"),
    ("AB", "BA"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\frac{1}{3}", "0.333333"),
    ("-1", r"e^{i\pi}"),
    ("-1", r"e^{\pi i}"),
    ("-1", r"e^{i\pi}"),
    ("-1", r"\mathrm{e}^{\mathrm{i}\pi}"),
    ("-1", "i^2"),
    (r"\sqrt{-1}", "i"),
    ("1+2i", r"\color{blue}{2i+1}"),
    (r"\frac{1}{2}", r"\textcolor{red}{0.5}"),
    (r"\frac{1}{2}", r"\frac{\mathbf{1}}{\underline{2}}"),
    (r"\frac{1}{2}", r"\text{The probability is }0.5"),
    ("25", r"25\text{ square units}"),
]
DIFFERENT = [
    ("465", "456"),
    ("465", "-465"),
    ("465", "4 65"),
    ("155 465", "465 155"),
    ("155 465", "620"),
    ("155 465", "155465"),
    ("155 465", r"\frac{1240}{2}"),
    ("yes", "no"),
    ("even", "veen"),
    ("9" * 900, "9" * 901),
    ("10000", "10 0 0 0"),
    ("155 465", r"155\,465"),  # two answers, not thousands
    ("25", r"1025\pmod{1000}"),  # not reduced
    ("25", r"25 \pmod{10}"),
    ("25", r"26 \pmod{1000}"),
    (r"5 \pmod{12}", "5"),  # a residue class is not a number
    (r"5 \pmod{12}", r"5 \pmod{13}"),
    (r"5 \pmod{12}", r"6 \pmod{12}"),
    ("25", r"\textcolor{blue}{26}"),
    ("25", r"\text{The answer is }26"),
    ("25", r"\textbf{(026)}"),
]
DIFFERENT_BY_ALGEBRA = [
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1)"),
    ("465", r"465 \text{ and } 466"),
    (r"\frac{1}{3}", "0.33"),
    ("x+1", "x+2"),
    (r"\{1,2\}", "1"),
    ("2^{10}", "1023"),
    ("1", r"\frac{1}{2}"),
    ("(1,2)", "1<x<3"),
    ("(0,1)", r"0<x\le 1"),
    ("5", "x>5"),
    (r"\cos 60^\circ", r"\cos 60"),
    ("2e3", "2"),
    ("25", r"\cancel{25}"),  # struck out
    ("25", r"\xcancel{25}"),
    ("25", r"\text{not }25"),
    ("25", r"\text{The answer is not }25"),
    ("25", r"\text{The answer is at least }25"),
    ("25", r"\text{The answer is either }25 \text{ or }26"),
    ("25", r"\text{The answer is }25\text{ or }26"),
    ("25", r"\text{The answer is }25!"),
    ("25", r"\neq 25"),
    ("25", "<25"),
    ("25", r"\phantom{25}"),  # it is invisible
    ("25", r"\overline{25}"),
    ("25", r"2\underline{6}"),
    ("25", r"\pm 25"),
    ("25", r"25\pm 1"),
    ("25", r"\mathbf{2}5^2"),
    ("25", r"\frac{25}{\color{red}{2}}"),
    (r"e^{i\pi}", "1"),
    ("-1", r"e^{2i\pi}"),
    ("i", "-i"),
    ("i", "1"),
    ("x", "y"),
]


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        (r"1 & 2\\ 3 & 4", r"1 & 2\\ 3 & 4"),  # a row break is not a backslash followed by a blank
        (r"1\\[4pt]2\\*[-1.5 ex]3", r"1\\2\\3"),
        (r"1\\(2,3)\\[0,1]\\!4", r"1\\(2,3)\\[0,1]\\!4"),
        (r"1\\\ 2\\\,3", r"1\\ 2\\ 3"),
        (r"\(1\ 2\)", "1 2"),
    ],
)
def test_spelled(text, tidied):
    assert spelled(text) == tidied


def test_equality_without_a_process():
    for gold, prediction in EQUAL:
        assert quick(gold, prediction) == Verdict(True, "equal"), (gold, prediction)
    for gold, prediction in DIFFERENT:
        assert quick(gold, prediction) == Verdict(False, "different"), (gold, prediction)
    with Grader() as grader:
        items = [(p, g, "math") for g, p in EQUAL + DIFFERENT]
        assert [v.correct for v in grader.grade_many(items)] == [True] * len(EQUAL) + [False] * len(DIFFERENT)
        assert grader.check_gold("465") is None and grader.check_gold("155 465") is None
        assert grader.processes == 0


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        (r"1,2,\ldots, 1235", "1,2,1235"),
        ("42", r"42\ldots"),
        ("42", "42..."),
        ("101", "101_2"),
        ("101_2", "101_3"),
        ("101_2", "110_2"),
        ("1A_{16}", "1A_{12}"),
        ("ABC", "BAC"),
        (r"\angle ABC", r"\angle ACB"),
        (r"5 \text{ cm}", r"5 \text{ m}"),
        (r"5 \text{ m}^2", r"5 \text{ ft}^2"),
        (r"90^\circ \text{C}", r"90^\circ \mathrm{F}"),
    ],
)
def test_marks_that_math_verify_skips_count(grader, gold, prediction):
    assert quick(gold, prediction) == quick(prediction, gold) == Verdict(False, "different")
    assert grader.check_gold(gold) is None and grader.check_gold(prediction) is None


def test_equality_by_algebra(grader):
    for correct, pairs in ((True, EQUAL_BY_ALGEBRA), (False, DIFFERENT_BY_ALGEBRA)):
        for gold, prediction in pairs:
            assert quick(gold, prediction) is None, (gold, prediction)
            assert grader.grade(prediction, gold).correct is correct, (gold, prediction)


def test_the_short_way_agrees_with_math_verify(grader):
    """Whether math-verify reads both as intended: it adds rows of integers, and multiplies the letters of words."""
    ours = {
        r"5 \pmod{12}",
        "25",
        "155 465",
        "155 065",
        "even",
        r"\text{All primes}",
        "10000",
        "yes",
        "5",
        r"1,\ldots,9",
        "101",
        "101_2",
    }
    for correct, pairs in ((True, EQUAL), (False, DIFFERENT)):
        for gold, prediction in pairs:
            if gold not in ours:
                assert (grader._ask(("equal", spelled(gold), spelled(prediction))) == "equal") is correct, (
                    gold,
                    prediction,
                )


def test_reasons(grader):
    assert grader.grade(None, "5").reason == "no answer"
    assert grader.grade(r"\frac{1}{", "5").reason == "unparseable"
    assert grader.grade(r"\begin{cases}", "5").reason == "unparseable"
    assert grader.grade("x+1", r"\begin{cases}").reason == "gold"
    assert grader.grade("B", "C", "choice").reason == "different"
    assert grader.grade("(c)", "C", "choice") == Verdict(True, "equal")
    assert grader.grade("2^3", "8", "integer").correct


def test_check_gold(grader):
    good = [
        ("1/2", "math"),
        (r"\frac12", "math"),
        ("7", "integer"),
        ("1,204", "integer"),
        ("C", "choice"),
        ("(c)", "choice"),
    ]
    bad = [
        ("", "math"),
        (r"\frac{1}{", "math"),
        ("x=", "math"),
        (r"\text{}", "math"),
        ("{" * 99, "math"),
        ("x" * 2001, "math"),
        ("2^3", "integer"),
        ("", "integer"),
        ("Dog", "choice"),
        ("", "choice"),
    ]
    assert [grader.check_gold(*item) for item in good] == [None] * len(good)
    for item in bad:
        assert (grader.check_gold(*item) or "").startswith("got "), item
    assert grading.check_gold("7", "integer") is None


HOSTILE = {
    "9^{9^{9^9}}": "too large",
    "1000000000!": "too large",
    "7" * 10**6: "too long",
    "(" * 10_000 + "1" + ")" * 10_000: "too long",
    "(" * 900 + "1" + ")" * 900: "too deep",
    r"\{" + ",".join(map(str, range(3000))) + r"\}": "too long",
    r"\ud800": "unparseable",
    "\ud800\x00": "unparseable",
    "!" * 1900: "too large",
}


def test_hostile_answers_are_refused_at_a_look(grader):
    started = time.monotonic()
    for answer, reason in HOSTILE.items():
        assert grader.grade(answer, r"\frac{1}{2}").reason == reason, answer[:30]
        assert grader.grade("0.5", r"\frac{1}{2}").correct
    assert time.monotonic() - started < 10


def test_a_frozen_worker_is_killed_and_the_next_answer_is_right():
    """Hostile answers that pass the text checks; eight workers are fine on any machine, as limits are on CPU time."""
    freezing = ["(10^{10})!", "10^{10^{10}}", r"\binom{10^9}{10^8}", r"\sum_{k=1}^{10^9} \frac{1}{k}", "(x+1)^{5000}"]
    items = [
        (prediction, gold, "math")
        for i, answer in enumerate(freezing)
        for prediction, gold in ((answer, "x^2"), (f"x+{i}", f"{i}+x"), (f"x+{i}", "x-1"))
    ]
    with Grader(workers=8, limits=Limits(cpu_seconds=1)) as grader:
        started = time.monotonic()
        verdicts = grader.grade_many(items)
        assert time.monotonic() - started < 30
        assert [v.reason for v in verdicts] == ["timeout", "equal", "different"] * len(freezing)
        assert grader.grade("0.25", r"\frac{1}{4}").correct
        alive = [judge.worker.process for judge in grader._all if judge.worker.process is not None]
    assert alive and all(process.poll() is not None for process in alive)


def test_a_worker_out_of_memory_is_replaced():
    with Grader(workers=1, limits=Limits(memory_mib=200, cpu_seconds=20)) as grader:
        assert grader.grade("0.5", r"\frac{1}{2}").correct
        assert grader.grade("2^{(10^{10})}", "x").reason == "memory"
        assert grader.grade("0.25", r"\frac{1}{4}").correct


def test_a_worker_that_sleeps_meets_the_wall_clock():
    with Grader(workers=1) as grader:
        assert grader.grade("0.5", r"\frac{1}{2}").correct
        worker = grader._all[0].worker
        assert worker.process is not None
        subprocess.run(["kill", "-STOP", str(worker.process.pid)], check=True)
        worker.wall_seconds = 0.5
        assert grader.grade("0.25", r"\frac{1}{4}").reason == "timeout"
        worker.wall_seconds = 60.0
        assert grader.grade("0.75", r"\frac{3}{4}").correct


def test_a_worker_that_was_killed_is_replaced_unnoticed():
    with Grader(workers=1) as grader:
        assert grader.grade("0.5", r"\frac{1}{2}").correct
        process = grader._all[0].worker.process
        assert process is not None
        process.kill()
        process.wait()
        assert grader.grade("0.25", r"\frac{1}{4}").correct


def test_verdicts_are_remembered(grader):
    first = grader.grade("0.125", r"\frac{1}{8}")
    served = grader._all[0].served
    assert [v == first for v in grader.grade_many([("0.125", r"\frac{1}{8}", "math")] * 5)] == [True] * 5
    assert grader._all[0].served == served


def test_grading_imports_no_jax():
    code = "import sys, dail_jax.evaluate.grading; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'sympy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def votes(grader, answers, gold=r"\pi^2", kind="math"):
    return grader.votes([(kind, answers, grader.grade_many([(answer, gold, kind) for answer in answers]))])[0]


def test_votes_are_for_values(grader):
    """Wrong answers share a vote if one is right by the other; those that differ slightly do not."""
    assert votes(grader, ["1/3", r"\frac{2}{6}", "0.333333", "0.33", None, "3.", "3", "x=3", r"3 \pmod{7}", ""]) == [
        *(1, 1, 1, 2, None, 3, 3, 3, 3, None)
    ]
    assert votes(grader, ["x^2+2x+1", "(x+1)^2", "(1+x)^{2}", "x^2+2x", "(x+2)x"]) == [1, 1, 1, 2, 2]
    assert votes(grader, [r"\{1,2\}", "2, 1", "(1,2)", r"x \in \{1,2\}", "1"]) == [1, 1, 2, 1, 3]
    assert votes(grader, ["yes", r"\text{Yes}", "no", "even", "veen"]) == [1, 1, 2, 3, 4]
    assert votes(grader, ["10001", "10002", "10001.0", r"10\,001", "155 465", "155465"]) == [1, 2, 1, 1, 3, 4]
    assert votes(grader, [r"e^{i\pi}", "-1", r"\cos\pi", "1"]) == [1, 1, 1, 2]
    assert votes(grader, [r"\pi\cdot\pi", "3", r"\pi^2"]) == [0, 1, 0]
    assert votes(grader, ["A", "(A)", "b", None], "C", "choice") == [1, 1, 2, None]


def test_numbers_vote_without_a_process():
    with Grader() as grader:
        answers = [form.format(i) for i in range(40) for form in ("{}", "0{}", "{}.0", r"\frac{{{}}}{{1}}")]
        wrong = [Verdict(False, "different")] * len(answers)
        assert grader.votes([("math", answers, wrong)]) == [[i // 4 + 1 for i in range(len(answers))]]
        assert grader.processes == 0


def test_hostile_votes_end_soon():
    """Answers on which a worker fails, in grading or voting, are compared as text; after a few, so are all others."""
    slow = [rf"\binom{{10^9}}{{10^8+{i}}}" for i in range(40)]
    with Grader(workers=2, limits=Limits(cpu_seconds=1)) as grader:
        started = time.monotonic()
        failed = [Verdict(False, "timeout")] * 40
        assert grader.votes([("math", slow + slow, failed + failed)]) == [[*range(1, 41)] * 2]
        assert grader.processes == 0
        fine = [Verdict(False, "different")] * 42  # as if they had been compared with an easy answer
        assert grader.votes([("math", ["x+1", *slow, "1+x"], fine)]) == [[1, *range(2, 42), 1]]
        assert time.monotonic() - started < 60


def test_many_different_answers_cost_few_comparisons(grader):
    """Each of many formulas with nearly equal values is compared with a few others, not with all."""
    answers = [f"x + \\sin {i}" for i in range(16)] + [rf"\{{{i}, x\}}" for i in range(16)]
    asked = len(grader._known)
    assert votes(grader, answers, "x") == list(range(1, 33))
    assert len(grader._known) - asked < 80
