"""Keys and values in pages: the same samples, from memory for fewer than all slots' longest texts."""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sample_engine as dense
from conftest import mesh_of
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged

from dail_jax import config as config_lib
from dail_jax.model import attention, pages, weights
from dail_jax.sample import decode
from dail_jax.sample import pool as pool_lib
from dail_jax.stages import checks

CFG = dataclasses.replace(dense.CFG, H=128, layers=dense.CFG.layers[:1])  # the TPU's kernel has heads of 128 channels
SIZES = {"tpu": 128, "gpu": 32}
GPU_KERNELS = "jax.experimental.pallas.ops.gpu.paged_attention"


@pytest.fixture
def tpu(monkeypatch):
    """Runs the TPU's kernels on this CPU."""

    def wait(self):
        for copy in self._async_copies:
            copy.wait()
        return self._vmem_buf[...]  # loaded, since the emulation cannot reshape a reference

    monkeypatch.setattr(ragged.MultiPageAsyncCopyDescriptor, "wait", wait)
    monkeypatch.setattr(pages, "kernel", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode():
        yield "tpu"


@pytest.fixture
def gpu(monkeypatch):
    """Runs the GPU's kernel on this CPU, with several programs for a text."""
    kernels = pytest.importorskip(GPU_KERNELS)
    monkeypatch.setattr(kernels, "paged_attention", functools.partial(kernels.paged_attention, interpret=True))
    monkeypatch.setattr(pages, "kernel", lambda: "gpu")
    monkeypatch.setattr(pages, "SPLIT", 32)
    return "gpu"


@pytest.fixture(params=["tpu", "gpu"])
def kernel(request):
    """The platform whose kernel runs here."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def params():
    return weights.init(jax.random.key(0), dense.CFG, std=0.4)


def test_samples_are_the_same_though_some_are_given_up(params, one_device, monkeypatch):
    """As those of slots with caches of their own; to the bit whatever number of pages there is."""
    monkeypatch.setattr(pages, "PAGE", 4)
    asked, drawn, again = dense.requests()[:4], {}, {}
    with jax.set_mesh(one_device):
        for share in (None, 1.0, 0.01):
            s = dense.sampler(params, one_device, pages=share)
            drawn[share], again[share] = dense.collect(s, asked), s.usage.again
            assert s.usage.live == sum(len(x.tokens) for x in drawn[share].values())
            assert s.figures().get("drawn_again") == (None if share is None else s.usage.again)
        assert again[1.0] == 0 < again[0.01]
        assert s.grid(3, 32).pages == 1 + 2 * 2 * 8 + 16 * 2
    dense.same(drawn[1.0], drawn[None], exact=False)
    dense.same(drawn[0.01], drawn[1.0])


@pytest.mark.parametrize(
    ("kernel", "parts", "form"), [("tpu", 2, None), ("gpu", 2, "int8"), ("gpu", 1, None)], indirect=["kernel"]
)
def test_the_kernel_draws_the_einsum_s_texts_on_one_device_and_on_four(kernel, parts, form, monkeypatch):
    monkeypatch.setattr(pages, "PAGE", 8)
    mesh, cfg = mesh_of(data=parts, tensor=parts), dataclasses.replace(CFG, H=SIZES[kernel])
    params = weights.init(jax.random.key(1), cfg, std=0.4)
    asked = [dataclasses.replace(dense.requests()[1], samples=(0, 1), limit=5)]
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, weights.shardings(cfg, mesh))
        kw = {"slots": 2, "cfg": cfg, "never": (5, dense.STOP)}
        samplers = [dense.sampler(placed, mesh, pages=share, **kw) for share in (None, 0.5)]
        want, got = (dense.collect(dataclasses.replace(s, kv_dtype=form), asked) for s in samplers)
    dense.same(got, want, exact=False)
    assert [len(x.tokens) for x in got.values()] == [5, 5]


def test_the_kernel_reads_and_writes_what_a_table_lists(kernel):
    """Rows of 1, 37 and 70 tokens, and one that has ended, beside what nobody may look at."""
    b, n, k, h, page = 4, 6, 2, SIZES[kernel], 16
    at, rng = np.array([0, 36, 69, -1]), np.random.default_rng(0)
    q, key, value = (rng.normal(size=(b, 1, heads, h)).astype(np.float32) for heads in (n, k, k))
    table = 1 + rng.permutation(20).reshape(b, 5).astype(np.int32)
    texts = rng.normal(size=(b, 80, 2, k, h)).astype(np.float32)
    # The GPU's kernel multiplies what it fetches and does not look at by zero.
    held = np.full((23, page, 2, k, h), np.nan if kernel == "tpu" else 1e4, np.float32)
    for row in range(b):
        for i in range(max(at[row], 0)):
            held[table[row, i // page], i % page] = texts[row, i]
    held[table[3, 0]], held[0] = 0, 0

    def pool_of(held):
        if kernel == "tpu":
            return pages.Joined(jnp.asarray(held.swapaxes(2, 3).reshape(23, page, 2 * k, h)))
        return pages.Apart(*jnp.asarray(held.transpose(2, 3, 0, 1, 4)))

    run = jax.jit(lambda *args: pages.attend(*args, scale=0.3))
    out, changed = run(q, key, value, pool_of(held), table, at[:, None].astype(np.int32))
    expected = held.copy()
    for row in range(3):
        keys = np.concatenate([texts[row, : at[row], 0], key[row]]).swapaxes(0, 1)[None]
        values = np.concatenate([texts[row, : at[row], 1], value[row]]).swapaxes(0, 1)[None]
        mask = np.ones((1, 1, at[row] + 1), bool)
        want = attention.attend_cached(jnp.asarray(q[row : row + 1]), [(keys, values, mask, 1)], 0.3)
        np.testing.assert_allclose(out[row], want[0], atol=1e-5)
        expected[table[row, at[row] // page], at[row] % page] = key[row, 0], value[row, 0]
    assert np.isfinite(out).all()
    expected[0, 0] = key[3, 0], value[3, 0]  # of rows that have ended
    for x, y in zip(jax.tree.leaves(changed), jax.tree.leaves(pool_of(expected)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_page_is_held_twice_and_all_come_back():
    """Random starts, growth and ends on two devices: tables list a prompt's pages, then pages of the row alone."""
    grid = decode.Grid(2, 4, 3, 2, prompt_slots=40, max_tokens=60, chunk=4, pages=2 * 90, page=8)
    pool, rng, drawn = pool_lib.Pool(grid, 2), np.random.default_rng(0), {}
    total = [len(free) for free in pool.free]
    assert total == [90 - 1 - 2 * 2 * 2 * 5] * 2
    lengths, grown = rng.integers(1, 41, (4, 2, 2)), 0
    for _ in range(600):
        slot = int(rng.integers(grid.slots))
        if slot not in drawn and pool.has_room(slot):
            entry = int(rng.integers(2))
            source, target = pool.start(slot, entry, lengths[slot // 3, entry])
            own = pool.table[pool.rows[slot], lengths[slot // 3, entry] // 8]
            assert np.array_equal(target, own) and (source < 1 + 40).all() and (own > 40).all()
            drawn[slot] = [entry, 1]
        elif slot in drawn:
            drawn[slot][1] += 4
            if drawn[slot][1] > 60 or not pool.grow(slot, drawn[slot][1]):
                pool.end(slot)
                del drawn[slot]
            grown += 1
        for device in range(2):
            held = list(pool.free[device])
            for slot, (entry, tokens) in drawn.items():
                if pool.device(slot) == device:
                    texts = lengths[slot // 3, entry] + tokens
                    for row, first, length, text in zip(
                        pool.rows[slot], pool.prompt(slot // 3, entry), lengths[slot // 3, entry], texts, strict=True
                    ):
                        full, listed = length // 8, -(-text // 8)
                        assert pool.table[row, :full].tolist() == list(range(first, first + full))
                        held += pool.table[row, full:listed].tolist()
            assert sorted(held) == list(range(41, 90))
    for slot in drawn:
        pool.end(slot)
    assert grown > 100 and [len(free) for free in pool.free] == total and not pool.table.any()


def test_what_the_kernel_does_not_take_is_refused(monkeypatch):
    def device(platform, capability):
        return types.SimpleNamespace(platform=platform, compute_capability=capability)

    def refusal(platform, tensor=1, capability="9.0", kv_dtype=None, **kw):
        return pages.refusal(dataclasses.replace(CFG, **kw), device(platform, capability), tensor, kv_dtype)

    assert refusal("tpu") is None and refusal("cpu", H=6) is None and refusal("tpu", K=8, N=8) is None
    assert "heads of 128 channels" in str(refusal("tpu", H=64))
    assert "here are 6" in str(refusal("tpu", K=12, N=12, tensor=2))
    assert refusal("gpu") is None and refusal("gpu", H=64, K=3, N=3, tensor=2, capability="12.0") is None
    assert "16, 32, 64, 128 or 256 channels, the model's have 96" in str(refusal("gpu", H=96))
    assert refusal("gpu", kv_dtype="int8") is None
    assert "only a GPU's kernel" in str(refusal("tpu", kv_dtype="int8")) == str(refusal("cpu", kv_dtype="int8"))
    assert "8.0 or more, here is 7.5" in str(refusal("gpu", capability="7.5"))
    assert "an NVIDIA GPU" in str(refusal("gpu", capability="gfx942"))
    assert "window or a state" in str(refusal("tpu", layers=(dataclasses.replace(CFG.layers[0], window=8),)))

    def found(stage, *args):
        """What `check` says before a stage starts."""
        devices = types.SimpleNamespace(flat=[device(*args)])
        mesh = types.SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": 1, "tensor": 2})
        tree = {"run_dir": "r", "model": {"path": "m"}, stage: {"pages": 0.5}}
        subject = types.SimpleNamespace(
            config=config_lib.build(tree, "test"), stage=stage, server=None, sample_mesh=mesh, model=CFG
        )
        return [str(problem) for problem in checks.caches(subject)]  # pyright: ignore[reportArgumentType]

    assert found("evaluate", "tpu", None) == found("evaluate", "gpu", "8.0") == []
    refused = "the kernel wants an NVIDIA GPU of compute capability 8.0 or more, here is 7.0"
    assert found("generate", "gpu", "7.0") == [f"generate.pages: {refused}: want null"]
    monkeypatch.setitem(sys.modules, GPU_KERNELS, None)  # as where a later jax has left it out
    assert "has no kernel that reads pages on a GPU" in str(refusal("gpu"))


def test_caches_are_updated_in_place(params, one_device):
    """Pools are not copied in the compiled decode loop, and are aliased to their inputs."""
    grid = decode.Grid(2, 2, 8, 2, 128, 96, 8, pages=213, page=16)
    with jax.set_mesh(one_device):
        s = dense.sampler(params, one_device)
        state = jax.eval_shape(lambda: decode.empty(grid, dense.CFG, jnp.float32))
        table = np.zeros(pool_lib.table_shape(grid), np.int32)
        compiled = decode.decode.lower(grid, dense.CFG, s.params, None, state, s.rules, s.sampling, table).compile()
    text = compiled.as_text()
    assert text is not None and "f32[213,16,4,6]" in text
    assert "= f32[213,16,4,6]{3,2,1,0} copy(" not in text
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
