"""Compiles the real programs of a configuration for devices that are not here, and says what they would need.

Memory is the compiler's own and exact. Bytes are main memory's, and time is what the instructions take, both read off the
compiled program (`hlo`, `timing`); where libtpu does not print it, as under `fsdp`, there are no bytes, and the time is the
compiler's model. The compiler counts a loop's body once in FLOPs and in that model, so where layers are scanned these come
from two short unrolled models, of 1 and 3 layers, extrapolated to the real depth; attention kernels are added by
arithmetic, since the compiler does not look into them. Where a program's layers are unrolled, as in sampling, all of its
figures can be extrapolated so, memory too (`short`): compiling at full depth takes minutes. For decoding, everything is one
token's. Where keys lie in pages, what the attention kernel fetches follows from the rows' lengths, which no compiler knows:
it is added by arithmetic, for rows whose prompts are at their longest and whose texts are as long as they are on average.
Useful FLOPs, what utilisation is measured in, are arithmetic: products of the forward passes and of the gradient by
activations, causal attention, and nothing twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.ahead import compiled as compiled_lib
from dail_jax.ahead.chips import chip
from dail_jax.ahead.compiled import Figures, copies_of, figures_of
from dail_jax.data.batches import pad
from dail_jax.errors import UserError
from dail_jax.model import lora as lora_lib
from dail_jax.model import pages, transformer, weights
from dail_jax.model.families import Layer, ModelConfig
from dail_jax.sample import decode, engine, mixture, pool
from dail_jax.train import methods, objectives, optimizer
from dail_jax.train import step as step_lib

ASKING = 16  # tokens that ask for an answer, about
KERNEL_EFFICIENCY = 0.5  # of the peak, assumed for attention kernels and delta nets
LIVE = 0.32  # of its limit, what a running sample has drawn on average if lengths are as in `plan`
KERNEL_PASSES = {"forward": 2, "backward": 7}  # [T,T,H] products a splash pass makes


Lower = Callable[[ModelConfig], jax.stages.Lowered]


@dataclass(frozen=True)
class Program:
    """One program of a stage.

    Attributes:
      stage: generate, train or evaluate.
      kind: train, loss or sampler: what to change first where it does not fit.
      model: what it runs; `lower` takes it, or one that differs in layers.
      useful: useful FLOPs a device; 0 where they are not counted.
      kernels: FLOPs a device of attention kernels.
      cost: how to count operations, where loops hide them; None: as `short` does where layers are unrolled.
      unrolled: whether its layers are.
      caches: the shapes, a device's part, of donated caches, which must stay in place.
      unread: bytes a device of arguments that need not be read.
      fetched: bytes a device that kernels move for a token.
      tokens: decoding: drawn per call and slot.
      counted: whether the compiler counts what is computed; of experts, it counts all.
    """

    name: str
    stage: str
    kind: str
    model: ModelConfig
    mesh: Mesh
    lower: Lower
    useful: float = 0.0
    kernels: float = 0.0
    cost: Callable[[], Figures] | None = None
    unrolled: bool = False
    caches: tuple[tuple[int, ...], ...] = ()
    unread: float = 0.0
    fetched: float = 0.0
    tokens: int = 0
    counted: bool = True


@dataclass(frozen=True)
class ProgramReport:
    """What a program needs. GB are 1e9 bytes per device; None where it is not known.

    `seconds` is a call's time, a token's for decoding, and never less than `bandwidth_seconds`, what main memory alone takes
    for `bytes`; `timed` says by what: "instructions", or "compiler", its model, where they cannot be read, or, of a GPU,
    "bound": products at its peak, and bytes at its bandwidth.
    `layers` says how many layers were compiled: "all", or "1 and 3" and extrapolated.
    """

    program: str
    stage: str
    layers: str
    compile_seconds: float
    peak_gb: float | None
    hbm_gb: float | None
    fits: bool | None
    verdict: str
    arguments_gb: float | None = None
    temporaries_gb: float | None = None
    aliased_gb: float | None = None
    flops: float | None = None
    bytes: float | None = None
    seconds: float | None = None
    timed: str | None = None
    bandwidth_seconds: float | None = None
    utilisation: float | None = None
    bytes_over_ideal: float | None = None
    cache_copies: int | None = None


def meshes_of(cfg: config_lib.Mesh, devices) -> tuple[Mesh, Mesh]:
    """The meshes of training and of sampling."""
    return mesh_lib.make_mesh(cfg.for_training, devices), mesh_lib.make_mesh(cfg.for_sampling, devices)


def abstract_meshes(cfg: config_lib.Mesh, devices: int) -> tuple[Any, Any]:
    """The same of so many devices that are not even described: enough for names and shapes."""
    train, sample = (mesh_lib.sizes_of(one, devices, "devices") for one in (cfg.for_training, cfg.for_sampling))
    return mesh_lib.abstract(train), mesh_lib.abstract(sample)


def programs_of(config: config_lib.Config, model: ModelConfig, train: Mesh, sample: Mesh) -> list[Program]:
    """Every program of every stage; none is lowered yet, so the meshes may be abstract."""
    return [*train_programs(config, model, train), *sampler_programs(config, model, sample)]


def compile_all(
    config: config_lib.Config,
    model: ModelConfig,
    train: Mesh,
    sample: Mesh,
    quick: bool = False,
    only: str = "",
    short: bool = False,
) -> Iterator[ProgramReport]:
    """The table's rows, one program at a time; `quick` leaves out the extra programs that count operations."""
    for program in programs_of(config, model, train, sample):
        if only in program.name:
            yield measure(program, config, quick, short)


