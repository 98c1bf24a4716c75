"""Traces: their type, and the one reader and the one writer of traces.jsonl (docs/traces.md describes every field).

Traces are not changed. What decides that one is not trained on, a filter, returns a copy that says why (`filters.mark`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from dail_jax import provenance, strict_json
from dail_jax.data.prompts import RolePrompts
from dail_jax.errors import UserError
from dail_jax.rundir import json_line, write_atomic
from dail_jax.shapes import Natural, Shape, Text, parse
from dail_jax.text import Tokenizer

Role = Literal["student", "privileged"]  # who may write a trace
ROLES: tuple[Role, ...] = get_args(Role)

# JSON has lists alone, hence not strict: the elements still are.
Ids = Annotated[tuple[Natural, ...], Field(strict=False)]
LogProbs = Annotated[tuple[float | None, ...], Field(strict=False)]


class Trace(Shape):
    """A response to one problem: a row of traces.jsonl.

    The fields with a default may be missing from a file that was made elsewhere; `generate` writes all of them, but
    `solution` only for a problem with several expert solutions.
    """

    model_config = ConfigDict(frozen=True)

    problem_id: str
    row: Natural | None = None
    sample: Natural
    solution: Natural | None = None
    prompt_hash: dict[Role, str] = Field(default_factory=dict)
    prompt_tokens: dict[Role, Natural] = Field(default_factory=dict)
    response_ids: Ids
    text: Text
    logq: LogProbs | None = None
    log_student: LogProbs | None = None
    log_privileged: LogProbs | None = None
    writer: Annotated[str, Field(pattern="^[sp]*$")] | None = None
    acceptance: Annotated[float, Field(ge=0, le=1)] | None = None
    finish: str
    drop: Text | None = None

    @field_validator("logq", "log_student", "log_privileged", "writer")
    @classmethod
    def _per_token(cls, value: Sequence | None, info: ValidationInfo):
        ids = info.data.get("response_ids")  # absent if they are at fault themselves
        if value is not None and ids is not None and len(value) != len(ids):
            raise ValueError(f"want one value for each of the {len(ids)} response_ids, and there are {len(value)}")
        return value

    @property
    def name(self) -> str:
        """Unique within a file."""
        return f"{self.problem_id}/{self.sample}"

    def __iter__(self) -> Iterator[tuple[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The fields of a row of the file: `solution` is not among them where the problem has only one."""
        return (item for item in super().__iter__() if item != ("solution", None))

    def marked(self, drop: str | None) -> Trace:
        """A copy that is dropped for the given reason, or kept if it is None."""
        return self.model_copy(update={"drop": drop})


# ---------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------


def stream(path: Path, torn: Literal["refuse", "drop"] = "refuse") -> Iterator[tuple[int, Trace]]:
    """Yields (offset in bytes, trace) for every row, in order.

    Raises UserError if there is no file, or a row is damaged, ill-typed or repeats an earlier one's problem and sample.
    `torn` says how to treat an incomplete last line.
    """
    if not path.is_file():
        raise UserError("no traces yet: run the stage `generate` first", file=path)
    seen: set[tuple[str, int]] = set()
    for line in strict_json.read_lines(path, own=True, torn=torn, advice="generate again"):
        trace = parse(line.value, Trace, path, line.number)
        key = trace.problem_id, trace.sample
        if key in seen:
            raise UserError(
                f"got sample {key[1]} of problem {key[0][:80]!r} again, want each once", file=path, row=line.number
            )
        seen.add(key)
        yield line.offset, trace


def read(path: Path) -> list[Trace]:
    """All traces of a file, in order; raises UserError as `stream` does."""
    return [trace for _, trace in stream(path)]


def read_at(path: Path, offsets: Sequence[int]) -> Iterator[Trace]:
    """The traces at offsets that `stream` gave."""
    for value in strict_json.read_at(path, offsets):
        yield Trace.model_validate(value)


class Traces(provenance.Drawn):
    """traces.jsonl as an output of `generate`, which can be filtered again."""

    def drawn(self, path: Path) -> Iterator[dict]:
        for _, trace in stream(path):
            yield {key: value for key, value in trace if key != "drop"}


