"""How long a configuration takes: how often each stage calls each program, times what a call takes.

Lengths of samples are not known beforehand. They are taken for exponential, cut at their limit, which a share of them
reaches: `Lengths(0.1)` have a mean of 39% of the limit, `Lengths(1)` are the worst case. Refilled slots leave little
idle; the share that works is assumed. Compiling, grading and reading weights are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dail_jax import config as config_lib
from dail_jax.ahead import programs
from dail_jax.ahead.programs import Job
from dail_jax.data import records
from dail_jax.errors import UserError
from dail_jax.model.families import ModelConfig
from dail_jax.sample import engine
from dail_jax.train import methods

OCCUPANCY = 0.9  # the share of slots that draw; benchmarks/sampler.py measures 0.94 on lengths with a long tail


@dataclass(frozen=True)
class Lengths:
    """Samples' lengths, of which the share `at_limit` reaches the limit."""

    at_limit: float

    def reach(self, tokens: int, limit: int) -> float:
        """The share of samples that have at least so many tokens."""
        return self.at_limit ** (tokens / limit)

    def mean(self, limit: int) -> float:
        return limit if self.at_limit == 1 else limit * (1 - self.at_limit) / -math.log(self.at_limit)


@dataclass(frozen=True)
class Call:
    """How often a part of a stage calls a program; for decoding, how many tokens each slot draws."""

    part: str
    program: str
    times: float


def calls_of(
    stage: str, config: config_lib.Config, model: ModelConfig, sample, lengths: Lengths, prompt: int
) -> list[Call]:
    """What a stage calls. `sample` is the mesh of sampling, which may be abstract; a benchmark's prompts are taken to
    have `prompt` tokens."""
    jobs = {job.name: job for job in programs.jobs_of(config, model)}
    if stage == "generate":
        return _generate(config, jobs["rollouts"], sample, lengths)
    if stage == "train":
        return _train(config, jobs, sample, lengths)
    return _evaluate(config, jobs, sample, lengths, prompt) if stage == "evaluate" else []


def rows_in(data: config_lib.Dataset | None, field: str) -> int:
    """About how many rows a dataset has: by its `size`, or counted; raises UserError if neither is possible."""
    if data is None:
        raise UserError("missing: want the problems with their expert solutions", field=field)
    if data.size is None:
        try:
            return len(records.read_rows(data, need=("problem",)))
        except UserError as error:
            raise UserError(
                f"want about how many rows it has, since they cannot be counted: {error}", field=f"{field}.size"
            ) from None
    rows = data.size if data.limit is None else min(data.size, data.limit)
    held_out = data.hold_out.rows if data.hold_out else 0
    return held_out if data.hold_out and data.hold_out.use == "held_out" else rows - held_out


def draw(
    part: str, job: Job, sample, requests: float, samples: float, mean: float, prompt: int | None = None
) -> list[Call]:
    """`samples` in all, of so many tokens on average, for `requests` prompts: at their longest, or of `prompt` tokens."""
    grid, (prefill, decode) = job.grid(sample), programs.names_of(job, sample)
    share = 1.0 if prompt is None else min(engine.bucket(prompt) / grid.prompt_slots, 1.0)
    return [
        Call(part, prefill, requests * share),
        Call(part, decode, samples * mean / (grid.slots * OCCUPANCY)),
    ]


def _generate(config: config_lib.Config, job: Job, sample, lengths: Lengths) -> list[Call]:
    rows = rows_in(config.data, "data")
    passes = 2 if methods.of(config).rationalises else 1  # at worst, all problems are drawn again
    count = passes * rows
    return draw("traces", job, sample, count, count * config.generate.samples, lengths.mean(job.limit))


def _train(config: config_lib.Config, jobs: Mapping[str, Job], sample, lengths: Lengths) -> list[Call]:
    cfg, method = config.train, methods.of(config)
    names = programs.train_names(config)
    rows = rows_in(config.data, "data")
    if method.source == "samples":
        online, job = cfg.online, jobs["online rollouts"]
        rounds = -(-cfg.epochs * rows // online.problems)
        groups = rounds * online.problems * (2 if method.hinted else 1)  # at worst, all groups are drawn again
        updates = rounds * online.problems * online.group // cfg.batch_size
        drawn = draw("samples", job, sample, groups, groups * online.group, lengths.mean(job.limit))
        return [*drawn, Call("updates", names.step, updates)]
    kept = config.filters.keep if isinstance(config.filters.keep, int) else config.generate.samples
    examples = rows * (min(kept, config.generate.samples) if method.source == "traces" else 1)
    found = [Call("updates", names.step, cfg.epochs * (-(-examples // cfg.batch_size)))]
    if method.caches(cfg):
        batches = -(-examples * cfg.accumulate // cfg.batch_size)
        found.insert(0, Call("references", names.references, batches * len(method.roles)))
    return found


def _evaluate(config: config_lib.Config, jobs: Mapping[str, Job], sample, lengths: Lengths, prompt: int) -> list[Call]:
    cfg, job, found = config.evaluate, jobs["evaluation"], []
    for benchmark in cfg.benchmarks:
        problems = rows_in(benchmark.rows, f"evaluate.benchmarks.{benchmark.name}.rows")
        count = problems * cfg.samples
        found += draw(benchmark.name, job, sample, problems, count, lengths.mean(job.limit), prompt)
        if cfg.force is None or benchmark.answer == "none":
            continue
        answer = lengths.mean(cfg.force.max_tokens)
        for cut in cfg.cuts:
            asked = count * lengths.reach(cut, job.limit)
            if job.room:  # drawn where the sample lies, after the text that asks for it
                found += draw(benchmark.name, job, sample, 0, asked, programs.ASKING + answer)
            else:
                length = prompt + cut + programs.ASKING
                found += draw(benchmark.name, jobs["forced answers"], sample, asked, asked, answer, length)
    return found


def hours(calls: Iterable[Call], seconds: Mapping[str, float]) -> float:
    """What calls take, given what one of each program takes."""
    return sum(call.times * seconds[call.program] for call in calls) / 3600
