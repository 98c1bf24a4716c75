"""From graded samples to results.json, and from results to tables.

results.json, for each benchmark and each budget (its key is the budget as text):

    problems, samples            how many problems, and samples for each
    pass@k, maj@k                {"1": {mean, low, high}, "2": ...}: fractions, 95% bootstrap intervals over problems
    tokens                       {mean, low, high} of tokens drawn within the budget
    mean_tokens, median_tokens   the same mean, and the median over samples
    forced, forced_tokens        the share of samples whose answer was forced, and the mean tokens of such an answer
    answered                     the share of samples with an answer
    reasons                      {reason: count} of the verdicts
    per_problem                  {problem_id: [right samples, samples]}
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax.errors import UserError
from dail_jax.evaluate import passk

Results = dict[str, Any]
DIGITS = 6  # decimals kept in results.json


def summarise(samples: Sequence[Mapping[str, Any]], cfg: config_lib.Evaluate, seed: int) -> Results:
    """The `benchmarks` part of results.json from the rows of samples.jsonl (in any order).

    Raises UserError where a problem has not exactly `cfg.samples` samples at a budget.
    """
    groups: dict[tuple[str, int], dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in samples:
        drawn = groups[row["benchmark"], row["budget"]][row["problem_id"]]
        if row["sample"] in drawn:
            raise UserError(f"got sample {row['sample']} twice", file="samples.jsonl", row=row["problem_id"])
        drawn[row["sample"]] = row
    order = {benchmark.name: i for i, benchmark in enumerate(cfg.benchmarks)}
    benchmarks: Results = {}
    for name, budget in sorted(groups, key=lambda key: (order.get(key[0], len(order)), key)):
        benchmarks.setdefault(name, {})[str(budget)] = _one(groups[name, budget], cfg, seed)
    return {"benchmarks": benchmarks}


def _one(problems: Mapping[str, Mapping[int, Mapping[str, Any]]], cfg: config_lib.Evaluate, seed: int) -> Results:
    n = cfg.samples
    for problem_id, drawn in problems.items():
        if len(drawn) != n:
            raise UserError(f"got {len(drawn)} samples, want {n}", file="samples.jsonl", row=problem_id)
    table = [[drawn[i] for i in sorted(drawn)] for _, drawn in sorted(problems.items())]  # problem x sample
    rows = [row for drawn in table for row in drawn]
    ks = sorted(set(cfg.ks)) or passk.powers_of_two(n)
    right = np.array([sum(bool(row["correct"]) for row in drawn) for drawn in table])
    tokens = np.array([[row["tokens"] for row in drawn] for drawn in table])
    forced = [row["forced_tokens"] for row in rows if row["finish"] == "forced"]
    votes = np.array([passk.maj_at_k([r["answer"] for r in drawn], [bool(r["correct"]) for r in drawn], ks, seed)
                      for drawn in table])  # fmt: skip

    def interval(values: np.ndarray) -> dict[str, float]:
        found = passk.bootstrap(values, seed, cfg.bootstrap)
        return {key: round(value, DIGITS) for key, value in found._asdict().items()}

    return {
        "problems": len(table),
        "samples": n,
        "pass@k": {str(k): interval(passk.pass_at_k(n, right, k)) for k in ks},
        "maj@k": {str(k): interval(votes[:, i]) for i, k in enumerate(ks)},
        "tokens": interval(tokens.mean(axis=1)),
        "mean_tokens": round(float(tokens.mean()), DIGITS),
        "median_tokens": float(np.median(tokens)),
        "forced": round(len(forced) / len(rows), DIGITS),
        "forced_tokens": round(float(np.mean(forced)), DIGITS) if forced else 0.0,
        "answered": round(sum(row["answer"] is not None for row in rows) / len(rows), DIGITS),
        "reasons": dict(sorted(Counter(row["reason"] for row in rows).items())),
        "per_problem": {name: [int(c), n] for name, c in zip(sorted(problems), right, strict=True)},
    }


def compare(a: Results, b: Results, benchmark: str, budget: str, k: int, seed: int, resamples: int) -> passk.Difference:
    """How much higher pass@k is in results `b` than in `a`, problem by problem; ValueError for other problems."""

    def values(results: Results) -> dict[str, float]:
        counts = results["benchmarks"][benchmark][budget]["per_problem"]
        return {name: float(passk.pass_at_k(n, c, k)) for name, (c, n) in counts.items()}

    return passk.paired_difference(values(a), values(b), seed, resamples)


def one_line(results: Results) -> str:
    """A line for a log: what was run, then for each benchmark and budget the two ends of pass@k and the tokens."""
    head = f"dail_jax ({', '.join(f'{key}={results[key]}' for key in ('arm', 'objective') if results.get(key))})"
    parts = []
    for name, budgets in results["benchmarks"].items():
        for budget, found in budgets.items():
            ks = list(dict.fromkeys([min(found["pass@k"], key=int), max(found["pass@k"], key=int)]))
            scores = ", ".join(f"pass@{k} {_percent(found['pass@k'][k])}" for k in ks)
            counts = f"budget={budget}, problems={found['problems']}, samples={found['samples']}"
            parts.append(f"{name}: {counts}, {scores}, tokens {found['mean_tokens']:.1f}")
    return " | ".join([head, *parts])


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------

CAPTION = "pass@k in percent, with 95% bootstrap intervals over problems"


def grid(results: Mapping[str, Results], ks: Sequence[int] = (1, 8, 32)) -> tuple[list[str], list[list[list[str]]]]:
    """Column names, and rows in one section for each benchmark and budget; `results` maps a method to its results.

    Columns for k that no method has are left out, so that few samples give a narrow table.
    """
    places = dict.fromkeys((name, budget) for found in results.values()
                           for name, budgets in found["benchmarks"].items() for budget in budgets)  # fmt: skip
    several = {name for name, _ in places if sum(name == other for other, _ in places) > 1}
    found = {(arm, *place): results[arm]["benchmarks"].get(place[0], {}).get(place[1])
             for arm in results for place in places}  # fmt: skip
    ks = [k for k in ks if any(cell and str(k) in cell["pass@k"] for cell in found.values())]
    sections = []
    for name, budget in places:
        label = f"{name} ({budget})" if name in several else name
        section = []
        for arm in results:
            cell = found[arm, name, budget]
            if cell is None:
                section.append([label, arm, *["-"] * (len(ks) + 1)])
                continue
            scores = [_percent(cell["pass@k"][str(k)]) if str(k) in cell["pass@k"] else "-" for k in ks]
            t = cell["tokens"]
            section.append([label, arm, *scores, f"{t['mean']:.1f} [{t['low']:.1f}, {t['high']:.1f}]"])
        sections.append(section)
    return ["benchmark", "method", *(f"pass@{k}" for k in ks), "mean tokens"], sections


def table(results: Mapping[str, Results], ks: Sequence[int] = (1, 8, 32)) -> Table:
    """The comparison of methods for the terminal; `results` maps a method (arm) to its results."""
    header, sections = grid(results, ks)
    shown = Table(caption=CAPTION)
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for section in sections:
        for i, row in enumerate(section):
            # Text, not str: "[81.0, 85.0]" would be taken for markup.
            shown.add_row(*(Text("" if column == 0 and i else cell) for column, cell in enumerate(row)),
                          end_section=i == len(section) - 1)  # fmt: skip
    return shown


def markdown(results: Mapping[str, Results], ks: Sequence[int] = (1, 8, 32)) -> str:
    """The same table in Markdown, ending in a newline."""
    header, sections = grid(results, ks)
    rows = [header, ["---", "---", *["---:"] * (len(header) - 2)], *(row for section in sections for row in section)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{CAPTION}\n"


def _percent(found: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * found[key]:.1f}".replace("100.0", "100") for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