def lower(mesh: Mesh, jitted, *args) -> jax.stages.Lowered:
    """Traces a program for a mesh; no array is made on it, since its devices may not exist."""
    with jax.set_mesh(mesh):
        return jitted.lower(*args)


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


def lengths(config: config_lib.Config) -> tuple[int, int]:
    """The longest prompt and response, padded, of which `train.max_tokens` admits a batch."""
    cfg = config.train
    longest = (
        config.prompts.max_solution_tokens or config.generate.max_prompt_tokens
        if methods.find(cfg).source == "solutions"
        else (cfg.online if methods.find(cfg).source == "samples" else config.generate).sampling.max_tokens
    )
    response = min(longest, cfg.max_tokens - 1)
    return pad(cfg.max_tokens - response, cfg.bucket), pad(response, cfg.bucket)


class TrainNames(NamedTuple):
    loss: str
    step: str
    references: str


def train_names(config: config_lib.Config) -> TrainNames:
    """The names of training's programs."""
    method, (prompt, response) = methods.of(config), lengths(config)
    rows = config.train.batch_size // config.train.accumulate
    shape = f"{rows} x ({prompt} + {response}) tokens"
    times = f"{config.train.accumulate} x " if config.train.accumulate > 1 else ""
    return TrainNames(
        f"loss, {method.name}, {rows} x {response} tokens",
        f"train step, {method.name}, {times}{shape}",
        f"references, {shape}",
    )


