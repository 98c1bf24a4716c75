"""The same seed gives the same files, from traces to results; on other devices same traces, and losses to rounding."""

import functools

import jax
import numpy as np
import tiny

from dail_jax import mesh as mesh_lib


def test_same_seed_same_files(tmp_path, pipeline):
    path = tiny.write(tmp_path / pipeline.name)  # results.json has the folder's name
    with tiny.alone():
        for stage in tiny.STAGES[:-1]:
            assert tiny.run(stage, path) == 0
    for file in ("traces.jsonl", "samples.jsonl", "results.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / pipeline.name / file).read_bytes() == (pipeline / file).read_bytes(), file
    assert tiny.losses(tmp_path / pipeline.name) == tiny.losses(pipeline)


def test_other_devices_same_traces(tmp_path, pipeline, monkeypatch):
    path = tiny.write(tmp_path / "r", mesh={"sample": {"data": 1, "tensor": 2}, "train": {"data": 1, "fsdp": 2}})
    with tiny.alone(), monkeypatch.context() as patch:
        patch.setattr(mesh_lib, "make_mesh", functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:2]))
        assert tiny.run("generate", path) == 0 and tiny.run("train", path) == 0
    got, want = (tiny.lines(folder / "traces.jsonl") for folder in (tmp_path / "r", pipeline))
    for a, b in zip(got, want, strict=True):
        assert [a[k] for k in ("problem_id", "sample", "response_ids", "writer", "drop")] == [
            b[k] for k in ("problem_id", "sample", "response_ids", "writer", "drop")
        ]
        np.testing.assert_allclose(a["logq"], b["logq"], atol=1e-3)
    a, b = (np.array(tiny.losses(folder)) for folder in (tmp_path / "r", pipeline))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_another_seed_gives_other_traces(tmp_path, pipeline):
    with tiny.alone():
        path = tiny.write(tmp_path / "r", seed=6, data__limit=4)
        assert tiny.run("generate", path) == 0
    got, want = (tiny.lines(folder / "traces.jsonl") for folder in (tmp_path / "r", pipeline))
    assert [t["problem_id"] for t in got] == [t["problem_id"] for t in want[:8]]
    assert any(a["response_ids"] != b["response_ids"] for a, b in zip(got, want, strict=False))
