"""From rows of samples.jsonl to results, tables and lines."""

import io
import json
import random
import re

import pytest
from rich.console import Console

from dail_jax import config
from dail_jax.errors import UserError
from dail_jax.evaluate import protocol

CFG = config.Evaluate.model_validate(
    {
        "benchmarks": [{"name": "hard", "rows": {"path": "h"}}, {"name": "chain", "rows": {"path": "c"}}],
        "samples": 4,
        "budgets": [8, 64],
        "bootstrap": 200,
        "sampling": {"max_tokens": 64},
    }
)


def rows(right: dict[str, int], benchmark: str, budget: int) -> list[dict]:
    """Four samples a problem, the first `right[problem]` of them right; 8 means forced, sample i has 5 + i tokens."""
    return [
        {
            "benchmark": benchmark,
            "problem_id": problem,
            "sample": i,
            "budget": budget,
            "tokens": 5 + i,
            "forced_tokens": 3 if budget == 8 and i == 3 else 0,
            "text": "",
            "forced_text": "",
            "answer": "1" if i < 3 else None,
            "gold": "1",
            "correct": i < c,
            "reason": "equal" if i < c else "different" if i < 3 else "no answer",
            "vote": 0 if i < c else 1 if i < 3 else None,
            "finish": "forced" if budget == 8 and i == 3 else "stop",
        }
        for problem, c in right.items()
        for i in range(4)
    ]


@pytest.fixture
def results():
    samples = [*rows({"a": 2, "b": 0}, "hard", 8), *rows({"a": 3, "b": 1}, "hard", 64), *rows({"c": 3}, "chain", 64)]
    random.Random(0).shuffle(samples)
    return {**protocol.summarise(samples, CFG, seed=1), "arm": "dail", "objective": "dail"}


def test_summarise(results):
    assert json.loads(json.dumps(results)) == results
    assert list(results["benchmarks"]) == ["hard", "chain"] and list(results["benchmarks"]["hard"]) == ["8", "64"]
    cut, full = results["benchmarks"]["hard"].values()
    assert (cut["problems"], cut["samples"]) == (2, 4)
    assert [cut["pass@k"][k]["mean"] for k in ("1", "2", "4")] == pytest.approx([1 / 4, 5 / 12, 1 / 2], abs=1e-6)
    assert [full["pass@k"][k]["mean"] for k in ("1", "2", "4")] == pytest.approx([1 / 2, 3 / 4, 1], abs=1e-6)
    assert (cut["pass@k"]["1"]["low"], cut["pass@k"]["1"]["high"]) == (0.0, 0.5)  # two problems: 0 and 1/2
    # a: two of three votes are right; b: none. At 64, b: one of three is right, the two wrong agree.
    assert cut["maj@k"]["4"]["mean"] == 0.5 and cut["maj@k"]["1"]["mean"] == 0.25 and full["maj@k"]["4"]["mean"] == 0.5
    assert cut["mean_tokens"] == 6.5 == cut["tokens"]["mean"] and cut["median_tokens"] == 6.5
    assert (cut["forced"], cut["forced_tokens"], full["forced"], full["forced_tokens"]) == (0.25, 3, 0, 0)
    assert cut["answered"] == 0.75
    assert cut["reasons"] == {"different": 4, "equal": 2, "no answer": 2}
    assert cut["per_problem"] == {"a": [2, 4], "b": [0, 4]}


