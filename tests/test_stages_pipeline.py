"""All stages on the embedded micro-world: what they write, that they end once, and the arms of an experiment."""

import json
import re

import numpy as np
import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax import launch
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint.store import Store, damaged
from dail_jax.evaluate import passk
from dail_jax.text import load_tokenizer


@pytest.fixture(autouse=True)
def one():
    with tiny.alone():
        yield


def test_the_run_directory_has_everything(pipeline):
    names = {p.name for p in pipeline.iterdir()}
    assert {
        "config.yaml",
        "run.json",
        "traces.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "samples.jsonl",
        "results.json",
        "report.html",
        "plots",
    } <= names
    assert not [name for name in names if ".partial" in name or name.endswith(".tmp")]
    manifest = json.loads((pipeline / "run.json").read_text())
    assert all("finished" in manifest["stages"][s] for s in ("generate", "train", "evaluate", "export"))
    assert manifest["versions"]["jax"] and manifest["platform"] == "cpu" and manifest["seed"] == 5
    assert config_lib.load(pipeline / "config.yaml") == config_lib.load(f"{pipeline}.yaml")
    page = (pipeline / "report.html").read_text()
    assert "<html" in page and not re.search(r'(src|href)="https?://', page)  # self-contained


def test_what_a_run_writes_is_documented(pipeline):
    """Every file of a run directory, every key of run.json and every metric, in docs/run_directory.md."""

    def documented(title: str) -> set[str]:
        text = (tiny.ROOT / "docs" / "run_directory.md").read_text()
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        return {name.rstrip("/") for name in re.findall(r"`([^`]+)`", section)}

    assert {path.name for path in pipeline.iterdir()} <= documented("The files")
    manifest, keys = json.loads((pipeline / "run.json").read_text()), documented("run.json")
    assert manifest.keys() <= keys
    assert all(record.keys() <= keys for record in manifest["stages"].values())
    known = documented("metrics.jsonl")
    for row in tiny.lines(pipeline / "metrics.jsonl"):
        assert row["stage"] in known and row.keys() <= known


def test_traces(pipeline):
    traces = tiny.lines(pipeline / "traces.jsonl")
    rows = tiny.lines(tiny.ASSETS / "train.jsonl")[:12]
    assert [(t["problem_id"], t["row"], t["sample"]) for t in traces] == [
        (row["problem_id"], i, s) for i, row in enumerate(rows) for s in (0, 1)
    ]
    tokenizer = load_tokenizer(tiny.ASSETS / "model")
    for t in traces:
        assert list(t) == ["problem_id", "row", "sample", "prompt_hash", "prompt_tokens", "response_ids", "text"] + [
            "logq",
            "log_student",
            "log_privileged",
            "writer",
            "acceptance",
            "finish",
            "drop",
        ]
        n = len(t["response_ids"])
        assert 0 < n <= 96 and all(len(t[k]) == n for k in ("logq", "log_student", "log_privileged", "writer"))
        assert max(t["logq"]) <= 0 and max(t["log_student"]) <= 0 and max(t["log_privileged"]) <= 0
        assert set(t["writer"]) <= {"s", "p"} and t["acceptance"] == round(t["writer"].count("s") / n, 4)
        assert t["finish"] == ("stop" if t["response_ids"][-1] == tokenizer.eos_id else "length")
        assert t["text"] == tokenizer.decode(t["response_ids"])
        assert t["prompt_hash"].keys() == t["prompt_tokens"].keys() == {"student", "privileged"}
        assert all(re.fullmatch("[0-9a-f]{16}", h) for h in t["prompt_hash"].values())
        assert t["prompt_tokens"]["privileged"] > t["prompt_tokens"]["student"]
        # a token of the student's was accepted: the privileged student gave it at least tau
        accepted = [p for p, w in zip(t["log_privileged"], t["writer"], strict=True) if w == "s"]
        assert min(accepted) >= np.log(0.8) - 1e-4
        answer = rows[t["row"]]["answer"]
        assert t["drop"] == (None if f"\\boxed{{{answer}}}" in t["text"] else "wrong")
    assert sum(t["drop"] is None for t in traces) >= 20  # the privileged student reads the solution
    assert len({t["text"] for t in traces}) > 12


def test_training(pipeline):
    rows = [r for r in tiny.lines(pipeline / "metrics.jsonl") if r["stage"] == "train"]
    assert [r["step"] for r in rows] == list(range(1, tiny.UPDATES + 1))
    wanted = {"loss", "kl_privileged", "kl_negative", "excess", "grad_norm", "learning_rate", "tokens", "time", "epoch"}
    assert wanted <= rows[0].keys()
    for r in rows:
        assert r["loss"] == pytest.approx(r["kl_privileged"] - 0.1 * r["kl_negative"], rel=1e-5) and r["excess"] >= 0
    kept = [t for t in tiny.lines(pipeline / "traces.jsonl") if t["drop"] is None]
    assert sum(r["tokens"] for r in rows[:3]) == sum(len(t["response_ids"]) for t in kept)  # one epoch
    assert np.mean([r["excess"] for r in rows[3:]]) < np.mean([r["excess"] for r in rows[:3]])
    store = Store(pipeline / "checkpoints", 2)
    assert store.steps() == [4, 6] and not (pipeline / "checkpoints" / "trash").exists()
    assert all(damaged(pipeline / "checkpoints", step) is None for step in store.steps())
    store.close()


