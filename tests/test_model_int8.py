"""int8 weights: what they are, that they compute as their dequantised form does, and that they load without it."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import mesh_of

from dail_jax import config as config_lib
from dail_jax.checkpoint import base, hf
from dail_jax.errors import UserError
from dail_jax.model import families, int8, transformer, weights
from dail_jax.model import lora as lora_lib
from dail_jax.model.int8 import Int8
from dail_jax.sample import engine, mixture
from dail_jax.sample.sampler import Request
from dail_jax.train import step

JSON = {
    "model_type": "qwen3",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
}
CFG = families.from_tree(JSON, "config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with channels of very different sizes."""
    params = weights.init(jax.random.key(0), CFG, std=0.3)
    spread = lambda x: x * 10 ** jax.random.uniform(jax.random.key(x.size), x.shape[-1:], minval=-1, maxval=0.5)  # noqa: E731
    path = tmp_path_factory.mktemp("int8") / "model"
    hf.save(path, jax.tree.map(spread, params), CFG, JSON)
    return path


@pytest.fixture(scope="module")
def params(folder):
    return hf.load(folder, mesh_of(), "float32", "int8")[0]


def dequantised(params):
    """The float32 weights that int8 ones stand for."""

    def one(name, weight):
        leaf = (params["layers"] if weight.layered else params)[name]
        if not isinstance(leaf, Int8):
            return leaf
        layers = "l" * weight.layered
        return jnp.einsum(f"{layers}{weight.axes},{layers}{weight.channels}->{layers}{weight.axes}", *_floats(leaf))

    return weights.tree(CFG, one)


def _floats(leaf):
    return leaf.values.astype(jnp.float32), leaf.scale.astype(jnp.float32)


@pytest.fixture(scope="module")
def twin(params):
    return dequantised(params)


def batch():
    rng = np.random.default_rng(0)
    tokens, positions = rng.integers(1, 40, (2, 13)).astype(np.int32), np.tile(np.arange(13, dtype=np.int32), (2, 1))
    positions[1, :4] = -1
    return tokens, positions


def test_a_channel_is_rounded_by_its_own_scale():
    """Of two input axes and one output axis, as of the attention's output: against the definition, channel by channel."""
    x = np.random.default_rng(0).standard_normal((3, 4, 5), np.float32) * np.array([1, 10, 0, 1e-3, 100], np.float32)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        q = int8.quantize(x.astype(dtype), [2], dtype)
        assert q.values.dtype == np.int8 and q.scale.dtype == dtype and q.scale.shape == (5,)
        assert np.abs(q.values).max((0, 1)).tolist() == [127, 127, 0, 127, 127]
        exact, scale = x.astype(dtype).astype(np.float32), q.scale.astype(np.float32)
        np.testing.assert_allclose(scale, np.abs(exact).max((0, 1)) / 127, rtol=0 if dtype == np.float32 else 2**-8)
        assert (np.abs(q.values * scale - exact) <= 0.505 * scale).all()
    int8_of = lambda x: int8.quantize(x, [0], np.float32)  # noqa: E731
    whole = int8_of(x.reshape(3, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "BLOCK", 20)  # a channel at a time
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, int8_of(x.reshape(3, 20)))))


def test_every_matrix_is_in_int8_and_takes_half_of_bfloat16(params):
    exact = {name for name in weights.declare(CFG) if not isinstance({**params, **params["layers"]}[name], Int8)}
    assert exact == {"attn_norm", "mlp_norm", "q_norm", "k_norm", "norm"}
    size = lambda cfg, quantize: sum(  # noqa: E731
        x.size * x.dtype.itemsize for x in jax.tree.leaves(weights.abstract(cfg, jnp.bfloat16, quantize=quantize))
    )
    real = families.read_config("configs/models/qwen3_8b")
    assert size(real, None) == 2 * weights.count(real)
    channels = sum(
        math.prod(w.size(a, real) for a in w.channels) * (real.L if w.layered else 1)
        for w in weights.declare(real).values()
        if w.channels
    )
    norms = real.L * (2 * real.D + 2 * real.H) + real.D
    assert size(real, "int8") == weights.count(real) - norms + 2 * (norms + channels)
    assert 0.5 < size(real, "int8") / size(real, None) < 0.5003


def test_the_forward_pass_is_that_of_the_dequantised_weights(params, twin):
    tokens, positions = batch()
    want = transformer.encode(twin, tokens, positions, CFG)
    got = transformer.encode(params, tokens, positions, CFG)
    live = positions >= 0
    np.testing.assert_allclose(got[live], want[live], atol=2e-5)
    by_int8, by_float = (transformer.unembed(p, want)[live] for p in (params, twin))
    np.testing.assert_allclose(by_int8, by_float, atol=2e-5 * float(np.abs(by_float).max()))


