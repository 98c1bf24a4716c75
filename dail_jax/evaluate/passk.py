"""Estimates from n graded samples per problem: pass@k, majority vote, and their intervals over problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

SIGNIFICANT = 0.05  # p values below this count as significant
MAJORITY_DRAWS = 200  # random subsets of k samples per maj@k


class Interval(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """The mean of b - a over problems, its 95% interval, a two-sided p value, and how often b is better or worse."""

    mean: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    same: int

    @property
    def sign(self) -> int:
        """1 if b is significantly better, -1 if it is significantly worse, otherwise 0.

        The interval and the test must agree: the bootstrap of a few problems that happen to agree has no width.
        """
        return (self.low > 0) - (self.high < 0) if self.p < SIGNIFICANT else 0


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [1 << i for i in range(n.bit_length())]


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """The probability that k samples, drawn without replacement from n of which c are right, hold a right one.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), as a product of k factors
    in [0, 1]. `n` and `c` are numbers or arrays (one entry per problem), and so is the result. Raises ValueError if
    k > n: n samples give no unbiased estimate for more than n.
    """
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if not (np.issubdtype(n.dtype, np.integer) and np.issubdtype(c.dtype, np.integer)):
        raise ValueError(f"got n and c of types {n.dtype} and {c.dtype}, want whole numbers")
    if k < 1:
        raise ValueError(f"got k = {k}, want at least 1")
    if np.any(n < k):
        raise ValueError(f"got k = {k} and n = {n.min()}, want k <= n: pass@k needs at least k samples per problem")
    if np.any(c < 0) or np.any(c > n):
        raise ValueError("got a count of right samples outside 0..n")
    i = np.arange(k)
    failing = np.maximum((n - c)[..., None] - i, 0) / (n[..., None] - i)
    return 1.0 - failing.prod(axis=-1)


def bootstrap(values: ArrayLike, seed: int, resamples: int) -> Interval:
    """The mean of one value per problem, and the 2.5 and 97.5 percentiles of the means of resampled problems.

    The same seed draws the same problems for all lists of the same length, so that runs are comparable.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"got values of shape {values.shape}, want one value per problem")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(a: Mapping[str, float], b: Mapping[str, float], seed: int, resamples: int) -> Difference:
    """How much better b is than a on the same problems; `a` and `b` map a problem's id to its value.

    The interval resamples problems with both their values; p comes from random sign flips of the differences. Raises
    ValueError if the problems are not the same.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"got {len(odd)} problems that only one run has, such as {odd[0]!r}, want the same problems")
    differences = np.array([b[name] - a[name] for name in sorted(a)], np.float64)
    mean, low, high = bootstrap(differences, seed, resamples)
    rng = np.random.default_rng(seed)
    flips = [abs((differences * rng.choice((-1.0, 1.0), len(differences))).mean()) for _ in range(resamples)]
    p = (1 + sum(flip >= abs(mean) - 1e-12 for flip in flips)) / (1 + resamples)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return Difference(mean, low, high, float(p), better, worse, len(differences) - better - worse)


def maj_at_k(votes: Sequence[int | None], ks: Sequence[int], seed: int) -> list[float]:
    """For each k, the probability that the majority among k of one problem's n samples is right.

    `votes` are those of `Grader.votes`: 0 for the gold answer, another number for each other value, None for no answer,
    which has no vote. A tie between values counts as the share of them that is right, the expectation of a fair draw
    among them. k = 1 and k = n are exact; others are the mean over `MAJORITY_DRAWS` random subsets.
    """
    n = len(votes)
    if any(not 1 <= k <= n for k in ks):
        raise ValueError(f"got k = {list(ks)} and n = {n}, want 1 <= k <= n")
    values = {value: i for i, value in enumerate(dict.fromkeys([0, *(v for v in votes if v is not None)]))}
    cast = np.zeros((n, len(values)), np.int32)  # sample x value; value 0 is the right one
    for sample, value in enumerate(votes):
        if value is not None:
            cast[sample, values[value]] = 1
    at, shares = np.array(ks) - 1, np.zeros((MAJORITY_DRAWS, len(ks)))
    rng = np.random.default_rng(seed)
    for share in shares:
        order = rng.permutation(n)
        counts = cast[order].cumsum(axis=0)[at]  # k x value
        top = counts == np.maximum(counts.max(axis=1, keepdims=True), 1)
        share[:] = top[:, 0] / np.maximum(top.sum(axis=1), 1)
    exact = {1: float(cast[:, 0].mean())}  # the same in every draw for k = n
    return [exact.get(k, float(mean)) for k, mean in zip(ks, shares.mean(axis=0), strict=True)]
