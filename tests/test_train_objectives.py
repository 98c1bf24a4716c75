"""The chunked loss and its hand-made gradient against the naive formula and autodiff, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from dail_jax.train import objectives

B, T, D, V = 4, 7, 12, 48


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    mask = jnp.asarray(rng.random((B, T)) < 0.7)
    extras = {"privileged": draw(B, T, D), "negative": draw(B, T, D)}
    return draw(B, T, D), extras, mask, draw(V, D), jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def naive(objective, hidden, extras, mask, unembed, targets):
    """Straight from the paper: full [B,T,V] tensors, gradients by autodiff."""
    log = lambda h: jax.nn.log_softmax(h @ unembed.T)  # noqa: E731
    kl = lambda a, b: (jnp.exp(a) * (a - b)).sum(-1)  # noqa: E731
    m = log(hidden)
    if objective.kind == "nll":
        loss = -jnp.take_along_axis(m, targets[..., None], -1)[..., 0]
    else:
        p, n = log(extras["privileged"]), log(extras["negative"])
        loss = (
            (kl(p, m) - objective.gamma * kl(n, m)) if objective.forward_kl else (kl(m, p) - objective.gamma * kl(m, n))
        )
    return jnp.where(mask, loss, 0).sum()


CASES = [
    objectives.Objective("nll"),
    *(objectives.Objective("dail", g, f) for g in (0.0, 0.1, 0.7) for f in (False, True)),
]


@pytest.mark.parametrize("objective", CASES, ids=str)
@pytest.mark.parametrize("chunk", [1, 12, 1000])
def test_loss_and_gradient(data, objective, chunk):
    hidden, extras, mask, unembed, targets = data
    given = {"targets": targets} if objective.kind == "nll" else extras
    ours = lambda h: objectives.summed(objective, chunk, h, given, mask, unembed)[0]  # noqa: E731
    theirs = lambda h: naive(objective, h, extras, mask, unembed, targets)  # noqa: E731
    (a, ga), (b, gb) = (jax.value_and_grad(f)(hidden) for f in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert jnp.abs(ga - gb).max() / jnp.abs(gb).max() < 1e-5


def test_excess_is_the_distance_to_the_optimum(data):
    """At q* the loss is lowest and the excess 0; elsewhere they differ by the constant log Z."""
    hidden, extras, mask, unembed, _ = data
    objective = objectives.Objective("dail", 0.3)
    _, parts = objectives.summed(objective, 8, hidden, extras, mask, unembed)
    assert parts["excess"] > 0
    log_p, log_n = (jax.nn.log_softmax(extras[k] @ unembed.T) for k in ("privileged", "negative"))
    optimum = jax.nn.log_softmax((log_p - 0.3 * log_n) / 0.7)
    loss, parts, slope = objectives.token_loss(objective, optimum, extras, lambda h: h @ unembed.T)
    assert jnp.abs(parts["excess"]).max() < 1e-5
    assert jnp.abs(slope).max() < 1e-6
    m = jax.nn.log_softmax(hidden @ unembed.T)
    excess = (jnp.exp(m) * (m - optimum)).sum(-1)
    got = objectives.token_loss(objective, hidden @ unembed.T, extras, lambda h: h @ unembed.T)[1]["excess"]
    np.testing.assert_allclose(got, excess, atol=1e-4)
    assert (loss < objectives.token_loss(objective, hidden @ unembed.T, extras, lambda h: h @ unembed.T)[0]).all()


def test_equal_references_and_student_give_zero(data):
    hidden, _, mask, unembed, _ = data
    loss, parts = objectives.summed(
        objectives.Objective("dail", 0.1), 8, hidden, {"privileged": hidden, "negative": hidden}, mask, unembed
    )
    assert abs(loss) < 1e-5
    assert all(abs(parts[k]) < 1e-4 for k in ("kl_privileged", "kl_negative", "excess"))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8)], ids=str)
def test_sharded_vocabulary_gives_the_same(data, shape):
    hidden, extras, mask, unembed, _ = data
    f = jax.value_and_grad(lambda h: objectives.summed(CASES[3], 8, h, extras, mask, unembed)[0])
    want = f(hidden)
    with jax.set_mesh(mesh_of(*shape)):
        got = jax.jit(f)(hidden)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_no_full_logits_are_ever_held(data):
    """The compiled loss holds temporaries of a chunk's logits, not of the batch's."""
    t, v = 512, 4096
    h = jax.ShapeDtypeStruct((2, t, D), jnp.float32)
    w = jax.ShapeDtypeStruct((v, D), jnp.float32)
    mask = jax.ShapeDtypeStruct((2, t), jnp.bool_)
    f = jax.jit(
        jax.grad(lambda h, p, n, m, w: objectives.summed(CASES[3], 16, h, {"privileged": p, "negative": n}, m, w)[0])
    )
    temporaries = f.lower(h, h, h, mask, w).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 2 * t * v * 4 / 4  # a quarter of one [B, T, V] tensor
