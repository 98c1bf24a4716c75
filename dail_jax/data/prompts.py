"""Prompts of the three roles: one builder for generation, training and evaluation, so that they cannot differ.

A template is a text file. `{{problem}}`, `{{solution}}`, `{{waypoints}}` and `{{answer}}` stand for a row's values. These
are filled in once and not scanned again; control tokens in them are plain text (`data.special_tokens`).
`{{waypoints:, }}` sets the separator between waypoints, and so does `{{hint:, }}` if the hint is a list of waypoints. A
line whose values are all empty is left out. A file that begins with a line `[system]` must also have a line `[user]`; any
other file is the user's message as a whole.

What a row's chat has before the problem, a system message and earlier turns, comes before the template's message in the
prompts of all roles alike. A template's own system message follows the row's, after an empty line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dail_jax import config, provenance, storage, strict_json
from dail_jax.data.chats import Message
from dail_jax.data.records import Row
from dail_jax.data.waypoints import final_answer, waypoints
from dail_jax.errors import UserError
from dail_jax.metrics import log
from dail_jax.text import Tokenizer, open_tag

NAMES = ("problem", "solution", "waypoints", "answer")

# What each role may see. The student must not see any part of the solution.
ALLOWED = {
    "student": ("problem",),
    "privileged": NAMES,
    "negative": ("problem", "waypoints", "answer"),
    "expert": NAMES,
    "hint": ("problem", "hint"),
    "choice": ("problem", "choices"),  # an evaluation's question with its lettered choices
}

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*(?::([^{}]*))?\}\}")
_SECTION = re.compile(r"\s*\[(system|user)\][ \t]*\n")


Policy = Literal["text", "keep", "refuse"]
Values = dict[str, str | list[str]]


class Question(NamedTuple):
    """A problem of an evaluation: its choices, if any, one per line, and the chat before it."""

    problem: str
    choices: str = ""
    before: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Template:
    """A checked template: (role, text with placeholders) for each message."""

    sections: tuple[tuple[str, str], ...]

    def messages(self, values: Values, before: Sequence[Message] = ()) -> list[dict[str, str]]:
        """Chat messages with the values put in, after those of a row's chat, and under one system message."""
        chat = [*before, *(Message(role, _fill(text, values)) for role, text in self.sections)]
        systems = [message.content for message in chat if message.role == "system"]
        first = [Message("system", "\n\n".join(systems))] if systems else []
        return [message._asdict() for message in (*first, *(m for m in chat if m.role != "system"))]

    def digest(self) -> str:
        return provenance.digest(self.sections)


@dataclass(frozen=True)
class RolePrompts:
    """Token ids of a row's prompts, each ending where the reply begins, and of the reply that SFT imitates."""

    student: list[int]
    privileged: list[int]
    negative: list[int]
    expert: list[int]
    cut: bool  # the solution was longer than the limits allow


@dataclass(frozen=True)
class _Seen:
    """What the roles see of a row: the placeholders' values, of a solution cut to fit, and the prompt that it must fit."""

    values: Values
    cut: bool
    privileged: list[int]


