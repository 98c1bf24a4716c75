"""Text and token ids: a model folder's own tokenizer and chat template, and the ids that end a reply.

Both are in effect programs by whoever made the folder, so they run in `tokenizer_worker`, under limits.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import re
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dail_jax import strict_json
from dail_jax.errors import UserError, want_folder
from dail_jax.tokenizer_worker import LOAD_SECONDS, MARK, open_tag
from dail_jax.worker import Lost, Worker

Messages = Sequence[dict[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}

__all__ = ["Messages", "Tokenizer", "load_tokenizer", "mention", "open_tag", "stop_ids"]

FILES = ("tokenizer.json", "tokenizer.model")

# What one message to the worker holds at most. Round trips are what takes time, and all that a message holds, with what
# becomes of it, shares the worker's memory.
MESSAGE_TEXTS, MESSAGE_CHARACTERS = 256, 1_000_000


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its chat template. Make one with `load_tokenizer`.

    Every method raises UserError if the folder's tokenizer or template fails, or exceeds a limit on time or memory.
    """

    folder: Path
    key: int  # the worker's
    template: str | None  # the chat template's source
    size: int  # the highest token id, plus one: the embedding needs at least this many rows
    eos: int | None
    controls: tuple[str, ...]  # the texts of control tokens

    def encode(self, text: str, marked: bool = False) -> list[int]:
        """Token ids of a text; nothing is added before or after, and control tokens in it are recognised.

        With `marked`, those that `mark` has marked are encoded as plain text instead.
        """
        return self.encode_all([text], marked)[0]

    def encode_all(self, texts: Sequence[str], marked: bool = False) -> list[list[int]]:
        """`encode` for many texts, with far fewer round trips to the worker."""
        return self._ask("encode", [{"text": text, "marked": marked} for text in texts], [*map(len, texts)])

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of token ids, without control tokens unless `keep_special`."""
        return self._ask("decode", [{"ids": [int(i) for i in ids], "special": keep_special}], [len(ids)])[0]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, control tokens included."""
        return self._ask("decode", [{"ids": [int(i)], "special": True} for i in ids], [1] * len(ids))

    def mark(self, text: str, keep: bool = False) -> tuple[str, list[str]]:
        """Marks the control tokens in foreign text, such as a problem, unless `keep`: (marked text, tokens marked).

        The marked text is for `render` and `encode` with `marked=True`.
        """
        simple = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
        if keep or not any(control in simple for control in self._folded):  # if one may be in it, the worker decides
            return text.replace(MARK, 2 * MARK), []
        marked, found = self._ask("mark", [{"text": text}], [len(text)])[0]
        return marked, found

    def render_text(self, messages: Messages, opening: str = "") -> str:
        """The chat template's text for `messages`, ready for the assistant's turn, which begins with `opening`.

        Raises UserError if there is no template or it fails (a template may refuse a system message).
        """
        return self._render([messages], opening, "text")[0]

    def render(self, messages: Messages, opening: str = "", marked: bool = False) -> list[int]:
        """Token ids of `render_text`, encoded once as a whole."""
        return self.render_all([messages], opening, marked)[0]

    def render_all(self, chats: Sequence[Messages], opening: str = "", marked: bool = False) -> list[list[int]]:
        """`render` for many chats, with far fewer round trips to the worker."""
        return self._render(chats, opening, "marked" if marked else "ids")

    def _render(self, chats: Sequence[Messages], opening: str, to: str) -> list[Any]:
        if self.template is None:
            raise UserError(
                "got no chat template, want one in tokenizer_config.json or chat_template.jinja", file=self.folder
            )
        each = [{"messages": list(chat), "opening": opening, "to": to} for chat in chats]
        return self._ask("render", each, [sum(len(message["content"]) for message in chat) for chat in chats])

    @property
    def eos_id(self) -> int:
        """The token that ends a turn; raises UserError if the tokenizer has none."""
        if self.eos is None:
            raise UserError("got a tokenizer without an end-of-sequence token, want eos_token", file=self.folder)
        return self.eos

    @functools.cached_property
    def _folded(self) -> tuple[str, ...]:
        return tuple(control.strip().casefold() for control in self.controls)

    def _ask(self, what: str, each: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[Any]:
        """What the worker makes of each; `sizes` are their characters or tokens."""
        results, start, size = [], 0, 0
        for i, more in enumerate(sizes):
            if i > start and (i - start == MESSAGE_TEXTS or size + more > MESSAGE_CHARACTERS):
                results += _SERVER.ask(self.folder, self.key, what, {"each": each[start:i]})
                start, size = i, 0
            size += more
        return results + (_SERVER.ask(self.folder, self.key, what, {"each": each[start:]}) if each else [])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder: `tokenizer.json` or a SentencePiece `tokenizer.model`.

    Nothing is downloaded and no Python code in the folder is run. Its chat template, if any, is tried once. Raises
    UserError.
    """
    folder = Path(path)
    want_folder(folder, "a tokenizer")
    names = [name for name in FILES if (folder / name).is_file()]
    if not names and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise UserError(f"got no tokenizer file, want {' or '.join(FILES)}", file=folder)
    for name in (*names, "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).is_file():
            _refuse_placeholder(folder / name)
    key = next(_KEYS)
    info = _SERVER.ask(folder, key, "load", {"folder": str(folder)})
    tokenizer = Tokenizer(folder, key, **{**info, "controls": tuple(info["controls"])})
    if tokenizer.template is not None:
        _SERVER.ask(folder, key, "attempt", {})
    return tokenizer


def stop_ids(model_folder: str | Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token id that ends a reply, ascending; raises UserError if there is none.

    These are the ids in generation_config.json and config.json, and the tokenizer's own.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(model_folder) / name
        if not path.is_file():
            continue
        tree = strict_json.read_object(path)
        text = tree.get("text_config")  # of a multimodal model
        value = tree.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"got {value!r:.80}, want a token id or a list of them", file=path, field="eos_token_id")
        found.update(ids)
    if tokenizer.eos is not None or not found:
        found.add(tokenizer.eos_id)
    return tuple(sorted(found))


def mention(text: str, phrases: Iterable[str]) -> str | None:
    """The first of `phrases` that a text contains as whole words, in any case and spacing, also in the plural."""
    plain = " ".join(text.casefold().split())
    for phrase in phrases:
        wanted = " ".join(phrase.casefold().split())
        if wanted and re.search(rf"(?<!\w){re.escape(wanted)}s?(?!\w)", plain):
            return phrase
    return None


def _refuse_placeholder(path: Path) -> None:
    """Raises UserError if a file is only a placeholder for one that was not downloaded."""
    with open(path, "rb") as file:
        head = file.read(200).lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise UserError("got a git-LFS pointer, want the file itself: it was not downloaded", file=path)
    if head[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise UserError("got an HTML page, want the file itself: it was not downloaded", file=path)


# ---------------------------------------------------------------------------------------------------
# The worker, shared by all tokenizers of this process
# ---------------------------------------------------------------------------------------------------


class _Server:
    """Sends requests to the worker process, and turns its failures into UserErrors."""

    def __init__(self, memory_mib: int = 2048, seconds: int = 5) -> None:
        self.memory_mib, self.seconds = memory_mib, seconds  # of CPU time, for each text
        script = Path(__file__).with_name("tokenizer_worker.py")
        self.worker = Worker(script, [str(memory_mib), str(seconds)], wall_seconds=1800.0)
        self.lock = threading.Lock()
        atexit.register(self.worker.stop)

    def ask(self, folder: Path, key: int, what: str, fields: dict[str, Any]) -> Any:
        with self.lock:
            reply = self._ask(folder, key, what, fields, first=what != "load")
            if reply.get("unknown"):  # a new worker process, or one that has dropped this tokenizer
                self._ask(folder, key, "load", {"folder": str(folder)})
                reply = self._ask(folder, key, what, fields)
        return reply["ok"]

    def _ask(self, folder: Path, key: int, what: str, fields: dict[str, Any], first: bool = False) -> dict[str, Any]:
        try:
            reply = self.worker.ask({"do": what, "key": key, **fields})
        except Lost as lost:
            if first and lost.reason == "memory":  # killed from outside, perhaps through no fault of the message: again
                return {"unknown": True}
            seconds = LOAD_SECONDS if what == "load" else self.seconds
            limit = f"it did not end within {seconds} seconds of CPU time"
            memory = f"it ran out of memory ({self.memory_mib} MiB) or crashed"
            reply = {"fault": limit if lost.reason == "timeout" else memory, "line": None}
        if "fault" not in reply:
            return reply
        template = what in ("render", "attempt")
        kind = "a chat template that fails" if template else f"a tokenizer that {_FAILS.get(what, 'fails')}"
        raise UserError(
            f"got {kind}: {reply['fault']}",
            file=folder,
            row=f"line {reply['line']}" if template and reply["line"] else None,
            field="chat_template" if template else None,
        )


_FAILS = {"load": "does not load"}
_KEYS = itertools.count()
_SERVER = _Server()
