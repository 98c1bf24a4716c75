"""Budgets: what they cover, where a sample is cut, when an answer is forced; and no budget takes back what a smaller saw.

A token is a piece of text here, so that samples are written out and every prefix of them is a budget.
"""

import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dail_jax import config as config_lib
from dail_jax.evaluate import answers, protocol, replies
from dail_jax.stages import evaluate

END = "<|end|>"
PIECES = (
    *("<think>", "</think>", "<thi", "nk>", "</", END, "\\", "\\boxed{", "\\bo", "xed{", "\\boxed ", "\\fbox{"),
    *("1", "2", "{", "}", "\\}", " and ", "The answer is 1", ".", "\n", "5"),
)
ROOM = 3


class Pieces:
    """A tokenizer whose tokens are PIECES, and any other text as one token."""

    def __init__(self):
        self.known = list(PIECES)

    def encode(self, text):
        if text not in self.known:
            self.known.append(text)
        return [self.known.index(text)]

    def decode(self, ids, keep_special=False):
        return "".join(self.known[i] for i in ids if keep_special or self.known[i] != END)


def session_of(budget="all", most=12, **changes):
    cfg = {
        "samples": 1,
        "budgets": list(range(1, most + 1)),
        "budget": budget,
        "force": {"max_tokens": ROOM},
        "sampling": {"max_tokens": most},
        **changes,
    }
    tokenizer = Pieces()
    config = config_lib.Config.model_validate({"run_dir": "r", "model": {"path": "m"}, "evaluate": cfg})
    return SimpleNamespace(config=config, tokenizer=tokenizer, stops=tuple(tokenizer.encode(END)))


def cuts(pieces, budget="all", opening="", kind="integer", most=12, **changes):
    """The cuts at budgets 1, 2, ... of a sample made of these pieces, which ends at the first END."""
    session = session_of(budget, most, **changes)
    limit = most + session.config.evaluate.room
    ids = [i for piece in pieces for i in session.tokenizer.encode(piece)]
    stop = session.stops[0]
    ids = (ids[: ids.index(stop) + 1] if stop in ids else ids)[:limit]
    # A sample that has neither stopped nor filled the limit does not exist: it goes on saying nothing.
    ids += [] if stop in ids else session.tokenizer.encode("\n") * (limit - len(ids))
    sample = {"sample": 0, "ids": ids, "finish": "stop" if stop in ids else "length"}
    benchmark = config_lib.Benchmark.model_validate({"name": "b", "answer": kind, "rows": {"path": "x"}})
    row = SimpleNamespace(problem_id="p")
    problem = evaluate.BenchmarkProblem(benchmark, row, "1", (), opening)  # pyright: ignore[reportArgumentType]
    found = evaluate.cuts_of(session, problem, sample)  # pyright: ignore[reportArgumentType]
    return session, found


def own_answer(session, c, tag="think"):
    """A cut's answer as it is graded, without a forced one."""
    row = {**evaluate.row_of(session, c, None), "forced_text": None}
    return protocol.answer_of(row, c.problem.benchmark.answer, tag)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=14),
    st.sampled_from(["all", "thoughts"]),
    st.sampled_from(["", "<think>\n"]),
    st.sampled_from(["integer", "math", "choice"]),
    st.booleans(),
)
def test_an_answer_inside_a_budget_is_that_of_every_larger_one(pieces, budget, opening, kind, forcing):
    forcing |= budget == "thoughts"  # which wants it
    more = {} if forcing else {"force": None}
    session, found = cuts(pieces, budget, opening, kind, **more)
    seen = None
    for c in found:
        answer = None if c.ask else own_answer(session, c)
        assert not c.ask or forcing
        if seen is not None:
            assert answer == seen, (c.budget, c.text)
        seen = answer
        # an answer is asked for just where there is none that is complete
        assert not forcing or bool(c.ask) == (answer is None)
        # what the budget covers, and what it does not
        assert c.spent <= c.budget and len(c.ids) - c.spent <= session.config.evaluate.room
        assert budget == "thoughts" or len(c.ids) == c.spent
    # equal cuts are asked once, so that a forced answer, too, is that of every larger budget
    by_name = {}
    for c in (c for c in found if c.ask):
        assert by_name.setdefault(c.name, (c.kept, c.ask)) == (c.kept, c.ask)


def test_all_covers_every_token():
    """The defect: forced while it thought, without an answer when its answer was cut, right at the end."""
    reply = ["<think>", "hm", "</think>", "So ", "it ", "is ", "\\boxed{", "1", "}", ".", END]
    session, found = cuts(reply, "all")
    asks = [c.ask for c in found]
    text = session.config.evaluate.force.text
    assert asks == ["\n</think>" + text] * 2 + [text] * 6 + [""] * 4
    assert [c.finish for c in found] == ["length"] * 10 + ["stop"] * 2
    assert [c.spent for c in found] == [*range(1, 12), 11]
    assert [own_answer(session, c) for c in found[8:]] == ["1"] * 4


