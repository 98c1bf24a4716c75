"""generate: mixed policy rollouts for every row of the data -> traces.jsonl (docs/traces.md).

Each trace is durable once it is drawn. Once all are, the journal is put in the order of the data, filtered, and becomes
traces.jsonl: the same bytes whether or not the run was interrupted.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dail_jax import config as config_lib
from dail_jax import shapes
from dail_jax.data import filters
from dail_jax.data import traces as traces_lib
from dail_jax.data.prompts import RolePrompts
from dail_jax.data.records import Row
from dail_jax.data.traces import Role, Trace, prompt_hash
from dail_jax.metrics import Metrics, log
from dail_jax.rundir import Journal, RunDir
from dail_jax.sample.sampler import Request, Sample, Sampler, ScoredSample
from dail_jax.stages import drops, recipes
from dail_jax.stages.drawing import drawing
from dail_jax.stages.recipes import rows_of, traces_path
from dail_jax.stages.session import Session, open_session
from dail_jax.train import methods

JOURNAL, TOLD = recipes.JOURNALS
ROLES_BY_TAU: dict[float, tuple[Role, ...]] = {0.0: ("student",), 1.0: ("privileged",)}  # by tau; both in between


def run(config: config_lib.Config) -> None:
    if config.traces is not None:
        log(f"generate: using {traces_path(config)}")
        return
    rows = rows_of(config)
    with RunDir(config) as run_dir, run_dir.stage(recipes.generate(config, rows)) as stage:
        if stage.done:
            log(f"generate: already done, see {traces_path(config)}")
            return
        if stage.states[recipes.TRACES] == "stale":  # drawn before, and to be filtered anew
            drawn = traces_lib.read(traces_path(config))
        else:
            session = open_session(config)
            with jax.set_mesh(session.sample_mesh):
                metrics = Metrics(run_dir.path, config.log, "generate")
                work = rationalise if methods.of(config).rationalises else roll_out
                finished = work(session, rows, Journal(run_dir.path / JOURNAL), metrics)
                metrics.close()
            drawn = [trace for row in rows for trace in finished.get(row.problem_id, [])]
        traces = drops.mark(drawn, rows, config)
        if jax.process_index() == 0:
            traces_lib.write(traces_path(config), traces)
        share = np.mean([t.acceptance or 0.0 for t in traces]) if traces else 0.0
        counts = collections.Counter(filters.reason_of(t) for t in traces if t.drop)
        log(
            f"generate: {len(traces)} traces of {len({t.problem_id for t in traces})} problems, {share:.1%} of tokens the student's; "
            + (", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none dropped")
        )
        log(f"          wrote {traces_path(config)}")


def roll_out(
    session: Session, rows: Sequence[Row], journal: Journal, metrics: Metrics, name: str = "generate"
) -> dict[str, list[Trace]]:
    """Every problem's traces by problem id, drawn unless the journal has them; `name` determines the randomness.

    Of K expert solutions, sample i of a problem is shown number i mod K.
    """
    cfg = session.config.generate
    drawn: dict[str, dict[int, Trace]] = collections.defaultdict(dict)  # by problem and sample
    for trace in shapes.parse_all(journal.rows, Trace, journal.path):
        drawn[trace.problem_id][trace.sample] = trace
    names = {f"{name}/{row.problem_id}": row for row in rows}
    prompts = dict(zip((row.problem_id for row in rows), session.prompts.build_views(rows), strict=True))
    session.prompts.report("generate")
    of = "" if name == "generate" else f" ({name})"
    cut = [built.cut for views in prompts.values() for built in views]
    metrics.left_out(f"solutions cut to fit{of}", sum(cut), len(cut))
    roles = ROLES_BY_TAU.get(cfg.tau, traces_lib.ROLES)
    requests, too_long = [], 0
    for key, row in names.items():
        contexts = [tuple(tuple(getattr(built, role)) for role in roles) for built in prompts[row.problem_id]]
        if max(len(ids) for context in contexts for ids in context) > cfg.max_prompt_tokens:
            too_long += 1
            continue
        for solution, context in enumerate(contexts):
            mine = range(solution, cfg.samples, len(contexts))
            if missing := tuple(i for i in mine if i not in drawn.get(row.problem_id, {})):
                requests.append(Request(key, context, missing, cfg.sampling.max_tokens))
    skipped = f"problems skipped: their prompts are above max_prompt_tokens={cfg.max_prompt_tokens}{of}"
    metrics.left_out(skipped, too_long, len(rows))
    sampler = sampler_of(session, len(roles))
    with drawing(sampler, requests, [journal], "generating", "traces", sum(map(len, drawn.values()))) as samples:
        for sample in samples:
            row = names[sample.name]
            trace = trace_of(session, row, prompts[row.problem_id], roles, sample)
            drawn[row.problem_id][sample.sample] = trace
            journal.append(dict(trace))
    report_usage(sampler, metrics)
    return {name: [traces[i] for i in sorted(traces)] for name, traces in drawn.items()}


def sampler_of(session: Session, roles: int) -> Sampler:
    """Our engine, or the server that `generate.sampler` names, which draws for one role."""
    cfg = session.config.generate
    if isinstance(cfg.sampler, config_lib.Server):
        return session.served(cfg.sampler, cfg.sampling, scored=True)
    return session.sampler(
        cfg.sampling,
        slots=cfg.slot_count,
        max_tokens=cfg.sampling.max_tokens,
        pages=cfg.pages,
        kv_dtype=cfg.kv_dtype,
        tau=cfg.tau,
        proposals=cfg.proposals,
        roles=roles,
    )


def rationalise(session: Session, rows: list[Row], journal: Journal, metrics: Metrics) -> dict[str, list[Trace]]:
    """STaR (arXiv 2203.14465): the student's traces, or traces with the solution in context if none of them is kept."""

    def at(tau: float) -> Session:
        config = config_lib.with_overrides(session.config, {"generate.tau": tau}, "train.objective")
        return dataclasses.replace(session, config=config)

    own = roll_out(at(0.0), rows, journal, metrics)
    marked = drops.mark([trace for traces in own.values() for trace in traces], rows, session.config)
    solved = {trace.problem_id for trace in marked if trace.drop is None}
    failed = [row for row in rows if row.problem_id not in solved]
    solved_share = f"{len(rows) - len(failed)} of {len(rows)} problems"
    log(f"generate: the student solves {solved_share}; the others are drawn with the solution in context")
    return {**own, **roll_out(at(1.0), failed, Journal(journal.path.with_name(TOLD)), metrics, "rationalise")}


