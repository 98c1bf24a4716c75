"""The process that runs a model folder's tokenizer and chat template; started and called by `text`.

A chat template is a program, and a tokenizer.json nearly one: its normalizers can double a text at each step, and its
patterns can panic. So both always run here, with a fixed clock and with limits on address space (`argv[1]`: MiB beyond
what Python and its imports take) and on CPU time (`argv[2]`: seconds, renewed for each text). A message is an object
`{do, key, ...}`, and those that work on texts hold a list of them, `each`; the answer is `{ok}` or `{fault, line}`, or
`{unknown}` for a key that is not, or no longer, loaded.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import math
import os
import random
import re
import resource
import secrets
import sys
from typing import Any

LOAD_SECONDS = 60  # of CPU time
KEEP = 4  # tokenizers kept loaded
GROWTH = 16  # characters or tokens that each input character may become
ALLOWANCE = 1_000_000  # and this many more in total

# The date given to templates that print today's: a prompt must stay the same when training resumes.
TODAY = datetime.datetime(2024, 7, 26)

# Placed after a control token's first character, it marks the token as plain text; doubled, it stands for itself. It is
# a noncharacter, which Unicode reserves for internal uses like this.
MARK = "\ufdd0"


class Refused(Exception):
    """Raised when the folder's program does something unacceptable; the message says what."""


class Loaded:
    """A `transformers` tokenizer, and what is needed to encode control tokens as plain text."""

    def __init__(self, hf: Any):
        self.hf = hf
        self.backend: Any = hf.backend_tokenizer if hf.is_fast else None
        if self.backend is not None:  # a tokenizer.json may have switched both on
            self.backend.no_truncation()
            self.backend.no_padding()
        template = hf.chat_template
        self.template: str | None = template.get("default") if isinstance(template, dict) else template
        added = hf.added_tokens_decoder.items()
        self.controls = {int(i): token.content for i, token in added if self._controls(token)}
        self.private = {i: f"\ufdd1{secrets.token_hex(8)}-{i}\ufdd1" for i in self.controls}
        self._known: Any = None

    def _controls(self, token: Any) -> bool:
        """Whether an added token gives a text its structure; others only abbreviate frequent strings."""
        text = token.content.strip()
        structural = token.special or text in (self.template or "") or re.fullmatch(r"<\|.*\|>", text)
        return len(text) > 1 and bool(structural)

    def encode(self, text: str, marked: bool = False) -> list[int]:
        if marked and MARK in text:
            ids = self._encode_marked(text)
        elif self.backend is not None:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.hf.encode(text, add_special_tokens=False, verbose=False)
        if len(ids) > ALLOWANCE + GROWTH * len(text):
            raise Refused(f"it turns {len(text):,} characters into {len(ids):,} tokens")
        return ids

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each control token in a text."""
        if self.backend is None:
            raise Refused("it has no tokenizer.json, which is needed to encode control tokens as plain text")
        encoding = self.backend.encode(text, add_special_tokens=False)
        found = []
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if i in self.controls:  # whose span may include adjacent blanks
                piece = text[start:end]
                start, end = end - len(piece.lstrip()), start + len(piece.rstrip())
                found.append((start, end, i))
        return found

    def mark(self, text: str) -> tuple[str, list[str]]:
        """The text with its control tokens marked, and those tokens in order of appearance."""
        text, found = text.replace(MARK, 2 * MARK), []
        for _ in range(20):  # since breaking one may form another
            spans = self.spans(text)
            if not spans:
                return text, found
            found += [self.controls[i] for _, _, i in spans]
            for start, _, _ in reversed(spans):
                text = text[: start + 1] + MARK + text[start + 1 :]
        raise Refused(f"it finds the control token {found[0]!r} even in text that was altered to avoid it")

    def _encode_marked(self, text: str) -> list[int]:
        """Token ids of a text, in which marked control tokens are plain text and others are control tokens.

        The others are replaced by secret spellings, the only ones by which a copy of the tokenizer recognises them.
        """
        pieces, end = [], 0
        for start, stop, i in self.spans(text):
            pieces += [text[end:start], self.private[i]]
            end = stop
        text = "".join(re.sub(f"{MARK}({MARK}?)", r"\1", piece) for piece in (*pieces, text[end:]))
        copy, names = self._copy()
        ids: list[int] = copy.encode(text, add_special_tokens=False).ids
        for i in ids:
            if i not in names and i in self.controls:
                raise Refused(f"its model produces the control token {self.controls[i]!r} from plain text")
        return [names.get(i, i) for i in ids]

    def _copy(self) -> tuple[Any, dict[Any, int]]:
        """The copy, and a map from its ids of added tokens to the tokenizer's own."""
        if self._known is None:
            from tokenizers import Tokenizer

            allow(2 * LOAD_SECONDS)  # needed only once; it also covers the rest of this message
            tree = json.loads(self.backend.to_str())
            for token in tree["added_tokens"]:
                if token["id"] in self.private:
                    token |= {"content": self.private[token["id"]], "normalized": False}
            copy = Tokenizer.from_str(json.dumps(tree))
            names: dict[Any, int] = {copy.token_to_id(token["content"]): token["id"] for token in tree["added_tokens"]}
            self._known = copy, names
        return self._known

    def render(self, messages: list[dict[str, str]]) -> str:
        random.seed(0)  # templates can use the filter `random`
        text = self.hf.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string=TODAY.strftime("%d %b %Y")
        )
        size = sum(len(message["content"]) for message in messages)
        if len(text) > ALLOWANCE + GROWTH * size:
            raise Refused(f"it turns {size:,} characters into {len(text):,}, over a megabyte more")
        if half := re.search("[\ud800-\udfff]", text):
            raise Refused(f"it writes half of a surrogate pair (U+{ord(half[0]):X}), want whole characters")
        return text


