"""The scripts of docs/extending.md, run as they stand there on the tiny configuration."""

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax.data import filters, records
from dail_jax.evaluate import answers
from dail_jax.evaluate.grading import Grader
from dail_jax.sample.sampler import Sample, ScoredSample
from dail_jax.stages import experiment, golds, online, samplers
from dail_jax.text import load_tokenizer


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """One device; what a script registers is forgotten after the test."""
    for module, name in (
        (answers, "ANSWERS"),
        (filters, "FILTERS"),
        (records, "SOURCES"),
        (samplers, "SAMPLERS"),
    ):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    samplers.SAMPLERS["constant"] = lambda session, run_dir: lambda limit: Constant(session.tokenizer)
    with tiny.alone():
        yield


class Constant:
    """Answers 12 to everything, in a box that an integer may also do without, and 42 in odd samples."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def run(self, requests):
        for r in requests:
            for index in r.samples:
                text = "\\boxed{42}" if index % 2 else "\\boxed{12}"
                yield Sample(r.name, index, np.array([*self.tokenizer.encode(text), self.tokenizer.eos_id]), "stop")

    def figures(self):
        return {}


def script(title: str, monkeypatch, *arguments: str) -> Any:
    """Runs the script in a section of docs/extending.md with these arguments; its exit status."""
    text = (tiny.ROOT / "docs" / "extending.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text.split(f"## {title}\n")[1].split("\n## ")[0], re.DOTALL)
    assert len(code) == 1
    monkeypatch.setattr(sys, "argv", ["mine.py", *arguments])
    with pytest.raises(SystemExit) as left:
        exec(compile(code[0], "mine.py", "exec"), {"__name__": "__main__"})
    return left.value.code


def test_another_sampler(tmp_path, monkeypatch):
    """The embedded model solves in transformers what it solves here: nearly every problem of `known`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for each other, the model is so small
    path = tiny.write(
        tmp_path / "run",
        train__objective="none",
        evaluate__benchmarks=[{"name": "known", "rows": {"path": str(tiny.ASSETS / "known.jsonl"), "limit": 3}}],
        evaluate__samples=1,
        evaluate__sampling__max_tokens=160,
    )
    arguments = ("evaluate", "--config", str(path), "evaluate.sampler=torch")
    assert script("Another sampler", monkeypatch, *arguments) == 0
    torch.set_num_threads(threads)
    rows = tiny.lines(tmp_path / "run" / "samples.jsonl")
    assert [row["finish"] for row in rows] == ["stop"] * 3 and sum(row["correct"] for row in rows) >= 2


def test_a_benchmark(tmp_path, monkeypatch, capsys):
    sums = {"name": "sums", "rows": {"path": "sums:5"}, "answer": "integer"}
    path = tiny.write(
        tmp_path / "run", train__objective="none", evaluate__sampler="constant", evaluate__benchmarks=[sums]
    )
    assert tiny.run("evaluate", path) == 2
    error = "error: sums:5: got the extension '', want .jsonl, .parquet or a source (hub:...)\n"
    assert capsys.readouterr().err == error
    assert script("A benchmark", monkeypatch, "evaluate", "--config", str(path)) == 0
    rows = tiny.lines(tmp_path / "run" / "samples.jsonl")
    assert {(r["problem_id"], r["gold"]) for r in rows} == {(f"sum-{i}", str(i + i * i)) for i in range(5)}
    cell = json.loads((tmp_path / "run" / "results.json").read_text())["benchmarks"]["sums"]["96"]
    assert cell["per_problem"] == {f"sum-{i}": [2 if i == 3 else 0, 4] for i in range(5)}  # 3 + 9 is 12
    assert cell["pass@k"]["4"]["mean"] == 0.2


def test_rows_of_a_source_are_checked(monkeypatch):
    monkeypatch.setitem(records.SOURCES, "mine", lambda rows: [{"question": "?", "answer": 1}, {"question": 2}])
    cfg = config_lib.Dataset.model_validate({"path": "mine:", "limit": 1, "columns": {"problem": "question"}})
    (row,) = records.read_rows(cfg, ("problem", "answer"))
    assert (row.problem, row.answer, row.index) == ("?", "1", 0)
    with pytest.raises(Exception, match="mine::2:question: got a number, want text"):
        records.read_rows(cfg.model_copy(update={"limit": None}), ("problem",))