def test_every_stage_counts_what_it_leaves_out(pipeline):
    rows = [r for r in tiny.lines(pipeline / "metrics.jsonl") if r["stage"] == "left out"]
    counts = {(r["by"], r["what"]): (r["count"], r["of"]) for r in rows}
    kept = sum(t["drop"] is None for t in tiny.lines(pipeline / "traces.jsonl"))
    unread = "skipped: their gold answers cannot be graded against"
    assert counts == {
        ("generate", "solutions cut to fit"): (0, 12),
        ("generate", "problems skipped: their prompts are above max_prompt_tokens=4096"): (0, 12),
        ("train", "examples dropped: prompt and response are above train.max_tokens=192"): (0, kept),
        **{("evaluate", f"problems of {name} {unread}"): (0, 3) for name in ("hard", "chain")},
        **{
            ("evaluate", f"problems of {name} skipped: their prompts are above max_prompt_tokens=4096"): (0, 3)
            for name in ("hard", "chain")
        },
    }


def test_evaluation(pipeline):
    samples = tiny.lines(pipeline / "samples.jsonl")
    assert len(samples) == 2 * 3 * 4
    for s in samples:
        assert list(s) == [
            "benchmark",
            "problem_id",
            "sample",
            "budget",
            "tokens",
            "answer_tokens",
            "forced_tokens",
            "text",
            "forced_text",
            "answer",
            "gold",
            "finish",
            "correct",
            "reason",
            "vote",
        ]
        assert s["budget"] == 96 and s["tokens"] <= 96 and s["forced_tokens"] == 0 and s["forced_text"] is None
        assert s["correct"] == (s["answer"] is not None and s["answer"].zfill(3) == s["gold"].zfill(3))
        assert s["finish"] in ("stop", "length") and (s["answer"] is None) == (s["reason"] == "no answer")
    results = json.loads((pipeline / "results.json").read_text())
    assert results["arm"] == "run" and results["objective"] == "dail"
    assert list(results["benchmarks"]) == ["hard", "chain"]
    for name, budgets in results["benchmarks"].items():
        cell = budgets["96"]
        mine = [s for s in samples if s["benchmark"] == name]
        right = [sum(s["correct"] for s in mine if s["problem_id"] == p) for p in cell["per_problem"]]
        assert list(cell["per_problem"].values()) == [[c, 4] for c in right]
        assert cell["problems"] == 3 and cell["samples"] == 4 and cell["forced"] == 0.0
        for k in ("1", "2", "4"):
            want = np.mean(passk.pass_at_k(4, np.array(right), int(k)))
            assert cell["pass@k"][k]["mean"] == pytest.approx(want, abs=1e-6)
            assert cell["pass@k"][k]["low"] <= cell["pass@k"][k]["mean"] <= cell["pass@k"][k]["high"]
            assert cell["maj@k"][k].keys() == {"mean", "low", "high"}
        assert cell["mean_tokens"] == pytest.approx(np.mean([s["tokens"] for s in mine]), abs=1e-6)
        assert cell["median_tokens"] == np.median([s["tokens"] for s in mine])


def test_a_second_call_says_done_and_changes_nothing(pipeline, capsys):
    files = [p for p in pipeline.rglob("*") if p.suffix in (".json", ".jsonl", ".safetensors")]
    before = {p: p.read_bytes() for p in files}
    for stage in tiny.STAGES[:4]:
        assert tiny.run(stage, f"{pipeline}.yaml") == 0
        assert f"{stage}: already done, see {pipeline}" in capsys.readouterr().out
    assert all(p.read_bytes() == data for p, data in before.items())


def test_a_changed_configuration_is_refused_in_one_line(pipeline, capsys):
    for stage, override, line in (
        ("generate", "generate.tau=0.5", "generate.tau: 0.8 -> 0.5. "),
        ("train", "train.gamma=0.2", "train.gamma: 0.1 -> 0.2. "),
        ("generate", "data.limit=11", "data.limit: 12 -> 11; data.path: the contents of "),
    ):
        line = f"stage `{stage}` was started with another configuration: {line}"
        assert tiny.run(stage, f"{pipeline}.yaml", override) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {pipeline}: ") and line in err and err.count("\n") == 1


