"""evaluate: draws n samples per problem, cuts them at every budget, grades them -> samples.jsonl and results.json.

Samples are drawn once, up to the largest budget, and serve all smaller ones, since a sample's tokens do not depend on
where it will be cut. `evaluate.budget` names what a budget covers. With `evaluate.force`, a sample without a complete
answer has its thoughts closed, if they are open, and is asked for its answer: those tokens are drawn for each cut and
counted separately. docs/results.md documents the two files.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.ahead import programs
from dail_jax.data.prompts import PromptBuilder, Question
from dail_jax.data.records import Row
from dail_jax.errors import UserError
from dail_jax.evaluate import answers, files, protocol, replies
from dail_jax.evaluate.grading import Grader
from dail_jax.metrics import Metrics, console, log
from dail_jax.rundir import Journal, RunDir, json_line, write_atomic
from dail_jax.sample.sampler import Continuation, Request, Sample, Sampler, continues
from dail_jax.shapes import Natural, Shape, check_all
from dail_jax.stages import card, offline, recipes, samplers
from dail_jax.stages.drawing import drawing
from dail_jax.stages.generate import report_usage
from dail_jax.stages.session import Session, open_session
from dail_jax.text import open_tag

JOURNAL, FORCED = recipes.DRAWN


class DrawnSample(Shape):
    """A row of the journal: one sample of a request."""

    name: str
    sample: Natural
    ids: list[Natural]
    finish: str


@dataclass(frozen=True)
class BenchmarkProblem:
    """One problem of a benchmark, ready to be sampled. `key` names it among all benchmarks."""

    benchmark: config_lib.Benchmark
    row: Row
    gold: str
    prompt: tuple[int, ...]
    opening: str  # the tag that the prompt ends with, such as <think>, so that the sample begins inside its thoughts

    @property
    def key(self) -> str:
        return f"evaluate/{self.benchmark.name}/{self.row.problem_id}"


def run(config: config_lib.Config, table: bool = True, drawn: Path | None = None) -> None:
    """The whole stage; `drawn` is the file in which the sampler `offline` finds the samples, if not its own."""
    cfg = config.evaluate
    if not cfg.benchmarks:
        log("evaluate: nothing to do (no evaluate.benchmarks)")
        return
    tables = {b.name: recipes.read_benchmark(b) for b in cfg.benchmarks}
    skipped = ungradable(cfg, tables)
    with RunDir(config) as run_dir:
        with run_dir.stage(recipes.evaluate(config, tables)) as stage:
            if stage.done:
                log(f"evaluate: already done, see {run_dir.path / 'results.json'}")
            elif stage.states[recipes.SAMPLES] != "missing":  # verdicts and figures follow from the samples
                finish(config, read_drawn(run_dir.path), run_dir.path)
            else:
                session = open_session(config)
                with jax.set_mesh(session.sample_mesh):
                    metrics = Metrics(run_dir.path, config.log, "evaluate")
                    found = samplers.find(cfg.sampler)
                    open_sampler = offline.opened(session, run_dir, drawn) if drawn else found(session, run_dir)
                    todo = problems(session, tables, skipped, metrics)
                    samples = draw_samples(
                        session, todo, open_sampler, lambda name: Journal(run_dir.path / name), metrics
                    )
                    metrics.close()
                finish(config, samples, run_dir.path)
        results = files.read_results(run_dir.path / "results.json")
    if jax.process_index() == 0:
        card.write(config)
        if table:
            console.print(protocol.table({results["arm"]: results}))
        log(protocol.headline(results))


def ungradable(cfg: config_lib.Evaluate, tables: Mapping[str, Sequence[Row]]) -> dict[str, list[str]]:
    """By benchmark, the problem_ids whose gold answer cannot be graded against; raises UserError unless they may be
    skipped.

    The first process decides for all, since they must sample the same problems, and a time limit may strike in one alone.
    """

    def check() -> dict[str, list[str]]:
        with Grader() as grader:
            return {b.name: ungradable_ids(b, tables[b.name], grader) for b in cfg.benchmarks}

    return mesh_lib.from_first(check)


def ungradable_ids(benchmark: config_lib.Benchmark, rows: Sequence[Row], grader: Grader) -> list[str]:
    """The problem_ids to skip; raises UserError at the first if none may be skipped, and if no row would be left."""
    found = bad_golds(benchmark, rows, grader)
    if found and (benchmark.ungradable == "refuse" or len(found) == len(rows)):
        raise next(iter(found.values()))
    return list(found)


def bad_golds(benchmark: config_lib.Benchmark, rows: Sequence[Row], grader: Grader) -> dict[str, UserError]:
    """What is wrong with the gold answers that cannot be graded against, by problem_id."""
    found = {}
    for row in rows if answers.named(benchmark.answer).is_graded else ():
        if problem := grader.check_gold(question(row)[1], benchmark.answer):
            found[row.problem_id] = UserError(problem, **row.place, field=benchmark.rows.columns.answer)
    return found


def question(row: Row) -> tuple[str, str]:
    """A row's lettered choices, one per line, in an order that depends on its problem alone; and its gold answer.

    Every run shows a question in the same way, whatever its seed, so that runs are comparable.
    """
    if not row.choices:
        return "", row.answer or ""
    order = list(row.choices)
    random.Random(hashlib.sha256(row.problem.encode("utf-8")).digest()).shuffle(order)
    shown = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(order)]
    return "\n".join(shown), chr(ord("A") + order.index(row.choices[0]))


def thought_tag(config: config_lib.Config) -> str:
    return open_tag(config.prompts.opening) or "think"


def problems(
    session: Session, tables: Mapping[str, Sequence[Row]], skipped: dict[str, list[str]], metrics: Metrics
) -> list[BenchmarkProblem]:
    """All problems that can be graded and whose prompt fits; the others are skipped and counted."""
    cfg, out = session.config.evaluate, []
    opening = re.compile(rf"<{thought_tag(session.config)}>\s*\Z")
    for benchmark in cfg.benchmarks:
        name, ids, too_long = benchmark.name, skipped[benchmark.name], 0
        rows = [row for row in tables[name] if row.problem_id not in ids]
        for row, prompt in zip(rows, prompts_of(session.prompts, benchmark, rows), strict=True):
            if len(prompt) > cfg.max_prompt_tokens:
                too_long += 1
            else:
                opened = opening.search(session.tokenizer.decode(prompt[-16:], keep_special=True))
                gold, text = question(row)[1], opened[0] if opened else ""
                out.append(BenchmarkProblem(benchmark, row, gold, tuple(prompt), text))
        total = len(tables[name])
        what = f"problems of {name} skipped: their gold answers cannot be graded against"
        metrics.left_out(what, len(ids), total, f": {', '.join(ids)}")
        what = f"problems of {name} skipped: their prompts are above max_prompt_tokens={cfg.max_prompt_tokens}"
        metrics.left_out(what, too_long, total)
    session.prompts.report("evaluate")
    if not out:
        raise UserError("every prompt is above max_prompt_tokens", field="evaluate.max_prompt_tokens")
    return out


def prompts_of(builder: PromptBuilder, benchmark: config_lib.Benchmark, rows: list[Row]) -> list[list[int]]:
    """The prompts of a benchmark's rows."""
    questions = [Question(row.problem, question(row)[0], row.before) for row in rows]
    return builder.questions(questions, benchmark.template, benchmark.rows.special_tokens)


