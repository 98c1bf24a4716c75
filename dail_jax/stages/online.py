"""Training on what the student writes now: `grpo`, `nurl` and `onpolicy`.

A round draws a group of samples for each of some problems with the LoRA as it is then, and makes the updates that
problems * group / batch_size gives. `grpo` (arXiv 2402.03300) weighs right answers against their group's mean; `nurl`
(arXiv 2509.25666) draws a group in which all fail again, with a hint in the prompt, and learns from that under the
prompt with the hint; `onpolicy` has the frozen roles look at the student's own samples instead. All that is drawn
follows from (seed, round, place in the round), and checkpoints lie between rounds, so that resuming is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from dail_jax import mesh as mesh_lib
from dail_jax.data import batches
from dail_jax.data.batches import Example
from dail_jax.data.records import Row
from dail_jax.data.waypoints import final_answer
from dail_jax.errors import UserError
from dail_jax.evaluate.grading import Grader, extract
from dail_jax.metrics import Metrics, log, progress
from dail_jax.rundir import Interrupt, Interrupted, RunDir, Stage
from dail_jax.sample.engine import Engine
from dail_jax.sample.sampler import Request, ScoredSample
from dail_jax.stages.generate import read_traces
from dail_jax.stages.session import Session
from dail_jax.stages.train import abstract_state, complain, prepare, roles_of
from dail_jax.text import open_tag
from dail_jax.train import optimizer
from dail_jax.train import step as step_lib


@dataclass(frozen=True)
class Task:
    """A problem to practise on: prompts by role (`hint`: the student's with a hint, if there is one), its answer."""

    problem_id: str
    prompts: dict[str, tuple[int, ...]]
    gold: str


# ---------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------


def tasks_of(session: Session, rows: list[Row]) -> list[Task]:
    """All problems whose prompts leave room for a response; the others are dropped and counted."""
    config = session.config
    room = config.train.max_tokens - config.train.online.sampling.max_tokens
    hints = hints_of(session, rows) if config.train.objective == "nurl" else {}
    tasks = []
    for row in rows:
        built = session.prompts.build(row)
        prompts = {role: tuple(getattr(built, role)) for role in roles_of(config)}
        if hint := hints.get(row.problem_id):
            prompts["hint"] = tuple(session.prompts.hinted(row.problem, hint))
        tasks.append(Task(row.problem_id, prompts, final_answer(row) or ""))
    session.prompts.report("train")
    fitting = [task for task in tasks if max(map(len, task.prompts.values())) <= room]
    if len(fitting) < len(tasks):
        log(f"train: dropped {len(tasks) - len(fitting)} problems: prompt and response above train.max_tokens")
    if not fitting:
        raise UserError("nothing to train on: every problem was dropped", field="train.max_tokens")
    return fitting


def hints_of(session: Session, rows: list[Row]) -> dict[str, str | list[str]]:
    """By problem: its waypoints, or how its first kept trace (else its first) begins."""
    online = session.config.train.online
    if online.hint == "waypoints":
        return {row.problem_id: session.prompts.values(row)[0]["waypoints"] for row in rows}
    hints: dict[str, str | list[str]] = {}
    for trace in sorted(read_traces(session.config), key=lambda t: t["drop"] is not None):
        ids = trace["response_ids"]
        hints.setdefault(trace["problem_id"], session.tokenizer.decode(ids[: min(online.hint_tokens, len(ids) // 2)]))
    return hints


def places(count: int, size: int, number: int, seed: int) -> list[int]:
    """Which problems round `number` takes: the next `size` of one shuffled pass over all of them after another."""
    chosen = []
    for i in range(number * size, (number + 1) * size):
        order = np.random.default_rng((seed, i // count)).permutation(count)
        chosen.append(int(order[i % count]))
    return chosen


# ---------------------------------------------------------------------------------------------------
# A round
# ---------------------------------------------------------------------------------------------------


def play(
    session: Session, sampler: Engine, grader: Grader, tasks: list[Task], number: int, interrupt: Interrupt
) -> tuple[list[Example], dict[str, float]] | None:
    """A round's examples, group by group, and its figures; None when it was interrupted."""
    cfg, online = session.config.train, session.config.train.online
    chosen = [tasks[i] for i in places(len(tasks), online.problems, number, session.config.seed)]
    drawn = draw(
        sampler, {f"online/{number}/{i}": t.prompts["student"] for i, t in enumerate(chosen)}, online.group, interrupt
    )
    if drawn is None:
        return None
    groups, roles = list(drawn.values()), ["student"] * len(chosen)
    figures = {"response_tokens": float(np.mean([len(s.tokens) for group in groups for s in group]))}
    advantages = np.zeros((len(chosen), online.group))
    if cfg.objective != "onpolicy":
        rewards = grade(session, grader, chosen, groups)
        figures |= {"reward": float(rewards.mean()), "solved": float(rewards.any(1).mean())}
        lost = [i for i, t in enumerate(chosen) if "hint" in t.prompts and not rewards[i].any()]
        if cfg.objective == "nurl":
            again = draw(
                sampler, {f"online/{number}/{i}/hint": chosen[i].prompts["hint"] for i in lost}, online.group, interrupt
            )
            if again is None:
                return None
            for i, group in zip(lost, again.values(), strict=True):
                groups[i], roles[i] = group, "hint"
            rewards = grade(session, grader, chosen, groups)
            figures |= {"hinted": len(lost) / len(chosen), "reward_with_hints": float(rewards.mean())}
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    examples = []
    for task, role, group, row in zip(chosen, roles, groups, advantages, strict=True):
        prompts = {name: task.prompts[role if name == "student" else name] for name in roles_of(session.config)}
        for s, advantage in zip(group, row, strict=True):
            logq = () if cfg.objective == "onpolicy" else tuple(s.logq.tolist())
            name = f"{task.problem_id}/{s.sample}"
            examples.append(Example(name, prompts, tuple(s.tokens.tolist()), logq, float(advantage)))
    return examples, figures


def draw(
    sampler: Engine, prompts: dict[str, tuple[int, ...]], group: int, interrupt: Interrupt
) -> dict[str, list[ScoredSample]] | None:
    """`group` samples for each name, in order; None when it was interrupted."""
    found: dict[str, list[ScoredSample]] = {name: [] for name in prompts}
    requests = [Request(name, (p,), tuple(range(group)), sampler.max_tokens) for name, p in prompts.items()]
    for sample in sampler.run(requests):
        found[sample.name].append(sample)
        if len(found[sample.name]) == group and interrupt.wanted:
            return None
    return {name: sorted(samples, key=lambda s: s.sample) for name, samples in found.items()}


def grade(session: Session, grader: Grader, tasks: list[Task], groups: list[list[ScoredSample]]) -> np.ndarray:
    """1 for a right answer, else 0: [problems, group]."""
    opening = session.config.prompts.opening

    def answer(s: ScoredSample) -> str | None:
        kept = s.tokens[:-1] if s.finish == "stop" else s.tokens
        text = opening + session.tokenizer.decode(kept.tolist(), keep_special=True)
        return extract(text, tag=open_tag(opening) or "think")

    def verdicts() -> list[list[float]]:
        pairs = [(task, s) for task, group in zip(tasks, groups, strict=True) for s in group]
        items = [(answer(s), task.gold, "math") for task, s in pairs]
        return np.reshape([v.correct for v in grader.grade_many(items)], (len(groups), -1)).astype(float).tolist()

    return np.array(mesh_lib.from_first(verdicts))


# ---------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------


def fit(session: Session, rows: list[Row], run_dir: RunDir, metrics: Metrics, stage: Stage) -> None:
    """Trains from the newest checkpoint to the end; the last update is always saved."""
    config, mesh = session.config, session.mesh
    cfg, online = config.train, config.train.online
    tasks = tasks_of(session, rows)
    per_round = online.problems * online.group // cfg.batch_size
    rounds = -(-cfg.epochs * len(tasks) // online.problems)
    steps, micro = rounds * per_round, cfg.batch_size // cfg.accumulate
    local = mesh_lib.local_rows(mesh, micro)
    run = prepare(session, steps, run_dir.path / "checkpoints", stage.identity)
    log(
        f"train: {cfg.objective} on {len(tasks)} problems; {rounds} rounds of {online.problems} x {online.group} "
        f"samples and {per_round} updates"
    )
    restored = run.store.restore(abstract_state(session, run.tx, run.layout))
    if restored is None:
        step, state = 0, step_lib.init(jax.random.key(config.seed), session.model, cfg, run.tx, mesh)
    else:
        step, state, _ = restored
        log(f"train: resuming at update {step}")
    metrics.rewind(step)
    saved = step
    sampler = session.sampler(online.sampling, slots=online.slots, max_tokens=online.sampling.max_tokens)
    update = step_lib.make_update(step_lib.recipe(session.model, cfg), run.tx, run.layout)
    rate = optimizer.schedule(cfg.optimizer, steps)
    with progress("training", steps, "updates", step) as bar, Interrupt() as interrupt, Grader() as grader:
        for number in range(step // per_round, rounds):
            sampler.lora = state.lora  # of the same shapes: nothing is compiled again
            played = play(session, sampler, grader, tasks, number, interrupt)
            if played is not None:
                examples, figures = played
                assemble = batches.Assemble(examples, cfg.bucket, cfg.accumulate, local, roles_of(config))
                # A group's samples in different updates: one problem alone does not give a direction.
                order = np.random.default_rng((config.seed, number)).permutation(len(examples))
                for chosen in order.reshape(per_round, cfg.accumulate, -1):
                    batch = assemble.map(chosen.ravel())
                    state, out = update(session.params, state, mesh_lib.to_devices(batch, mesh, micro))
                    step += 1
                    values = {k: np.asarray(v).item() for k, v in out.items() if k not in ("bad_rows", "finite")}
                    metrics.write(
                        step, learning_rate=np.asarray(rate(step - 1)).item(), round=number, **values, **figures
                    )
                    if not bool(out["finite"]):
                        complain(examples, chosen, np.asarray(out["bad_rows"]), step)
                        if int(state.skipped) >= cfg.max_skipped:
                            raise UserError(
                                f"{cfg.max_skipped} updates in a row were not finite: lower the learning "
                                "rate; the last good checkpoint is kept",
                                field="train",
                            )
                    bar.advance(note=" ".join(f"{k} {v:.3g}" for k, v in figures.items()))
            stop = played is None or (interrupt.wanted and step < steps)
            if step > saved and (stop or step == steps or step - saved >= cfg.save_every):
                run.store.save(step, state, {"round": number + 1})
                saved = step
            if stop:
                raise Interrupted(f"train: stopped and saved at update {step} of {steps}; call again to go on")
    run.store.close()
    log(f"train: {steps} updates done; wrote {run_dir.path / 'checkpoints'}")
