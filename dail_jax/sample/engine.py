"""The host side of sampling: a queue of requests, served by a grid of slots.

Finished slots are refilled between chunks, so that no slot waits for the longest response. A sample's text depends on
(seed, name, sample) and on the padded shapes of its program, which follow from its prompt's length and from the run's
settings. It never depends on its neighbours.

What follows from a sample (`Request.then`) is drawn in its slot, where its keys and values lie: whatever stands before a
continuation but was not drawn is read a token a step, and then the slot goes back to where the next one begins, from the
last to the first. So the slot is taken up a little longer, and no text is read twice. Samples that were drawn before are
read again in the same way. Where layers have a window or a state, a row cannot go back, and nothing is drawn that follows.

Where keys and values lie in pages (`pool`), there may be fewer than all slots' longest texts would fill. When none is
free, the youngest sample is given up, and drawn again later: the same sample.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dail_jax.errors import UserError
from dail_jax.mesh import axis_size
from dail_jax.model import pages as pages_lib
from dail_jax.model import transformer
from dail_jax.model.families import ModelConfig
from dail_jax.model.lora import Lora
from dail_jax.model.weights import Params, unstack
from dail_jax.sample import decode, mixture
from dail_jax.sample import pool as pool_lib
from dail_jax.sample.sampler import Continuation, Request, Sample, ScoredSample

CHUNK = 4
PULSE = 16  # chunks


def bucket(length: int) -> int:
    """The padded length of a prompt: the next of 32, 48, 64, 96, 128, ... (powers of two and their midpoints)."""
    size = 32
    while size < length:
        size *= 2
    return size * 3 // 4 if size > 32 and length <= size * 3 // 4 else size


def key_data(name: str, sample: int) -> tuple[int, int, int]:
    """The data folded into a sample's key: 64 bits of the hash of its request's name, and its index."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big"), sample


@dataclass
class Usage:
    """What a run did: `steps` passes over all slots; of their `drawn` slot-steps, `live` drew a token of a sample, and
    `again` one that has been given up since, for want of pages. Of the samples, `continued` follow from others."""

    live: int = 0
    drawn: int = 0
    steps: int = 0
    prefills: int = 0
    again: int = 0
    continued: int = 0

    @property
    def occupancy(self) -> float:
        """The share of slot-steps that drew a sample's token."""
        return self.live / max(self.drawn, 1)


@dataclass
class _Entry:
    """A loaded prompt, the work on its samples that waits, and how much of it is running."""

    request: Request
    waiting: collections.deque[_Work]
    running: int = 0


@dataclass
class _Work:
    """A sample of an entry, and what follows from it.

    Attributes:
      text: its tokens, once they are drawn.
      coming: what is still to be drawn after it; the next is the last.
      current: what is being drawn after it.
      held: how many of its tokens have keys and values in the slot; None while it is being drawn, or read again.
      before: how many tokens stand between the prompt and those that are being drawn.
      limit: of the latter, the most.
      pauses: whether the slot waits to be told what to do next.
      since: the step in which the slot was given the work.
    """

    entry: _Entry
    sample: int
    text: np.ndarray | None = None
    coming: list[Continuation] = field(default_factory=list)
    current: Continuation | None = None
    held: int | None = None
    before: int = 0
    limit: int = 0
    pauses: bool = False
    since: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """The name and the index of what is being drawn."""
        return (self.current.name, 0) if self.current else (self.entry.request.name, self.sample)

    def start(self, step: int) -> None:
        """In a slot that has the prompt."""
        self.since = step
        self.held, self.before, self.limit = None, 0, self.entry.request.limit
        self.pauses = self.text is not None

    def next(self) -> tuple[int, list[int]]:
        """What a slot that pauses does next: it keeps so many tokens behind the prompt, and reads these. Where the text is
        read again, nothing is drawn."""
        text: list[int] = self.text.tolist()  # pyright: ignore[reportOptionalMemberAccess]
        if self.held is None:
            kept, given, self.limit = 0, text, 0
        else:
            self.current = one = self.coming.pop()
            kept = min(self.held, one.kept, one.kept + len(one.tokens) - 1)  # one is read, to draw after it
            given, self.limit = [*text[kept : one.kept], *one.tokens], one.limit
        self.before, self.pauses = kept + len(given), False
        return kept, given

    def end(self) -> None:
        """All is drawn, or read, that the slot was told."""
        assert self.text is not None
        if self.current is None:
            self.held = len(self.text) - 1  # the last token has left no keys
        else:
            self.held = min(self.held or 0, self.current.kept)
        self.current, self.pauses = None, bool(self.coming)

    def give_up(self) -> None:
        """What is being drawn will be drawn again."""
        if self.current is not None:
            self.coming.append(self.current)
            self.current = None


