"""Compiles the real programs of a configuration for devices that are not here, and says what they would need.

Memory is the compiler's own and exact. Bytes are main memory's, read off the compiled program (`compiled`). The
compiler counts a loop's body once in FLOPs and time, so for the train step these come from short unrolled models,
of 1 and 3 layers of each kind, extrapolated to the real depth, plus the attention kernels by arithmetic, since it does not look
into them. For decoding, everything is one token's. Useful FLOPs, what utilisation is measured in, are arithmetic:
products of the forward passes and of the gradient by activations, causal attention, and nothing twice.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.ahead import compiled as compiled_lib
from dail_jax.ahead.chips import Chip, chip
from dail_jax.ahead.compiled import Cost, copies_of, cost_of
from dail_jax.data.batches import pad
from dail_jax.model import lora as lora_lib
from dail_jax.model import transformer, weights
from dail_jax.model.families import Layer, ModelConfig
from dail_jax.sample import decode, engine, mixture
from dail_jax.train import methods, objectives, optimizer
from dail_jax.train import step as step_lib

KERNEL_EFFICIENCY = 0.5  # of the peak, assumed for attention kernels and delta nets
KERNEL_PASSES = {"forward": 2, "backward": 7}  # [T,T,H] products a splash pass makes


@dataclass(frozen=True)
class Program:
    """One program: how to lower it, whose memory it is, and its useful FLOPs a device (0: not measured so)."""

    name: str
    kind: str  # train, loss or sampler
    lower: Callable[[], jax.stages.Lowered]
    useful: float = 0.0
    cost: Callable[[], Cost] | None = None  # how to count what its loops hide
    state: decode.DecodeState | None = None  # donated: its caches must stay in place
    unread: float = 0.0  # bytes per device of arguments that need not be read
    tokens: int = 0  # decoding: drawn per call and slot
    weights: float = 0.0  # bytes per device of the base model as training holds it; sampling has its own copy beside it
    counted: bool = True  # the compiler counts what is computed; of experts, it counts all


@dataclass(frozen=True)
class ProgramReport:
    """What a program needs. GB are 1e9 bytes per device; None where it is not known."""

    program: str
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
    utilisation: float | None = None
    bytes_over_ideal: float | None = None
    cache_copies: int | None = None


def compile_all(
    config: config_lib.Config, model: ModelConfig, mesh: Mesh, quick: bool = False, only: str = ""
) -> Iterator[ProgramReport]:
    """The table's rows, one program at a time; `quick` leaves out the extra programs that count operations."""
    known = chip(mesh.devices.flat[0])
    programs = [*train_programs(config, model, mesh), *sampler_programs(config, model, mesh)]
    for program in programs:
        if only in program.name:
            yield measure(program, config, mesh, known, quick)


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


def train_programs(config: config_lib.Config, model: ModelConfig, mesh: Mesh) -> list[Program]:
    cfg, method = config.train, methods.of(config)
    if not method.trains:
        return []
    rows, (prompt, response) = cfg.batch_size // cfg.accumulate, lengths(config)
    mesh_lib.check_rows(mesh, rows)
    params = base(config, model, mesh)
    cached = method.caches(cfg)
    share = rows * cfg.accumulate / mesh.size
    useful = share * useful_flops(model, cfg, prompt, response, cached)
    shape = f"{prompt} + {response} tokens"

    def loss() -> jax.stages.Lowered:
        return lower_loss(config, model, mesh, rows, response)

    def step() -> jax.stages.Lowered:
        return lower_step(config, model, mesh, params, cfg.accumulate, prompt, response, cached)

    def cost() -> Cost:
        return cost_of_step(config, model, mesh, prompt, response, cached)

    out = [
        Program("loss", "loss", loss),
        Program(f"train step, {shape}", "train", step, useful, cost, weights=held(params)),
    ]
    if cached:
        states = step_lib.make_states(mesh)
        tokens = mesh_array(mesh, "bt", (rows, prompt + response), jnp.int32)
        args = (model, cfg.remat, params, None, tokens, tokens, response)
        out.insert(0, Program("references", "train", lambda: lower(mesh, states, *args), weights=held(params)))
    return out