def test_arms_share_traces(pipeline, capsys):
    """Untrained, SFT and NLL beside DAIL, each in its own folder, on the run's own traces."""
    arms = "{base: {train.objective: none}, sft: {train.objective: sft}, nll: {train.objective: nll}}"
    assert tiny.run("run", f"{pipeline}.yaml", f"arms={arms}") == 0
    out = capsys.readouterr().out
    assert "generate: already done" in out and "train: nothing to train" in out and "export: nothing to export" in out
    for arm in ("base", "sft", "nll"):
        results = json.loads((pipeline / arm / "results.json").read_text())
        assert results["arm"] == arm and results["benchmarks"]["hard"]["96"]["problems"] == 3
        assert (pipeline / arm / "adapter").exists() == (arm != "base")
    assert not (pipeline / "nll" / "traces.jsonl").exists()
    sft, nll = (tiny.lines(pipeline / arm / "metrics.jsonl") for arm in ("sft", "nll"))
    first = {arm: next(r for r in rows if r["stage"] == "train") for arm, rows in (("sft", sft), ("nll", nll))}
    # the model writes its own traces readily, and experts' solutions not at all
    assert first["nll"]["loss"] < 1 < first["sft"]["loss"]
    assert "kl_negative" not in first["nll"]
    table = (pipeline / "results.md").read_text()
    assert all(f" {arm} " in table for arm in ("base", "sft", "nll"))


def test_stages_want_what_comes_before(tmp_path, capsys):
    path = tiny.write(tmp_path / "r")
    for stage, want in (
        ("train", f"{tmp_path}/r/traces.jsonl: no traces yet: run the stage `generate` first"),
        ("evaluate", f"{tmp_path}/r/checkpoints: not finished: run the stage `train` first"),
        ("export", f"{tmp_path}/r/checkpoints: not finished: run the stage `train` first"),
    ):
        assert tiny.run(stage, path) == 2
        assert capsys.readouterr().err == f"error: {want}\n"


def test_bad_traces_and_rows_are_refused_before_any_work(tmp_path, pipeline, capsys):
    good = (pipeline / "traces.jsonl").read_text().splitlines()

    def with_first(token) -> str:
        row = json.loads(good[1])
        return json.dumps({**row, "response_ids": [token, *row["response_ids"][1:]]})

    wrong = {
        "{": "got a line that is not JSON",
        with_first(64): "response_ids: got a token id at or above the model's vocabulary of 64",
        with_first("x"): "response_ids.0: got 'x', want a valid integer",
    }
    traces = tmp_path / "t.jsonl"
    for i, (line, words) in enumerate(wrong.items()):
        traces.write_text("\n".join([good[0], line, *good[2:]]) + "\n")
        path = tiny.write(tmp_path / f"r{i}", traces=str(traces), filters__correct=False)
        assert tiny.run("train", path) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {traces}:2:") and words in err
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem_id":"a","problem":"x","solution":"y","answer":"\\\\frac{"}\n')
    assert tiny.run("generate", tiny.write(tmp_path / "g", data__path=str(rows))) == 2
    assert capsys.readouterr().err.startswith(f"error: {rows}:1:answer: got ")
    assert not (tmp_path / "g").exists()


def test_rows_that_do_not_divide_are_refused(tmp_path, pipeline, capsys, monkeypatch):
    monkeypatch.setattr(mesh_lib, "make_mesh", mesh_lib.make_mesh.func)  # all eight fake devices
    path = tiny.write(tmp_path / "r", traces=str(pipeline / "traces.jsonl"), train__batch_size=12)
    assert tiny.run("train", path) == 2
    assert "train.batch_size: got 12 rows per step, want a multiple of the 8 devices" in capsys.readouterr().err


def test_own_data_is_evaluated_on_what_was_held_out(tmp_path):
    """The preset, with what the tiny model needs: no problem is both trained and evaluated on."""
    changes = tiny.tree(tmp_path / "run")
    sections = {name: changes[name] for name in ("run_dir", "model", "prompts", "generate")}
    tiny_train = {**changes["train"], "epochs": 1}
    tiny_evaluate = {**changes["evaluate"], "samples": 2, "budgets": [96], "benchmarks": None}
    del tiny_evaluate["benchmarks"]
    over = tmp_path / "over.yaml"
    rows = {"path": str(tiny.ASSETS / "train.jsonl"), "limit": 12, "hold_out": {"rows": 3}}
    over.write_text(json.dumps({**sections, "data": rows, "train": tiny_train, "evaluate": tiny_evaluate}))
    command = [
        "run",
        "own_data",
        "--config",
        str(over),
        "arms.base=null",
        "evaluate.force=null",
        "filters.correct=false",
    ]
    assert launch.main(command) == 0
    trained = {trace["problem_id"] for trace in tiny.lines(tmp_path / "run" / "traces.jsonl")}
    evaluated = {sample["problem_id"] for sample in tiny.lines(tmp_path / "run" / "dail" / "samples.jsonl")}
    assert (len(trained), len(evaluated)) == (9, 3) and not trained & evaluated
