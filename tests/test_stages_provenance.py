"""What outputs were made of: other settings, replaced inputs and damaged outputs are refused by name, or mended."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_stages_resume import stop_after

from dail_jax import launch, provenance, rundir
from dail_jax.checkpoint import hf, peft, store
from dail_jax.checkpoint.store import Store
from dail_jax.stages import export as export_stage
from dail_jax.stages import session


@pytest.fixture(autouse=True)
def one():
    with tiny.alone():
        yield


@pytest.fixture
def copy(tmp_path, pipeline):
    """A copy of the finished run, as a user would move it; the path of its configuration."""
    shutil.copytree(pipeline, tmp_path / "run")
    return tiny.write(tmp_path / "run")


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "metrics.jsonl")}


def refused(capsys, stage, path, *overrides):
    """The error of a stage that is refused in one line, and that changes nothing."""
    folder = path.with_suffix("")
    before = contents(folder)
    capsys.readouterr()
    assert tiny.run(stage, path, *overrides) == 2
    assert contents(folder) == before
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").replace(f"{folder}", "RUN").rstrip()


def mutate(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The embedded model with one weight changed, without checksums."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny.ASSETS / "model", folder)
    (folder / hf.MANIFEST).unlink()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] *= 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    shutil.copytree(tiny.ASSETS / "tokenizer", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ '<|user|>' }}" + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_run_that_was_moved_is_done(copy, capsys, other_model, tmp_path):
    """Run directory and model lie elsewhere: contents count, not paths."""
    shutil.copytree(tiny.ASSETS / "model", tmp_path / "m")
    (tmp_path / "m" / hf.MANIFEST).unlink()  # it lists digests that would be computed otherwise
    with tiny.nothing_is_drawn():
        for stage in tiny.STAGES[:4]:
            assert tiny.run(stage, copy, f"model.path={tmp_path / 'm'}") == 0
            assert f"{stage}: already done" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["evaluate", "export", "grade"])
def test_stages_after_training_see_other_settings(copy, capsys, stage, other_model, other_tokenizer):
    """Another model, tokenizer, seed or objective does not relabel what was made."""
    for override, words in (
        ("seed=6", "seed: 5 -> 6"),
        (f"model.path={other_model}", f"model.path: '{tiny.ASSETS / 'model'}'"[:50]),
        (f"model.tokenizer={other_tokenizer}", "model.tokenizer: "),
        ("train.gamma=0.2", "train.gamma: 0.1 -> 0.2"),
        ("train.objective=nll", "train.objective: 'dail' -> 'nll'"),
    ):
        message = refused(capsys, stage, copy, override)
        assert message.startswith("RUN: stage `") and f"configuration: {words}" in message, message


def test_training_sees_how_its_traces_were_made(copy, capsys):
    shutil.rmtree(copy.with_suffix("") / "checkpoints")
    message = refused(capsys, "train", copy, "generate.tau=0.5")
    assert message.startswith("RUN: stage `generate` was run with another configuration: generate.tau: 0.8 -> 0.5. Use")
    traces = copy.with_suffix("") / "traces.jsonl"
    traces.write_bytes(traces.read_bytes().replace(b'"drop":null', b'"drop":"me"', 1))
    assert "RUN/traces.jsonl: stale: run the stage `generate` again" in refused(capsys, "train", copy)
    traces.write_bytes(traces.read_bytes().replace(b'"sample":1', b'"sample":7', 1))
    assert "RUN/traces.jsonl: is not what was drawn here" in refused(capsys, "train", copy)


def test_traces_of_another_run_are_looked_at(copy, capsys, tmp_path, other_tokenizer):
    """Those that an arm names must be what its parent generated, in this tokenizer's ids."""
    traces = copy.with_suffix("") / "traces.jsonl"
    arm = tiny.write(tmp_path / "arm", traces=str(traces))
    message = refused(capsys, "train", arm, f"model.tokenizer={other_tokenizer}")
    assert message.startswith(f"{traces}: was generated with another tokenizer: '{tiny.ASSETS / 'model'}', not '")
    traces.write_text("".join(traces.read_text().splitlines(keepends=True)[:-1]))
    assert refused(capsys, "train", arm).startswith(f"{traces}: is not what `generate` wrote there")


