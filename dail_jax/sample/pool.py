"""The host's account of pages: which of them each slot holds, and which are free.

Every device numbers its own pages: first one that belongs to no row, then those of the prompts, in one stretch for each
place that a prompt can be loaded to, then those that samples take as they grow. A sample's table lists the full pages of
its prompt, which it shares with others, and then its own, of which the first begins with what was left of the prompt.
"""

from __future__ import annotations

import math

import numpy as np

from dail_jax.sample.decode import Grid

FIRST = 2  # pages that a row may need for its first chunk, whose tokens may not fit behind the rest of the prompt


def pages_of(roles: int, rows: int, prompts: int, prompt_slots: int, max_tokens: int, page: int, share: float) -> int:
    """How many pages a device has for so many rows and prompts, if a row holds `share` of `max_tokens` tokens on average;
    at any rate enough for one sample of `max_tokens`. A row's first page begins with what is left of its prompt."""
    each, longest = 1 + math.ceil(share * max_tokens / page), 1 + math.ceil(max_tokens / page)
    return 1 + prompts * math.ceil(prompt_slots / page) + max(rows * each, roles * longest)


def table_shape(grid: Grid) -> tuple[int, int]:
    """Rows, and the pages of the longest."""
    return grid.roles * grid.slots, math.ceil((grid.prompt_slots + grid.max_tokens) / grid.page)


class Pool:
    """Pages of a grid's samples.

    Attributes:
      rows: [slots, roles], the rows of each slot.
      table: [B, W] int32, for `decode.decode`: the pages of each row, those of its device.
      tokens: [B], of each row's prompt; 0 where the row is not in use.
      shared, listed: [B], how many of a row's pages are its prompt's, and how many there are in all.
    """

    def __init__(self, grid: Grid, devices: int):
        self.grid, self.devices = grid, devices
        self.prompt_pages = math.ceil(grid.prompt_slots / grid.page)
        prompts = grid.blocks // devices * grid.roles * grid.entries
        self.free = [list(range(grid.pages // devices))[: prompts * self.prompt_pages : -1] for _ in range(devices)]
        self.running = [0] * devices  # samples
        block, place = np.divmod(np.arange(grid.slots), grid.width)
        self.rows = (block[:, None] * grid.roles + np.arange(grid.roles)) * grid.width + place[:, None]
        self.table = np.zeros(table_shape(grid), np.int32)
        self.tokens = np.zeros(grid.roles * grid.slots, int)
        self.shared = np.zeros(grid.roles * grid.slots, int)
        self.listed = np.zeros(grid.roles * grid.slots, int)

    def device(self, slot: int) -> int:
        return slot // (self.grid.slots // self.devices)

    def prompt(self, block: int, entry: int) -> np.ndarray:
        """[roles]: the first page of each role's prompt."""
        row = block % (self.grid.blocks // self.devices) * self.grid.roles + np.arange(self.grid.roles)
        return (1 + (row * self.grid.entries + entry) * self.prompt_pages).astype(np.int32)

    def has_room(self, slot: int) -> bool:
        """Whether a sample may start beside those that run on its device, some of which need a page for the next chunk."""
        running, free = self.running[self.device(slot)], self.free[self.device(slot)]
        soon = FIRST + math.ceil(running * self.grid.chunk / self.grid.page)
        return not running or len(free) >= self.grid.roles * soon

    def start(self, slot: int, entry: int, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives a slot a sample of an entry, whose prompts have so many tokens [roles].

        Returns [roles] pages twice: what is to be copied from which of the prompt's pages to which of the sample's own.
        """
        first, rows = self.prompt(slot // self.grid.width, entry), self.rows[slot]
        self.running[self.device(slot)] += 1
        for row, page, length in zip(rows, first, lengths, strict=True):
            full = length // self.grid.page
            self.table[row, :full] = page + np.arange(full)
            self.tokens[row], self.shared[row], self.listed[row] = length, full, full
        self.grow(slot, 1)
        end = np.minimum(self.shared[rows], self.prompt_pages - 1)
        return first + end, self.table[rows, self.shared[rows]]

    def short(self, drawn: np.ndarray) -> np.ndarray:
        """[slots] bool: which samples need more pages than they have, if they have so many tokens [slots]."""
        return np.any(self._need(self.rows, drawn[:, None]) > self.listed[self.rows], axis=1)

    def grow(self, slot: int, drawn: int) -> bool:
        """Takes the pages that a sample of `drawn` tokens needs; False, and none, if too few are free."""
        free, rows = self.free[self.device(slot)], self.rows[slot]
        need = self._need(rows, drawn)
        if (need - self.listed[rows]).clip(0).sum() > len(free):
            return False
        for row, size in zip(rows, need, strict=True):
            while self.listed[row] < size:
                self.table[row, self.listed[row]] = free.pop()
                self.listed[row] += 1
        return True

    def _need(self, rows: np.ndarray, drawn: np.ndarray | int) -> np.ndarray:
        """How many pages a prompt takes with so many tokens behind it; none of a row that is not in use."""
        return np.where(self.tokens[rows] > 0, -(-(self.tokens[rows] + drawn) // self.grid.page), 0)

    def end(self, slot: int) -> None:
        """Takes a slot's pages back."""
        self.running[self.device(slot)] -= 1
        for row in self.rows[slot]:
            self.free[self.device(slot)] += self.table[row, self.shared[row] : self.listed[row]].tolist()
            self.table[row], self.tokens[row], self.shared[row], self.listed[row] = 0, 0, 0, 0
