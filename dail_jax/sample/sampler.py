"""What a sampler is: requests go in, samples come out. `engine` is ours; another can stand behind the evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """One problem.

    Attributes:
      name: unique within a run; with the seed and a sample's index, it decides that sample's randomness.
      prompts: token ids, one tuple per role; the evaluation has one role.
      samples: the indices of the samples to draw.
      limit: tokens to draw at most, the stop token included.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    samples: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class Sample:
    """A finished response to the request `name`.

    Attributes:
      sample: its index in the request.
      tokens: [T] int, 1 to `limit` ids; a stop token is the last one.
      finish: `stop` where a stop token ended it, `length` where the limit did.
    """

    name: str
    sample: int
    tokens: np.ndarray
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class ScoredSample(Sample):
    """A sample and how it came about, per token: what rollouts need and evaluation does not.

    Attributes:
      logq: [T] float32, log-probability under the distribution that the token was drawn from.
      log_student, log_privileged: [T] float32, each role's log-probability; equal to `logq` where one role runs alone.
      by_student: [T] bool, whether an accepted proposal, otherwise written by the privileged student.
    """

    logq: np.ndarray
    log_student: np.ndarray
    log_privileged: np.ndarray
    by_student: np.ndarray


class Sampler(Protocol):
    """Draws samples for requests."""

    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yields every sample of every request once, in any order, as they finish."""
        ...

    def figures(self) -> dict[str, float]:
        """What its work so far cost, for metrics.jsonl; empty where there is nothing to report."""
        ...


def checked(sampler: Sampler, requests: Iterable[Request]) -> Iterator[Sample]:
    """What `sampler.run` yields. Raises ValueError where it breaks the promises above."""
    requests = list(requests)
    missing = {(r.name, index): r.limit for r in requests for index in r.samples}
    for s in sampler.run(requests):
        limit = missing.pop((s.name, s.sample), None)
        if limit is None:
            raise ValueError(f"the sampler gave sample {s.sample} of {s.name}, which was not asked for or came before")
        if not 1 <= len(s.tokens) <= limit or s.finish not in ("stop", "length"):
            raise ValueError(
                f"the sampler gave sample {s.sample} of {s.name} with {len(s.tokens)} tokens and finish {s.finish!r}, "
                f"want 1 to {limit} tokens and stop or length"
            )
        yield s
    if missing:
        name, index = next(iter(missing))
        raise ValueError(f"the sampler left out {len(missing)} samples, such as sample {index} of {name}")
