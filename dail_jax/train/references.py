"""The frozen roles' final states, computed once and reused in every epoch.

The roles that a loss compares the student with never change, so neither do their states at the response tokens. These
are kept in the run directory in the compute dtype, as raw files [response tokens, D], one per role and process, with a
manifest of what they hold and of their SHA-256. Each process writes what its own devices compute, and reads whatever its
batches need: another mesh, or another number of processes, reads the same files. What is read back equals what was
computed, bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from dail_jax import mesh as mesh_lib
from dail_jax import mirror
from dail_jax.data import batches
from dail_jax.errors import writing
from dail_jax.metrics import progress
from dail_jax.model import transformer
from dail_jax.model.weights import Params
from dail_jax.provenance import sha256
from dail_jax.rundir import write_atomic
from dail_jax.train import step as step_lib
from dail_jax.train.methods import CONTRAST, prompt_of


def bytes_needed(tokens: int, roles: int, d: int, dtype) -> int:
    """The size of the cache on disk, for states of `d` numbers at all tokens of the responses."""
    return roles * tokens * d * np.dtype(dtype).itemsize


Parts = dict[str, list[list[int]]]  # by role: the examples whose states each part holds, ascending


class References:
    """Read access to a cache: `references(role, index)` is [T,D]."""

    def __init__(self, folder: Path, parts: Parts, examples: Sequence[batches.Example], d: int, dtype):
        self.folder, self.parts, self.d, self.dtype = folder, parts, d, np.dtype(dtype)
        self.roles = tuple(parts)
        self.lengths = [len(e.response) for e in examples]
        self.places = {  # by role and example: its part, and the row there that its states start at
            role: {
                index: (part, start)
                for part, held in enumerate(of_role)
                for index, start in zip(held, _starts(self.lengths, held), strict=False)
            }
            for role, of_role in parts.items()
        }

    def path(self, role: str, part: int) -> Path:
        return self.folder / _name(role, part)

    @functools.cached_property
    def maps(self) -> dict[tuple[str, int], np.ndarray]:
        return {
            (role, part): np.memmap(self.path(role, part), self.dtype, "r").reshape(-1, self.d)
            for role, of_role in self.parts.items()
            for part, held in enumerate(of_role)
            if held
        }

    def __call__(self, role: str, index: int) -> np.ndarray:
        part, start = self.places[role][index]
        return self.maps[role, part][start : start + self.lengths[index]]

    def __getstate__(self):  # Grain's worker processes open the files themselves
        return {k: v for k, v in self.__dict__.items() if k != "maps"}


def _starts(lengths: Sequence[int], held: Sequence[int]) -> list[int]:
    """The row that each held example's states start at in their part's file, and the file's number of rows."""
    return [0, *itertools.accumulate(lengths[index] for index in held)]


def _name(role: str, part: int) -> str:
    return f"{role}.{part}.bin" if part else f"{role}.bin"


def load(folder: Path, key: str, examples: Sequence[batches.Example], d: int, dtype) -> References | None:
    """An undamaged cache that was made for `key`, or None. The processes share the work of looking for damage."""
    manifest = mesh_lib.from_first(lambda: _manifest(folder, key))
    if manifest is None:
        return None
    mine = list(manifest["files"].items())[jax.process_index() :: jax.process_count()]
    try:
        damaged = any(sha256(folder / name) != digest for name, digest in mine)
    except OSError:
        damaged = True
    return None if mesh_lib.any_process(damaged) else References(folder, manifest["parts"], examples, d, dtype)


