"""Odd, damaged and hostile input that once gave a traceback, hung, or got through: one line each, or handled."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax import metrics, rundir, shapes, worker
from dail_jax.checkpoint import hf, peft
from dail_jax.data import traces
from dail_jax.errors import UserError
from dail_jax.evaluate import grading, protocol
from dail_jax.model import families
from dail_jax.report import charts, collect, page, plots
from dail_jax.stages import evaluate, pretrain

DEEP = "[" * 100_000 + "]" * 100_000
YARN = {"rope_type": "yarn", "factor": 4.0}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def one_line(words: str):
    """What is raised in the block is a UserError of one line with these words."""
    return pytest.raises(UserError, match=r"\A(?!.*\n).*" + words)


# ---------------------------------------------------------------------------------------------------
# Model folders
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ["qwen3"]}, r":model_type: model type \['qwen3'\]"),
        ({"layer_types": 3}, ":layer_types: "),
        ({"tie_word_embeddings": "no"}, ":tie_word_embeddings: got 'no', want true or false"),
        ({"hidden_size": "64"}, ":hidden_size: got '64'"),
        ({"rope_scaling": [1]}, r":rope_scaling: got \[1\]"),
        ({"rope_scaling": {"rope_type": "linear", "partial_rotary_factor": "half"}}, ":partial_rotary_factor: "),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": -4096}}, ":original_max_position_embeddings: "),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": "4k"}}, ":original_max_position_embeddings: "),
        ({"rope_scaling": {**YARN, "attention_factor": "big"}}, ":attention_factor: got 'big'"),
        ({"rope_scaling": {**YARN, "attention_factor": -1}}, ":attention_factor: got -1"),
        ({"rope_scaling": {**YARN, "truncate": "x"}}, ":truncate: got 'x'"),
        ({"rope_theta": {}}, ":rope_theta: got {}"),
    ],
)
def test_ill_typed_configs_name_their_field(tmp_path, changes, words):
    tree = json.loads((tiny.ASSETS / "model" / "config.json").read_text())
    write(tmp_path / "config.json", {**tree, **changes})
    with one_line("config.json" + words):
        families.read_config(tmp_path)


def test_yarn_s_length_is_the_model_s_unless_it_is_named(tmp_path):
    tree = json.loads((tiny.ASSETS / "model" / "config.json").read_text())
    for named, length in ((None, 512), (256, 256)):
        scaling = {**YARN, "original_max_position_embeddings": named}
        write(tmp_path / "config.json", {**tree, "max_position_embeddings": 512, "rope_scaling": scaling})
        assert families.read_config(tmp_path).layers[0].rope.original_length == length


@pytest.mark.parametrize("content", [DEEP, "3", "[]", '{"model_type": "\\ud800"}', '{"a": 1'])
def test_configs_that_are_no_object(tmp_path, content):
    write(tmp_path / "config.json", content)
    with one_line("config.json"):
        families.read_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        [],
        {},
        *({"weight_map": x} for x in (3, {"a": 3}, {"a": ["x"]}, {"a": ""}, {"a": "x" * 300}, {"a": "../x"})),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_ill_typed_indices_name_the_file(tmp_path, content):
    write(tmp_path / hf.INDEX, content)
    with one_line(hf.INDEX):
        hf.Tensors(tmp_path)


@pytest.mark.parametrize("content", [DEEP, "3", "[]", '{"r": "\\ud800"}', '{"r": 1'], ids=lambda x: repr(x)[:30])
def test_adapter_descriptions_that_are_no_object(tmp_path, content):
    write(tmp_path / "adapter_config.json", content)
    with one_line("adapter_config.json"):
        peft.read_description(tmp_path)


def test_a_fifo_is_no_weights(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with one_line("model.safetensors: cannot be read: it is not a regular file"):
        hf.Tensors(tmp_path)


# ---------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1 << 32}, "seed: got 4294967296, want less than 4294967296"),
        ({"arms": {"..": {}}}, r"arms\.\.\.: "),
        ({"arms": {".lock": {}}}, r"arms\.\.lock: "),
    ],
)
def test_seeds_and_arms_that_would_mean_another(tmp_path, changes, words):
    path = tiny.write(tmp_path / "r", **changes)
    with one_line(words):
        config_lib.load(path)


def test_halves_of_surrogate_pairs_are_no_settings(tmp_path):
    path = tiny.write(tmp_path / "r", prompts__opening="<think>\ud800")
    with one_line(r"r\.yaml:1: got half of a surrogate pair \(U\+D800\)"):
        config_lib.load(path)
    path.write_text(path.read_text().replace("\\ud800", "😀"))
    assert config_lib.load(path).prompts.opening == "<think>😀"


# ---------------------------------------------------------------------------------------------------
# Traces, journals, run.json
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[]], ":1: got a list"),
        ([{"prompt": "a", "response": "b"}, 3], ":2: got a number"),
        ([{"prompt": 3, "response": "b"}], ":1:prompt: got a number, want text"),
        ([{"prompt": "a"}], ":1:response: got null, want text"),
        ([{"prompt": "a", "response": ["b"]}], ":1:response: got a list, want text"),
        (DEEP, ":1: got a line nested too deeply"),
        ('{"prompt": "\\ud800", "response": "b"}', r":1:prompt: got half of a surrogate pair \(U\+D800\)"),
        ("", ": "),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_ill_typed_rows_of_pretraining_name_their_field(tmp_path, rows, words):
    corpus = write(tmp_path / "c.jsonl", rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
    config = config_lib.load(tiny.write_pretrain(tmp_path / "r", corpus))
    with one_line("c.jsonl" + words):
        pretrain.read(config.pretrain, config.model.tokenizer, families.from_tree(config.pretrain.architecture, "a"))


TRACE = {"problem_id": "p", "sample": 0, "response_ids": [1, 2], "text": "x", "finish": "stop"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{**TRACE, "problem_id": 3}], ":1:problem_id: "),
        ([TRACE, {**TRACE, "sample": "1"}], ":2:sample: "),
        ([{**TRACE, "response_ids": 3}], ":1:response_ids: "),
        ([{**TRACE, "response_ids": [1, -2]}], ":1:response_ids.1: "),
        ([{**TRACE, "response_ids": [True]}], ":1:response_ids.0: "),
        ([{**TRACE, "text": None}], ":1:text: got None, want text"),
        ([{**TRACE, "logq": [-1.0]}], ":1:logq: .*want one value for each of the 2 response_ids, and there are 1"),
        ([{**TRACE, "writer": "sp", "log_student": ["x", 0]}], ":1:log_student.0: got 'x', want a valid number"),
        ([{**TRACE, "writer": "sx"}], ":1:writer: got 'sx'"),
        ([{**TRACE, "prompt_hash": {"teacher": "0"}}], ":1:prompt_hash.teacher: "),
        ([{k: v for k, v in TRACE.items() if k != "finish"}], ":1:finish: missing"),
        ([TRACE, {**TRACE, "sample": 1}, TRACE], ":3: got sample 0 of problem 'p' again, want each once"),
        ([[]], ":1: got a list"),
    ],
)
def test_ill_typed_and_double_traces_name_their_row(tmp_path, rows, words):
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with one_line("t.jsonl" + words):
        traces.read(path)


@pytest.mark.parametrize(
    ("shape", "row", "words"),
    [
        (traces.Trace, {}, ":1:problem_id: missing"),
        (traces.Trace, {**TRACE, "text": 3}, ":1:text: "),
        (evaluate.DrawnSample, {"name": "n", "sample": 0, "ids": ["x"], "finish": "stop"}, ":1:ids.0: "),
        (evaluate.DrawnSample, {"name": ["n"], "sample": 0, "ids": [], "finish": "stop"}, ":1:name: "),
    ],
)
def test_ill_typed_rows_of_journals_name_their_field(tmp_path, shape, row, words):
    journal = rundir.Journal(write(tmp_path / "j.jsonl", json.dumps(row) + "\n"))
    with one_line("j.jsonl" + words):
        shapes.parse_all(journal.rows, shape, journal.path)
    journal.close()


@pytest.mark.parametrize(
    "manifest",
    [[], DEEP, {"versions": []}, {"versions": {"jax": [1]}}, {"stages": []}, {"stages": {"train": 3}}],
    ids=lambda x: repr(x)[:30],
)
def test_ill_typed_manifests_are_refused_by_the_report(tmp_path, manifest):
    write(tmp_path / "run" / "run.json", manifest)
    with one_line("run.json"):
        page.write({"run": tmp_path / "run"}, tmp_path / "report.html", "t")


def test_durations_that_cannot_be_told():
    at = "2026-01-01T10:00:00Z"
    assert page._duration({"started": at, "finished": "2026-01-01T09:59:59Z"}) == "unknown: the clock was set back"
    for finished in (None, 3, "soon", "2026-01-01T10:00:00"):
        assert page._duration({"started": at, "finished": finished}) == "unknown"
    assert page._duration({"started": at, "finished": "2026-01-01T11:01:00Z"}) == "1 h 1 min"


# ---------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------


def test_nothing_from_data_steers_the_terminal(capsys, tmp_path):
    hostile = "a\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eb\ud800\r"
    shown = r"a\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eb\ud800"
    assert str(UserError(f"got {hostile}", file="f")) == f"f: got {shown}"
    metrics.log(f"\n{hostile}\tend")
    assert capsys.readouterr().out == f"\n{shown}\\r     end\n".replace("     ", " " * (8 - len(f"{shown}\\r") % 8))
    row = {"problem_id": hostile, "problem": "What\x1b[2J?", "solution": f"x = {hostile}", "answer": "3"}
    row = json.loads(json.dumps(row).replace("\\ud800", ""))
    data = write(tmp_path / "d.jsonl", json.dumps(row) + "\n")
    assert tiny.run("waypoints", tiny.write(tmp_path / "r", data={"path": str(data)})) == 0
    out = capsys.readouterr().out
    assert "\\x1b[31mred" in out and not {"\x1b", "\x07", "\x9b", "\u202e"} & set(out)


def test_plots_take_any_name(tmp_path):
    """Dollar signs would be taken for mathematics, and what stands between them is none."""
    points = [(1, 0.5, 0.4, 0.6), (2, 0.6, 0.5, 0.7)]
    chart = charts.Chart("tau", "", r"a$\frac$b", "marked", "x", "y", [charts.Series(r"a$\frac$b", 0, points)], (0, 1))
    assert all(path.stat().st_size for path in plots.draw([chart], tmp_path))


def test_tables_in_markdown_hold_no_html():
    assert protocol.markdown_text("<img src=x>|a\\b\n&amp;") == r"\<img src=x\>\|a\\b \&amp;"


def test_short_fields_of_traces_are_clipped(tmp_path):
    long = "p" * 5000
    row = {**TRACE, "problem_id": long, "finish": long, "drop": f"{long}: {long}", "writer": "sp"}
    score = {"problem_id": long, "sample": 0, "log_ratio": [0.5, -1.0]}
    for name, content in (("traces.jsonl", row), ("token_scores.jsonl", score)):
        write(tmp_path / "run" / name, json.dumps(content) + "\n")
    _, [found] = collect.read({"run": tmp_path / "run"})
    [shown] = found.rows
    assert all(len(shown[key]) < 2 * collect.MAX_ANSWER for key in ("problem_id", "finish", "drop"))
    assert shown["push"] == [0.5, -1.0]  # the scores are still those of the trace
    assert max(map(len, [*found.finish, *found.drops])) < 2 * collect.MAX_ANSWER


# ---------------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------------


def test_a_worker_killed_while_it_starts_is_started_again(monkeypatch):
    started, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        if len(started) < worker.ATTEMPTS:
            started[-1].kill()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with grading.Grader(workers=1) as grader:
        assert grader.grade(r"\frac{2}{4}", r"\sin^2 x + \frac12 - \sin^2 x").correct
    assert len(started) == worker.ATTEMPTS
    started.clear()
    monkeypatch.setattr(worker, "ATTEMPTS", 1)
    monkeypatch.setattr(worker.Worker, "_read", lambda *_: "memory")
    with grading.Grader(workers=1) as grader, one_line(r"a worker process did not start in 1 attempts"):
        grader.grade("x + 1 + x", "2 x + 1")