@dataclass
class Engine:
    """Our sampler: draws samples for requests with `run`. Reusable: programs compile once per prompt bucket."""

    params: Params
    cfg: ModelConfig
    mesh: jax.sharding.Mesh
    stops: tuple[int, ...]
    seed: int
    slots: int
    max_tokens: int  # behind a prompt: of a response, and of what follows from it
    sampling: mixture.SamplingParams
    roles: int = 1
    lora: Lora | None = None
    never: tuple[int, ...] = ()  # token ids that are never drawn
    usable: int | None = None  # ids from here on only pad the embedding
    pages: float | None = None  # how many pages there are, as a share of what all slots' longest texts would fill
    kv_dtype: str | None = None  # of keys and values: int8, or the model's
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self):
        self.params = unstack(self.params, self.cfg)
        bias, stops = np.zeros(self.cfg.V, np.float32), np.zeros(self.cfg.V, bool)
        for token in (*self.stops, *self.never):
            if not 0 <= token < self.cfg.V:
                raise UserError(f"got token id {token}, want one below the model's vocabulary of {self.cfg.V}")
        bias[list(self.never)] = -np.inf
        if self.usable is not None:
            bias[self.usable :] = -np.inf
        stops[list(self.stops)] = True
        self.rules = decode.TokenRules(jnp.asarray(bias), jnp.asarray(stops))
        self.key = jax.random.key_data(jax.random.key(self.seed, impl="threefry2x32"))

    def grid(self, samples: int, prompt_slots: int) -> decode.Grid:
        """The shapes for requests of up to `samples` samples."""
        return grid_of(
            self.mesh, self.slots, self.roles, self.max_tokens, samples, prompt_slots, self.pages, self.kv_dtype
        )

    def figures(self) -> dict[str, float]:
        """Metrics on what was drawn and at what cost; empty if nothing was drawn."""
        usage = self.usage
        if not usage.steps:
            return {}
        return {
            "tokens": usage.live,
            "occupancy": usage.occupancy,
            "steps": usage.steps,
            "prefills": usage.prefills,
            **({"continued": usage.continued} if usage.continued else {}),
            **({} if self.pages is None else {"drawn_again": usage.again}),
        }

    def run(self, requests: Iterable[Request]) -> Iterator[ScoredSample | None]:
        """Yields samples as they finish, bucket by bucket; the slots determine their order, but not their content.

        Yields None whenever nothing has finished for PULSE chunks, at the same moments in all processes.

        Raises UserError if the model's logits are not finite.
        """
        queues: dict[int, collections.deque[Request]] = collections.defaultdict(collections.deque)
        most = 1
        for request in requests:
            assert len(request.prompts) == self.roles and 0 < request.limit <= self.max_tokens
            drawn = request.drawn if self.continues else ()
            if request.samples or drawn:
                queues[bucket(max(map(len, request.prompts)))].append(request)
                most = max(most, len(request.samples) + len(drawn))
        for prompt_slots in sorted(queues):
            yield from self._run_bucket(self.grid(most, prompt_slots), queues[prompt_slots])

    @property
    def continues(self) -> bool:
        """Whether what follows from samples is drawn too."""
        return transformer.can_rewind(self.cfg)

    def _run_bucket(self, grid: decode.Grid, queue: collections.deque[Request]) -> Iterator[ScoredSample | None]:
        n, quiet = grid.slots, 0
        state = decode.empty(grid, self.cfg, self.params["norm"].dtype)
        entries: list[list[_Entry | None]] = [[None] * grid.entries for _ in range(grid.blocks)]
        running: list[_Work | None] = [None] * n
        counted = np.zeros(n, int)
        pool = pool_lib.Pool(grid, axis_size(self.mesh, "b")) if grid.pages else None
        while True:
            state = self._refill(grid, state, queue, entries, running, counted, pool)
            if not any(running):
                return
            state = self._go_on(grid, state, running, counted)
            if pool is not None:
                state = self._grow(grid, state, running, counted, pool)
            table = None if pool is None else pool.table.copy()
            state = decode.decode(grid, self.cfg, self.params, self.lora, state, self.rules, self.sampling, table)
            live, length, status = (np.asarray(x) for x in jax.device_get((state.live, state.length, state.status)))
            busy = np.array([r is not None for r in running])
            self.usage.live += int((_drawn(length) - _drawn(counted))[busy].sum())
            self.usage.steps += grid.chunk
            self.usage.drawn += n * grid.chunk
            counted = np.where(busy, length, 0)
            _refuse_broken(running, status, length)
            finished = np.flatnonzero(busy & ~live)
            quiet = 0 if finished.size else quiet + 1
            if quiet == PULSE:
                quiet = 0
                yield None
            for slot in finished:
                work = running[slot]
                assert work is not None
                if length[slot]:  # otherwise a text has been read again
                    finish = "stop" if status[slot] == decode.STOPPED else "length"
                    tokens, *scores = (np.asarray(x)[: length[slot]] for x in jax.device_get(decode.read(state, slot)))
                    sample = ScoredSample(*work.key, tokens, finish, *scores)
                    if work.text is None:
                        work.text, work.coming = tokens, self._follow(work.entry.request, sample)
                    else:
                        self.usage.continued += 1
                    yield sample
                    del sample
                work.end()
                if not work.pauses:
                    running[slot] = None
                    work.entry.running -= 1
                    if pool is not None:
                        pool.end(int(slot))

    def _follow(self, request: Request, sample: Sample) -> list[Continuation]:
        """What is to be drawn after a sample; the next is the last, since the slot can only go back."""
        if request.then is None or not self.continues:
            return []
        found = sorted(request.then(sample), key=lambda one: one.kept)
        assert all(one.kept <= len(sample.tokens) and one.limit > 0 for one in found)
        assert all(one.kept + len(one.tokens) + one.limit <= self.max_tokens for one in found)
        return found

    def _go_on(self, grid, state, running: list[_Work | None], counted) -> decode.DecodeState:
        """Tells slots that pause what to do next."""
        n, kept, given = grid.slots, {}, {}
        data, limit = np.zeros((n, 3), np.uint32), np.zeros(n, np.int32)
        for slot, work in enumerate(running):
            if work is not None and work.pauses:
                kept[slot], given[slot] = work.next()
                data[slot], limit[slot] = key_data(*work.key), work.limit
                counted[slot] = -len(given[slot])
        if not given:
            return state
        width = min(bucket(max(map(len, given.values()))), grid.max_tokens)
        tokens, places = np.zeros((n, width), np.int32), list(given)
        chosen, stays, count = np.zeros(n, bool), np.zeros(n, np.int32), np.zeros(n, np.int32)
        for slot in places:
            tokens[slot, width - len(given[slot]) :] = given[slot]
        chosen[places], stays[places], count[places] = True, list(kept.values()), [len(x) for x in given.values()]
        return decode.go_on(grid, state, self.key, chosen, stays, tokens, count, data, limit)

    def _grow(self, grid, state, running, counted, pool: pool_lib.Pool) -> decode.DecodeState:
        """Takes the pages that the next chunk fills, the oldest samples first; where there are none, the youngest samples
        are given up."""
        ended = np.zeros(grid.slots, bool)
        before, limit = (np.array([getattr(w, x) if w else 0 for w in running]) for x in ("before", "limit"))
        reach = before + np.minimum(counted + grid.chunk, limit)
        by_age = sorted((s for s in range(grid.slots) if running[s] is not None), key=lambda s: running[s].since)
        short = pool.short(reach)
        for slot in [s for s in by_age if short[s]]:
            while running[slot] is not None and not pool.grow(slot, int(reach[slot])):
                device = pool.device(slot)
                youngest = [s for s in by_age if running[s] is not None and pool.device(s) == device][-1]
                work, again = running[youngest], int(_drawn(counted[youngest]))
                work.give_up()
                work.entry.waiting.appendleft(work)
                work.entry.running -= 1
                running[youngest] = None
                ended[youngest] = True
                pool.end(youngest)
                self.usage.live -= again
                self.usage.again += again
        return decode.stop(state, ended) if ended.any() else state

    def _refill(self, grid, state, queue, entries, running, counted, pool: pool_lib.Pool | None) -> decode.DecodeState:
        """Loads prompts into free entries and starts waiting samples in free slots."""
        n = grid.slots
        chosen, entry_of = np.zeros(n, bool), np.zeros(n, np.int32)
        data, limit = np.zeros((n, 3), np.uint32), np.zeros(n, np.int32)
        ends = None if pool is None else np.zeros((2, n * grid.roles), np.int32)
        for slot in [s for s in range(n) if running[s] is None]:
            if pool is not None and not pool.has_room(slot):
                continue
            block = slot // grid.width
            index, state = self._entry_with_work(grid, state, queue, entries[block], block, pool)
            if index is None:
                continue
            entry = entries[block][index]
            work = entry.waiting.popleft()
            work.start(self.usage.steps)
            entry.running += 1
            running[slot] = work
            counted[slot] = 0
            chosen[slot], entry_of[slot], limit[slot] = True, index, work.limit
            data[slot] = key_data(*work.key)
            if pool is not None and ends is not None:
                lengths = np.array([len(prompt) for prompt in entry.request.prompts])
                ends[:, pool.rows[slot]] = pool.start(slot, index, lengths)
        if not chosen.any():
            return state
        return decode.admit(grid, state, self.key, chosen, entry_of, data, limit, None if ends is None else tuple(ends))

    def _entry_with_work(
        self, grid, state, queue, entries: list[_Entry | None], block: int, pool: pool_lib.Pool | None
    ):
        """(index of an entry in this block with waiting samples, or None; the state). Loads a prompt if necessary."""
        for index, entry in enumerate(entries):
            if entry is not None and entry.waiting:
                return index, state
        for index, entry in enumerate(entries):
            if queue and (entry is None or not entry.running):
                entries[index] = self._entry(request := queue.popleft())
                tokens = np.zeros((grid.roles, grid.prompt_slots), np.int32)
                for role, prompt in enumerate(request.prompts):
                    tokens[role, : len(prompt)] = prompt
                lengths = np.array([len(p) for p in request.prompts], np.int32)
                self.usage.prefills += 1
                first = None if pool is None else pool.prompt(block, index)
                return index, decode.load_prompt(
                    grid, self.cfg, self.params, self.lora, state, tokens, lengths, block, index, first
                )
        return None, state

    def _entry(self, request: Request) -> _Entry:
        entry = _Entry(request, collections.deque())
        for one in request.drawn:
            if coming := self._follow(request, one):
                entry.waiting.append(_Work(entry, one.sample, one.tokens, coming))
        entry.waiting.extend(_Work(entry, sample) for sample in request.samples)
        return entry


