"""check: what can be refused is refused before any work, by one line for each problem, by `check` and by `run` alike."""

import collections
import json
import shutil

import jax
import pytest
import tiny
from test_commands import squeeze

from dail_jax import config as config_lib
from dail_jax import launch, metrics, provenance
from dail_jax import mesh as mesh_lib
from dail_jax.data import traces
from dail_jax.errors import UserError
from dail_jax.report import collect
from dail_jax.stages import checks, drops, experiment

USAGE = collections.namedtuple("USAGE", "total used free")


@pytest.fixture(autouse=True)
def one():
    with tiny.alone():
        yield


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count=3, **changed):
    """The first rows of the training data; `changed` replaces fields of the second."""
    found = tiny.lines(tiny.ASSETS / "train.jsonl")[:count]
    found[1] = {key: value for key, value in {**found[1], **changed}.items() if value is not None}
    return found


def model(folder, name=None, **changed):
    """A copy of the embedded model; `changed` replaces fields of its JSON file `name`."""
    shutil.copytree(tiny.ASSETS / "model", folder)
    (folder / "MANIFEST.sha256").unlink(missing_ok=True)
    if name is not None:
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**tree, **changed}))
    return folder


def larger_vocabulary(folder):
    added = json.loads((tiny.ASSETS / "model" / "tokenizer.json").read_text())["added_tokens"]
    one = {**added[-1], "id": 64, "content": "<|more|>"}
    return model(folder, "tokenizer.json", added_tokens=[*added, one])


def without_weights(folder):
    (model(folder) / "model.safetensors").unlink()
    return folder


def other_shape(folder):
    return model(folder, "config.json", intermediate_size=128)


BENCHMARKS = "evaluate.benchmarks=[{{name: mine, rows: {{path: {}}}}}]"

