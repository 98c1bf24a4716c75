"""Samples that are drawn offline, by the script that `export` writes; transformers and peft stand in for vLLM."""

import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax.errors import UserError, Waiting
from dail_jax.rundir import RunDir
from dail_jax.sample.sampler import Request
from dail_jax.sample.server import seed_of
from dail_jax.stages import experiment, export, offline
from dail_jax.stages.session import open_session


@pytest.fixture(autouse=True)
def one():
    with tiny.alone():
        yield


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in as the module `vllm`."""
    import torch

    monkeypatch.syspath_prepend(str(tiny.ROOT / "tests" / "vllm_stand_in"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for each other, the model is so small
    import vllm  # pyright: ignore[reportMissingImports]

    vllm.CALLS.clear()
    yield vllm
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


FORCING = {
    "evaluate__samples": 1,
    "evaluate__sampling__temperature": 0.0,
    "evaluate__budgets": [24, 96],
    "evaluate__force": {"text": "\n\\boxed{", "max_tokens": 6},
}


def trained(folder, pipeline, **changes):
    """The configuration of a run that has trained and exported, and whose evaluation is to be drawn."""
    shutil.copytree(pipeline, folder)
    for name in ("samples.jsonl", "results.json"):
        (folder / name).unlink()
    return tiny.write(folder, **FORCING, **changes)


def test_another_engine_draws_what_ours_draws(tmp_path, pipeline, vllm, capsys):
    """The adapter, budgets and forced answers: all rows are equal. The script is called once more for forced answers."""
    path = trained(tmp_path / "run", pipeline, evaluate__sampler="offline")
    folder = tmp_path / "run" / "vllm"
    drawn, script = folder / "drawn.jsonl", folder / "draw.py"
    assert tiny.run("export", path) == 0
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["adapter"] == "../adapter" and settings["max_lora_rank"] == 8 and settings["stop_token_ids"] == [1]
    requests = tiny.lines(folder / "requests.jsonl")
    assert len(requests) == 6 and {r["limit"] for r in requests} == {96}
    assert requests[0]["seeds"] == [seed_of(5, requests[0]["name"], 0)]
    assert tiny.run("evaluate", path) == 2
    err = capsys.readouterr().err
    assert f"drawn.jsonl: 6 of 6 samples are still to be drawn: python {script}, then call again\n" in err
    assert err.count("\n") == 1

    script.write_text(script.read_text().replace("BATCH = 1024", "BATCH = 4"))  # as people do
    assert tiny.run("export", path) == 0 and "BATCH = 4" in script.read_text()
    runpy.run_path(str(script), run_name="__main__")
    assert vllm.CALLS == [4, 2]
    drawn.write_bytes(drawn.read_bytes()[:-9])  # it was interrupted
    runpy.run_path(str(script), run_name="__main__")
    assert vllm.CALLS == [4, 2, 1] and len(tiny.lines(drawn)) == 6
    taken = shutil.copy(drawn, tmp_path / "elsewhere.jsonl")
    assert tiny.run("grade", path, "--import", str(taken)) == 2
    count = len(tiny.lines(folder / "forced.jsonl"))
    assert f"{count} of {count} forced answers are still to be drawn" in capsys.readouterr().err and count >= 6
    runpy.run_path(str(script), run_name="__main__")
    assert sum(vllm.CALLS[3:]) == count
    assert tiny.run("grade", path, "--import", str(drawn)) == 0
    assert [r["imported"] for r in tiny.lines(tmp_path / "run" / "metrics.jsonl") if "imported" in r] == [6]

    other = trained(tmp_path / "other", pipeline)
    assert tiny.run("evaluate", other) == 0
    ours = tiny.lines(tmp_path / "other" / "samples.jsonl")
    assert tiny.lines(tmp_path / "run" / "samples.jsonl") == ours
    assert sum(row["finish"] == "forced" for row in ours) >= count
    assert tiny.run("evaluate", path) == 0  # nothing is left to do
    assert tiny.run("grade", path, "--import", str(drawn)) == 2
    assert "there are samples: use another run_dir, or delete them to import others" in capsys.readouterr().err


def test_what_is_imported_says_so(tmp_path, capsys):
    path = tiny.write(tmp_path / "run", train__objective="none")
    assert tiny.run("grade", path, "--import", "drawn.jsonl") == 2
    assert "evaluate.sampler: want offline, so that the run's record says who drew" in capsys.readouterr().err
    assert tiny.run("grade", path, "--import", "drawn.jsonl", "evaluate.sampler=offline") == 2
    assert "drawn.jsonl: no such file" in capsys.readouterr().err
    arms = "arms={a: {seed: 1}}"
    assert tiny.run("grade", path, "--import", "drawn.jsonl", "evaluate.sampler=offline", arms) == 2
    assert "arms: each arm has samples of its own: call `run`, which finds them" in capsys.readouterr().err


REQUESTS = [Request("evaluate/a", ((3, 9, 4),), (0, 1), 5), Request("evaluate/b", ((3, 4),), (0, 1), 5)]
ROWS = {
    ("evaluate/a", 0): [7, 8, 1],
    ("evaluate/a", 1): [7, 8, 9, 9, 9],
    ("evaluate/b", 0): [1],
    ("evaluate/b", 1): [9, 9, 9, 9, 1],
}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """(the session, the run directory) of an untrained model."""
    path = tiny.write(tmp_path_factory.mktemp("offline") / "run", train__objective="none", evaluate__sampler="offline")
    with tiny.alone():
        config = config_lib.load(path)
        with RunDir(config) as run_dir:
            yield open_session(config), run_dir


DAMAGE = {
    "settings": (dict(settings="0"), "settings: got a sample drawn with another model, adapter, seed or sampling"),
    "prompt": (dict(prompt_hash="0"), "prompt_hash: got a sample drawn from another prompt"),
    "twice": (dict(sample=0), "sample: got a sample number 0, want each of 2 once"),
    "one more": (dict(sample=2), "sample: got a sample number 2, want each of 2 once"),
    "too long": (dict(ids=[9] * 6), "ids: got a sample of 6 tokens that ended with 'length', want at most 5"),
    "too short": (dict(ids=[9] * 4), "ids: got a sample of 4 tokens that ended with 'length'"),
    "no end": (dict(finish="stop"), "ids: got a sample that ended with 'stop', want an end token (1) last"),
    "an end inside": (dict(ids=[7, 1, 9, 9, 9]), "ids: got a sample that ended with 'length', want an end token"),
    "vocabulary": (dict(ids=[7, 8, 9, 9, 64]), "ids: got a sample with the token id 64, want ids below"),
    "empty": (dict(ids=[]), "ids: got [], "),
    "aborted": (dict(finish="abort"), "finish: got 'abort', want 'stop' or 'length'"),
}


@pytest.mark.parametrize("what", [None, *DAMAGE])
def test_what_is_imported_is_compared_with_what_was_asked_for(untrained, tmp_path, what):
    session, run_dir = untrained
    sampler = offline.opened(session, run_dir, tmp_path / "drawn.jsonl")(5)
    offline.write(run_dir.path / "vllm", sampler.settings, REQUESTS, offline.REQUESTS)
    rows = []
    for request in tiny.lines(run_dir.path / "vllm" / "requests.jsonl"):
        for i in range(len(request["seeds"])):
            ids = ROWS[request["name"], i]
            one = dict(name=request["name"], sample=i, prompt_hash=request["prompt_hash"], ids=ids)
            rows.append({**one, "settings": sampler.settings["hash"], "finish": "stop" if ids[-1] == 1 else "length"})
    if what:
        rows[1].update(DAMAGE[what][0])
    (tmp_path / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if what:
        with pytest.raises(UserError) as error:
            list(sampler.run(REQUESTS))
        assert str(error.value).startswith(f"{tmp_path / 'drawn.jsonl'}:2:{DAMAGE[what][1]}"), str(error.value)
        return
    found = list(sampler.run(REQUESTS))
    assert {(s.name, s.sample): s.tokens.tolist() for s in found} == ROWS
    assert all(s.finish == ("stop" if s.tokens[-1] == 1 else "length") for s in found)
    assert isinstance(found[0].tokens, np.ndarray) and sampler.figures() == {"imported": 4}
    (tmp_path / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(Waiting, match="1 of 4 samples are still to be drawn"):
        list(sampler.run(REQUESTS))


def test_an_arm_that_waits_holds_up_no_other(tmp_path, monkeypatch, capsys):
    done = []
    for name in ("generate", "train", "export", "report"):
        monkeypatch.setattr(getattr(experiment, name), "run", lambda config, name=name, **_: done.append(name))

    def evaluate(config, table):
        if config.seed == 1:
            raise Waiting("its samples are still to be drawn", file=config.run_dir)
        done.append("evaluate")

    monkeypatch.setattr(experiment.evaluate, "run", evaluate)
    arms = {name: {"train.objective": "sft", "seed": seed} for name, seed in (("a", 1), ("b", 2), ("c", 1))}
    assert tiny.run("run", tiny.write(tmp_path / "run", arms=arms)) == 2
    assert done == ["train", "export", "train", "export", "evaluate", "train", "export"]
    assert capsys.readouterr().err == "".join(
        f"error: {tmp_path / 'run' / arm}: its samples are still to be drawn\n" for arm in "ac"
    )


def test_an_untrained_model_has_a_script_as_well(tmp_path):
    path = tiny.write(tmp_path / "run", train__objective="none", evaluate__sampler="offline")
    export.run(config_lib.load(path))
    settings = json.loads((tmp_path / "run" / "vllm" / "settings.json").read_text())
    assert settings["adapter"] is settings["max_lora_rank"] is None
    assert len(tiny.lines(tmp_path / "run" / "vllm" / "requests.jsonl")) == 6
