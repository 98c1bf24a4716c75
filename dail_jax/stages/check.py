"""check: everything that can be refused is refused before the first second of work.

`dail check` looks at all that `run` would do, prints what it found, and lists every problem. Each other command looks
at its own part first, and starts only if there is no problem. A command is a list of steps (`experiment.Step`); `CHECKS`
says what is looked at before which stage. Nothing is written, no weights are read, and no program is compiled: it takes
seconds.
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import provenance, storage
from dail_jax.ahead.programs import held
from dail_jax.checkpoint import base, peft
from dail_jax.data import traces as traces_lib
from dail_jax.data.prompts import PromptBuilder, RolePrompts
from dail_jax.data.records import Row
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError, UserErrors, visible, want_folder
from dail_jax.evaluate.grading import Grader
from dail_jax.metrics import console, log
from dail_jax.model import lora, pages, weights
from dail_jax.model.families import ModelConfig, read_config
from dail_jax.provenance import Recipe
from dail_jax.rundir import RunDir
from dail_jax.sample import server as server_lib
from dail_jax.stages import (
    calibrate,
    drops,
    evaluate,
    experiment,
    generate,
    golds,
    names,
    offline,
    recipes,
    samplers,
    select,
    session,
)
from dail_jax.stages.experiment import Step
from dail_jax.stages.recipes import traces_path
from dail_jax.text import Tokenizer, load_tokenizer
from dail_jax.train import methods, references

_T = TypeVar("_T")

Finding = tuple[str, str] | UserError  # a row of the table, or a problem

PROMPTS = ("model", "prompts", "waypoints", "data", "generate.max_prompt_tokens")  # what prompts follow from
SHOWN = 20  # problems of one check that are listed one by one


# ---------------------------------------------------------------------------------------------------
# What is looked at
# ---------------------------------------------------------------------------------------------------


class Subject:
    """A step that is about to start. What several checks or steps read alike is read once, and so is what is wrong."""

    def __init__(self, step: Step, known: dict[tuple[str, str], Any], made: set[Path]):
        self.arm, self.stage, self.config = step
        self.known = known
        self.made = made  # the files that steps before this one make

    def _once(self, what: str, keys: Sequence[str], read: Callable[[], _T]) -> _T:
        """`read()`, which follows from these keys of the configuration alone."""
        key = what, json.dumps(provenance.select(self.config, *keys))
        if key not in self.known:
            try:
                self.known[key] = read()
            except UserError as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, UserError):
            raise found
        return found

    @property
    def method(self) -> methods.Method:
        return methods.find(self.config.train)

    @property
    def works(self) -> bool:
        """Whether the stage has anything to do with this configuration."""
        if self.stage == "evaluate":
            return bool(self.config.evaluate.benchmarks)
        return not self.config.traces if self.stage == "generate" else self.method.trains or self.stage == "convert"

    @property
    def server(self) -> config_lib.Server | None:
        """The server that is to draw this stage's samples, if it is one that does."""
        sampler = {"generate": self.config.generate, "evaluate": self.config.evaluate}.get(self.stage)
        return sampler.sampler if sampler and isinstance(sampler.sampler, config_lib.Server) else None

    @property
    def context(self) -> int | None:
        """The most tokens of prompt and response together that the server has room for, if it says so."""
        cfg = self.server
        assert cfg is not None
        return self._once("server", [f"{self.stage}.sampler"], lambda: server_lib.find_model(cfg)).max_model_len

    @property
    def recipe(self) -> Recipe:
        if self.stage == "evaluate":
            return recipes.evaluate(self.config, {b.name: self.table(b) for b in self.config.evaluate.benchmarks})
        if self.stage in ("generate", "train"):
            return getattr(recipes, self.stage)(self.config, self.rows)
        return getattr(recipes, self.stage)(self.config)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of training."""
        return self._once("mesh", ["mesh"], lambda: mesh_lib.make_mesh(self.config.mesh.for_training))

    @property
    def sample_mesh(self) -> jax.sharding.Mesh:
        return self._once("sample_mesh", ["mesh"], lambda: mesh_lib.make_mesh(self.config.mesh.for_sampling))

    @property
    def model(self) -> ModelConfig:
        def read() -> ModelConfig:
            folder = storage.model(self.config.model.path)
            want_folder(folder, "a model")
            return read_config(folder)

        return self._once("model", ["model.path"], read)

    @property
    def tokenizer(self) -> Tokenizer:
        if self.config.model.tokenizer is None:
            _ = self.model  # without the folder, it is the model that is missing
        return self._once("tokenizer", ["model"], lambda: load_tokenizer(session.tokenizer_folder(self.config)))

    @property
    def builder(self) -> PromptBuilder:
        return self._once("builder", PROMPTS, lambda: session.prompt_builder(self.config, self.tokenizer))

    @property
    def rows(self) -> list[Row]:
        return self._once("rows", ["data"], lambda: recipes.rows_of(self.config))

    @property
    def prompts(self) -> list[tuple[RolePrompts, ...]]:
        """Of every row, in order, with each of its solutions."""
        return self._once("prompts", PROMPTS, lambda: self.builder.build_views(self.rows))

    @property
    def each(self) -> list[RolePrompts]:
        """The same, without regard to rows."""
        return [prompts for views in self.prompts for prompts in views]

    def longest(self, roles: Sequence[str]) -> np.ndarray:
        """For every row, the tokens of the longest of these roles' prompts."""
        return np.array([max(len(getattr(one, role)) for one in views for role in roles) for views in self.prompts])

    @property
    def traces(self) -> list[Trace] | None:
        """The traces that are trained on; None if they are not there, and a step before this one makes them."""
        path = traces_path(self.config)
        if path in self.made and not path.is_file():
            return None
        return self._once(f"traces of {path}", [], lambda: traces_lib.read(path))

    def table(self, benchmark: config_lib.Benchmark) -> list[Row]:
        """The rows of a benchmark."""
        return self._once(f"table of {benchmark.model_dump_json()}", [], lambda: recipes.read_benchmark(benchmark))

    def questions(self, benchmark: config_lib.Benchmark) -> list[list[int]]:
        """The prompts of a benchmark, of every row in order."""

        def build() -> list[list[int]]:
            return evaluate.prompts_of(self.builder, benchmark, self.table(benchmark))

        return self._once(f"questions of {benchmark.model_dump_json()}", PROMPTS, build)

    def trained_tokens(self) -> int:
        """Tokens of the responses that training learns from, at most."""
        cfg, made = self.config.train, self.config.generate
        if self.method.source == "solutions":
            return sum(len(prompts.expert) for prompts in self.each)
        found = self.traces
        if found is not None:
            return sum(len(trace.response_ids) for trace in found if trace.drop is None)
        kept = made.samples if self.config.filters.keep == "all" else min(made.samples, self.config.filters.keep)
        return len(self.rows) * kept * min(made.sampling.max_tokens, cfg.max_tokens)


