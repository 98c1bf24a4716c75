"""Keys and values in int8 while sampling: their form, what it costs in log-probabilities, and all that samples promise."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sample_continue as follow
import test_sample_engine as exact
import tiny
from conftest import mesh_of
from test_layout import V5E, chosen

from dail_jax import config as config_lib
from dail_jax.ahead import programs
from dail_jax.errors import UserError
from dail_jax.model import attention, families, kv_int8, layers, weights
from dail_jax.sample import decode, engine, mixture
from dail_jax.stages import recipes

ROPE = families.Rope(1_000_000.0)
CFG = dataclasses.replace(exact.CFG, H=24, qk_norm="", qkv_bias=True, layers=(families.Layer(ROPE),) * 2)


@pytest.fixture(scope="module")
def params():
    """With biases of keys that are far larger than what they are added to, where RoPE turns slowly, as Qwen2.5 has them."""
    params = weights.init(jax.random.key(0), CFG, std=0.4)
    bias = np.zeros((CFG.L, CFG.K, CFG.H), np.float32)
    bias[:, 0, 11], bias[:, 0, 23], bias[:, 1, 10] = 60, -45, 80
    return {**params, "layers": {**params["layers"], "k_bias": jnp.asarray(bias)}}


def vectors(*shape):
    """Of very different sizes, and one of zeros."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*shape, CFG.H), np.float32) * 10 ** rng.uniform(-3, 2, (*shape, 1)).astype(np.float32)
    x[0, 0, 0] = 0
    return x


def test_every_token_and_head_has_its_own_scale():
    k, v = vectors(2, 3, 5), vectors(2, 3, 5)[::-1]
    centre = np.arange(3 * CFG.H, dtype=np.float32).reshape(3, -1)
    for keys, values in (kv_int8.quantized(k, v, None), kv_int8.quantized(k, v, jnp.asarray(centre))):
        for form in (keys, values):
            assert form.values.dtype == jnp.int8 and form.scale.dtype == jnp.float32 and form.scale.shape == (2, 3, 5)
            zero = np.asarray(form.scale) == 0
            assert (np.abs(form.values).max(-1) == np.where(zero, 0, 127)).all() and (form.values[zero] == 0).all()
        assert np.array_equal(values.scale, np.abs(v).max(-1) * np.float32(1 / 127))
        assert (
            np.abs(values.values * np.asarray(values.scale)[..., None] - v) <= 0.5001 * values.scale[..., None]
        ).all()
        again = kv_int8._rounded(values.values * values.scale[..., None])
        assert np.array_equal(again.values, values.values)
        np.testing.assert_allclose(again.scale, values.scale, rtol=1e-6)
    plain, moved = kv_int8.quantized(k, v, None)[0], kv_int8.quantized(k + centre[:, None], v, jnp.asarray(centre))[0]
    back = lambda form: np.asarray(kv_int8.turned(form.values * form.scale[..., None]))  # noqa: E731
    np.testing.assert_allclose(back(plain), k, atol=0.02 * np.abs(k).max())
    worst = 4 * np.asarray(plain.scale)[..., None]  # eight channels are turned together, each off by half a scale
    assert (np.abs(back(plain) - k) <= worst).all()
    np.testing.assert_allclose(back(moved), k, atol=0.02 * np.abs(k).max())


def test_turning_keys_and_queries_changes_no_product():
    x = np.arange(2 * CFG.H, dtype=np.float32).reshape(2, -1)
    assert np.array_equal(kv_int8.turned(kv_int8.turned(jnp.asarray(x))), 8 * x)  # 24 channels: three times eight
    for h, size in ((6, 2), (7, 1), (64, 64), (96, 32)):
        assert kv_int8._size(h) == size
        matrix = np.asarray(kv_int8.turned(jnp.eye(h)))
        assert np.array_equal(matrix @ matrix.T, size * np.eye(h)) and np.abs(matrix).sum() == h * size


def test_the_centre_is_the_mean_of_what_a_bias_becomes():
    bias = np.random.default_rng(1).standard_normal((2, 10), np.float32)
    for rope in (families.Rope(10_000.0), families.Rope(500.0, share=0.6)):
        frequencies, factor = rope.frequencies(10)
        at = jnp.arange(kv_int8.POSITIONS)[:, None, None] * frequencies
        each = layers.rotate(
            jnp.broadcast_to(bias, (kv_int8.POSITIONS, 2, 10)), (jnp.cos(at) * factor, jnp.sin(at) * factor)
        )
        np.testing.assert_allclose(kv_int8.centre_of(jnp.asarray(bias), rope), each.mean(0), atol=1e-4)
    assert np.array_equal(kv_int8.centre_of(jnp.asarray(bias), None), bias)