def train_programs(config: config_lib.Config, model: ModelConfig, mesh: Mesh) -> list[Program]:
    cfg, method = config.train, methods.of(config)
    if not method.trains:
        return []
    rows, (prompt, response) = cfg.batch_size // cfg.accumulate, lengths(config)
    mesh_lib.check_rows(mesh, rows)
    cached, share, names = method.caches(cfg), rows / mesh.size, train_names(config)

    def loss(model: ModelConfig) -> jax.stages.Lowered:
        return lower_loss(config, model, mesh, rows, response)

    def step(model: ModelConfig) -> jax.stages.Lowered:
        return lower_step(config, model, mesh, base(config, model, mesh), cfg.accumulate, prompt, response, cached)

    def states(model: ModelConfig, params=None) -> jax.stages.Lowered:
        tokens = mesh_array(mesh, "bt", (rows, prompt + response), jnp.int32)
        params = base(config, model, mesh) if params is None else params
        return lower(mesh, step_lib.make_states(mesh), model, cfg.remat, params, None, tokens, tokens, response)

    def cost_of_states() -> Figures:
        kernels = KERNEL_PASSES["forward"] * kernel_flops(model, prompt + response) * share

        def of(short: ModelConfig) -> Figures:
            short = without_experts(short)
            return figures_on(mesh, states(short, unstacked(config, short, mesh)))

        return extrapolated(model, of) + Figures(kernels=kernels)

    def cost_of_update() -> Figures:
        return cost_of_step(config, model, mesh, prompt, response, cached)

    forward, update = useful_flops(model, cfg, prompt, response, cached)
    make = functools.partial(Program, stage="train", model=model, mesh=mesh)
    out = [
        make(names.loss, kind="loss", lower=loss),
        make(
            names.step,
            kind="train",
            lower=step,
            useful=share * cfg.accumulate * update,
            cost=cost_of_update,
        ),
    ]
    if cached:
        out.insert(0, make(names.references, kind="train", lower=states, useful=share * forward, cost=cost_of_states))
    return out


def extrapolated(model: ModelConfig, of: Callable[[ModelConfig], Figures]) -> Figures:
    """A model's figures from those of models of 1 and of 3 layers of each kind."""
    short = lambda kind, count: dataclasses.replace(model, layers=(kind,) * count)  # noqa: E731
    found = {kind: (of(short(kind, 1)), of(short(kind, 3))) for kind in dict.fromkeys(model.layers)}
    layer = {kind: (three + one * -1) * 0.5 for kind, (one, three) in found.items()}
    first = model.layers[0]
    return sum((layer[kind] for kind in model.layers), start=found[first][0] + layer[first] * -1)


def base(config: config_lib.Config, model: ModelConfig, mesh: Mesh) -> weights.Params:
    """Abstract weights, exact or quantised as configured."""
    return weights.abstract(model, jnp.dtype(config.model.dtype), mesh, config.model.quantize)


def held(params: Any) -> float:
    """Bytes a device of abstract weights."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))


def mesh_array(mesh: Mesh, axes: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.sharding(mesh, axes))


def host_array(mesh: Mesh, shape: tuple[int, ...] = (), dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    """What the host hands to every device."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.replicated(mesh))


def lower_loss(
    config: config_lib.Config, model: ModelConfig, mesh: Mesh, rows: int, response: int
) -> jax.stages.Lowered:
    """The loss and its gradient alone, from final hidden states."""
    cfg, method = config.train, methods.find(config.train)
    states = mesh_array(mesh, "bt_", (rows, response, model.D), jnp.dtype(config.model.dtype))
    frozen = dict.fromkeys(method.roles, states)
    tokens = {name: mesh_array(mesh, "bt", (rows, response), kind) for name, kind in method.tokens.items()}

    def run(hidden, frozen, tokens, mask, unembed):
        per_token = step_lib.token_weights(mask, cfg.reduce)
        return jax.value_and_grad(
            lambda h: objectives.summed(method.bind(cfg), cfg.chunk, h, frozen, tokens, per_token, unembed),
            has_aux=True,
        )(hidden)

    mask = mesh_array(mesh, "bt", (rows, response), jnp.bool_)
    unembed = transformer.unembedding(base(config, model, mesh))
    out = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), mesh_lib.sharding(mesh, "b"))
    options = mesh_lib.compiler_options(mesh)
    return lower(mesh, jax.jit(run, out_shardings=out, compiler_options=options), states, frozen, tokens, mask, unembed)


