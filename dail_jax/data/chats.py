"""A row's chat `messages`: the problem, what was said before it, and the expert solution after it.

A system message may come first. Then the user and the assistant take turns. The user's last turn is the problem; an
assistant's turn after it is the expert solution. Anything else, such as a tool's message or an image, is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from dail_jax import strict_json
from dail_jax.errors import UserError

ROLES = ("system", "user", "assistant")
UNSUPPORTED = {"tool": "a tool's message", "function": "a function's message", "tool_calls": "a call of a tool"}


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """What a row's messages say; `solution` is None if no assistant's turn follows the problem."""

    before: tuple[Message, ...]
    problem: str
    solution: str | None


def read(value: Any, file: str, row: int, column: str) -> Chat:
    """The chat in a decoded column; raises UserError with the message, counted from 0, that is at fault."""
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else strict_json.kind_of(value)
        raise UserError(f"got {got}, want a list of messages", file=file, row=row, field=column)
    messages = [_message(one, file, row, f"{column}.{i}") for i, one in enumerate(value)]
    first = 1 if messages[0].role == "system" else 0  # of the turns
    for i, message in enumerate(messages[first:]):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            want = f"want {expected!r}: the user and the assistant take turns, after a system message or none"
            raise UserError(f"got {message.role!r}, {want}", file=file, row=row, field=f"{column}.{first + i}.role")
    if len(messages) == first:
        raise UserError("got no user's turn, want the problem", file=file, row=row, field=column)
    solution = messages.pop().content if messages[-1].role == "assistant" else None
    problem = messages.pop().content
    return Chat(tuple(messages), problem, solution)


def _message(value: Any, file: str, row: int, field: str) -> Message:
    def wrong(problem: str, key: str = "") -> UserError:
        return UserError(problem, file=file, row=row, field=f"{field}.{key}" if key else field)

    if not isinstance(value, dict):
        raise wrong(f"got {strict_json.kind_of(value)}, want an object with role and content")
    role = value.get("role")
    for key in (role, *(key for key in value if value[key])):
        if isinstance(key, str) and key in UNSUPPORTED:
            raise wrong(f"got {UNSUPPORTED[key]}, which is not supported: want text by {', '.join(ROLES)}")
    if role not in ROLES:
        got = f"{role!r:.40}" if "role" in value else f"no such key (there are: {', '.join(sorted(value))[:200]})"
        raise wrong(f"got {got}, want {', '.join(ROLES[:-1])} or {ROLES[-1]}", "role")
    for key in value.keys() - {"role", "content"}:
        if value[key] not in (None, "", [], {}):
            raise wrong("got a key that is not supported, want role and content alone", strict_json.printable(key))
    return Message(role, _content(value.get("content"), file, row, f"{field}.content"))


def _content(value: Any, file: str, row: int, field: str) -> str:
    """A message's text, which may be in parts, `{"type": "text", "text": ...}`."""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                got = f"a part of type {kind!r:.40}" if kind else strict_json.kind_of(part)
                raise UserError(f"got {got}, want text: nothing else is supported", file=file, row=row, field=field)
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str) or not value.strip():
        got = "an empty text" if isinstance(value, str) else strict_json.kind_of(value)
        raise UserError(f"got {got}, want text", file=file, row=row, field=field)
    strict_json.refuse_odd_text(value, file, row, field)
    return value
