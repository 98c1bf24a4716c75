"""The sampler protocol: requests go in, samples come out. `engine` is our own; evaluation can also use another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np


@dataclass(frozen=True)
class Request:
    """A request for samples of one problem.

    Attributes:
      name: with a sample's index, unique within a run; with the seed, both determine that sample's randomness.
      prompts: token ids, one tuple per role; an evaluation has one role.
      samples: the indices of the samples to draw.
      limit: the most tokens to draw per sample, including the stop token.
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
      finish: `stop` if a stop token ended it, `length` if the limit did.
    """

    name: str
    sample: int
    tokens: np.ndarray
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class ScoredSample(Sample):
    """A sample with scores per token, which rollouts need and evaluation does not.

    Attributes:
      logq: [T] float32, log-probability under the distribution that the token was drawn from.
      log_student, log_privileged: [T] float32, each role's log-probability; equal to `logq` if there is only one role.
      by_student: [T] bool, true for an accepted proposal; otherwise the privileged student wrote the token.
    """

    logq: np.ndarray
    log_student: np.ndarray
    log_privileged: np.ndarray
    by_student: np.ndarray


S = TypeVar("S", bound=Sample, covariant=True)


class Sampler(Protocol[S]):
    """Draws samples for requests."""

    def run(self, requests: Iterable[Request]) -> Iterator[S | None]:
        """Yields each requested sample exactly once, as it finishes, in any order.

        In between it may yield None: nothing more has finished, but this is a moment at which drawing may stop. Where
        samples take minutes, it should, every few seconds.
        """
        ...

    def figures(self) -> dict[str, float]:
        """Metrics on its work so far, for metrics.jsonl; empty if there is nothing to report."""
        ...


def checked(sampler: Sampler[S], requests: Iterable[Request]) -> Iterator[S | None]:
    """Yields what `sampler.run` yields; raises ValueError if that breaks the protocol above."""
    requests = list(requests)
    missing = {(r.name, index): r.limit for r in requests for index in r.samples}
    for s in sampler.run(requests):
        if s is None:
            yield None
            continue
        limit = missing.pop((s.name, s.sample), None)
        if limit is None:
            raise ValueError(
                f"the sampler gave sample {s.sample} of {s.name}, which was not requested or was given before"
            )
        if not 1 <= len(s.tokens) <= limit or s.finish not in ("stop", "length"):
            raise ValueError(
                f"the sampler gave sample {s.sample} of {s.name} with {len(s.tokens)} tokens and finish {s.finish!r}, "
                f"want 1 to {limit} tokens and stop or length"
            )
        yield s
    if missing:
        name, index = next(iter(missing))
        raise ValueError(f"the sampler left out {len(missing)} samples, such as sample {index} of {name}")