def test_attention_is_that_of_the_vectors_that_int8_stands_for():
    """Of several sets: what rows share, in two entries, and their own; keys that all lack the same centre."""
    rng, b, n, k, h = np.random.default_rng(2), 6, 4, 2, CFG.H
    q = jnp.asarray(rng.standard_normal((b, 1, n, h), np.float32))
    centre = jnp.asarray(10 * rng.standard_normal((k, h)).astype(np.float32))
    int8, plain = [], []
    for g, s, entries in ((2, 14, 2), (b, 5, 1)):
        mask = rng.random((b, 1, s)) < 0.7
        keys, values = (rng.standard_normal((g, k, s, h)).astype(np.float32) for _ in range(2))
        x, y = kv_int8.quantized(jnp.asarray(keys) + centre[:, None], jnp.asarray(values), centre)
        int8.append((x, y, mask, entries))
        whole = kv_int8.turned(x.values * x.scale[..., None]), y.values * y.scale[..., None]
        plain.append((whole[0] + centre[:, None], whole[1], mask, entries))
    np.testing.assert_allclose(attention.attend_cached(q, int8), attention.attend_cached(q, plain), atol=1e-5)


@pytest.fixture
def forced(monkeypatch):
    """The benchmark that reads given texts with the sampler's programs."""
    monkeypatch.syspath_prepend(str(tiny.ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    import int8_cache

    return int8_cache


def test_log_probabilities_are_off_by_a_few_hundredths(params, one_device, forced, monkeypatch):
    """Of a random model in float32; by ten times as much where nothing is done about the biases."""
    texts = np.random.default_rng(3).integers(6, 30, (4, 48)).astype(np.int32)
    listed = weights.unstack(params, CFG)
    with jax.set_mesh(one_device):
        want = forced.read(listed, CFG, texts, 20, None)[0]
        got = np.abs(forced.read(listed, CFG, texts, 20, "int8")[0] - want)
        jax.clear_caches()
        for name, function in forced.PLAIN.items():
            monkeypatch.setattr(kv_int8, name, function)
        plain = np.abs(forced.read(listed, CFG, texts, 20, "int8")[0] - want)
        jax.clear_caches()
    hidden = jnp.asarray(exact.jitted_encode(params, texts, np.tile(np.arange(48, dtype=np.int32), (4, 1)), CFG))
    logs = jax.nn.log_softmax(exact.transformer.unembed(params, hidden))
    np.testing.assert_allclose(want, np.take_along_axis(logs[:, 19:-1], texts[:, 20:, None], -1)[..., 0], atol=2e-4)
    assert 0 < got.mean() < 0.03 and got.max() < 0.5
    assert plain.mean() > 8 * got.mean()


def sampler(params, mesh, cfg=CFG, **kw):
    s = exact.sampler(params, mesh, cfg=cfg, **kw)
    return dataclasses.replace(s, params=params, kv_dtype="int8")


@pytest.fixture(scope="module")
def found(params, one_device):
    """Two roles, with all that follows from their samples."""
    with jax.set_mesh(one_device):
        s = dataclasses.replace(sampler(params, one_device), max_tokens=24 + follow.ROOM)
        return follow.drawn(s, asked())


def asked():
    return [dataclasses.replace(r, samples=r.samples[:2]) for r in follow.asked()[:2]]


def test_neighbours_and_interruptions_do_not_change_a_bit(params, one_device, found):
    """One problem alone; and a run that has its samples, and reads them again for what follows from them."""
    texts = [found["p1", i] for i in range(2)]
    again = dataclasses.replace(asked()[1], samples=(), drawn=tuple(texts))
    with jax.set_mesh(one_device):
        s = dataclasses.replace(sampler(params, one_device), max_tokens=24 + follow.ROOM)
        exact.same(follow.drawn(s, [asked()[1]]), {k: v for k, v in found.items() if "p1" in k[0]})
        exact.same(follow.drawn(s, [again]), {k: v for k, v in found.items() if "/p1/" in k[0]})
    assert sum("/p1/" in name for name, _ in found) >= 4


def test_devices_matter_by_a_level_here_and_there(params, found):
    """Sums round differently on four devices, and where that turns one level into the next, a little more is different."""
    mesh = mesh_of(data=2, tensor=2)
    with jax.set_mesh(mesh):
        s = sampler(jax.device_put(params, weights.shardings(CFG, mesh)), mesh)
        s = dataclasses.replace(s, max_tokens=24 + follow.ROOM)
        got = follow.drawn(s, asked())
        state = decode.empty(s.grid(2, 32), CFG, jnp.float32)
    for x in jax.tree.leaves((state.cache.k, state.cache.prompt_v)):
        assert x.sharding.shard_shape(x.shape)[:2] == (x.shape[0] // 2, CFG.K // 2)
    samples = {key: x for key, x in found.items() if not key[0].startswith("then/")}
    gaps = [
        np.abs(got[key].logq - x.logq).max()
        for key, x in samples.items()
        if got[key].tokens.tolist() == x.tokens.tolist()
    ]
    assert len(gaps) >= len(samples) - 1 and max(gaps) < 0.02


def test_windows_and_prompts_are_in_int8_too(params, one_device):
    """A ring of int8 keys: what is drawn is close to what exact keys say."""
    cfg = dataclasses.replace(CFG, layers=(families.Layer(ROPE, 10), families.Layer(None)))
    kw, ask = {"roles": 1, "tau": 0.0, "cfg": cfg}, [exact.requests(3, 1, 1)[2]]
    with jax.set_mesh(one_device):
        (got,), (want,) = (
            exact.collect(make(params, one_device, **kw), ask).values() for make in (sampler, exact.sampler)
        )
    assert got.tokens[:4].tolist() == want.tokens[:4].tolist()
    gap = np.abs(got.logq[:4] - want.logq[:4])
    assert 0 < gap.max() < 0.1


def test_caches_are_updated_in_place(params, one_device):
    grid = decode.Grid(2, 2, 8, 2, 128, 96, 8, kv_dtype="int8")
    with jax.set_mesh(one_device):
        s = sampler(params, one_device)
        state = jax.eval_shape(lambda: decode.empty(grid, CFG, jnp.float32))
        compiled = decode.decode.lower(grid, CFG, s.params, None, state, s.rules, s.sampling).compile()
    text = compiled.as_text()
    assert text is not None
    for shape in ("s8[32,2,112,24]", "f32[32,2,112]", "s8[4,2,256,24]", "f32[4,2,256]"):
        assert shape in text
        assert not re.search(rf"= {re.escape(shape)}\S* copy\(", text)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_half_the_bytes_are_twice_the_slots():
    """In what `auto` counts, and in the programs' names: Qwen3-8B on v5e:4x4."""
    slots = {form: chosen(V5E, "evaluate.slots=auto", f"evaluate.kv_dtype={form}")[0] for form in ("null", "int8")}
    assert slots["int8"]["evaluate.slots"] == 2 * slots["null"]["evaluate.slots"]
    config = config_lib.load("configs/qwen3_8b_reasoning.yaml", ["evaluate.kv_dtype=int8"])
    model = families.read_config("configs/models/qwen3_8b")
    mesh = programs.abstract_meshes(config.mesh, 16)[1]
    rollouts, evaluation = programs.jobs_of(config, model)
    assert [job.grid(mesh).kv_dtype for job in (rollouts, evaluation)] == [None, "int8"]
    assert "4312 tokens, keys in int8: prefill" in programs.names_of(evaluation, mesh)[0]
    small = dataclasses.replace(evaluation, slots=8).grid(mesh)
    sizes = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v, cache.prompt_k, cache.prompt_v)))
        for form in (None, "int8")
        for cache in [
            jax.eval_shape(
                lambda form=form: decode.empty(dataclasses.replace(small, kv_dtype=form), model, jnp.bfloat16)
            ).cache
        ]
    ]
    assert sizes[1] / sizes[0] == (model.H + 4) / (2 * model.H)