def report_usage(sampler: Sampler, metrics: Metrics) -> None:
    if figures := sampler.figures():
        metrics.write(0, **figures)


def trace_of(session: Session, row: Row, views: Sequence[RolePrompts], roles: tuple[Role, ...], s: Sample) -> Trace:
    """A sample as a trace, not yet filtered; `views` are the row's prompts with each of its solutions.

    It has no log-probabilities if none came with the sample.
    """
    solution = s.sample % len(views)
    prompts = views[solution]
    scores = s if isinstance(s, ScoredSample) else None
    one = np.full(len(s.tokens), roles[0] == "student")
    by_student = scores.by_student if scores and len(roles) > 1 else one
    ids = tuple(s.tokens.tolist())
    return Trace(
        problem_id=row.problem_id,
        row=row.index,
        sample=s.sample,
        solution=solution if len(views) > 1 else None,
        prompt_hash={role: prompt_hash(getattr(prompts, role)) for role in roles},
        prompt_tokens={role: len(getattr(prompts, role)) for role in roles},
        response_ids=ids,
        text=session.tokenizer.decode(ids),
        logq=_rounded(scores.logq) if scores else None,
        log_student=_rounded(scores.log_student) if scores and "student" in roles else None,
        log_privileged=_rounded(scores.log_privileged) if scores and "privileged" in roles else None,
        writer="".join("s" if x else "p" for x in by_student),
        acceptance=round(float(by_student.mean()), 4),
        finish=s.finish,
    )


def _rounded(x: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(v), 5) for v in x)
