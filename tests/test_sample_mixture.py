"""The closed form against the literal accept/reject rule, written out naively here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dail_jax import config as config_lib
from dail_jax.sample import mixture

V = 11


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_truncate(logits, temperature, top_k, top_p):
    """Temperature, top-k and top-p by sorting, as in a textbook."""
    p = softmax(logits / temperature)
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        kept = np.searchsorted(np.cumsum(p[order]), top_p) + 1
        p[order[kept:]] = 0
    return p / p.sum()


def literal_rule(rng, student, privileged, acceptance, tau, proposals, draws):
    """Counts of tokens drawn by proposing and rejecting, and of those that the student wrote."""
    counts, by_student = np.zeros(V, int), 0
    for _ in range(draws):
        for _ in range(proposals):
            token = rng.choice(V, p=student)
            if acceptance[token] >= tau:
                by_student += 1
                break
        else:
            token = rng.choice(V, p=privileged)
        counts[token] += 1
    return counts, by_student


def params(tau=0.0, proposals=1, **kw):
    return mixture.sampling_params(config_lib.Sampling(**kw), tau, proposals)


CASES = [  # tau, proposals, temperature, top_k, top_p
    (0.0, 1, 1.0, 0, 1.0),
    (0.05, 1, 1.0, 0, 1.0),
    (0.1, 5, 1.0, 0, 1.0),
    (0.2, 1, 0.6, 0, 0.95),
    (0.3, 2, 1.3, 4, 1.0),
    (0.8, 1, 1.0, 0, 1.0),
    (0.15, 3, 0.8, 5, 0.9),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chi_square_against_the_literal_rule(case):
    tau, proposals, temperature, top_k, top_p = case
    rng = np.random.default_rng(CASES.index(case))
    logits = rng.normal(size=(2, V)).astype(np.float32) * 1.5
    student, privileged = (naive_truncate(row, temperature, top_k, top_p) for row in logits)
    draws = 20_000
    counts, by_student = literal_rule(rng, student, privileged, softmax(logits[1]), tau, proposals, draws)
    u = jax.random.uniform(jax.random.key(CASES.index(case)), (draws, 2))
    k = params(tau, proposals, temperature=temperature, top_k=top_k, top_p=top_p)
    out = jax.jit(mixture.draw_tokens)(jnp.broadcast_to(logits[:, None], (2, draws, V)), u, k)
    ours = np.bincount(out.token, minlength=V)
    seen = (counts + ours) > 0
    # Two samples of one distribution; a correct sampler fails one case in 10,000.
    assert stats.chi2_contingency(np.stack([counts, ours])[:, seen]).pvalue > 1e-4
    table = [[by_student, draws - by_student], [int(out.by_student.sum()), draws - int(out.by_student.sum())]]
    if 0 < by_student < draws:
        assert stats.chi2_contingency(table).pvalue > 1e-4
    else:
        assert table[0] == table[1]
    # The recorded probabilities are those of the distribution that was drawn from.
    s, t, p = (jnp.asarray(x) for x in (student, privileged, softmax(logits[1])))
    kept, written = mixture.mix(s, t, p, mixture.accepted_mass(s, p, k), k)
    q = np.asarray(kept + written)
    np.testing.assert_allclose(q.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(np.exp(out.logq), q[out.token], rtol=1e-4)
    np.testing.assert_allclose(
        np.exp(out.log_student), np.maximum(student[out.token], np.exp(-100)), rtol=1e-4, atol=1e-30
    )
    np.testing.assert_allclose(
        np.exp(out.log_privileged), np.maximum(privileged[out.token], np.exp(-100)), rtol=1e-4, atol=1e-30
    )


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (3, 1.0), (7, 0.8), (1, 1.0), (0, 0.9999), (500, 0.95)])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_truncation_equals_sorting(top_k, top_p, platform, monkeypatch):
    monkeypatch.setattr(mixture.attention, "target", lambda: platform)  # which settles more digits in a pass
    logits = np.random.default_rng(1).normal(size=(50, 311)).astype(np.float32) * 3
    ours = np.asarray(jax.jit(mixture.truncated)(logits, params(top_k=top_k, top_p=top_p, temperature=0.7)))
    theirs = np.stack([naive_truncate(row, 0.7, top_k, top_p) for row in logits.astype(np.float64)])
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_temperature_zero_is_greedy():
    logits = np.random.default_rng(2).normal(size=(9, 300)).astype(np.float32)
    out = mixture.draw_tokens(logits[None], jnp.full((9, 2), 0.999), params(temperature=0))
    assert (np.asarray(out.token) == logits.argmax(-1)).all()
    assert (np.asarray(out.logq) == 0).all()


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
def test_inverse_cdf_is_exact_and_skips_zeros(size):
    rng = np.random.default_rng(size)
    weights = rng.random(size).astype(np.float32) * (rng.random(size) < 0.3)
    weights[size // 2] = 1
    u = np.linspace(0, 1, 20_000, endpoint=False).astype(np.float32)
    index = np.asarray(jax.jit(mixture.inverse_cdf)(jnp.broadcast_to(weights, (len(u), size)), u))
    assert (weights[index] > 0).all()
    share = np.bincount(index, minlength=size) / len(u)
    np.testing.assert_allclose(share, weights / weights.sum(), atol=2e-4)


def test_changing_a_parameter_does_not_recompile():
    traces = []

    @jax.jit
    def draw(logits, u, k):
        traces.append(1)
        return mixture.draw_tokens(logits, u, k)

    logits, u = jnp.zeros((2, 3, V)), jnp.zeros((3, 2))
    for k in (params(), params(0.5, 3), params(1.0, 1, temperature=0.6, top_p=0.9, top_k=4, presence_penalty=1.5)):
        draw(logits, u, k)
    assert len(traces) == 1
