"""train: the LoRA, by contrast against the two frozen roles, or by likelihood of traces or expert solutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import store
from dail_jax.checkpoint.store import Store
from dail_jax.data import batches
from dail_jax.data.batches import Example
from dail_jax.data.records import Row, read_rows
from dail_jax.errors import UserError
from dail_jax.metrics import Metrics, log, progress
from dail_jax.model.lora import Lora
from dail_jax.rundir import Interrupt, Interrupted, RunDir, Stage, json_line, write_atomic
from dail_jax.stages import recipes
from dail_jax.stages.generate import check_golds, mark_drops, read_traces
from dail_jax.stages.recipes import traces_path
from dail_jax.stages.session import Session, open_session, release_decoding
from dail_jax.train import optimizer, references
from dail_jax.train import step as step_lib


def run(config: config_lib.Config) -> None:
    cfg = config.train
    if cfg.objective == "none":
        log("train: nothing to train (train.objective: none)")
        return
    if config.data is None:
        raise UserError("missing: training wants rows", field="data")
    rows = read_rows(config.data)
    if cfg.is_online:
        check_golds(config, rows)
    if cfg.reads_traces:
        read_traces(config)
        mesh_lib.from_first(lambda: recipes.check_traces(config))
    with RunDir(config) as run_dir, run_dir.stage(recipes.train(config, rows)) as stage:
        if stage.done:
            log(f"train: already done, see {run_dir.path / 'checkpoints'}")
            return
        session = open_session(config)
        with jax.set_mesh(session.mesh):
            metrics = Metrics(run_dir.path, config.log, "train")
            if cfg.is_online:
                from dail_jax.stages import online  # which builds on what is here

                online.fit(session, rows, run_dir, metrics, stage)
            else:
                release_decoding()
                fit(session, examples_of(session, rows), run_dir, metrics, stage)
            metrics.close()


# ---------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------


def examples_of(session: Session, rows: list[Row]) -> list[Example]:
    """What is trained on: kept traces, or expert replies for `sft`; over-long ones are dropped and counted."""
    config, limit = session.config, session.config.train.max_tokens
    built = {row.problem_id: session.prompts.build(row) for row in rows}
    session.prompts.report("train")
    roles = roles_of(config)

    def example(name: str, problem_id: str, response) -> Example:
        prompts = built[problem_id]
        return Example(name, {role: tuple(getattr(prompts, role)) for role in roles}, tuple(response))

    if config.train.objective == "sft":
        examples = [example(row.problem_id, row.problem_id, built[row.problem_id].expert) for row in rows]
    else:
        traces = read_traces(config)
        unknown = next((t["problem_id"] for t in traces if t["problem_id"] not in built), None)
        if unknown is not None:
            raise UserError(f"got a trace of problem {unknown!r}, which is not in the data", file=traces_path(config))
        mark_drops(traces, rows, config)
        alien = next((n for n, t in enumerate(traces, 1) if max(t["response_ids"], default=0) >= session.model.V), None)
        if alien is not None:
            raise UserError(
                f"got a token id at or above the model's vocabulary of {session.model.V}",
                file=traces_path(config),
                row=alien,
                field="response_ids",
            )
        examples = [
            example(f"{t['problem_id']}/{t['sample']}", t["problem_id"], t["response_ids"])
            for t in traces
            if t["drop"] is None
        ]
    fitting = [e for e in examples if max(map(len, e.prompts.values())) + len(e.response) <= limit]
    if len(fitting) < len(examples):
        log(f"train: dropped {len(examples) - len(fitting)} examples above train.max_tokens={limit}")
    if not fitting:
        raise UserError("nothing to train on: every example was dropped", file=traces_path(config))
    return fitting


def roles_of(config: config_lib.Config) -> tuple[str, ...]:
    return ("student", *(step_lib.REFERENCES if config.train.objective in ("dail", "onpolicy") else ()))


# ---------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The parts of a training run that restoring needs."""

    tx: Any
    layout: step_lib.State
    store: Store


def prepare(session: Session, steps: int, folder, made_of: str) -> Run:
    cfg = session.config.train
    tx = optimizer.adamw(cfg.optimizer, steps)
    layout = step_lib.shardings(session.model, cfg, tx, session.mesh)
    return Run(tx, layout, Store(folder, cfg.keep_checkpoints, made_of))


def abstract_state(session: Session, tx: Any, layout: step_lib.State) -> step_lib.State:
    cfg = session.config.train
    shapes = jax.eval_shape(lambda key: step_lib.init(key, session.model, cfg, tx, session.mesh), jax.random.key(0))
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)


