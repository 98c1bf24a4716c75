"""Reasons for dropping traces."""

import pytest

from dail_jax import config
from dail_jax.data import filters
from dail_jax.data.filters import repetition
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError
from dail_jax.text import mention


def trace(text="So the answer is \\boxed{4}.", ids=None, finish="stop", problem="p", sample=0):
    ids = tuple(range(20)) if ids is None else tuple(ids)
    return Trace(problem_id=problem, sample=sample, response_ids=ids, text=text, finish=finish)


def mark(traces, cfg, seed=1, gold="4", is_correct=lambda text, gold: f"\\boxed{{{gold}}}" in text):
    return [t.drop for t in filters.mark(traces, cfg, seed, {t.problem_id: gold for t in traces}, is_correct)]


def drop_reason(one, cfg=None, **how):
    return mark([one], cfg or config.Filters(), **how)[0]


def test_reasons():
    assert drop_reason(trace()) is None
    assert drop_reason(trace(finish="length")) is None
    assert drop_reason(trace(finish="length"), config.Filters(finished=True)) == "unfinished"
    assert drop_reason(trace(ids=[1, 2]), config.Filters(min_tokens=3)) == "short"
    assert drop_reason(trace("As  THE\nreference solution says")) == "artefact: reference solution"
    assert drop_reason(trace(ids=[1, 2] * 50)) == "repetition"
    assert drop_reason(trace(ids=[1, 2] * 50), config.Filters(max_repetition=1.0)) is None


def test_correctness_is_asked_last():
    asked = []

    def grade(text, gold):
        asked.append(gold)
        return f"\\boxed{{{gold}}}" in text

    cfg = config.Filters(correct=True, finished=True)
    assert drop_reason(trace(), cfg, gold="4", is_correct=grade) is None
    assert drop_reason(trace(), cfg, gold="5", is_correct=grade) == "wrong"
    assert drop_reason(trace(finish="length"), cfg, gold="6", is_correct=grade) == "unfinished"
    assert asked == ["4", "5"]
    with pytest.raises(UserError, match=r"filters.correct: got no answer for problem 'p'"):
        drop_reason(trace(), cfg, gold=None, is_correct=grade)


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
    drops = lambda **cfg: mark(traces, config.Filters(correct=True, **cfg))  # noqa: E731
    assert drops() == ["wrong", None, None, "surplus"]
    assert drops(keep="all") == drops(keep=2) == ["wrong", None, None, None]
    assert [t.drop for t in traces] == ["surplus", None, None, None]  # traces are not changed


def test_traces_are_chosen_by_the_seed_alone():
    traces = [trace(problem=p, sample=i) for p in "abcdefgh" for i in range(6)]
    cfg = config.Filters(keep=2, choose="random")

    def kept(traces, seed):
        return {t.name for t, drop in zip(traces, mark(traces, cfg, seed), strict=True) if drop is None}

    found = kept(traces, 1)
    assert len(found) == 16 and found == kept(traces[::-1], 1) and found != kept(traces, 2)
    assert {name[-1] for name in found} == set("012345")
