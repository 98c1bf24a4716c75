r"""Our grading beside the reference implementation's rule: every disagreement, and who is right.

    python benchmarks/grading.py                            # the constructed answers below
    python benchmarks/grading.py --rows aime.jsonl          # ... and real solutions with their answers

The reference's rule, in our words: take the content of the last match of `\boxed{([^}]+)}`, which ends at the first
closing brace; remove blanks, `\!`, `\left`, `\right`, dollar signs and a final full stop; compare as strings. The
constructed answers were labelled right or wrong by hand. A row's solution is right for the row's own answer, and for the
next row's where both are the same integer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from pathlib import Path

from dail_jax.evaluate.grading import Grader, extract

# (completion, gold answer, whether it is right, what is special about it)
CONSTRUCTED: list[tuple[str, str, bool, str]] = [
    (r"so \boxed{204}.", "204", True, "plain"),
    (r"so \boxed{205}.", "204", False, "plain, wrong"),
    (r"\boxed{ 204 }", "204", True, "blanks"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True, "nested braces"),
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", False, "nested braces: both end up as \\frac{1"),
    (r"\boxed{\frac{17}{32}}", r"\frac{17}{33}", False, "the same"),
    (r"\boxed{\sqrt{3}}", r"\sqrt{3}+1", False, "the gold is cut, too, where it is boxed"),
    (r"\boxed{2^{10}}", r"2^{10} - 1", False, "the same"),
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", True, "a display fraction"),
    (r"\boxed{1/2}", r"\frac{1}{2}", True, "a fraction in a line"),
    (r"\boxed{0.5}", r"\frac{1}{2}", True, "a decimal that is exact"),
    (r"\boxed{0.33}", r"\frac{1}{3}", False, "a decimal that is not"),
    (r"\boxed{\frac12}", r"\frac{1}{2}", True, "a fraction without braces"),
    (r"\boxed{073}", "73", True, "AIME's leading zero"),
    (r"\boxed{1{,}024}", "1024", True, "thousands, TeX"),
    (r"\boxed{1,024}", "1024", True, "thousands"),
    (r"\boxed{1\,024}", "1024", True, "thousands, thin space"),
    (r"\boxed{1\!024}", "1024", True, "negative thin space"),
    (r"\boxed{12\text{ cm}}", "12", True, "a unit"),
    (r"\boxed{90^\circ}", "90", True, "degrees"),
    (r"\boxed{25\%}", "25", True, "percent"),
    (r"\boxed{x = 5}", "5", True, "an equation"),
    (r"\boxed{n=2^{k}}", "2^k", True, "an equation with braces"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True, "an equal root"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", True, "an equal polynomial"),
    (r"\boxed{(1,2)}", "(1, 2)", True, "a pair"),
    (r"\boxed{(2,1)}", "(1,2)", False, "a pair, swapped"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", True, "a set in another order"),
    (r"\boxed{1, 3, 2}", "1,2,3", True, "a list of all solutions in another order"),
    (r"\boxed{[0,1)}", "(0,1)", False, "another interval"),
    (r"\boxed{\text{even}}", "even", True, "a word in text"),
    (r"\boxed{\text{Yes}}", "yes", True, "a word, capital"),
    (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}", True, "where the sign stands"),
    (r"\boxed{\pi/4}", r"\frac{\pi}{4}", True, "a multiple of pi"),
    (r"\boxed{\frac{n(n+1)}{2}}", r"\binom{n+1}{2}", True, "a binomial"),
    (r"\boxed{2^{1009}}", r"4^{504}\cdot 2", True, "a power"),
    (r"\boxed{\left(\frac{1}{2},3\right)}", r"(\tfrac12, 3)", True, "a pair of which one is a fraction"),
    (r"we had \boxed{3}, corrected: \boxed{4}", "4", True, "the last of two boxes"),
    (r"<think>maybe \boxed{4}</think> I cannot tell.", "4", False, "a box among thoughts alone"),
    (r"<think>maybe \boxed{4}</think> The answer is \boxed{5}.", "5", True, "a box after the thoughts"),
    (r"<think>it must be \boxed{4}, let me check", "4", False, "thoughts that never end"),
    (r"\boxed{4", "4", False, "a box that was cut: the number may go on"),
    (r"\boxed {4}", "4", True, "a blank before the brace"),
    (r"\boxed{}", "4", False, "an empty box"),
    (r"\fbox{4}", "4", True, "another box"),
    (r"\framebox{4}", "4", True, "another box"),
    (r"\framebox[2cm]{5}", "4", False, "another box, wrong"),
    (r"\boxed 15", "15", True, "a number without braces"),
    (r"\boxed 15", "1", False, "what TeX would box"),
    (r"\boxed 1{,}024.", "1024", True, "a number without braces"),
    (r"\boxed 5/6", r"\frac56", True, "a fraction without braces"),
    (r"\boxed 5\cdot 3", "5", False, "it goes on"),
    (r"\boxed{4}, to be put in \boxed{}", "4", True, "an empty box after it"),
    (r"\boxed{4 \text{ or } 5}", "4", False, "two answers"),
    (r"\boxed{\infty}", r"\infty", True, "infinity"),
    (r"\boxed{6\frac{1}{2}}", r"\frac{13}{2}", True, "a mixed number"),
    (r"\boxed{1.2\times 10^{3}}", "1200", True, "scientific notation"),
    (r"\boxed{5!}", "120", True, "a factorial"),
    (r"\boxed{(m,n)=(1,2)}", "(1,2)", True, "a pair with its names"),
    (r"\boxed{n = 1, 2}", "1, 2", True, "a list with its name"),
    (r"\boxed{f(x)=x^2 \text{ for all } x}", "f(x)=x^2", True, "a function and words"),
    (r"\boxed{\text{no solution}}", r"\emptyset", True, "words for a symbol"),
    (r"\boxed{3:2}", r"\frac{3}{2}", True, "a ratio"),
    (r"\boxed{\text{all even } n}", r"\{2k : k \in \mathbb{Z}\}", True, "a set in words"),
    (r"\boxed{a+b\sqrt{c} = 2+3\sqrt{5}}", r"2+3\sqrt{5}", True, "an equation with a sum on its left"),
    (r"\boxed{\frac{p-1}{2}}", r"\frac{p+1}{2}", False, "a formula, wrong in a sign"),
    (r"\boxed{\$1{,}200.00}", "1200", True, "money"),
    (r"\boxed{x\le 5}", r"(-\infty, 5]", True, "an inequality for an interval"),
    *(
        (rf"\boxed{{{answer}}}", "25", True, "style")
        for answer in (
            r"\textbf{(025)}",
            r"\textbf{25}",
            r"\textcolor{blue}{25}",
            r"\color{red}{25}",
            r"{\color{red} 25}",
            r"\color{red} 25",
            r"\color[rgb]{1,0,0}{25}",
            r"\colorbox{yellow}{25}",
            r"\fcolorbox{red}{white}{25}",
            r"\bbox[yellow]{25}",
            r"\underline{25}",
            r"\underline{\underline{25}}",
            r"\bold{25}",
            r"\mathbf{25}",
            r"\boldsymbol{25}",
            r"\bm{25}",
            r"\mathrm{25}",
            r"\mathsf{25}",
            r"{\bf 25}",
            r"\bf 25",
            r"\large 25",
            r"{\Large 25}",
            r"\displaystyle 25",
            r"\mbox{25}",
            r"\emph{25}",
            r"\texttt{25}",
            r"\ensuremath{25}",
            r"\fbox{25}",
            r"\framebox{25}",
            "{25}",
            "(025)",
            "**25**",
            "25.",
            "25 .",
            r"25\,",
            r"25\quad",
            r"25\text{.}",
            r"25\ \checkmark",
            r"25 \blacksquare",
            r"25 \tag{1}",
            "= 25",
            r"\approx 25",
            r"\therefore 25",
        )
    ),
    *(
        (rf"\boxed{{{answer}}}", "25", True, "words that lead to it")
        for answer in (
            r"\text{The answer is }25",
            r"\text{The answer is 25}",
            r"\textbf{The answer is 25}",
            r"\text{The final answer is: } 25",
            r"\text{Answer: }25",
            r"\text{Answer} = 25",
            r"\text{Thus, the sum is }25",
            r"\text{The number of ways is } 25",
            "The answer is 25",
        )
    ),
    *(
        (rf"\boxed{{{answer}}}", "25", True, "a remainder")
        for answer in (
            r"25\pmod{1000}",
            r"25 \pmod {1000}",
            r"25 \bmod 1000",
            r"25 \mod 1000",
            r"25\ (\text{mod}\ 1000)",
            r"25 \text{ mod } 1000",
            "25 (mod 1000)",
            r"N \equiv 25 \pmod{1000}",
            r"\equiv 25 \pmod{1000}",
        )
    ),
    *(
        (rf"\boxed{{{answer}}}", "25", False, "not what it looks like")
        for answer in (
            r"\textcolor{blue}{26}",
            r"\color{25}{26}",
            r"\textbf{(026)}",
            r"\cancel{25}",
            r"\xcancel{25}",
            r"\overline{25}",
            r"\phantom{25}",
            r"\text{not }25",
            r"\neq 25",
            r"\text{at least }25",
            r"\text{more than } 25",
            r"\text{The answer is not }25",
            r"\text{The answer is at least }25",
            r"\text{The answer is either }25\text{ or }26",
            r"\text{The answer is }25\text{ or }26",
            r"\text{The answer is }26",
            r"\text{The answer is }25\pi",
            r"\text{The answer is } -25",
            r"1025\pmod{1000}",
            r"25\pmod{10}",
            r"-25\pmod{1000}",
            r"26\pmod{1000}",
            r"25!",
            r"\pm 25",
            r"25 \pm 1",
            r"2\underline{6}",
            r"\large 2.5",
            "2 5",
            r"25\%\text{ more than }30",
            r"\sqrt{25}",
            r"\mathbf{2}^{5}",
            "(2,5)",
            r"\underline{2}\,\underline{6}",
        )
    ),
    (r"\boxed{10000}", r"10\,000", True, "thin spaces in the gold answer"),
    (r"\boxed{10\,000}", r"10{,}000", True, "thin spaces"),
    (r"\boxed{10\;000\;000}", "10000000", True, "thicker spaces"),
    (r"\boxed{1000}", r"10\,000", False, "thin spaces, wrong"),
    (r"\boxed{155465}", "155 465", False, "two answers"),
    (r"\boxed{155\,465}", "155 465", False, "two answers"),
    (r"\boxed{e^{i\pi}}", "-1", True, "the imaginary unit"),
    (r"\boxed{e^{2\pi i}}", "1", True, "the imaginary unit"),
    (r"\boxed{\mathrm{e}^{\mathrm{i}\pi/2}}", "i", True, "the imaginary unit"),
    (r"\boxed{i^2}", "-1", True, "the imaginary unit"),
    (r"\boxed{e^{i\pi}}", "1", False, "the imaginary unit, wrong"),
    (r"\boxed{-i}", "i", False, "the imaginary unit, wrong"),
    (r"\boxed{e^{j\pi}}", "-1", False, "a variable"),
    (r"\boxed{5}", r"5 \pmod{12}", False, "a class is more than a number"),
    (r"\boxed{17\pmod{12}}", r"5 \pmod{12}", True, "another representative of a class"),
    (r"\boxed{5\pmod{13}}", r"5 \pmod{12}", False, "another modulus"),
    (r"\boxed{p \equiv 1 \pmod{4}}", r"p \equiv 3 \pmod{4}", False, "a congruence, wrong"),
]

BOX = re.compile(r"\\boxed{([^}]+)}")


def reference(completion: str, gold: str) -> bool:
    """The reference's verdict; the gold answer is taken from a box, as in its data."""

    def answer(text: str) -> str | None:
        found = BOX.findall(text)
        return re.sub(r"\\!|\\left|\\right|[\s$]", "", found[-1]).rstrip(".") if found else None

    mine = answer(completion)
    return mine is not None and mine == answer(f"\\boxed{{{gold}}}")


