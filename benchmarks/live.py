"""What decoding costs where a token reads its row's own text, and where it reads the room for the longest: by arithmetic.

The host's side of the sampler runs as it is, over a device that only counts. Texts have 30% of the budget on average, and
10% of them are cut there. Bytes are those of weights, keys and values; time is what main memory takes to move them, or the
products of the weights at the device's peak where that is longer. Nothing here has been measured on such a device.

    python benchmarks/live.py                    # takes some minutes
    python benchmarks/live.py --budgets 16384

Qwen3-8B in bfloat16, 128 samples of each prompt of 256 tokens, one part of the mesh's `data`. Of a device's memory, 90%
are for weights, keys and values. Slots are as many as fit, and 256 at most; where there are pages, as many as draw most.
"""

from __future__ import annotations

import argparse
import itertools
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.ahead.chips import CHIPS
from dail_jax.model import families, pages, transformer, weights
from dail_jax.sample import decode, engine, mixture
from dail_jax.sample.sampler import Request

MODEL = families.read_config(str(Path(__file__).parents[1] / "configs" / "models" / "qwen3_8b"))
DEVICES = {"v5e:4x4": ("TPU v5 lite", 4), "v6e:4x4": ("TPU v6 lite", 4), "H100 x 8": ("H100", 1)}  # and mesh.tensor
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
PROMPT, SAMPLES, MOST, USABLE, WIDTH = 256, 128, 256, 0.9, 2
MEAN, AT_LIMIT = 0.3, 0.1
BEFORE, COUNTED = 3, 6  # samples per slot


class Lengths:
    """Exponential and cut at 1, but for a share that is 1: lengths as shares of the budget."""

    def __init__(self, mean: float, at_limit: float):
        self.at_limit, rest, low, high = at_limit, (mean - at_limit) / (1 - at_limit), 1e-2, 1e2
        for _ in range(60):  # bisects the scale for the mean of those that are not at the limit
            self.scale = math.sqrt(low * high)
            below = self.scale - 1 / math.expm1(1 / self.scale) < rest
            low, high = (self.scale, high) if below else (low, self.scale)

    def draw(self, rng: np.random.Generator) -> float:
        at_limit, u = rng.random(2)
        return 1.0 if at_limit < self.at_limit else -self.scale * math.log1p(u * math.expm1(-1 / self.scale))


class Counter:
    """Takes the place of the device: slots count up to lengths that follow from their samples' keys."""

    def __init__(self, budget: int, block: int):
        self.budget, self.block, self.lengths = budget, block, Lengths(MEAN, AT_LIMIT)
        self.steps, self.live, self.fetched = 0, 0.0, 0.0

    def empty(self, grid, *_):
        n = grid.slots
        return types.SimpleNamespace(
            live=np.zeros(n, bool), length=np.zeros(n, int), end=np.zeros(n, int), status=np.zeros(n, int)
        )

    def load_prompt(self, grid, cfg, params, lora, state, *_):
        return state

    def admit(self, grid, state, seed, chosen, entry, key_data, *_):
        for slot in np.flatnonzero(chosen):
            share = self.lengths.draw(np.random.default_rng(key_data[slot]))
            state.live[slot], state.length[slot], state.end[slot] = True, 0, max(math.ceil(share * self.budget), 1)
        return state

    def stop(self, state, chosen):
        state.live &= ~chosen
        return state

    def decode(self, grid, cfg, params, lora, state, *_):
        text = PROMPT + state.length[state.live] + 1
        self.steps += grid.chunk
        self.live += grid.chunk * float(text.sum())
        self.fetched += grid.chunk * float((np.ceil(text / self.block) * self.block).sum())
        state.length = np.where(state.live, np.minimum(state.length + grid.chunk, state.end), state.length)
        state.live &= state.length < state.end
        return state

    def read(self, state, slot):
        return (np.zeros(self.budget, np.int8),) * 5


@dataclass(frozen=True)
class Figures:
    """Of one part of `data`: the grid; per step, tokens of samples that were kept, live tokens and those that a kernel
    fetches; the share of all tokens that was drawn again."""

    grid: decode.Grid
    kept: float
    live: float
    fetched: float
    again: float


