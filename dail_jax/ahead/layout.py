"""Chooses meshes and slots where a configuration says `auto`, by arithmetic: nothing is compiled.

Memory: what a program is handed (weights, adapter, caches, a batch) follows from shapes and shardings and is exact. What
it needs besides is a formula whose constants were fitted to the stored plans (Qwen3-8B and 14B, Qwen2.5-7B); a test
compares its sums with them. Speed: bytes over what main memory and the links between devices carry. Among the layouts that fit,
the fastest is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.ahead import programs
from dail_jax.ahead.chips import LATENCY, LINKS, Chip, chip
from dail_jax.ahead.programs import Job, held
from dail_jax.errors import UserError
from dail_jax.model import lora as lora_lib
from dail_jax.model import transformer
from dail_jax.model.families import ModelConfig
from dail_jax.sample import decode
from dail_jax.train import methods

HEADROOM = 0.9  # the share of a device's memory that a layout may take
MOST_SLOTS = 512  # more would add little, and leave many idle while the last samples are drawn
PLENTY = 3  # samples per slot, at least: with fewer, slots idle for want of work
UNKNOWN = Chip(math.inf, 1.0, 50.0)  # what is assumed of a device that is not in the table, such as a CPU
TIE = 0.05  # estimates of speed that differ by less are taken for equal

# Fitted to compiled programs: bytes that are alive beside what is counted, in numbers per token (or row).
TRAINED = 6.0  # times a layer's activations: what the backward pass of a layer holds
GATHERED = 2.7  # layers whose weights there are a second time, gathered or sliced: some arrive while one is computed
PREFILLED = 20.0  # the same of a prefill
LOGITS = 8.0  # float32 copies of one chunk's logits
TABLES = 2.5  # copies of a device's part of the unembedding while tokens are decoded


class Need(NamedTuple):
    """Bytes a device."""

    arguments: float
    temporaries: float

    @property
    def peak(self) -> float:
        return self.arguments + self.temporaries


@dataclass(frozen=True)
class Devices:
    """What there is: how many devices, in how many slices, of which kind, and the bytes of memory of each."""

    count: int
    slices: int
    kind: str
    memory: float
    chip: Chip

    @property
    def limit(self) -> float:
        """Bytes that a layout may take."""
        return HEADROOM * self.memory


def devices_of(found: Sequence) -> Devices:
    """What is known of JAX's devices, which need not be present."""
    first, known = found[0], chip(found[0])
    try:
        limit = (first.memory_stats() or {}).get("bytes_limit")
    except Exception:  # of devices that are not here, and of backends that do not say
        limit = None
    slices = len({getattr(device, "slice_index", 0) for device in found})
    memory = limit or (known or UNKNOWN).hbm * 1e9
    return Devices(len(found), slices, first.device_kind, memory, known or UNKNOWN)


# ---------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------


