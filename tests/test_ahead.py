"""Compiling ahead of time: splash equals the einsum, the table has its rows, the caches stay in place."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import mesh_of

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.ahead import chips, hlo, programs
from dail_jax.ahead import plan as plan_lib
from dail_jax.ahead.timing import Cost, Reader
from dail_jax.errors import UserError
from dail_jax.model import attention, families, pages, transformer
from dail_jax.stages import plan

MODEL = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


STEP = "train step, dail, 4 x (96 + 32) tokens"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return config_lib.build(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path), "dtype": "bfloat16"},
            "mesh": {"data": 1, "fsdp": 2, "tensor": 2},
            "generate": {"slots": 4, "samples": 2, "max_prompt_tokens": 32, "sampling": {"max_tokens": 32}},
            "train": {"batch_size": 4, "bucket": 32, "max_tokens": 128, "chunk": 64, "lora": {"rank": 4}},
            "evaluate": {
                "slots": 4,
                "samples": 2,
                "max_prompt_tokens": 32,
                "sampling": {"max_tokens": 32},
                "force": {"max_tokens": 8},
                "benchmarks": [{"name": "b", "rows": {"path": "none.jsonl"}}],
            },
        },
        "test",
    )


def compile_on(config, devices, **kw):
    model = families.read_config(config.model.path)
    meshes = programs.meshes_of(config.mesh, devices)
    return {row.program: row for row in programs.compile_all(config, model, *meshes, **kw)}


@pytest.mark.parametrize(("shape", "window"), [(None, 40), ({"fsdp": 2, "tensor": 2}, None)])
def test_splash_equals_the_einsum_with_padding_on_either_side(shape, window):
    b, t, n, k, h = 2, 150, 4, 2, 16
    keys = jax.random.split(jax.random.key(0), 4)
    q, key, v, w = (jax.random.normal(x, (b, t, heads, h)) for x, heads in zip(keys, (n, k, k, n), strict=True))
    positions = np.full((b, t), -1, np.int32)
    positions[0, 40:] = np.arange(110)
    positions[1, :133] = np.arange(133)
    live = (positions >= 0)[..., None, None]

    def outputs(fn):
        def loss(q, key, v):
            out = jnp.where(live, fn(q, key, v, jnp.asarray(positions), window, 0.3), 0)
            return (out * w).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, key, v)

    want = outputs(attention.attend)
    interpreted = lambda *args: attention.splash(*args, interpret=True)  # noqa: E731
    if shape is None:
        got = outputs(interpreted)
    else:
        with jax.set_mesh(mesh_of(**shape)):
            got = outputs(interpreted)
    for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert float(jnp.abs(x).max()) > 0.1
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_splash_divides_the_tokens_of_rows_that_are_too_few(monkeypatch):
    """Two parts of the queries, each with all keys: the einsum's output, and no device takes the whole."""
    b, t, n, k, h = 1, 512, 4, 2, 16
    keys = jax.random.split(jax.random.key(0), 3)
    q, key, v = (jax.random.normal(x, (b, t, heads, h)) for x, heads in zip(keys, (n, k, k), strict=True))
    positions = np.where(np.arange(t) < 430, np.arange(t), -1)[None].astype(np.int32)
    want = jax.jit(attention.attend)(q, key, v, positions)
    parts = []
    monkeypatch.setattr(attention, "_by_row", lambda x: parts.append(x.shape) or x.swapaxes(1, 2))
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        got = jax.jit(lambda *x: attention.splash(*x, interpret=True))(q, key, v, positions)
    assert parts[:3] == [(1, 256, 2, 16), (1, 512, 1, 16), (1, 512, 1, 16)]
    np.testing.assert_allclose(want[:, :430], got[:, :430], atol=1e-5)