def real(path: Path) -> list[tuple[str, str, bool, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [(row["solution"], str(row["answer"]), True, f"{row['problem_id']}, own answer") for row in rows]
    other = [
        (a["solution"], str(b["answer"]), a["answer"] == b["answer"], f"{a['problem_id']}, the next row's answer")
        for a, b in itertools.pairwise(rows)
    ]
    return own + other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore
    parser.add_argument("--rows", type=Path, help="JSON lines with problem_id, solution and answer")
    args = parser.parse_args()
    for name, items in (("constructed", CONSTRUCTED), ("real", real(args.rows) if args.rows else [])):
        if not items:
            continue
        started = time.monotonic()
        answers = [extract(completion) for completion, *_ in items]
        with Grader() as grader:
            verdicts = grader.grade_many([(a, gold, "math") for a, (_, gold, *_) in zip(answers, items, strict=True)])
        seconds = time.monotonic() - started
        wins = {"ours": 0, "reference": 0}
        wrong = {"ours": 0, "reference": 0}
        for answer, verdict, (text, gold, truth, words) in zip(answers, verdicts, items, strict=True):
            theirs = reference(text, gold)
            wrong["ours"] += verdict.correct != truth
            wrong["reference"] += theirs != truth
            if verdict.correct == theirs:
                if theirs != truth:
                    print(f"neither   is right: gold {gold!r}, answer {answer!r} -> {theirs}; {words}")
                continue
            winner = "ours" if verdict.correct == truth else "reference"
            wins[winner] += 1
            taken = BOX.findall(text)
            print(
                f"{winner:9} is right: gold {gold!r}, ours {answer!r} -> {verdict.correct} ({verdict.reason}), "
                f"reference {taken[-1] if taken else None!r} -> {theirs}; {words}"
            )
        print(
            f"\n{name}: {len(items)} answers in {seconds:.1f} s; {sum(wins.values())} disagreements; right is "
            f"ours in {wins['ours']}, the reference in {wins['reference']}; wrong verdicts: ours {wrong['ours']}, "
            f"reference {wrong['reference']}\n"
        )


if __name__ == "__main__":
    main()
