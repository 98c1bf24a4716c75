"""dail_jax from Python: a model that rolls out, is trained, answers, and is evaluated, all in memory.

    model = dail_jax.load("demo")
    traces = model.rollout(model.rows()[0], n=4, tau=0.8)
    loss, parts = model.loss(traces, method="dail")

Each method does what a stage does, by the functions of that stage, and gives what the stage would have written. Keyword
arguments have the names of the configuration's keys (docs/configuration.md); one that is not given has the value in the
model's configuration. What is wrong with an argument, a file or a row is a `UserError`. docs/python.md is the reference.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import PrivateAttr
from rich.console import Group
from rich.jupyter import JupyterMixin
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import resources, storage
from dail_jax.checkpoint import peft
from dail_jax.data import batches, records
from dail_jax.data import traces as traces_lib
from dail_jax.data.prompts import Question
from dail_jax.data.records import Row
from dail_jax.errors import UserError, visible, want_folder
from dail_jax.evaluate import protocol
from dail_jax.evaluate.passk import Interval
from dail_jax.metrics import Metrics
from dail_jax.model.families import ModelConfig
from dail_jax.model.lora import Lora
from dail_jax.rundir import Journal
from dail_jax.sample.sampler import Request
from dail_jax.stages import drops, export, generate, names, online, recipes, samplers
from dail_jax.stages import evaluate as evaluate_stage
from dail_jax.stages import train as train_stage
from dail_jax.stages.session import Session, open_session
from dail_jax.strict_yaml import assign, read_yaml
from dail_jax.text import Tokenizer
from dail_jax.train import methods, optimizer
from dail_jax.train import step as step_lib

__all__ = ["Evaluation", "Model", "Response", "Row", "Trace", "UserError", "load"]

WRITERS = {"s": "proposed by the student and kept", "p": "written by the privileged student"}
STYLES = {"s": "cyan", "p": "bold dark_orange underline"}  # in a terminal
CSS = {  # in a notebook, on light and dark pages alike
    "s": "background: rgb(0 120 215 / 0.12)",
    "p": "background: rgb(230 110 0 / 0.3); border-bottom: 2px solid rgb(230 110 0)",
}


def load(
    source: str | Path,
    *,
    mesh: Mapping[str, int] | None = None,
    adapter: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """Opens a model; its weights are read at first use.

    Args:
      source: a model's folder, or a configuration: a YAML file, or the name of one that comes with the package, such as
        "demo", the embedded model with its rows and templates. The arms of a configuration are ignored.
      mesh: devices per axis, such as {"data": 4, "tensor": 2}; by default all devices hold the whole model.
      adapter: a PEFT folder with a LoRA for the model to wear.
      settings: further keys of the configuration, such as {"data.path": "rows.jsonl", "model.dtype": "float32"}.

    Raises UserError if anything about them is wrong.
    """
    path = str(source)
    if Path(path).is_dir() or storage.is_remote(path):
        tree: dict[str, Any] = {"run_dir": ".", "model": {"path": path}}  # nothing is written to it
    else:
        file = resources.configuration(path)
        if not Path(file).is_file():
            want_folder(Path(path), f"a model, or a configuration such as {', '.join(resources.configurations())}")
        tree = read_yaml(file)
    for key, value in {"arms": {}, **({"mesh": dict(mesh)} if mesh else {}), **(settings or {})}.items():
        assign(tree, key, value)
    config = config_lib.build(tree, path)
    names.check(config)
    session = open_session(config)
    if adapter is None:
        return Model(session)
    adapter = storage.folder(adapter)
    peft.refuse_other_base(adapter, config.model.path, config.model.quantize)
    lora, shape = peft.load(adapter, session.model, session.mesh)
    config = config.model_copy(update={"train": config.train.model_copy(update={"lora": shape})})
    return Model(dataclasses.replace(session, config=config), lora, "adapter")


# ---------------------------------------------------------------------------------------------------
# What a model gives
# ---------------------------------------------------------------------------------------------------


class Trace(traces_lib.Trace):
    """A trace of `Model.rollout`, with the fields of a row of traces.jsonl (docs/traces.md).

    It shows itself coloured by who wrote each token: as the last value of a notebook's cell, or by `rich.print`.
    """

    _problem: Row = PrivateAttr()
    _tokenizer: Tokenizer = PrivateAttr()

    @classmethod
    def of(cls, trace: traces_lib.Trace, problem: Row, tokenizer: Tokenizer) -> Trace:
        """The same trace, with the row that it answers and the tokenizer that its ids belong to."""
        bound = cls.model_construct(**dict(trace))
        bound._problem, bound._tokenizer = problem, tokenizer
        return bound

    @property
    def problem(self) -> Row:
        """The row that it answers."""
        return self._problem

    @property
    def pieces(self) -> list[str]:
        """The text of each token."""
        return self._tokenizer.pieces(self.response_ids)

    @property
    def _title(self) -> str:
        parts = [f"{self.name}: {len(self.response_ids)} tokens"]
        if self.acceptance is not None:
            parts.append(f"{self.acceptance:.0%} the student's")
        parts.append("complete" if self.finish == "stop" else "cut")
        return visible(", ".join([*parts, *([f"dropped: {self.drop}"] if self.drop else [])]))

    def __repr__(self) -> str:
        return f"<Trace {self._title}>"

    def __rich__(self) -> Group:
        writer = self.writer or " " * len(self.response_ids)
        tokens = Text()
        for piece, who in zip(self.pieces, writer, strict=True):
            tokens.append(visible(piece), STYLES.get(who, ""))
        key = Text("  ").join(Text(words, STYLES[who]) for who, words in WRITERS.items())
        return Group(Text(self._title, "bold"), tokens, key)

    def _repr_html_(self) -> str:
        def span(text: str, who: str, tip: str = "") -> str:
            style = f' style="{CSS[who]}"' if who in CSS else ""
            return f"<span{style}{tip}>{html.escape(visible(text))}</span>"

        def tip(index: int) -> str:
            known = {"student": self.log_student, "privileged student": self.log_privileged, "drawn": self.logq}
            shares = {name: logs[index] for name, logs in known.items() if logs is not None}
            lines = [f"{name} {math.exp(log):.3g}" for name, log in shares.items() if log is not None]
            return f' title="{html.escape(", ".join(lines))}"'

        writer = self.writer or " " * len(self.response_ids)
        tokens = [span(piece, who, tip(i)) for i, (piece, who) in enumerate(zip(self.pieces, writer, strict=True))]
        key = " ".join(span(words, who) for who, words in WRITERS.items())
        return (
            f"<div><b>{html.escape(self._title)}</b>"
            f'<pre style="white-space: pre-wrap; margin: 0.4em 0">{"".join(tokens)}</pre><small>{key}</small></div>'
        )


@dataclass(frozen=True)
class Response:
    """A sample of `Model.sample`: its text, its token ids with the stop token, and `stop` or `length`."""

    text: str
    ids: tuple[int, ...]
    finish: str


@dataclass(frozen=True)
class Evaluation(JupyterMixin):
    """What `Model.evaluate` found: the content of results.json, and of samples.jsonl (docs/results.md).

    In a notebook, or by `rich.print`, it shows itself as a table.
    """

    results: dict[str, Any]
    samples: list[dict[str, Any]]

    def pass_at(self, k: int, benchmark: str | None = None, budget: int | None = None) -> Interval:
        """pass@k with its 95% bootstrap interval over problems: of the first benchmark, at the largest budget.

        Raises KeyError for a k, a benchmark or a budget that was not evaluated.
        """
        tables = self.results["benchmarks"]
        cells = tables[benchmark or next(iter(tables))]
        return Interval(**cells[str(budget) if budget else max(cells, key=int)]["pass@k"][str(k)])

    def __rich__(self):
        return protocol.table({self.results["arm"]: self.results})


# ---------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Model:
    """A frozen model, and the LoRA that it wears, if any. `load` opens one; `train` gives one with a new LoRA.

    Attributes:
      session: the model as the stages see it: its configuration, mesh, sizes, tokenizer and prompts.
      adapter: the LoRA, or None.
      objective: what made the adapter: a method, "adapter" for one from a folder, or "none".
      history: one row per update of its training, as in metrics.jsonl: `step`, `loss`, `grad_norm`, ...
    """

    session: Session
    adapter: Lora | None = None
    objective: str = "none"
    history: tuple[Mapping[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"Model({self.config.model.path!r}, objective={self.objective!r})"

    @property
    def config(self) -> config_lib.Config:
        """The configuration that the arguments of all methods take their defaults from."""
        return self.session.config

    @functools.cached_property
    def lora(self) -> Lora:
        """The adapter, or else the one that training starts from, which changes nothing yet."""
        if self.adapter is not None:
            return self.adapter
        session, cfg = self.session, self.config.train
        tx = optimizer.adamw(cfg.optimizer, 1)
        return step_lib.init(jax.random.key(self.config.seed), session.model, cfg, tx, session.mesh).lora

    def configured(self, settings: Mapping[str, Any]) -> Model:
        """The same model under other settings, by dotted keys, such as {"train.lora.rank": 8}.

        Raises UserError for unknown keys and impossible values.
        """
        config = config_lib.with_overrides(self.config, dict(settings), "settings")
        names.check(config)
        return dataclasses.replace(self, session=open_session(config))

    def rows(
        self, source: str | Path | Iterable[Mapping[str, Any]] | None = None, limit: int | None = None
    ) -> list[Row]:
        """The first `limit` rows, or all, in order: problems with expert solutions and answers.

        `source` is None for the rows that the configuration trains on, the name of one of its benchmarks, a .jsonl or
        .parquet file, or rows as mappings with the columns of docs/data.md, such as `problem`, `solution` and `answer`. A
        row without a solution can be sampled and evaluated; one without an answer can be rolled out. Raises UserError at
        the first fault.
        """
        data, cfg = self.config.data, self.config.evaluate
        benchmark = next((one for one in cfg.benchmarks if one.name == source), None)
        if source is None:
            if data is None:
                raise UserError("missing: want a source of rows here, or settings={'data.path': FILE}", field="data")
            found = records.read_rows(data)
        elif benchmark is not None:
            found = recipes.read_benchmark(benchmark)
        else:
            columns = data.columns if data else config_lib.Columns()
            if isinstance(source, (str, Path)):
                dataset = config_lib.Dataset(path=str(source), columns=columns, limit=limit)
                found = records.read_rows(dataset, need=("problem",))
            else:
                dataset = config_lib.Dataset(path="rows", columns=columns)
                found = records.checked_rows(enumerate(map(dict, source), 1), dataset, need=("problem",))
        return found[:limit]

    # -- Traces ---------------------------------------------------------------------------------------

    def rollout(
        self,
        rows: Row | Sequence[Row],
        n: int | None = None,
        tau: float | None = None,
        *,
        proposals: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> list[Trace]:
        """`n` traces (`generate.samples`) per row, which the student and the privileged student write together.

        Both are the frozen model: an adapter plays no part. `tau` is the probability from which the privileged student
        accepts a token: 0 is the student alone, 1 the privileged student alone. The traces are those that the stage
        `generate` draws for these rows, before its filters; `filter` applies those. Raises UserError for a row without
        a solution, or if every prompt is longer than `generate.max_prompt_tokens`.
        """
        rows = [rows] if isinstance(rows, Row) else list(rows)
        session = self._under(
            "rollout",
            {
                "generate.samples": n,
                "generate.tau": tau,
                "generate.slots": _slots(self.config.generate, len(rows) * (n or self.config.generate.samples)),
                "generate.proposals": proposals,
                **_sampling("generate", temperature, top_p, top_k, max_tokens),
                "seed": seed,
            },
        )
        _want_solutions(rows)
        with jax.set_mesh(session.sample_mesh):
            metrics = Metrics(None, session.config.log, "generate")
            found = generate.roll_out(session, rows, Journal(None), metrics)
        if rows and not found:
            limit = session.config.generate.max_prompt_tokens
            raise UserError(f"every prompt is longer than {limit} tokens", field="generate.max_prompt_tokens")
        return [Trace.of(t, row, session.tokenizer) for row in rows for t in found.get(row.problem_id, [])]

    def traces(self, path: str | Path) -> list[Trace]:
        """The traces in a file of the stage `generate`, for problems of `rows()`; raises UserError for others."""
        rows = {row.problem_id: row for row in self.rows()}
        found = traces_lib.read(Path(path))
        traces_lib.refuse_unknown(found, {name: len(row.views) for name, row in rows.items()}, Path(path))
        return [Trace.of(trace, rows[trace.problem_id], self.session.tokenizer) for trace in found]

    def filter(self, traces: Sequence[Trace]) -> list[Trace]:
        """The same traces with `drop` set by the filters of the configuration: None, or why one is not learned from."""
        self._want_data()
        reasons = drops.mark(traces, list({t.problem_id: t.problem for t in traces}.values()), self.config)
        return [Trace.of(marked, t.problem, self.session.tokenizer) for marked, t in zip(reasons, traces, strict=True)]

    # -- Learning -------------------------------------------------------------------------------------

    def loss(
        self,
        data: Sequence[Trace] | Sequence[Row],
        method: str | None = None,
        *,
        gamma: float | None = None,
        kl: str | None = None,
        reduce: str | None = None,
        lora: Lora | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(a method's mean loss on traces, or on rows for `sft`, and the means of its parts), float32 scalars.

        `lora` stands in for `self.lora`, and the loss is differentiable in it:
        `jax.value_and_grad(lambda lora: model.loss(traces, lora=lora), has_aux=True)(model.lora)`. Traces with a `drop`
        are left out, as are examples longer than `train.max_tokens`. Raises UserError for a method that learns from
        neither, such as those that sample while they train.
        """
        session, (loss, _), batch = self._batch("loss", data, method, gamma, kl, reduce)
        return loss(session.params, self.lora if lora is None else lora, batch)

    def gradient(
        self,
        data: Sequence[Trace] | Sequence[Row],
        method: str | None = None,
        *,
        gamma: float | None = None,
        kl: str | None = None,
        reduce: str | None = None,
        lora: Lora | None = None,
    ) -> Lora:
        """The gradient of `loss` in the LoRA, as the train step computes it: a tree of the LoRA's own shapes."""
        session, (_, gradient), batch = self._batch("gradient", data, method, gamma, kl, reduce)
        return gradient(session.params, self.lora if lora is None else lora, batch)[0]

    def train(
        self,
        data: Sequence[Trace] | Sequence[Row],
        method: str | None = None,
        *,
        epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        gamma: float | None = None,
        kl: str | None = None,
        reduce: str | None = None,
        seed: int | None = None,
    ) -> Model:
        """The model with a new LoRA, trained from the start by a method; its `history` has every update's loss.

        `data` are traces for methods such as `dail`, which `generate` writes for; rows with expert solutions for `sft`;
        and rows to practise on for methods that sample. The updates are those of the stage `train` on the same
        examples. Raises UserError if nothing can be learned from the data.
        """
        session = self._under(
            "train",
            {
                **_objective(method, gamma, kl, reduce),
                "train.epochs": epochs,
                "train.batch_size": batch_size,
                "train.optimizer.learning_rate": learning_rate,
                "train.cache_references": False if jax.process_count() > 1 else None,  # they would share a folder
                "seed": seed,
            },
        )
        found = methods.of(session.config)
        metrics = Metrics(None, session.config.log, "train")
        with jax.set_mesh(session.mesh), tempfile.TemporaryDirectory() as folder:
            if found.source == "samples":
                self._want_data()
                rows = [_as_row(one, found) for one in data]
                drops.check_golds(session.config, rows)
                feed: Any = online.Rounds(session, found, rows, metrics)
            else:
                examples = self._examples(session, found, data, metrics)
                feed = train_stage.Epochs(session, found, examples, Path(folder), "")
            state = train_stage.fit(session, feed, None, metrics)
        history = tuple(row for row in metrics.rows if row["stage"] == "train")
        return Model(session, state.lora, found.name, history)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapter as a new PEFT folder, for peft, transformers and vLLM, by what the stage `export` uses.

        Raises UserError if there is no adapter, or the folder exists.
        """
        if self.adapter is None:
            raise UserError("there is no adapter to save: train one", file=folder)
        export.write_adapter(self.session, self.adapter, Path(folder))

    # -- Answers --------------------------------------------------------------------------------------

    def sample(
        self,
        problem: str | Row,
        n: int = 1,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> list[Response]:
        """`n` responses to a problem, which the model, with its adapter, draws as `evaluate.sampling` says.

        The same call gives the same responses. Raises UserError if the prompt is longer than
        `evaluate.max_prompt_tokens`.
        """
        sampling = {**_sampling("evaluate", temperature, top_p, top_k, max_tokens), "evaluate.budgets": []}
        session = self._under("sample", {**sampling, "evaluate.slots": _slots(self.config.evaluate, n), "seed": seed})
        cfg, text = session.config.evaluate, problem.problem if isinstance(problem, Row) else problem
        question = Question(text, before=problem.before if isinstance(problem, Row) else ())
        prompt = tuple(session.prompts.questions([question])[0])
        if len(prompt) > cfg.max_prompt_tokens:
            raise UserError(
                f"got a prompt of {len(prompt)} tokens, want at most {cfg.max_prompt_tokens}",
                field="evaluate.max_prompt_tokens",
            )
        request = Request(f"sample/{text}", (prompt,), tuple(range(n)), cfg.sampling.max_tokens)
        with jax.set_mesh(session.sample_mesh):
            sampler = samplers.engine_of(session, self.adapter)(request.limit)
            drawn = evaluate_stage.Drawn(Journal(None))
            evaluate_stage.collect(sampler, [request], drawn, "sampling")
        return [
            Response(session.tokenizer.decode(one["ids"]), tuple(one["ids"]), one["finish"])
            for one in drawn.of(request.name)
        ]

    def evaluate(
        self,
        rows: Sequence[Row] | Mapping[str, Sequence[Row]] | None = None,
        *,
        samples: int | None = None,
        answer: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Evaluation:
        """pass@k with intervals, and every graded sample: what the stage `evaluate` writes.

        `rows` have gold answers: rows of one benchmark, or of several by name; None stands for the benchmarks of the
        configuration. `answer` is the type of the answers, `data.answer` by default; benchmarks that the configuration
        names keep their own. Raises UserError for gold answers that cannot be graded against.
        """
        cfg, data = self.config.evaluate, self.config.data
        if rows is None:
            tables: Mapping[str, Sequence[Row]] = {one.name: recipes.read_benchmark(one) for one in cfg.benchmarks}
        else:
            tables = rows if isinstance(rows, Mapping) else {"rows": rows}
        if not any(tables.values()):
            raise UserError("there is nothing to evaluate on: want rows, or benchmarks in the configuration")
        known = {one.name: one.model_dump(mode="json") for one in cfg.benchmarks}
        kind = answer or (data.answer if data else "math")
        session = self._under(
            "evaluate",
            {
                "evaluate.benchmarks": [
                    known.get(name, {"name": name, "rows": {"path": name}, "answer": kind}) for name in tables
                ],
                "evaluate.samples": samples,
                "evaluate.slots": _slots(cfg, (samples or cfg.samples) * sum(map(len, tables.values()))),
                "evaluate.ks": [] if samples else None,
                **_sampling("evaluate", temperature, top_p, top_k, max_tokens),
                "evaluate.budgets": [] if max_tokens else None,
                "seed": seed,
            },
        )
        config = session.config
        names.answer_types(config.evaluate)
        skipped = evaluate_stage.ungradable(config.evaluate, tables)
        with jax.set_mesh(session.sample_mesh):
            metrics = Metrics(None, config.log, "evaluate")
            todo = evaluate_stage.problems(session, tables, skipped, metrics)
            open_sampler = samplers.engine_of(session, self.adapter)
            drawn = evaluate_stage.draw_samples(session, todo, open_sampler, lambda _: Journal(None), metrics)
        graded, results = mesh_lib.from_first(
            lambda: evaluate_stage.graded_results(config, drawn, self.objective, self.objective)
        )
        return Evaluation(results, graded)

    # -- Parts of the above ---------------------------------------------------------------------------

    def _under(self, method: str, settings: Mapping[str, Any]) -> Session:
        """The session under the settings that are not None; none of them may change prompts."""
        given = {key: value for key, value in settings.items() if value is not None}
        config = config_lib.with_overrides(self.config, given, f"{method}()")
        return dataclasses.replace(self.session, config=config)

    def _want_data(self) -> None:
        if self.config.data is None:
            raise UserError("missing: grading wants settings={'data.path': FILE}", field="data")

    def _examples(
        self, session: Session, method: methods.Method, data: Sequence[Trace] | Sequence[Row], metrics: Metrics
    ) -> list[batches.Example]:
        found: list[Trace] = []
        if method.source == "solutions":
            rows = [_as_row(one, method) for one in data]
        elif method.source == "traces":
            found = [_as_trace(one, method) for one in data]
            rows = list({trace.problem_id: trace.problem for trace in found}.values())
        else:
            learns = "samples of its own, and has no loss on what is given" if method.source == "samples" else "nothing"
            raise UserError(f"{method.name!r} learns from {learns}", field="method")
        if not rows:
            raise UserError("there is nothing to learn from", field="data")
        _want_solutions(rows)
        built = train_stage.prompts_of(session, rows)
        traces_lib.verify(found, built, session.tokenizer, session.model.V, Path("traces"))
        return train_stage.examples_of(session, method, built, found, metrics)

    def _batch(
        self,
        name: str,
        data: Sequence[Trace] | Sequence[Row],
        method: str | None,
        gamma: float | None,
        kl: str | None,
        reduce: str | None,
    ):
        """(session, the programs of the loss and its gradient, all data as one micro-batch on the devices)."""
        session = self._under(name, _objective(method, gamma, kl, reduce))
        cfg, mesh, found = session.config.train, session.mesh, methods.of(session.config)
        examples = self._examples(session, found, data, Metrics(None, session.config.log, name))
        rows = batches.pad(len(examples), mesh_lib.axis_size(mesh, "b"))
        assemble = batches.Assemble(examples, cfg.bucket, 1, mesh_lib.local_rows(mesh, rows), found.prompted)
        order = np.pad(np.arange(len(examples)), (0, rows - len(examples)), constant_values=-1)
        batch = mesh_lib.to_devices(assemble.map(order), mesh, rows)
        return session, _programs(session.model, found, cfg.model_dump_json(), mesh), batch


@functools.lru_cache(maxsize=8)
def _programs(model: ModelConfig, method: methods.Method, train: str, mesh: jax.sharding.Mesh):
    """`make_loss`, once per configuration: programs are compiled again for every new one."""
    return step_lib.make_loss(step_lib.spec_of(model, config_lib.Train.model_validate_json(train)), mesh)


def _sampling(
    section: str, temperature: float | None, top_p: float | None, top_k: int | None, max_tokens: int | None
) -> dict[str, Any]:
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens}
    return {f"{section}.sampling.{key}": value for key, value in given.items()}


def _objective(method: str | None, gamma: float | None, kl: str | None, reduce: str | None) -> dict[str, Any]:
    return {"train.objective": method, "train.gamma": gamma, "train.kl": kl, "train.reduce": reduce}


def _slots(cfg: config_lib.Inference, samples: int) -> int:
    """Enough slots for these samples; of few different numbers, since each number has programs of its own."""
    return min(cfg.slot_count, max(8, 1 << max(samples - 1, 0).bit_length()))


def _as_row(one: Row | Trace, method: methods.Method) -> Row:
    if not isinstance(one, Row):
        raise UserError(f"got {type(one).__name__}, want the rows that {method.name!r} learns from", field="data")
    return one


def _as_trace(one: Row | Trace, method: methods.Method) -> Trace:
    if not isinstance(one, Trace):
        raise UserError(
            f"got {type(one).__name__}, want the traces that {method.name!r} learns from: `rollout` or `traces`",
            field="data",
        )
    return one


def _want_solutions(rows: Sequence[Row]) -> None:
    for row in rows:
        if not row.solution:
            raise UserError("got no expert solution, want one", row=row.problem_id, field="solution")
