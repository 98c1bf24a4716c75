"""Losses in chunks against the naive formulas, and their gradients against hand-written ones, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from dail_jax import config as config_lib
from dail_jax.train import methods, objectives

B, T, D, V = 4, 7, 12, 48


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    weights = jnp.asarray(rng.random((B, T)) < 0.7, jnp.float32)
    hidden, unembed = draw(B, T, D), draw(V, D)
    frozen = {role: hidden + draw(B, T, D) for role in ("privileged", "negative", "base")}
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    now = methods.chosen(jax.nn.log_softmax(hidden @ unembed.T), targets)
    tokens = {"targets": targets, "logq": now + 0.3 * draw(B, T), "advantage": draw(B, 1).repeat(T, 1)}
    return hidden, frozen, tokens, weights, unembed


def settings(objective, **kw) -> config_lib.Train:
    return config_lib.Train(objective=objective, **kw)


def ours(cfg, chunk, data):
    """(loss, parts) as a function of hidden states."""
    method = methods.find(cfg)
    hidden, frozen, tokens, weights, unembed = data
    frozen, tokens = {r: frozen[r] for r in method.roles}, {k: tokens[k] for k in method.tokens}
    return hidden, lambda h: objectives.summed(method.bind(cfg), chunk, h, frozen, tokens, weights, unembed)


def sharp_target(cfg, p, n):
    """q_T [..., V] from powers of probabilities, from log-probabilities p and n."""
    q = (jnp.exp(p) / jnp.exp(n) ** cfg.gamma) ** (1 / ((1 - cfg.gamma) * cfg.loss["temperature"]))
    return q / q.sum(-1, keepdims=True)


def naive(cfg, data, hidden):
    """Straight from the papers: full [B,T,V] tensors, gradients by autodiff."""
    _, frozen, tokens, weights, unembed = data
    log = lambda h: jax.nn.log_softmax(h @ unembed.T)  # noqa: E731
    kl = lambda a, b: (jnp.exp(a) * (a - b)).sum(-1)  # noqa: E731
    m, p, n, base = map(log, (hidden, frozen["privileged"], frozen["negative"], frozen["base"]))
    log_p = jnp.take_along_axis(m, tokens["targets"][..., None], -1)[..., 0]
    if cfg.objective == "nll":
        loss = -log_p
    elif cfg.objective == "grpo":
        ratio, a, clip = jnp.exp(log_p - tokens["logq"]), tokens["advantage"], cfg.online.clip_ratio
        loss = cfg.online.kl_weight * kl(m, base) - jnp.minimum(ratio * a, jnp.clip(ratio, 1 - clip, 1 + clip) * a)
    elif cfg.objective == "sharp":
        loss = kl(jnp.log(sharp_target(cfg, p, n)), m)
    else:  # contrast, and its target's most likely tokens where the student gives them too little
        q = jnp.exp(p) / jnp.exp(n) ** cfg.gamma
        best = jnp.take_along_axis(m, q.argmax(-1)[..., None], -1)[..., 0]
        missed = jnp.where(jnp.exp(best) < cfg.loss["epsilon"], -best, 0) if cfg.objective == "gated" else 0
        loss = missed + (kl(p, m) - cfg.gamma * kl(n, m) if cfg.kl == "forward" else kl(m, p) - cfg.gamma * kl(m, n))
    return (loss * weights).sum()


def by_hand(cfg, data):
    """d loss / d hidden from d loss / d logits as worked out on paper: what the program once did itself."""
    hidden, frozen, tokens, weights, unembed = data
    log = lambda h: jax.nn.log_softmax(h @ unembed.T)  # noqa: E731
    log_m, log_p, log_n, log_b = map(log, (hidden, frozen["privileged"], frozen["negative"], frozen["base"]))
    m, p, n = map(jnp.exp, (log_m, log_p, log_n))
    hot = jax.nn.one_hot(tokens["targets"], V)
    if cfg.objective == "nll":
        slope = m - hot
    elif cfg.objective == "grpo":
        ratio = jnp.exp((log_m * hot).sum(-1) - tokens["logq"])
        free, clip = ratio * tokens["advantage"], cfg.online.clip_ratio
        held = jnp.clip(ratio, 1 - clip, 1 + clip) * tokens["advantage"]
        kl = (m * (log_m - log_b)).sum(-1, keepdims=True)
        slope = jnp.where(free <= held, free, 0)[..., None] * (m - hot)
        slope += cfg.online.kl_weight * m * (log_m - log_b - kl)
    elif cfg.objective == "sharp":
        slope = m - sharp_target(cfg, log_p, log_n)
    elif cfg.kl == "forward":
        slope = (m - p) - cfg.gamma * (m - n)
    else:
        excess = (1 - cfg.gamma) * log_m - log_p + cfg.gamma * log_n
        slope = m * (excess - (m * excess).sum(-1, keepdims=True))
        if cfg.objective == "gated":
            best = jax.nn.one_hot((log_p - cfg.gamma * log_n).argmax(-1), V)
            slope += jnp.where((m * best).sum(-1, keepdims=True) < cfg.loss["epsilon"], m - best, 0)
    return (slope * weights[..., None]) @ unembed


CASES = [
    settings("nll"),
    *(settings("dail", gamma=g, kl=k) for g in (0.0, 0.1, 0.7) for k in ("reverse", "forward")),
    settings("gated", gamma=0.3, loss={"epsilon": 0.2}),
    settings("sharp", gamma=0.3, loss={"temperature": 0.7}),
    *(settings("grpo", online={"kl_weight": w}) for w in (0.0, 0.5)),
]


@pytest.mark.parametrize("cfg", CASES, ids=lambda c: f"{c.objective}-{c.gamma}-{c.kl}-{c.online.kl_weight}")
@pytest.mark.parametrize("chunk", [12, 1000])
def test_loss_and_gradient(data, cfg, chunk):
    hidden, f = ours(cfg, chunk, data)
    (a, _), ga = jax.value_and_grad(f, has_aux=True)(hidden)
    b, gb = jax.value_and_grad(functools.partial(naive, cfg, data))(hidden)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    scale = jnp.abs(gb).max()
    assert jnp.abs(ga - gb).max() / scale < 1e-5
    assert jnp.abs(ga - by_hand(cfg, data)).max() / scale < 2e-6


def test_excess_is_the_distance_to_the_optimum(data):
    """At q* the loss is lowest and the excess 0; elsewhere they differ by the constant log Z."""
    hidden, frozen, _, _, unembed = data
    cfg = settings("dail", gamma=0.3)
    assert ours(cfg, 8, data)[1](hidden)[1]["excess"] > 0
    log = {role: jax.nn.log_softmax(frozen[role] @ unembed.T) for role in methods.CONTRAST}
    optimum = jax.nn.log_softmax((log["privileged"] - 0.3 * log["negative"]) / 0.7)

    def at(z):
        return methods.contrast({"student": jax.nn.log_softmax(z), **log}, {}, cfg)

    best, parts = at(optimum)
    assert jnp.abs(parts["excess"]).max() < 1e-5
    assert jnp.abs(jax.grad(lambda z: at(z)[0].sum())(optimum)).max() < 2e-6
    m = jax.nn.log_softmax(hidden @ unembed.T)
    loss, parts = at(hidden @ unembed.T)
    np.testing.assert_allclose(parts["excess"], methods.kl_divergence(m, optimum), atol=1e-4)
    assert (best < loss).all()


def test_the_sharpened_target():
    """With p_PS = (.5, .3, .2), p_NR = (.25, .5, .25), gamma 1/2 and T 1/2, q_T ~ p_PS^4 / p_NR^2 = (1, .0324, .0256)."""
    log = {"privileged": jnp.log(jnp.array([[[0.5, 0.3, 0.2]]])), "negative": jnp.log(jnp.array([[[0.25, 0.5, 0.25]]]))}
    q = jnp.array([1, 0.0324, 0.0256]) / 1.058

    def of(objective, z, **kw):
        """The token's loss, its parts, and the gradient by logits, for a student with logits z."""
        bound = methods.METHODS[objective].bind(settings(objective, **kw))

        def f(z):
            loss, parts = bound({"student": jax.nn.log_softmax(z), **log}, {})
            return loss[0, 0], parts

        (loss, parts), slope = jax.value_and_grad(f, has_aux=True)(z[None, None])
        return loss, parts, slope[0, 0]

    kw: dict = {"gamma": 0.5, "loss": {"temperature": 0.5}}
    loss, parts, slope = of("sharp", jnp.zeros(3), **kw)
    np.testing.assert_allclose(slope, 1 / 3 - q, atol=1e-6)
    entropy = -(q * jnp.log(q)).sum()
    np.testing.assert_allclose([loss, parts["excess"][0, 0]], np.log(3) - entropy, atol=1e-6)
    np.testing.assert_allclose(parts["target_entropy"][0, 0], entropy, atol=1e-6)
    loss, _, slope = of("sharp", jnp.log(q), **kw)  # its minimum, which is 0
    np.testing.assert_allclose([loss, *slope], 0, atol=1e-6)

    rng = np.random.default_rng(0)
    for z in jnp.asarray(rng.normal(size=(4, 3)) * 3, jnp.float32):
        loss, _, slope = of("sharp", z, **kw)
        assert loss > 0
        np.testing.assert_allclose(slope, jax.nn.softmax(z) - q, atol=1e-6)
        # without contrast and sharpening it is forward KL
        plain, forward = of("sharp", z, gamma=0, loss={"temperature": 1}), of("dail", z, gamma=0, kl="forward")
        np.testing.assert_allclose(plain[0], forward[0], atol=1e-6)
        np.testing.assert_allclose(plain[2], forward[2], atol=1e-6)
        # and at T -> 0 the negative log-likelihood of the target's most likely token
        loss, parts, slope = of("sharp", z, gamma=0.1, loss={"temperature": 1e-3})
        np.testing.assert_allclose(loss, -jax.nn.log_softmax(z)[0], rtol=1e-6)
        np.testing.assert_allclose(slope, jax.nn.softmax(z) - jnp.eye(3)[0], atol=1e-6)
        assert parts["target_entropy"][0, 0] < 1e-6


