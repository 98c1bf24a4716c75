"""A run on int8 weights: what it records, what it refuses, what it exports, and what the command `quantization` reports."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import hf, peft
from dail_jax.model import lora as lora_lib
from dail_jax.model import transformer
from dail_jax.stages.recipes import rows_of
from dail_jax.stages.session import open_session

MODEL = tiny.ASSETS / "model"


@pytest.fixture(autouse=True)
def one():
    with tiny.alone():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pipeline):
    """Four updates on the traces of the exact model, exported and merged; the configuration's path."""
    path = tiny.write(
        tmp_path_factory.mktemp("int8") / "run",
        model__quantize="int8",
        traces=str(pipeline / "traces.jsonl"),
        train__epochs=1,
        export__merged=True,
    )
    with tiny.alone():
        for stage in ("train", "export"):
            assert tiny.run(stage, path) == 0
    return path


def refused(capsys, stage, path, *overrides):
    capsys.readouterr()
    assert tiny.run(stage, path, *overrides) == 2
    return capsys.readouterr().err


def test_the_adapter_and_the_references_say_what_they_were_trained_on(trained, pipeline):
    run = trained.with_suffix("")
    for made in ("adapter", "merged"):
        assert json.loads((run / made / "provenance.json").read_text())["settings"]["model"]["quantize"] == "int8"
    assert json.loads((run / "references" / "manifest.json").read_text())["key"].startswith("float32 int8 ")
    assert " int8 " not in json.loads((pipeline / "references" / "manifest.json").read_text())["key"]
    assert "quantize" not in json.loads((pipeline / "adapter" / "provenance.json").read_text())["settings"]["model"]


def test_it_is_merged_into_the_exact_weights(trained):
    run, mesh = trained.with_suffix(""), mesh_lib.make_mesh(config_lib.Mesh())
    exact, cfg = hf.load(MODEL, mesh, "float32")
    want = lora_lib.merge(exact, peft.load(run / "adapter", cfg, mesh)[0], cfg)
    got, _ = hf.load(run / "merged", mesh, "float32")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, got, want)))
    assert not (got["layers"]["q"] == exact["layers"]["q"]).all()


def test_forms_are_not_mixed(trained, pipeline, capsys, tmp_path):
    assert "model.quantize: 'int8' -> None" in refused(capsys, "train", trained, "model.quantize=null")
    shutil.copytree(pipeline, tmp_path / "exact")
    again = tiny.write(tmp_path / "exact")
    for stage in ("generate", "evaluate", "export"):
        assert "model.quantize: None -> 'int8'" in refused(capsys, stage, again, "model.quantize=int8")
    other = tiny.write(tmp_path / "other", train__objective="none")
    for adapter, quantize, words in (
        (trained.with_suffix("") / "adapter", "null", "was trained on int8 weights, and these are exact: set"),
        (pipeline / "adapter", "int8", "was trained on exact weights, and these are int8: set"),
    ):
        message = refused(capsys, "evaluate", other, f"evaluate.adapter={adapter}", f"model.quantize={quantize}")
        assert message.startswith(f"error: {adapter}: {words} model.quantize to"), message


def test_nothing_exact_is_merged_into_and_nothing_in_int8_is_pretrained(capsys, tmp_path):
    path = tiny.write(tmp_path / "run", model__quantize="int8")
    assert tiny.run("convert", path) == 0
    converted = f"model.path={tmp_path / 'run' / 'model'}"
    message = refused(capsys, "export", path, converted, "export.merged=true")
    assert f"export.merged: wants exact weights, and {tmp_path / 'run' / 'model'} holds int8 ones" in message
    assert "holds int8 weights, and model.quantize asks for exact ones" in refused(
        capsys, "generate", path, converted, "model.quantize=null"
    )
    path = tiny.write_pretrain(tmp_path / "p", tmp_path / "corpus.jsonl")
    assert "model.quantize: got int8, want null" in refused(capsys, "pretrain", path, "model.quantize=int8")


def test_the_command_reports_the_difference(trained, capsys):
    """Against the two models by hand, without batches, padding or chunks."""
    assert tiny.run("quantization", trained, "--rows", "3", "train.chunk=64") == 0
    shown = capsys.readouterr().out
    found = json.loads((trained.with_suffix("") / "quantization.json").read_text())
    session = open_session(config_lib.load(trained))
    rows = session.prompts.build_all(rows_of(session.config)[:3])
    logs = []
    for quantize in (None, "int8"):
        params, parts = session.in_form(quantize).params, []
        for built in rows:
            ids = np.array([[*built.student, *built.expert]], np.int32)
            hidden = transformer.encode(params, ids, np.arange(ids.shape[1])[None], session.model)
            part = jax.nn.log_softmax(transformer.unembed(params, hidden[0]))[len(built.student) - 1 : -1]
            parts.append(np.asarray(part))
        logs.append(np.concatenate(parts))
    exact, quantized = logs
    ids = np.concatenate([built.expert for built in rows])
    of = lambda log: log[np.arange(len(ids)), ids]  # noqa: E731
    difference, kl = np.abs(of(exact) - of(quantized)), (np.exp(exact) * (exact - quantized)).sum(-1)
    assert (found["rows"], found["tokens"]) == (3, len(ids)) and f"{len(ids)} of 3 solutions" in shown
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)  # noqa: E731
    close(found["difference"]["mean"], difference.mean())
    close(found["difference"]["max"], difference.max())
    close(found["kl"]["mean"], kl.mean())
    close(found["kl"]["max"], kl.max())
    close(found["log_probability"]["exact"], of(exact).mean())
    assert found["argmax_agrees"] == pytest.approx((exact.argmax(-1) == quantized.argmax(-1)).mean())
    assert 0 < kl.mean() < 0.005 and found["bytes"]["ratio"] == pytest.approx(0.25, abs=0.01)
