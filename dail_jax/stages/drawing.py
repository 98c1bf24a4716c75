"""Draws samples with progress and until a signal: what every stage that keeps a journal of samples shares."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from dail_jax.errors import Interrupted
from dail_jax.metrics import progress
from dail_jax.rundir import Interrupt, Journal
from dail_jax.sample.sampler import Request, S, Sampler, checked


@contextlib.contextmanager
def drawing(
    sampler: Sampler[S], requests: Sequence[Request], journal: Journal, label: str, unit: str, done: int = 0
) -> Iterator[Iterator[S]]:
    """Iterates over the samples of `requests`, of which `done` others were drawn by earlier calls.

    The block appends each sample to the journal. Where the journal is kept, a signal ends the block with Interrupted,
    once the journal is durable: after a sample, or while the sampler says that none has finished.
    """
    total = done + sum(len(request.samples) for request in requests)
    with progress(label, total, unit, done) as bar, Interrupt(journal.keeps) as interrupt:
        started = time.monotonic()

        def samples() -> Iterator[S]:
            drawn, tokens = done, 0
            for sample in checked(sampler, requests):
                if sample is not None:
                    yield sample
                    drawn, tokens = drawn + 1, tokens + len(sample.tokens)
                note = f"{tokens / (time.monotonic() - started):.3g} tokens/s" if tokens else ""
                bar.advance(int(sample is not None), note)
                if interrupt.wanted:
                    journal.close()
                    raise Interrupted(f"{label}: stopped with {drawn} of {total} {unit} drawn; call again to resume")

        yield samples()
