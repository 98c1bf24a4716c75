"""Evaluation with another sampler: no weights, no engine, the same result files."""

import collections
import json

import numpy as np
import pytest
import tiny

from dail_jax.sample import engine
from dail_jax.sample.sampler import Request, Sample, checked
from dail_jax.stages import samplers, session


@pytest.fixture(autouse=True)
def one():
    with tiny.alone():
        yield


class Oracle:
    """Knows every answer, gives it in even samples, and is cut off in mid-thought in odd ones."""

    def __init__(self, tokenizer, max_tokens):
        rows = tiny.lines(tiny.ASSETS / "hard.jsonl")
        self.answers = {f"evaluate/hard/{row['problem_id']}": row["answer"] for row in rows}
        self.tokenizer, self.max_tokens, self.seen = tokenizer, max_tokens, []

    def run(self, requests):
        for r in requests:
            self.seen.append(r)
            assert r.limit <= self.max_tokens and len(r.prompts) == 1
            for index in reversed(r.samples):
                answer = self.answers[r.name]
                ids = [*self.tokenizer.encode(f"\\boxed{{{answer}}}"), self.tokenizer.eos_id]
                finish = "stop"
                if index % 2:
                    ids, finish = (self.tokenizer.encode("add ") * r.limit)[: r.limit], "length"
                yield Sample(r.name, index, np.array(ids), finish)

    def figures(self):
        return {"requests": len(self.seen)}


def test_evaluation_wants_no_more_than_the_protocol(tmp_path, monkeypatch, capsys):
    made = []

    def oracle(opened, run_dir):
        assert run_dir.path == tmp_path / "run"
        return lambda max_tokens: made.append(Oracle(opened.tokenizer, max_tokens)) or made[-1]

    def never(*args):
        raise AssertionError("the engine or the weights were touched")

    monkeypatch.setattr(engine.Engine, "__post_init__", never)
    monkeypatch.setattr(session, "frozen", never)
    hard = {"name": "hard", "rows": {"path": str(tiny.ASSETS / "hard.jsonl"), "limit": 3}}
    path = tiny.write(
        tmp_path / "run", train__objective="none", evaluate__sampler="oracle", evaluate__benchmarks=[hard]
    )
    assert tiny.run("evaluate", path) == 2
    assert "evaluate.sampler: got 'oracle', want one of engine" in capsys.readouterr().err
    monkeypatch.setitem(samplers.SAMPLERS, "oracle", oracle)
    assert tiny.run("evaluate", path) == 0
    rows = tiny.lines(tmp_path / "run" / "samples.jsonl")
    assert len(rows) == 3 * 4 and len(made[0].seen) == 3
    assert all(r["correct"] == (r["sample"] % 2 == 0) for r in rows)
    assert collections.Counter(r["finish"] for r in rows) == {"stop": 6, "length": 6}
    cell = json.loads((tmp_path / "run" / "results.json").read_text())["benchmarks"]["hard"]["96"]
    assert cell["pass@k"]["1"]["mean"] == 0.5 and cell["pass@k"]["4"]["mean"] == 1.0
    metrics = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["requests"] for m in metrics if m["stage"] == "evaluate"] == [3]


class Given:
    """Yields the samples that it was given."""

    def __init__(self, *samples):
        self.samples = samples

    def run(self, requests):
        return iter(self.samples)

    def figures(self):
        return {}


def sample(index, tokens=3, finish="stop"):
    return Sample("p", index, np.zeros(tokens, int), finish)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((sample(0), sample(0)), "sample 0 of p, which was not requested or was given before"),
        ((sample(2),), "sample 2 of p, which was not requested"),
        ((sample(0, tokens=6),), "with 6 tokens and finish 'stop', want 1 to 5 tokens"),
        ((sample(0, tokens=0),), "with 0 tokens"),
        ((sample(0, finish="eos"),), "finish 'eos', want 1 to 5 tokens and stop or length"),
        ((sample(1),), "left out 1 samples, such as sample 0 of p"),
    ],
)
def test_a_sampler_that_breaks_its_promise_is_stopped(given, message):
    request = Request("p", ((1, 2),), (0, 1), 5)
    with pytest.raises(ValueError, match=message):
        list(checked(Given(*given), [request]))
    complete = (None, sample(1), None, sample(0, tokens=5, finish="length"))
    assert list(checked(Given(*complete), [request])) == list(complete)