def lower_step(
    config, model: ModelConfig, mesh: Mesh, params, micro: int, prompt: int, response: int, cached: bool
) -> jax.stages.Lowered:
    """The update that `train` runs, on `micro` micro-batches of the longest rows."""
    cfg = config.train
    tx = optimizer.adamw(cfg.optimizer, 1000)
    layout = step_lib.shardings(model, cfg, tx, mesh)
    state = step_lib.abstract(model, cfg, tx, mesh)
    rows = cfg.batch_size // cfg.accumulate

    def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return mesh_array(mesh, "_b" + "_" * len(shape), (micro, rows, *shape), dtype)

    method = methods.find(cfg)
    batch = {"mask": array(response, dtype=jnp.bool_)}
    batch |= {name: array(response, dtype=kind) for name, kind in method.tokens.items()}
    for role in ("student",) if cached else method.prompted:
        batch[f"{role}_tokens"] = batch[f"{role}_positions"] = array(prompt + response)
    for role in method.roles if cached else ():
        batch[f"ref_{role}"] = array(response, model.D, dtype=jnp.dtype(config.model.dtype))
    return lower(mesh, step_lib.make_update(step_lib.spec_of(model, cfg), tx, layout), params, state, batch)


def useful_flops(
    model: ModelConfig, cfg: config_lib.Train, prompt: int, response: int, cached: bool
) -> tuple[float, float]:
    """Of one row, in a forward pass without adapter or head, and in an update: products with weights and adapters, causal
    attention, and the head; nothing twice."""
    table = weights.declare(model)
    compared = len(methods.find(cfg).roles)
    tokens, references = prompt + response, 0 if cached else compared
    base = sum(len(w.layers(model)) * work(w, model) for w in table.values())
    adapter = sum(
        len(w.layers(model)) * cfg.lora.rank * (math.prod(s[: w.inputs]) + math.prod(s[w.inputs :]))
        for w in (table[name] for name in cfg.lora.targets)
        for s in [w.shape(model)]
    )
    attention = sum(mixing(layer, model, tokens) for layer in model.layers)
    layers = tokens * (base * (2 + references) + adapter * 3) + attention * (3 + references)
    return 2 * (tokens * base + attention), 2 * (layers + response * model.V * model.D * (compared + 2))


def work(weight: weights.Weight, model: ModelConfig) -> float:
    """Multiply-adds of a token with one layer's weight: with those of its experts that it picks."""
    share = model.experts.top / model.experts.J if weight.each and model.experts else 1
    return share * math.prod(weight.shape(model)) if weight.inputs or weight.each else 0


def mixing(layer: Layer, model: ModelConfig, tokens: int) -> float:
    """Multiply-adds by which the tokens of a row see each other in a layer.

    In attention, those of a query and of a probability with each token that is seen; in a delta net, those of a key, a
    correction and a query with the state.
    """
    if model.deltanet and layer.mixer == "deltanet":
        return 3 * model.deltanet.N * model.deltanet.H * model.deltanet.I * tokens
    window = min(layer.window or tokens, tokens)
    return 2 * model.N * model.H * (window * tokens - window**2 / 2)


def without_experts(model: ModelConfig) -> ModelConfig:
    """A short model with a dense layer as wide as the experts that a token picks: the compiler counts all of them, or one
    round."""
    if not (model.experts and model.layers[0].mlp == "experts"):
        return model
    dense = tuple(dataclasses.replace(layer, mlp="dense") for layer in model.layers)
    return dataclasses.replace(model, layers=dense, F=model.experts.top * model.experts.I)


def kernel_flops(model: ModelConfig, tokens: int) -> float:
    """Of one product of queries with keys, or of probabilities with values, over all layers and one row."""
    return sum(mixing(layer, model, tokens) for layer in model.layers)


