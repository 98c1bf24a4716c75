"""Stages whose samples a server draws: evaluation, traces and selection; and our engine's greedy texts from another's."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import completions
import pytest
import tiny
from completions import StandIn

from dail_jax import launch
from dail_jax.data import traces
from dail_jax.sample import engine, server
from dail_jax.stages import session
from dail_jax.text import load_tokenizer


@pytest.fixture(autouse=True)
def one(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)
    with tiny.alone():
        yield


@pytest.fixture
def stand_in():
    with StandIn() as running:
        yield running


@pytest.fixture
def no_weights(monkeypatch):
    def never(*args):
        raise AssertionError("the engine or the weights were touched")

    monkeypatch.setattr(engine.Engine, "__post_init__", never)
    monkeypatch.setattr(session, "frozen", never)


HARD = [{"name": "hard", "rows": {"path": str(tiny.ASSETS / "hard.jsonl"), "limit": 3}}]


def described(folder):
    """A copy of the embedded model's folder without its weights, which only the server needs."""
    shutil.copytree(tiny.ASSETS / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "MANIFEST*"))
    return {"path": str(folder), "dtype": "float32"}


def asked(bodies, name, samples=4, seed=5):
    """How often each sample of a request was asked for."""
    seeds = {server.seed_of(seed, name, i): i for i in range(samples)}
    return collections.Counter(seeds[body["seed"]] for body in bodies if body["seed"] in seeds)


def test_evaluation(tmp_path, stand_in, no_weights, capsys):
    """Budgets and forced answers included, without weights; the verdicts are those of the texts that were drawn."""
    path = tiny.write(
        tmp_path / "run",
        model=described(tmp_path / "model"),
        train__objective="none",
        evaluate__sampler=stand_in.section(),
        evaluate__benchmarks=HARD,
        evaluate__budgets=[8, 96],
        evaluate__force={"text": "\n\\boxed{", "max_tokens": 6},
    )
    stand_in.faults = {2: "drop", 5: 503}
    assert tiny.run("evaluate", path) == 0
    rows = tiny.lines(tmp_path / "run" / "samples.jsonl")
    assert len(rows) == 3 * 4 * 2 and {r["finish"] for r in rows} == {"stop", "forced"}
    tokenizer = load_tokenizer(tiny.ASSETS / "model")
    problems = {r["problem_id"]: r["problem"] for r in tiny.lines(tiny.ASSETS / "hard.jsonl")}
    for row in rows:
        prompt = tokenizer.render([{"role": "user", "content": problems[row["problem_id"]]}])
        name = f"evaluate/hard/{row['problem_id']}"
        body = {"prompt": prompt, "seed": server.seed_of(5, name, row["sample"]), "max_tokens": 96}
        ids = completions.reply(tokenizer, body)[: row["budget"]]
        kept = ids[:-1] if ids[-1] == tokenizer.eos_id else ids
        assert row["text"] == tokenizer.decode(kept) and row["tokens"] == len(ids)
        if row["finish"] == "forced":  # what was kept, continued
            name = f"force/{len(kept)}/{name}/{row['sample']}"
            body = {"prompt": [*prompt, *kept, *tokenizer.encode("\n\\boxed{")], "max_tokens": 6}
            body["seed"] = server.seed_of(5, name, 0)
            assert body["prompt"] in [one["prompt"] for one in stand_in.bodies]
            forced = completions.reply(tokenizer, body)
            assert row["forced_tokens"] == len(forced)
            assert row["forced_text"] == "\n\\boxed{" + tokenizer.decode(forced)
    figures = [r for r in tiny.lines(tmp_path / "run" / "metrics.jsonl") if "responses" in r]
    assert [(r["responses"], r["repeated"]) for r in figures] == [(12, 2)]
    assert tiny.run("evaluate", path, f"evaluate.sampler.url={stand_in.url}/", "evaluate.sampler.concurrency=9") == 0
    assert "already done" in capsys.readouterr().out  # another place decides nothing, and another model does
    assert tiny.run("evaluate", path, "evaluate.sampler.model=yours") == 2
    assert "evaluate.sampler.model: 'mine' -> 'yours'" in capsys.readouterr().err