def base(config: config_lib.Config, model: ModelConfig, mesh: Mesh) -> weights.Params:
    """Abstract weights, exact or quantised as configured."""
    return weights.abstract(model, jnp.dtype(config.model.dtype), mesh, config.model.quantize)


def held(params: weights.Params) -> float:
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


def useful_flops(model: ModelConfig, cfg: config_lib.Train, prompt: int, response: int, cached: bool) -> float:
    """Of one row: products with weights and adapters, causal attention, and the head; nothing twice."""
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
    return 2 * (layers + response * model.V * model.D * (compared + 2))


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


def cost_of_step(config, model: ModelConfig, mesh: Mesh, prompt: int, response: int, cached: bool) -> Cost:
    """One update, from unrolled models of 1 and 3 layers of each kind, and from one chunk of the loss.

    Experts count as a dense layer as wide as those that a token picks: the compiler counts all of them, or one round.
    """
    cfg = config.train
    rows = cfg.batch_size // cfg.accumulate

    def of(layers: tuple[Layer, ...]) -> Cost:
        short = dataclasses.replace(model, layers=layers)
        if model.experts and layers[0].mlp == "experts":
            dense = tuple(dataclasses.replace(layer, mlp="dense") for layer in layers)
            short = dataclasses.replace(short, layers=dense, F=model.experts.top * model.experts.I)
        targets = tuple(name for name in cfg.lora.targets if name in lora_lib.adaptable(short))
        train = cfg.model_copy(update={"lora": cfg.lora.model_copy(update={"targets": targets})})
        some = config.model_copy(update={"train": train})
        lowered = lower_step(some, short, mesh, unstacked(some, short, mesh), 1, prompt, response, cached)
        return cost_of(lowered.compile())

    found = {kind: (of((kind,)), of((kind,) * 3)) for kind in dict.fromkeys(model.layers)}
    layer = {kind: (three + one * -1) * 0.5 for kind, (one, three) in found.items()}
    first = model.layers[0]
    one = sum((layer[kind] for kind in model.layers), start=found[first][0] + layer[first] * -1)
    width = max(1, min(response, cfg.chunk // rows))
    chunk = cost_of(lower_loss(config, model, mesh, rows, width).compile())
    references = 0 if cached else len(methods.find(cfg).roles)
    passes = KERNEL_PASSES["forward"] * (1 + references + (cfg.remat != "none")) + KERNEL_PASSES["backward"]
    kernels = passes * sum(mixing(layer, model, prompt + response) for layer in model.layers) * rows / mesh.size
    one += chunk * (-(-response // width) - 1)
    if mesh.devices.flat[0].platform != "cpu":
        one += Cost(0, 0, kernels)
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


def sampler_programs(config: config_lib.Config, model: ModelConfig, mesh: Mesh) -> list[Program]:
    """Prefill and decoding of the rollouts (of `generate` and of online training) and of the evaluation."""
    dtype, out, train, method = jnp.dtype(config.model.dtype), [], config.train, methods.of(config)
    params, stacked = unstacked(config, model, mesh), held(base(config, model, mesh))
    table = 0 if model.tied else held(params["embed"])  # looked up, not read, unless it is the unembedding too
    lora = lora_lib.abstract(model, train.lora, mesh) if method.trains else None
    counted = model.experts is None
    jobs = []  # name, settings, samples per prompt, longest prompt, roles, LoRA
    if method.reads_traces(train):
        cfg = config.generate
        roles = 1 if cfg.tau in (0.0, 1.0) or method.rationalises else 2
        jobs.append(("rollouts", cfg, cfg.samples, cfg.max_prompt_tokens, roles, None))
    if method.source == "samples":
        prompt = min(train.online.max_prompt_tokens, train.max_tokens - train.online.sampling.max_tokens)
        jobs.append(("online rollouts", train.online, train.online.group, prompt, 1, lora))
    if config.evaluate.benchmarks:
        cfg = config.evaluate
        jobs.append(("evaluation", cfg, cfg.samples, cfg.max_prompt_tokens, 1, lora))
    for name, cfg, samples, longest, roles, lora in jobs:
        sampling = mixture.sampling_params(cfg.sampling)
        limit = cfg.longest if isinstance(cfg, config_lib.Evaluate) else cfg.sampling.max_tokens
        sampler = engine.Engine(params, model, mesh, (), 0, cfg.slots, limit, sampling, roles, lora)
        grid = sampler.grid(samples, engine.bucket(longest))
        made = lower(mesh, decode.empty, grid, model, dtype).compile()
        shapes = jax.eval_shape(lambda grid=grid: decode.empty(grid, model, dtype))
        state = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, made.output_shardings
        )
        rules, sampling = jax.tree.map(lambda x: host_array(mesh, x.shape, x.dtype), (sampler.rules, sampling))
        prompt = (
            host_array(mesh, (grid.roles, grid.prompt_slots)),
            host_array(mesh, (grid.roles,)),
            host_array(mesh),
            host_array(mesh),
        )
        label = f"{name}, {grid.slots} slots x {grid.roles} roles"

        def prefill(grid=grid, lora=lora, state=state, prompt=prompt) -> jax.stages.Lowered:
            return lower(mesh, decode.load_prompt, grid, model, params, lora, state, *prompt)

        out.append(
            Program(
                f"{label}: prefill {grid.prompt_slots}",
                "sampler",
                prefill,
                state=state,
                weights=stacked,
                counted=counted,
            )
        )

        def step(grid=grid, lora=lora, state=state, rules=rules, sampling=sampling) -> jax.stages.Lowered:
            return lower(mesh, decode.decode, grid, model, params, lora, state, rules, sampling)

        title = f"{label}: decode"
        more = {"unread": table, "tokens": grid.chunk, "counted": counted}
        out.append(Program(title, "sampler", step, state=state, weights=stacked, **more))
    return out


# ---------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------


def measure(program: Program, config: config_lib.Config, mesh: Mesh, known: Chip | None, quick: bool) -> ProgramReport:
    """Compiles one program and reads what the compiler says; running out of memory is an answer too."""
    started = time.monotonic()
    hbm = known and known.hbm
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([GM]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak = float(used[1]) * (2**30 if used[2] == "G" else 2**20) / 1e9 if used else None
        held_gb = program.weights / 1e9
        advice = first_change(program.kind, config, mesh, held_gb, (hbm or 0) - held_gb)
        return ProgramReport(program.name, time.monotonic() - started, peak, hbm, False, f"does not fit: {advice}")
    seconds = time.monotonic() - started
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
    fresh = (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9
    peak = arguments + temporaries + max(fresh, 0) + (program.weights / 1e9 if program.kind == "sampler" else 0)
    fits = None if known is None else peak <= known.hbm
    verdict = {None: "compiles", True: "fits"}.get(fits) or (
        "does not fit: " + first_change(program.kind, config, mesh, arguments, temporaries)
    )

    text = compiled_lib.hlo_text(compiled)
    moved = None if text is None else compiled_lib.hbm_bytes(text) / max(program.tokens, 1)
    cost = cost_of(compiled) if program.kind == "sampler" and program.counted else None
    if program.cost is not None and not quick:
        cost = program.cost()
    estimate = ratio = utilisation = copies = None
    if cost is not None and mesh.devices.flat[0].platform == "tpu" and known is not None:
        estimate = cost.seconds + cost.kernels / (known.peak * 1e12 * KERNEL_EFFICIENCY)
        utilisation = program.useful / (estimate * known.peak * 1e12) if program.useful else None
    if program.state is not None and text is not None:
        copies = copies_of(text, [*program.state.cache.k, *program.state.cache.prompt_k])
    if program.tokens and moved is not None:
        ratio = moved / (memory.argument_size_in_bytes - program.unread)
    flops = cost and cost.flops + cost.kernels
    aliased = memory.alias_size_in_bytes / 1e9
    return ProgramReport(
        program.name,
        seconds,
        peak,
        hbm,
        fits,
        verdict,
        arguments,
        temporaries,
        aliased,
        flops,
        moved,
        estimate,
        utilisation,
        ratio,
        copies,
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