def test_the_table_has_every_program_and_its_memory(config):
    rows = compile_on(config, jax.devices()[:4], quick=True)
    assert list(rows) == [
        "references, 4 x (96 + 32) tokens",
        "loss, dail, 4 x 32 tokens",
        STEP,
        "rollouts, 4 slots x 2 roles of 32 tokens: prefill 32, 1 of 4 prompts",
        "rollouts, 4 slots x 2 roles of 32 tokens after 4 prompts of 32: decode",
        "evaluation, 4 slots x 1 roles of 56 tokens: prefill 32, 1 of 4 prompts",
        "evaluation, 4 slots x 1 roles of 56 tokens after 4 prompts of 32: decode",
    ]
    step = rows[STEP]
    parameters = 2 * (320 * 64 * 2 + 2 * 64 * (4 + 2 + 2 + 4) * 128 + 2 * 3 * 64 * 96)
    assert parameters / 4 < step.arguments_gb * 1e9 < parameters  # sharded by 4, plus the adapter and a batch
    assert step.aliased_gb > 0 and step.bytes > step.arguments_gb * 1e9
    assert all(row.fits is None and row.verdict == "compiles" for row in rows.values())
    for name, row in rows.items():
        if "decode" in name:  # the donated caches are the result's
            caches = 2 * 2 * (8 if "rollouts" in name else 4) * 2 * 32 * 128 * 2 / 4
            assert row.aliased_gb * 1e9 >= caches and row.cache_copies == 0


def test_pages_are_counted_by_the_texts_that_they_hold(config, monkeypatch):
    """By hand: two layers of one head a device, keys and values of 128 bfloat16, two rows a device."""
    changed = config_lib.with_overrides(config, {"evaluate.pages": 0.5, "evaluate.sampling.max_tokens": 976}, "test")
    model = families.read_config(changed.model.path)
    _, mesh = programs.meshes_of(changed.mesh, jax.devices()[:4])
    found = {p.name: p for p in programs.sampler_programs(changed, model, mesh)}
    name = "evaluation, 4 slots x 1 roles of 1000 tokens, pages 0.5 after 8 prompts of 32: decode"
    token, rows, text = 2 * 2 * 128 * 2, 2, 32 + 0.32 * 1000
    held = (1 + 4 + rows * 9) * 64 * token  # one of no row, four prompts, and 1 + 500 / 64 pages each
    assert found[name].fetched == 0  # an einsum's reads are in the program's text
    table = 320 * 64 * 2 / 4
    assert found[name].unread == pytest.approx(table + held - rows * text * token)
    assert found[name].caches == ((23, 64, 2, 128),)
    row = programs.measure(found[name], changed, quick=True)
    assert row.aliased_gb * 1e9 >= 2 * 23 * 64 * 2 * 128 * 2 and row.cache_copies == 0
    programs.check_pages(changed, model, mesh)
    int8 = config_lib.with_overrides(changed, {"evaluate.kv_dtype": "int8"}, "test")
    with pytest.raises(UserError, match=r"evaluate.pages: only a GPU's kernel reads keys and values in int8"):
        programs.check_pages(int8, model, mesh)
    job = next(job for job in programs.jobs_of(changed, model) if job.pages)
    for kernel, block in (("tpu", 512), ("gpu", 64)):
        monkeypatch.setattr(pages, "kernel", lambda kernel=kernel: kernel)
        _, fetched, _ = programs.paged_bytes(job.grid(mesh), model, jnp.dtype("bfloat16"), mesh)
        assert fetched == pytest.approx(rows * (text + block / 2 + 1) * token)
    grid = dataclasses.replace(job.grid(mesh), kv_dtype="int8")
    _, halved, _ = programs.paged_bytes(grid, model, jnp.dtype("bfloat16"), mesh)
    assert halved / fetched == pytest.approx((128 + 4) / 256)


def test_answers_are_forced_after_whole_prompts_where_rows_cannot_go_back(config):
    model = families.read_config(config.model.path)
    short = dataclasses.replace(model, layers=(model.layers[0], dataclasses.replace(model.layers[1], window=20)))
    _, mesh = programs.abstract_meshes(config.mesh, 4)
    assert [p.name.split(": ")[0] for p in programs.sampler_programs(config, short, mesh) if "prefill" in p.name] == [
        "rollouts, 4 slots x 2 roles of 32 tokens",
        "evaluation, 4 slots x 1 roles of 32 tokens",
        "forced answers, 4 slots x 1 roles of 8 tokens",
    ]
    assert [programs.answer_room(config.evaluate, *args) for args in ((model,), (model, 20), (short, 20))] == [
        24,
        28,
        0,
    ]