class PromptBuilder:
    """Builds every prompt of a run from its templates and chat template; raises UserError for bad templates.

    Of a row with several expert solutions, the first is used; `Row.views` has a row for each. `special_tokens` says how to
    treat control tokens in rows. Solutions are cut so that the privileged student's prompt
    has at most `max_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        cfg: config.Prompts,
        waypoint_cfg: config.Waypoints,
        special_tokens: Policy = "text",
        max_tokens: int | None = None,
    ):
        self.tokenizer, self.cfg, self.waypoint_cfg, self.max_tokens = tokenizer, cfg, waypoint_cfg, max_tokens
        self.special_tokens: Policy = special_tokens
        self.found: Counter[str] = Counter()  # control token encoded as text -> how many texts contain it
        self.student = load_template(cfg.student, "student")
        self.privileged = load_template(cfg.privileged, "privileged")
        self.negative = load_template(cfg.negative, "negative")
        self.expert = load_template(cfg.expert, "expert") if cfg.expert else None

    def build(self, row: Row) -> RolePrompts:
        """All prompts of a row. If the solution is cut, every role sees the cut one, but the same final answer."""
        return self.build_all([row])[0]

    def build_all(self, rows: Sequence[Row]) -> list[RolePrompts]:
        """`build` for many rows, with far fewer round trips to the tokenizer's worker."""
        with self._naming([(row.place, row.before) for row in rows]):
            return self._build_all(rows)

    def _build_all(self, rows: Sequence[Row]) -> list[RolePrompts]:
        found = self._seen(rows)
        safe, befores, replies = [], [], []
        for row, seen in zip(rows, found, strict=True):
            safe.append(self._safe(seen.values, self.special_tokens, row.problem_id))
            befores.append(self._safe_chat(row.before, self.special_tokens, row.problem_id))
            own = {**safe[-1], "solution": self._own_thoughts(str(seen.values["solution"]))}
            replies.append(self.reply(own, seen.cut))
        student, negative = (self._render(template, safe, befores) for template in (self.student, self.negative))
        experts = self.tokenizer.encode_all(replies, marked=True)
        return [
            RolePrompts(
                student[i],
                seen.privileged,
                negative[i],
                experts[i] + ([] if seen.cut else [self.tokenizer.eos_id]),
                seen.cut,
            )
            for i, seen in enumerate(found)
        ]

    def build_views(self, rows: Sequence[Row]) -> list[tuple[RolePrompts, ...]]:
        """For each row, its prompts with each of its expert solutions (`Row.views`)."""
        built = iter(self.build_all([view for row in rows for view in row.views]))
        return [tuple(next(built) for _ in row.views) for row in rows]

    def values_all(self, rows: Sequence[Row]) -> list[tuple[Values, bool]]:
        """The values of the placeholders for each row, and whether its solution was cut."""
        return [(seen.values, seen.cut) for seen in self._seen(rows)]

    def _seen(self, rows: Sequence[Row]) -> list[_Seen]:
        whole = [self._values(row, row.solution) for row in rows]
        befores = [row.before for row in rows]
        return [
            self._shortened(row) if privileged is None else _Seen(values, False, privileged)
            for row, values, privileged in zip(rows, whole, self._fitting(whole, befores), strict=True)
        ]

    def _values(self, row: Row, solution: str) -> Values:
        """The values of a row of whose solution only this beginning is seen."""
        answer = final_answer(row)
        seen = dataclasses.replace(row, solution=solution, answer=answer)
        found = waypoints(seen, self.waypoint_cfg)
        return {"problem": row.problem, "solution": solution, "waypoints": found, "answer": answer or ""}

    def _are_short(self, solutions: Sequence[str]) -> list[bool]:
        limit = self.cfg.max_solution_tokens
        if limit is None:
            return [True] * len(solutions)
        marked = [self._mark(solution)[0] for solution in solutions]
        return [len(ids) <= limit for ids in self.tokenizer.encode_all(marked, marked=True)]

    def _fitting(self, found: Sequence[Values], befores: Sequence[Sequence[Message]]) -> list[list[int] | None]:
        """The privileged student's prompts; None where the solution or the prompt is above its limit."""
        short = [i for i, is_short in enumerate(self._are_short([str(v["solution"]) for v in found])) if is_short]
        prompts: list[list[int] | None] = [None] * len(found)
        built = self._privileged([found[i] for i in short], [befores[i] for i in short])
        for i, prompt in zip(short, built, strict=True):
            prompts[i] = prompt if self.max_tokens is None or len(prompt) <= self.max_tokens else None
        return prompts

    def _privileged(self, found: Sequence[Values], befores: Sequence[Sequence[Message]]) -> list[list[int]]:
        marked: list[Values] = [
            {
                field: self._mark(value)[0] if isinstance(value, str) else [self._mark(part)[0] for part in value]
                for field, value in values.items()
            }
            for values in found
        ]
        chats = [tuple(Message(role, self._mark(text)[0]) for role, text in before) for before in befores]
        return self._render(self.privileged, marked, chats)

    def _shortened(self, row: Row) -> _Seen:
        def is_short(solution: str) -> bool:
            return self._are_short([solution])[0]

        def fits(solution: str) -> bool:
            return self._fitting([self._values(row, solution)], [row.before])[0] is not None

        # A prompt that is too long even without a solution is not helped by cutting: its row is skipped and counted.
        solution = longest_prefix(row.solution, fits if fits("") else is_short)
        values = self._values(row, solution)
        return _Seen(values, solution != row.solution, self._privileged([values], [row.before])[0])

    def student_only(
        self, problem: str, template: str | None = None, choices: str = "", special_tokens: Policy | None = None
    ) -> list[int]:
        """An evaluation's prompt: the student's, or that of a benchmark's own template file.

        `choices` are those of a multiple-choice question, one per line; they use the template for choices.
        `special_tokens` is the benchmark's own policy.
        """
        return self.questions([Question(problem, choices)], template, special_tokens)[0]

    def questions(
        self, found: Sequence[Question], template: str | None = None, special_tokens: Policy | None = None
    ) -> list[list[int]]:
        """`student_only` for many questions of one benchmark, of which all have choices or none has."""
        with_choices = any(question.choices for question in found)
        own = template is None and not with_choices
        of = self.student if own else _template(template, "choice" if with_choices else "student")
        policy = special_tokens or self.special_tokens
        values, befores = [], []
        for question in found:
            name = question.problem[:40]
            values.append(self._safe({"problem": question.problem, "choices": question.choices}, policy, name))
            befores.append(self._safe_chat(question.before, policy, name))
        with self._naming([({"row": question.problem[:40]}, question.before) for question in found]):
            return self._render(of, values, befores)

    def hinted(self, problem: str, hint: str | list[str], before: Sequence[Message] = ()) -> list[int]:
        """The student's prompt with a hint: a text, or a list of waypoints."""
        values = self._safe({"problem": problem, "hint": hint}, self.special_tokens, problem[:40])
        chat = self._safe_chat(before, self.special_tokens, problem[:40])
        return self._render(_template(self.cfg.hint, "hint"), [values], [chat])[0]

    def reply(self, values: Values, cut: bool) -> str:
        """The text that SFT imitates: the `expert` template's, or the solution, after the prompt's opening.

        Without a template, a solution that the opening puts inside a tag such as <think> is followed by the closing tag
        and the boxed answer; a cut solution ends where it was cut.
        """
        if self.expert is not None:
            text = self.expert.messages(values)[-1]["content"]
        else:
            text = str(values["solution"]).strip()
            tag = open_tag(self.cfg.opening)
            if tag and f"</{tag}>" not in text and not cut:
                boxed = f"\\boxed{{{values['answer']}}}" if values["answer"] else ""
                text = f"{text}\n</{tag}>\n\n{boxed}".rstrip(" ")
        opening = self.cfg.opening
        if opening.strip() and text.lstrip().startswith(opening.strip()):
            text = text.lstrip().removeprefix(opening.strip()).lstrip("\n")
        return text

    def _render(
        self, template: Template, found: Sequence[Values], befores: Sequence[Sequence[Message]]
    ) -> list[list[int]]:
        chats = [template.messages(values, before) for values, before in zip(found, befores, strict=True)]
        return self.tokenizer.render_all(chats, self.cfg.opening, marked=True)

    @contextlib.contextmanager
    def _naming(self, chats: Sequence[tuple[dict[str, Any], Sequence[Message]]]) -> Iterator[None]:
        """Where prompts cannot be built, names the place of the first chat that the model's template refuses, if one is."""
        try:
            yield
        except UserError:
            for place, before in chats:
                try:
                    if before:
                        self.tokenizer.render_text([m._asdict() for m in (*before, Message("user", "?"))])
                except UserError as error:
                    raise UserError(
                        f"got a chat that the model's template refuses: {error.message}", **place, field="messages"
                    ) from None
            raise

    def _mark(self, text: str) -> tuple[str, list[str]]:
        return self.tokenizer.mark(text, keep=self.special_tokens == "keep")

    def _safe(self, values: Values, policy: Policy, name: str) -> Values:
        """The values with their control tokens marked as text, and counted; raises UserError if they are refused."""
        safe: Values = {}
        for field, value in values.items():
            parts = [value] if isinstance(value, str) else value
            marked = [self.tokenizer.mark(part, keep=policy == "keep") for part in parts]
            found = [token for _, tokens in marked for token in tokens]
            if found and policy == "refuse":
                raise UserError(
                    f"got the control token {found[0]!r} in its {field}: want plain text, or special_tokens: text",
                    row=strict_json.printable(name),
                    field="special_tokens",
                )
            self.found.update(sorted(set(found)))
            texts = [text for text, _ in marked]
            safe[field] = texts[0] if isinstance(value, str) else texts
        return safe

    def _safe_chat(self, before: Sequence[Message], policy: Policy, name: str) -> list[Message]:
        """`_safe` for what a row's chat has before the problem."""
        return [
            Message(role, str(self._safe({f"{role}'s message": content}, policy, name)[f"{role}'s message"]))
            for role, content in before
        ]

    def _own_thoughts(self, solution: str) -> str:
        """A solution as a reply: control tokens are marked, except the tags around thoughts at its beginning."""
        tag = open_tag(self.cfg.opening) or "think"
        thoughts, end, rest = solution.partition(f"</{tag}>")
        start = next(iter(re.findall(rf"\A\s*<{tag}>", thoughts)), "")
        return start + self._mark(thoughts.removeprefix(start))[0] + end + self._mark(rest)[0]

    def report(self, stage: str) -> None:
        """Logs the control tokens that were found in texts since the last report."""
        if self.found:
            tokens = ", ".join(f"{token} in {count}" for token, count in self.found.most_common(8))
            log(f"{stage}: control tokens in texts of the data are encoded as plain text (special_tokens): {tokens}")
        self.found.clear()


