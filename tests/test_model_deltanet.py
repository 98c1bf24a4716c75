"""The gated delta rule: transformers' own functions, the recurrence, gradients, padding on either side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

from dail_jax.model import deltanet

B, T, K, N, H, I = 2, 150, 2, 6, 5, 7  # noqa: E741


def inputs(seed=0, t=T):
    """Unit queries and keys, values, decays from almost none to e^-3 a token, rates."""
    rng = np.random.default_rng(seed)
    q, k = (np.asarray(deltanet._unit(rng.normal(size=(B, t, K, H)).astype(np.float32))) for _ in "qk")
    v = rng.normal(size=(B, t, N, I)).astype(np.float32)
    decay = -np.exp(rng.uniform(-6, 1, (B, t, N))).astype(np.float32)
    rate = rng.uniform(0.05, 0.99, (B, t, N)).astype(np.float32)
    return q, k, v, decay, rate


def start(seed=1):
    return np.random.default_rng(seed).normal(size=(B, N, H, I)).astype(np.float32)


def recurrent(q, k, v, decay, rate, state):
    """One token after the other."""

    def one(state, x):
        read, state = deltanet.step(*x, state)
        return state, read

    state, read = jax.lax.scan(one, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, decay, rate)))
    return jnp.swapaxes(read, 0, 1), state


@pytest.mark.parametrize("ours", [jax.jit(deltanet.chunked), jax.jit(recurrent)], ids=["chunked", "recurrent"])
@pytest.mark.parametrize("reference", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_equals_transformers(ours, reference):
    x, state = inputs(), start()
    want, last = getattr(theirs, reference)(
        *map(torch.tensor, x), initial_state=torch.tensor(state), output_final_state=True
    )
    got, end = ours(x[0] * H**-0.5, *x[1:], state)  # transformers scales the queries itself
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    np.testing.assert_allclose(end, last.numpy(), atol=1e-5)
    assert np.abs(want.numpy()).max() > 1


def test_gradients_equal_the_recurrence():
    x, state = inputs(2), start(3)
    rng = np.random.default_rng(4)
    by = rng.normal(size=(B, T, N, I)).astype(np.float32), rng.normal(size=(B, N, H, I)).astype(np.float32)

    def loss(rule, *args):
        return sum((a * b).sum() for a, b in zip(rule(*args), by, strict=True))

    got, want = (
        jax.jit(jax.grad(functools.partial(loss, rule), range(6)))(*x, state) for rule in (deltanet.chunked, recurrent)
    )
    for a, b in zip(got, want, strict=True):
        assert np.abs(b).max() > 0.5
        np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(b).max()))


def test_equal_keys_and_full_rates_stay_exact():
    """The system's worst case, all ones below the diagonal: the solution must not be a sum of its powers."""
    q, k, v, decay, rate = inputs(5)
    k, decay, rate = np.broadcast_to(k[:, :1], k.shape), np.zeros_like(decay), np.ones_like(rate)
    got, want = jax.jit(deltanet.chunked)(q, k, v, decay, rate, start()), recurrent(q, k, v, decay, rate, start())
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_changes_nothing():
    """Tokens of decay and rate 0, on either side, whatever their keys and values."""
    x, state = inputs(6, 40), start(7)
    read, end = jax.jit(deltanet.chunked)(*x, state)

    def pad(y, left, right):
        return np.pad(y, ((0, 0), (left, right)) + ((0, 0),) * (y.ndim - 2))

    for left, right in ((0, 9), (13, 0), (5, 90), (100, 30)):
        q, k, v, decay, rate = (pad(y, left, right) for y in x)
        noise = np.random.default_rng(8).normal(size=v.shape).astype(np.float32)
        dead = pad(np.ones((B, 40), bool), left, right)[..., None, None] == 0
        got, last = jax.jit(deltanet.chunked)(q, np.where(dead, 0.3, k), np.where(dead, noise, v), decay, rate, state)
        np.testing.assert_allclose(got[:, left : left + 40], read, atol=2e-6)
        np.testing.assert_allclose(last, end, atol=2e-6)


def test_convolution_equals_torch_whole_and_token_by_token():
    rng = np.random.default_rng(0)
    t, y, z = 11, 3, 4
    x, taps = (rng.normal(size=s).astype(np.float32) for s in ((B, t, K, y), (K, y, z)))
    conv = torch.nn.functional.conv1d(
        torch.tensor(x.reshape(B, t, -1)).mT, torch.tensor(taps.reshape(-1, 1, z)), padding=z - 1, groups=K * y
    )
    want = torch.nn.functional.silu(conv[..., :t].mT).numpy().reshape(x.shape)
    zeros = np.zeros((B, K, z - 1, y), np.float32)
    np.testing.assert_allclose(deltanet.convolve(x, zeros, taps), want, atol=1e-6)
    positions = np.full((B, t), -1, np.int32)
    positions[0, 4:9], positions[1, :2] = np.arange(5), np.arange(2)  # padding on either side; fewer tokens than taps
    tail = np.asarray(deltanet.newest(x, positions, z - 1))
    np.testing.assert_array_equal(tail[0], x[0, 6:9].swapaxes(0, 1))
    np.testing.assert_array_equal(tail[1], np.concatenate([zeros[1, :, :1], x[1, :2].swapaxes(0, 1)], 1))
    np.testing.assert_array_equal(deltanet.newest(x, np.full((B, t), -1), z - 1), zeros)
    one = deltanet.convolve(x[:, 7:8], x[:, 4:7].swapaxes(1, 2), taps)
    np.testing.assert_allclose(one[:, 0], want[:, 7], atol=1e-6)
