"""train: the LoRA, by the method that `train.objective` names (`dail_jax.train.methods`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import store
from dail_jax.checkpoint.store import Store
from dail_jax.data import batches, traces
from dail_jax.data.batches import Example
from dail_jax.data.records import Row
from dail_jax.errors import UserError
from dail_jax.metrics import Metrics, log
from dail_jax.model.lora import Lora
from dail_jax.rundir import Interrupt, RunDir, Stage, json_line, write_atomic
from dail_jax.stages import drops, recipes
from dail_jax.stages.online import Rounds
from dail_jax.stages.recipes import rows_of, traces_path
from dail_jax.stages.session import Session, open_session, release_decoding
from dail_jax.train import loop, methods, optimizer, references
from dail_jax.train import step as step_lib


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
                release_decoding()
                feed = Epochs(session, method, examples_of(session, method, rows, metrics), run_dir, stage)
            fit(session, feed, run_dir, metrics, stage)
            metrics.close()


def fit(session: Session, feed: loop.Feed, run_dir: RunDir, metrics: Metrics, stage: Stage) -> None:
    """Trains from the newest checkpoint to the end; the last update is always saved."""
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
    folder = run_dir.path / "checkpoints"
    loop.run(trainer, feed, Store(folder, cfg.keep_checkpoints, stage.identity), metrics)
    log(f"train: {feed.steps} updates done; wrote {folder}")


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


def examples_of(session: Session, method: methods.Method, rows: list[Row], metrics: Metrics) -> list[Example]:
    """What is trained on: kept traces or expert solutions. Those that are too long are dropped and counted."""
    config, limit, marked = session.config, session.config.train.max_tokens, []
    built = dict(zip((row.problem_id for row in rows), session.prompts.build_all(rows), strict=True))
    session.prompts.report("train")

    def example(name: str, problem_id: str, response) -> Example:
        prompts = built[problem_id]
        return Example(name, {role: tuple(getattr(prompts, role)) for role in method.prompted}, tuple(response))

    if method.source == "solutions":
        metrics.left_out("solutions cut to fit", sum(prompts.cut for prompts in built.values()), len(rows))
        examples = [example(row.problem_id, row.problem_id, built[row.problem_id].expert) for row in rows]
    else:
        path = traces_path(config)
        found = traces.read(path)
        traces.verify(found, built, session.tokenizer, session.model.V, path)
        marked = drops.mark(found, rows, config)
        kept = [trace for trace in marked if trace.drop is None]
        examples = [example(trace.name, trace.problem_id, trace.response_ids) for trace in kept]
    fitting = [e for e in examples if max(map(len, e.prompts.values())) + len(e.response) <= limit]
    dropped = f"examples dropped: prompt and response are above train.max_tokens={limit}"
    metrics.left_out(dropped, len(examples) - len(fitting), len(examples))
    if not fitting and method.source == "solutions":
        raise UserError(
            f"nothing to train on: every example is above train.max_tokens={limit}", field="train.max_tokens"
        )
    if not fitting:
        raise UserError(drops.nothing_left(marked, len(examples), config), file=traces_path(config))
    return fitting


class Epochs:
    """Feeds batches of fixed examples, epoch after epoch. The seed alone determines their order."""

    def __init__(
        self, session: Session, method: methods.Method, examples: list[Example], run_dir: RunDir, stage: Stage
    ):
        config, cfg = session.config, session.config.train
        self.workers, self.examples, self.accumulate, self.folder = cfg.workers, examples, cfg.accumulate, run_dir.path
        self.plan = batches.Plan(examples, cfg.batch_size, cfg.epochs, config.seed)
        self.steps = len(self.plan)
        self.identity = {
            "examples": batches.examples_digest(examples),
            "batch_size": cfg.batch_size,
            "seed": config.seed,
            "steps": self.steps,
        }
        local = mesh_lib.local_rows(session.mesh, cfg.batch_size // cfg.accumulate)
        self.assemble = batches.Assemble(examples, cfg.bucket, cfg.accumulate, local, method.prompted)
        made_of = f"{stage.sha256('model.path')} {self.identity['examples']}"
        cached = cache(session, method, examples, run_dir, made_of) if method.caches(cfg) else None
        if cached is not None:
            self.assemble = batches.Assemble(
                examples, cfg.bucket, cfg.accumulate, local, ("student",), method.roles, cached
            )
        self.batches: Any = None
        self.names = np.array([e.name for e in examples] + [""])  # index -1 marks an empty row, which has no name
        log(
            f"train: {method.name} on {len(examples)} examples, {self.steps} updates of {cfg.batch_size}; "
            f"{batches.padding_share(self.plan, self.assemble):.0%} of trained positions are padding"
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
    session: Session, method: methods.Method, examples: list[Example], run_dir: RunDir, made_of: str
) -> references.References | None:
    """The frozen roles' states on disk; None if they would exceed `train.references_gib`."""
    cfg = session.config.train
    tokens = sum(len(e.response) for e in examples)
    need = references.bytes_needed(tokens, len(method.roles), session.model.D, session.params["norm"].dtype)
    if need > cfg.references_gib * 2**30:
        size = f"{need / 2**30:.1f} GiB"
        log(f"train: references would take {size}, above train.references_gib; computing them in every step")
        return None
    key = f"{session.config.model.dtype} {made_of}"
    scores = run_dir.path / "token_scores.jsonl"  # for the report's trace viewer
    if not mesh_lib.from_first(lambda: references.is_valid(run_dir.path / "references", key)):
        scores.unlink(missing_ok=True)  # they belong to other references
    found = references.compute(
        run_dir.path / "references",
        key,
        step_lib.spec_of(session.model, cfg),
        session.params,
        session.mesh,
        examples,
        cfg.batch_size // cfg.accumulate,
        cfg.bucket,
    )
    if jax.process_count() == 1 and not scores.exists() and set(method.roles) >= set(methods.CONTRAST):
        ratios = references.log_ratios(found, session.params, examples, cfg.chunk)
        names = [e.name.rpartition("/") for e in examples]
        write_atomic(
            scores,
            "".join(
                json_line({"problem_id": problem, "sample": int(sample), "log_ratio": ratio})
                for (problem, _, sample), ratio in zip(names, ratios, strict=True)
            ),
        )
    return found
