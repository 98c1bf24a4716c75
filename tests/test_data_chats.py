"""Rows in other shapes: chats, several solutions, waypoints of their own, several files; and what every stage makes of them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from synthetic import Page
from test_text import byte_tokenizer

import dail_jax
from dail_jax import config
from dail_jax.data import filters, traces
from dail_jax.data.chats import Message
from dail_jax.data.prompts import PromptBuilder, Question
from dail_jax.data.records import Row, as_json, dataset_hash, read_rows
from dail_jax.errors import UserError
from dail_jax.metrics import Metrics
from dail_jax.sample.sampler import ScoredSample
from dail_jax.stages import check, online, train
from dail_jax.text import load_tokenizer
from dail_jax.train.methods import METHODS

SYSTEM = "Be terse.\n\n  Two lines."
CHAT = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "6 * 7?"},
    {"role": "assistant", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]},
    {"role": "user", "content": "And half of it?"},
]
BEFORE = (Message("system", SYSTEM), Message("user", "6 * 7?"), Message("assistant", "42"))
EXPERT = {"role": "assistant", "content": "$x = 42 / 2 = 21$, so \\boxed{21}."}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path, *lines, **cfg):
    return read_rows(config.Dataset(path=str(write(path, *lines)), **cfg))


# ---------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------


def test_a_chat_is_a_problem_with_what_came_before_it(tmp_path):
    (row,) = read(tmp_path / "r.jsonl", {"messages": [*CHAT, EXPERT], "answer": 21})
    assert (row.problem, row.solution, row.answer) == ("And half of it?", EXPERT["content"], "21")
    assert row.before == BEFORE
    # The column decides where there is one; the turn is then shown to nobody.
    (other,) = read(tmp_path / "r.jsonl", {"messages": [*CHAT, EXPERT], "solution": "Halve it."})
    assert (other.solution, other.before) == ("Halve it.", BEFORE)
    # So does `problem`, as it always has.
    (plain,) = read(tmp_path / "r.jsonl", {"problem": "p", "solution": "s", "messages": [*CHAT, EXPERT]})
    assert plain == Row(plain.problem_id, "p", "s", None, 0)
    # What came before makes another row of the same problem.
    bare = {"messages": [CHAT[-1], EXPERT], "answer": 21}
    rows = read(tmp_path / "r.jsonl", {"messages": [*CHAT, EXPERT], "answer": 21}, bare)
    assert rows[0].problem_id != rows[1].problem_id and dataset_hash(rows[:1]) != dataset_hash([row, *rows[1:]])


def test_parquet_holds_chats(tmp_path):
    pq.write_table(pa.table({"messages": [[{"role": "user", "content": "p"}, EXPERT]]}), tmp_path / "r.parquet")
    (row,) = read_rows(config.Dataset(path=str(tmp_path / "r.parquet")))
    assert (row.problem, row.solution, row.before) == ("p", EXPERT["content"], ())


USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
BAD = {
    "text": (r"messages: got text, want a list of messages"),
    "[]": r"messages: got an empty list",
    json.dumps(["u"]): r"messages\.0: got text, want an object with role and content",
    json.dumps([{"from": "human", "value": "u"}]): r"messages\.0\.role: got no such key \(there are: from, value\)",
    json.dumps([{"role": "bot", "content": "u"}]): r"messages\.0\.role: got 'bot', want system, user or assistant",
    json.dumps([USER, USER]): r"messages\.1\.role: got 'user', want 'assistant'",
    json.dumps([REPLY]): r"messages\.0\.role: got 'assistant', want 'user'",
    json.dumps([USER, REPLY, CHAT[0]]): r"messages\.2\.role: got 'system', want 'user'",
    json.dumps([CHAT[0]]): r"messages: got no user's turn",
    json.dumps([CHAT[0], REPLY]): r"messages\.1\.role: got 'assistant', want 'user'",
    json.dumps([{"role": "user", "content": " \n"}]): r"messages\.0\.content: got an empty text",
    json.dumps([{"role": "user", "content": None}]): r"messages\.0\.content: got null",
    json.dumps(
        [{"role": "user", "content": [IMAGE]}]
    ): r"messages\.0\.content: got a part of type 'image_url', want text",
    json.dumps([USER, {"role": "tool", "content": "3"}]): r"messages\.1: got a tool's message, which is not supported",
    json.dumps([USER, {**REPLY, "tool_calls": [{"id": 1}]}]): r"messages\.1: got a call of a tool",
    json.dumps([USER, {**REPLY, "reasoning_content": "r"}]): r"messages\.1\.reasoning_content: got a key that is not",
    json.dumps([{"role": "user", "content": "\ud800"}]): r"messages: got half of a surrogate pair",
}


@pytest.mark.parametrize("messages", BAD, ids=range(len(BAD)))
def test_bad_chats_are_one_line_with_file_row_and_message(tmp_path, messages):
    value = "text" if messages == "text" else json.loads(messages)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "r.jsonl", {"messages": [USER, REPLY]}, {"messages": value, "solution": "s"})
    assert "\n" not in str(caught.value)
    caught.match(r"r\.jsonl:2:" + BAD[messages])


def test_a_chat_without_a_reply_has_no_solution(tmp_path):
    with pytest.raises(UserError, match=r"r\.jsonl:1:solution: got no such column"):
        read(tmp_path / "r.jsonl", {"messages": CHAT})
    harmless = {"role": "user", "content": "u", "name": None, "tool_calls": []}
    (row,) = read_rows(config.Dataset(path=str(write(tmp_path / "r.jsonl", {"messages": [harmless]}))), ("problem",))
    assert (row.problem, row.solution) == ("u", "")


SEVERAL = {"problem_id": "s", "problem": "p", "solution": ["$a = 3$, \\boxed{9}", "$b = 4$, \\boxed{9}"]}


def test_several_solutions_and_their_waypoints(tmp_path):
    def views(**more):
        (row,) = read(tmp_path / "r.jsonl", {**SEVERAL, **more})
        assert read(tmp_path / "again.jsonl", as_json(row)) == [row]
        return [(view.solution, view.waypoints, view.further) for view in row.views]

    first, second = SEVERAL["solution"]
    assert views() == [(first, None, ()), (second, None, ())]
    assert views(waypoints=["x", "y"]) == [(first, "x\ny", ()), (second, "x\ny", ())]
    assert views(waypoints=[["x", "y"], None]) == [(first, "x\ny", ()), (second, None, ())]
    assert views(waypoints=[[], ["z"]]) == [(first, "", ()), (second, "z", ())]
    one = {**SEVERAL, "solution": [first]}
    assert read(tmp_path / "r.jsonl", one) == read(tmp_path / "r.jsonl", {**one, "solution": first})
    for more, complaint in (
        ({"solution": []}, "solution: got an empty list"),
        ({"solution": ["s", " "]}, r"solution\.1: got an empty text"),
        ({"solution": ["s", None]}, r"solution\.1: got null"),
        ({"waypoints": [["x"]]}, "waypoints: got 1 lists, want one for each of 2 solutions"),
        ({"waypoints": [["x"], [3]]}, r"waypoints\.1: got a list, want text"),
    ):
        with pytest.raises(UserError, match=rf"r\.jsonl:1:{complaint}"):
            views(**more)


def test_the_hash_of_rows_of_the_old_form_is_the_old_one(tmp_path):
    """Records in run directories hold it."""
    rows = read(tmp_path / "r.jsonl", {"problem": "p", "solution": "s", "answer": 2}, {"problem": "q", "solution": "t"})
    assert dataset_hash(rows) == "21e63e2a726b12108e1373289ad7e5ed58b79cd6cd0cba2fe9d926b9ea61c8f2"


# ---------------------------------------------------------------------------------------------------
# Several files
# ---------------------------------------------------------------------------------------------------


def mixture(tmp_path, weights, sizes=(9, 5), **cfg):
    for name, size in zip("ab", sizes, strict=True):
        write(
            tmp_path / f"{name}.jsonl",
            *({"problem_id": f"{name}{i}", "problem": "p", "solution": "s"} for i in range(size)),
        )
    path = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in zip("ab", weights, strict=True)]
    return read_rows(config.Dataset.model_validate({"path": path, **cfg}))


@pytest.mark.parametrize(
    "weights, limit, counts",
    [
        ((None, None), None, (9, 5)),
        ((None, None), 11, (9, 2)),
        ((3, 1), None, (9, 3)),
        ((1, 1), None, (5, 5)),
        ((0.1, 0.3), None, (1, 5)),  # floor(0.1 * 5 / 0.3), which is 1.67
        ((0.9, 0.3), None, (9, 3)),  # exactly, although 0.9 * (9 / 0.9) need not be 9 in binary
        ((3, 1), 8, (6, 2)),
        ((2, 1), 8, (5, 2)),
    ],
)
def test_weights_give_exact_counts(tmp_path, weights, limit, counts):
    rows = mixture(tmp_path, weights, limit=limit)
    assert tuple(sum(row.problem_id[0] == name for row in rows) for name in "ab") == counts
    assert [row.index for row in rows] == list(range(sum(counts)))
    assert [row.problem_id for row in rows] == sorted(row.problem_id for row in rows)


def test_the_seed_and_not_the_order_chooses_rows(tmp_path):
    chosen = [{row.problem_id for row in mixture(tmp_path, (1, 1), seed=seed)} for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(reversed(lines)))
    path = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in "ab"]
    assert {row.problem_id for row in read_rows(config.Dataset.model_validate({"path": path}))} == chosen[0]
    held = mixture(tmp_path, (1, 1), hold_out={"rows": 4, "use": "held_out"})
    assert len(held) == 4 and {row.problem_id for row in held} < chosen[0]


def test_faults_of_several_files_name_the_one(tmp_path):
    def refused(complaint, *rows, weight=None):
        write(tmp_path / "a.jsonl", {"problem_id": "x", "problem": "p", "solution": "s"})
        write(tmp_path / "b.jsonl", {"problem_id": "y", "problem": "p", "solution": "s"}, *rows)
        path = [{"path": str(tmp_path / f"{n}.jsonl"), "weight": w} for n, w in (("a", weight and 1), ("b", weight))]
        with pytest.raises(UserError, match=complaint):
            read_rows(config.Dataset.model_validate({"path": path}))

    again = {"problem_id": "x", "problem": "q", "solution": "s"}
    refused(r"b\.jsonl:2:problem_id: got 'x' again, first seen in row 1 of .*a\.jsonl, want each once", again)
    refused(r"b\.jsonl:2:solution: got null", {"problem": "q", "solution": None})
    refused(r"b\.jsonl:data\.path: got the weight 0\.01, by which none of its rows is taken", weight=0.01)
    for tree, complaint in (
        ("[]", "got an empty list"),
        ("[{path: a.jsonl, weight: 1}, {path: b.jsonl}]", "either every file has a weight, or none has"),
        ("[{path: a.jsonl}, {path: a.jsonl}]", "got the same file twice"),
        ("[{path: a.jsonl, wight: 2}]", r"data\.path\.0\.wight: unknown key; did you mean 'weight'"),
        ("[{path: a.jsonl, weight: 0}]", r"data\.path\.0\.weight: got 0, want greater than 0"),
        ("3", r"data\.path: got 3"),
    ):
        with pytest.raises(UserError, match=complaint):
            config.load(tiny.write(tmp_path / "run"), [f"data.path={tree}"])


# ---------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def chat_row(**more):
    return Row("c", "And half of it?", EXPERT["content"], "21", 0, before=BEFORE, **more)


def test_the_chat_comes_before_every_roles_message(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("[system]\nThink.\nTwice.\n[user]\nQ: {{problem}}")
    builder = PromptBuilder(tokenizer, config.Prompts(student=str(tmp_path / "t.txt")), config.Waypoints())
    built = builder.build(chat_row())
    said = "<|start|>user\n6 * 7?<|end|>\n<|start|>assistant\n42<|end|>\n<|start|>user\n"
    student, *others = (tokenizer.decode(getattr(built, role), True) for role in ("student", "privileged", "negative"))
    start = f"<|start|>system\n{SYSTEM}"
    assert student == f"{start}\n\nThink.\nTwice.<|end|>\n{said}Q: And half of it?<|end|>\n<|start|>assistant\n"
    for text in others:
        assert text.startswith(f"{start}<|end|>\n{said}") and "Think." not in text
    assert tokenizer.decode(built.expert, True) == EXPERT["content"] + "<|end|>"
    assert builder.questions([Question("And half of it?", before=BEFORE)]) == [built.student]
    hinted = tokenizer.decode(builder.hinted("And half of it?", "halve", BEFORE), True)
    assert hinted.startswith(f"{start}<|end|>\n{said}") and "halve" in hinted


def test_control_tokens_in_a_chat_are_text(tokenizer):
    evil = (Message("user", "a<|end|>"), Message("assistant", "b</think>"))
    row = Row("c", "p", "s", None, 0, before=evil)
    builder = PromptBuilder(tokenizer, config.Prompts(), config.Waypoints())
    plain, prompt = builder.build(Row("c", "p", "s", None, 0)), builder.build(row)
    end = tokenizer.eos_id
    for role in ("student", "privileged", "negative"):
        assert getattr(prompt, role).count(end) == getattr(plain, role).count(end) + 2  # one for each turn
    assert builder.found["<|end|>"] == builder.found["</think>"] == 1
    strict = PromptBuilder(tokenizer, config.Prompts(), config.Waypoints(), "refuse")
    with pytest.raises(UserError, match=r"c:special_tokens: got the control token '<\|end\|>' in its user's message"):
        strict.build(row)


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    builder = PromptBuilder(load_tokenizer(tiny.ASSETS / "model"), config.Prompts(), config.Waypoints())
    rows = read(tmp_path / "r.jsonl", {"messages": [USER, REPLY]}, {"messages": [*CHAT, EXPERT]})
    with pytest.raises(UserError) as caught:
        builder.build_all(rows)
    assert "\n" not in str(caught.value)
    caught.match(r"r\.jsonl:2:messages: got a chat that the model's template refuses: .*got role system")
    with pytest.raises(UserError, match=r"And half of it\?:messages: got a chat that the model's template refuses"):
        builder.questions([Question("And half of it?", before=BEFORE)])


def test_every_solution_has_prompts_of_its_own(tokenizer, tmp_path):
    (row,) = read(tmp_path / "r.jsonl", {**SEVERAL, "waypoints": [None, ["mine"]]})
    builder = PromptBuilder(tokenizer, config.Prompts(), config.Waypoints())
    ((one, two),) = builder.build_views([row])
    assert one.student == two.student and one == builder.build(row) != two
    for built, solution, waypoint in ((one, row.solution, "solution: 3\n"), (two, row.further[0].solution, ": mine\n")):
        assert solution in tokenizer.decode(built.privileged) and waypoint in tokenizer.decode(built.negative)


# ---------------------------------------------------------------------------------------------------
# Through the stages
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A finished `generate` over two files: a problem with two solutions, one with three, a chat, and rows as they were."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = tiny.lines(tiny.ASSETS / "train.jsonl")[:5]
    for row, count in ((rows[0], 2), (rows[1], 3)):
        row["solution"] = [row["solution"].replace("; ", ";" + " " * (i + 1), 1) for i in range(count)]
    rows[2]["messages"] = [USER, REPLY, {"role": "user", "content": rows[2].pop("problem")}]
    write(folder / "a.jsonl", *rows[:3])
    write(folder / "b.jsonl", *rows[3:])
    path = [{"path": str(folder / "a.jsonl")}, {"path": str(folder / "b.jsonl")}]
    changes = {"data": {"path": path}, "generate__samples": 4, "generate__sampling__max_tokens": 24}
    changes |= {"filters": {"artefacts": [], "keep": "all"}, "train__batch_size": 4, "evaluate__benchmarks": []}
    file = tiny.write(folder / "run", **changes)
    with tiny.alone():
        assert tiny.run("generate", file) == 0
    return file


def test_samples_are_spread_over_the_solutions(mixed):
    found = tiny.lines(mixed.with_suffix("") / "traces.jsonl")
    assert [row.get("solution") for row in found[:8]] == [0, 1, 0, 1, 0, 1, 2, 0]
    assert all("solution" not in row for row in found[8:]) and len(found) == 20
    hashes = [row["prompt_hash"]["privileged"] for row in found]
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3] and len({*hashes[4:7]}) == 3 and hashes[4] == hashes[7]
    traces.write(mixed.parent / "again.jsonl", traces.read(mixed.with_suffix("") / "traces.jsonl"))
    assert (mixed.parent / "again.jsonl").read_bytes() == (mixed.with_suffix("") / "traces.jsonl").read_bytes()


@pytest.fixture(scope="module")
def model(mixed):
    with tiny.alone():
        yield dail_jax.load(str(mixed))


def test_training_pairs_a_trace_with_its_own_solution(mixed, model):
    found, rows = model.traces(mixed.with_suffix("") / "traces.jsonl"), model.rows()
    assert [trace.text for trace in model.rollout(rows[1], n=4)] == [trace.text for trace in found[4:8]]
    metrics = Metrics(None, model.config.log, "train")
    built = train.prompts_of(model.session, rows)
    examples = train.examples_of(model.session, METHODS["dail"], built, found, metrics)
    for example, trace in zip(examples, found, strict=True):
        alone = model.session.prompts.build(trace.problem.views[trace.solution or 0])
        assert example.prompts == {role: tuple(getattr(alone, role)) for role in example.prompts}
        assert traces.prompt_hash(example.prompts["privileged"]) == trace.prompt_hash["privileged"]
    learnt = train.examples_of(model.session, METHODS["sft"], built, [], metrics)
    ids = [row.problem_id for row in rows]
    assert [e.name for e in learnt] == [f"{ids[0]}/{i}" for i in range(2)] + [f"{ids[1]}/{i}" for i in range(3)] + ids[
        2:
    ]
    assert [e.response for e in learnt[:2]] == [tuple(view.expert) for view in built[ids[0]]]


def test_filters_see_the_solution_of_the_trace(mixed, model, monkeypatch):
    found = model.traces(mixed.with_suffix("") / "traces.jsonl")
    monkeypatch.setitem(filters.FILTERS, "shown", lambda trace, context: context.row.solution)
    marked = model.configured({"filters.also": ["shown"]}).filter(found)
    views = [trace.problem.views[trace.solution or 0] for trace in found]
    assert [trace.drop for trace in marked] == [f"shown: {view.solution}" for view in views]


def test_onpolicy_spreads_a_group_over_the_solutions(model, monkeypatch):
    def draw(sampler, prompts, group, interrupt):
        drawn = [
            ScoredSample(name, i, np.array([5]), "stop", *[np.zeros(1)] * 3, np.ones(1, bool))
            for name in prompts
            for i in range(group)
        ]
        return [drawn[i : i + group] for i in range(0, len(drawn), group)]

    monkeypatch.setattr(online, "draw_groups", draw)
    session = model.configured(
        {"train.online.problems": 1, "train.online.group": 5, "train.online.sampling.max_tokens": 8}
    ).session
    rows, method = model.rows()[1:2], METHODS["onpolicy"]
    tasks = online.tasks_of(session, method, rows, Metrics(None, model.config.log, "train"))
    examples, _ = online.rollout_round(session, method, None, None, tasks, 0, None)  # pyright: ignore
    views = session.prompts.build_all(rows[0].views)
    assert [e.prompts["privileged"] for e in examples] == [tuple(views[i].privileged) for i in (0, 1, 2, 0, 1)]
    assert {e.prompts["student"] for e in examples} == {tuple(views[0].student)}


def test_other_rows_are_refused_when_a_run_resumes(mixed, capsys):
    a = mixed.parent / "a.jsonl"
    whole = a.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    rows[1]["solution"][2] = rows[1]["solution"][2].replace("; ", ";  ", 1)
    (mixed.parent / "c.jsonl").write_text(a.read_text())
    with tiny.alone():
        assert tiny.run("generate", mixed) == 0 and "already done" in capsys.readouterr().out
        moved = f"data.path=[{{path: {mixed.parent / 'c.jsonl'}}}, {{path: {mixed.parent / 'b.jsonl'}}}]"
        assert tiny.run("generate", mixed, moved) == 0  # the same rows by another name
        assert tiny.run("generate", mixed, f"data.path={a}") == 2
        assert "data.path: " in capsys.readouterr().err
        write(a, *rows)
        assert tiny.run("generate", mixed) == 2
        assert "data.path: the contents of " in capsys.readouterr().err
        # A copy of the traces, which no record stands for: each trace knows the prompt of its own solution.
        copy = mixed.parent / "copy.jsonl"
        copy.write_bytes((mixed.with_suffix("") / "traces.jsonl").read_bytes())
        fresh = ("run_dir=" + str(mixed.parent / "fresh"), f"traces={copy}")
        assert tiny.run("train", mixed, *fresh) == 2
        assert f"error: {copy}:7:solution: got a trace that was drawn with another solution" in capsys.readouterr().err
        rows[1]["solution"].pop()
        write(a, *rows)
        assert tiny.run("train", mixed, *fresh) == 2
        assert f"error: {copy}:7:solution: got 2, want below 2: the problem has no more" in capsys.readouterr().err
    a.write_text(whole)


def test_the_page_shows_the_chat_and_every_solution(mixed, undrawn):
    with tiny.alone():
        assert tiny.run("report", mixed) == 0
    data = Page((mixed.with_suffix("") / "report.html").read_text()).data()
    (shown,) = data["problems"]
    rows = list(shown["rows"].values())
    assert sorted(len(row["solutions"]) for row in rows) == [1, 1, 1, 2, 3]
    assert [row["before"] for row in rows if row["before"]] == [[["user", "u"], ["assistant", "a"]]]
    assert sorted(str(trace["solution"]) for trace in data["traces"]) == sorted([*"01010120", *["None"] * 12])


def test_what_selection_keeps_is_read_as_the_same_rows(tmp_path, mixed, model):
    again = read(tmp_path / "r.jsonl", *map(as_json, model.rows()))
    assert dataset_hash(again) == dataset_hash(model.rows())


def test_check_counts_solutions_and_names_files(mixed):
    with tiny.alone():
        found = check.look("generate", config.load(mixed, [f"run_dir={mixed.parent / 'other'}"]))
    assert not found.problems
    (text,) = found.rows["data"]
    assert text == f"5 rows of {mixed.parent / 'a.jsonl'}, {mixed.parent / 'b.jsonl'}"
