"""Training batches through Grain: which examples, in which order, and how they are padded.

An example has a prompt for each role and one response. Rows are aligned on the right, so that the states that
predict responses are one static slice of every row, and a batch is only as wide as its longest row, rather than as its
longest prompt plus its longest response:

    tokens    . . p p p p r r r r        positions -1 where there is a dot
              . p p p p p p p r r
    slice         [W-T-1 : W-1]          predicts the last T tokens; the mask marks those of the response

Widths are multiples of `bucket`, of which `chosen_widths` takes a few, and all shapes of a batch follow from the width of
its first role, so that there is one program per width. Examples of similar length share a batch, so little of it is
padding. The order is a pure function of (seed, epoch), so resuming needs only the number of the next batch.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

# Examples are sorted by length within windows of this many batches. Larger windows pad less, but make batches uniform:
# with 64, an epoch of the micro-world, DAIL lost 14 points of hard pass@1 (two seeds); with 16 it lost none.
WINDOW = 16

# Batches that each process prepares before they are asked for. With cached references, one of 16 rows of 2,048 tokens and
# 4,096 dimensions is half a GB; Grain's default is 500.
AHEAD = 2


@dataclass(frozen=True)
class Example:
    """The content of one row of a batch: token ids of each role's prompt and of the response.

    For policy gradients, also the log-probability with which each token was drawn, and the response's advantage.
    """

    name: str
    prompts: Mapping[str, tuple[int, ...]]
    response: tuple[int, ...]
    logq: tuple[float, ...] = ()
    advantage: float = 0.0


def examples_digest(examples: list[Example]) -> str:
    """SHA-256 over all token ids, by which cached references and resumed runs are compared."""
    h = hashlib.sha256()
    for e in examples:
        for role in sorted(e.prompts):
            h.update(f"{role}:{','.join(map(str, e.prompts[role]))};".encode())
        h.update(f"{','.join(map(str, e.response))}\n".encode())
    return h.hexdigest()


class Plan:
    """Random access to all batches of a run: `plan[i]` is [batch_size] example indices, -1 where a row is empty."""

    def __init__(self, examples: list[Example], batch_size: int, epochs: int, seed: int):
        self.lengths = np.array([len(e.prompts["student"]) + len(e.response) for e in examples])
        self.batch_size, self.epochs, self.seed = batch_size, epochs, seed
        self.per_epoch = -(-len(examples) // batch_size)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __getitem__(self, index: int) -> np.ndarray:
        return self._epoch(int(index) // self.per_epoch)[int(index) % self.per_epoch]

    @functools.lru_cache(maxsize=2)  # noqa: B019  (one plan per run)
    def _epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        window = self.batch_size * WINDOW
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        batches = [np.pad(b, (0, self.batch_size - len(b)), constant_values=-1) for b in batches]
        return [batches[i] for i in rng.permutation(len(batches))]

    def widths(self, bucket: int, most: int) -> tuple[int, ...]:
        """The `chosen_widths` of all batches."""
        return chosen_widths([self.lengths[self[i][self[i] >= 0]].max() for i in range(len(self))], bucket, most)


def pad(count: int, to: int) -> int:
    return -(-count // to) * to


def chosen_widths(lengths: Sequence[int], bucket: int, most: int) -> tuple[int, ...]:
    """At most `most` multiples of `bucket`, rising, that pad batches with these longest rows least.

    A batch takes the first that it fits in. Exact, by dynamic programming over the widths that occur.
    """
    found, counts = np.unique([pad(int(n), bucket) for n in lengths], return_counts=True)
    before = np.concatenate([[0], counts.cumsum()])
    padded = (before - before[:, None])[:, 1:] * found  # [i,j]: batches i up to j alone, all as wide as the last
    padded = np.where(np.arange(len(before))[:, None] <= np.arange(len(found)), padded, np.inf)
    least, splits = padded[0], []  # of the batches up to j, with one width
    for _ in range(min(most, len(found)) - 1):
        total = np.concatenate([[np.inf], least])[:, None] + padded
        splits.append(total.argmin(0))
        least = total.min(0)
    ends = [len(found)]
    for split in reversed(splits):
        ends.append(split[ends[-1] - 1])
    return tuple(int(found[end - 1]) for end in reversed(ends))


@dataclass(frozen=True)
class Assemble(grain.transforms.Map):
    """Indices of a batch -> arrays of the rows that this process holds.

    Returns {rows [A,B] int32, mask, targets, logq and advantage [A,B,T] (the last two if the examples have them), and
    tokens and positions [A,B,W] for each of `roles`}, where A micro-batches of B local rows make an update. `widths` are
    those that a batch may have in its first role, from `chosen_widths`; by default, all multiples of `bucket`. `room` are
    `lengths` of whatever other batches may hold, if their shapes are to be the same; by default, those of `examples`.
    `references(role, index)` returns final states [T,D], which are added as [A,B,T,D] under `ref_ROLE`.
    """

    examples: list[Example]
    bucket: int
    accumulate: int
    local: np.ndarray  # which rows of a micro-batch
    roles: tuple[str, ...]
    cached: tuple[str, ...] = ()
    references: Callable[[str, int], np.ndarray] | None = None
    widths: tuple[int, ...] = ()
    room: Mapping[str, np.ndarray] | None = None

    def map(self, element: np.ndarray) -> dict[str, np.ndarray]:
        chosen = np.asarray(element)
        t, widths = self.shapes(chosen[chosen >= 0])
        rows = chosen.reshape(self.accumulate, -1)[:, self.local]
        out = {
            "rows": rows.astype(np.int32),
            "mask": np.zeros((*rows.shape, t), bool),
            "targets": np.zeros((*rows.shape, t), np.int32),
        }
        if self.examples[0].logq:
            out |= {name: np.zeros((*rows.shape, t), np.float32) for name in ("logq", "advantage")}
        for at in np.ndindex(rows.shape):
            if rows[at] >= 0:
                e = self.examples[rows[at]]
                out["mask"][at][t - len(e.response) :] = True
                out["targets"][at][t - len(e.response) :] = e.response
                if e.logq:
                    out["logq"][at][t - len(e.response) :] = e.logq
                    out["advantage"][at][t - len(e.response) :] = e.advantage
        for role in self.roles:
            width = widths[role]
            tokens = np.zeros((*rows.shape, width), np.int32)
            positions = np.full((*rows.shape, width), -1, np.int32)
            for at in np.ndindex(rows.shape):
                if rows[at] >= 0:
                    e = self.examples[rows[at]]
                    count = len(e.prompts[role]) + len(e.response)
                    tokens[at][width - count :] = (*e.prompts[role], *e.response)
                    positions[at][width - count :] = np.arange(count)
            out[f"{role}_tokens"], out[f"{role}_positions"] = tokens, positions
        for role in self.cached:
            assert self.references is not None
            first = self.references(role, int(chosen[chosen >= 0][0]))
            states = np.zeros((*rows.shape, t, first.shape[-1]), first.dtype)
            for at in np.ndindex(rows.shape):
                if rows[at] >= 0:
                    states[at][t - len(self.examples[rows[at]].response) :] = self.references(role, int(rows[at]))
            out[f"ref_{role}"] = states
        return out

    def shapes(self, live: np.ndarray) -> tuple[int, dict[str, int]]:
        """T and each role's W: room for every example that fits into the width of `live` in the first role.

        They depend on that width alone, so that the batches of one width share one program.
        """
        first, *others = self.roles
        width = pad(int(self.lengths[first][live].max()), self.bucket)
        width = next((one for one in self.widths if one >= width), width)
        room = self.lengths if self.room is None else self.room
        inside = room[first] <= width
        # At most one less than the width: the state before a response predicts its first token.
        t = min(pad(int(room["response"][inside].max()), self.bucket), width - 1)
        return t, {first: width, **{r: pad(max(t + 1, int(room[r][inside].max())), self.bucket) for r in others}}

    @functools.cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """The length of each example's prompt plus response, by role, and of the `response` alone."""
        response = np.array([len(e.response) for e in self.examples])
        return {"response": response, **{r: response + [len(e.prompts[r]) for e in self.examples] for r in self.roles}}