def cost_of_step(config, model: ModelConfig, mesh: Mesh, prompt: int, response: int, cached: bool) -> Figures:
    """One update, from short unrolled models, and from one chunk of the loss."""
    cfg = config.train
    rows = cfg.batch_size // cfg.accumulate

    def of(short: ModelConfig) -> Figures:
        short = without_experts(short)
        targets = tuple(name for name in cfg.lora.targets if name in lora_lib.adaptable(short))
        train = cfg.model_copy(update={"lora": cfg.lora.model_copy(update={"targets": targets})})
        some = config.model_copy(update={"train": train})
        lowered = lower_step(some, short, mesh, unstacked(some, short, mesh), 1, prompt, response, cached)
        return figures_on(mesh, lowered)

    width = max(1, min(response, cfg.chunk // rows))
    chunk = figures_on(mesh, lower_loss(config, model, mesh, rows, width))
    references = 0 if cached else len(methods.find(cfg).roles)
    passes = KERNEL_PASSES["forward"] * (1 + references + (cfg.remat != "none")) + KERNEL_PASSES["backward"]
    one = extrapolated(model, of) + chunk * (-(-response // width) - 1)
    if mesh.devices.flat[0].platform != "cpu":
        one += Figures(kernels=passes * kernel_flops(model, prompt + response) * rows / mesh.size)
    return one * cfg.accumulate


# ---------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------


def unstacked(config: config_lib.Config, model: ModelConfig, mesh: Mesh) -> weights.Params:
    """Abstract weights with one array per layer."""

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)

    params = base(config, model, mesh)
    layers = jax.tree.map(one, params["layers"])
    table = weights.declare(model)
    layers = [{name: x for name, x in layers.items() if i in table[name].layers(model)} for i in range(model.L)]
    return {**params, "layers": layers}


@dataclass(frozen=True)
class Job:
    """What a stage draws: settings, samples per prompt, tokens per prompt at most, tokens per sample, roles; and the tokens
    of what follows from a sample (`answer_room`)."""

    name: str
    stage: str
    slots: int
    samples: int
    prompt: int
    limit: int
    roles: int
    sampling: config_lib.Sampling
    adapted: bool
    key: str  # of its slots
    pages: float | None = None
    room: int = 0
    kv_dtype: str | None = None

    def grid(self, mesh) -> decode.Grid:
        size = engine.bucket(self.prompt)
        limit = self.limit + self.room
        return engine.grid_of(mesh, self.slots, self.roles, limit, self.samples, size, self.pages, self.kv_dtype)


def answer_room(cfg: config_lib.Evaluate, model: ModelConfig, asking: int = ASKING) -> int:
    """How many tokens a forced answer takes behind its sample, with up to `asking` tokens (or ASKING) that ask for it; 0 if
    it is not drawn there, since rows cannot go back to where a budget cuts them."""
    return max(asking, ASKING) + cfg.force.max_tokens if cfg.force and transformer.can_rewind(model) else 0


def jobs_of(config: config_lib.Config, model: ModelConfig) -> list[Job]:
    """All that is drawn with our sampler, at its longest."""
    train, method, out = config.train, methods.of(config), []
    if method.reads_traces(train):
        cfg = config.generate
        roles = 1 if cfg.tau in (0.0, 1.0) or method.rationalises else 2
        limit = cfg.sampling.max_tokens
        out.append(
            Job(
                "rollouts",
                "generate",
                cfg.slot_count,
                cfg.samples,
                cfg.max_prompt_tokens,
                limit,
                roles,
                cfg.sampling,
                False,
                "generate.slots",
                cfg.pages,
                kv_dtype=cfg.kv_dtype,
            )
        )
    if method.source == "samples":
        cfg = train.online
        prompt = min(cfg.max_prompt_tokens, train.max_tokens - cfg.sampling.max_tokens)
        limit = cfg.sampling.max_tokens
        slots, key = cfg.slot_count, "train.online.slots"
        out.append(
            Job(
                "online rollouts",
                "train",
                slots,
                cfg.group,
                prompt,
                limit,
                1,
                cfg.sampling,
                True,
                key,
                cfg.pages,
                kv_dtype=cfg.kv_dtype,
            )
        )
    if config.evaluate.benchmarks:
        cfg, prompt = config.evaluate, config.evaluate.max_prompt_tokens
        slots, key = cfg.slot_count, "evaluate.slots"
        make = functools.partial(
            Job, stage="evaluate", slots=slots, roles=1, sampling=cfg.sampling, key=key, pages=cfg.pages
        )
        make = functools.partial(make, adapted=method.trains, kv_dtype=cfg.kv_dtype)
        room = answer_room(cfg, model)
        out.append(make("evaluation", samples=cfg.samples, prompt=prompt, limit=cfg.longest, room=room))
        if cfg.force is not None and not room:
            asked = prompt + cfg.cuts[-1] + ASKING
            out.append(make("forced answers", samples=1, prompt=asked, limit=cfg.force.max_tokens))
    return out


def check_pages(config: config_lib.Config, model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError if something cannot be drawn from pages on the devices of a mesh."""
    for job in jobs_of(config, model):
        why = pages.refusal(model, mesh.devices.flat[0], mesh_lib.axis_size(mesh, "k"), job.kv_dtype)
        if job.pages and why:
            raise UserError(f"{why}: want null", field=job.key.replace("slots", "pages"))


def names_of(job: Job, mesh: Mesh) -> tuple[str, str]:
    """The names of a job's prefill and of its decoding."""
    grid = job.grid(mesh)
    label = f"{job.name}, {grid.slots} slots x {grid.roles} roles of {grid.max_tokens} tokens"
    label += f", pages {job.pages:g}" if grid.pages else ""
    label += f", keys in {job.kv_dtype}" if job.kv_dtype else ""
    prompts, length = grid.blocks * grid.entries, grid.prompt_slots
    return f"{label}: prefill {length}, 1 of {prompts} prompts", f"{label} after {prompts} prompts of {length}: decode"


def sampler_programs(config: config_lib.Config, model: ModelConfig, mesh: Mesh) -> list[Program]:
    """Prefill and decoding of the rollouts (of `generate` and of online training), of the evaluation, and of its forced
    answers where they do not follow from samples."""
    dtype, out = jnp.dtype(config.model.dtype), []
    for job in jobs_of(config, model):
        grid = job.grid(mesh)

        def arguments(model: ModelConfig, grid=grid, job=job) -> tuple:
            lora = lora_lib.abstract(model, config.train.lora, mesh) if job.adapted else None
            return grid, model, unstacked(config, model, mesh), lora, abstract_state(grid, model, dtype, mesh)

        def prefill(model: ModelConfig, grid=grid, arguments=arguments) -> jax.stages.Lowered:
            prompt = host_array(mesh, (grid.roles, grid.prompt_slots)), host_array(mesh, (grid.roles,))
            first = host_array(mesh, (grid.roles,)) if grid.pages else None
            place = host_array(mesh), host_array(mesh), first
            return lower(mesh, decode.load_prompt, *arguments(model), *prompt, *place)

        def step(model: ModelConfig, job=job, grid=grid, arguments=arguments) -> jax.stages.Lowered:
            rules = host_array(mesh, (model.V,), jnp.float32), host_array(mesh, (model.V,), bool)
            sampling = jax.tree.map(lambda x: host_array(mesh, x.shape, x.dtype), mixture.sampling_params(job.sampling))
            table = host_array(mesh, pool.table_shape(grid)) if grid.pages else None
            return lower(mesh, decode.decode, *arguments(model), decode.TokenRules(*rules), sampling, table)  # pyright: ignore

        make = functools.partial(Program, stage=job.stage, kind="sampler", model=model, mesh=mesh, unrolled=True)
        counted = model.experts is None
        forward, _ = useful_flops(model, config.train, grid.prompt_slots, 0, True)
        rows = grid.roles / mesh.size
        kernels = KERNEL_PASSES["forward"] * kernel_flops(model, grid.prompt_slots) * rows
        caches, table = cache_shapes(grid, model, dtype, mesh), 0.0
        if not model.tied:
            table = held(base(config, model, mesh)["embed"])  # looked up, not read, unless it is the unembedding too
        live, fetched, whole = paged_bytes(grid, model, dtype, mesh)
        name, decodes = names_of(job, mesh)
        out.append(make(name, lower=prefill, useful=forward * rows, kernels=kernels, caches=caches, counted=counted))
        make = functools.partial(make, unread=table + whole - live, fetched=fetched)
        out.append(make(decodes, lower=step, caches=caches, tokens=grid.chunk, counted=counted))
    return out


def paged_bytes(grid: decode.Grid, model: ModelConfig, dtype, mesh) -> tuple[float, float, float]:
    """Bytes a device of the keys and values in pages: of texts as they are on average, of what a kernel fetches of them for
    a token, and of all pages. Where there is no kernel, an einsum reads pages, and its bytes are in the program's text."""
    layers = sum(map(pages.is_paged, model.layers)) if grid.pages else 0
    heads = model.K // mesh_lib.axis_size(mesh, "k") if model.K % mesh_lib.axis_size(mesh, "k") == 0 else model.K
    size = model.H + 4 if grid.kv_dtype else model.H * dtype.itemsize  # int8 with a float32 scale
    token, shards = layers * 2 * heads * size, mesh_lib.axis_size(mesh, "b")
    rows, text = grid.slots * grid.roles / shards, grid.prompt_slots + LIVE * grid.max_tokens
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        block = pages.KEYS.get(pages.kernel())
    fetched = text + block / 2 + 1 if block else 0.0  # the last block is fetched whole; and the new token is written
    return rows * text * token, rows * fetched * token, grid.pages / shards * grid.page * token


def abstract_state(grid: decode.Grid, model: ModelConfig, dtype, mesh: Mesh) -> decode.DecodeState:
    """Shapes and shardings of the state of a grid."""
    made = lower(mesh, decode.empty, grid, model, dtype).compile()
    shapes = state_shapes(grid, model, dtype, mesh)
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, made.output_shardings
    )


def state_shapes(grid: decode.Grid, model: ModelConfig, dtype, mesh) -> decode.DecodeState:
    """The shapes of the same, those of all devices."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.eval_shape(lambda: decode.empty(grid, model, dtype))


def cache_shapes(grid: decode.Grid, model: ModelConfig, dtype, mesh) -> tuple[tuple[int, ...], ...]:
    """A device's part of the caches of keys."""
    shapes = state_shapes(grid, model, dtype, mesh).cache
    layout = mesh_lib.sharding(mesh, "bk")
    found = {layout.shard_shape(x.shape) for x in jax.tree.leaves((shapes.k, shapes.prompt_k))}
    for paged in filter(None, shapes.pools):
        found |= {mesh_lib.sharding(mesh, paged.axes).shard_shape(x.shape) for x in jax.tree.leaves(paged)}
    return tuple(found)


# ---------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------


def skipped(program: Program) -> ProgramReport:
    """Of a program that was not compiled."""
    known = chip(program.mesh.devices.flat[0])
    return ProgramReport(program.name, program.stage, "none", 0.0, None, known and known.hbm, None, "not compiled")


def figures_on(mesh: Mesh, lowered: jax.stages.Lowered) -> Figures:
    """Compiles a program for the devices of a mesh."""
    return figures_of(lowered.compile(), chip(mesh.devices.flat[0]))


def measure(program: Program, config: config_lib.Config, quick: bool = False, short: bool = False) -> ProgramReport:
    """Compiles one program and reads what the compiler says; running out of memory is an answer too."""
    started, known = time.monotonic(), chip(program.mesh.devices.flat[0])
    short, hbm = short and program.unrolled, known and known.hbm
    report = functools.partial(
        ProgramReport, program=program.name, stage=program.stage, layers="1 and 3" if short else "all", hbm_gb=hbm
    )
    copies = None
    try:
        if short:
            figures = extrapolated(program.model, lambda model: figures_on(program.mesh, program.lower(model)))
        else:
            compiled = program.lower(program.model).compile()
            figures, text = figures_of(compiled, known), compiled_lib.hlo_text(compiled)
            copies = None if text is None or not program.caches else copies_of(text, program.caches)
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([GM]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            # Of an error in Python code that the compiler called, the traceback comes first.
            lines = str(error).splitlines()
            said = next((line for line in reversed(lines) if re.match(r"\w+Error: ", line)), lines[0])
            why = f"not compiled: {said}"
            return report(compile_seconds=time.monotonic() - started, peak_gb=None, fits=None, verdict=why)
        peak = float(used[1]) * (2**30 if used[2] == "G" else 2**20) / 1e9 if used else None
        verdict = f"does not fit: {first_change(program.kind, config, program.mesh, 0, 1)}"
        return report(compile_seconds=time.monotonic() - started, peak_gb=peak, fits=False, verdict=verdict)
    seconds = time.monotonic() - started
    fits = None if known is None else figures.peak / 1e9 <= known.usable
    change = first_change(program.kind, config, program.mesh, figures.arguments, figures.temporaries)
    verdict = {None: "compiles", True: "fits"}.get(fits) or f"does not fit: {change}"

    counted = None
    if program.unrolled and program.counted:
        counted = figures + Figures(kernels=program.kernels)
    elif program.cost is not None and not quick:
        counted = program.cost()
    tpu = program.mesh.devices.flat[0].platform == "tpu"
    moved = None if math.isnan(figures.moved) else figures.moved / max(program.tokens, 1) + program.fetched
    bound = moved / (known.bandwidth * 1e9) if known is not None and moved is not None else None
    estimate = timed = None
    if counted is not None and known is not None:
        timed = "compiler" if math.isnan(counted.seconds) else "instructions" if tpu else "bound"
        # the compiler's model has the body of the loop over tokens once
        estimate = counted.modelled if timed == "compiler" else counted.seconds / max(program.tokens, 1)
        estimate += counted.kernels / (known.peak * 1e12 * KERNEL_EFFICIENCY)
        estimate += program.fetched / (known.bandwidth * 1e9)
        estimate = max(estimate, bound or 0.0)
    useful = program.useful if estimate else 0.0
    ratio = moved / (figures.arguments - program.unread) if program.tokens and moved is not None else None
    return report(
        compile_seconds=seconds,
        peak_gb=figures.peak / 1e9,
        fits=fits,
        verdict=verdict,
        arguments_gb=figures.arguments / 1e9,
        temporaries_gb=figures.temporaries / 1e9,
        aliased_gb=figures.aliased / 1e9,
        flops=counted and counted.flops + counted.kernels,
        bytes=moved,
        seconds=estimate,
        timed=timed,
        bandwidth_seconds=bound,
        utilisation=useful / (estimate * known.peak * 1e12) if useful and estimate and known is not None else None,
        bytes_over_ideal=ratio,
        cache_copies=copies,
    )


def first_change(kind: str, config: config_lib.Config, mesh: Mesh, arguments: float, temporaries: float) -> str:
    """What to try first where a program does not fit."""
    cfg, shards = config.train, mesh_lib.axis_size(mesh, "w")
    if shards < mesh.size and (arguments > temporaries or kind == "sampler"):
        return f"raise mesh.{'tensor' if kind == 'sampler' else 'fsdp'}, which divides the weights"
    if kind == "sampler":
        return "lower slots, max_prompt_tokens or sampling.max_tokens, which set the caches"
    if kind == "loss":
        return "lower train.chunk"
    if cfg.remat != "full":
        return "set train.remat: full"
    if cfg.batch_size // cfg.accumulate > mesh_lib.axis_size(mesh, "b"):
        return f"raise train.accumulate (now {cfg.accumulate})"
    return "lower train.max_tokens, or take a larger slice"
