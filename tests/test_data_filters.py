"""Reasons for dropping traces."""

import pytest

from dail_jax import config
from dail_jax.data.filters import FILTERS, Context, chosen, repetition
from dail_jax.data.filters import mark as mark_all
from dail_jax.data.records import Row
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError
from dail_jax.text import mention


def trace(text="So the answer is \\boxed{4}.", ids=None, finish="stop", problem="p", sample=0):
    ids = tuple(range(20)) if ids is None else tuple(ids)
    return Trace(problem_id=problem, sample=sample, response_ids=ids, text=text, finish=finish)


def mark(traces, seed=1, is_correct=lambda text: "{4}" in text, **cfg):
    row, filters = Row("p", "Add 2 and 2.", "It is \\boxed{4}.", "4", 0), config.Filters(**cfg)
    context = Context(filters, row, is_correct)
    return [t.drop for t in mark_all(traces, {t.problem_id: context for t in traces}, filters, seed)]


def reason(one, is_correct=None, **cfg):
    return mark([one], is_correct=is_correct, **cfg)[0]


def test_reasons():
    assert reason(trace()) is None
    assert reason(trace(finish="length")) is None
    assert reason(trace(finish="length"), finished=True) == "unfinished"
    assert reason(trace(ids=[1, 2]), min_tokens=3) == "short"
    assert reason(trace("As  THE\nreference solution says")) == "artefact: reference solution"
    assert reason(trace(ids=[1, 2] * 50)) == "repetition"
    assert reason(trace(ids=[1, 2] * 50), max_repetition=1.0) is None


def test_correctness_is_asked_last(monkeypatch):
    asked = []

    def grade(text):
        asked.append(text)
        return "{4}" in text

    monkeypatch.setitem(FILTERS, "loud", lambda trace, context: "!" if "!" in trace.text else None)
    cfg = {"correct": True, "finished": True, "also": ["loud"]}
    assert list(chosen(config.Filters(**cfg))) == ["unfinished", "short", "artefact", "repetition", "loud", "wrong"]
    assert reason(trace(), grade, **cfg) is None
    assert reason(trace("\\boxed{5}"), grade, **cfg) == "wrong"
    assert reason(trace(finish="length"), grade, **cfg) == "unfinished"
    assert reason(trace("\\boxed{4}!"), grade, **cfg) == "loud: !"
    assert len(asked) == 2
    with pytest.raises(UserError, match=r"filters.correct: got no answer for problem 'p'"):
        reason(trace(), None, **cfg)
    with pytest.raises(UserError, match=r"filters.also: got 'lout', want one of unfinished, .*; did you mean 'loud'\?"):
        chosen(config.Filters(also=("lout",)))


def test_artefacts_are_words():
    assert mention("the hints are", ["the hint"]) == "the hint"
    assert mention("bathe hint", ["the hint"]) is None and mention("the hinterland", ["the hint"]) is None
    for text in ("As the expert's solution shows", "The expert says", "by the solution above", "the solution provided"):
        assert mention(text, config.Filters().artefacts), text
    assert mention("anything", []) is None and mention("anything", [" "]) is None


def test_repetition_counts_repeated_8_grams():
    assert repetition(list(range(100))) == 0 and repetition([1] * 7) == 0
    assert repetition([1] * 10) == pytest.approx(1 - 1 / 3)
    # 16 tokens twice: 25 grams, the last 9 of which occurred before
    assert repetition(list(range(16)) * 2) == pytest.approx(9 / 25)


def test_so_many_traces_of_a_problem_are_kept():
    traces = [
        trace("\\boxed{5}", problem="a").marked("surplus"),  # marked before: decided anew
        trace(problem="a", sample=1),
        trace(problem="b"),
        trace(problem="a", sample=2),
    ]
    drops = lambda **cfg: mark(traces, correct=True, **cfg)  # noqa: E731
    assert drops() == ["wrong", None, None, "surplus"]
    assert drops(keep="all") == drops(keep=2) == ["wrong", None, None, None]
    assert [t.drop for t in traces] == ["surplus", None, None, None]  # traces are not changed


def test_traces_are_chosen_by_the_seed_alone():
    traces = [trace(problem=p, sample=i) for p in "abcdefgh" for i in range(6)]

    def kept(traces, seed):
        drops = mark(traces, seed, keep=2, choose="random")
        return {t.name for t, drop in zip(traces, drops, strict=True) if drop is None}

    found = kept(traces, 1)
    assert len(found) == 16 and found == kept(traces[::-1], 1) and found != kept(traces, 2)
    assert {name[-1] for name in found} == set("012345")