def test_thoughts_leaves_room_for_an_answer():
    reply = ["<think>", "hm", "</think>", "\\boxed{", "1", "}", ".", "\n", END]
    session, found = cuts(reply, "thoughts")
    assert [c.spent for c in found] == [1, 2] + [3] * 10
    assert [len(c.ids) - c.spent for c in found] == [0, 0] + [ROOM] * 10
    assert [bool(c.ask) for c in found] == [True] * 2 + [False] * 10
    assert {own_answer(session, c) for c in found[2:]} == {"1"}
    slow = ["<think>", "hm", "</think>", "It ", "must ", "be ", "\\boxed{", "1", "}", END]  # too long for the room
    session, found = cuts(slow, "thoughts")
    assert {c.text for c in found[2:]} == {"<think>hm</think>It must be "}
    assert {c.ask for c in found[2:]} == {session.config.evaluate.force.text} and len({c.name for c in found[2:]}) == 1


def test_a_reply_without_thoughts_is_covered_as_a_whole():
    reply = ["So ", "\\boxed{", "1", "}", END]
    for budget in ("all", "thoughts"):
        _, found = cuts(reply, budget)
        assert [c.spent for c in found] == [1, 2, 3, 4, 5] + [5] * 7 and {len(c.ids) - c.spent for c in found} == {0}
        assert [bool(c.ask) for c in found] == [True] * 3 + [False] * 9


@pytest.mark.parametrize("budget", ["all", "thoughts"])
@pytest.mark.parametrize(
    ("reply", "ask"),
    [
        (["<think>", "hm", END], "\n</think>\n\nThe final answer is \\boxed{"),  # it ends inside its thoughts
        (["The answer is 1", ".", END], "\n\nThe final answer is \\boxed{"),  # and here without a box
        (["<think>", "</think>", "It is 1", END], "\n\nThe final answer is \\boxed{"),
        (["\\boxed{", " and ", "}", END], "\n\nThe final answer is \\boxed{"),  # no choice
        (["\\boxed{", "}", END], "\n\nThe final answer is \\boxed{"),
        (["<think>", "\\boxed{", "1", "}", END], "\n</think>\n\nThe final answer is \\boxed{"),
    ],
)
def test_finished_replies_without_an_answer_are_asked(reply, ask, budget):
    kind = "choice" if " and " in reply else "integer"
    _, found = cuts(reply, budget, kind=kind)
    assert {c.ask for c in found if c.finish == "stop"} == {ask}
    assert all(not c.text.endswith(END) and c.kept == c.ids[:-1] for c in found if c.finish == "stop")
    assert not any(c.ask for c in cuts(reply, budget, kind="none")[1])  # nothing is graded


def test_the_first_complete_answer_counts():
    _, found = cuts(["\\boxed{", "1", "}", " and ", "\\boxed{", "2", "}", END])
    session = session_of()
    assert [own_answer(session, c) for c in found][2:] == ["1"] * 10
    row = {"text": "", "forced_text": "\n</think>\n\nThe final answer is \\boxed{4}. Or \\boxed{5}", "finish": "forced"}
    assert protocol.answer_of(row, "math", "think") == "4"
    # a cut statement may go on: "the answer is 1" may be 15
    row = {"text": "The answer is 1", "forced_text": None}
    assert protocol.answer_of({**row, "finish": "stop"}, "integer", "think") == "1"
    assert protocol.answer_of({**row, "finish": "length"}, "integer", "think") is None


def test_the_end_of_thoughts_is_found_whatever_the_tag_is_made_of():
    session = session_of("thoughts")
    assert session.tokenizer.encode("</think>") == [1]
    for reply in (["<think>", "a", "</think>", "b"], ["<think>", "a", "</", "think>", "b"]):
        _, found = cuts(reply, "thoughts")
        assert found[-1].spent == reply.index("b")
    _, found = cuts(["a", "</think>", "b"], "thoughts", "<think>\n")  # the prompt has opened them
    assert found[-1].spent == 2
    _, found = cuts(["a", "</think>", "b"], "thoughts")  # nobody has
    assert found[-1].spent == 12


def test_bad_settings():
    with pytest.raises(Exception, match="budget: thoughts wants force"):
        config_lib.Evaluate.model_validate({"budget": "thoughts"})
    with pytest.raises(Exception, match="want a text without a closing tag"):
        config_lib.Force.model_validate({"text": "\n</think>\n\\boxed{"})


def test_protocols_are_not_compared():
    base = {"benchmarks": {}, "objective": "none"}
    assert protocol.differences({"base": base, "dail": {**base, "budget": "thoughts"}}, 0, 50).notes == [
        "dail against base: not compared, for their budgets cover other tokens (thoughts, all)"
    ]


def test_reading_a_reply_is_linear():
    """Boxes without end, closed or not, and thoughts; a quadratic scan would take minutes."""
    started = time.process_time()
    nested = "\\boxed{" * 15_000 + "}" * 15_000
    for text in ("\\boxed{" * 30_000, "\\boxed{}" * 30_000, "<think>" * 30_000, nested):
        for cut in (True, False):
            found = replies.answer(text, answers.named("math"), "think", forced=None, cut=cut)
            assert found == ("\\boxed{}" if text == nested else None)
    assert time.process_time() - started < 10
