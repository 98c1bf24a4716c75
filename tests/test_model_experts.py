"""The mixture of experts: transformers' own block, an einsum over all experts, gradients, devices, neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import mesh_of
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from dail_jax.model import attention, experts

B, T, D, J, F, TOP = 4, 37, 12, 10, 9, 3


def drawn(seed=0, j=J):
    """x [B,T,D], the router [D,J], and gate, up [J,D,F] and down [J,F,D]."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = (B, T, D), (D, j), (j, D, F), (j, D, F), (j, F, D)
    x, router, *weights = (0.5 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return 2 * x, router, tuple(weights)


def by_einsum(x, router, weights, normalise=True):
    """Every token through every expert; those not picked have weight 0."""
    picked, by = experts.route(x, router, TOP, normalise)
    gate, up, down = weights
    hidden = jax.nn.silu(jnp.einsum("btd,jdf->btjf", x, gate)) * jnp.einsum("btd,jdf->btjf", x, up)
    share = (jax.nn.one_hot(picked, gate.shape[0]) * by[..., None]).sum(2)
    return jnp.einsum("btjf,jfd,btj->btd", hidden, down, share)


def ours(x, router, weights, normalise=True):
    return experts.apply(x, *experts.route(x, router, TOP, normalise), weights)


@pytest.mark.parametrize("normalise", [True, False])
def test_equals_transformers(normalise):
    x, router, (gate, up, down) = drawn()
    config = Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        num_experts=J,
        num_experts_per_tok=TOP,
        norm_topk_prob=normalise,
    )
    block = Qwen3MoeSparseMoeBlock(config)
    tensors = {
        "gate.weight": router.T,
        "experts.gate_up_proj": jnp.concatenate([gate, up], 2).swapaxes(1, 2),
        "experts.down_proj": down.swapaxes(1, 2),
    }
    block.load_state_dict({name: torch.tensor(np.asarray(t)) for name, t in tensors.items()})
    with torch.no_grad():
        want = block(torch.tensor(np.asarray(x))).numpy()
    got = jax.jit(functools.partial(ours, normalise=normalise))(x, router, (gate, up, down))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.fixture(scope="module")
def wanted():
    """The value, and the gradients in the tokens, the router and the experts, of the einsum."""
    return jax.jit(jax.value_and_grad(lambda *args: jnp.sin(by_einsum(*args)).sum(), (0, 1, 2)))(*drawn())


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("way", ["tiles", "ragged"])
def test_values_and_gradients_equal_the_einsum(monkeypatch, wanted, way):
    monkeypatch.setattr(attention, "target", lambda: {"tiles": "cpu", "ragged": "tpu"}[way])
    close(jax.jit(jax.value_and_grad(lambda *args: jnp.sin(ours(*args)).sum(), (0, 1, 2)))(*drawn()), wanted)


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 1, 2), (8, 1, 1)], ids=str)
def test_devices_share_the_experts(wanted, shape):
    with jax.set_mesh(mesh_of(*shape)):
        close(jax.jit(jax.value_and_grad(lambda *args: jnp.sin(ours(*args)).sum(), (0, 1, 2)))(*drawn()), wanted)


def test_a_token_gets_the_same_bits_among_any_others():
    x, router, weights = drawn()
    run = jax.jit(ours)
    whole = np.asarray(run(x, router, weights))
    others = np.asarray(run(x.at[1:].multiply(-3), router, weights))
    assert whole[0].tobytes() == others[0].tobytes() and (whole[1:] != others[1:]).all(-1).any()
    turned = np.asarray(run(x[::-1, ::-1], router, weights))[::-1, ::-1]
    assert turned.tobytes() == whole.tobytes()


def test_all_tokens_may_pick_the_same_experts():
    """Nothing is dropped, and experts without a token add nothing."""
    x, router, weights = drawn()
    router = router.at[:, TOP:].set(0) * 50
    x = jnp.abs(x) + 0.1
    router = router.at[:, :TOP].set(jnp.abs(router[:, :TOP]))
    picked, _ = experts.route(x, router, TOP, True)
    assert set(np.asarray(picked).ravel()) == set(range(TOP))
    np.testing.assert_allclose(jax.jit(ours)(x, router, weights), by_einsum(x, router, weights), atol=1e-5)


def test_frozen_experts_get_no_gradient():
    """As in LoRA training: nothing as large as the experts is made for the backward pass."""
    many = 512

    def held(*argnums: int) -> int:
        shapes = jax.eval_shape(lambda: drawn(j=many))
        found = jax.jit(jax.grad(lambda *args: ours(*args).sum(), argnums)).lower(*shapes).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes

    assert held(0) + 0.9 * 3 * many * D * F * 4 < held(0, 2)