class Clock(datetime.datetime):
    """A clock that always shows TODAY."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return TODAY.replace(tzinfo=tz)

    today = utcnow = now  # pyright: ignore[reportAssignmentType]


LOADED: collections.OrderedDict[int, Loaded] = collections.OrderedDict()


def load(task: dict[str, Any]) -> dict[str, Any]:
    """Loads a folder's tokenizer under a key, and returns what the parent process needs to know about it."""
    hf = read(task["folder"])
    loaded = LOADED[task["key"]] = Loaded(hf)
    while len(LOADED) > KEEP:
        LOADED.popitem(last=False)
    loaded.encode("probe")
    return {
        "template": loaded.template,
        "size": max(hf.get_vocab().values()) + 1,
        "eos": hf.eos_token_id,
        "controls": list(loaded.controls.values()),
    }


def read(folder: str) -> Any:
    """The folder's tokenizer, loaded by `transformers`."""
    from transformers import AutoTokenizer, LlamaTokenizer

    options: Any = {"local_files_only": True, "trust_remote_code": False}
    hf = AutoTokenizer.from_pretrained(folder, **options)
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "vocab.json")
    if any(os.path.isfile(os.path.join(folder, name)) for name in names):
        return hf
    # A bare SentencePiece model: without a class name the conversion can miss the space that the model prepends.
    from sentencepiece import SentencePieceProcessor

    theirs, probe = SentencePieceProcessor(os.path.join(folder, "tokenizer.model")), "x is 12,  so  y"
    for candidate in (hf, LlamaTokenizer.from_pretrained(folder, **options)):
        if candidate.encode(probe, add_special_tokens=False) == theirs.encode(probe):
            return candidate
    raise Refused("its ids are not those of tokenizer.model; name the tokenizer_class in tokenizer_config.json")