def fit(session: Session, examples: list[Example], run_dir: RunDir, metrics: Metrics, stage: Stage) -> None:
    """Trains from the newest checkpoint to the end; the last update is always saved."""
    config, cfg, mesh = session.config, session.config.train, session.mesh
    plan = batches.Plan(examples, cfg.batch_size, cfg.epochs, config.seed)
    local = mesh_lib.local_rows(mesh, cfg.batch_size // cfg.accumulate)
    recipe = step_lib.recipe(session.model, cfg)
    identity = {
        "examples": batches.digest(examples),
        "batch_size": cfg.batch_size,
        "workers": cfg.workers,
        "seed": config.seed,
        "steps": len(plan),
    }
    assemble = batches.Assemble(examples, cfg.bucket, cfg.accumulate, local, roles_of(config))
    if cfg.objective == "dail" and cfg.cache_references:
        cached = cache(session, examples, run_dir, recipe, f"{stage.sha256('model.path')} {identity['examples']}")
        if cached is not None:
            assemble = batches.Assemble(
                examples, cfg.bucket, cfg.accumulate, local, ("student",), step_lib.REFERENCES, cached
            )
    run = prepare(session, len(plan), run_dir.path / "checkpoints", stage.identity)
    feed = batches.iterator(plan, assemble, cfg.workers)
    log(
        f"train: {cfg.objective} on {len(examples)} examples, {len(plan)} updates of {cfg.batch_size}; "
        f"{batches.padding_share(plan, assemble):.0%} of trained positions are padding"
    )

    restored = run.store.restore(abstract_state(session, run.tx, run.layout))
    if restored is None:
        start, state = 0, step_lib.init(jax.random.key(config.seed), session.model, cfg, run.tx, mesh)
    else:
        start, state, saved = restored
        changed = [k for k in identity if saved["identity"].get(k) != identity[k]]
        if changed:
            raise UserError(
                f"this run was started with other {', '.join(changed)}: use another run_dir", file=run_dir.path
            )
        feed.set_state(saved["data"])
        log(f"train: resuming at update {start}")
    metrics.rewind(start)  # rows after the checkpoint, or before the first: they come again

    update = step_lib.make_update(recipe, run.tx, run.layout)
    rate = optimizer.schedule(cfg.optimizer, len(plan))
    with progress("training", len(plan), "updates", start) as bar, Interrupt() as interrupt:
        for number in range(start + 1, len(plan) + 1):
            batch = next(feed)
            state, out = update(
                session.params, state, mesh_lib.to_devices(batch, mesh, cfg.batch_size // cfg.accumulate)
            )
            values = {k: float(out[k]) for k in out if k not in ("bad_rows", "finite")}
            metrics.write(
                number,
                learning_rate=float(np.asarray(rate(number - 1))),
                epoch=(number - 1) // plan.per_epoch,
                **values,
            )
            if not bool(out["finite"]):
                complain(examples, plan[number - 1].reshape(cfg.accumulate, -1), np.asarray(out["bad_rows"]), number)
                if int(state.skipped) >= cfg.max_skipped:
                    raise UserError(
                        f"{cfg.max_skipped} updates in a row were not finite: lower the learning rate or gamma; "
                        "the last good checkpoint is kept",
                        field="train",
                    )
            bar.advance(note=f"loss {values['loss']:.4f}")
            last, stop = number == len(plan), interrupt.wanted
            if (number % cfg.save_every == 0 and out["finite"]) or last or stop:
                run.store.save(number, state, {"data": feed.get_state(), "identity": identity})
            if stop and not last:
                raise Interrupted(f"train: stopped and saved at update {number} of {len(plan)}; call again to go on")
    run.store.close()
    log(f"train: {len(plan)} updates done; wrote {run_dir.path / 'checkpoints'}")


def cache(session: Session, examples, run_dir: RunDir, recipe, made_of: str) -> references.References | None:
    """The frozen roles' states on disk, if they fit the budget."""
    cfg = session.config.train
    need = references.size(examples, session.model.D, session.params["norm"].dtype)
    if need > cfg.references_gib * 2**30:
        size = f"{need / 2**30:.1f} GiB"
        log(f"train: references would take {size}, above train.references_gib; computing them in every step")
        return None
    key = f"{session.config.model.dtype} {made_of}"
    scores = run_dir.path / "token_scores.jsonl"  # for the report's trace viewer
    if not mesh_lib.from_first(lambda: references.whole(run_dir.path / "references", key)):
        scores.unlink(missing_ok=True)  # of other references
    found = references.compute(
        run_dir.path / "references",
        key,
        recipe,
        session.params,
        session.mesh,
        examples,
        cfg.batch_size // cfg.accumulate,
        cfg.bucket,
    )
    if jax.process_count() == 1 and not scores.exists():
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


def complain(examples: list[Example], rows: np.ndarray, bad: np.ndarray, number: int) -> None:
    """Names the rows [A, B] of an update that was not finite, or all of them where no row stands out."""
    names = [examples[i].name for i in (rows[bad] if bad.any() else rows.ravel()) if i >= 0]
    log(f"train: update {number} was not finite and is skipped; rows: {', '.join(names[:8])}")


def trained_lora(session: Session, run_dir: RunDir) -> Lora | None:
    """The adapter of a finished `train` stage, or None for the untrained model."""
    if session.config.train.objective == "none":
        return None
    cfg, step = session.config.train, store.final_step(run_dir.output("train", "checkpoints"))
    tx = optimizer.adamw(cfg.optimizer, 1)  # its state is read, and not used
    layout = step_lib.shardings(session.model, cfg, tx, session.mesh)
    return store.load(run_dir.path / "checkpoints", step, abstract_state(session, tx, layout)).lora