def test_it_is_on_record_where_it_is_asked_for(tmp_path):
    keys = ("generate", "evaluate")
    plain = config_lib.build(tiny.tree(tmp_path / "run"), "test")
    int8 = config_lib.build(tiny.tree(tmp_path / "run", **{f"{key}__kv_dtype": "int8" for key in keys}), "test")
    for key in keys:
        before, after = (getattr(recipes, key)(config).settings[key] for config in (plain, int8))
        assert after == {**before, "kv_dtype": "int8"} != before
    online = {"train__objective": "grpo", "train__online__kv_dtype": "int8"}
    settings = recipes.train(config_lib.build(tiny.tree(tmp_path / "run", **online), "test")).settings
    assert (
        settings["train"]["online"]["kv_dtype"] == "int8"
        and "kv_dtype" not in recipes.train(plain).settings["train"]["online"]
    )


def test_a_prompt_that_is_not_a_number_is_still_refused(params, one_device):
    damaged = {**params, "embed": params["embed"].at[29].set(jnp.nan)}
    request = dataclasses.replace(exact.requests(1, 1, 1)[0], prompts=((7, 29, 9),))
    sampling = mixture.sampling_params(config_lib.Sampling())
    s = engine.Engine(damaged, CFG, one_device, (3,), 7, 8, 24, sampling, never=(29,), kv_dtype="int8")
    with jax.set_mesh(one_device), pytest.raises(UserError, match="not finite for token 0 of sample 0 of p0"):
        list(s.run([request]))