def grid_of(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    slots: int,
    roles: int,
    max_tokens: int,
    samples: int,
    prompt_slots: int,
    pages: float | None = None,
    kv_dtype: str | None = None,
) -> decode.Grid:
    """The shapes for requests of up to `samples` samples.

    A block has one slot per sample of a prompt, and room for more prompts, whose samples start as others end: while a
    prompt's longest sample runs, the others hold enough work to fill every slot three times. There is room for fewer
    where prompts would take over a quarter of the memory of the slots' own tokens; where not even 2 fit, blocks are
    twice as wide. With `pages`, keys and values lie in pages, of which there are as many as that share of all slots'
    longest texts would fill. `kv_dtype` is their form: `int8`, or None for the model's type.
    """
    shards = axis_size(mesh, "b")
    share = max(slots // shards, 1)

    def grid(blocks: int, width: int, entries: int) -> decode.Grid:
        page, prompts, number = pages_lib.PAGE, blocks * roles * entries, 0
        if pages is not None:
            rows = blocks * width * roles
            number = shards * pool_lib.pages_of(roles, rows, prompts, prompt_slots, max_tokens, page, pages)
        return decode.Grid(
            roles, blocks * shards, width, entries, prompt_slots, max_tokens, CHUNK, number, page, kv_dtype
        )

    if samples == 1:
        return grid(share, 1, 1)
    blocks, width, entries = 1, share, 0
    for wide in (samples, 2 * samples):
        blocks = max(share // wide, 1)
        width = share // blocks
        entries = min(1 - (-3 * width // samples), -(-width * max_tokens // (4 * prompt_slots)) - 1)
        if entries >= 2:
            break
    return grid(blocks, width, max(entries, 2))


def _drawn(length: np.ndarray) -> np.ndarray:
    """How many tokens have been drawn, where a negative length says how many are to be read before."""
    return np.maximum(length, 0)


def _refuse_broken(running: list[_Work | None], status: np.ndarray, length: np.ndarray) -> None:
    """Raises UserError if a running slot met logits that are not finite.

    The error names the slot that broke earliest. A prompt whose keys are NaN also breaks the other rows of its block,
    which share its buffer, but its own rows break at their first token.
    """
    broken = [slot for slot, work in enumerate(running) if work is not None and status[slot] == decode.BROKEN]
    if not broken:
        return
    slot = min(broken, key=lambda slot: length[slot])
    name, sample = running[slot].key  # pyright: ignore[reportOptionalMemberAccess]
    raise UserError(
        f"the model's logits are not finite for token {length[slot]} of sample {sample} of {name}: check "
        "the weights and the adapter for damage (NaN or infinite values), or set model.dtype to float32"
    )