def attempt(loaded: Loaded) -> None:
    """Renders typical messages, so that most faults of a template show before anything has been computed."""
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": "Think. " * 50}, {"role": "user", "content": "What is 1 + 1? " * 300}]
    loaded.render(turns[1:])
    try:
        loaded.render(turns)
    except TemplateError as error:
        if type(error) is not TemplateError:
            raise  # exactly TemplateError is what a template itself raises, for example to refuse system messages


def answer(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    if task["do"] == "load":
        return {"ok": load(task)}
    loaded = LOADED.get(task["key"])
    if loaded is None:
        return {"unknown": True}
    LOADED.move_to_end(task["key"])
    if task["do"] == "attempt":
        return {"ok": attempt(loaded)}
    results = []
    for one in task["each"]:
        allow(seconds)
        results.append(perform(loaded, task["do"], one))
    return {"ok": results}


def perform(loaded: Loaded, what: str, one: dict[str, Any]) -> Any:
    match what:
        case "render":
            text = opened(loaded.render(one["messages"]), one["opening"])
            return text if one["to"] == "text" else loaded.encode(text, one["to"] == "marked")
        case "encode":
            return loaded.encode(one["text"], one["marked"])
        case "mark":
            return loaded.mark(one["text"])
        case "decode":
            skip = not one["special"]
            return loaded.hf.decode(one["ids"], skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    raise ValueError(what)


def open_tag(opening: str) -> str | None:
    """The tag that an opening such as `<think>\\n` opens, here `think`; None where it opens none."""
    match = re.match(r"\s*<(\w+)>", opening)
    return match and match[1]


def opened(text: str, opening: str) -> str:
    """A rendered prompt with `opening` appended, unless the template itself has opened the turn that way."""
    if not opening or text.endswith(opening):
        return text
    tag = open_tag(opening)
    if tag:  # a template may close the thoughts before they begin
        text = re.sub(rf"<{tag}>\s*</{tag}>\s*\Z", "", text)
    if opening.strip() and text.rstrip().endswith(opening.strip()):
        # The template's own spacing is what the model knows; only what is missing is added.
        tail = text[text.rindex(opening.strip()) :]
        return text + opening.lstrip().removeprefix(tail) if opening.lstrip().startswith(tail) else text
    return text + opening


def fault(error: BaseException, memory_mib: int) -> dict[str, Any]:
    """Describes an error, with the line of the template that raised it, if any."""
    if isinstance(error, MemoryError):
        return {"fault": f"it ran out of memory ({memory_mib} MiB)", "line": None}
    line, frame = getattr(error, "lineno", None), error.__traceback__
    while frame:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    reason = (str(error).strip() or "no message").splitlines()[0][:300]
    return {"fault": reason if isinstance(error, Refused) else f"{type(error).__name__}: {reason}", "line": line}


def allow(seconds: float) -> None:
    """Allows this much CPU time from now on; then comes SIGXCPU, even in the middle of compiled code."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    memory_mib, seconds = int(sys.argv[1]), int(sys.argv[2])
    replies = os.dup(1)  # the pipe is for replies only: whatever a library prints goes to stderr
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    os.environ["HF_HUB_OFFLINE"] = "1"  # tokenizers are folders
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # transformers would import it for nothing
    import transformers.utils.chat_template_utils as templates
    from transformers import AutoTokenizer  # noqa: F401  (a lazy import, forced before the limits apply)

    templates.datetime = Clock  # pyright: ignore[reportPrivateImportUsage]
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # Linux; elsewhere the limit is not enforced
        taken = int(file.read().split()[0]) * resource.getpagesize()
        limit = taken + memory_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    write(replies, "ready")
    for line in sys.stdin.buffer:
        task = json.loads(line)
        budget = LOAD_SECONDS if task["do"] == "load" else seconds + len(line) / 1e6  # one second more per megabyte
        allow(budget)
        try:
            result = answer(task, budget)
        except BaseException as error:  # panics of the Rust parsers are not Exceptions
            result = fault(error, memory_mib)
        write(replies, result)


def write(handle: int, value: Any) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(handle, data) :]


if __name__ == "__main__":
    main()