def test_a_pool_is_over_the_union_of_problems():
    tree = CFG.model_dump()
    for benchmark in tree["benchmarks"]:
        benchmark["pool"] = "both"
    cfg = config.Evaluate.model_validate(tree)
    samples = [*rows({"a": 2, "b": 0}, "hard", 64), *rows({"a": 3}, "chain", 64), *rows({"a": 4}, "chain", 8)]
    samples += rows({"a": 0, "b": 0}, "hard", 8)
    found = protocol.summarise(samples, cfg, seed=1)["benchmarks"]
    assert list(found) == ["hard", "chain", "both"] and list(found["both"]) == ["8", "64"]
    cell = found["both"]["64"]
    assert cell["problems"] == 3 and cell["per_problem"] == {"chain/a": [3, 4], "hard/a": [2, 4], "hard/b": [0, 4]}
    assert cell["pass@k"]["1"]["mean"] == pytest.approx(5 / 12, abs=1e-6)
    assert cell["pass@k"]["2"]["mean"] == pytest.approx((1 + 5 / 6) / 3, abs=1e-6)
    assert found["hard"]["64"]["problems"] == 2 and "both" in protocol.headline({"benchmarks": found})
    # one that has no other beside it is not shown twice
    tree["benchmarks"][1]["pool"] = None
    assert list(protocol.summarise(samples, config.Evaluate.model_validate(tree), seed=1)["benchmarks"]) == [
        "hard",
        "chain",
    ]
    for change in ({"pool": "hard"}, {"pool": "both", "answer": "none"}):
        tree["benchmarks"][1].update(change)
        with pytest.raises(ValueError, match=r"want names that differ|must be graded"):
            config.Evaluate.model_validate(tree)


def test_summarise_does_not_depend_on_the_order_of_rows(results):
    samples = [*rows({"a": 2, "b": 0}, "hard", 8), *rows({"a": 3, "b": 1}, "hard", 64), *rows({"c": 3}, "chain", 64)]
    again = protocol.summarise(samples, CFG, seed=1)
    assert json.dumps(again["benchmarks"]) == json.dumps(results["benchmarks"])


def test_summarise_refuses_missing_and_repeated_samples():
    samples = rows({"a": 2}, "hard", 8)
    with pytest.raises(UserError, match=r"samples.jsonl:a: got 3 samples, want 4"):
        protocol.summarise(samples[:3], CFG, 0)
    with pytest.raises(UserError, match=r"samples.jsonl:a: got sample 0 twice"):
        protocol.summarise([*samples, samples[0]], CFG, 0)


def test_compare(results):
    better = {"benchmarks": protocol.summarise(rows({"a": 4, "b": 2}, "hard", 64), CFG, 0)["benchmarks"]}
    found = protocol.compare(results, better, "hard", "64", 1, seed=0, resamples=50)
    assert (found.mean, found.low, found.high, found.better) == (0.25, 0.25, 0.25, 2)


def test_differences_are_paired(results):
    better = protocol.summarise(rows({"a": 4, "b": 2}, "hard", 64), CFG, 0)
    other = protocol.summarise(rows({"a": 4, "z": 2}, "hard", 8), CFG, 0)
    found = protocol.differences({"dail": results, "more": better, "odd": other}, 0, 50)
    assert found.header == ["benchmark", "method", "pass@1", "p", "+ / - / =", "pass@4", "p", "+ / - / ="]
    assert found.rows == [
        ["hard (64)", "more", "+25.0 [+25.0, +25.0]", "0.57", "2 / 0 / 0", "+0.0 [+0.0, +0.0]", "1", "0 / 0 / 2"]
    ]
    assert found.notes == ["hard (8): odd against dail: not the same problems"]
    assert protocol.differences({"dail": results}, 0, 50).rows == []


def test_a_p_value_is_not_below_what_resamples_can_show():
    many = {f"p{i}": 4 for i in range(40)}
    base, better = (protocol.summarise(rows(dict.fromkeys(many, n), "hard", 64), CFG, 0) for n in (0, 4))
    (row,) = protocol.differences({"base": base, "better": better}, 0, 999).rows
    assert row[2:5] == ["+100.0 [+100.0, +100.0]", "<= 0.001", "40 / 0 / 0"]