def longest_prefix(text: str, fits: Callable[[str], bool]) -> str:
    """The longest prefix of a text that fits (to within a character where more characters may be fewer tokens)."""
    if fits(text):
        return text
    low, high = 0, len(text)  # a prefix of `low` characters fits, one of `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        if fits(text[:middle]):
            low = middle
        else:
            high = middle
    return text[:low]


@functools.lru_cache(maxsize=64)
def _template(path: str | None, role: str) -> Template:
    return load_template(path, role)


def packaged(role: str) -> str:
    """The file of the package's own template of a role."""
    return str(Path(__file__).parent / "templates" / f"{role}.txt")


def load_template(path: str | None, role: str) -> Template:
    """A role's template from a file, or the package's own; raises UserError with the line at fault."""
    source = path or packaged(role)
    try:
        text = storage.file(source).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such template", file=source) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as UTF-8 text: {error}", file=source) from None
    allowed = ALLOWED[role]
    for match in _PLACEHOLDER.finditer(text):
        if match[1] not in allowed or (match[2] is not None and match[1] not in ("waypoints", "hint")):
            line = text.count("\n", 0, match.start()) + 1
            want = ", ".join("{{" + name + "}}" for name in allowed)
            raise UserError(f"got {match[0]}, want one of {want} in a {role} template", file=source, row=line)
    for name in () if role == "expert" else ALLOWED[role] if role in ("choice", "hint") else ("problem",):
        if not any(match[1] == name for match in _PLACEHOLDER.finditer(text)):
            raise UserError("got a template without {{" + name + "}}", file=source)
    return Template(_sections(text, source, role))


