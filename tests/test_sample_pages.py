"""Keys and values in pages: the same samples, from memory for fewer than all slots' longest texts."""

import dataclasses
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

CFG = dataclasses.replace(dense.CFG, H=128, layers=dense.CFG.layers[:1])  # the kernel's heads have 128 channels


@pytest.fixture
def kernel(monkeypatch):
    """Runs the TPU's kernels on this CPU."""

    def wait(self):
        for copy in self._async_copies:
            copy.wait()
        return self._vmem_buf[...]  # loaded, since the emulation cannot reshape a reference

    monkeypatch.setattr(ragged.MultiPageAsyncCopyDescriptor, "wait", wait)
    monkeypatch.setattr(pages, "runs_kernel", lambda: True)
    with pltpu.force_tpu_interpret_mode():
        yield


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


def test_the_kernel_draws_the_einsum_s_texts_on_four_devices(kernel, monkeypatch):
    monkeypatch.setattr(pages, "PAGE", 8)
    mesh = mesh_of(data=2, tensor=2)
    params = weights.init(jax.random.key(1), CFG, std=0.4)
    asked = [dataclasses.replace(dense.requests()[1], samples=(0, 1), limit=5)]
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, weights.shardings(CFG, mesh))
        kw = {"slots": 2, "cfg": CFG, "never": (5, dense.STOP)}
        want, got = (dense.collect(dense.sampler(placed, mesh, pages=x, **kw), asked) for x in (None, 0.5))
    dense.same(got, want, exact=False)
    assert [len(x.tokens) for x in got.values()] == [5, 5]


def test_the_kernel_reads_and_writes_what_a_table_lists(kernel):
    """Rows of 1, 37 and 70 tokens, and one that has ended, beside NaN where nobody looks."""
    b, n, k, h, page = 4, 6, 2, 128, 16
    at, rng = np.array([0, 36, 69, -1]), np.random.default_rng(0)
    q, key, value = (rng.normal(size=(b, 1, heads, h)).astype(np.float32) for heads in (n, k, k))
    table = 1 + rng.permutation(20).reshape(b, 5).astype(np.int32)
    texts = rng.normal(size=(b, 80, 2, k, h)).astype(np.float32)
    pool = np.full((23, page, 2 * k, h), np.nan, np.float32)
    for row in range(b):
        for i in range(max(at[row], 0)):
            pool[table[row, i // page], i % page] = texts[row, i].swapaxes(0, 1).reshape(2 * k, h)
    pool[table[3, 0]], pool[0] = 0, 0
    run = jax.jit(lambda *args: pages.attend(*args, scale=0.3))
    out, changed = run(q, key, value, jnp.asarray(pool), table, at[:, None].astype(np.int32))
    for row in range(3):
        keys = np.concatenate([texts[row, : at[row], 0], key[row]]).swapaxes(0, 1)[None]
        values = np.concatenate([texts[row, : at[row], 1], value[row]]).swapaxes(0, 1)[None]
        mask = np.ones((1, 1, at[row] + 1), bool)
        want = attention.attend_cached(jnp.asarray(q[row : row + 1]), [(keys, values, mask, 1)], 0.3)
        np.testing.assert_allclose(out[row], want[0], atol=1e-5)
        written = np.stack([key[row, 0], value[row, 0]], 1).reshape(2 * k, h)
        assert np.array_equal(changed[table[row, at[row] // page], at[row] % page], written)
    assert np.isfinite(out).all()
    same = np.asarray(changed) == pool
    assert (~(same | np.isnan(pool))).sum((1, 2, 3)).astype(bool).sum() <= 4  # the rows' pages, and that of ended rows


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


def test_what_the_kernel_does_not_take_is_refused():
    refusal = lambda platform, tensor=1, **kw: pages.refusal(dataclasses.replace(CFG, **kw), platform, tensor)  # noqa: E731
    assert refusal("tpu") is None and refusal("cpu", H=6) is None and refusal("tpu", K=8, N=8) is None
    assert "heads of 128 channels" in str(refusal("tpu", H=64))
    assert "here are 6" in str(refusal("tpu", K=12, N=12, tensor=2))
    assert "gpu" in str(refusal("gpu"))
    assert "window or a state" in str(refusal("tpu", layers=(dataclasses.replace(CFG.layers[0], window=8),)))

    def found(stage, platform):
        """What `check` says before a stage starts."""
        devices = types.SimpleNamespace(flat=[types.SimpleNamespace(platform=platform)])
        mesh = types.SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": 1, "tensor": 2})
        tree = {"run_dir": "r", "model": {"path": "m"}, stage: {"pages": 0.5}}
        subject = types.SimpleNamespace(
            config=config_lib.build(tree, "test"), stage=stage, server=None, sample_mesh=mesh, model=CFG
        )
        return [str(problem) for problem in checks.caches(subject)]  # pyright: ignore[reportArgumentType]

    assert found("evaluate", "tpu") == []
    assert found("generate", "gpu") == ["generate.pages: there is no kernel for a gpu: want null"]


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