@pytest.mark.parametrize("arms", [("base", "dail"), ("objective=nll,learning_rate=0.0003", "runs/one/dail-long-name")])
@pytest.mark.parametrize("width", [80, 120, 200])
def test_tables_fit_a_terminal(width, arms):
    """With the demo's figures: no word or number is broken, and the width that there is is used."""

    def of(first, last, tokens):
        share = lambda x: {"mean": x, "low": max(0.0, x - 0.079), "high": min(1.0, x + 0.066)}  # noqa: E731
        shares = {"1": share(first), "8": share((first + last) / 2), "32": share(last)}
        right = {f"p{i}": [round(32 * first * (i % 2 + 1) / 2), 32] for i in range(64)}
        tokens = {"mean": tokens, "low": tokens - 1.2, "high": tokens + 1.3}
        return {"64": {"pass@k": shares, "maj@k": shares, "tokens": tokens, "per_problem": right}}

    base = {"hard": of(0.003, 0.062, 77.1), "chain": of(0.98, 1.0, 80.2), "known": of(0.988, 1.0, 76.3)}
    other = {"hard": of(0.876, 0.891, 80.4), "chain": of(0.971, 1.0, 80.1), "known": of(0.977, 1.0, 76.0)}
    runs = {arms[0]: {"objective": "none", "benchmarks": base}, arms[1]: {"objective": "dail", "benchmarks": other}}
    found = protocol.differences(runs, 0, 999)
    console = Console(width=width, file=io.StringIO())
    console.print(protocol.table(runs), protocol.differences_table(found))
    text = console.file.getvalue()
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    words = set(re.split(r"[\s,\[\]/]+", text))
    parts = [part for arm in arms for part in re.findall(r"[\w.]+", arm)]
    for word in ("benchmark" * (width > 80), "tokens", "87.6", "79.7", "94.2", "76.0", "74.8", "77.3", "0.001", "<="):
        assert word in words or not word
    assert all(re.search(rf"(?<![\w.]){re.escape(part)}(?![\w.])", text.replace("=\n", "=")) for part in parts)
    assert all(name in text for name in ("hard", "chain", "known", "pass@1", "pass@32", "maj@32", "mean tokens"))
    one_line = [line for line in lines if "87.6" in line and "[79.7, 94.2]" in line]
    assert len(one_line) == (width == 200 or (width == 120 and arms[0] == "base"))
    assert ("pass@8" in text) == (width > 80 or arms[0] == "base")
    assert (protocol.COUNTS in text) == ("better" in words) == (width > 80)


def test_grading_again_is_by_texts_alone():
    samples = [
        {**row, "text": f"\\boxed{{{row['sample']}}}", "forced_text": None, "answer": "old", "correct": None}
        for row in rows({"a": 1}, "hard", 64)
    ]
    graded = protocol.grade(samples, CFG.benchmarks, "think")
    assert [(r["answer"], r["correct"]) for r in graded] == [("0", False), ("1", True), ("2", False), ("3", False)]
    with pytest.raises(UserError, match=r"samples.jsonl: got samples of 'odd', want one of hard, chain"):
        protocol.grade(rows({"a": 1}, "odd", 64), CFG.benchmarks, "think")


def test_majorities_count_values_however_they_are_spelled():
    """Six spellings of one wrong value outvote four of the right one."""
    right = ["1/2", r"\frac12", "0.5", r"\dfrac{2}{4}"]
    wrong = [r"\sqrt{8}", r"2\sqrt2", r"2\sqrt{2}", r"\sqrt{2}\cdot 2", r"\frac{4}{\sqrt2}", r"\sqrt[4]{64}"]
    sample = {**rows({"a": 0}, "hard", 64)[0], "forced_text": None, "gold": "1/2"}
    drawn = [
        {**sample, "sample": i, "text": f"\\boxed{{{answer}}}"}
        for i, answer in enumerate([*right, *wrong, "", r"\{1,2\}"])
    ]
    graded = protocol.grade(drawn, CFG.benchmarks, "think")
    assert [row["vote"] for row in graded] == [0] * 4 + [1] * 6 + [None, 2]
    cfg = CFG.model_copy(update={"samples": len(drawn), "ks": (1, len(drawn))})
    cell = protocol.summarise(graded, cfg, 0)["benchmarks"]["hard"]["64"]
    assert cell["maj@k"]["12"]["mean"] == 0 and cell["maj@k"]["1"]["mean"] == pytest.approx(4 / 12, abs=1e-6)