def simulate(slots: int, budget: int, share: float | None, block: int) -> Figures:
    """Runs the engine until every slot has drawn some samples, and counts over the next; a kernel fetches blocks of so many
    tokens."""
    mesh = mesh_lib.make_mesh(config_lib.Axes(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    sampling, counter = mixture.sampling_params(config_lib.Sampling()), Counter(budget, block)
    sampler = engine.Engine(PARAMS, SMALL, mesh, (), 0, slots, budget, sampling, pages=share)
    count = (BEFORE + COUNTED + 2) * slots // SAMPLES + 4
    requests = [Request(f"p{i}", ((0,) * PROMPT,), tuple(range(SAMPLES)), budget) for i in range(count)]
    names = ("empty", "load_prompt", "admit", "stop", "decode", "read")
    chunk = max(engine.CHUNK, budget // 256)  # of long texts, a larger one, no larger than a page: it saves time here
    with (
        mock.patch.multiple(decode, **{name: getattr(counter, name) for name in names}),
        mock.patch.object(engine, "CHUNK", chunk),
    ):
        samples = (sample for sample in sampler.run(requests) if sample is not None)
        seen = []
        for some in (BEFORE, COUNTED):
            assert sum(1 for _ in itertools.islice(samples, some * slots)) == some * slots
            seen.append((sampler.usage.live, counter.steps, counter.live, counter.fetched, sampler.usage.again))
        grid = sampler.grid(SAMPLES, engine.bucket(PROMPT))
    kept, steps, live, fetched, again = (after - before for before, after in zip(*seen, strict=True))
    return Figures(grid, kept / steps, live / steps, fetched / steps, again / (kept + again))


SMALL = families.ModelConfig(
    "qwen3",
    8,
    4,
    1,
    1,
    4,
    4,
    MODEL.layers[:1],
    norm_eps=1e-6,
    tied=True,
    qk_norm="head",
    qkv_bias=False,
    max_positions=8,
)
PARAMS = weights.init(jax.random.key(0), SMALL, std=1.0)


@dataclass(frozen=True)
class Row:
    """A line of the table: bytes per step and device, its time in seconds, and tokens per second and device."""

    figures: Figures
    moved: float
    ideal: float
    seconds: float
    speed: float


def row_of(figures: Figures, device: str, paged: bool) -> Row:
    kind, tensor = DEVICES[device]
    chip, grid, token = CHIPS[kind], figures.grid, token_bytes(tensor)
    read = held(tensor) - MODEL.V * MODEL.D * WIDTH / tensor  # the table of embeddings is looked up
    own = -(-(grid.max_tokens + engine.CHUNK) // transformer.TILE) * transformer.TILE
    allocated = grid.slots * own + grid.blocks * grid.entries * grid.prompt_slots
    moved = read + token * (figures.fetched + grid.slots if paged else allocated)
    products = 2 * (weights.count(MODEL) - MODEL.V * MODEL.D) * grid.slots / tensor
    seconds = max(moved / (chip.bandwidth * 1e9), products / (chip.peak * 1e12))
    return Row(figures, moved, read + token * figures.live, seconds, figures.kept / seconds / tensor)


def held(tensor: int) -> float:
    return weights.count(MODEL) * WIDTH / tensor


def token_bytes(tensor: int) -> float:
    """Of a token's keys and values, on one device."""
    return MODEL.L * 2 * MODEL.K * MODEL.H * WIDTH / tensor


def rows(device: str, budget: int) -> tuple[Row, Row]:
    """The caches of today, and pages."""
    kind, tensor = DEVICES[device]
    block = pages.KEYS["tpu" if kind.startswith("TPU") else "gpu"]
    room = (CHIPS[kind].hbm * 1e9 * USABLE - held(tensor)) / token_bytes(tensor)  # tokens
    slots = MOST
    while True:
        grid = engine.grid_of(ONE, slots, 1, budget, SAMPLES, engine.bucket(PROMPT))
        if slots * (budget + 2 * transformer.TILE) + grid.blocks * grid.entries * grid.prompt_slots <= room:
            break
        slots -= 1
    before, found = row_of(simulate(slots, budget, None, block), device, False), []
    for factor in (1, 1.5, 2, 2.5, 3, 3.5, 4):
        more = min(round(slots * factor), MOST)
        grid = engine.grid_of(ONE, more, 1, budget, SAMPLES, engine.bucket(PROMPT), 1.0)
        spare = room / grid.page - grid.blocks * grid.entries * math.ceil(grid.prompt_slots / grid.page) - 1
        share = min((spare // more - 1) * grid.page / budget, 1.0)
        if share > 0 and not (found and more == found[-1].figures.grid.slots):
            found.append(row_of(simulate(more, budget, share, block), device, True))
    return before, max(found, key=lambda row: row.speed)


ONE = mesh_lib.abstract((1, 1, 1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=tuple(DEVICES))
    args = parser.parse_args(argv)
    print(
        "| devices, budget | slots | pages; drawn again | kB a live token | bytes / ideal | tokens/s a device | ratio |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for device, budget in itertools.product(args.devices, args.budgets):
        token = token_bytes(DEVICES[device][1])
        before, after = rows(device, budget)
        grid = after.figures.grid
        spare = grid.pages - 1 - grid.blocks * grid.entries * math.ceil(grid.prompt_slots / grid.page)
        share = min((spare / grid.slots - 1) * grid.page / budget, 1)
        each = [token + (row.moved - row.ideal) / row.figures.live for row in (before, after)]
        cells = (
            f"{device}, {budget:,}",
            f"{before.figures.grid.slots}; {grid.slots}",
            f"{share:.2f}; {after.figures.again:.0%}",
            f"{each[0] / 1e3:,.1f}; {each[1] / 1e3:,.1f}",
            f"{before.moved / before.ideal:.2f}; {after.moved / after.ideal:.2f}",
            f"{before.speed:,.0f}; {after.speed:,.0f}",
            f"{after.speed / before.speed:.2f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
