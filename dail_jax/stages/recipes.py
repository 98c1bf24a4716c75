"""What each stage is made of and what it makes: the one place that lists the settings and files that decide an output.

Settings that change no result are left out: where files are, how often to save, where metrics go. So are `mesh`,
`slots`, `pages` and `train.shapes`: other devices, batches and caches give the same traces, and losses that agree up to
rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from dail_jax import config as config_lib
from dail_jax import storage
from dail_jax.checkpoint import base, hf, peft, store
from dail_jax.data.prompts import load_template
from dail_jax.data.records import Row, dataset_hash, read_rows
from dail_jax.data.traces import Traces
from dail_jax.errors import UserError
from dail_jax.evaluate import answers, protocol
from dail_jax.evaluate.files import Samples
from dail_jax.provenance import Checksums, File, Input, Recipe, select
from dail_jax.rundir import read_manifest
from dail_jax.train import methods

TRACES, SAMPLES, RESULTS = "traces.jsonl", "samples.jsonl", "results.json"
JOURNALS = ("traces.partial.jsonl", "told.partial.jsonl")
DRAWN = ("samples.partial.jsonl", "forced.partial.jsonl")
PRETRAIN = "pretrain"  # checkpoints of all weights

# Compared by the contents that they lead to, which for several files include the choice of rows.
PATHS = (
    "model.path",
    "model.tokenizer",
    "data.path",
    "data.seed",
    *(f"prompts.{role}" for role in ("student", "privileged", "negative", "expert", "hint")),
    "evaluate.adapter",
    "evaluate.benchmarks.rows.path",
    "evaluate.benchmarks.rows.seed",
    "evaluate.benchmarks.template",
    "pretrain.rows",
)
# What only `plan` or the report reads.
ASIDE = ("data.size", "data.about", *(f"evaluate.benchmarks.{key}" for key in ("rows.size", "pool", "title", "about")))
COMMON = ("seed", "prompts.opening", "prompts.max_solution_tokens")
PROMPT = ("generate.max_prompt_tokens",)  # decides which solutions are cut to fit
SUMMARY = ("evaluate.ks", "evaluate.bootstrap")  # decide results.json alone
SERVER = ("url", "concurrency", "timeout", "retries", "key_variable")  # decide nothing: the model's name does


def rows_of(config: config_lib.Config) -> list[Row]:
    """The rows that are trained on; raises UserError."""
    if config.data is None:
        raise UserError("missing: want the problems with their expert solutions", field="data")
    return read_rows(config.data)


def traces_path(config: config_lib.Config) -> Path:
    return storage.file(config.traces or Path(config.run_dir) / TRACES)


def adapter_folder(config: config_lib.Config) -> Path:
    """What `export` writes."""
    return Path(config.run_dir) / "adapter"


def convert(config: config_lib.Config) -> Recipe:
    return Recipe("convert", select(config, *form(config)), _model(config), (base.Folder("model"),))


def generate(config: config_lib.Config, rows: list[Row] | None = None) -> Recipe:
    served = isinstance(config.generate.sampler, config_lib.Server)
    # Without a server, the key is left out: records that were written before it came stay valid.
    free = [f"generate.sampler.{key}" for key in SERVER] if served else ["generate.sampler"]
    free += ["generate.slots", "generate.pages", *exact_caches(config.generate, "generate")]
    settings = select(config, *form(config), *COMMON, "data", "generate", without=(*PATHS, *ASIDE, *free))
    settings["passes"] = "rationalised" if methods.find(config.train).rationalises else "one"
    filters = select(config, "filters")
    if methods.find(config.train).rationalises:  # the filters decide what the second pass draws
        settings |= filters
    return Recipe(
        "generate",
        settings,
        {**_model(config, served), **_data(config, rows), **_templates(config, "student", "privileged")},
        outputs=(Traces(TRACES, derived=True),),
        partial=JOURNALS,
        scratch=JOURNALS,
        summary=filters,
    )


def train(config: config_lib.Config, rows: list[Row] | None = None) -> Recipe:
    method = methods.find(config.train)
    free = [f"train.{k}" for k in ("save_every", "keep_checkpoints", "references_gib", "workers", "shapes")]
    free += ["train.online.slots", "train.online.pages", *exact_caches(config.train.online, "train.online")]
    if method.source != "samples":  # nothing is drawn; records that were written before it came stay valid
        free.append("train.online.max_prompt_tokens")
    roles = list(method.prompted)
    roles += ["expert"] if method.source == "solutions" and config.prompts.expert else []
    roles += ["hint"] if method.hinted else []
    traces, reads_traces = traces_path(config), method.reads_traces(config.train)
    own = reads_traces and not config.traces
    return Recipe(
        "train",
        select(
            config,
            *form(config),
            *COMMON,
            *PROMPT,
            "data",
            "waypoints",
            "filters",
            "train",
            without=(*PATHS, *ASIDE, *free),
        ),
        {
            **_model(config),
            **_data(config, rows),
            **_templates(config, *roles),
            **({"traces": Input(config.traces or TRACES, lambda checksum: checksum(traces))} if reads_traces else {}),
        },
        outputs=(store.Final("checkpoints"),),
        after=(_unfiltered(generate(config, rows)),) if own else (),
    )


def _unfiltered(recipe: Recipe) -> Recipe:
    """`generate` as training looks at it, which filters the traces itself."""
    settings = {key: value for key, value in recipe.settings.items() if key != "filters"}
    return dataclasses.replace(recipe, settings=settings, outputs=(Traces(TRACES),))


def evaluate(config: config_lib.Config, tables: Mapping[str, list[Row]] | None = None) -> Recipe:
    cfg, inputs = config.evaluate, {}
    served = isinstance(cfg.sampler, config_lib.Server)
    free = ["evaluate.slots", "evaluate.pages", *exact_caches(cfg, "evaluate")]
    free += [f"evaluate.sampler.{key}" for key in SERVER] if served else []
    if cfg.adapter:
        adapter = cfg.adapter
        inputs["evaluate.adapter"] = Input(
            adapter, lambda checksum: peft.adapter_digest(storage.folder(adapter), checksum)
        )
    for one in cfg.benchmarks:
        known = tables[one.name] if tables else None
        inputs[f"evaluate.benchmarks.{one.name}.rows"] = Input(one.rows.shown_path, _rows_of(one, known))
        role = "choice" if one.rows.columns.choices else "student"
        if one.template or role == "choice":
            inputs[f"evaluate.benchmarks.{one.name}.template"] = _template(one.template, role)
    return Recipe(
        "evaluate",
        select(
            config, *form(config), *COMMON, "train.objective", "evaluate", without=(*PATHS, *ASIDE, *SUMMARY, *free)
        ),
        {**_model(config, served), **_templates(config, "student"), **inputs},
        outputs=(Samples(SAMPLES), File(RESULTS, derived=True)),
        partial=DRAWN,
        scratch=DRAWN,
        summary={**select(config, *SUMMARY), "pools": protocol.pools(cfg.benchmarks)},
        after=(train(config),) if methods.find(config.train).trains else (),
    )


def export(config: config_lib.Config) -> Recipe:
    wanted = ("adapter", "merged") if config.export.merged else ("adapter",)
    return Recipe(
        "export",
        select(config, *form(config), "export.base_model"),
        _model(config),
        outputs=tuple(map(base.Folder, wanted)),
        after=(train(config),),
    )


def pretrain(config: config_lib.Config) -> Recipe:
    cfg, target = config.pretrain, str(Path(config.model.path).absolute())
    assert cfg is not None
    free = ("model.path", "model.title", "model.quantize", "pretrain.log_every", "pretrain.save_every")
    return Recipe(
        "pretrain",
        {**select(config, "seed", "model", "pretrain", without=(*PATHS, *ASIDE, *free)), "writes": target},
        {
            "pretrain.rows": Input(cfg.rows, lambda checksum: checksum(storage.file(cfg.rows))),
            "model.tokenizer": _tokenizer(config),
            **({"pretrain.init": _weights(cfg.init)} if cfg.init else {}),
        },
        outputs=(base.Folder(target),),
        partial=(f"{PRETRAIN}/{store.MANIFESTS}/*.json",),
        scratch=(PRETRAIN,),
    )


def check_traces(config: config_lib.Config) -> None:
    """Raises UserError if `traces` names a run's file that was modified, or whose token ids are another tokenizer's.

    A file that no run directory has a record of, such as one of the user's own, passes.
    """
    path = traces_path(config)
    record = read_manifest(path.parent)["stages"].get("generate", {})
    recorded = record.get("outputs", {}).get(path.name) if config.traces else None
    if recorded is None:
        return
    if Checksums()(path) != recorded.split()[-1]:
        raise UserError(
            "is not what `generate` wrote there: restore it, or keep a file that was changed on purpose in another folder",
            file=path,
        )
    theirs, ours = record["inputs"].get("model.tokenizer", {}), _tokenizer(config)
    if theirs.get("sha256") != ours.read(Checksums()):
        raise UserError(f"was generated with another tokenizer: {theirs.get('path')!r}, not {ours.path!r}", file=path)


# ---------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------


def form(config: config_lib.Config) -> tuple[str, ...]:
    """The keys that decide which weights are computed with, of those in a folder.

    Exact ones are not on record as such: what was recorded before there were others stays valid.
    """
    return ("model.dtype", "model.quantize") if config.model.quantize else ("model.dtype",)


def exact_caches(cfg: config_lib.Inference, section: str) -> list[str]:
    """The key of a section that decides which keys and values tokens see, where these are exact: like exact weights, they are
    not on record."""
    return [f"{section}.kv_dtype"] if cfg.kv_dtype is None else []


def _model(config: config_lib.Config, served: bool = False) -> dict[str, Input]:
    """The model and its tokenizer; without the weights, which need not be here, if a server has them."""
    return {"model.path": _weights(config.model.path, served), "model.tokenizer": _tokenizer(config)}


def _weights(path: str, served: bool = False) -> Input:
    digest = base.config_digest if served else base.model_digest
    return Input(path, lambda checksum: digest(storage.model(path), checksum))


def _tokenizer(config: config_lib.Config) -> Input:
    folder = config.model.tokenizer or config.model.path
    return Input(folder, lambda checksum: hf.tokenizer_digest(storage.model(folder), checksum))


def _data(config: config_lib.Config, rows: list[Row] | None) -> dict[str, Input]:
    data = config.data
    if data is None:
        return {}
    return {"data.path": Input(data.shown_path, lambda _: dataset_hash(read_rows(data) if rows is None else rows))}


def _rows_of(benchmark: config_lib.Benchmark, rows: list[Row] | None) -> Callable[[Checksums], str]:
    return lambda _: dataset_hash(read_benchmark(benchmark) if rows is None else rows)


def read_benchmark(benchmark: config_lib.Benchmark) -> list[Row]:
    graded = answers.named(benchmark.answer).is_graded
    return read_rows(benchmark.rows, ("problem", "answer") if graded else ("problem",))


def _templates(config: config_lib.Config, *roles: str) -> dict[str, Input]:
    return {f"prompts.{role}": _template(getattr(config.prompts, role), role) for role in roles}


def _template(path: str | None, role: str) -> Input:
    return Input(path or f"the package's {role}.txt", lambda _: load_template(path, role).digest())