def test_one_line(results):
    assert protocol.headline(results) == (
        "dail_jax (arm=dail, objective=dail)"
        " | hard: budget=8, problems=2, samples=4, pass@1 25.0 [0.0, 50.0], pass@4 50.0 [0.0, 100], tokens 6.5"
        " | hard: budget=64, problems=2, samples=4, pass@1 50.0 [25.0, 75.0], pass@4 100 [100, 100], tokens 6.5"
        " | chain: budget=64, problems=1, samples=4, pass@1 75.0 [75.0, 75.0], pass@4 100 [100, 100], tokens 6.5"
    )


def test_tables(results):
    base = protocol.summarise(rows({"a": 0, "b": 0}, "hard", 64), CFG, 0)
    runs = {"base": base, "dail": results}
    assert protocol.markdown(runs).splitlines()[:8] == [
        "| benchmark | method | pass@1 | pass@4 | maj@4 | mean tokens |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| hard (64) | base | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] | 6.5 [6.5, 6.5] |",
        "| hard (64) | dail | 50.0 [25.0, 75.0] | 100 [100, 100] | 50.0 [0.0, 100] | 6.5 [6.5, 6.5] |",
        "| hard (8) | base | - | - | - | - |",
        "| hard (8) | dail | 25.0 [0.0, 50.0] | 50.0 [0.0, 100] | 50.0 [0.0, 100] | 6.5 [6.5, 6.5] |",
        "| chain | base | - | - | - | - |",
        "| chain | dail | 75.0 [75.0, 75.0] | 100 [100, 100] | 100 [100, 100] | 6.5 [6.5, 6.5] |",
    ]
    tex = protocol.latex({"base_1": base, "dail": results}).splitlines()
    assert tex[1:3] == [r"\begin{tabular}{llrrrr}", r"\toprule"] and tex[4] == r"\midrule"
    assert tex[3] == r"benchmark & method & pass@1 & pass@4 & maj@4 & mean tokens \\"
    assert tex[5] == r"hard (64) & base\_1 & 0.0 [0.0, 0.0] & 0.0 [0.0, 0.0] & 0.0 [0.0, 0.0] & 6.5 [6.5, 6.5] \\"
    assert tex[-2:] == [r"\bottomrule", r"\end{tabular}"] and tex.count(r"\midrule") == 3


def test_columns():
    """The usual k that there are, and the largest; the majority at the largest."""

    def of(*ks):
        return {"hard": {"64": {"pass@k": dict.fromkeys(map(str, ks))}}}

    assert protocol.columns([of(1, 2, 4, 8, 16)]) == [("pass", "1"), ("pass", "8"), ("pass", "16"), ("maj", "16")]
    found = protocol.columns([of(*(1 << i for i in range(8))), of(1, 100)])
    assert found == [*(("pass", k) for k in ("1", "8", "32", "128")), ("maj", "128")]
    assert protocol.columns([of(), {}]) == []


def test_the_table_fits_into_120_columns():
    def cell(mean):
        share, tokens = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}, {"mean": 1e4, "low": 9999, "high": 12345}
        shares = {str(1 << i): share for i in range(8)}
        return {"pass@k": shares, "maj@k": shares, "tokens": tokens}

    budgets = {"8192": cell(0.3), "32768": cell(0.5)}
    runs = {name: {"benchmarks": {"imo_answerbench": budgets}} for name in ("dail", "objective=dail,gamma=0.1")}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(protocol.table(runs))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert all(len(line) <= 120 for line in lines)
    assert lines[0].split()[1:] == ["pass@1", "pass@8", "pass@32", "pass@128", "maj@128", "mean", "tokens"]
    assert lines[2].split() == ["imo_answerbench", "(8192)"]
    assert lines[3].split() == ["dail", *["30.0"] * 5, "10000"]
    assert re.split(r" {2,}", lines[4].strip()) == ["[20.0, 40.0]"] * 5 + ["[9999, 12345]"]


def test_names_are_escaped(results):
    """With `compare`, a method is a folder's name."""
    name = r"a|b\c~d^e_f"
    assert r"| chain | a\|b\\c~d^e_f | 75.0" in protocol.markdown({name: results})
    found = protocol.latex({name: results})
    assert r"chain & a|b\textbackslash{}c\textasciitilde{}d\textasciicircum{}e\_f & 75.0" in found
