"""generate: mixed policy rollouts for every row of the data -> traces.jsonl.

A problem is durable as soon as its last sample is finished. When all are, the journal is put in the order of the
data, filtered, and becomes traces.jsonl: the same bytes whether or not the run was interrupted.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import strict_json
from dail_jax.data import filters
from dail_jax.data.records import Row, read_rows
from dail_jax.data.waypoints import final_answer
from dail_jax.errors import UserError
from dail_jax.evaluate import files
from dail_jax.evaluate.grading import Grader, extract
from dail_jax.metrics import Metrics, log, progress
from dail_jax.rundir import Interrupt, Interrupted, Journal, RunDir, json_line, write_atomic
from dail_jax.sample.sampler import Request, Sampler, ScoredSample
from dail_jax.stages import recipes
from dail_jax.stages.recipes import traces_path
from dail_jax.stages.session import Session, open_session
from dail_jax.train import methods

JOURNAL, TOLD = recipes.JOURNALS


class Trace(files.Shape):
    """What every row of traces.jsonl must hold; see README for the other fields."""

    problem_id: str
    sample: files.Natural
    response_ids: list[files.Natural]
    text: files.Text
    finish: str


class Drawn(files.Shape):
    """A row of the journal: all traces of a problem."""

    problem_id: str
    traces: list[Trace]


def read_traces(config: config_lib.Config) -> list[dict]:
    path = traces_path(config)
    if not path.is_file():
        raise UserError("no traces yet: run the stage `generate` first", file=path)
    traces: dict[tuple[str, int], dict] = {}
    for line in strict_json.read_lines(path, own=True, torn="refuse", advice="generate again"):
        trace = files.check(line.value, Trace, path, line.number)
        key = trace["problem_id"], trace["sample"]
        if key in traces:
            raise UserError(
                f"got sample {key[1]} of problem {key[0][:80]!r} again, want each once", file=path, row=line.number
            )
        traces[key] = trace
    return list(traces.values())


def run(config: config_lib.Config) -> None:
    if config.data is None:
        raise UserError("missing: generation wants rows", field="data")
    if config.traces is not None:
        log(f"generate: using {traces_path(config)}")
        return
    rows = read_rows(config.data)
    check_golds(config, rows)
    with RunDir(config) as run_dir, run_dir.stage(recipes.generate(config, rows)) as stage:
        if stage.done:
            log(f"generate: already done, see {traces_path(config)}")
            return
        session = open_session(config)
        with jax.set_mesh(session.mesh):
            metrics = Metrics(run_dir.path, config.log, "generate")
            work = rationalise if methods.of(config).rationalises else roll_out
            finished = work(session, rows, run_dir.path / JOURNAL, metrics)
            metrics.close()
        traces = [trace for row in rows for trace in finished.get(row.problem_id, [])]
        counts = mark_drops(traces, rows, config)
        if jax.process_index() == 0:
            write_atomic(traces_path(config), "".join(map(json_line, traces)))
        share = np.mean([t["acceptance"] for t in traces]) if traces else 0.0
        log(
            f"generate: {len(traces)} traces of {len(finished)} problems, {share:.1%} of tokens the student's; "
            + (", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none dropped")
        )
        log(f"          wrote {traces_path(config)}")


def roll_out(
    session: Session, rows: list[Row], journal_path: Path, metrics: Metrics, name: str = "generate"
) -> dict[str, list[dict]]:
    """Every problem's traces by problem id, drawing what the journal does not have; `name` decides the randomness."""
    cfg = session.config.generate
    journal = Journal(journal_path)
    finished = {row["problem_id"]: row["traces"] for row in files.check_all(journal.rows, Drawn, journal.path)}
    names = {f"{name}/{row.problem_id}": row for row in rows}
    prompts = {row.problem_id: session.prompts.build(row) for row in rows}
    session.prompts.report("generate")
    of = "" if name == "generate" else f" ({name})"
    metrics.left_out(f"solutions cut to fit{of}", sum(p.cut for p in prompts.values()), len(prompts))
    roles = {0.0: ("student",), 1.0: ("privileged",)}.get(cfg.tau, ("student", "privileged"))
    requests, too_long = [], 0
    for key, row in names.items():
        contexts = tuple(tuple(getattr(prompts[row.problem_id], role)) for role in roles)
        if max(map(len, contexts)) > cfg.max_prompt_tokens:
            too_long += 1
        elif row.problem_id not in finished:
            requests.append(Request(key, contexts, tuple(range(cfg.samples)), cfg.sampling.max_tokens))
    skipped = f"problems skipped: their prompts are above max_prompt_tokens={cfg.max_prompt_tokens}{of}"
    metrics.left_out(skipped, too_long, len(rows))
    sampler = session.sampler(
        cfg.sampling,
        slots=cfg.slots,
        max_tokens=cfg.sampling.max_tokens,
        tau=cfg.tau,
        proposals=cfg.proposals,
        roles=len(roles),
    )
    parts: dict[str, list[ScoredSample]] = collections.defaultdict(list)
    total = len(requests) + len(finished)
    with progress("generating", total, "problems", len(finished)) as bar, Interrupt() as interrupt:
        for sample in sampler.run(requests):
            parts[sample.name].append(sample)
            if len(parts[sample.name]) < cfg.samples:
                continue
            row = names[sample.name]
            traces = [
                to_row(session, row, prompts[row.problem_id], roles, s)
                for s in sorted(parts.pop(sample.name), key=lambda s: s.sample)
            ]
            finished[row.problem_id] = traces
            journal.append({"problem_id": row.problem_id, "traces": traces})
            bar.advance()
            if interrupt.wanted:
                raise Interrupted(
                    f"generate: stopped with {len(finished)} of {total} problems finished; call again to go on"
                )
    report_usage(sampler, metrics)
    return finished


