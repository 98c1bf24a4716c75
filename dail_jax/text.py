"""Text and token ids: a model folder's own tokenizer and chat template, and the ids that end a reply."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dail_jax.errors import UserError

Messages = Sequence[dict[str, str]]  # {"role": "system" | "user", "content": text}

FILES = ("tokenizer.json", "tokenizer.model")

# Some templates print today's date. A prompt must be the same tomorrow, when training resumes, so the date is the
# one that those templates fall back to.
FIXED = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its chat template. Make one with `load_tokenizer`."""

    hf: Any  # transformers.PreTrainedTokenizerBase
    folder: Path

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added before or after, and control tokens in it are recognised."""
        return self.hf.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of token ids, without control tokens unless `keep_special`."""
        # (a plain list: numpy and JAX integers are not accepted everywhere)
        plain = [int(i) for i in ids]
        return self.hf.decode(plain, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)

    def render_text(self, messages: Messages, opening: str = "") -> str:
        """The chat template's text for `messages`, ready for the assistant's turn, which begins with `opening`.

        Raises UserError where there is no template or it fails (a template may refuse a system message).
        """
        template = self.template
        if template is None:
            raise UserError(
                "got no chat template, want one in tokenizer_config.json or chat_template.jinja", file=self.folder
            )
        try:
            text = self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **FIXED)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise self._broken(_template_line(error), f"{type(error).__name__}: {error}") from None
        return _open(text, opening)

    def render(self, messages: Messages, opening: str = "") -> list[int]:
        """Token ids of `render_text`, encoded once as a whole."""
        return self.encode(self.render_text(messages, opening))

    @functools.cached_property
    def template(self) -> str | None:
        """The chat template's source."""
        template = self.hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @functools.cached_property
    def size(self) -> int:
        """The highest token id, plus one: the embedding needs at least so many rows."""
        return max(self.hf.get_vocab().values()) + 1

    @property
    def eos_id(self) -> int:
        """The token that ends a turn; raises UserError where the tokenizer names none."""
        if self.hf.eos_token_id is None:
            raise UserError("got a tokenizer without an end-of-sequence token, want eos_token", file=self.folder)
        return int(self.hf.eos_token_id)

    @property
    def pad_id(self) -> int:
        """What padding is filled with: masked everywhere, so any valid id serves."""
        return int(next((i for i in (self.hf.pad_token_id, self.hf.eos_token_id) if i is not None), 0))

    def _broken(self, line: int | None, problem: str) -> UserError:
        return UserError(
            f"got a chat template that fails: {problem}",
            file=self.folder,
            row=f"line {line}" if line else None,
            field="chat_template",
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder: `tokenizer.json` or a SentencePiece `tokenizer.model`.

    Nothing is fetched and no code of the folder runs. Its chat template, if any, is tried once in a process of its
    own, with limits on time and memory. Raises UserError.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError("got no such folder, want one with a tokenizer", file=folder)
    names = [name for name in FILES if (folder / name).is_file()]
    if not names and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise UserError(f"got no tokenizer file, want {' or '.join(FILES)}", file=folder)
    for name in (*names, "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).is_file():
            _refuse_placeholder(folder / name)
    try:
        hf = _load(folder)
        tokenizer = Tokenizer(hf, folder)
        tokenizer.encode("probe")
        settings = json.dumps({k: str(v) for k, v in hf.special_tokens_map.items()}, sort_keys=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust and C++ parsers' panics are no Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"got a tokenizer that does not load: {reason}", file=folder) from None
    if tokenizer.template is not None:
        line, problem = _try_template(tokenizer.template, settings)
        if problem:
            raise tokenizer._broken(line, problem)
    return tokenizer


def _load(folder: Path) -> Any:
    """The folder's tokenizer as `transformers` has it."""
    from transformers import AutoTokenizer, LlamaTokenizer

    options: Any = {"local_files_only": True, "trust_remote_code": False}
    hf = AutoTokenizer.from_pretrained(str(folder), **options)
    if any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "vocab.json")
    ):
        return hf
    # A bare SentencePiece model: without a class name the conversion can miss the space that the model puts in front.
    from sentencepiece import SentencePieceProcessor

    theirs, probe = SentencePieceProcessor(str(folder / "tokenizer.model")), "x is 12,  so  y"
    for candidate in (hf, LlamaTokenizer.from_pretrained(str(folder), **options)):
        if candidate.encode(probe, add_special_tokens=False) == theirs.encode(probe):
            return candidate
    raise ValueError("its ids are not those of tokenizer.model; name the tokenizer_class in tokenizer_config.json")


def stop_ids(model_folder: str | Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token id that ends a reply, ascending: those of generation_config.json and config.json, and the
    tokenizer's own. Raises UserError where there is none."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(model_folder) / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError, OSError) as error:
            raise UserError(f"want a JSON object: {error}", file=path) from None
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"got {value!r:.80}, want a token id or a list of them", file=path, field="eos_token_id")
        found.update(ids)
    if tokenizer.hf.eos_token_id is not None or not found:
        found.add(tokenizer.eos_id)
    return tuple(sorted(found))


def mention(text: str, phrases: Iterable[str]) -> str | None:
    """The first of `phrases` that a text has, whatever its case and spacing, as words (also in the plural)."""
    plain = " ".join(text.casefold().split())
    for phrase in phrases:
        wanted = " ".join(phrase.casefold().split())
        if wanted and re.search(rf"(?<!\w){re.escape(wanted)}s?(?!\w)", plain):
            return phrase
    return None


def open_tag(opening: str) -> str | None:
    """The tag that an opening such as `<think>\\n` opens, here `think`; None where it opens none."""
    match = re.match(r"\s*<(\w+)>", opening)
    return match and match[1]


def _open(text: str, opening: str) -> str:
    """Appends `opening` to a rendered prompt, unless the template itself has opened the turn that way."""
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


def _refuse_placeholder(path: Path) -> None:
    """Raises UserError where a file was not downloaded but only stands for one."""
    with open(path, "rb") as file:
        head = file.read(200).lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise UserError("got a git-LFS pointer, want the file itself: it was not downloaded", file=path)
    if head[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise UserError("got an HTML page, want the file itself: it was not downloaded", file=path)


# ---------------------------------------------------------------------------------------------------
# The trial of a chat template
# ---------------------------------------------------------------------------------------------------

# A template is a program by whoever made the folder. The sandbox keeps it from the machine, but not from looping or
# from filling memory, so its first run is in a process that has limits. (CPU time, so that a busy machine is no
# reason to fail; the limits are set inside, since a fork hook is not safe beside JAX's threads.)
_TRIAL = r"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (5, 6))
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)

def refuse(message):
    raise jinja2.TemplateError(message)

def answer(line, problem):
    json.dump([line, problem], sys.stdout)
    sys.exit()

task = json.load(sys.stdin)
env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                    extensions=[Generation, jinja2.ext.loopcontrols])
env.filters["tojson"] = lambda x, **_: json.dumps(x)
env.globals.update(raise_exception=refuse, strftime_now=lambda form: "26 Jul 2024")
turns = [{"role": "system", "content": "Think. " * 50}, {"role": "user", "content": "What is 1 + 1? " * 300}]
try:
    template = env.from_string(task["template"])
    for messages in (turns[1:], turns):
        try:
            text = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                                   **task["settings"])
        except jinja2.TemplateError as error:
            if len(messages) == 1 or type(error) is not jinja2.TemplateError:
                raise  # a template that refuses system messages is a sound one
        if len(text) > 1_000_000:
            answer(None, "it makes a megabyte of a short message")
except MemoryError:
    answer(None, "it ran out of memory (1 GiB)")
except Exception as error:
    line, frame = getattr(error, "lineno", None), error.__traceback__
    while frame:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    answer(line, f"{type(error).__name__}: {error}")
answer(None, None)
"""


@functools.lru_cache
def _try_template(template: str, settings: str) -> tuple[int | None, str | None]:
    """(line, problem) of a first run under limits, (None, None) where it went well. Once a template."""
    task = json.dumps({"template": template, "settings": {**json.loads(settings), **FIXED}})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL], input=task, capture_output=True, text=True, timeout=120
        )
        line, problem = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return None, "it did not end within 2 minutes"
    except ValueError:  # killed by the limit on CPU time, or out of memory beyond telling
        return None, "it did not end within 5 seconds of CPU time or within 1 GiB of memory"
    return line, problem


def _template_line(error: BaseException) -> int | None:
    """The line of the template that an error of its rendering came from."""
    line, frame = getattr(error, "lineno", None), error.__traceback__
    while frame:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line