def write(path: Path, traces: Iterable[Trace]) -> None:
    """Replaces a file, whole or not at all. Equal traces give equal bytes."""
    write_atomic(path, "".join(json_line(dict(trace)) for trace in traces))


# ---------------------------------------------------------------------------------------------------
# Whether traces belong to a configuration
# ---------------------------------------------------------------------------------------------------


def prompt_hash(ids: Sequence[int]) -> str:
    """The first 16 hex digits of the SHA-256 of a prompt's token ids, joined by commas."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def refuse_unknown(traces: Sequence[Trace], solutions: Mapping[str, int], path: Path) -> None:
    """Raises UserError at the first trace of a problem, or of a solution, that is not in the data.

    `solutions` are how many each problem has, by its id.
    """
    for number, trace in enumerate(traces, 1):
        count = solutions.get(trace.problem_id)
        if count is None:
            raise UserError(
                f"got {trace.problem_id[:80]!r}, which is not in the data", file=path, row=number, field="problem_id"
            )
        if (trace.solution or 0) >= count:
            raise UserError(
                f"got {trace.solution}, want below {count}: the problem has no more solutions",
                file=path,
                row=number,
                field="solution",
            )


def verify(
    traces: Sequence[Trace],
    prompts: Mapping[str, Sequence[RolePrompts]],
    tokenizer: Tokenizer,
    vocabulary: int,
    path: Path,
) -> None:
    """Checks that traces may be trained on with these prompts (by problem id, for each solution) and this tokenizer.

    Raises UserError at the first trace of a problem or solution without prompts, with a token id of `vocabulary` or more,
    or drawn under another prompt. The prompts of a trace without `prompt_hash` are taken on trust.
    """
    refuse_unknown(traces, {name: len(built) for name, built in prompts.items()}, path)
    for number, trace in enumerate(traces, 1):
        if max(trace.response_ids, default=0) >= vocabulary:
            raise UserError(
                f"got a token id at or above the model's vocabulary of {vocabulary}",
                file=path,
                row=number,
                field="response_ids",
            )
    hashes: dict[str, list[dict[Role, str]]] = {
        name: [{role: prompt_hash(getattr(one, role)) for role in ROLES} for one in built]
        for name, built in prompts.items()
    }
    differing = {t.name: _differing(t, hashes[t.problem_id][t.solution or 0]) for t in traces}
    for number, trace in enumerate(traces, 1):
        if roles := differing[trace.name]:
            role = roles[0]
            whole = {t.problem_id: role in differing[t.name] for t in traces if role in t.prompt_hash}
            field, got = _cause(trace, role, len(whole) > 1 and all(whole.values()), tokenizer)
            raise UserError(
                f"got a trace that was drawn {got}: want the same for training, or generate again",
                file=path,
                row=number,
                field=field,
            )


def _differing(trace: Trace, hashes: Mapping[Role, str]) -> list[Role]:
    """The roles whose prompt was another one when a trace was drawn."""
    return [role for role in ROLES if trace.prompt_hash.get(role, hashes[role]) != hashes[role]]


def _cause(trace: Trace, role: Role, everywhere: bool, tokenizer: Tokenizer) -> tuple[str, str]:
    """(what has most likely changed, what the trace was drawn with) if the prompt of `role` differs.

    Another tokenizer decodes the response to another text, and a template changes the prompts of all problems
    (`everywhere`). The student is shown the problem alone; the privileged student is shown the solution as well.
    """
    if tokenizer.decode(trace.response_ids) != trace.text:
        return "tokenizer", "with another tokenizer, by which its response_ids stand for its text"
    if everywhere:
        keys = f"prompts.{role}, prompts.opening or the tokenizer's chat template"
        return "template", f"with another template ({keys}), as were all of the {role} prompts"
    if role == "student":
        return "problem", f"from another text of problem {trace.problem_id[:80]!r}"
    return "solution", f"with another solution, or another cut of it, for problem {trace.problem_id[:80]!r}"
