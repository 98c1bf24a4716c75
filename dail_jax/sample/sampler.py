"""The sampler protocol: requests go in, samples come out. `engine` is our own; evaluation can also use another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
      then: what follows from a sample; None: nothing does. See `Sampler`.
      drawn: samples that are there already, of which only what follows is wanted.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    samples: tuple[int, ...]
    limit: int
    then: Callable[[Sample], Sequence[Continuation]] | None = None
    drawn: tuple[Sample, ...] = ()


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
class Continuation:
    """A request for one more sample, number 0 of `name`, which goes on from another.

    Attributes:
      name: as a request's; it alone, with the seed, determines the randomness.
      kept: how many of the other sample's tokens stand before it.
      tokens: ids that come between these and what is drawn.
      limit: the most tokens to draw.
    """

    name: str
    kept: int
    tokens: tuple[int, ...]
    limit: int


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

        A sampler that has their keys and values at hand may also draw what follows from them, and from those that are
        `drawn`: if it `continues`. Of others, that is requested later, with all that stands before as a prompt.

        In between it may yield None: nothing more has finished, but this is a moment at which drawing may stop. Where
        samples take minutes, it should, every few seconds.
        """
        ...

    def figures(self) -> dict[str, float]:
        """Metrics on its work so far, for metrics.jsonl; empty if there is nothing to report."""
        ...


def continues(sampler: Sampler) -> bool:
    """Whether it also draws what follows from samples; such a sampler has an attribute of this name, which says so."""
    return getattr(sampler, "continues", False)


def checked(sampler: Sampler[S], requests: Iterable[Request]) -> Iterator[S | None]:
    """Yields what `sampler.run` yields; raises ValueError if that breaks the protocol above."""
    missing: dict[tuple[str, int], int] = {}
    optional: dict[tuple[str, int], int] = {}

    def watched(request: Request) -> Request:
        missing.update(((request.name, index), request.limit) for index in request.samples)
        if (follow := request.then) is None:
            return request

        def then(sample: Sample) -> Sequence[Continuation]:
            found = follow(sample)
            optional.update(((one.name, 0), one.limit) for one in found)
            return found

        return replace(request, then=then)

    for s in sampler.run([watched(request) for request in requests]):
        if s is None:
            yield None
            continue
        key = s.name, s.sample
        limit = missing.pop(key, None) or optional.pop(key, None)
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
