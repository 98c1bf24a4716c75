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
    sampler: Sampler[S], requests: Sequence[Request], journals: Sequence[Journal], label: str, unit: str, done: int = 0
) -> Iterator[Iterator[S]]:
    """Iterates over the samples of `requests`, of which `done` others were drawn by earlier calls, and over what follows
    from them.

    The block appends each sample to a journal. Where journals are kept, a signal ends the block with Interrupted, once
    they are durable: after a sample, or while the sampler says that none has finished.
    """
    total, names = done + sum(len(request.samples) for request in requests), {request.name for request in requests}
    with progress(label, total, unit, done) as bar, Interrupt(journals[0].keeps) as interrupt:
        started = time.monotonic()

        def samples() -> Iterator[S]:
            drawn, tokens = done, 0
            for sample in checked(sampler, requests):
                asked = 0
                if sample is not None:
                    yield sample
                    asked, tokens = int(sample.name in names), tokens + len(sample.tokens)
                drawn += asked
                note = f"{tokens / (time.monotonic() - started):.3g} tokens/s" if tokens else ""
                bar.advance(asked, note)
                if interrupt.wanted:
                    for journal in journals:
                        journal.close()
                    raise Interrupted(f"{label}: stopped with {drawn} of {total} {unit} drawn; call again to resume")

        yield samples()