def test_killed_and_stopped_and_resumed(tmp_path, stand_in):
    """Every start asks for what is missing and for nothing else."""
    cfg = {"train__objective": "none", "evaluate__benchmarks": HARD, "evaluate__samples": 12}
    path = tiny.write(tmp_path / "run", evaluate__sampler=stand_in.section(), **cfg)
    journal = tmp_path / "run" / "samples.partial.jsonl"
    names = [f"evaluate/hard/{row['problem_id']}" for row in tiny.lines(tiny.ASSETS / "hard.jsonl")[:3]]

    def resume(status):
        """Starts again; returns how many samples there are then."""
        kept = {(row["name"], row["sample"]) for row in tiny.lines(journal)}
        before = len(stand_in.bodies)
        assert tiny.run("evaluate", path) == status
        for name in names:
            missing = {i for i in range(12) if (name, i) not in kept}
            counts = asked(stand_in.bodies[before:], name, 12)
            assert counts.keys() <= missing and set(counts.values()) <= {1}
            assert status or counts.keys() == missing
        return len(kept)

    stand_in.pause = 0.1
    process = tiny.start("evaluate", path)
    tiny.wait_for(journal, 5, process)
    process.kill()
    assert tiny.finish(process)[0] == -9
    whole = stand_in.reply

    def stop(tokenizer, body):  # this process is told, once, to end in the middle of its work
        with stand_in.lock:
            due = stand_in.reply is stop and len(stand_in.bodies) >= stopped_at
            stand_in.reply = whole if due else stand_in.reply
        if due:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(tokenizer, body)

    stand_in.pause, stand_in.reply, stopped_at = 0.01, stop, len(stand_in.bodies) + 8
    killed_with = resume(launch.STOPPED)
    stopped_with = resume(0)
    assert 5 <= killed_with < stopped_with < 36
    # what was killed and stopped is what is drawn at once
    assert tiny.run("evaluate", tiny.write(tmp_path / "other", evaluate__sampler=stand_in.section(), **cfg)) == 0
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (tmp_path / "other" / "samples.jsonl").read_text()


def test_a_server_that_fails_keeps_what_was_drawn(tmp_path, stand_in, capsys):
    path = tiny.write(
        tmp_path / "run",
        train__objective="none",
        evaluate__benchmarks=HARD,
        evaluate__sampler=stand_in.section(retries=1, concurrency=1),
    )
    stand_in.faults = {7: 500, 8: "no JSON"}
    assert tiny.run("evaluate", path) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {stand_in.url}:sample 3 of evaluate/hard/") and err.count("\n") == 1
    assert "it sent no JSON: 'no JSON', and so 2 times; what was drawn is kept: call again" in err
    assert len(tiny.lines(tmp_path / "run" / "samples.partial.jsonl")) == 7
    assert tiny.run("evaluate", path) == 0
    assert len(stand_in.bodies) == 9 + 5


@pytest.mark.parametrize(("tau", "scores"), [(0, True), (1, True), (1, False)])
def test_traces(tmp_path, stand_in, no_weights, tau, scores):
    """Of one role alone: with its log-probabilities, or with none."""
    stand_in.scores = scores
    path = tiny.write(
        tmp_path / "run",
        model=described(tmp_path / "model"),
        data__limit=3,
        generate__tau=tau,
        generate__sampler=stand_in.section(),
        filters__correct=False,
    )
    assert tiny.run("generate", path) == 0
    role, other = ("privileged", "student") if tau else ("student", "privileged")
    found = traces.read(tmp_path / "run" / "traces.jsonl")
    assert len(found) == 6 == len({(t.problem_id, t.sample) for t in found})
    for t in found:
        assert t.prompt_hash.keys() == {role} and t.writer == role[0] * len(t.response_ids)
        assert t.acceptance == 1 - tau and getattr(t, f"log_{other}") is None
        expected = tuple(-round(0.5 + i / 64, 4) for i in t.response_ids) if scores else None
        assert t.logq == getattr(t, f"log_{role}") == (pytest.approx(expected, abs=1e-4) if scores else None)
    sent = {traces.prompt_hash(body["prompt"]) for body in stand_in.bodies}
    assert sent == {t.prompt_hash[role] for t in found} and len(sent) == 3