def iterator(plan: Plan, assemble: Assemble, workers: int, start: int = 0) -> grain.DatasetIterator:
    """Batches in order, from number `start`, made by `workers` processes (0: by this one). Close it when done."""
    ahead = grain.ReadOptions(num_threads=AHEAD, prefetch_buffer_size=AHEAD)
    dataset = grain.MapDataset.source(plan)[start:].map(assemble).to_iter_dataset(ahead)  # pyright: ignore
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain reads its options from absl's flags, which nothing parses here
        # Batches come through pipes: shared memory is scarce in containers, and a process that fills it dies of SIGBUS.
        piped = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, piped)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_begin_worker)
    return iter(dataset)


def _begin_worker(index: int, count: int) -> None:
    """Prepares a worker process, which leaves signals to its parent and must not outlive it."""
    flags.FLAGS.mark_as_parsed()
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of the group; the parent has a checkpoint to save
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def padding_share(plan: Plan, assemble: Assemble) -> float:
    """The share of the student's positions in the first epoch that are padding, including empty rows."""
    used = total = 0
    for i in range(plan.per_epoch):
        live = plan[i][plan[i] >= 0]
        used += assemble.lengths["student"][live].sum()
        total += assemble.shapes(live)[1]["student"] * plan.batch_size
    return 1 - used / total