def test_a_token_reads_no_pool_that_a_kernel_is_given():
    text = "\n".join(
        (
            "ENTRY %main (p: bf16[1000]) -> bf16[1000] {",
            "  %p = bf16[1000]{0} parameter(0)",
            '  %write_pages.3 = bf16[1000]{0} custom-call(%p), custom_call_target="tpu_custom_call"',
            "  %ragged_paged_attention_kernel.1 = bf16[1000]{0} custom-call(%write_pages.3)",
            '  %pallas_call.2 = bf16[1000]{0} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton"',
            "  ROOT %other = bf16[1000]{0} custom-call(%write_pages.3)",
            "}",
        )
    )
    assert hlo.hbm_bytes(text) == 4000


def test_counted_flops_are_the_arithmetic(config):
    changes = {"mesh.fsdp": 1, "mesh.tensor": 1, "train.cache_references": False, "train.remat": "none"}
    plain = config_lib.with_overrides(config, changes, "test")
    model = families.read_config(plain.model.path)
    useful = 4 * programs.useful_flops(model, plain.train, 96, 32, False)[1]
    step = compile_on(plain, jax.devices()[:1], only=STEP)[STEP]
    assert 0.9 < step.flops / useful < 1.5  # above: softmax, norms, and attention that is not causal in an einsum


def test_a_program_that_does_not_fit_says_what_to_change_first(config, monkeypatch):
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(1e-6, 1, 1))
    changes = {"mesh.fsdp": 1, "mesh.tensor": 1}
    one = config_lib.with_overrides(config, changes, "test")
    (loss,) = compile_on(one, jax.devices()[:1], quick=True, only="loss").values()
    assert (loss.fits, loss.verdict) == (False, "does not fit: lower train.chunk") and loss.peak_gb > loss.hbm_gb
    change = programs.first_change
    assert change("sampler", one, mesh_of(), 2, 1).endswith("which set the caches")
    assert change("sampler", one, mesh_of(data=2), 2, 1).startswith("raise mesh.tensor")
    assert change("train", one, mesh_of(data=2), 2, 1).startswith("raise mesh.fsdp")
    assert change("train", one, mesh_of(), 1, 2) == "raise train.accumulate (now 1)"
    whole = config_lib.with_overrides(one, {"train.remat": "none"}, "test")
    assert change("train", whole, mesh_of(), 1, 2) == "set train.remat: full"


@pytest.mark.parametrize("follow", [True, False])
def test_a_plan_is_calls_times_seconds(config, monkeypatch, follow):
    """By hand, where forced answers follow from samples and where they do not: every program takes 3 s, 36 s or 360 s; no stage's shapes are compiled for it."""
    changes = {"data": {"path": "none.jsonl", "size": 40}, "evaluate.benchmarks": [BENCH], "evaluate.budgets": [8, 32]}
    config = config_lib.with_overrides(config, {**changes, "train.epochs": 2, "filters.keep": "all"}, "test")
    monkeypatch.setattr(transformer, "can_rewind", lambda _: follow)
    train, sample = programs.abstract_meshes(config.mesh, 4)
    model = families.read_config(config.model.path)
    rows = {}
    for program in programs.programs_of(config, model, train, sample):
        seconds = 3.0 if "decode" in program.name else 360.0 if "step" in program.name else 36.0
        report = programs.ProgramReport(program.name, program.stage, "all", 0, 1, 16, True, "fits", seconds=seconds)
        rows[plan.key_of(config.model.path, program)] = dataclasses.replace(report, bandwidth_seconds=1.0)
    lines = plan.lines_of(config, lambda _: (train, sample), rows, plan_lib.Lengths(0.1), 20)
    hours = {(line.stage, line.part): (line.hours, line.worst, line.memory_bound) for line in lines}
    mean, occupied = 0.9 / math.log(10), 4 * plan_lib.OCCUPANCY  # 4 slots
    traces = 40 * 2 * 32 / occupied  # tokens that each slot draws if all are as long as their limit
    want = {("generate", "traces"): [(40 * 36 + traces * f * s) / 3600 for f, s in ((mean, 3), (1, 3), (mean, 1))]}
    want["train", "references"] = [80 / 4 * 2 * 36 / 3600] * 3
    want["train", "updates"] = [2 * 80 / 4 * 360 / 3600] * 3
    drawn, asked = 50 * 2 * 32 / occupied, 50 * 2
    prompts = 0 if follow else 36  # of forced answers, with what is cut: in buckets of 48 and 96
    prefills = 50 * 36 + sum(asked * 0.1 ** (cut / 32) * prompts * size / 96 for cut, size in ((8, 48), (32, 96)))
    read = 16 if follow else 0  # the text that asks
    answers = [asked * 0.1 ** (cut / 32) * (read + 8 * mean) * 3 / occupied for cut in (8, 32)]
    assert hours["evaluate", "b"][0] == pytest.approx((prefills + drawn * mean * 3 + sum(answers)) / 3600)
    assert hours["evaluate", "b"][1] > hours["evaluate", "b"][0] > hours["evaluate", "b"][2]
    for key, figures in want.items():
        assert hours[key] == pytest.approx(figures), key


