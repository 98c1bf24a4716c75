"""Baselines that sample while they train, and STaR: the rounds, resuming, on the embedded micro-world."""

import json

import numpy as np
import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax import launch
from dail_jax.data import batches
from dail_jax.data.prompts import PromptBuilder
from dail_jax.data.records import read_rows
from dail_jax.errors import UserError
from dail_jax.metrics import Metrics
from dail_jax.rundir import Interrupt
from dail_jax.stages import online, recipes
from dail_jax.stages.session import open_session
from dail_jax.text import load_tokenizer
from dail_jax.train import methods
from dail_jax.train import step as step_lib

HINT = str(tiny.ASSETS / "templates" / "hint.txt")
# 2 rounds of 4 x 4 samples, 2 updates each
SMALL = {
    "train__batch_size": 8,
    "train__epochs": 1,
    "train__bucket": 96,
    "train__save_every": 1,
    "prompts__hint": HINT,
    "train__online": {"problems": 4, "group": 4, "slots": 16, "hint": "waypoints", "sampling": {"max_tokens": 96}},
    "evaluate__samples": 2,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """By turns: short problems that the model always solves, and hard ones with many waypoints, which it never does."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    chain = sorted(tiny.lines(tiny.ASSETS / "chain.jsonl"), key=lambda row: len(row["problem"]))
    hard = sorted(tiny.lines(tiny.ASSETS / "hard.jsonl"), key=lambda row: -row["solution"].count("="))
    path.write_text("".join(json.dumps(row) + "\n" for pair in zip(chain, hard, strict=True) for row in pair))
    return str(path)


@pytest.fixture
def one():
    with tiny.alone():
        yield


def test_batches_carry_what_was_drawn():
    example = batches.Example("a/0", {"student": (1, 2)}, (3, 4, 5), (-0.5, -1.0, -2.0), 0.25)
    batch = batches.Assemble([example], 4, 1, slice(0, 2), ("student",)).map(np.array([0, -1]))
    assert batch["logq"].tolist() == [[[0, -0.5, -1, -2], [0] * 4]]
    assert batch["advantage"].tolist() == [[[0, 0.25, 0.25, 0.25], [0] * 4]]


# ---------------------------------------------------------------------------------------------------
# The rounds
# ---------------------------------------------------------------------------------------------------


def test_every_problem_once_a_pass():
    taken = [online.chosen_problems(10, 4, number, 3) for number in range(5)]
    flat = np.concatenate(taken)
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10].tolist() != flat[10:].tolist()
    assert taken == [online.chosen_problems(10, 4, number, 3) for number in range(5)]


def test_problems_with_long_prompts_are_skipped_and_counted(tmp_path, rows):
    """Above `train.online.max_prompt_tokens`, whatever `train.max_tokens` would still take."""
    path = tiny.write(tmp_path / "r", train__objective="grpo", data={"path": rows, "limit": 8}, **SMALL)

    def tasks(*overrides):
        session = open_session(config_lib.load(path, overrides))
        metrics = Metrics(tmp_path, session.config.log, "train")
        return online.tasks_of(session, methods.of(session.config), read_rows(session.config.data), metrics)

    lengths = sorted(len(task.student) for task in tasks())
    assert len(lengths) == 8 and lengths[0] < lengths[-1]
    fitting = [n for n in lengths if n < lengths[-1]]
    longest = f"train.online.max_prompt_tokens={lengths[-1] - 1}"
    assert sorted(len(task.student) for task in tasks(longest)) == fitting
    counts = {row["what"]: (row["count"], row["of"]) for row in tiny.lines(tmp_path / "metrics.jsonl")}
    assert counts[f"problems skipped: their prompts are above {longest}"] == (8 - len(fitting), 8)
    with pytest.raises(UserError, match=r"train\.online\.max_prompt_tokens: nothing to train on"):
        tasks("train.online.max_prompt_tokens=1")


def test_records_hold_the_prompt_limit_where_samples_are_drawn(tmp_path):
    """Training that draws none is made of the same settings as before the key came."""
    for objective, is_recorded in (("dail", False), ("sft", False), ("grpo", True), ("onpolicy", True)):
        config = config_lib.load(tiny.write(tmp_path / "r", train__objective=objective))
        settings = recipes.train(config, []).settings
        assert ("max_prompt_tokens" in settings["train"]["online"]) == is_recorded, objective
        assert settings["generate"] == {"max_prompt_tokens": 4096}  # which solutions are cut to fit


def test_hints_are_in_the_hinted_prompt_alone():
    prompts = config_lib.Prompts(student=str(tiny.ASSETS / "templates" / "student.txt"), hint=HINT)
    tokenizer = load_tokenizer(tiny.ASSETS / "model")
    builder = PromptBuilder(tokenizer, prompts, config_lib.Waypoints())
    text = tokenizer.decode(builder.hinted("zib: A=241 B=310", ["551", "155"]), keep_special=True)
    assert "zib: A=241 B=310" in text and "551 155" in text
    assert "551" not in tokenizer.decode(builder.student_only("zib: A=241 B=310"))
    ours = PromptBuilder(tokenizer, config_lib.Prompts(), config_lib.Waypoints())  # the package's own template
    assert len(ours.hinted("1", "2")) > len(ours.student_only("1"))


def test_rounds_have_a_program_for_each_of_a_few_widths():
    """Whatever is drawn, under whichever prompt, it fits into shapes that follow from its width alone."""
    rng = np.random.default_rng(2)
    draw = lambda low, high: tuple(rng.integers(1, 40, rng.integers(low, high)).tolist())  # noqa: E731
    roles, limit, cfg = ("student", "privileged"), 300, config_lib.Train(batch_size=4, bucket=16, shapes=5)
    tasks = []
    for i in range(40):
        student = draw(3, 60)
        views = tuple({"student": student, "privileged": draw(20, 150)} for _ in range(1 + i % 2))
        tasks.append(online.Task(f"p{i}", views, "", draw(60, 90) if i % 3 else None))
    widths, room = online.widths_of(tasks, limit, cfg)
    assert len(widths) == 5 and widths == tuple(sorted(widths))
    shapes, needed = {}, set()
    for mean in (10, 40, 130, 1000) * 5:
        examples = []
        for task in rng.choice(np.array(tasks, object), 16):
            context = task.hint if task.hint and rng.integers(2) else task.student
            response = (1,) * int(np.clip(rng.exponential(mean), 1, limit))
            for view in task.views:
                examples.append(batches.Example("", {**view, "student": context}, response))
        assemble = batches.Assemble(examples, 16, 1, np.arange(4), roles, widths=widths, room=room)
        for chosen in np.array_split(rng.permutation(len(examples))[: len(examples) // 4 * 4], len(examples) // 4):
            batch = assemble.map(chosen)
            width = batch["student_tokens"].shape[-1]
            assert shapes.setdefault(width, {k: x.shape for k, x in batch.items()}) == {
                k: x.shape for k, x in batch.items()
            }
            needed.add(batches.pad(max(assemble.lengths["student"][chosen]), 16))
            for row, index in enumerate(chosen):
                e = examples[index]
                assert batch["mask"][0, row].sum() == len(e.response)
                for role in roles:
                    tokens, at = batch[f"{role}_tokens"][0, row], batch[f"{role}_positions"][0, row]
                    assert tokens[at >= 0].tolist() == [*e.prompts[role], *e.response]
    assert set(shapes) == set(widths) and len(needed) > 15  # without a choice


def metrics(folder):
    rows = tiny.lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    return [{k: v for k, v in row.items() if k != "time"} for row in rows if row["stage"] == "train"]


def parity(session, grader, tasks, groups):
    """A reward that no group of samples agrees in."""
    return np.array([[float(s.tokens.sum() % 2) for s in group] for group in groups])


def test_grpo_trains_evaluates_and_resumes_exactly(tmp_path, one, rows, monkeypatch):
    monkeypatch.setattr(online, "rewards_of", parity)
    changes = {"train__objective": "grpo", "data": {"path": rows, "limit": 8}, **SMALL}
    changes |= {"train__bucket": 8, "train__shapes": 2}
    path, again = (tiny.write(tmp_path / name, **changes) for name in ("whole", "again"))
    updates, make = [], step_lib.make_update
    monkeypatch.setattr(step_lib, "make_update", lambda *args: updates.append(make(*args)) or updates[-1])
    assert tiny.run("train", path) == 0
    assert updates[0]._cache_size() <= 2  # programs
    want = metrics(tmp_path / "whole")
    assert [r["step"] for r in want] == [1, 2, 3, 4] and [r["round"] for r in want] == [0, 0, 1, 1]
    assert 0 < want[0]["reward"] < want[0]["solved"] <= 1
    assert abs(want[0]["ratio"] - 1) < 1e-3 and want[0]["clipped"] == 0  # the first update is on policy
    assert want[0]["kl_base"] < 1e-6 < max(r["kl_base"] for r in want)

    wanted = Interrupt.wanted
    monkeypatch.setattr(Interrupt, "wanted", property(lambda self: True))
    assert tiny.run("train", again) == launch.STOPPED and not metrics(tmp_path / "again")  # stopped in the first round
    looks = iter([False] * 4)  # one a group: stopped after the first round
    monkeypatch.setattr(Interrupt, "wanted", property(lambda self: next(looks, True)))
    assert tiny.run("train", again) == launch.STOPPED and len(metrics(tmp_path / "again")) == 2
    monkeypatch.setattr(Interrupt, "wanted", wanted)
    assert tiny.run("train", again) == 0 and metrics(tmp_path / "again") == want
    for run in (path, again):
        assert tiny.run("export", run) == 0 and tiny.run("evaluate", run) == 0
    for file in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["objective"] == "grpo"


def test_grpo_learns_what_is_rewarded(tmp_path, one, monkeypatch):
    """Where a reward can be had at times, here for being brief, it is had ever more often."""

    def brief(session, grader, tasks, groups):
        return np.array([[float(len(s.tokens) < 72) for s in group] for group in groups])

    monkeypatch.setattr(online, "rewards_of", brief)
    changes = {
        "train__batch_size": 32,
        "train__epochs": 4,
        "train__bucket": 96,
        "train__save_every": 16,
        "train__online": {"problems": 8, "group": 8, "slots": 64, "sampling": {"max_tokens": 96}},
    }
    hard = {"path": str(tiny.ASSETS / "hard.jsonl"), "limit": 16}
    path = tiny.write(tmp_path / "r", train__objective="grpo", data=hard, **changes)
    assert tiny.run("train", path, "train.optimizer.learning_rate=1e-2") == 0
    rewards = [r["reward"] for r in metrics(tmp_path / "r")]
    assert rewards[0] < 0.65 and rewards[-1] > 0.85


def test_nurl_draws_failed_groups_again_with_a_hint(tmp_path, one, rows):
    path = tiny.write(tmp_path / "nurl", train__objective="nurl", **{**SMALL, "data": {"path": rows, "limit": 4}})
    assert tiny.run("train", path) == 0
    row = metrics(tmp_path / "nurl")[0]
    assert row["solved"] == row["hinted"] == 0.5  # the hard ones, and no other
    assert row["reward"] == 0.5 <= row["reward_with_hints"]
    assert row["ratio"] == pytest.approx(1, abs=1e-3)  # learnt under the prompt that it was drawn under


def test_hints_from_traces_are_how_they_begin(tmp_path, one, pipeline):
    path = tiny.write(
        tmp_path / "r",
        train__objective="nurl",
        traces=str(pipeline / "traces.jsonl"),
        data__limit=3,
        train__online={"problems": 4, "group": 4, "hint_tokens": 10},
    )
    config = config_lib.load(path)
    assert methods.of(config).reads_traces(config.train)
    tokenizer = load_tokenizer(tiny.ASSETS / "model")
    hints = online.hints_of(type("Session", (), {"config": config, "tokenizer": tokenizer})(), [])  # pyright: ignore
    traces = {t["problem_id"]: t for t in reversed(tiny.lines(pipeline / "traces.jsonl")) if t["drop"] is None}
    name, trace = next(iter(traces.items()))
    assert hints[name] and trace["text"].startswith(hints[name]) and len(tokenizer.encode(hints[name])) <= 10
    assert "boxed" not in hints[name]


def test_onpolicy_follows_the_privileged_student(tmp_path, one, rows):
    changes = {**SMALL, "train__batch_size": 16, "train__epochs": 16, "train__save_every": 16}
    changes["data"] = {"path": rows, "limit": 4}
    path = tiny.write(tmp_path / "own", train__objective="onpolicy", train__gamma=0.0, **changes)
    assert tiny.run("train", path, "train.optimizer.learning_rate=3e-2") == 0
    got = metrics(tmp_path / "own")
    assert len(got) == 16 and all("reward" not in r and r["excess"] > -1e-3 for r in got)
    kl = [r["kl_privileged"] for r in got]
    assert np.mean(kl[-4:]) < 0.8 * np.mean(kl[:4])


def test_online_training_wants_answers(tmp_path, one, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem_id":"a","problem":"bam: A=1 B=2","solution":"+B=3"}\n')
    assert tiny.run("train", tiny.write(tmp_path / "r", train__objective="grpo", data__path=str(path), **SMALL)) == 2
    assert f"{path}:1:answer: want an answer" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# STaR
# ---------------------------------------------------------------------------------------------------


def test_star_rationalises_only_what_the_student_fails(tmp_path, one):
    changes = {"train__objective": "star", "filters__correct": False, "data__limit": 8, "train__epochs": 1}
    path = tiny.write(tmp_path / "star", **changes)
    assert tiny.run("generate", path) == 0 and tiny.run("train", path) == 0
    traces = tiny.lines(tmp_path / "star" / "traces.jsonl")
    by_problem = {}
    for t in traces:
        by_problem.setdefault(t["problem_id"], []).append(t)
    assert len(by_problem) == 8 and all(len(x) == 2 for x in by_problem.values())
    writers = {name: {"".join(sorted(set(t["writer"]))) for t in x} for name, x in by_problem.items()}
    assert {"s"} in writers.values() and {"p"} in writers.values()  # some by the student, some with the solution
    for name, x in by_problem.items():
        if writers[name] == {"s"}:
            assert any(t["drop"] is None for t in x)
    kept = [t for t in traces if t["drop"] is None]
    rows = {r["problem_id"]: r["answer"] for r in tiny.lines(tiny.ASSETS / "train.jsonl")}
    assert kept and all(f"\\boxed{{{rows[t['problem_id']]}}}" in t["text"] for t in kept)
    assert metrics(tmp_path / "star")[0]["nll"] > 0
    assert not list((tmp_path / "star").glob("*.partial.jsonl"))