def test_checkpoints_of_another_run_are_refused(copy, capsys, tmp_path, pipeline):
    """Copied over this run's, or into a new one."""
    run = copy.with_suffix("")
    (run / "results.json").unlink()
    (run / "samples.jsonl").unlink()
    (run / "checkpoints" / "manifests" / "6.json").write_text(
        (pipeline / "checkpoints" / "manifests" / "4.json").read_text()
    )
    shutil.rmtree(run / "checkpoints" / "6")
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "6")
    for stage in ("train", "evaluate"):
        assert "RUN/checkpoints: is not what training ended with here" in refused(capsys, stage, copy)
    fresh = tiny.write(tmp_path / "fresh", traces=str(pipeline / "traces.jsonl"))
    shutil.copytree(pipeline / "checkpoints", tmp_path / "fresh" / "checkpoints")
    message = refused(capsys, "train", fresh)
    assert message.startswith("RUN/checkpoints: already exists, and no stage `train` of RUN is on record")


def test_checkpoints_know_what_they_are_made_of(tmp_path):
    kept = Store(tmp_path, 2, "one")
    kept.save(1, {"a": 1.0}, {})
    kept.close()
    other = Store(tmp_path, 2, "another")
    with pytest.raises(rundir.UserError, match="was made by another run"):
        other.restore({"b": 2.0})
    other.close()
    assert store.steps(tmp_path) == [1]


