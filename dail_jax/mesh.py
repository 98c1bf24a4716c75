"""Device meshes, the letters of array axes, and the one table that maps letters to mesh axes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dail_jax import config as config_lib
from dail_jax.errors import UserError, writing

AXES = tuple(config_lib.Axes.model_fields)
TYPES = (AxisType.Auto,) * len(AXES)  # named, since JAX's default is another from one version to the next

# One letter per array axis, everywhere: upper case in shapes, lower case in einsums and layouts.
LETTERS = {
    "A": "micro-batches of one update",
    "B": "rows of a batch; when sampling, G blocks of M rows",
    "T": "time: the tokens of a row; of its response, where losses and samples leave the prompt out",
    "W": "the tokens of a padded training row, prompt and response, where T is the response's",
    "D": "model width",
    "N": "query heads; in a delta net, value heads",
    "K": "kv heads; in a delta net, heads of queries and keys",
    "H": "head size; in a delta net, of queries and keys",
    "F": "feed-forward width",
    "V": "vocabulary",
    "L": "layers",
    "R": "LoRA rank",
    "O": "outputs of a linear map, flattened",
    "S": "cache slots for a row's own tokens; in attention, the slots of any set of keys",
    "C": "slots of the buffer for one chunk's newest tokens",
    "G": "blocks of rows that share a prompt buffer",
    "M": "rows per block",
    "P": "slots of a block's prompt buffer",
    "E": "prompts side by side in a prompt buffer",
    "Q": "queries per row and kv head: T * N / K",
    "X": "B, where D is spread as well: over `data` alone",
    "J": "experts",
    "I": "the other size of a part that has two: an expert's width; a query with its gate; a delta net's value heads'",
    "Y": "what a delta net convolves for each of K heads: its query, its key and the values that they serve",
    "Z": "taps of its convolution",
    "U": "V, where every device has all of D, as in the unembedding and in logits: over `fsdp` too",
}

# The mesh axes of each letter, in lower case as in layouts; axes with other letters are replicated.
RULES: dict[str, str | tuple[str, ...]] = {
    "b": ("data", "fsdp"),
    "x": "data",
    "d": "fsdp",
    "n": "tensor",
    "k": "tensor",
    "f": "tensor",
    "v": "tensor",
    "u": ("fsdp", "tensor"),
    "j": "tensor",
}


def platforms() -> str | None:
    """The platforms that JAX was told to use, by JAX_PLATFORMS or otherwise."""
    return jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]


def all_devices() -> list[Any]:
    """The devices of all processes; raises UserError if there are none of the platform that JAX_PLATFORMS names."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX leaves out the only platform
        reason = str(error).split(" (")[0] or "it was not found"
        raise UserError(
            f"no device: {reason}; JAX_PLATFORMS=cpu computes on the CPU",
            field=f"JAX_PLATFORMS={platforms() or ''}",
        ) from None


def make_mesh(cfg: config_lib.Axes, devices=None) -> jax.sharding.Mesh:
    """The mesh of all AXES over all devices (or `devices`); raises UserError if the sizes do not fit."""
    devices = list(np.asarray(all_devices() if devices is None else devices).flat)
    sizes = sizes_of(cfg, len(devices), devices[0].device_kind)
    return jax.sharding.Mesh(_arranged(sizes, devices), AXES, axis_types=TYPES)


def abstract(sizes: Sequence[int]) -> AbstractMesh:
    """A mesh of devices that are not even described: enough for names, shapes and shardings."""
    return AbstractMesh(tuple(sizes), AXES, axis_types=TYPES)


