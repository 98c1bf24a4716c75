"""train: the LoRA, by the method that `train.objective` names (`dail_jax.train.methods`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import store
from dail_jax.checkpoint.store import Store
from dail_jax.data import batches, traces
from dail_jax.data.batches import Example
from dail_jax.data.prompts import RolePrompts
from dail_jax.data.records import Row
from dail_jax.errors import UserError
from dail_jax.metrics import Metrics, log
from dail_jax.model.lora import Lora
from dail_jax.rundir import Interrupt, RunDir, json_line, write_atomic
from dail_jax.stages import drops, recipes
from dail_jax.stages.online import Rounds
from dail_jax.stages.recipes import rows_of, traces_path
from dail_jax.stages.session import Session, open_session
from dail_jax.train import loop, methods, optimizer, references
from dail_jax.train import step as step_lib

SCORES = "token_scores.jsonl"


def run(config: config_lib.Config) -> None:
    method = methods.of(config)
    if not method.trains:
        log(f"train: nothing to train (train.objective: {method.name})")
        return
    rows = rows_of(config)
    with RunDir(config) as run_dir, run_dir.stage(recipes.train(config, rows)) as stage:
        if stage.done:
            log(f"train: already done, see {run_dir.path / 'checkpoints'}")
            return
        session = open_session(config)
        with jax.set_mesh(session.mesh):
            metrics = Metrics(run_dir.path, config.log, "train")
            if method.source == "samples":
                feed = Rounds(session, method, rows, metrics)
            else:
                prompts = prompts_of(session, rows)
                found = marked_traces(session, rows, prompts) if method.source == "traces" else []
                examples = examples_of(session, method, prompts, found, metrics, traces_path(config))
                feed = Epochs(session, method, examples, run_dir.path, stage.sha256("model.path"))
                write_scores(session, feed, run_dir.path)
            folder = run_dir.path / "checkpoints"
            fit(session, feed, Store(folder, config.train.keep_checkpoints, stage.identity), metrics)
            log(f"train: {feed.steps} updates done; wrote {folder}")
            metrics.close()


def fit(session: Session, feed: loop.Feed, store: Store | None, metrics: Metrics) -> step_lib.TrainState:
    """Trains from the newest checkpoint to the end; the last update is always saved. Without a store, nothing is."""
    cfg, mesh = session.config.train, session.mesh
    tx = optimizer.adamw(cfg.optimizer, feed.steps)
    step = step_lib.make_update(
        step_lib.spec_of(session.model, cfg), tx, step_lib.shardings(session.model, cfg, tx, mesh)
    )
    rows = cfg.batch_size // cfg.accumulate

    def update(state: step_lib.TrainState, arrays: Mapping[str, np.ndarray]):
        return step(session.params, state, mesh_lib.to_devices(dict(arrays), mesh, rows))

    trainer = loop.Trainer(
        init=lambda: step_lib.init(jax.random.key(session.config.seed), session.model, cfg, tx, mesh),
        abstract=step_lib.abstract(session.model, cfg, tx, mesh),
        update=update,
        rate=optimizer.schedule(cfg.optimizer, feed.steps),
        save_every=cfg.save_every,
        max_skipped=cfg.max_skipped,
    )
    return loop.run(trainer, feed, store, metrics)


def trained_lora(session: Session, run_dir: RunDir) -> Lora | None:
    """The adapter of a finished `train` stage, or None for the untrained model."""
    cfg = session.config.train
    if not methods.of(session.config).trains:
        return None
    step = store.final_step(run_dir.output("train", "checkpoints"))
    tx = optimizer.adamw(cfg.optimizer, 1)  # the shapes of its state do not depend on the number of updates
    abstract = step_lib.abstract(session.model, cfg, tx, session.mesh)
    return store.load(run_dir.path / "checkpoints", step, abstract).lora


# ---------------------------------------------------------------------------------------------------
# Passes over fixed examples
# ---------------------------------------------------------------------------------------------------


def prompts_of(session: Session, rows: Sequence[Row]) -> dict[str, tuple[RolePrompts, ...]]:
    """The roles' prompts of rows with each of their solutions, by problem id."""
    built = session.prompts.build_views(rows)
    session.prompts.report("train")
    return {row.problem_id: views for row, views in zip(rows, built, strict=True)}


def marked_traces(session: Session, rows: list[Row], built: Mapping[str, Sequence[RolePrompts]]) -> list[traces.Trace]:
    """The run's traces, with `drop` set; raises UserError if they may not be trained on."""
    path = traces_path(session.config)
    found = traces.read(path)
    traces.verify(found, built, session.tokenizer, session.model.V, path)
    return drops.mark(found, rows, session.config)


