"""Training on what the student writes now: the methods whose source is `samples`.

A rollout round draws a group of samples for each of a few problems with the current LoRA, and then makes
problems * group / batch_size updates. Graded methods (`grpo`, arXiv 2402.03300) compare each reward with the mean of its
group. Hinted ones (`nurl`, arXiv 2509.25666) draw a group again if all of it fails, with a hint in the prompt, and learn
from the new samples under the prompt with the hint. Everything that is drawn follows from the seed, the round and the
place in the round, and checkpoints are taken between rounds, so resuming is exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.data import batches, traces
from dail_jax.data.batches import Example
from dail_jax.data.records import Row
from dail_jax.errors import UserError
from dail_jax.evaluate import answers
from dail_jax.evaluate.grading import Grader
from dail_jax.metrics import Metrics, log
from dail_jax.rundir import Interrupt
from dail_jax.sample.engine import Engine
from dail_jax.sample.sampler import Request, ScoredSample
from dail_jax.stages import golds
from dail_jax.stages.recipes import traces_path
from dail_jax.stages.session import Session
from dail_jax.text import open_tag
from dail_jax.train import loop
from dail_jax.train.methods import Method


@dataclass(frozen=True)
class Task:
    """A problem to practise on: its prompts by role with each of its solutions, and its answer.

    `hint`, if any, is the student's prompt with a hint.
    """

    problem_id: str
    views: tuple[dict[str, tuple[int, ...]], ...]
    gold: str
    hint: tuple[int, ...] | None = None

    @property
    def student(self) -> tuple[int, ...]:
        return self.views[0]["student"]

    @property
    def longest(self) -> int:
        """Tokens of its longest prompt."""
        return max(len(ids) for view in (*self.views, {"hint": self.hint or ()}) for ids in view.values())


# ---------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------


def tasks_of(session: Session, method: Method, rows: list[Row], metrics: Metrics) -> list[Task]:
    """All problems whose prompts leave room for a response; the others are dropped and counted."""
    config, kind = session.config, golds.answer_type(session.config)
    room = config.train.max_tokens - config.train.online.sampling.max_tokens
    hints = hints_of(session, rows) if method.hinted else {}
    tasks = []
    for row, built in zip(rows, session.prompts.build_views(rows), strict=True):
        views = tuple({role: tuple(getattr(one, role)) for role in method.prompted} for one in built)
        hint = hints.get(row.problem_id)
        hinted = tuple(session.prompts.hinted(row.problem, hint, row.before)) if hint else None
        tasks.append(Task(row.problem_id, views, golds.gold_of(row, kind) or "", hinted))
    session.prompts.report("train")
    longest = config.train.online.max_prompt_tokens
    short = [task for task in tasks if task.longest <= longest]
    skipped = f"problems skipped: their prompts are above train.online.max_prompt_tokens={longest}"
    metrics.left_out(skipped, len(tasks) - len(short), len(tasks))
    fitting = [task for task in short if task.longest <= room]
    dropped = f"problems dropped: prompt and response are above train.max_tokens={config.train.max_tokens}"
    metrics.left_out(dropped, len(short) - len(fitting), len(tasks))
    if not fitting:
        field = "train.max_tokens" if short else "train.online.max_prompt_tokens"
        raise UserError("nothing to train on: every problem was dropped", field=field)
    return fitting


def hints_of(session: Session, rows: list[Row]) -> dict[str, str | list[str]]:
    """By problem id: its waypoints, or the beginning of its first kept trace (of its first trace if none is kept)."""
    online = session.config.train.online
    if online.hint == "waypoints":
        found = session.prompts.values_all(rows)
        return {row.problem_id: values["waypoints"] for row, (values, _) in zip(rows, found, strict=True)}
    hints: dict[str, str | list[str]] = {}
    for trace in sorted(traces.read(traces_path(session.config)), key=lambda t: t.drop is not None):
        ids = trace.response_ids
        hints.setdefault(trace.problem_id, session.tokenizer.decode(ids[: min(online.hint_tokens, len(ids) // 2)]))
    return hints


def chosen_problems(count: int, size: int, number: int, seed: int) -> list[int]:
    """The problems of round `number`: the next `size` of an endless sequence of shuffled passes over all of them."""
    chosen = []
    for i in range(number * size, (number + 1) * size):
        order = np.random.default_rng((seed, i // count)).permutation(count)
        chosen.append(int(order[i % count]))
    return chosen


# Of responses that are yet to be drawn, what is assumed: exponential lengths, by mean length over limit. With the first,
# a tenth of them reach the limit.
MEANS = 1 / np.log(10) / np.array([1, 2, 4, 8])
ASSUMED = 1024  # batches for each


def widths_of(tasks: list[Task], longest: int, cfg: config_lib.Train) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """The widths, at most `train.shapes`, of batches of responses of up to `longest` tokens to these problems; and the
    lengths, by role and of the `response`, that they have room for, whatever is drawn.

    They are those that would pad batches of assumed lengths least. All rounds have one program for each of them.
    """
    prompts = [
        {**view, "student": context}
        for task in tasks
        for view in task.views
        for context in (task.student, task.hint)
        if context is not None
    ]
    shown = np.array([len(one["student"]) for one in prompts])
    rng = np.random.default_rng(0)
    lengths = rng.exponential(longest * MEANS, (ASSUMED, cfg.batch_size, len(MEANS))).clip(1, longest)
    batched = (rng.choice(shown, lengths.shape) + lengths.astype(int)).max(1)
    widths = batches.chosen_widths([*batched.ravel(), shown.max() + longest], cfg.bucket, cfg.shapes)
    fitting = [
        (one, min(longest, width - n)) for one, n in zip(prompts, shown, strict=True) for width in widths if n < width
    ]
    room = {role: np.array([len(one[role]) + n for one, n in fitting]) for role in prompts[0]}
    return widths, {**room, "response": np.array([n for _, n in fitting])}


# ---------------------------------------------------------------------------------------------------
# A round
# ---------------------------------------------------------------------------------------------------


def rollout_round(
    session: Session,
    method: Method,
    sampler: Engine,
    grader: Grader,
    tasks: list[Task],
    number: int,
    interrupt: Interrupt,
) -> tuple[list[Example], dict[str, float]] | None:
    """The examples of rollout round `number`, group by group, and its metrics; None if it was interrupted.

    Of K expert solutions, the privileged student of sample i in a group is shown number i mod K.
    """
    online = session.config.train.online
    chosen = [tasks[i] for i in chosen_problems(len(tasks), online.problems, number, session.config.seed)]
    groups = draw_groups(
        sampler, {f"online/{number}/{i}": t.student for i, t in enumerate(chosen)}, online.group, interrupt
    )
    if groups is None:
        return None
    contexts = [task.student for task in chosen]  # the prompt that each group was drawn under
    figures = {"response_tokens": float(np.mean([len(s.tokens) for group in groups for s in group]))}
    advantages = np.zeros((len(chosen), online.group))
    if method.graded:
        rewards = rewards_of(session, grader, chosen, groups)
        figures |= {"reward": float(rewards.mean()), "solved": float(rewards.any(1).mean())}
        if method.hinted:
            lost = {i: t.hint for i, t in enumerate(chosen) if t.hint is not None and not rewards[i].any()}
            prompts = {f"online/{number}/{i}/hint": hint for i, hint in lost.items()}
            again = draw_groups(sampler, prompts, online.group, interrupt)
            if again is None:
                return None
            for (i, hint), group in zip(lost.items(), again, strict=True):
                groups[i], contexts[i] = group, hint
            rewards = rewards_of(session, grader, chosen, groups)
            figures |= {"hinted": len(lost) / len(chosen), "reward_with_hints": float(rewards.mean())}
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    examples = []
    for task, context, group, row in zip(chosen, contexts, groups, advantages, strict=True):
        for s, advantage in zip(group, row, strict=True):
            prompts = {**task.views[s.sample % len(task.views)], "student": context}
            name = f"{task.problem_id}/{s.sample}"
            examples.append(Example(name, prompts, tuple(s.tokens.tolist()), tuple(s.logq.tolist()), float(advantage)))
    return examples, figures


def draw_groups(
    sampler: Engine, prompts: dict[str, tuple[int, ...]], group: int, interrupt: Interrupt
) -> list[list[ScoredSample]] | None:
    """`group` samples for each prompt, in order; None if interrupted. The names determine the randomness."""
    found: dict[str, list[ScoredSample]] = {name: [] for name in prompts}
    requests = [Request(name, (p,), tuple(range(group)), sampler.max_tokens) for name, p in prompts.items()]
    for sample in sampler.run(requests):
        if sample is not None:
            found[sample.name].append(sample)
        if (sample is None or len(found[sample.name]) == group) and interrupt.wanted:
            return None
    return [sorted(samples, key=lambda s: s.sample) for samples in found.values()]


def rewards_of(session: Session, grader: Grader, tasks: list[Task], groups: list[list[ScoredSample]]) -> np.ndarray:
    """Rewards [problems, group]: 1 for a right answer, otherwise 0."""
    opening, kind = session.config.prompts.opening, golds.answer_type(session.config)

    def answer(s: ScoredSample) -> str | None:
        kept = s.tokens[:-1] if s.finish == "stop" else s.tokens
        text = opening + session.tokenizer.decode(kept.tolist(), keep_special=True)
        return answers.extract(text, kind, tag=open_tag(opening) or "think")

    def verdicts() -> list[list[float]]:
        pairs = [(task, s) for task, group in zip(tasks, groups, strict=True) for s in group]
        items = [(answer(s), task.gold, kind) for task, s in pairs]
        return np.reshape([v.correct for v in grader.grade_many(items)], (len(groups), -1)).astype(float).tolist()

    return np.array(mesh_lib.from_first(verdicts))


# ---------------------------------------------------------------------------------------------------
# The feed
# ---------------------------------------------------------------------------------------------------


class Rounds:
    """Feeds batches of what the student writes, round after round; training can only resume between rounds."""

    def __init__(self, session: Session, method: Method, rows: list[Row], metrics: Metrics):
        cfg, online = session.config.train, session.config.train.online
        self.session, self.method, self.tasks = session, method, tasks_of(session, method, rows, metrics)
        self.per_round = online.problems * online.group // cfg.batch_size
        rounds = -(-cfg.epochs * len(self.tasks) // online.problems)
        self.steps = rounds * self.per_round
        self.local = mesh_lib.local_rows(session.mesh, cfg.batch_size // cfg.accumulate)
        self.widths, self.room = widths_of(self.tasks, online.sampling.max_tokens, cfg)
        self.resources = contextlib.ExitStack()
        self.grader = self.resources.enter_context(Grader())
        log(
            f"train: {method.name} on {len(self.tasks)} problems; {rounds} rounds of {online.problems} x "
            f"{online.group} samples and {self.per_round} updates, in {len(self.widths)} widths up to {self.widths[-1]} tokens"
        )

    def restore(self, step: int, saved: Mapping[str, Any]) -> None:
        """Nothing to do: a round follows from its number and the state."""

    def next(self, step: int, state: Any, interrupt: Interrupt) -> loop.Batch | None:
        session, cfg = self.session, self.session.config.train
        number, place = divmod(step, self.per_round)
        if place == 0:
            sampling = cfg.online.sampling
            with jax.set_mesh(session.sample_mesh):
                sampler = session.sampler(
                    sampling,
                    slots=cfg.online.slot_count,
                    max_tokens=sampling.max_tokens,
                    pages=cfg.online.pages,
                    kv_dtype=cfg.online.kv_dtype,
                    lora=state.lora,
                )
                drawn = rollout_round(session, self.method, sampler, self.grader, self.tasks, number, interrupt)
            if drawn is None:
                return None
            self.examples, self.figures = drawn
            # Spreads each group over several updates, since a single problem makes a poor gradient.
            order = np.random.default_rng((session.config.seed, number)).permutation(len(self.examples))
            self.order = order.reshape(self.per_round, cfg.accumulate, -1)
            roles = self.method.prompted
            self.assemble = batches.Assemble(
                self.examples, cfg.bucket, cfg.accumulate, self.local, roles, widths=self.widths, room=self.room
            )
        names = np.array([e.name for e in self.examples])[self.order[place]]
        last = place == self.per_round - 1
        return loop.Batch(
            self.assemble.map(self.order[place].ravel()), names, {"round": number, **self.figures}, resumable=last
        )

    def progress(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.resources.close()
