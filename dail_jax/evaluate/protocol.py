"""From drawn samples to verdicts, from these to results.json, and from results to tables.

What stands in samples.jsonl and results.json is written in docs/results.md.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax.errors import UserError, visible
from dail_jax.evaluate import answers, files, passk, replies
from dail_jax.evaluate.grading import Grader, Verdict

Results = dict[str, Any]
NOT_GRADED = "not graded"  # the reason of a verdict where a benchmark's answer type is `none`
DIGITS = 6  # decimals kept in results.json


def grade(rows: Sequence[Mapping[str, Any]], benchmarks: Sequence[config_lib.Benchmark], tag: str) -> list[Results]:
    """Rows of samples.jsonl with their answer, verdict, reason and vote (again), from texts and gold answers alone.

    `tag` encloses thoughts. Raises UserError for rows of no benchmark.
    """
    kinds = {benchmark.name: benchmark.answer for benchmark in benchmarks}
    if strange := {row["benchmark"] for row in rows} - kinds.keys():
        raise UserError(f"got samples of {sorted(strange)[0]!r}, want one of {', '.join(kinds)}", file="samples.jsonl")
    found: list[Results] = []
    problems: dict[tuple[str, str], list[Results]] = defaultdict(list)  # rows that are graded, of all budgets
    for row in rows:
        kind = kinds[row["benchmark"]]
        found.append({**row, "answer": None, "correct": None, "reason": NOT_GRADED, "vote": None})
        if answers.named(kind).is_graded:
            found[-1]["answer"] = answer_of(row, kind, tag)
            problems[row["benchmark"], row["problem_id"]].append(found[-1])
    graded = [row for drawn in problems.values() for row in drawn]
    with Grader() as grader:
        verdicts = grader.grade_many([(row["answer"], row["gold"], kinds[row["benchmark"]]) for row in graded])
        for row, verdict in zip(graded, verdicts, strict=True):
            row.update(correct=verdict.correct, reason=verdict.reason)
        votes = grader.votes(
            [
                (
                    kinds[name],
                    [row["answer"] for row in drawn],
                    [Verdict(row["correct"], row["reason"]) for row in drawn],
                )
                for (name, _), drawn in problems.items()
            ]
        )
    for row, vote in zip(graded, itertools.chain.from_iterable(votes), strict=True):
        row["vote"] = vote
    return found


def answer_of(row: Mapping[str, Any], kind: str, tag: str) -> str | None:
    """The answer of a row of samples.jsonl, from its texts and from how it ended."""
    cut = row["finish"] == "length"
    return replies.answer(row["text"], answers.named(kind), tag, forced=row["forced_text"], cut=cut)


def summarise(samples: Sequence[Mapping[str, Any]], cfg: config_lib.Evaluate, seed: int) -> Results:
    """The `benchmarks` part of results.json from the rows of samples.jsonl (in any order).

    Benchmarks of a `pool` are followed by one over all their problems, which are named BENCHMARK/PROBLEM there. Raises
    UserError where a problem has not exactly `cfg.samples` samples at a budget.
    """
    groups: dict[tuple[str, int], dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in samples:
        drawn = groups[row["benchmark"], row["budget"]][row["problem_id"]]
        if row["sample"] in drawn:
            raise UserError(f"got sample {row['sample']} twice", file="samples.jsonl", row=row["problem_id"])
        drawn[row["sample"]] = row
    order = {benchmark.name: float(i) for i, benchmark in enumerate(cfg.benchmarks)}
    for pool, members in pools(cfg.benchmarks).items():
        order[pool] = order[members[-1]] + 0.5
        for name, budget in [key for key in groups if key[0] in members]:
            problems = {f"{name}/{problem}": drawn for problem, drawn in groups[name, budget].items()}
            groups[pool, budget].update(problems)
    benchmarks: Results = {}
    for name, budget in sorted(groups, key=lambda key: (order.get(key[0], len(order)), key)):
        benchmarks.setdefault(name, {})[str(budget)] = _one(groups[name, budget], cfg, seed)
    return {"benchmarks": benchmarks}


def pools(benchmarks: Sequence[config_lib.Benchmark]) -> dict[str, list[str]]:
    """The benchmarks of every pool that has several."""
    found: dict[str, list[str]] = {}
    for benchmark in benchmarks:
        if benchmark.pool is not None:
            found.setdefault(benchmark.pool, []).append(benchmark.name)
    return {pool: members for pool, members in found.items() if len(members) > 1}


def _one(problems: Mapping[str, Mapping[int, Mapping[str, Any]]], cfg: config_lib.Evaluate, seed: int) -> Results:
    n = cfg.samples
    for problem_id, drawn in problems.items():
        if len(drawn) != n:
            raise UserError(f"got {len(drawn)} samples, want {n}", file="samples.jsonl", row=problem_id)
    by_problem = [[drawn[i] for i in sorted(drawn)] for _, drawn in sorted(problems.items())]  # problem x sample
    rows = [row for drawn in by_problem for row in drawn]
    graded = rows[0]["correct"] is not None
    ks = (sorted(set(cfg.ks)) or passk.powers_of_two(n)) if graded else []
    right = np.array([sum(bool(row["correct"]) for row in drawn) for drawn in by_problem])
    tokens = np.array([[row["tokens"] for row in drawn] for drawn in by_problem])
    forced = [row["forced_tokens"] for row in rows if row["finish"] == "forced"]
    votes = np.array([passk.maj_at_k([row["vote"] for row in drawn], ks, seed) for drawn in by_problem if ks])

    def interval(values: np.ndarray) -> dict[str, float]:
        found = passk.bootstrap(values, seed, cfg.bootstrap)
        return {key: round(value, DIGITS) for key, value in found._asdict().items()}

    return {
        "problems": len(by_problem),
        "samples": n,
        "pass@k": {str(k): interval(passk.pass_at_k(n, right, k)) for k in ks},
        "maj@k": {str(k): interval(votes[:, i]) for i, k in enumerate(ks)},
        "tokens": interval(tokens.mean(axis=1)),
        "mean_tokens": round(float(tokens.mean()), DIGITS),
        "median_tokens": float(np.median(tokens)),
        "forced": round(len(forced) / len(rows), DIGITS),
        "answer_tokens": round(float(np.mean([row.get("answer_tokens", 0) for row in rows])), DIGITS),
        "forced_tokens": round(float(np.mean(forced)), DIGITS) if forced else 0.0,
        "answered": round(sum(row["answer"] is not None for row in rows) / len(rows), DIGITS),
        "reasons": dict(sorted(Counter(row["reason"] for row in rows).items())),
        "per_problem": {name: [int(c), n] for name, c in zip(sorted(problems), right, strict=True) if graded},
    }


def compare(a: Results, b: Results, benchmark: str, budget: str, k: int, seed: int, resamples: int) -> passk.Difference:
    """How much higher pass@k is in results `b` than in `a`, problem by problem; ValueError for other problems."""

    def values(results: Results) -> dict[str, float]:
        counts = results["benchmarks"][benchmark][budget]["per_problem"]
        return {name: float(passk.pass_at_k(n, c, k)) for name, (c, n) in counts.items()}

    return passk.paired_difference(values(a), values(b), seed, resamples)


COUNTS = "+ / - / ="  # the column with the numbers of problems that are better, worse, and the same


class Differences(NamedTuple):
    """How methods differ from a first one: a table, whose cells are texts, and a line for each that cannot be compared."""

    first: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def differences(results: Mapping[str, Results], seed: int, resamples: int) -> Differences:
    """How every method differs from the untrained model, or else the first, at the two ends of pass@k.

    Intervals are bootstrap ones over problems, p values from sign flips; neither is corrected for their number.
    """
    first = next(
        (arm for arm, found in results.items() if found.get("objective") == files.UNTRAINED), next(iter(results))
    )
    base, rows, notes = results[first], [], []
    others = {arm: other for arm, other in results.items() if arm != first}
    for arm, other in list(others.items()):
        if len(covered := {one.get("budget", "all"): None for one in (other, base)}) > 1:
            notes.append(
                f"{arm} against {first}: not compared, for their budgets cover other tokens ({', '.join(covered)})"
            )
            del others[arm]
    for name, budgets in base["benchmarks"].items():
        for (budget, found), (arm, other) in itertools.product(budgets.items(), others.items()):
            cell = other["benchmarks"].get(name, {}).get(budget)
            label = f"{name} ({budget})" if len(budgets) > 1 else name
            ks = sorted(set(found["pass@k"]) & set(cell["pass@k"] if cell else ()), key=int)
            if ks and found["per_problem"].keys() != cell["per_problem"].keys():
                notes.append(f"{label}: {arm} against {first}: not the same problems")
            elif ks:
                ends = {k: compare(base, other, name, budget, int(k), seed, resamples) for k in (ks[0], ks[-1])}
                rows.append((label, arm, ends))
    ks = sorted({k for *_, ends in rows for k in ends}, key=int)
    header = ["benchmark", "method", *itertools.chain(*([f"pass@{k}", "p", COUNTS] for k in ks))]
    table = []
    for label, arm, ends in rows:
        table.append([label, arm, *itertools.chain(*(_cells(ends.get(k), resamples) for k in ks))])
    return Differences(first, header, table, notes)


def _cells(d: passk.Difference | None, resamples: int) -> list[str]:
    if d is None:
        return ["-"] * 3
    low, mean, high = (f"{100 * value:+.1f}" for value in (d.low, d.mean, d.high))
    p = p_value(d.p, resamples).removeprefix("p ").removeprefix("= ")
    return [f"{mean} [{low}, {high}]", p, f"{d.better} / {d.worse} / {d.same}"]


def p_value(p: float, resamples: int) -> str:
    """A p value in words, such as `p = 0.12`; it cannot fall below that of a single one among all resamples."""
    floor = 1 / (1 + resamples)
    return f"p <= {floor:.1g}" if p < 1.5 * floor else f"p = {p:.2g}"


def headline(results: Results) -> str:
    """A line for a log: what was run, then for each benchmark and budget the two ends of pass@k and the tokens."""
    head = f"dail_jax ({', '.join(f'{key}={results[key]}' for key in ('arm', 'objective') if results.get(key))})"
    parts = []
    for name, budgets in results["benchmarks"].items():
        for budget, found in budgets.items():
            ks = sorted(found["pass@k"], key=int)
            counts = [f"budget={budget}, problems={found['problems']}, samples={found['samples']}"]
            scores = [f"pass@{k} {_percent(found['pass@k'][k])}" for k in dict.fromkeys([*ks[:1], *ks[-1:]])]
            parts.append(f"{name}: " + ", ".join([*counts, *scores, f"tokens {found['mean_tokens']:.1f}"]))
    return " | ".join([head, *parts])


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------

CAPTION = "pass@k and maj@k in percent, with 95% bootstrap intervals over problems"
KS = (1, 8, 32, 128)


def columns(benchmarks: Iterable[Mapping[str, Mapping[str, Results]]]) -> list[tuple[str, str]]:
    """The columns (metric, k) of every table of these results, each name -> budget -> figures.

    pass@k for the usual k that some have and for the largest, so that few samples give a narrow table; and maj@k for
    the largest.
    """
    known = {
        int(k)
        for found in benchmarks
        for budgets in found.values()
        for cell in budgets.values()
        for k in cell["pass@k"]
    }
    ks = [str(k) for k in sorted(known & {*KS, max(known, default=1)})]
    return [*(("pass", k) for k in ks), *(("maj", k) for k in ks[-1:])]


def comparison(results: Mapping[str, Results]) -> tuple[list[str], list[list[list[str]]]]:
    """Column names, and rows in one section for each benchmark and budget; `results` maps a method to its results."""
    places = dict.fromkeys(
        (name, budget)
        for found in results.values()
        for name, budgets in found["benchmarks"].items()
        for budget in budgets
    )
    several = {name for name, _ in places if sum(name == other for other, _ in places) > 1}
    found = {
        (arm, *place): results[arm]["benchmarks"].get(place[0], {}).get(place[1]) for arm in results for place in places
    }
    scores = columns(one["benchmarks"] for one in results.values())
    sections = []
    for name, budget in places:
        label = f"{name} ({budget})" if name in several else name
        section = []
        for arm in results:
            cell = found[arm, name, budget]
            if cell is None:
                section.append([label, arm, *["-"] * (len(scores) + 1)])
                continue
            shares = [cell[f"{metric}@k"].get(k) for metric, k in scores]
            section.append(
                [
                    label,
                    arm,
                    *(_percent(share) if share else "-" for share in shares),
                    _interval(cell["tokens"], 1, int(cell["tokens"]["mean"] < 1000)),
                ]
            )
        sections.append(section)
    return ["benchmark", "method", *(f"{metric}@{k}" for metric, k in scores), "mean tokens"], sections


def table(results: Mapping[str, Results]) -> Fitting:
    """The comparison of methods for the terminal; `results` maps a method (arm) to its results."""
    header, sections = comparison(results)
    scores = range(2, len(header) - 2)  # of pass@k; the majority and the tokens follow
    return _shown(header, sections, CAPTION, CAPTION, [*scores[:1], *scores[1:][-1:], len(header) - 2, len(header) - 1])


def differences_table(found: Differences) -> Fitting:
    """The differences for the terminal."""
    sections = [list(rows) for _, rows in itertools.groupby(found.rows, key=lambda row: row[0])]
    few = [i for i, name in enumerate(found.header) if i > 1 and name != COUNTS]
    short = f"against {found.first}: {DIFFERENCES}"
    return _shown(found.header, sections, _differences_caption(found), short, few)


DIFFERENCES = "points of pass@k with 95% bootstrap intervals over problems, p of random sign flips"


def _differences_caption(found: Differences) -> str:
    return f"against {found.first}: {DIFFERENCES}, and on how many problems better / worse / the same"


class Fitting(JupyterMixin):
    """The same table in several forms for a terminal: the first that is not too wide is shown, otherwise the last."""

    def __init__(self, *forms: Table):
        self.forms = forms

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update(width=10_000)
        fit = (t for t in self.forms if Measurement.get(console, free, t).maximum <= options.max_width)
        yield next(fit, self.forms[-1])


NAME = 20  # columns of a terminal for a method's name where they are scarce


def _shown(
    header: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], caption: str, short: str, few: Sequence[int]
) -> Fitting:
    """A table whose first columns are the benchmark and the method, and whose other cells are figures.

    It needs less and less width: intervals beside their means or below them, the benchmark in a column or above its
    rows, and all figures or those in the columns `few`, for which the caption is `short` and says where the others are.
    """
    keep = [0, 1, *few]
    less = ([header[i] for i in keep], [[[row[i] for i in keep] for row in section] for section in sections])
    more = "" if len(keep) == len(header) else "; more in a wider terminal and in results.md"
    return Fitting(
        _form(header, sections, caption, stacked=False),
        _form(header, sections, caption),
        _form(header, sections, caption, above=True),
        _form(*less, short + more, above=True),
    )


def _form(
    header: Sequence[str],
    sections: Sequence[Sequence[Sequence[str]]],
    caption: str,
    stacked: bool = True,
    above: bool = False,
) -> Table:
    shown = Table(caption=caption, box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(header[above:], above):
        shown.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for section in sections:
        if above:
            shown.add_row(Text(visible(section[0][0]), "bold"))
        for i, (benchmark, method, *figures) in enumerate(section):
            if stacked:
                figures = [figure.replace(" [", "\n[") for figure in figures]
                method = "\n".join(_lines(method))
            names = [f"  {method}".replace("\n", "\n  ")] if above else ["" if i else benchmark, method]
            # Text, not str: "[81.0, 85.0]" would be taken for markup.
            shown.add_row(*(Text(visible(cell)) for cell in (*names, *figures)), end_section=i == len(section) - 1)
    return shown


def _lines(name: str) -> list[str]:
    """A name in lines of at most NAME columns, broken after signs only: a longer part stays whole."""
    lines = [""]
    for part in re.findall(r"[^-,=_/ ]*[-,=_/ ]?", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > NAME:
            lines.append("")
        lines[-1] += part
    return lines


def markdown(results: Mapping[str, Results]) -> str:
    """The same table in Markdown, ending in a newline."""
    header, sections = comparison(results)
    return _markdown(header, [row for section in sections for row in section], CAPTION)


def differences_markdown(found: Differences) -> str:
    """The differences in Markdown, ending in a newline."""
    return _markdown(found.header, found.rows, _differences_caption(found))


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    text = (" | ".join(map(markdown_text, line)) for line in lines)
    return "".join(f"| {line} |\n" for line in text) + f"\n{markdown_text(caption)}\n"


def markdown_text(text: str) -> str:
    """A text in Markdown: a folder's name, which is a method's with `compare`, may hold HTML or what ends a cell."""
    return re.sub(r"([\\|<>&])", r"\\\1", " ".join(text.split()))


def latex(results: Mapping[str, Results]) -> str:
    """The same table for a paper; it needs the package booktabs."""
    header, sections = comparison(results)
    groups = ["".join(f"{' & '.join(map(_tex, row))} \\\\\n" for row in section) for section in [[header], *sections]]
    return (
        f"% {CAPTION}\n\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}\n\\toprule\n"
        + "\\midrule\n".join(groups)
        + "\\bottomrule\n\\end{tabular}\n"
    )


def _tex(text: str) -> str:
    """A cell; a `[` after `\\\\` would be taken for its argument, but no row starts with one."""
    named = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    return re.sub(r"[&%$#_{}\\^~]", lambda found: named.get(found[0], f"\\{found[0]}"), text)


def _percent(found: Mapping[str, float]) -> str:
    return _interval(found, 100, 1).replace("100.0", "100")


def _interval(found: Mapping[str, float], scale: float, digits: int) -> str:
    mean, low, high = (f"{scale * found[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