def test_a_checkpoint_is_read_without_a_word(tmp_path, caplog):
    kept = Store(tmp_path, 2)
    kept.save(1, {"a": jnp.arange(3.0)}, {})
    kept.close()
    caplog.clear()
    got = store.load(tmp_path, 1, {"a": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert got["a"].tolist() == [0, 1, 2]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("what", ["weights", "template", "tokenizer", "benchmark", "data"])
def test_contents_replaced_behind_their_path_are_named(tmp_path, pipeline, capsys, what, other_model):
    shutil.copytree(other_model, tmp_path / "m")
    for name in ("student.txt", "train.jsonl", "hard.jsonl"):
        shutil.copy(tiny.ASSETS / ("templates" if name == "student.txt" else "") / name, tmp_path / name)
    path = tiny.write(
        tmp_path / "run",
        model__path=str(tmp_path / "m"),
        data__path=str(tmp_path / "train.jsonl"),
        prompts__student=str(tmp_path / "student.txt"),
    )
    override = f"evaluate.benchmarks=[{{name: hard, rows: {{path: {tmp_path / 'hard.jsonl'}, limit: 3}}}}]"
    stage = "evaluate" if what == "benchmark" else "generate"
    overrides = (override, "train.objective=none") if stage == "evaluate" else ()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert tiny.run(stage, path, *overrides) == launch.STOPPED
    if what == "weights":
        weights = load_file(tmp_path / "m" / "model.safetensors")
        weights["model.norm.weight"][0] *= 1.01
        save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    elif what == "template":
        (tmp_path / "student.txt").write_text("Solve: {{problem}}")
    elif what == "tokenizer":
        mutated = (tmp_path / "m" / "tokenizer_config.json").read_text() + "\n"
        (tmp_path / "m" / "tokenizer_config.json").write_text(mutated)
    else:
        file = tmp_path / ("hard.jsonl" if what == "benchmark" else "train.jsonl")
        file.write_text(file.read_text().replace("A=", "A=1", 1))
    names = {
        "weights": "model.path",
        "template": "prompts.student",
        "tokenizer": "model.tokenizer",
        "benchmark": "evaluate.benchmarks.hard.rows",
        "data": "data.path",
    }
    message = refused(capsys, stage, path, *overrides)
    assert message.startswith(f"RUN: stage `{stage}` was started with another configuration: {names[what]}: the conte")


def test_an_adapter_replaced_behind_its_path_is_named(tmp_path, pipeline, capsys):
    """Its weights, and what its description makes of them."""
    shutil.copytree(pipeline / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / hf.MANIFEST).unlink()
    path = tiny.write(tmp_path / "run", train__objective="none", evaluate__adapter=str(tmp_path / "adapter"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert tiny.run("evaluate", path) == launch.STOPPED
    for file, old, new in (("adapter_config.json", b'"lora_alpha": 4', b'"lora_alpha": 8'), (peft.WEIGHTS, b"", b"")):
        whole = (tmp_path / "adapter" / file).read_bytes()
        (tmp_path / "adapter" / file).write_bytes(whole.replace(old, new))
        if not old:
            mutate(tmp_path / "adapter" / file)
        assert "configuration: evaluate.adapter: the contents of" in refused(capsys, "evaluate", path)
        (tmp_path / "adapter" / file).write_bytes(whole)


def test_references_follow_the_weights(tmp_path, pipeline, monkeypatch, other_model):
    """Weights replaced before the first checkpoint are taken, and the cached states are not those of the old ones."""
    shutil.copytree(tiny.ASSETS / "model", tmp_path / "m")
    monkeypatch.setattr(Store, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    path = tiny.write(tmp_path / "run", traces=str(pipeline / "traces.jsonl"), model__path=str(tmp_path / "m"))
    assert tiny.run("train", path) == 130
    before = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "m")
    shutil.copytree(other_model, tmp_path / "m")
    session._held = None  # as a new process would
    assert tiny.run("train", path) == 130
    fresh = tiny.write(tmp_path / "fresh", traces=str(pipeline / "traces.jsonl"), model__path=str(tmp_path / "m"))
    assert tiny.run("train", fresh) == 130
    for name in ("references/negative.bin", "references/privileged.bin", "token_scores.jsonl"):
        now = (tmp_path / "run" / name).read_bytes()
        assert now != before[tmp_path / "run" / name] and now == (tmp_path / "fresh" / name).read_bytes()
    assert tiny.losses(tmp_path / "run") == tiny.losses(tmp_path / "fresh")


# ---------------------------------------------------------------------------------------------------
# Done is said of whole outputs alone
# ---------------------------------------------------------------------------------------------------


def test_a_damaged_final_checkpoint_is_not_replaced_by_an_older_one(copy, capsys, pipeline):
    """It is refused, nothing is deleted, and what the message says trains to the same adapter again."""
    run = copy.with_suffix("")
    for name in ("samples.jsonl", "results.json"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    mutate(largest(run / "checkpoints" / "6"))
    for stage in ("evaluate", "export", "train"):
        message = refused(capsys, stage, copy)
        assert message.startswith("RUN/checkpoints/6: damaged (") and message.endswith(
            "), and it is what training ended with: to train again from checkpoint 4, delete RUN/checkpoints/6 and run "
            "the stage `train`"
        )
    shutil.rmtree(run / "checkpoints" / "6")
    assert refused(capsys, "export", copy) == "RUN/checkpoints: missing: run the stage `train` again"
    assert tiny.run("train", copy) == 0
    out = capsys.readouterr().out
    assert "train: done before, but checkpoints is missing; made again" in out and "resuming at update 4" in out
    assert tiny.run("export", copy) == 0
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (pipeline / name).read_bytes()


def test_outputs_that_were_deleted_are_made_again(copy, capsys, pipeline):
    run = copy.with_suffix("")
    (run / "traces.jsonl").unlink()
    shutil.rmtree(run / "adapter")
    for stage, name in (("generate", "traces.jsonl"), ("export", "adapter")):
        assert tiny.run(stage, copy) == 0
        assert f"{stage}: done before, but {name} is missing; made again" in capsys.readouterr().out
        assert tiny.run(stage, copy) == 0 and f"{stage}: already done" in capsys.readouterr().out
    for name in ("traces.jsonl", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (pipeline / name).read_bytes()


def test_figures_are_summed_up_again_and_samples_are_not(copy, capsys, pipeline):
    """results.json follows from samples.jsonl, whatever happened to it; samples that are cut short are refused."""
    run = copy.with_suffix("")
    results = (pipeline / "results.json").read_bytes()
    with tiny.nothing_is_drawn():
        for spoilt in (None, b"", results[:-9]):
            (run / "results.json").unlink()
            if spoilt is not None:
                (run / "results.json").write_bytes(spoilt)
            assert tiny.run("evaluate", copy) == 0
            assert (run / "results.json").read_bytes() == results
            assert (run / "samples.jsonl").read_bytes() == (pipeline / "samples.jsonl").read_bytes()
        assert tiny.run("evaluate", copy, "evaluate.ks=[1,2]") == 0
        cell = json.loads((run / "results.json").read_text())["benchmarks"]["hard"]["96"]
        assert list(cell["pass@k"]) == ["1", "2"]
        assert tiny.run("grade", copy, "evaluate.ks=[4]") == 0
        assert tiny.run("evaluate", copy, "evaluate.ks=[4]") == 0
        assert "evaluate: already done" in capsys.readouterr().out
        samples = (run / "samples.jsonl").read_bytes().splitlines(keepends=True)
        (run / "samples.jsonl").write_bytes(b"".join(samples[:-1]))
        for stage in ("evaluate", "grade"):
            assert "RUN/samples.jsonl: is not what was drawn here" in refused(capsys, stage, copy, "evaluate.ks=[4]")


def test_junk_in_place_of_an_adapter_is_not_called_one(copy, capsys):
    run = copy.with_suffix("")
    mutate(run / "adapter" / "adapter_model.safetensors")
    assert "RUN/adapter/adapter_model.safetensors: damaged: its SHA-256 differs" in refused(capsys, "export", copy)
    shutil.rmtree(run / "adapter")
    (run / "adapter").mkdir()
    (run / "adapter" / "notes.txt").write_text("junk")
    assert "RUN/adapter: already exists, and is not what is written here" in refused(capsys, "export", copy)
    manifest = json.loads((run / "run.json").read_text())
    del manifest["stages"]["export"]
    (run / "run.json").write_text(json.dumps(manifest))
    assert refused(capsys, "export", copy).startswith("RUN/adapter: already exists, and no stage `export`")


def killed_before_the_mark(stage, path):
    """The stage, killed after its output has its name and before the run directory says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rundir, "_now", iter(["start"]).__next__)  # the second call, for the mark, fails
        with pytest.raises((StopIteration, RuntimeError)):
            tiny.run(stage, path)


def test_a_kill_between_an_adapter_and_the_mark_costs_nothing(copy, capsys, monkeypatch):
    run = copy.with_suffix("")
    shutil.rmtree(run / "adapter")
    killed_before_the_mark("export", copy)
    before = contents(run / "adapter")
    monkeypatch.setattr(export_stage.peft, "save", None)
    assert tiny.run("export", copy) == 0 and contents(run / "adapter") == before
    assert tiny.run("export", copy) == 0 and "export: already done" in capsys.readouterr().out
    made = json.loads((run / "adapter" / hf.PROVENANCE).read_text())
    assert made["inputs"]["train"]["sha256"] and made["inputs"]["model.path"]["sha256"]
    assert made["inputs"]["train"]["path"] is None and made["inputs"]["model.path"]["path"] == "model"


def test_what_is_published_names_no_folder_of_this_machine():
    paths = {
        "/home/me/models/Qwen3-8B/": "Qwen3-8B",
        "/home/me/hub/models--Qwen--Qwen3-8B/snapshots/0f3a": "Qwen/Qwen3-8B",
        "3 of /home/me/my data/a.jsonl, gs://bucket/b.jsonl": "a.jsonl, b.jsonl",
        "hub:openai/gsm8k:train": "hub:openai/gsm8k:train",
        "the package's student.txt": "the package's student.txt",
        None: None,
    }
    inputs = {str(i): {"path": path, "sha256": f"{i}"} for i, path in enumerate(paths)}
    found = provenance.published({"settings": {"seed": 1}, "inputs": inputs})
    assert [one["path"] for one in found["inputs"].values()] == list(paths.values())
    assert provenance.identity(found) == provenance.identity({"settings": {"seed": 1}, "inputs": inputs})


def test_convert_is_done_for_one_model_and_dtype(tmp_path, capsys, other_model):
    path = tiny.write(tmp_path / "run")
    killed_before_the_mark("convert", path)
    assert tiny.run("convert", path) == 0 and tiny.run("convert", path) == 0
    assert capsys.readouterr().out.count("convert: already done") == 2
    assert "model.dtype: 'float32' -> 'bfloat16'" in refused(capsys, "convert", path, "model.dtype=bfloat16")
    assert "model.path: " in refused(capsys, "convert", path, f"model.path={other_model}")
    mutate(largest(tmp_path / "run" / "model"))
    assert "damaged" in refused(capsys, "convert", path)
    shutil.rmtree(tmp_path / "run" / "model")
    assert tiny.run("convert", path, "model.dtype=bfloat16") == 0  # nothing is left of the other
    (tmp_path / "junk" / "model").mkdir(parents=True)
    assert "RUN/model: already exists" in refused(capsys, "convert", tiny.write(tmp_path / "junk"))


# ---------------------------------------------------------------------------------------------------
# First starts
# ---------------------------------------------------------------------------------------------------


def test_a_failed_first_start_does_not_bind_the_run_directory(tmp_path, capsys, monkeypatch):
    path = tiny.write(tmp_path / "run")
    assert "/nope: got no such folder, want one with a model" in refused(capsys, "generate", path, "model.path=/nope")
    monkeypatch.setattr("dail_jax.stages.generate.open_session", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert tiny.run("generate", path, "seed=7") == 130  # a record, and no work
    monkeypatch.undo()
    stop_after(monkeypatch, 1)
    assert tiny.run("generate", path) == launch.STOPPED
    assert "stopped with 1 of 24 traces drawn" in capsys.readouterr().out
    assert "seed: 5 -> 7" in refused(capsys, "generate", path, "seed=7")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("evaluate.benchmarks.1.rows.path", "nowhere"),
        ("evaluate.benchmarks.0.template", "nowhere: no such template"),
        ("prompts.negative", "nowhere: no such template"),
    ],
)
def test_run_looks_for_all_inputs_first(tmp_path, capsys, key, message):
    path = tiny.write(tmp_path / "run")
    assert message in refused(capsys, "run", path, f"{key}=nowhere")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------
# pretrain
# ---------------------------------------------------------------------------------------------------


def pretrain(tmp_path, name):
    return tiny.write_pretrain(tmp_path / name, tmp_path / "corpus.jsonl")


def rows_of(path):
    rows = [r for r in tiny.lines(path.with_suffix("") / "metrics.jsonl") if r["stage"] == "pretrain"]
    return [(r["step"], r["loss"]) for r in rows]


def test_pretrain_resumes_after_an_interrupt_and_after_a_kill(tmp_path, capsys, monkeypatch):
    """To the same weights and losses, bit for bit; its checkpoints go when the model is there."""
    whole, path = pretrain(tmp_path, "whole"), pretrain(tmp_path, "cut")
    assert tiny.run("pretrain", whole) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert tiny.run("pretrain", path) == launch.STOPPED
    assert "pretrain: stopped and saved at step 3 of 12; call again to resume" in capsys.readouterr().out
    assert not (tmp_path / "cut" / "model").exists()
    assert "seed: 5 -> 6" in refused(capsys, "pretrain", path, "seed=6")
    with pytest.MonkeyPatch.context() as patch:  # a kill at step 9; that of step 5 is saved
        calls = iter(range(9 - 3 - 1))
        patch.setattr(rundir.Interrupt, "wanted", property(lambda _: next(calls) < 0))
        with pytest.raises((StopIteration, RuntimeError)):
            tiny.run("pretrain", path)
    assert tiny.run("pretrain", path) == 0
    assert "pretrain: resuming at step 5" in capsys.readouterr().out
    name = "model.safetensors"
    assert (tmp_path / "cut" / "model" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()
    assert rows_of(path) == rows_of(whole) and [step for step, _ in rows_of(path)] == [4, 8, 12]
    assert not (tmp_path / "cut" / "pretrain").exists()


def test_pretrain_is_done_where_its_model_is(tmp_path, capsys):
    path = pretrain(tmp_path, "run")
    killed_before_the_mark("pretrain", path)
    before = contents(tmp_path / "run" / "model")
    assert tiny.run("pretrain", path) == 0 and tiny.run("pretrain", path) == 0
    assert capsys.readouterr().out.count("pretrain: already done") == 2
    assert contents(tmp_path / "run" / "model") == before and not (tmp_path / "run" / "pretrain").exists()
    message = refused(capsys, "pretrain", path, f"model.path={tmp_path / 'new'}")
    assert "writes: " in message and "delete RUN/model to start the stage anew" in message
    shutil.rmtree(tmp_path / "run" / "model")
    assert tiny.run("pretrain", path) == 0
    name = tmp_path / "run" / "model" / "model.safetensors"
    assert name.read_bytes() == before[name]


def test_pretrain_starts_from_given_weights(tmp_path, capsys):
    """With rates too small to change them, they come out as they went in; another architecture is refused."""
    first, second = pretrain(tmp_path, "first"), pretrain(tmp_path, "second")
    assert tiny.run("pretrain", first) == 0
    init = f"pretrain.init={tmp_path / 'first' / 'model'}"
    rates = ("pretrain.optimizer.learning_rate=1e-30", "pretrain.optimizer.matrix_learning_rate=1e-30")
    assert "want pretrain.architecture" in refused(capsys, "pretrain", second, f"pretrain.init={tiny.ASSETS / 'model'}")
    assert tiny.run("pretrain", second, init, *rates) == 0
    name = "model.safetensors"
    assert (tmp_path / "first" / "model" / name).read_bytes() == (tmp_path / "second" / "model" / name).read_bytes()
    (_, start), *_ = rows_of(second)
    (_, random), *_ = rows_of(first)
    assert start < random
    assert "pretrain.init: " in refused(capsys, "pretrain", second, *rates)
