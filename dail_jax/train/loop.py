"""The one training loop: restore, update, guard, write metrics, save, stop when asked.

Kinds of training differ in their feed, which makes the batches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import optax

from dail_jax.checkpoint.store import Store
from dail_jax.errors import Interrupted, UserError
from dail_jax.metrics import Metrics, log, progress
from dail_jax.rundir import Interrupt


@dataclass(frozen=True)
class Batch:
    """The input of one update: this process's rows, as `data.batches.Assemble` lays them out, and all rows' names."""

    arrays: Mapping[str, np.ndarray]
    names: np.ndarray  # [A,B], of the rows of all processes; "" for empty ones
    figures: Mapping[str, float] = field(default_factory=dict)  # logged with the update's own metrics
    resumable: bool = True  # whether training can resume after this update


class Feed(Protocol):
    """Makes the batches of a whole run, in order."""

    steps: int  # updates in the whole run

    def restore(self, step: int, saved: Mapping[str, Any]) -> None:
        """Continues after update `step`, given what `progress` returned then; raises UserError if it cannot."""
        ...

    def next(self, step: int, state: Any, interrupt: Interrupt) -> Batch | None:
        """The batch of update `step` + 1, given the current state; None if interrupted."""
        ...

    def progress(self) -> dict[str, Any]:
        """What to save with a checkpoint, as JSON."""
        ...

    def close(self) -> None:
        """Called when training ends, whether or not it succeeded."""
        ...


@dataclass(frozen=True)
class Trainer:
    """Makes and updates the state.

    `update(state, arrays)` returns the new state and the update's metrics, among them `finite` and, by row, `bad_rows`.
    `state.skipped` counts the latest updates in a row that were not finite.
    """

    init: Callable[[], Any]
    abstract: Any  # the state's shapes, types and shardings
    update: Callable[[Any, Mapping[str, np.ndarray]], tuple[Any, Mapping[str, Any]]]
    rate: optax.Schedule
    save_every: int
    max_skipped: int


def run(trainer: Trainer, feed: Feed, store: Store | None, metrics: Metrics, stage: str = "train") -> Any:
    """Trains from the newest checkpoint and returns the state after `feed.steps` updates, the last of which is saved.

    Raises Interrupted if asked to stop, with everything saved. Without a store, nothing is saved.
    """
    step, state, steps = 0, None, feed.steps
    with contextlib.closing(feed):
        restored = store.restore(trainer.abstract) if store else None
        if restored is not None:
            step, state, saved_progress = restored
            feed.restore(step, saved_progress)
            log(f"{stage}: resuming at update {step}")
        else:
            state = trainer.init()
        metrics.rewind(step)  # later rows, which will be written again
        saved = step
        with (
            progress("training", steps, "updates", step) as bar,
            metrics.profiler() as profile,
            Interrupt(store is not None) as interrupt,
        ):
            ended = time.monotonic()
            while step < steps:
                profile(step + 1)
                batch = feed.next(step, state, interrupt)
                finite = False
                if batch is not None:
                    state, out = trainer.update(state, batch.arrays)
                    step += 1
                    values = {k: np.asarray(v).item() for k, v in out.items() if k not in ("bad_rows", "finite")}
                    rate = np.asarray(trainer.rate(step - 1)).item()
                    metrics.write(step, learning_rate=rate, **batch.figures, **values)
                    seconds, ended = time.monotonic() - ended, time.monotonic()
                    note = " ".join(f"{k} {v:.3g}" for k, v in {"loss": values["loss"], **batch.figures}.items())
                    speed = f", {values['tokens'] / max(seconds, 1e-9):,.0f} tokens/s" if "tokens" in values else ""
                    bar.advance(note=f"{note}, {seconds:.3g} s/update{speed}")
                    finite = bool(out["finite"])
                    if not finite:
                        _skipped(trainer, batch, np.asarray(out["bad_rows"]), int(state.skipped), step, stage)
                    if not batch.resumable:
                        continue
                stop = batch is None or interrupt.wanted
                due = finite and step // trainer.save_every > saved // trainer.save_every
                if store and step > saved and (due or stop or step == steps):
                    store.save(step, state, feed.progress())
                    saved = step
                if stop and step < steps:
                    raise Interrupted(f"{stage}: stopped and saved at update {step} of {steps}; call again to resume")
    if store:
        store.close()
    return state


def _skipped(trainer: Trainer, batch: Batch, bad: np.ndarray, count: int, step: int, stage: str) -> None:
    """Logs the rows of an update that was not finite; raises UserError after too many such updates in a row."""
    log(f"{stage}: update {step} was not finite and is skipped; rows: {', '.join(culprits(batch.names, bad)[:8])}")
    if count >= trainer.max_skipped:
        raise UserError(
            f"{trainer.max_skipped} updates in a row were not finite: lower the learning rate or gamma; "
            "the last good checkpoint is kept",
            field=stage,
        )


def culprits(names: np.ndarray, bad: np.ndarray) -> list[str]:
    """The names of the rows [A,B] that are not finite, or of all rows if every one is finite by itself."""
    return [str(name) for name in (names[bad] if bad.any() else names.ravel()) if name]