# ---------------------------------------------------------------------------------------------------
# The checks: each yields what it has found; one that needs what is not there is left out
# ---------------------------------------------------------------------------------------------------


def registered(s: Subject) -> Iterator[Finding]:
    """The names that only a registry can verify, and what methods say of their settings."""
    yield from names.problems(s.config)
    if s.stage == "evaluate":
        samplers.find(s.config.evaluate.sampler)


def run_directory(s: Subject) -> Iterator[Finding]:
    """Whether it can be made and written."""
    folder = _existing(Path(s.config.run_dir))
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
    need = max(held(weights.abstract(s.model, dtype, mesh, _form(s))) for mesh in (s.mesh, s.sample_mesh))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    held_in = _form(s) or s.config.model.dtype
    limited = f" of {_size(limit)}" if limit else ""
    yield "weights", f"{_size(_weights(s))} in {held_in}; per device {_size(need)}{limited}"
    if limit and need > limit:
        yield UserError(
            f"got {_size(need)} of weights per device, which has {_size(limit)}: spread them over more devices by "
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
    """What draws elsewhere has exact weights, and int8 ones are not mixed with them."""
    elsewhere = s.server is not None or (s.stage == "evaluate" and s.config.evaluate.sampler == offline.NAME)
    if s.config.model.quantize and elsewhere:
        yield UserError(
            f"draws from exact weights, and model.quantize asks for {s.config.model.quantize} ones: want `engine`, or "
            "exact weights",
            field=f"{s.stage}.sampler",
        )


def caches(s: Subject) -> Iterator[Finding]:
    """Whether this model can be sampled from pages here."""
    cfg = s.config.train.online if s.stage == "train" else getattr(s.config, s.stage)
    if cfg.pages is None or s.server or (s.stage == "train" and s.method.source != "samples"):
        return
    platform = s.sample_mesh.devices.flat[0].platform
    if why := pages.refusal(s.model, platform, mesh_lib.axis_size(s.sample_mesh, "k")):
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
    if s.stage == "evaluate" and adapter_folder(s.config) in s.made:
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


def steps_of(command: str, config: config_lib.Config, over: Sequence[str] = (), tau: str = "") -> list[Step]:
    """The stages that a command goes through; none for one that only shows something."""
    if command in ("check", "run"):
        return experiment.steps(config)
    if command == "sweep":
        return experiment.steps(experiment.swept(config, over))
    if command == "calibrate":
        return calibrate.steps(config, tau)
    if command == "select":
        return [Step("", "evaluate", select.evaluation(config))]
    return [Step("", command, config)] if command in CHECKS else []


# ---------------------------------------------------------------------------------------------------
# Space on the disk
# ---------------------------------------------------------------------------------------------------

TRACE_BYTES = 64  # per token of a trace, in the journal and in the file made of it
SAMPLE_BYTES = 8  # per token of a sample in the journal: its id
TEXT_BYTES = 6  # per token of a sample's text, which samples.jsonl holds for every budget
STATE_COPIES = 3  # of the adapter in a checkpoint: its weights and Adam's two averages


def space(s: Subject) -> dict[str, int]:
    """Bytes that a step writes at most, by what they are for."""
    config = s.config
    if s.stage == "generate":
        made = config.generate
        return {"traces": len(s.rows) * made.samples * made.sampling.max_tokens * TRACE_BYTES}
    if s.stage == "evaluate":
        drawn = config.evaluate
        problems = sum(len(s.table(benchmark)) for benchmark in drawn.benchmarks)
        return {"samples": problems * drawn.samples * (drawn.longest * SAMPLE_BYTES + sum(drawn.cuts) * TEXT_BYTES)}
    if s.stage == "convert":
        return {"weights": _weights(s)}
    if not s.method.trains:
        return {}
    cfg = config.train
    pairs = jax.tree.leaves(lora.abstract(s.model, cfg.lora, s.mesh))
    adapter_bytes = sum(x.size * x.dtype.itemsize for x in pairs)
    if s.stage == "export":
        return {"adapter": adapter_bytes, **({"merged": _weights(s)} if config.export.merged else {})}
    found = {"checkpoints": (cfg.keep_checkpoints + 1) * STATE_COPIES * adapter_bytes}
    if s.method.caches(cfg):
        need = references.bytes_needed(
            s.trained_tokens(), len(s.method.roles), s.model.D, jnp.dtype(config.model.dtype)
        )
        limit, exact = cfg.references_gib * 2**30, s.method.source == "solutions" or s.traces is not None
        if need <= limit or not exact:  # states that need more are not kept
            found["references"] = int(min(need, limit))
    return found


def room(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """The space that the steps will take, against what is free."""
    folder = Path(min((s.config.run_dir for s in subjects), key=len))
    needs: collections.Counter[str] = collections.Counter()
    there = 0
    for s in subjects:
        needs.update(space(s))
        there += sum(map(_bytes_of, _begun(s)))
    free, total = shutil.disk_usage(_existing(folder)).free, needs.total()
    shown = ", ".join(f"{name} {_size(size)}" for name, size in needs.most_common() if size)
    yield "disk", f"up to {_size(total)} ({shown}); {_size(free)} free"
    if total - there > free:
        less = ", or lower train.references_gib" if needs["references"] else ""
        raise UserError(
            f"up to {_size(total)} will be written ({shown}), and {_size(free)} are free: "
            f"free some, use another run_dir{less}",
            file=folder,
        )


def _begun(s: Subject) -> Iterator[Path]:
    """The files and folders in which a step's unfinished work lies."""
    recipe, folder = s.recipe, Path(s.config.run_dir)
    yield from (folder / output.name for output in recipe.outputs)
    for pattern in (*recipe.partial, *["references"] * (s.stage == "train")):
        yield from folder.glob(pattern)


# ---------------------------------------------------------------------------------------------------
# Looking
# ---------------------------------------------------------------------------------------------------


class Found:
    """What the checks of a command's steps have found."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, list[str]]] = {}  # label -> text -> arms
        self.problems: dict[str, UserError] = {}  # by their text: what several steps run into is said once
        self.states: dict[str, list[Step]] = {"done": [], "begun": [], "to do": []}

    def take(self, findings: Iterator[Finding], arm: str = "") -> bool:
        """Adds what a check yields and what it raises; returns whether there was no problem."""
        before = len(self.problems)
        try:
            for one in findings:
                if isinstance(one, UserError):
                    self.problems.setdefault(str(one), one)
                else:
                    self.rows.setdefault(one[0], {}).setdefault(one[1], []).append(arm)
        except UserError as error:
            self.problems.setdefault(str(error), error)
        return len(self.problems) == before


def look(command: str, config: config_lib.Config, **more: Any) -> Found:
    """Goes through the checks of every step of a command that is not done."""
    found, ahead = Found(), []
    known: dict[tuple[str, str], Any] = {}
    made: set[Path] = set()
    if not found.take(registered(Subject(Step("", command, config), known, made))):
        return found
    steps = steps_of(command, config, **more)
    if steps:
        mesh_lib.all_devices()  # without any, nothing else can be asked
    for step in steps:
        s = Subject(step, known, made)
        if not found.take(registered(s)) or not s.works:
            continue
        state = "to do"
        try:
            state = RunDir(s.config).progress(s.recipe)
        except UserError as error:
            found.problems.setdefault(str(error), error)
        found.states[state].append(step)
        if state != "done":
            for check in CHECKS[s.stage]:
                found.take(check(s), s.arm)
            ahead.append(s)
        if s.stage == "generate":
            made.add(traces_path(s.config))
        elif s.stage == "export" and state != "done":
            made.add(adapter_folder(s.config))
    if ahead and not found.problems and mesh_lib.is_first():
        found.take(room(ahead))
    return found


def first(command: str, config: config_lib.Config, **more: Any) -> Found:
    """What every command does first; raises UserErrors for all problems. The first process speaks for all of them."""
    found = look(command, config, **more)
    works = any(found.states.values())  # a command that only shows something needs no device
    theirs = mesh_lib.from_first(lambda: list(found.problems)) if works else []
    problems = [*found.problems.values(), *(UserError(text) for text in theirs if text not in found.problems)]
    if problems:
        raise UserErrors(problems)
    return found


def run(config: config_lib.Config) -> None:
    """Prints what was looked at and what would be done; raises UserErrors for all problems."""
    found = look("check", config)
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for label, texts in found.rows.items():
        for text, arms in texts.items():
            of = f" ({', '.join(filter(None, arms))})" if len(texts) > 1 and any(arms) else ""
            table.add_row(Text(label + of), Text(visible(text)))
    for state, steps in found.states.items():
        if steps:
            table.add_row("next" if state == "to do" else state, Text(visible(_course(steps))))
    if mesh_lib.is_first():
        console.print(table)
    if found.problems:
        raise UserErrors(list(found.problems.values()))
    log(f"check: nothing stands in the way of run_dir={config.run_dir}")


def _course(steps: Sequence[Step]) -> str:
    """Steps in a few words: `generate; base: evaluate; dail: train, export, evaluate`."""
    parts = []
    for arm, group in itertools.groupby(steps, lambda step: step.arm):
        stages = ", ".join(step.stage for step in group)
        parts.append(f"{arm}: {stages}" if arm else stages)
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------------------------------


def _cut(problems: Iterator[UserError]) -> Iterator[UserError]:
    """The first few problems, and how many there are more."""
    yield from itertools.islice(problems, SHOWN)
    more = sum(1 for _ in problems)
    if more:
        yield UserError(f"... and {more} more like the {SHOWN} above")


def adapter_folder(config: config_lib.Config) -> Path:
    """What `export` writes."""
    return Path(config.run_dir) / "adapter"


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next((one for one in (path, *path.absolute().parents) if one.exists()), path)


def _bytes_of(path: Path) -> int:
    """What a file or a folder holds."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _form(s: Subject) -> str | None:
    """The form in which a step holds the weights: a merged model is made of exact ones."""
    return None if s.stage == "export" and s.config.export.merged else s.config.model.quantize


def _weights(s: Subject) -> int:
    """Bytes of all weights."""
    shapes = weights.abstract(s.model, jnp.dtype(s.config.model.dtype), quantize=_form(s))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _size(count: float) -> str:
    """Bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