def test_what_the_student_never_does_is_learned():
    """A token without mass gets no gradient from reverse KL, and its whole target from `gated` and `sharp`."""
    log = {role: jax.nn.log_softmax(jnp.array([[[6.0, 0.0, 0.0]]])) for role in methods.CONTRAST}
    z = jnp.array([[[-30.0, 0.0, 0.0]]])

    def slope(objective):
        bound = methods.METHODS[objective].bind(settings(objective))
        return jax.grad(lambda z: bound({"student": jax.nn.log_softmax(z), **log}, {})[0].sum())(z)[0, 0, 0]

    assert abs(slope("dail")) < 1e-9 and slope("gated") < -0.99 and slope("sharp") < -0.99


def test_equal_references_and_student_give_zero(data):
    hidden, _, tokens, weights, unembed = data
    same = (hidden, dict.fromkeys(("privileged", "negative", "base"), hidden), tokens, weights, unembed)
    loss, parts = ours(settings("dail"), 8, same)[1](hidden)
    assert abs(loss) < 1e-5
    assert all(abs(parts[k]) < 1e-4 for k in ("kl_privileged", "kl_negative", "excess"))


def test_a_group_without_a_signal_is_left_alone(data):
    """All right or all wrong: no gradient, however unlikely a token was when it was drawn."""
    hidden, frozen, tokens, weights, unembed = data
    tokens = {**tokens, "advantage": jnp.zeros((B, T)), "logq": jnp.full((B, T), -100.0)}
    f = ours(settings("grpo", online={"kl_weight": 0.0}), 8, (hidden, frozen, tokens, weights, unembed))[1]
    (loss, parts), slope = jax.value_and_grad(f, has_aux=True)(hidden)
    assert loss == 0 and not jnp.abs(slope).any() and jnp.isfinite(parts["ratio"])


