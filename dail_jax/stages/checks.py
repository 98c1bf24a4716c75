"""The checks before a stage starts: each yields what it has found, and the problems; `CHECKS` says which stage has which.

One that needs what is not there is left out.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import provenance, storage
from dail_jax.ahead.programs import held
from dail_jax.checkpoint import base, peft
from dail_jax.data import traces as traces_lib
from dail_jax.errors import UserError
from dail_jax.evaluate.grading import Grader
from dail_jax.model import lora, pages, weights
from dail_jax.sample import server as server_lib
from dail_jax.stages import drops, evaluate, generate, golds, names, offline, recipes, samplers, session
from dail_jax.stages.recipes import traces_path
from dail_jax.stages.room import existing, size
from dail_jax.stages.subject import Finding, Subject

SHOWN = 20  # problems of one check that are listed one by one


def registered(s: Subject) -> Iterator[Finding]:
    """The names that only a registry can verify, and what methods say of their settings."""
    yield from names.problems(s.config)
    if s.stage == "evaluate":
        samplers.find(s.config.evaluate.sampler)


def run_directory(s: Subject) -> Iterator[Finding]:
    """Whether it can be made and written."""
    folder = existing(Path(s.config.run_dir))
    if not folder.is_dir():
        yield UserError("is a file, want a folder: choose another run_dir", file=folder)
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield UserError("is not writable, and the run directory is to be in it: choose another run_dir", file=folder)


def packages(s: Subject) -> Iterator[Finding]:
    """The extras that the section `log` asks for."""
    for key, package, wanted in (
        ("tensorboard", "tensorboardX", s.config.log.tensorboard),
        ("wandb", "wandb", s.config.log.wandb),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            yield UserError(f"want {package}: pip install 'dail_jax[{key}]'", field=f"log.{key}")


def devices(s: Subject) -> Iterator[Finding]:
    """The mesh, an accelerator that is missing, and whether the weights fit."""
    found = mesh_lib.all_devices()
    if s.server:  # which has its own
        return
    if problem := _missing_accelerator(found):
        yield UserError(problem, field="devices")
    yield (
        "devices",
        f"{s.mesh.size} x {s.mesh.devices.flat[0].device_kind}; mesh {mesh_lib.described(s.mesh, s.sample_mesh)}",
    )
    dtype = jnp.dtype(s.config.model.dtype)
    need = max(held(weights.abstract(s.model, dtype, mesh, s.form)) for mesh in (s.mesh, s.sample_mesh))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    held_in = s.form or s.config.model.dtype
    limited = f" of {size(limit)}" if limit else ""
    yield "weights", f"{size(s.weight_bytes)} in {held_in}; per device {size(need)}{limited}"
    if limit and need > limit:
        yield UserError(
            f"got {size(need)} of weights per device, which has {size(limit)}: spread them over more devices by "
            "mesh.fsdp or mesh.tensor",
            field="mesh",
        )


# Packages by which JAX finds an accelerator.
PLUGINS = {"jax-cuda12-plugin": "GPU", "jax-cuda13-plugin": "GPU", "libtpu": "TPU"}


def _missing_accelerator(found: Sequence[Any]) -> str | None:
    """Why JAX computes on the CPU although more was meant; None if it does not, or was told to."""
    if mesh_lib.platforms() or found[0].platform != "cpu":
        return None
    on_purpose = "or set JAX_PLATFORMS=cpu to compute on the CPU"
    for package, version in provenance.versions(tuple(PLUGINS)).items():
        if version:
            return f"no {PLUGINS[package]} was found, although {package} is installed: mend its driver, {on_purpose}"
    if Path("/dev/nvidia0").exists():
        return f"there is a GPU, and JAX cannot use it: pip install 'dail_jax[cuda]', {on_purpose}"
    return None


def model(s: Subject) -> Iterator[Finding]:
    """Its files, by their headers."""
    yield "model", f"{s.config.model.path}: {s.model.family}, {weights.count(s.model):,} weights"
    if not s.server:
        base.check(storage.model(s.config.model.path), s.model, s.config.model.quantize)


def form(s: Subject) -> Iterator[Finding]:
    """What draws elsewhere has exact weights, and int8 ones are not mixed with them; it keeps keys and values as it likes."""
    if s.server is None and not (s.stage == "evaluate" and s.config.evaluate.sampler == offline.NAME):
        return
    if s.config.model.quantize:
        yield UserError(
            f"draws from exact weights, and model.quantize asks for {s.config.model.quantize} ones: want `engine`, or "
            "exact weights",
            field=f"{s.stage}.sampler",
        )
    if asked := getattr(s.config, s.stage).kv_dtype:
        yield UserError(
            f"got {asked}, and what draws elsewhere has settings of its own for it: want null",
            field=f"{s.stage}.kv_dtype",
        )


def caches(s: Subject) -> Iterator[Finding]:
    """Whether this model can be sampled from pages here."""
    cfg = s.config.train.online if s.stage == "train" else getattr(s.config, s.stage)
    if cfg.pages is None or s.server or (s.stage == "train" and s.method.source != "samples"):
        return
    if why := pages.refusal(
        s.model, s.sample_mesh.devices.flat[0], mesh_lib.axis_size(s.sample_mesh, "k"), cfg.kv_dtype
    ):
        key = "train.online.pages" if s.stage == "train" else f"{s.stage}.pages"
        yield UserError(f"{why}: want null", field=key)


def server(s: Subject) -> Iterator[Finding]:
    """Whether the server has the model, and room for prompts and responses."""
    cfg, section = s.server, s.config.generate if s.stage == "generate" else s.config.evaluate
    if cfg is None:
        return
    if jax.process_count() > 1:
        raise UserError("a server is asked by one process: start one", field=f"{s.stage}.sampler")
    if cfg.prompts == "text" and section.sampling.top_k:
        yield UserError(server_lib.NO_TOP_K, field=f"{s.stage}.sampling.top_k")
    server_lib.headers(cfg)
    if s.stage == "evaluate" and recipes.adapter_folder(s.config) in s.made:
        yield "server", f"{cfg.url}: is asked for {cfg.model} once the adapter has been exported"
        return
    yield "server", f"{cfg.url}: {cfg.model}" + (f", {s.context:,} tokens of context" if s.context else "")
    lengths = [n for n in _prompt_lengths(s) if n <= section.max_prompt_tokens]
    need = max(lengths, default=0) + (
        s.config.evaluate.longest if s.stage == "evaluate" else section.sampling.max_tokens
    )
    if s.context and need > s.context:
        yield UserError(
            f"prompts and responses have up to {need} tokens, and the server's context {s.context}: serve a longer one, or "
            f"lower {s.stage}.max_prompt_tokens or {s.stage}.sampling.max_tokens",
            file=cfg.url,
        )


def _prompt_lengths(s: Subject) -> Sequence[int]:
    if s.stage == "generate":
        return s.longest(_roles(s)).tolist()
    return [len(ids) for benchmark in s.config.evaluate.benchmarks for ids in s.questions(benchmark)]


def _roles(s: Subject) -> Sequence[traces_lib.Role]:
    """Those that write traces."""
    return (
        traces_lib.ROLES
        if s.method.rationalises
        else generate.ROLES_BY_TAU.get(s.config.generate.tau, traces_lib.ROLES)
    )


def tokenizer(s: Subject) -> Iterator[Finding]:
    """Its ids against the embedding, the tokens that end a reply, and those that are never drawn."""
    session.stops_of(s.config, s.model, s.tokenizer)
    cfg = s.config
    sampling = {"generate": cfg.generate, "train": cfg.train.online, "evaluate": cfg.evaluate}.get(s.stage)
    if sampling is not None and (s.stage != "train" or s.method.source == "samples"):
        session.suppressed(s.tokenizer, sampling.sampling)
    yield "tokenizer", f"{s.tokenizer.size:,} ids for {s.model.V:,} rows of the embedding"


def data(s: Subject) -> Iterator[Finding]:
    """The rows that are trained on, and their gold answers if something is graded against them."""
    graded = drops.grades(s.config) and (s.stage == "generate" or s.method.source != "solutions")
    yield "data", f"{len(s.rows):,} rows of {s.config.data and s.config.data.shown_path}"
    if graded and mesh_lib.is_first():
        yield from _cut(golds.problems(s.config, s.rows))


def rollouts(s: Subject) -> Iterator[Finding]:
    """The prompts of `generate`."""
    limit, longest = s.config.generate.max_prompt_tokens, s.longest(_roles(s))
    too_long, cut = int((longest > limit).sum()), sum(prompts.cut for prompts in s.each)
    yield (
        "prompts",
        f"up to {longest.max():,} of {limit:,} tokens; {cut} solutions cut to fit, {too_long} problems skipped",
    )
    if too_long == len(longest):
        raise UserError(
            f"got {limit}, and every prompt is longer: the shortest has {longest.min()} tokens",
            field="generate.max_prompt_tokens",
        )


def traces(s: Subject) -> Iterator[Finding]:
    """The traces that are trained on, if they are there."""
    found, path = s.traces if s.method.reads_traces(s.config.train) else None, traces_path(s.config)
    if found is None:
        return
    if mesh_lib.is_first():
        recipes.check_traces(s.config)
    if s.method.source == "traces":
        by_id = {row.problem_id: views for row, views in zip(s.rows, s.prompts, strict=True)}
        traces_lib.verify(found, by_id, s.tokenizer, s.model.V, path)
    yield "traces", f"{path}: {len(found):,}, of which {sum(trace.drop is None for trace in found):,} are not dropped"


def training(s: Subject) -> Iterator[Finding]:
    """Batches against devices, and examples against `train.max_tokens`."""
    method, cfg = s.method, s.config.train
    try:
        mesh_lib.check_rows(s.mesh, cfg.batch_size // cfg.accumulate)
    except UserError as error:
        yield error
    try:
        lora.targets(s.model, cfg.lora)
    except UserError as error:
        yield error
    longest = s.longest(method.prompted)
    if method.source == "solutions":
        lengths = longest + [min(len(prompts.expert) for prompts in views) for views in s.prompts]
        least = f"the shortest prompt and solution have {lengths.min()} tokens"
    elif method.source == "samples":
        lengths = longest + cfg.online.sampling.max_tokens
        least = f"the shortest prompt and online.sampling.max_tokens are {lengths.min()} tokens"
        if longest.min() > cfg.online.max_prompt_tokens:
            raise UserError(
                f"got {cfg.online.max_prompt_tokens}, and every prompt is longer: the shortest has {longest.min()} tokens",
                field="train.online.max_prompt_tokens",
            )
        lengths = np.where(longest > cfg.online.max_prompt_tokens, cfg.max_tokens + 1, lengths)
    else:
        lengths = longest + 1  # a response has at least one token
        least = f"the shortest prompt has {longest.min()} tokens"
    fit = int((lengths <= cfg.max_tokens).sum())
    if not fit:
        raise UserError(f"got {cfg.max_tokens}, and no problem fits: {least}", field="train.max_tokens")
    what = f"{method.name}; prompts up to {longest.max():,} of {cfg.max_tokens:,} tokens"
    yield "training", what + (f"; {len(lengths) - fit} problems do not fit" if fit < len(lengths) else "")


def merging(s: Subject) -> Iterator[Finding]:
    """An adapter is merged into exact weights, whatever it was trained on."""
    folder, cfg = storage.model(s.config.model.path), s.config
    if cfg.export.merged and cfg.model.quantize and base.converted_to(folder) is not None:
        yield UserError(
            f"wants exact weights, and {folder} holds int8 ones: name the original model, or make this false",
            field="export.merged",
        )


def adapter(s: Subject) -> Iterator[Finding]:
    """The adapter that is evaluated."""
    if s.config.evaluate.adapter:
        folder = storage.folder(s.config.evaluate.adapter)
        found = peft.inspect(folder, s.model)
        peft.refuse_other_base(folder, s.config.model.path, s.config.model.quantize)
        yield "adapter", f"{s.config.evaluate.adapter}: rank {found.rank} on {', '.join(found.targets)}"


def benchmarks(s: Subject) -> Iterator[Finding]:
    """Their rows, gold answers, templates and prompts."""
    for benchmark in s.config.evaluate.benchmarks:
        try:
            yield from _benchmark(s, benchmark)
        except UserError as error:
            yield error


def _benchmark(s: Subject, benchmark: config_lib.Benchmark) -> Iterator[Finding]:
    rows, limit = s.table(benchmark), s.config.evaluate.max_prompt_tokens
    bad: dict[str, UserError] = {}
    if mesh_lib.is_first():
        with Grader() as grader:
            bad = evaluate.bad_golds(benchmark, rows, grader)
    if benchmark.ungradable == "refuse" or len(bad) == len(rows):
        yield from _cut(iter(bad.values()))
    lengths = np.array([len(ids) for ids in s.questions(benchmark)])
    too_long = int((lengths > limit).sum())
    what = f"{len(rows):,} problems; prompts up to {lengths.max():,} of {limit:,} tokens, {too_long} skipped"
    yield f"benchmark {benchmark.name}", what + (f"; {len(bad)} gold answers cannot be read" if bad else "")
    if too_long == len(rows):
        raise UserError(
            f"got {limit}, and every prompt of {benchmark.name} is longer: the shortest has {lengths.min()} tokens",
            field="evaluate.max_prompt_tokens",
        )


def hub(s: Subject) -> Iterator[Finding]:
    """Where the adapter is taken. A token may still be got while the run goes on."""
    if s.config.export.push:
        from huggingface_hub import get_token

        lack = "" if get_token() else "; there is no token yet: `hf auth login`, or HF_TOKEN in the environment"
        yield "push", f"{s.config.export.push}{', private' * s.config.export.private}{lack}"


COMMON = (packages, run_directory)
MODEL = (model, tokenizer, devices)

# What is looked at before a stage starts, besides `registered`, and `room` for all of a command's stages together.
CHECKS: dict[str, tuple[Callable[[Subject], Iterator[Finding]], ...]] = {
    "convert": (*COMMON, *MODEL),
    "generate": (*COMMON, *MODEL, form, caches, server, data, rollouts),
    "train": (*COMMON, *MODEL, caches, data, traces, training),
    "export": (*COMMON, *MODEL, merging, hub),
    "evaluate": (*COMMON, *MODEL, form, caches, server, adapter, benchmarks),
}


def _cut(problems: Iterator[UserError]) -> Iterator[UserError]:
    """The first few problems, and how many there are more."""
    yield from itertools.islice(problems, SHOWN)
    more = sum(1 for _ in problems)
    if more:
        yield UserError(f"... and {more} more like the {SHOWN} above")