def training_need(config: config_lib.Config, model: ModelConfig, mesh) -> Need:
    """The train step's, on the longest batch."""
    cfg, method, size = config.train, methods.of(config), jnp.dtype(config.model.dtype).itemsize
    prompt, response = programs.lengths(config)
    parts = mesh_lib.axis_size(mesh, "b")
    rows, width, cached = cfg.batch_size // cfg.accumulate / parts, prompt + response, method.caches(cfg)
    params = programs.base(config, model, mesh)
    texts = 1 if cached else len(method.prompted)
    batch = cfg.accumulate * rows * (texts * 2 * 4 * width + 5 * response)
    batch += cached * cfg.accumulate * rows * response * len(method.roles) * model.D * size
    adapter = held(lora_lib.abstract(model, cfg.lora, mesh))
    split = mesh.shape["tensor"]
    act = activations(model, split) * size
    kept = {"full": model.D * size, "dots": act * 2, "none": act * 4}[cfg.remat] * model.L
    chunk = min(cfg.chunk, cfg.batch_size // cfg.accumulate * response) / mesh.shape["data"]
    logits = LOGITS * 4 * chunk * -(-model.V // (mesh.shape["fsdp"] * split))
    gathered = GATHERED * mesh.shape["fsdp"] * held(params["layers"]) / model.L
    return Need(held(params) + 3 * adapter + batch, rows * width * (kept + TRAINED * act) + logits + gathered)


def sampling_need(config: config_lib.Config, model: ModelConfig, job: Job, mesh) -> Need:
    """The larger one of a job's prefill and its decoding."""
    size, grid = jnp.dtype(config.model.dtype).itemsize, job.grid(mesh)
    params = programs.base(config, model, mesh)
    adapter = held(lora_lib.abstract(model, config.train.lora, mesh)) if job.adapted else 0.0
    arguments = held(params) + adapter + state_bytes(grid, model, config.model.dtype, mesh)
    prefill = PREFILLED * grid.roles * grid.prompt_slots / mesh.size * activations(model, 1) * size
    rows = grid.roles * grid.slots / mesh_lib.axis_size(mesh, "b")
    table = held({"table": transformer.unembedding(params)})
    decoding = TABLES * table + LOGITS * 4 * rows * model.V / mesh_lib.axis_size(mesh, "u")
    return Need(arguments, max(prefill, decoding))


def activations(model: ModelConfig, split: int) -> float:
    """Numbers per token that one layer makes: its input, queries, keys and values, and what is inside its MLP."""
    inner = model.experts.top * model.experts.I if model.experts else model.F
    return model.D + ((model.N + 2 * model.K) * model.H + inner) / split


def state_bytes(grid: decode.Grid, model: ModelConfig, dtype: str, mesh) -> float:
    """Bytes a device of a sampler's state, caches above all, by the shardings that it asks for."""

    def of(layers: tuple) -> float:
        return _state_bytes(grid, dataclasses.replace(model, layers=layers), dtype, mesh)

    each = {layer: of((layer, layer)) - of((layer,)) for layer in dict.fromkeys(model.layers)}
    return of(model.layers[:1]) + sum(each[layer] for layer in model.layers[1:])


@functools.lru_cache(maxsize=1024)
def _state_bytes(grid: decode.Grid, model: ModelConfig, dtype: str, mesh) -> float:
    with jax.sharding.use_abstract_mesh(mesh):
        (call,) = jax.make_jaxpr(lambda: decode.empty(grid, model, jnp.dtype(dtype)))().eqns
    inner = call.params["jaxpr"].jaxpr
    asked = {x: one.params["sharding"] for one in inner.eqns for x in one.outvars if one.params.get("sharding")}
    total = 0.0
    for x in inner.outvars:
        shape = asked[x].shard_shape(x.aval.shape) if x in asked else x.aval.shape
        total += math.prod(shape) * x.aval.dtype.itemsize
    return total


# ---------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------


def seconds_per_token(config: config_lib.Config, model: ModelConfig, job: Job, mesh, chip: Chip) -> float:
    """What a token of all slots takes at least, divided by their number."""
    size, grid, split = jnp.dtype(config.model.dtype).itemsize, job.grid(mesh), mesh.shape["tensor"]
    rows = grid.roles * grid.slots / mesh_lib.axis_size(mesh, "b")
    params = programs.base(config, model, mesh)
    read = held(params) + state_bytes(grid, model, config.model.dtype, mesh)
    exchanged = 2 * model.L * 2 * (split - 1) / split * rows * model.D * size
    waiting = 2 * model.L * LATENCY * math.log2(split)
    return (read / chip.bandwidth / 1e9 + exchanged / (LINKS * chip.bandwidth * 1e9) + waiting) / grid.slots


def exchange_seconds(config: config_lib.Config, model: ModelConfig, mesh, chip: Chip) -> float:
    """What an update exchanges between devices: weights along fsdp, three times, and activations along tensor."""
    cfg, size = config.train, jnp.dtype(config.model.dtype).itemsize
    fsdp, split = mesh.shape["fsdp"], mesh.shape["tensor"]
    weights_ = 3 * (fsdp - 1) * held(programs.base(config, model, mesh))
    tokens = cfg.batch_size / mesh_lib.axis_size(mesh, "b") * sum(programs.lengths(config))
    activations_ = 6 * model.L * 2 * (split - 1) / split * tokens * model.D * size
    return (cfg.accumulate * weights_ + activations_) / (LINKS * chip.bandwidth * 1e9)


# ---------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One configuration that the choice is for, with its model, what it draws, and whether it trains.

    The slots of jobs whose key is among `automatic` are to be chosen.
    """

    config: config_lib.Config
    model: ModelConfig
    jobs: tuple[Job, ...]
    trains: bool
    automatic: frozenset[str]


@dataclass(frozen=True)
class Choice:
    """Values by key of the configuration, and the most bytes a device that they are estimated to take, by phase."""

    values: Mapping[str, object]
    peaks: Mapping[str, float]


def choose(cfg: config_lib.Mesh, tasks: Sequence[Task], devices: Devices, work: Mapping[str, float]) -> Choice:
    """What each `auto` becomes: one mesh and one number of slots for all tasks. Raises UserError if nothing fits.

    Without tasks, all devices divide the batch.
    `work` has the number of samples by key of slots, where it is known.
    """
    values: dict[str, object] = {}
    peaks: dict[str, float] = {}
    held_ = 0.0  # of the weights as sampling has them, which are there while they are laid out for training
    jobs = [(task, job) for task in tasks for job in task.jobs]
    if jobs and (cfg.sample == "auto" or any(job.key in task.automatic for task, job in jobs)):
        mesh, slots, peak = _sampling(cfg, jobs, devices, work)
        values |= slots
        peaks["sampling"] = peak
        if cfg.sample == "auto":
            values["mesh.sample"] = dict(mesh.shape)
        held_ = max(held(programs.base(task.config, task.model, mesh)) for task, _ in jobs)
    elif cfg.sample == "auto":
        values["mesh.sample"] = dict(zip(mesh_lib.AXES, (devices.count, 1, 1), strict=True))
    if cfg.train == "auto" and tasks:
        trained = [task for task in tasks if task.trains]
        mesh, peaks["training"] = _training(trained or list(tasks), devices, held_)
        values["mesh.train"] = dict(mesh.shape)
    elif cfg.train == "auto":
        values["mesh.train"] = dict(zip(mesh_lib.AXES, (devices.count, 1, 1), strict=True))
    return Choice(values, peaks)


def _sampling(cfg: config_lib.Mesh, jobs: Sequence[tuple[Task, Job]], devices: Devices, work: Mapping[str, float]):
    """(mesh, slots by key, peak) of the fastest that fits all jobs."""
    fitting, failing = [], []
    for mesh in _sampling_meshes(cfg, [task.model for task, _ in jobs], devices):
        slots, seconds, needs = {}, 0.0, []
        for key in dict.fromkeys(job.key for _, job in jobs):
            own = [(task, job) for task, job in jobs if job.key == key]
            automatic = any(key in task.automatic for task, _ in own)
            best = None  # more slots are always faster, so the most that fit
            for number in reversed(_slots(mesh, work.get(key), devices)) if automatic else [0]:
                best = _sized(own, mesh, number, devices)
                if best.need <= devices.limit:
                    break
            assert best is not None
            needs.append(best)
            seconds += best.seconds
            if automatic:
                slots[key] = best.slots
        worst = max(needs, key=lambda one: one.need)
        if worst.need <= devices.limit:
            fitting.append((seconds, mesh.shape["tensor"], mesh, slots, worst.need))
        else:
            failing.append((worst, mesh))
    if fitting:  # the estimate does not tell smaller differences; fewer devices then wait for each other
        fastest = min(seconds for seconds, *_ in fitting)
        near = [one for one in fitting if one[0] <= (1 + TIE) * fastest]
        return min(near, key=lambda one: one[1])[2:]
    if not failing:
        raise UserError(
            f"got auto, and no mesh of {devices.count} devices divides the model's heads and vocabulary: name the sizes",
            field="mesh.sample",
        )
    worst, mesh = min(failing, key=lambda one: one[0].need)
    job, fixed = worst.largest
    less = f"lower {job.key}, " if fixed else "lower "
    raise UserError(
        f"nothing fits for sampling: {job.name} with {job.slots} slots on {_shape(mesh)} needs about "
        f"{worst.need / 1e9:.1f} GB of the {devices.limit / 1e9:.1f} GB that a device ({devices.kind}) may fill: {less}"
        "max_prompt_tokens or sampling.max_tokens, set model.quantize: int8, or take more devices",
        field="mesh.sample" if cfg.sample == "auto" else job.key,
    )


class _Sized(NamedTuple):
    """Jobs with a number of slots: seconds a token, the most bytes a device, and the job that needs them, with whether
    its slots are fixed."""

    seconds: float
    slots: int
    need: float
    largest: tuple[Job, bool]


def _sized(own: Sequence[tuple[Task, Job]], mesh, number: int, devices: Devices) -> _Sized:
    seconds, needs = 0.0, []
    for task, job in own:
        fixed = job.key not in task.automatic
        job = job if fixed else dataclasses.replace(job, slots=number)
        seconds += seconds_per_token(task.config, task.model, job, mesh, devices.chip)
        needs.append((sampling_need(task.config, task.model, job, mesh).peak, (job, fixed)))
    need, largest = max(needs, key=lambda one: one[0])
    return _Sized(seconds, number, need, largest)


def _sampling_meshes(cfg: config_lib.Mesh, models: Sequence[ModelConfig], devices: Devices) -> Iterator[AbstractMesh]:
    """`data` x `tensor`, where heads and widths can be divided; or the one that is configured."""
    if cfg.sample != "auto":
        yield mesh_lib.abstract(mesh_lib.sizes_of(cfg.for_sampling, devices.count, devices.kind))
        return
    for tensor in range(1, devices.count // devices.slices + 1):
        divides = devices.count % (tensor * devices.slices) == 0
        if divides and all(_splits(model, tensor) for model in models):
            yield mesh_lib.abstract((devices.count // tensor, 1, tensor))


def _splits(model: ModelConfig, tensor: int) -> bool:
    sizes = [model.N, model.K, model.V, model.experts.J if model.experts else model.F]
    if model.deltanet:
        sizes += [model.deltanet.N, model.deltanet.K]
    return all(size % tensor == 0 for size in sizes)


def _slots(mesh, samples: float | None, devices: Devices) -> list[int]:
    """Numbers of slots to try: powers of two per part of the batch, as many as there is work for."""
    parts = mesh_lib.axis_size(mesh, "b")
    most = MOST_SLOTS if math.isfinite(devices.memory) else config_lib.Inference().slot_count
    if samples is not None:
        most = min(most, max(samples / PLENTY, 1))
    numbers = [parts * 2**i for i in range(int(math.log2(MOST_SLOTS)) + 1)]
    return [n for n in numbers if n <= most] or [parts]


def _training(tasks: Sequence[Task], devices: Devices, beside: float) -> tuple[AbstractMesh, float]:
    """(mesh, peak) of the one that exchanges least between devices among those that fit."""
    found, least = [], (math.inf, None)
    for mesh in _training_meshes(tasks, devices):
        need = max(
            max(training_need(t.config, t.model, mesh).peak if t.trains else 0.0, beside + _weights(t, mesh))
            for t in tasks
        )
        if need <= devices.limit:
            slowest = max(exchange_seconds(t.config, t.model, mesh, devices.chip) for t in tasks)
            found.append((slowest, tuple(mesh.shape.values()), need, mesh))
        else:
            least = min(least, (need, mesh), key=lambda one: one[0])
    if found:
        _, _, need, mesh = min(found, key=lambda one: one[:2])
        return mesh, need
    if least[1] is None:
        raise UserError(
            f"got auto, and {devices.count} devices do not divide train.batch_size / train.accumulate rows: change one of "
            "them, or name the sizes",
            field="mesh.train",
        )
    raise UserError(
        f"nothing fits for training: {_shape(least[1])} needs about {least[0] / 1e9:.1f} GB of the "
        f"{devices.limit / 1e9:.1f} GB that a device ({devices.kind}) may fill: lower train.max_tokens, raise "
        "train.accumulate, set train.remat: full, or take more devices",
        field="mesh.train",
    )


def _weights(task: Task, mesh) -> float:
    return held(programs.base(task.config, task.model, mesh))


def _training_meshes(tasks: Sequence[Task], devices: Devices) -> Iterator[AbstractMesh]:
    """`data` x `fsdp`; with `tensor` where there are fewer rows than devices."""
    rows = math.gcd(*(task.config.train.batch_size // task.config.train.accumulate for task in tasks))
    parts = max(n for n in range(1, devices.count + 1) if devices.count % n == 0 and rows % n == 0)
    tensor = devices.count // parts
    if not all(_splits(task.model, tensor) for task in tasks):
        return
    for fsdp in range(1, parts + 1):
        inside = devices.count % devices.slices == 0 and (parts // fsdp) % devices.slices == 0
        if parts % fsdp == 0 and inside and all(task.model.D % fsdp == 0 for task in tasks):
            yield mesh_lib.abstract((parts // fsdp, fsdp, tensor))


def _shape(mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