def _sections(text: str, source: str, role: str) -> tuple[tuple[str, str], ...]:
    """Splits at the lines [system] and [user], in this order, if the file begins with one of them."""
    if not _SECTION.match(text):
        return (("user", text.strip()),)
    marks = list(re.finditer(r"^\[(system|user)\][ \t]*$", text, re.MULTILINE))
    names = [mark[1] for mark in marks]
    if names not in (["system", "user"], ["user"]) or role == "expert":
        line = text.count("\n", 0, marks[-1].start()) + 1
        want = "none in an expert's reply" if role == "expert" else "[system] and then [user]"
        raise UserError(f"got the sections {', '.join(names)}, want {want}", file=source, row=line)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple((mark[1], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True))


def _fill(text: str, values: Values) -> str:
    """Fills in the values, line by line, in one pass; leaves out lines whose values are all empty."""

    def value(match: re.Match[str]) -> str:
        found = values[match[1]]
        if isinstance(found, str):
            return found.strip()
        return (match[2].replace("\\n", "\n") if match[2] is not None else "; ").join(found)

    lines = []
    for line in text.split("\n"):
        matches = list(_PLACEHOLDER.finditer(line))
        if not matches or any(value(match) for match in matches):
            lines.append(_PLACEHOLDER.sub(value, line))
    return "\n".join(lines)