def test_the_step_s_gradient_is_that_of_the_dequantised_weights(params, twin):
    cfg = config_lib.Train(batch_size=2, chunk=8, remat="full", lora={"rank": 3})  # pyright: ignore
    fresh = lora_lib.init(jax.random.key(1), CFG, cfg.lora)
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)
    rng, rows = np.random.default_rng(1), {"mask": np.ones((1, 2, 5), bool), "targets": np.zeros((1, 2, 5), np.int32)}
    for role in ("student", "privileged", "negative"):
        rows[f"{role}_tokens"] = rng.integers(1, 40, (1, 2, 9)).astype(np.int32)
        rows[f"{role}_positions"] = np.tile(np.arange(9, dtype=np.int32), (1, 2, 1))
    _, gradient = step.make_loss(step.spec_of(CFG, cfg), mesh_of())
    (got, ours, _), (want, theirs, _) = gradient(params, lora, rows), gradient(twin, lora, rows)
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    assert ours["kl_privileged"] > 0.1
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))
        assert float(jnp.abs(y).max()) > 1e-4


def test_the_backward_pass_keeps_no_converted_copy():
    w = Int8(jnp.ones((6, 8, 3), jnp.int8), jnp.ones(3))
    _, backward = jax.vjp(lambda x: int8.times(x, w), jnp.ones((2, 5, 6, 8)))
    kept = [(x.dtype, x.size) for x in jax.tree.leaves(backward)]
    assert (jnp.int8, 144) in kept and all(size < 144 for dtype, size in kept if dtype != jnp.int8)


def test_neighbours_do_not_change_a_sample(params):
    """Two roles: alone and among others it is the same bit for bit, and in another number of slots the same tokens."""

    def draw(slots, names):
        sampling = mixture.sampling_params(config_lib.Sampling(temperature=0.9), tau=0.3, proposals=2)
        sampler = engine.Engine(params, CFG, mesh_of(), (3,), 7, slots, 12, sampling, roles=2)
        prompts = {name: (tuple(range(4, 9 + i)), tuple(range(9, 20 + i))) for i, name in enumerate("abc")}
        found = sampler.run([Request(name, prompts[name], (0, 1), 12) for name in names])
        return {(x.name, x.sample): x for x in found}

    alone, together, fewer = draw(8, "b"), draw(8, "abc"), draw(4, "abc")
    for key, x in alone.items():
        assert len(x.tokens) > 1
        for field in ("tokens", "logq", "log_student", "log_privileged"):
            assert (getattr(x, field) == getattr(together[key], field)).all()
    for key, x in together.items():
        assert (x.tokens == fewer[key].tokens).all()
        np.testing.assert_allclose(x.logq, fewer[key].logq, atol=1e-4)


def test_it_loads_sharded_and_converted_as_it_is(folder, params, tmp_path):
    mesh = mesh_of(2, 2, 2)
    sharded, _ = hf.load(folder, mesh, "float32", "int8")
    base.save(tmp_path / "converted", params, folder)
    converted, _ = base.load(tmp_path / "converted", mesh, "float32", "int8")
    for tree in (sharded, converted):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, params)))
        same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) and x.dtype == y.dtype  # noqa: E731
        assert all(jax.tree.leaves(jax.tree.map(same, tree, weights.abstract(CFG, jnp.float32, mesh, "int8"))))
    # Of the unembedding, which the loss wants divided by both, and of a stack divided by heads.
    assert sharded["unembed"].scale.sharding.shard_shape((40,)) == (10,)
    assert sharded["layers"]["q"].scale.sharding.shard_shape((3, 4, 6)) == (3, 2, 6)
    assert sharded["layers"]["o"].scale.sharding.shard_shape((3, 16)) == (3, 8)


def test_converted_weights_of_the_other_form_are_refused(folder, params, tmp_path):
    base.save(tmp_path / "q", params, folder)
    base.save(tmp_path / "x", hf.load(folder, mesh_of(), "float32")[0], folder)
    for name, quantize, words in (
        ("q", None, "holds int8 weights, and model.quantize asks for exact ones: set it to int8"),
        ("x", "int8", "holds exact weights, and model.quantize asks for int8 ones: set it to null"),
    ):
        for refuse in (lambda *a: base.load(a[0], mesh_of(), "float32", a[1]), lambda *a: base.check(a[0], CFG, a[1])):
            with pytest.raises(UserError, match=words):
                refuse(tmp_path / name, quantize)
    (tmp_path / "q" / base.PARAMS / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="damaged: convert the model again"):
        base.check(tmp_path / "q", CFG, "int8")


def test_experts_are_refused():
    tree = {**JSON, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    with pytest.raises(UserError, match=r"model\.quantize: got int8, want null: experts are not quantised yet"):
        weights.abstract(families.from_tree(json.loads(json.dumps(tree)), "c"), jnp.float32, mesh_of(), "int8")