def rationalise(session: Session, rows: list[Row], journal: Path, metrics: Metrics) -> dict[str, list[dict]]:
    """STaR (arXiv 2203.14465): the student's traces, or where none is right those with the solution in context."""

    def at(tau: float) -> Session:
        config = config_lib.with_overrides(session.config, {"generate.tau": tau}, "train.objective")
        return dataclasses.replace(session, config=config)

    own = roll_out(at(0.0), rows, journal, metrics)
    mark_drops([trace for traces in own.values() for trace in traces], rows, session.config)
    failed = [row for row in rows if all(trace["drop"] for trace in own.get(row.problem_id, ()))]
    log(f"generate: the student solves {len(rows) - len(failed)} of {len(rows)} problems, the others with a solution")
    return {**own, **roll_out(at(1.0), failed, journal.with_name(TOLD), metrics, "rationalise")}


def filters_of(config: config_lib.Config) -> config_lib.Filters:
    """The filters; methods that learn from right traces alone keep no others, whatever they say."""
    method = methods.of(config)
    right = method.graded and method.source == "traces"
    return config.filters.model_copy(update={"correct": True}) if right else config.filters


def report_usage(sampler: Sampler, metrics: Metrics) -> None:
    if figures := sampler.figures():
        metrics.write(0, **figures)


def to_row(session: Session, row: Row, prompts, roles: tuple[str, ...], s: ScoredSample) -> dict:
    """A line of traces.jsonl; see README for its fields."""
    student, privileged = s.log_student, s.log_privileged
    by_student = s.by_student if "student" in roles else np.zeros_like(s.by_student)
    return {
        "problem_id": row.problem_id,
        "row": row.index,
        "sample": s.sample,
        "prompt_hash": {role: _hash(getattr(prompts, role)) for role in roles},
        "prompt_tokens": {role: len(getattr(prompts, role)) for role in roles},
        "response_ids": s.tokens.tolist(),
        "text": session.tokenizer.decode(s.tokens.tolist()),
        "logq": _rounded(s.logq),
        "log_student": _rounded(student) if "student" in roles else None,
        "log_privileged": _rounded(privileged) if "privileged" in roles else None,
        "writer": "".join("s" if x else "p" for x in by_student),
        "acceptance": round(float(by_student.mean()), 4),
        "finish": s.finish,
        "drop": None,
    }


def mark_drops(traces: list[dict], rows: list[Row], config: config_lib.Config) -> dict[str, int]:
    """Sets every trace's `drop` and counts the reasons."""
    cfg = filters_of(config)
    golds = {row.problem_id: final_answer(row) for row in rows}

    def reasons() -> list[str | None]:
        with Grader() as grader:

            def is_correct(text: str, gold: str) -> bool:
                return grader.grade(extract(text), gold).correct

            for trace in traces:
                trace["drop"] = filters.drop_reason(trace, cfg, golds[trace["problem_id"]], is_correct)
        return [trace["drop"] for trace in filters.keep(traces, cfg, config.seed)]

    for trace, reason in zip(traces, mesh_lib.from_first(reasons), strict=True):
        trace["drop"] = reason
    return dict(collections.Counter(t["drop"].split(":")[0] for t in traces if t["drop"]))


def check_golds(config: config_lib.Config, rows: list[Row]) -> None:
    """Where traces will be graded, every row has an answer that can be parsed; raises UserError before any work."""
    if not (filters_of(config).correct or methods.of(config).graded) or config.data is None:
        return
    with Grader() as grader:
        for row in rows:
            gold = final_answer(row)
            problem = "want an answer: traces are graded" if gold is None else grader.check_gold(gold)
            if problem:
                raise UserError(problem, file=config.data.path, row=row.index + 1, field=config.data.columns.answer)


def _hash(ids) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def _rounded(x: np.ndarray) -> list[float]:
    return [round(float(v), 5) for v in x]