# What is wrong: the overrides, given an empty folder, and the error's line.
BROKEN = {
    "no data": (lambda t: ["data.path=rows.jsonl"], "rows.jsonl: no such file"),
    "column": (
        lambda t: ["data.columns.solution=proof"],
        "train.jsonl:1:proof: got no such column (there are: answer, problem, problem_id, solution), want text",
    ),
    "solution": (
        lambda t: [f"data.path={jsonl(t / 'rows.jsonl', rows(solution=''))}"],
        "rows.jsonl:2:solution: got an empty text, want text",
    ),
    "gold": (
        lambda t: [f"data.path={jsonl(t / 'rows.jsonl', rows(answer='9^{9^{9^9}}'))}"],
        "rows.jsonl:2:answer: got '9^{9^{9^9}}', want mathematics that can be read (too large)",
    ),
    "template": (lambda t: ["prompts.negative=mine.txt"], "mine.txt: no such template"),
    "model": (lambda t: ["model.path=nowhere"], "nowhere: got no such folder, want one with a model"),
    "hub": (lambda t: ["model.path=Qwen/Qwen3-8B"], "hf download Qwen/Qwen3-8B --local-dir DIR"),
    "weights": (lambda t: [f"model.path={without_weights(t / 'm')}"], "/m: no safetensors weights here"),
    "shape": (
        lambda t: [f"model.path={other_shape(t / 'm')}"],
        "model.safetensors:model.layers.0.mlp.gate_proj.weight: got shape (384, 128), want (128, 128)",
    ),
    "vocabulary": (
        lambda t: [f"model.path={larger_vocabulary(t / 'm')}"],
        "/m: got token ids up to 64, want below the model's 64 embedding rows",
    ),
    "end token": (
        lambda t: [f"model.path={model(t / 'm', 'config.json', eos_token_id=[1, 99])}"],
        "/m:eos_token_id: got the end token 99, want one below the model's 64 embedding rows",
    ),
    "suppressed": (
        lambda t: ["generate.sampling.suppress=[add add]"],
        "sampling.suppress: got 'add add', which is 4 tokens, want a single token",
    ),
    "prompts": (
        lambda t: ["generate.max_prompt_tokens=8"],
        "generate.max_prompt_tokens: got 8, and every prompt is longer: the shortest has ",
    ),
    "examples": (
        lambda t: ["train.max_tokens=16"],
        "train.max_tokens: got 16, and no problem fits: the shortest prompt",
    ),
    "mesh": (
        lambda t: ["mesh.data=16"],
        "mesh: got data=16 x fsdp=1 x tensor=1, want axis sizes whose product is the 1 devices (cpu)",
    ),
    "benchmark": (lambda t: [BENCHMARKS.format("mine.jsonl")], "mine.jsonl: no such file"),
    "no answers": (
        lambda t: [BENCHMARKS.format(jsonl(t / "mine.jsonl", rows(answer=None)))],
        "mine.jsonl:2:answer: got no such column",
    ),
    "benchmark's gold": (
        lambda t: [BENCHMARKS.format(jsonl(t / "mine.jsonl", rows(answer="9^{9^{9^9}}")))],
        "mine.jsonl:2:answer: got '9^{9^{9^9}}', want mathematics",
    ),
    "benchmark's prompts": (
        lambda t: ["evaluate.max_prompt_tokens=4", BENCHMARKS.format(jsonl(t / "mine.jsonl", rows()))],
        "evaluate.max_prompt_tokens: got 4, and every prompt of mine is longer: the shortest has ",
    ),
    "adapter": (
        lambda t: ["train.objective=none", "evaluate.adapter=mine"],
        "mine/adapter_config.json: not found: want a PEFT adapter folder",
    ),
    "form": (
        lambda t: ["evaluate.sampler=offline", "model.quantize=int8"],
        "evaluate.sampler: draws from exact weights, and model.quantize asks for int8 ones: want `engine`, or exact weights",
    ),
    "caches": (
        lambda t: ["evaluate.sampler=offline", "evaluate.kv_dtype=int8"],
        "evaluate.kv_dtype: got int8, and what draws elsewhere has settings of its own for it: want null",
    ),
    "sampler": (lambda t: ["evaluate.sampler=vllm"], "evaluate.sampler: got 'vllm', want one of engine"),
    "package": (lambda t: ["log.wandb=mine"], "log.wandb: want wandb: pip install 'dail_jax[wandb]'"),
    "arm": (lambda t: ["arms.a={train.gama: 1}"], "arms.a:train.gama: unknown key; did you mean 'gamma'?"),
    "run_dir": (
        lambda t: [f"run_dir={(t / 'f').write_text('') or t / 'f'}/run"],
        "/f: is a file, want a folder: choose another run_dir",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_one_line(tmp_path, capsys, monkeypatch, what):
    """From `check` and from `run`, with nothing written."""
    changes, line = BROKEN[what]
    path = tiny.write(tmp_path / "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    overrides = changes(tmp_path)
    found = []
    for stage in ("check", "run"):
        assert tiny.run(stage, path, *overrides) == 2
        found.append(capsys.readouterr().err)
    assert line in found[0] and found[0].count("\n") == 1 and found[0].startswith("error: ")
    assert found[0] == found[1]
    assert not (tmp_path / "run").exists()


def test_check_lists_every_problem(tmp_path, capsys):
    golds = [{**row, "answer": f"9^{{9^{{9^{i}}}}}"} for i, row in enumerate(rows(25))]
    path = tiny.write(tmp_path / "run", data__path=jsonl(tmp_path / "rows.jsonl", golds), data__limit=None)
    benchmark = BENCHMARKS.format("mine.jsonl")
    assert tiny.run("check", path, benchmark, "mesh.data=16", "prompts.expert=mine.txt") == 2
    err = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in err)
    assert [line for line in err if "rows.jsonl:" not in line] == [
        "error: mesh: got data=16 x fsdp=1 x tensor=1, want axis sizes whose product is the 1 devices (cpu)",
        "error: ... and 5 more like the 20 above",
        "error: mine.txt: no such template",
        "error: mine.jsonl: no such file",
    ]
    assert [line.split(":")[2] for line in err if "rows.jsonl:" in line] == [str(i) for i in range(1, 21)]


def test_a_sound_configuration(tmp_path, capsys):
    """What `check` looked at, and what would be done; nothing is written."""
    arms = {"base": {"train.objective": "none"}, "sft": {"train.objective": "sft"}, "dail": {}}
    path = tiny.write(tmp_path / "run", arms=arms, train__max_tokens=80)
    assert tiny.run("check", path) == 0
    out = squeeze(capsys.readouterr().out)
    assert "assets/model: qwen3, 796,032 weights" in out
    assert "devices 1 x cpu; mesh data 1 x fsdp 1 x tensor 1" in out
    assert "data 12 rows of " in out and "0 solutions cut to fit, 0 problems skipped" in out
    assert "training (sft) sft; " in out and "training (dail) dail; " in out
    assert "benchmark hard 3 problems; prompts up to " in out and "benchmark chain 3 problems; " in out
    assert "disk up to " in out and " traces " in out
    assert "next generate; base: evaluate; sft: train, export, evaluate; dail: train, export, evaluate" in out
    assert not (tmp_path / "run").exists()


def test_what_is_done_is_not_looked_at_again(tmp_path, pipeline, capsys, monkeypatch):
    shutil.copytree(pipeline, tmp_path / "run")
    path = tiny.write(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(checks, "CHECKS", {})  # there is nothing to look at
        assert tiny.run("check", path) == 0
    assert "done generate, train, export, evaluate" in squeeze(capsys.readouterr().out)
    for stage in ("check", "run"):  # before anything is done again
        assert tiny.run(stage, path, "train.gamma=0.2", "evaluate.samples=5") == 2
        err = capsys.readouterr().err.splitlines()
        for line, change in zip(err, ("train.gamma: 0.1 -> 0.2", "evaluate.samples: 4 -> 5"), strict=True):
            assert f"was started with another configuration: {change}. Use another run_dir, or delete " in line


def test_space_on_the_disk(tmp_path, capsys, monkeypatch):
    path = tiny.write(tmp_path / "run")
    for free, status in ((10_000_000, 0), (1_000_000, 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: USAGE(0, 0, free))
        assert tiny.run("check", path) == status
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'run'}: up to ") and err.count("\n") == 1
    assert "1 MB are free: free some, use another run_dir, or lower train.references_gib" in err


def test_a_platform_without_devices(tmp_path, capsys, monkeypatch):
    """JAX raises an AssertionError where it leaves out the only platform, a RuntimeError where another one fails."""
    path = tiny.write(tmp_path / "run")
    for error, words in (
        (AssertionError(), "it was not found"),
        (
            RuntimeError("Unable to initialize backend 'cuda': none (set JAX_PLATFORMS='')"),
            "Unable to initialize backend",
        ),
    ):
        monkeypatch.setattr(jax, "devices", lambda error=error: (_ for _ in ()).throw(error))
        assert tiny.run("check", path) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: JAX_PLATFORMS=cpu: no device: ") and words in err and err.count("\n") == 1
        for stage in launch.SHOWING:
            if stage != "compare":
                assert tiny.run(stage, path) == 2
                err = capsys.readouterr().err
                assert err.startswith("error: JAX_PLATFORMS=cpu: no device: ") and err.count("\n") == 1
        assert launch.main(["compare", str(path.parent)]) == 2 and "no device: " in capsys.readouterr().err


def test_accelerators_that_are_missing(monkeypatch):
    """Only where nobody has asked for the CPU."""
    assert checks._missing_accelerator(jax.devices()) is None
    monkeypatch.setattr(mesh_lib, "platforms", lambda: None)
    monkeypatch.setattr(
        provenance, "versions", lambda names: {name: "1" if name == "libtpu" else None for name in names}
    )
    want = "no TPU was found, although libtpu is installed: mend its driver, or set JAX_PLATFORMS=cpu"
    assert (checks._missing_accelerator(jax.devices()) or "").startswith(want)


def test_all_traces_dropped_is_one_line_with_the_keys(tmp_path, pipeline, capsys):
    """Training names the reason and the key; `run` stops before an evaluation that comes first."""
    path = tiny.write(tmp_path / "run", traces=str(pipeline / "traces.jsonl"))
    assert tiny.run("train", path, "filters.min_tokens=1000") == 2
    assert capsys.readouterr().err == (
        f"error: {pipeline / 'traces.jsonl'}: nothing to train on: all 24 traces are dropped: 24 short (filters.min_tokens)\n"
    )
    config = config_lib.load(path, ["train.max_tokens=40"])
    found = [trace.marked(None) for trace in traces.read(pipeline / "traces.jsonl")]
    assert drops.nothing_left([found[0].marked("wrong"), *found[1:]], 23, config) == (
        "nothing to train on: all 24 traces are dropped: 1 wrong (filters.correct), 23 above train.max_tokens=40"
    )
    base = config_lib.with_overrides(config, {"traces": None}, "test")
    traces.write(tmp_path / "run" / "traces.jsonl", [trace.marked("unfinished") for trace in found])
    experiment._refuse_empty(base, [config_lib.with_overrides(base, {"filters.correct": False}, "test")])
    with pytest.raises(UserError, match=r"24 unfinished \(filters\.finished, generate\.sampling\.max_tokens\)"):
        experiment._refuse_empty(base, [config_lib.with_overrides(base, {"train.objective": "none"}, "test"), base])


def test_other_filters_filter_the_traces_again(tmp_path, pipeline, capsys):
    """Without drawing; what was trained on others is refused, and so are traces that were drawn otherwise."""
    shutil.copytree(pipeline, tmp_path / "run")
    path, file = tiny.write(tmp_path / "run"), tmp_path / "run" / "traces.jsonl"
    before = tiny.lines(file)
    with tiny.nothing_is_drawn(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dail_jax.stages.generate.open_session", None)
        assert tiny.run("generate", path, "filters.correct=false", "filters.keep=1") == 0
        assert "24 traces of 12 problems" in capsys.readouterr().out
        assert tiny.run("generate", path, "filters.correct=false", "filters.keep=1") == 0
        assert "generate: already done" in capsys.readouterr().out
    after = tiny.lines(file)
    assert [t["drop"] for t in after] == [None, "surplus"] * 12
    assert [{**t, "drop": None} for t in after] == [{**t, "drop": None} for t in before]
    assert tiny.run("run", path, "filters.correct=false", "filters.keep=1") == 2
    err = capsys.readouterr().err
    assert (
        "`train` was started with another configuration: filters.correct: True -> False; filters.keep: 'all' -> 1"
        in err
    )
    assert tiny.run("generate", path, "generate.tau=0.5") == 2
    assert "generate.tau: 0.8 -> 0.5" in capsys.readouterr().err and tiny.lines(file) == after
    assert tiny.run("generate", path) == 0 and file.read_bytes() == (pipeline / "traces.jsonl").read_bytes()


def test_a_typo_in_the_first_call_poisons_nothing(tmp_path, pipeline, capsys):
    """Not in what is recorded, nor in what the report lists as left out."""
    folder, path = tmp_path / "run", tiny.write(tmp_path / "run", traces=str(pipeline / "traces.jsonl"))
    for typo in ("evaluate.max_prompt_tokens=3", "evaluate.benchmarks.0.rows.path=hrad.jsonl", "arms.a={seed: -1}"):
        assert tiny.run("run", path, typo) == 2
    assert not folder.exists()
    for limit in (10, 20):  # the first start of a stage skips more
        log = metrics.Metrics((folder.mkdir(exist_ok=True), folder)[1], config_lib.Log(), "evaluate")
        log.left_out(f"problems skipped: their prompts are above max_prompt_tokens={limit}", 30 // limit, 3)
        metrics.Metrics(folder, config_lib.Log(), "train").left_out("examples dropped", 1, 3)
    assert collect.left_out({"run": folder}) == [
        "run, evaluate: 1 of 3 problems skipped: their prompts are above max_prompt_tokens=20",
        "run, train: 1 of 3 examples dropped",
    ]