def sizes_of(cfg: config_lib.Axes, devices: int, kind: str) -> list[int]:
    """The size of each of AXES; raises UserError if their product is not the number of devices."""
    sizes = [getattr(cfg, axis) for axis in AXES]
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(devices // known, 1)
    if int(np.prod(sizes)) != devices:
        shape = " x ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise UserError(f"got {shape}, want axis sizes whose product is the {devices} devices ({kind})", field="mesh")
    return sizes


def described(train: jax.sharding.Mesh, sample: jax.sharding.Mesh) -> str:
    """The sizes of the two meshes, in words."""
    first, second = (" x ".join(f"{axis} {size}" for axis, size in one.shape.items()) for one in (sample, train))
    return first if first == second else f"{first} for sampling, {second} for training"


def _arranged(sizes: list[int], devices: list) -> np.ndarray:
    """Devices in an array of these sizes, so that neighbours along an axis are close; raises UserError.

    Between slices of TPUs, which only a data-centre network joins, nothing but `data` runs.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"got data={sizes[0]}, want a multiple of the {slices} slices: no other axis may run between them",
            field="mesh.data",
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    one = [sizes[0] // slices, *sizes[1:]]
    return mesh_utils.create_hybrid_device_mesh(
        one, [slices, *[1] * len(one[1:])], devices, allow_split_physical_axes=True
    )


def spec(axes: str) -> PartitionSpec:
    """The PartitionSpec of an array whose axes are the letters of `axes`, e.g. `spec("ldnh")`."""
    return PartitionSpec(*map(_rule, axes))


def _rule(letter: str) -> str | tuple[str, ...] | None:
    """The mesh axes of a letter, if any; `_` stands for an axis that has none."""
    assert letter == "_" or letter in RULES or letter.upper() in LETTERS, f"axis letter {letter!r} is not declared"
    return RULES.get(letter)


def sharding(mesh: jax.sharding.Mesh, axes: str) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def axis_size(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, letter: str) -> int:
    """The number of parts that axis `letter` is divided into."""
    names = RULES.get(letter, ())
    names = (names,) if isinstance(names, str) else names
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


# XLA's options for programs that read large arrays and little else; they concern GPUs, and others accept them. By default,
# small products that share an operand become one, of which the other operands are laid side by side first: caches and what
# is to join them, weights and LoRA's. While decoding, that copies both at every token.
UNMERGED = {"xla_gpu_dot_merger_threshold_mb": "0"}


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """XLA's options for the train step.

    On a TPU, they make sharded products gather whole weights, overlapped with other work. By default XLA loops over
    shards, and each iteration reads and writes the result (2.2 times the step's memory traffic).
    """
    tpu = mesh.devices.flat[0].platform == "tpu"
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if tpu else UNMERGED


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Asks the compiler to lay `x` out by the rules if a mesh is set; otherwise a no-op.

    What does not divide evenly is laid out as `fitting` says.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, fitting(mesh, axes, x.shape))


def fitting(mesh: jax.sharding.AbstractMesh, axes: str, shape: tuple[int, ...]) -> PartitionSpec:
    """`spec(axes)`, with axes that do not divide evenly left unsharded.

    Where there are too few rows to divide, such as those of a prefill, their tokens are divided instead.
    """
    rules = [_rule(a) if size % axis_size(mesh, a) == 0 else None for a, size in zip(axes, shape, strict=True)]
    if axes[0] in "bx" and axes[1:2] == "t" and rules[0] is None and shape[1] % axis_size(mesh, axes[0]) == 0:
        rules[1] = _rule(axes[0])
    return PartitionSpec(*rules)


def parts(letter: str, size: int) -> int:
    """Into how many parts the mesh that is set divides an axis of this size, by the rules and if they divide it evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty else axis_size(mesh, letter)
    return count if size % count == 0 else 1


def check_rows(mesh: jax.sharding.Mesh, count: int) -> None:
    """Raises UserError if `count` batch rows do not divide evenly among the devices."""
    parts = axis_size(mesh, "b")
    if count % parts:
        raise UserError(
            f"got {count} rows per step, want a multiple of the {parts} devices along data and fsdp",
            field="train.batch_size",
        )


def local_rows(mesh: jax.sharding.Mesh, count: int) -> np.ndarray:
    """Which of `count` batch rows this process holds, ascending; raises UserError if they do not divide evenly.

    They need not be contiguous: a mesh follows the interconnect of a TPU slice, not the order of its hosts.
    """
    check_rows(mesh, count)
    slices = sharding(mesh, "b").addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[s] for s in slices if s is not None]))