def test_tokens_without_weight_do_not_count(data):
    """Padding may hold anything, even what is not finite."""
    hidden, weights = data[0], data[3]
    spoilt = jnp.where(weights[..., None] > 0, hidden, jnp.nan)
    f = ours(CASES[3], 12, data)[1]
    (want, _), slope = jax.value_and_grad(f, has_aux=True)(hidden)
    (got, _), other = jax.value_and_grad(f, has_aux=True)(spoilt)
    assert got == want and (other == slope).all() and not slope[weights == 0].any()


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("cfg", [CASES[0], CASES[3], CASES[-1]], ids=lambda c: c.objective)
def test_sharded_vocabulary_gives_the_same(data, cfg, shape):
    hidden, f = ours(cfg, 8, data)
    f = jax.value_and_grad(f, has_aux=True)
    want = f(hidden)
    with jax.set_mesh(mesh_of(*shape)):
        got = jax.jit(f)(hidden)
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_no_full_logits_are_ever_held():
    """The compiled loss holds temporaries of a chunk's logits, not of the batch's."""
    t, v = 512, 4096
    h = jax.ShapeDtypeStruct((2, t, D), jnp.float32)
    w = jax.ShapeDtypeStruct((v, D), jnp.float32)
    weights = jax.ShapeDtypeStruct((2, t), jnp.float32)
    loss = methods.find(CASES[3]).bind(CASES[3])
    f = lambda h, p, n, m, w: objectives.summed(loss, 16, h, {"privileged": p, "negative": n}, {}, m, w)[0]  # noqa: E731
    temporaries = jax.jit(jax.grad(f)).lower(h, h, h, weights, w).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 2 * t * v * 4 / 4  # a quarter of one [B, T, V] tensor
