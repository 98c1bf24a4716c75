"""pass@k, majority votes and intervals, checked against enumeration."""

from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest

from dail_jax.evaluate import passk


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([i < c for i in range(n)], k))
                want = sum(any(subset) for subset in subsets) / len(subsets)
                assert passk.pass_at_k(n, c, k) == pytest.approx(want, abs=1e-14)


def test_pass_at_k_at_large_n():
    for n, c, k in ((128, 1, 128), (128, 3, 64), (4096, 1, 512), (4096, 4000, 90), (128, 0, 128), (128, 64, 64)):
        want = 1 - comb(n - c, k) / comb(n, k)  # exact integers
        assert passk.pass_at_k(n, c, k) == pytest.approx(want, rel=1e-12)


def test_pass_at_k_takes_arrays():
    got = passk.pass_at_k(4, np.array([0, 1, 2, 4]), 2)
    assert got.shape == (4,)
    np.testing.assert_allclose(got, [0, 1 / 2, 5 / 6, 1])
    np.testing.assert_allclose(passk.pass_at_k(np.array([4, 8]), np.array([1, 1]), 2), [1 / 2, 1 / 4])


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [(4, 1, 5, "k <= n"), (4, 1, 0, "at least 1"), (4, 5, 2, "outside"), (4, -1, 2, "outside"), (4, 0.5, 2, "whole")],
)
def test_pass_at_k_refuses(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        passk.pass_at_k(n, c, k)
    with pytest.raises(ValueError, match="k <= n"):
        passk.pass_at_k(np.array([8, 4]), np.array([8, 4]), 8)


def test_powers_of_two():
    assert [passk.powers_of_two(n) for n in (1, 2, 7, 8, 128)] == [
        [1],
        [1, 2],
        [1, 2, 4],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 16, 32, 64, 128],
    ]


def test_bootstrap():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    mean, low, high = passk.bootstrap(values, seed=1, resamples=4000)
    error = 1.96 * values.std() / 20
    assert mean == values.mean()
    assert low == pytest.approx(mean - error, abs=0.02) and high == pytest.approx(mean + error, abs=0.02)
    assert passk.bootstrap(values, 1, 300) == passk.bootstrap(values, 1, 300) != passk.bootstrap(values, 2, 300)
    assert passk.bootstrap([0.25], 1, 50) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="one value per problem"):
        passk.bootstrap([], 1, 50)


def test_bootstrap_covers_the_truth():
    """95% of 300 intervals: fewer than 88% or more than 99% has probability < 1e-4 for exact coverage."""
    rng = np.random.default_rng(7)
    found = [passk.bootstrap(rng.exponential(1.0, 200), seed, 300) for seed in range(300)]
    assert 0.88 < np.mean([low <= 1.0 <= high for _, low, high in found]) < 0.99


def test_maj_at_k_against_enumeration(monkeypatch):
    votes = [1, 0, 0, 2, None, 2, 3]

    def share(drawn):
        cast = [vote for vote in drawn if vote is not None]
        most = max((cast.count(v) for v in cast), default=0)
        top = {v for v in cast if cast.count(v) == most}
        return (0 in top) / max(len(top), 1)

    monkeypatch.setattr(passk, "MAJORITY_DRAWS", 6000)
    ks = [1, 2, 3, 5, 7]
    got = passk.maj_at_k(votes, ks, seed=3)
    want = [np.mean([share(drawn) for drawn in combinations(votes, k)]) for k in ks]
    assert got[0] == 2 / 7 and got[-1] == 1 / 2  # exact: 0 and 2 tie
    np.testing.assert_allclose(got, want, atol=0.025)  # 4 standard errors
    assert got == passk.maj_at_k(votes, ks, seed=3)
    with pytest.raises(ValueError, match="k <= n"):
        passk.maj_at_k(votes, [8], seed=3)


def test_maj_at_k_extremes():
    assert passk.maj_at_k([None] * 4, [1, 2, 4], 0) == [0, 0, 0]
    assert passk.maj_at_k([0] * 3, [1, 2, 3], 0) == [1, 1, 1]
    for order in permutations([1, 1, 0]):
        assert passk.maj_at_k(order, [3], 0) == [0]


def test_paired_difference():
    rng = np.random.default_rng(5)
    a = {f"p{i}": float(v) for i, v in enumerate(rng.uniform(0, 1, 60))}
    b = {name: v + 0.1 for name, v in a.items()}
    found = passk.paired_difference(a, dict(reversed(b.items())), seed=0, resamples=500)
    assert found[:3] == pytest.approx((0.1, 0.1, 0.1)) and found[4:] == (60, 0, 0)
    assert found.p == pytest.approx(1 / 501)
    none = passk.paired_difference(a, a, seed=0, resamples=100)
    assert none == (0, 0, 0, 1, 0, 0, 60)
    assert (found.sign, passk.paired_difference(b, a, 0, 500).sign, none.sign) == (1, -1, 0)
    one = passk.paired_difference({"p": 0.3}, {"p": 0.2}, 0, 500)  # an interval of zero width, and p = 1
    assert (one.high, one.p, one.sign) == (pytest.approx(-0.1), 1, 0)
    with pytest.raises(ValueError, match="'odd'"):
        passk.paired_difference(a, {**a, "odd": 1.0}, 0, 10)
