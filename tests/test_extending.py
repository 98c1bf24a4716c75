"""The scripts of docs/extending.md, run as they stand there on the tiny configuration."""

import json
import re
import sys
from typing import Any

import numpy as np
import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax.data import records
from dail_jax.evaluate import answers
from dail_jax.sample.sampler import Sample
from dail_jax.stages import samplers


@pytest.fixture(autouse=True)
def here(programs, monkeypatch):
    """One device; what a script registers is forgotten after the test."""
    for module, name in (
        (answers, "ANSWERS"),
        (records, "SOURCES"),
        (samplers, "SAMPLERS"),
    ):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    samplers.SAMPLERS["constant"] = lambda session, run_dir: lambda limit: Constant(session.tokenizer)
    with tiny.alone(programs):
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
