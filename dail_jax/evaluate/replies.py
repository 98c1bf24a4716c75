"""Replies with their thoughts: where thoughts end, whether one has answered, and with what.

What a prefix of a reply has answered, every longer prefix has answered alike: a reply's answer is the first that is
complete outside its thoughts. So a larger budget never takes back an answer that a smaller one has seen.
"""

from __future__ import annotations

import functools
import re

from dail_jax.evaluate.answers import AnswerType


@functools.lru_cache
def _thoughts(tag: str) -> re.Pattern[str]:
    return re.compile(rf"<{re.escape(tag)}>.*?(</{re.escape(tag)}>|\Z)", re.DOTALL)


def answer_part(text: str, tag: str) -> str:
    """The reply without its thoughts, closed or not."""
    return _thoughts(tag).sub("", text)


def is_thinking(text: str, tag: str) -> bool:
    """Whether a reply ends inside its thoughts."""
    return any(not block[1] for block in _thoughts(tag).finditer(text))


def has_thought(text: str, tag: str) -> bool:
    """Whether a reply has closed the first of its thoughts."""
    block = _thoughts(tag).search(text)
    return bool(block and block[1])


def answer(text: str, kind: AnswerType, tag: str, *, forced: str | None, cut: bool) -> str | None:
    """A reply's answer: that of `forced`, the forced continuation, if there is one; otherwise its own.

    Its own is the first complete one or, where the reply was not `cut`, what `kind` finds in it as a whole.
    """
    if forced is not None:
        text, cut = forced, False
    part = answer_part(text, tag)
    found = kind.complete(part, cut)
    return found if found is not None or cut else kind.extract(part)
