"""LaTeX: the last boxed answer, spellings, and canonical forms that keep apart what differs."""

import time

import pytest

from dail_jax import latex


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} no: \boxed {\{1, \{2\}\}} done", r"\{1, \{2\}\}"),
        (r"\boxed{7} and \boxed{8", "7"),  # the last one was cut
        (r"\boxed{so I think \boxed{43}", "43"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"} stray \boxed{5} { open", "5"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{6} in \boxedstyle", "6"),
        (r"\boxed{6}, so I fill in \boxed{ }", "6"),  # an empty box is not an answer
        (r"\boxed{ }", None),
        (r"\fbox{4}", "4"),
        (r"\framebox{4}", "4"),
        (r"\framebox[2cm][c]{4}", "4"),
        (r"\boxed{\fbox{4}}", "4"),
        ("the answer is 5", None),
        ("", None),
        # TeX boxes a single token; people mean the number
        (r"$\boxed 5$.", "5"),
        (r"$\boxed 15$", "15"),
        (r"\boxed12, done", "12"),
        (r"\boxed -3 is it", "-3"),
        (r"\boxed 1,024", "1,024"),
        (r"\boxed 1{,}024.", "1{,}024"),
        (r"\boxed 5.5", "5.5"),
        (r"\boxed 5/6", "5/6"),
        (r"\boxed 5, 6", "5"),
        (r"\boxed C", "C"),
        (r"\fbox 15", "15"),
        (r"\boxed 5^2", None),  # the expression continues: the content is unclear
        (r"\boxed 5 \cdot 3", None),
        (r"\boxed 5+3", None),
        (r"\boxed 5x", None),
        (r"\boxed 5\frac12", None),
        (r"\boxed so", None),
        (r"\boxed\frac12", None),
    ],
)
def test_the_last_boxed_answer(text, answer):
    assert latex.last_boxed(text) == answer


def test_boxes_are_listed_with_their_contents_and_taken_out():
    text = r"so \boxed{x = \fbox{3}} and \boxed 15."
    assert [text[box.first : box.last] for box in latex.boxes(text)] == [r"x = \fbox{3}", "3", "15"]
    assert [text[box.start : box.end] for box in latex.boxes(text)][1:] == [r"\fbox{3}", r"\boxed 15"]
    assert latex.unbox(text, "=").split() == ["so", "=", "x", "=", "3", "and", "=", "15", "."]
    assert latex.unbox(r"(\boxed{3})", "=").split() == ["(", "3", ")"]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"\textcolor{blue}{\dfrac12}", r"{\frac12}"),
        (r"\color[rgb]{1,0,0}{25}", "{25}"),
        (r"\fcolorbox{red}{white}{25}", "{25}"),
        (r"\bbox[5px,border:2px solid]{25}", "{25}"),
        (r"\underline{25}", "{25}"),
        (r"{\bf 25}", "{25}"),
        (r"{\rm cm}", r"\text{cm}"),
        (r"\large 25", "25"),
        (r"\larger 25", r"\larger 25"),
        (r"\textbf{(025)}", "(025)"),
        (r"\texttt{ab}", r"\text{ab}"),
        (r"\mathrm{25}", "{25}"),
        (r"\left(\tfrac{1}{2}\right)", r"(\frac{1}{2} )"),
        (r"25\phantom{0}", "25"),
        (r"25 \tag{1}", "25"),
        (r"10\,000", "10000"),
        (r"10{,}000{,}000", "10000000"),
        ("10\u202f000", "10000"),
        (r"1\,0000", r"1\,0000"),  # not in groups of three
        (r"0.1\,000", r"0.1\,000"),
        ("1,234", "1,234"),
        ("155 465", "155 465"),
        (r"\overline{25}", r"\overline{25}"),  # the overline has a meaning
        (r"\cancel{25}", r"\cancel{25}"),
        (r"\mathbb{Z}", r"\mathbb{Z}"),
        ("\u221a10 \u2264 2\u00b9\u2070", r"\sqrt{10} \le  2^{10}"),
    ],
)
def test_plain(text, plain):
    assert latex.plain(text).strip() == plain


def test_canonical_keeps_apart_what_differs():
    for one, other in (
        ("f(a)", "af"),
        ("f(2)", "2f"),
        ("f(a,b)", "f(b,a)"),
        ("f^{-1}(a)", r"\frac{a}{f}"),
        ("f'(x)", "f(x)"),
        ("P(A+B)", "P(A)+P(B)"),
        ("x = 3", "3"),
        ("x = 3", "y = 3"),
        ("x < 3", "x > 3"),
        (r"x \le 3", "x < 3"),
        ("155 465", "15 5465"),
        ("155 465", "155465"),
    ):
        assert latex.canonical(one) != latex.canonical(other), (one, other)


def test_canonical_merges_what_is_equal():
    for one, other in (
        ("x = 3", "x=\\frac{6}{2}"),
        ("x+1 = y", "1+x=y"),
        ("n(n+1)", "n^2+n"),
        ("x^2(x+1)", "x^3+x^2"),
        ("f(1/2)", "f(0.5)"),
        ("f(a+b)", "f(b+a)"),
        ("2f(x)", "f(x)+f(x)"),
        ("(1, 2/4)", r"(1, \frac12)"),
        (r"\textbf{42}", "42"),
        ("155 465", "155  465"),
    ):
        assert latex.canonical(one) == latex.canonical(other), (one, other)


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        r"\boxed ",
        r"\framebox[",
        r"\color{",
        r"\text{",
        r"\color[",
        r"{\rm ",
        r"1\,",
        r"1\,234",
        "\u221a",
        "{}",
        "f(",
        "=",
        "{,}",
    ],
)
def test_reading_is_linear(piece):
    """A quadratic scan would take minutes."""
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    latex.last_boxed(text), latex.unbox(text), latex.plain(text), latex.canonical(text)
    assert time.process_time() - started < 10