def test_a_server_writes_for_one_role_alone(tmp_path, capsys, stand_in):
    path = tiny.write(tmp_path / "run", generate__tau=1, generate__sampler=stand_in.section())
    assert tiny.run("generate", path, "generate.tau=0.8") == 2
    assert "generate: a server draws for one role alone" in capsys.readouterr().err
    assert tiny.run("calibrate", path) == 2
    assert (
        "a server draws for one role alone, without the other's probabilities: want tau 0 or 1"
        in capsys.readouterr().err
    )
    assert tiny.run("generate", path, "generate.sampler=vllm") == 2
    assert "generate.sampler: got 'vllm', want engine, or the url and the model of a server" in capsys.readouterr().err
    assert not stand_in.bodies


def test_selection(tmp_path, stand_in, no_weights):
    stand_in.reply = lambda tokenizer, body: [*tokenizer.encode("\\boxed{000}"), tokenizer.eos_id]
    path = tiny.write(
        tmp_path / "run",
        model=described(tmp_path / "model"),
        data__limit=4,
        evaluate__sampler=stand_in.section(),
        evaluate__samples=2,
    )
    assert tiny.run("select", path) == 0
    assert len(stand_in.bodies) == 8 and len(tiny.lines(tmp_path / "run" / "selected.jsonl")) == 4


def test_check_looks_at_the_server(tmp_path, stand_in, capsys):
    path = tiny.write(tmp_path / "run", evaluate__sampler=stand_in.section(), evaluate__benchmarks=HARD)
    untrained = "train.objective=none"
    assert tiny.run("check", path, untrained) == 0
    assert f"{stand_in.url}: mine, 4,096 tokens of context" in "".join(capsys.readouterr().out.split("\n"))
    for change, line in {
        "evaluate.sampler.model=yours": f"error: {stand_in.url}: has no model 'yours', only mine",
        "evaluate.sampler.url=localhost:8000": "evaluate.sampler.url: got 'localhost:8000', want where an API begins",
        "evaluate.sampler.key_variable=NO_SUCH": "want an API key in the environment variable NO_SUCH",
        "evaluate.sampling.max_tokens=4090": "tokens, and the server's context 4096: serve a longer one, or lower",
    }.items():
        for stage in ("check", "evaluate"):
            assert tiny.run(stage, path, untrained, change) == 2
            err = capsys.readouterr().err
            assert line in err and err.count("\n") == 1, err
    # An adapter that is yet to be trained cannot be served: `run` trains and exports first.
    stand_in.models = []
    assert tiny.run("check", path) == 0
    assert "is asked for mine once the adapter has been exported" in " ".join(capsys.readouterr().out.split())
    assert tiny.run("check", path, untrained) == 2
    assert "has no model 'mine', only none at all" in capsys.readouterr().err
    assert not stand_in.bodies and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------
# A real server
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    """transformers' own server, which takes text alone, with the embedded model in a cache as the hub would fill it."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--tiny--world"
    shutil.copytree(tiny.ASSETS / "model", repository / "snapshots" / "0")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    port = tiny.free_port()
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32"], env=environment, stdout=log, stderr=log
        )
    try:
        for _ in range(1800):
            assert process.poll() is None, (home / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        yield {"url": f"http://127.0.0.1:{port}/v1", "model": "tiny/world", "prompts": "text", "concurrency": 2}
    finally:
        process.terminate()
        process.wait()


def test_the_greedy_texts_of_a_real_server_are_our_engines(tmp_path, transformers_serve):
    """Every text, its length and its verdict: rendered here, sent as text, and tokenised again."""
    rows, results = {}, {}
    greedy = {"evaluate__samples": 1, "evaluate__sampling__temperature": 0.0, "train__objective": "none"}
    for name, sampler in (("ours", "engine"), ("theirs", transformers_serve)):
        path = tiny.write(tmp_path / name, evaluate__sampler=sampler, **greedy)
        assert tiny.run("evaluate", path) == 0
        rows[name] = tiny.lines(tmp_path / name / "samples.jsonl")
        results[name] = json.loads((tmp_path / name / "results.json").read_text())["benchmarks"]
    assert rows["ours"] == rows["theirs"] and len(rows["ours"]) == 6
    assert results["ours"] == results["theirs"]
    figures = [r for r in tiny.lines(tmp_path / "theirs" / "metrics.jsonl") if "responses" in r]
    assert [(r["responses"], r["repeated"], r["retokenised"]) for r in figures] == [(6, 0, 6)]