def owned_rows(mesh: jax.sharding.Mesh, count: int) -> list[int]:
    """The rows of `local_rows` that this process holds the first copy of: each row belongs to just one process."""
    local = local_rows(mesh, count).astype(np.int32)
    rows = jax.make_array_from_process_local_data(sharding(mesh, "b"), local, (count,))
    first = [np.asarray(shard.data) for shard in rows.addressable_shards if shard.replica_id == 0]
    return sorted(np.concatenate([[], *first]).astype(int).tolist())


def to_devices(batch: dict[str, np.ndarray], mesh, rows: int) -> dict[str, jax.Array]:
    """Each process's rows [A, B, ...] as global arrays [A, `rows`, ...], sharded by row."""

    def put(x: np.ndarray) -> jax.Array:
        where = sharding(mesh, "_b" + "_" * (x.ndim - 2))
        return jax.make_array_from_process_local_data(where, x, (x.shape[0], rows, *x.shape[2:]))

    return {name: put(x) for name, x in batch.items() if name != "rows"}


# ---------------------------------------------------------------------------------------------------
# Several processes run one program: all of them must call each of these, in the same order
# ---------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is the process that writes files and logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(wish: bool) -> bool:
    """Whether `wish` is true in any process."""
    return bool(multihost_utils.process_allgather(np.array(wish)).any()) if jax.process_count() > 1 else wish


def from_all(value: Any) -> list[Any]:
    """The `value` (JSON) of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    found = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
    return [json.loads(bytes(np.asarray(one[:size], np.uint8))) for one, size in zip(found, sizes, strict=True)]


def share(count: int) -> slice:
    """Which of `count` rows are this process's, where all share them in their order; the last ones may have fewer."""
    size = -(-count // jax.process_count())
    start = min(size * jax.process_index(), count)
    return slice(start, min(start + size, count))


def joined(mine: np.ndarray, count: int) -> np.ndarray:
    """All of `count` rows, of which every process brings its `share`."""
    if jax.process_count() == 1:
        return mine
    size = -(-count // jax.process_count())
    padded = np.pad(mine, [(0, size - len(mine)), *[(0, 0)] * (mine.ndim - 1)])
    return multihost_utils.process_allgather(padded, tiled=True)[:count]


def from_first(work: Callable[[], Any]) -> Any:
    """Calls `work` in the first process only; its result (JSON) is returned, or its UserError raised, in all of them."""
    if jax.process_count() == 1:
        return work()
    reply, failure = {}, None
    if is_first():
        try:
            reply = {"value": work()}
        except UserError as error:
            failure, reply = error, {"error": str(error)}
    data = np.frombuffer(json.dumps(reply).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    data = multihost_utils.broadcast_one_to_all(np.pad(data, (0, max(size - len(data), 0)))[:size])
    if failure is not None:
        raise failure
    reply = json.loads(bytes(np.asarray(data, np.uint8)))
    if "error" in reply:
        raise UserError(reply["error"])
    return reply["value"]


def from_each(work: Callable[[], Any]) -> list[Any]:
    """Calls `work` in every process; the results (JSON) are returned in all of them, or the first UserError raised."""
    if jax.process_count() == 1:
        return [work()]
    failure = None
    try:
        reply = {"value": work()}
    except UserError as error:
        failure, reply = error, {"error": str(error)}
    replies = from_all(reply)
    failed = [(number, one["error"]) for number, one in enumerate(replies) if "error" in one]
    if failed:
        number, error = failed[0]
        raise failure or UserError(f"{error} (process {number})")
    return [one["value"] for one in replies]


def first_sharers(folder: Path) -> list[int]:
    """For every process, the first one whose files it sees in its `folder`: itself, if it shares that with no earlier one.

    The folder, which may have another path in each process, is created; raises UserError if it cannot be written to. A
    single process does nothing.
    """
    if jax.process_count() == 1:
        return [0]
    mark = f".{uuid.uuid4().hex}.mark"

    def leave_mark() -> str:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / mark).touch()
        return mark

    try:
        marks = from_each(leave_mark)
        return from_all(next(number for number, one in enumerate(marks) if (folder / one).exists()))
    finally:
        (folder / mark).unlink(missing_ok=True)