def _manifest(folder: Path, key: str) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        names = [_name(role, i) for role, of_role in manifest["parts"].items() for i in range(len(of_role))]
        return manifest if manifest["key"] == key and sorted(names) == sorted(manifest["files"]) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def compute(
    folder: Path,
    key: str,
    spec: step_lib.StepSpec,
    params: Params,
    mesh: jax.sharding.Mesh,
    examples: list[batches.Example],
    rows: int,
    bucket: int,
    most: int,
) -> References:
    """Makes the cache anew, `rows` examples at a time in order of length, with at most `most` programs.

    Each process writes the states that its own devices hold.
    """
    local = mesh_lib.local_rows(mesh, rows)
    orders, widths = schedule(examples, spec.roles, rows, bucket, most)
    assembles = {
        role: batches.Assemble(examples, bucket, 1, local, (prompt_of(role),), widths=widths) for role in spec.roles
    }
    longest = batches.pad(max(len(e.response) for e in examples), bucket)
    writers = mesh_lib.from_all(mesh_lib.owned_rows(mesh, rows))
    parts = {
        role: [sorted(i for i in order[:, owned].ravel().tolist() if i >= 0) for owned in writers]
        for role, order in orders.items()
    }
    references, me = References(folder, parts, examples, spec.model.D, params["norm"].dtype), jax.process_index()
    row_bytes = spec.model.D * references.dtype.itemsize
    mesh_lib.from_first(lambda: shutil.rmtree(folder, ignore_errors=True))
    for role in spec.roles:
        _allocate(references.path(role, me), _starts(references.lengths, parts[role][me])[-1] * row_bytes)
    states = step_lib.make_states(mesh)
    where = mesh_lib.sharding(mesh, "b")
    with progress("computing references", len(spec.roles) * len(examples), "traces") as bar:
        for role, order in orders.items():
            path, prompt = references.path(role, me), prompt_of(role)
            for chosen in order:
                batch = assembles[role].map(chosen)
                tokens, positions = (
                    jax.make_array_from_process_local_data(
                        where, batch[f"{prompt}_{name}"][0], (rows, batch[f"{prompt}_{name}"].shape[-1])
                    )
                    for name in ("tokens", "positions")
                )
                length = min(longest, tokens.shape[-1] - 1)  # by width alone, so that roles share programs
                got = states(spec.model, spec.remat, params, None, tokens, positions, length)
                with writing(path), open(path, "r+b") as file:
                    for shard in (one for one in got.addressable_shards if one.replica_id == 0):
                        for index, x in zip(chosen[shard.index[0]], np.asarray(shard.data), strict=True):
                            if index >= 0:
                                file.seek(references.places[role][index][1] * row_bytes)
                                file.write(x[len(x) - references.lengths[index] :].tobytes())
                bar.advance(int((chosen >= 0).sum()))
    mine = {}
    for path in (references.path(role, me) for role in spec.roles):
        with writing(path), open(path, "rb") as file:
            os.fsync(file.fileno())
        mine[path.name] = sha256(path)
    files = {name: digest for one in mesh_lib.from_all(mine) for name, digest in one.items()}
    manifest = json.dumps({"key": key, "files": files, "parts": parts})
    mesh_lib.from_first(lambda: write_atomic(folder / "manifest.json", manifest))
    mirror.share()
    return references


def schedule(
    examples: Sequence[batches.Example], roles: Sequence[str], rows: int, bucket: int, most: int
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """Each role's `_batches`, and the widths, at most `most`, that those of all roles are padded to."""
    lengths = {role: np.array([len(e.prompts[prompt_of(role)]) + len(e.response) for e in examples]) for role in roles}
    orders = {role: _batches(of_role, rows) for role, of_role in lengths.items()}
    longest = [lengths[role][chosen[chosen >= 0]].max() for role, order in orders.items() for chosen in order]
    return orders, batches.chosen_widths(longest, bucket, most)


def _batches(lengths: np.ndarray, rows: int) -> np.ndarray:
    """The examples in order of length, `rows` at a time: [batches, rows], -1 where a batch has no more."""
    order = np.argsort(lengths, kind="stable")
    return np.pad(order, (0, -len(order) % rows), constant_values=-1).reshape(-1, rows)


def _allocate(path: Path, size: int) -> None:
    """Creates a file of `size` bytes and reserves its space, so that a full disk is noticed before the work."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                if size and hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            shutil.rmtree(path.parent, ignore_errors=True)  # other files need the space
            raise


def log_ratios(
    references: References, params: Params, mesh: jax.sharding.Mesh, examples: list[batches.Example], chunk: int
) -> list[list[float]]:
    """log p_PS - log p_NR of every response token, by example, for the report.

    Where it is low, the contrast pushes the student away from the token. Every process reads all of the cache.
    """

    @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(mesh))
    def of_chunk(params, states, ids):
        return jnp.take_along_axis(jax.nn.log_softmax(transformer.unembed(params, states)), ids[:, None], 1)[:, 0]

    head = {name: params[name] for name in ("embed", "unembed") if name in params}
    ids = np.concatenate([np.array(e.response, np.int32) for e in examples])
    ids = np.pad(ids, (0, -len(ids) % chunk)).reshape(-1, chunk)
    logs = {}
    for role in CONTRAST:
        rows = _chunks((references(role, index) for index in range(len(examples))), chunk)
        logs[role] = np.concatenate([np.asarray(of_chunk(head, *pair)) for pair in zip(rows, ids, strict=True)])
    ratio = np.round(logs["privileged"] - logs["negative"], 3)
    starts = _starts(references.lengths, range(len(examples)))
    return [ratio[a:b].tolist() for a, b in itertools.pairwise(starts)]


def _chunks(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The rows of several arrays one after the other, `size` at a time; the last are followed by zeros."""
    held: list[np.ndarray] = []
    for x in arrays:
        held.append(x)
        while sum(map(len, held)) >= size:
            rows = np.concatenate(held)
            yield rows[:size]
            held = [rows[size:]]
    if rest := sum(map(len, held)):
        yield np.pad(np.concatenate(held), ((0, size - rest), (0, 0)))