def examples_of(
    session: Session,
    method: methods.Method,
    built: Mapping[str, Sequence[RolePrompts]],
    found: Sequence[traces.Trace],
    metrics: Metrics,
    source: Path | None = None,
) -> list[Example]:
    """What is trained on: those of the traces `found` that have no `drop`, or the expert solutions in the prompts `built`.

    Prompts are by problem id, for each solution, and each solution is an example of its own. Examples that are too long
    are dropped and counted; raises UserError, which names the traces' `source`, if none is left.
    """
    config, limit = session.config, session.config.train.max_tokens

    def example(name: str, prompts: RolePrompts, response) -> Example:
        return Example(name, {role: tuple(getattr(prompts, role)) for role in method.prompted}, tuple(response))

    if method.source == "solutions":
        each = [
            (problem_id if len(views) == 1 else f"{problem_id}/{i}", prompts)
            for problem_id, views in built.items()
            for i, prompts in enumerate(views)
        ]
        metrics.left_out("solutions cut to fit", sum(prompts.cut for _, prompts in each), len(each))
        examples = [example(name, prompts, prompts.expert) for name, prompts in each]
    else:
        kept = [trace for trace in found if trace.drop is None]
        examples = [example(t.name, built[t.problem_id][t.solution or 0], t.response_ids) for t in kept]
    fitting = [e for e in examples if max(map(len, e.prompts.values())) + len(e.response) <= limit]
    dropped = f"examples dropped: prompt and response are above train.max_tokens={limit}"
    metrics.left_out(dropped, len(examples) - len(fitting), len(examples))
    if not fitting and method.source == "solutions":
        raise UserError(
            f"nothing to train on: every example is above train.max_tokens={limit}", field="train.max_tokens"
        )
    if not fitting:
        raise UserError(drops.nothing_left(found, len(examples), config), file=source)
    return fitting


class Epochs:
    """Feeds batches of fixed examples, epoch after epoch. The seed alone determines their order.

    `folder` is where the frozen roles' states are kept; `weights` identifies the model that they are computed with.
    """

    def __init__(self, session: Session, method: methods.Method, examples: list[Example], folder: Path, weights: str):
        config, cfg = session.config, session.config.train
        self.workers, self.examples, self.accumulate, self.folder = cfg.workers, examples, cfg.accumulate, folder
        self.plan = batches.Plan(examples, cfg.batch_size, cfg.epochs, config.seed)
        self.steps = len(self.plan)
        self.identity = {
            "examples": batches.examples_digest(examples),
            "batch_size": cfg.batch_size,
            "seed": config.seed,
            "steps": self.steps,
        }
        local = mesh_lib.local_rows(session.mesh, cfg.batch_size // cfg.accumulate)
        widths = self.plan.widths(cfg.bucket, cfg.shapes)
        self.assemble = batches.Assemble(examples, cfg.bucket, cfg.accumulate, local, method.prompted, widths=widths)
        made_of = f"{weights} {self.identity['examples']}"
        self.cached = cache(session, method, examples, folder, made_of) if method.caches(cfg) else None
        if self.cached is not None:
            self.assemble = batches.Assemble(
                examples, cfg.bucket, cfg.accumulate, local, ("student",), method.roles, self.cached, widths
            )
        self.batches: Any = None
        self.names = np.array([e.name for e in examples] + [""])  # index -1 marks an empty row, which has no name
        log(
            f"train: {method.name} on {len(examples)} examples, {self.steps} updates of {cfg.batch_size}; "
            f"{batches.padding_share(self.plan, self.assemble):.0%} of trained positions are padding, in "
            f"{len(widths)} widths up to {widths[-1]} tokens"
        )

    def restore(self, step: int, saved: Mapping[str, Any]) -> None:
        changed = [k for k in self.identity if saved["identity"].get(k) != self.identity[k]]
        if changed:
            raise UserError(
                f"this run was started with other {', '.join(changed)}: use another run_dir", file=self.folder
            )

    def next(self, step: int, state: Any, interrupt: Interrupt) -> loop.Batch:
        if self.batches is None:
            self.batches = batches.iterator(self.plan, self.assemble, self.workers, step)
        names = self.names[self.plan[step].reshape(self.accumulate, -1)]
        return loop.Batch(next(self.batches), names, {"epoch": step // self.plan.per_epoch})

    def progress(self) -> dict[str, Any]:
        return {"identity": self.identity}

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()


def cache(
    session: Session, method: methods.Method, examples: list[Example], folder: Path, made_of: str
) -> references.References | None:
    """The frozen roles' states on disk; None if they would exceed `train.references_gib`."""
    cfg, d, dtype = session.config.train, session.model.D, session.params["norm"].dtype
    need = references.bytes_needed(sum(len(e.response) for e in examples), len(method.roles), d, dtype)
    if need > cfg.references_gib * 2**30:
        size = f"{need / 2**30:.1f} GiB"
        log(f"train: references would take {size}, above train.references_gib; computing them in every step")
        return None
    model = session.config.model
    key = " ".join(filter(None, (model.dtype, model.quantize, made_of)))
    found = references.load(folder / "references", key, examples, d, dtype)
    if found is not None:
        return found
    mesh_lib.from_first(lambda: (folder / SCORES).unlink(missing_ok=True))  # it belongs to other references
    return references.compute(
        folder / "references",
        key,
        step_lib.spec_of(session.model, cfg),
        session.params,
        session.mesh,
        examples,
        cfg.batch_size // cfg.accumulate,
        cfg.bucket,
        cfg.shapes,
    )


def write_scores(session: Session, feed: Epochs, folder: Path) -> None:
    """Writes what the contrast thinks of every token, for the report's trace viewer, if the roles' states are cached."""
    cached, scores = feed.cached, folder / SCORES
    if cached is None or not set(cached.roles) >= set(methods.CONTRAST) or mesh_lib.from_first(scores.exists):
        return
    ratios = references.log_ratios(cached, session.params, session.mesh, feed.examples, session.config.train.chunk)
    rows = [
        {"problem_id": problem, "sample": int(sample), "log_ratio": ratio}
        for (problem, _, sample), ratio in zip((e.name.rpartition("/") for e in feed.examples), ratios, strict=True)
    ]
    mesh_lib.from_first(lambda: write_atomic(scores, "".join(map(json_line, rows))))