def requests_of(cfg: config_lib.Evaluate, todo: Sequence[BenchmarkProblem]) -> list[Request]:
    """The requests for all samples; those of forced answers follow from what is drawn."""
    return [Request(p.key, (p.prompt,), tuple(range(cfg.samples)), cfg.longest) for p in todo]


def draw_samples(
    session: Session,
    todo: list[BenchmarkProblem],
    open_sampler: Callable[[int], Sampler],
    journal: Callable[[str], Journal],
    metrics: Metrics,
) -> list[dict]:
    """Ungraded rows of samples.jsonl, drawing what the journals, which are opened by name, do not have.

    `open_sampler` is given the most tokens that stand behind a prompt of the coming requests. A sampler that continues
    samples draws forced answers as soon as a sample is there; from others, they are requested in the end.
    """
    cfg = session.config.evaluate
    samples, forced = Drawn(journal(JOURNAL)), Drawn(journal(FORCED))
    cuts: dict[tuple[str, int], list[Cut]] = {}

    def cuts_at(p: BenchmarkProblem, row: dict) -> list[Cut]:
        key = p.key, row["sample"]
        if key not in cuts:
            cuts[key] = cuts_of(session, p, row)
        return cuts[key]

    def asked(found: Iterable[Cut]) -> list[Cut]:
        """Where a sample is the same at several budgets, it is asked once; and not again."""
        return list({c.name: c for c in found if c.ask and c.name not in forced.rows}.values())

    def answer(p: BenchmarkProblem) -> Callable[[Sample], list[Continuation]]:
        return lambda s: [continuation_of(session, c) for c in asked(cuts_at(p, row_of_sample(s)))]

    sampler, requests = open_sampler(cfg.longest + answer_room(session)), requests_of(cfg, todo)
    if cfg.force is not None and continues(sampler):
        requests = [dataclasses.replace(r, then=answer(p)) for r, p in zip(requests, todo, strict=True)]
    collect(sampler, requests, samples, "evaluating", forced)
    report_usage(sampler, metrics)

    found = [c for p in todo for row in samples.of(p.key) for c in cuts_at(p, row)]
    left = [request_of(c, continuation_of(session, c)) for c in asked(found)]
    if left:
        collect(open_sampler(left[0].limit), left, forced, "forcing answers")
    return [row_of(session, c, forced.of(c.name)[0]["ids"] if c.ask else None) for c in found]