def test_a_filter(tmp_path, monkeypatch, capsys):
    path = tiny.write(tmp_path / "run", data__limit=6, filters__also=["verbose"])
    assert tiny.run("generate", path) == 2
    assert "filters.also: got 'verbose', want one of unfinished, short, artefact" in capsys.readouterr().err
    assert script("A filter", monkeypatch, "generate", "--config", str(path)) == 0
    traces = tiny.lines(tmp_path / "run" / "traces.jsonl")
    lengths = {r["problem_id"]: len(r["solution"]) for r in tiny.lines(tiny.ASSETS / "train.jsonl")}
    ratios = [len(t["text"]) / lengths[t["problem_id"]] for t in traces]
    dropped = [f"verbose: {ratio:.1f} times the solution" if ratio > 3.5 else None for ratio in ratios]
    assert [t["drop"] if t["drop"] != "wrong" else None for t in traces] == dropped
    assert 0 < dropped.count(None) < len(traces) == 12
    assert f", {12 - dropped.count(None)} verbose" in capsys.readouterr().out.replace("; ", ", ")


def test_an_answer_type_grades_training(tmp_path, monkeypatch, capsys):
    """Gold answers are written in a column that no prompt shows, so that both runs draw the same traces."""
    rows = tiny.lines(tiny.ASSETS / "train.jsonl")[:4]
    path = tiny.write(tmp_path / "run", data__path=str(tmp_path / "rows.jsonl"), filters__correct=False)

    def generate(name: str, *overrides: str) -> list[dict]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ("generate", "--config", str(path), f"run_dir={tmp_path / name}", *overrides)
        assert script("An answer type", monkeypatch, *arguments) == 0
        return tiny.lines(tmp_path / name / "traces.jsonl")

    drawn = generate("run")
    assert [t["drop"] for t in drawn] == [None] * 8
    for row, trace in zip(rows[:2], drawn[::2], strict=False):
        row["answer"] = " ".join(reversed(trace["text"].upper().split()))
    expected = [None if t["text"] in (drawn[0]["text"], drawn[2]["text"]) else "wrong" for t in drawn]
    graded = ("data.answer=words", "filters.correct=true")
    assert [t["drop"] for t in generate("other", *graded)] == expected
    assert expected[0] is expected[2] is None and expected.count("wrong") >= 4
    assert tiny.run("generate", path, *graded, "data.answer=none", f"run_dir={tmp_path / 'none'}") == 2
    assert capsys.readouterr().err == "error: data.answer: got 'none', want an answer type that is graded\n"


def test_an_answer_type_rewards_and_selects(tmp_path, monkeypatch):
    path = tiny.write(tmp_path / "run", data__answer="words", data__limit=3, evaluate__sampler="constant")
    assert script("An answer type", monkeypatch, "select", "--config", str(path)) == 0
    rows = tiny.lines(tmp_path / "run" / "select" / "samples.jsonl")
    assert {r["answer"] for r in rows} == {"\\boxed{12}", "\\boxed{42}"}
    assert {r["reason"] for r in rows} == {"other words"}
    assert len(tiny.lines(tmp_path / "run" / "selected.jsonl")) == 3

    tokenizer = load_tokenizer(str(tiny.ASSETS / "model"))
    session: Any = SimpleNamespace(config=config_lib.load(path), tokenizer=tokenizer)
    task = online.Task("p", (), "12 add")

    def drawn(text):
        ids = np.array(tokenizer.encode(text))
        return ScoredSample("p", 0, ids, "length", *[np.zeros(len(ids))] * 4)

    with Grader() as grader:
        rewards = online.rewards_of(session, grader, [task], [[drawn("add 12"), drawn("\\boxed{12}")]])
    assert rewards.tolist() == [[1.0, 0.0]]


def test_gold_answers():
    row = records.Row("p", "?", "First 3, so the answer is 3 + 9 = 12.", None, 0)
    assert golds.gold_of(row, "math") is None and golds.gold_of(row, "integer") == "12"
    assert golds.gold_of(records.Row("p", "?", "\\boxed{5}", " 4 ", 0), "math") == "4"


def test_run_exports_before_it_evaluates(tmp_path, monkeypatch, capsys):
    """So another engine finds the adapter. A sampler that is not registered is refused before any work."""
    done = []
    for name in ("generate", "train", "export", "evaluate", "report"):
        monkeypatch.setattr(getattr(experiment, name), "run", lambda config, name=name, **_: done.append(name))
    path = tiny.write(tmp_path / "run", evaluate__sampler="constnat")
    assert tiny.run("run", path) == 2 and not done
    error = "error: evaluate.sampler: got 'constnat', want one of engine, offline, constant; did you mean 'constant'?\n"
    assert capsys.readouterr().err == error
    assert tiny.run("run", path, "evaluate.sampler=constant") == 0
    assert done == ["generate", "train", "export", "evaluate", "report"]
