"""The frozen roles' final states, computed once and reused in every epoch.

The roles that a loss compares the student with never change, so neither do their states at the response tokens. These
are kept in the run directory in the compute dtype, one raw file [all response tokens, D] per role, with a manifest of
their SHA-256. What is read back equals what was computed, bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from dail_jax import mesh as mesh_lib
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


class References:
    """Read access to a cache: `references(role, index)` is [T,D]."""

    def __init__(self, folder: Path, roles: Sequence[str], examples: Sequence[batches.Example], d: int, dtype):
        self.folder, self.roles, self.d, self.dtype = folder, tuple(roles), d, np.dtype(dtype)
        self.offsets = np.concatenate([[0], np.cumsum([len(e.response) for e in examples])])

    @functools.cached_property
    def maps(self) -> dict[str, np.ndarray]:
        shape = (int(self.offsets[-1]), self.d)
        return {r: np.memmap(self.folder / f"{r}.bin", self.dtype, "r", shape=shape) for r in self.roles}

    def __call__(self, role: str, index: int) -> np.ndarray:
        return self.maps[role][self.offsets[index] : self.offsets[index + 1]]

    def __getstate__(self):  # Grain's worker processes open the files themselves
        return {k: v for k, v in self.__dict__.items() if k != "maps"}


def is_valid(folder: Path, key: str) -> bool:
    """Whether the folder holds an undamaged cache made for `key`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest["key"] == key and all(sha256(folder / f) == h for f, h in manifest["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def compute(
    folder: Path,
    key: str,
    spec: step_lib.StepSpec,
    params: Params,
    mesh: jax.sharding.Mesh,
    examples: list[batches.Example],
    rows: int,
    bucket: int,
) -> References:
    """Fills the cache, `rows` examples at a time in order of length; a valid cache for `key` is reused."""
    dtype = params["norm"].dtype
    references = References(folder, spec.roles, examples, spec.model.D, dtype)
    if mesh_lib.from_first(lambda: is_valid(folder, key)):
        return references
    row_bytes = spec.model.D * references.dtype.itemsize
    paths = {role: folder / f"{role}.bin" for role in spec.roles}
    writer = mesh_lib.is_first()
    if writer:
        shutil.rmtree(folder, ignore_errors=True)
        for path in paths.values():
            _allocate(path, int(references.offsets[-1]) * row_bytes)
    states = step_lib.make_states(mesh)
    where = mesh_lib.sharding(mesh, "b")
    local = mesh_lib.local_rows(mesh, rows)
    with progress("computing references", len(spec.roles) * len(examples), "traces") as bar:
        for role in spec.roles:
            prompt = prompt_of(role)
            assemble = batches.Assemble(examples, bucket, 1, local, (prompt,))
            order = np.argsort(assemble.lengths[prompt], kind="stable")
            for i in range(0, len(order), rows):
                chosen = np.pad(order[i : i + rows], (0, max(0, i + rows - len(order))), constant_values=-1)
                batch = assemble.map(chosen)
                tokens, positions = (
                    jax.make_array_from_process_local_data(
                        where, batch[f"{prompt}_{name}"][0], (rows, batch[f"{prompt}_{name}"].shape[-1])
                    )
                    for name in ("tokens", "positions")
                )
                got = states(spec.model, spec.remat, params, None, tokens, positions, batch["mask"].shape[-1])
                got = process_allgather(got, tiled=True) if jax.process_count() > 1 else np.asarray(got)
                if writer:
                    with writing(paths[role]), open(paths[role], "r+b") as file:
                        for row, index in enumerate(chosen):
                            if index >= 0:
                                file.seek(int(references.offsets[index]) * row_bytes)
                                file.write(got[row, got.shape[1] - len(examples[index].response) :].tobytes())
                bar.advance(int((chosen >= 0).sum()))
    if writer:
        for path in paths.values():
            with writing(path), open(path, "rb") as file:
                os.fsync(file.fileno())
        files = {path.name: sha256(path) for path in paths.values()}
        write_atomic(folder / "manifest.json", json.dumps({"key": key, "files": files}, indent=1))
    mesh_lib.barrier("references")
    return references


def _allocate(path: Path, size: int) -> None:
    """Creates a file of `size` bytes and reserves its space, so that a full disk is noticed before the work."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            shutil.rmtree(path.parent, ignore_errors=True)  # other files need the space
            raise


def log_ratios(
    references: References, params: Params, examples: list[batches.Example], chunk: int
) -> list[list[float]]:
    """log p_PS - log p_NR of every response token, by example, for the report.

    Where it is low, the contrast pushes the student away from the token. Every process computes all of it, from its own
    read of the cache.
    """

    @jax.jit
    def of_chunk(states, ids):
        return jnp.take_along_axis(jax.nn.log_softmax(transformer.unembed(params, states)), ids[:, None], 1)[:, 0]

    ids = np.concatenate([np.array(e.response, np.int32) for e in examples])
    ids = np.pad(ids, (0, -len(ids) % chunk))
    logs = {}
    for role in CONTRAST:
        states = references.maps[role]
        parts = []
        for i in range(0, len(ids), chunk):
            rows = np.array(states[i : i + chunk])
            rows = np.pad(rows, ((0, chunk - len(rows)), (0, 0)))
            parts.append(np.asarray(of_chunk(rows, ids[i : i + chunk])))
        logs[role] = np.concatenate(parts)
    ratio = np.round(logs["privileged"] - logs["negative"], 3)
    return [ratio[a:b].tolist() for a, b in itertools.pairwise(references.offsets)]