class Drawn:
    """The samples in a journal, as rows {name, sample, ids, finish}; each is durable once it is added."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self.rows: dict[str, dict[int, dict]] = collections.defaultdict(dict)  # by request and sample
        for row in check_all(journal.rows, DrawnSample, journal.path):
            self.rows[row["name"]][row["sample"]] = row

    def add(self, s: Sample) -> None:
        row = row_of_sample(s)
        self.rows[s.name][s.sample] = row
        self.journal.append(row)

    def of(self, name: str) -> list[dict]:
        """Those of a request, in their order."""
        return [row for _, row in sorted(self.rows[name].items())]


def collect(
    sampler: Sampler, requests: Sequence[Request], drawn: Drawn, label: str, following: Drawn | None = None
) -> None:
    """Draws what the requests ask for and `drawn` has not; what the sampler draws that follows from it, into `following`."""
    todo = []
    for request in requests:
        rows = drawn.rows[request.name]
        missing = tuple(i for i in request.samples if i not in rows)
        before = (Sample(request.name, i, np.array(rows[i]["ids"]), rows[i]["finish"]) for i in rows)
        known = tuple(s for s in before if request.then is not None and request.then(s))
        if missing or known:
            todo.append(dataclasses.replace(request, samples=missing, drawn=known))
    names, done = {request.name for request in requests}, sum(len(drawn.rows[request.name]) for request in requests)
    journals = [one.journal for one in (drawn, following) if one is not None]
    with drawing(sampler, todo, journals, label, "samples", done) as samples:
        for s in samples:
            if s.name in names:
                drawn.add(s)
            elif following is not None:
                following.add(s)


@dataclass(frozen=True)
class Cut:
    """A sample as a budget leaves it: `ids` includes a stop token, `kept` does not; the text `ask` forces an answer."""

    problem: BenchmarkProblem
    sample: int
    budget: int
    spent: int  # tokens that the budget covers; the others belong to the answer
    ids: list[int]
    kept: list[int]
    finish: str
    text: str
    ask: str

    @property
    def name(self) -> str:
        """The name of the request that forces its answer; equal cuts of a sample share it, whatever their budgets."""
        return f"force/{len(self.kept)}/{self.problem.key}/{self.sample}"


def cuts_of(session: Session, p: BenchmarkProblem, sample: dict) -> list[Cut]:
    """A sample at every budget: where the budget ends it, and whether its answer must be asked for."""
    cfg, tag, kind = session.config.evaluate, thought_tag(session.config), answers.named(p.benchmark.answer)
    closed = thought_tokens(session, p, sample["ids"]) if cfg.budget == "thoughts" else None
    cuts = []
    for budget in cfg.cuts:
        end = spent = min(budget, len(sample["ids"]))
        if closed is not None and closed <= budget:
            end, spent = closed + cfg.room, closed
        ids, finish = sample["ids"][:end], sample["finish"] if len(sample["ids"]) <= end else "length"
        kept = ids[:-1] if ids and ids[-1] in session.stops else ids
        text, ask, is_cut = raw_text(session, p, kept), "", finish == "length"
        # Where nothing is graded, nothing is asked.
        if cfg.force and kind.is_graded and kind.complete(replies.answer_part(text, tag), is_cut) is None:
            ask = ask_for(cfg.force, tag, replies.is_thinking(text, tag))
        cuts.append(Cut(p, sample["sample"], budget, spent, ids, kept, finish, text, ask))
    return cuts


def ask_for(force: config_lib.Force, tag: str, is_thinking: bool) -> str:
    """The text that asks a reply for its answer."""
    return (f"\n</{tag}>" if is_thinking else "") + force.text


def continuation_of(session: Session, c: Cut) -> Continuation:
    """The forced answer of a cut."""
    force = session.config.evaluate.force
    assert force is not None
    return Continuation(c.name, len(c.kept), tuple(session.tokenizer.encode(c.ask)), force.max_tokens)


def request_of(c: Cut, one: Continuation) -> Request:
    """The same for a sampler that has not drawn it behind its sample: a prompt with all that stands before it."""
    return Request(one.name, ((*c.problem.prompt, *c.kept, *one.tokens),), (0,), one.limit)


def answer_room(session: Session) -> int:
    """How many tokens a forced answer takes behind its sample, with the text that asks for it."""
    config, tag = session.config, thought_tag(session.config)
    asks = [ask_for(config.evaluate.force, tag, thinks) for thinks in (True, False)] if config.evaluate.force else []
    longest = max((len(session.tokenizer.encode(ask)) for ask in asks), default=0)
    return programs.answer_room(config.evaluate, session.model, longest)


def thought_tokens(session: Session, p: BenchmarkProblem, ids: list[int]) -> int | None:
    """The number of a sample's tokens up to the end of its thoughts, closing tag included; None if they do not end."""
    tag = thought_tag(session.config)

    def closed(count: int) -> bool:
        return replies.has_thought(raw_text(session, p, ids[:count]), tag)

    mark = session.tokenizer.encode(f"</{tag}>")
    if len(mark) == 1 and mark[0] in ids and closed(count := ids.index(mark[0]) + 1):
        return count  # usually the tag is a single token, and no prefixes need to be decoded
    return bisect.bisect_left(range(len(ids)), True, key=closed) if closed(len(ids)) else None