BENCH = {"name": "b", "rows": {"path": "none.jsonl", "size": 50}}


def test_meshes_split_physical_axes_and_run_between_slices_along_data_alone():
    two = [types.SimpleNamespace(slice_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match=r"mesh.data: got data=1, want a multiple of the 2 slices"):
        mesh_lib._arranged([1, 1, 8], two)
    pytest.importorskip("libtpu")
    devices = chips.devices("v6e:4x4")
    for sizes in itertools.product((1, 2, 4, 8, 16), repeat=3):
        if math.prod(sizes) == len(devices):
            shape = dict(zip(mesh_lib.AXES, sizes, strict=True))
            assert {**mesh_lib.make_mesh(config_lib.Axes(**shape), devices).shape} == shape


def test_topologies_that_do_not_exist_are_one_line():
    for name in ("v9:2x2", "tpu", "v5e", "v5e:0x0", "h100", "h100:0", "h100:8x"):
        with pytest.raises(UserError, match=r"v5e:4x4, v5p:2x2x4, v6e:4x4|libtpu"):
            chips.devices(name)


def test_main_memory_traffic_multiplies_loops_and_counts_slices():
    def run(x, big):
        return jax.lax.scan(lambda x, i: (jnp.tanh(x @ big[i]), None), x, jnp.arange(7))[0]

    x, big = jnp.ones((64, 64)), jnp.ones((100, 64, 64))
    text = jax.jit(run).lower(x, big).compile().as_text()
    moved = hlo.hbm_bytes(text)
    assert 7 * 64 * 64 * 4 * 3 < moved < 7 * 64 * 64 * 4 * 12 < big.nbytes


COSTLY = """
%product (a: bf16[2048,4096], b: bf16[4096,64]) -> bf16[2048,64] {
  %a = bf16[2048,4096]{1,0} parameter(0)
  %b = bf16[4096,64]{1,0} parameter(1)
  ROOT %dot.1 = bf16[2048,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (x: bf16[2048,4096]) -> bf16[2048,4096] {
  %x = bf16[2048,4096]{1,0} parameter(0)
  %i = f32[8]{0} iota(), iota_dimension=0
  %tiny = f32[8]{0} add(%i, %i), metadata={op_name="jit(f)/while/body/draw/add"}, backend_config={"estimated_cycles":"2121"}
  %wide = f32[4096,1024]{1,0:S(1)} broadcast(%tiny), metadata={op_name="jit(f)/while/body/draw/broadcast"}, backend_config={"estimated_cycles":"90000"}
  ROOT %all-gather.1 = bf16[2048,4096]{1,0} all-gather(%x), replica_groups=mesh['i'=2,'j'=4] {'j'}, metadata={op_name="jit(f)/while/body/draw/g"}
}

ENTRY %main (p: bf16[2048,4096], w: bf16[4096,64]) -> bf16[2048,64] {
  %p = bf16[2048,4096]{1,0} parameter(0)
  %w = bf16[4096,64]{1,0} parameter(1)
  %loop = bf16[2048,4096]{1,0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %fusion = bf16[2048,64]{1,0} fusion(%loop, %w), kind=kOutput, calls=%product, metadata={op_name="jit(f)/mlp/dot_general"}, backend_config={"estimated_cycles":"175000"}
}
"""


V6E = chips.CHIPS["TPU v6 lite"]  # 1,640 GB/s, a clock of 1.75 GHz
EXCHANGE = 3 / 4 * 2048 * 4096 * 2 / (1640e9 / 8) + 2 * 10e-6  # what each of four devices lacks, and two waits
WIDE = 2 * (4096 * 1024 * 4 + 32) / 4096 / 1.75e9  # two cycles a register


def test_instructions_cost_what_the_compiler_says(monkeypatch):
    """By hand, five rounds of the loop, and by label in `benchmarks/cost.py`."""
    monkeypatch.syspath_prepend(str(tiny.ROOT / "benchmarks"))
    import cost

    table = cost.costs(types.SimpleNamespace(as_text=lambda: COSTLY), V6E)
    assert set(table) == {"mlp: products", "draw: vectors", "draw: exchanged"}
    assert table["mlp: products"].time == pytest.approx(175_000 / 1.75e9)
    assert table["draw: vectors"].memory == pytest.approx(5 * 3 * 32 / 1640e9)  # the wide one stays in fast memory
    assert table["draw: vectors"].time == pytest.approx(5 * (2121 / 1.75e9 + WIDE))
    assert table["draw: exchanged"].links == pytest.approx(5 * EXCHANGE)
    assert table["draw: exchanged"].count == 5


def test_the_dearest_branch_counts_and_who_exchanges_is_read_in_every_notation():
    branches = """
%short (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  ROOT %sum = f32[64]{0} all-reduce(%a), GROUPS, to_apply=%add
}

%long (b: f32[64]) -> f32[64] {
  %b = f32[64]{0} parameter(0)
  %one = f32[64]{0} all-reduce(%b), GROUPS, to_apply=%add
  ROOT %two = f32[64]{0} all-reduce(%one), GROUPS, to_apply=%add
}

ENTRY %main (p: f32[64], i: s32[]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %either = f32[64]{0} conditional(%i, %p, %p), branch_computations={%long, %short}
}
"""
    each = lambda devices: 2 * (devices - 1) / devices * 256 / (1640e9 / 8) + 10e-6 * math.log2(devices)  # noqa: E731
    for groups, devices in (
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=mesh['i'=2,'j'=4,'k'=2] {'j','k'}", 8),
    ):
        steps = Reader(branches.replace("GROUPS", groups), V6E).steps()
        assert [step.op.name for step, _ in steps] == ["one", "two"]
        assert sum((cost for _, cost in steps), Cost()).time == pytest.approx(2 * each(devices))


def test_a_programs_time_is_its_instructions_and_never_less_than_its_bytes(config):
    product = (2048 * 4096 + 4096 * 64 + 2048 * 64) * 2
    moved = product + 5 * (2 * 2048 * 4096 * 2 + 3 * 32)  # what is gathered is read and written
    seconds = 175_000 / 1.75e9 + 5 * (2121 / 1.75e9 + WIDE + EXCHANGE)
    ahead = "  %early = (f32[1000000000]{0:S(1)}, f32[1000000000]{0}) copy-start(%big)\n"  # fetched while others run
    fetching = COSTLY.replace("  %loop", "  %big = f32[1000000000]{0} parameter(2)\n" + ahead + "  %loop")
    row = timed(config, COSTLY, tokens=4)
    assert (row.timed, row.seconds, row.bytes) == ("instructions", pytest.approx(seconds / 4), moved / 4)
    assert row.bandwidth_seconds == pytest.approx(moved / 4 / 1640e9)
    with_kernels = timed(config, COSTLY, tokens=4, kernels=918e9)  # a millisecond at the peak
    assert with_kernels.seconds == pytest.approx(seconds / 4 + 2e-3)
    bound = timed(config, fetching, tokens=4)
    assert bound.seconds == bound.bandwidth_seconds == pytest.approx((moved + 4e9) / 4 / 1640e9)
    assert bound.seconds > row.seconds
    hidden = timed(config, None, tokens=4, kernels=918e9)
    assert (hidden.timed, hidden.seconds, hidden.bytes) == ("compiler", pytest.approx(0.25 + 2e-3), None)


def timed(config, text, **program) -> programs.ProgramReport:
    """The report of a program that was compiled to a text for a v6e, whose model takes 0.25 s and cannot time one
    operation."""
    sizes = {"argument_size_in_bytes": 5, "temp_size_in_bytes": 3, "output_size_in_bytes": 2, "alias_size_in_bytes": 2}
    made = types.SimpleNamespace(
        as_text=lambda: text,
        cost_analysis=lambda: {"flops": 7.0, "optimal_seconds": -0.75},
        memory_analysis=lambda: types.SimpleNamespace(**sizes),
    )
    device = types.SimpleNamespace(device_kind="TPU v6 lite", platform="tpu")
    mesh: Any = types.SimpleNamespace(devices=np.array([device]), shape=dict.fromkeys(mesh_lib.AXES, 1), size=1)
    lower: Any = lambda _: types.SimpleNamespace(compile=lambda: made)  # noqa: E731
    model = families.read_config(config.model.path)
    return programs.measure(
        programs.Program("p", "evaluate", "sampler", model, mesh, lower, unrolled=True, **program), config
    )


def test_the_command_compiles_for_devices_that_are_not_there(config, tmp_path):
    tpu = importlib.util.find_spec("libtpu") is not None  # the extra `tpu`; else the command runs for the CPU
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    out = tmp_path / "table.jsonl"
    command = [
        sys.executable,
        "-m",
        "dail_jax.launch",
        "compile",
        "--config",
        str(file),
        "--topology",
        "v5e:2x2" if tpu else "cpu",
        "--quick",
        "--json",
        str(out),
        "--only",
        "step",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["program"] for row in rows] == [STEP]
    assert (rows[0]["verdict"], rows[0]["hbm_gb"]) == (("fits", 16) if tpu else ("compiles", None))
    assert ("TPU v5 lite" if tpu else "cpu") in done.stdout


GPU_TEXT = """HloModule m, is_scheduled=true

%product (p: bf16[256,128], q: bf16[128,512]) -> f32[256,512] {
  %p = bf16[256,128]{1,0} parameter(0)
  %q = bf16[128,512]{1,0} parameter(1)
  ROOT %d = f32[256,512]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[256,128], w: bf16[32,512]) -> f32[256,512] {
  %x = bf16[256,128]{1,0} parameter(0)
  %w = bf16[32,512]{1,0} parameter(1)
  %start = (bf16[32,512]{1,0}, bf16[128,512]{1,0}) all-gather-start(%w), replica_groups=[1,4]<=[4], dimensions={0}
  %done = bf16[128,512]{1,0} all-gather-done(%start)
  %f = f32[256,512]{1,0} fusion(%x, %done), kind=kCustom, calls=%product
  ROOT %c = f32[256,512]{1,0} custom-call(%x, %f), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""


def test_a_gpus_instructions_take_their_flops_or_their_bytes_and_a_start():
    h100 = chips.CHIPS["H100"]
    (gather, gathered), (product, time), (call, _) = Reader(GPU_TEXT, h100).steps()
    assert product.flops == call.flops == 2 * 256 * 128 * 512 and gather.flops == 0
    assert gather.moved == 2 * (32 + 128) * 512 and product.moved == 2 * 256 * 128 + 2 * 128 * 512 + 4 * 256 * 512
    assert time.time == pytest.approx(product.moved / 3350e9 + 2e-6)  # 0.24 us of memory, 0.03 of products
    assert gathered.links == pytest.approx(2 * 96 * 512 / (3350e9 / 8) + 20e-6)


def test_gpus_that_are_not_there_are_described_to_the_plugin(config):
    """Without JAX's plugin for CUDA it is asked for; with it, sharded programs compile."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        with pytest.raises(UserError, match=r"pip install 'dail_jax\[cuda\]'"):
            chips.devices("h100:8")
        pytest.skip("JAX's plugin for CUDA is not installed")
    devices = chips.devices("h100:2x4")
    assert len(devices) == 8 and devices[7].process_index == 1 and chips.chip(devices[0]).hbm == 80
    paged = {"evaluate.pages": 0.5, "generate.pages": 0.5, "generate.kv_dtype": "int8"}
    config = config_lib.with_overrides(config, paged, "test")
    rows = compile_on(config, devices[:4], quick=True)
    assert len(rows) == 7 and {row.verdict for row in rows.values()} == {"fits"}, rows
    assert [row.cache_copies for name, row in rows.items() if "pages" in name] == [0] * 4