def raw_text(session: Session, p: BenchmarkProblem, ids: list[int]) -> str:
    """A sample's text with its tags, which are control tokens to some tokenizers."""
    return p.opening + session.tokenizer.decode(ids, keep_special=True)


def row_of_sample(s: Sample) -> dict:
    """A row of a journal."""
    return {"name": s.name, "sample": s.sample, "ids": s.tokens.tolist(), "finish": s.finish}


def row_of(session: Session, c: Cut, forced: list[int] | None) -> dict:
    """A row of samples.jsonl before grading; `forced` holds the tokens drawn after `c.ask`."""
    return {
        "benchmark": c.problem.benchmark.name,
        "problem_id": c.problem.row.problem_id,
        "sample": c.sample,
        "budget": c.budget,
        "tokens": c.spent,
        "answer_tokens": len(c.ids) - c.spent,
        "forced_tokens": 0 if forced is None else len(forced),
        "text": c.text,
        "forced_text": None if forced is None else c.ask + session.tokenizer.decode(forced),
        "answer": None,
        "gold": c.problem.gold,
        "finish": c.finish if forced is None else "forced",
    }


def read_drawn(folder: Path) -> list[dict]:
    """All rows of samples.jsonl; none in processes that do not write."""
    return files.read_samples(folder / recipes.SAMPLES) if mesh_lib.is_first() else []


def finish(config: config_lib.Config, samples: list[dict], folder: Path) -> None:
    """Grades, summarises and writes samples.jsonl and results.json."""
    if jax.process_index() != 0:
        return
    objective = "adapter" if config.evaluate.adapter else config.train.objective
    graded, results = graded_results(config, samples, folder.name, objective)
    write_atomic(folder / "samples.jsonl", "".join(map(json_line, graded)))
    write_atomic(folder / "results.json", json.dumps(results, indent=1) + "\n")
    log(f"wrote {folder / 'samples.jsonl'} and {folder / 'results.json'}")


def graded_results(config: config_lib.Config, samples: list[dict], arm: str, objective: str) -> tuple[list[dict], dict]:
    """(the rows of samples.jsonl with their verdicts, the content of results.json)."""
    graded = protocol.grade(samples, config.evaluate.benchmarks, thought_tag(config))
    return graded, {
        "schema": files.SCHEMA,
        "arm": arm,
        "objective": objective,
        "seed": config.seed,
        "budget": config.evaluate.budget,
        **protocol.summarise(graded, config.evaluate, config.seed),
    }
