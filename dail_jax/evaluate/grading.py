"""Answers: taking them out of a text, and deciding whether two are the same, however hostile the text is.

Most comparisons are decided here by a few certain rules (the same string, two integers, lists of integers, words).
The others go to math-verify in worker processes with limits on memory and CPU time, so that no answer can stop or
bring down the caller. A verdict is right or wrong with a reason:

    equal, different   the comparison was made
    no answer          nothing was extracted
    unparseable        not mathematics that can be read
    incomparable       it can be read, but the comparison fails
    too long, too deep, too large    refused by a look at the text
    timeout, memory, crash           the worker met its limit, or died
    gold               the gold answer cannot be read: see `Grader.check_gold`
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

AnswerType = Literal["math", "integer", "choice"]

MAX_LENGTH = 2000  # characters of an answer
MAX_DIGITS = 1000  # of one number
MAX_DEPTH = 40  # of nested brackets
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# ---------------------------------------------------------------------------------------------------
# Extraction
# ---------------------------------------------------------------------------------------------------

_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_STATED = r"(?i:answer)\s*(?:(?i:is)|:|=)[\s:*$]*(?:\\\w+\{)?"
_STATED_INTEGER = re.compile(_STATED + r"([+-]?\d[\d,]*+)(?!\.\d)")  # possessive: no backtracking over a megabyte
_STATED_CHOICE = re.compile(_STATED + r"\(?([A-H])\b")
_LETTER = re.compile(r"\(?([A-Z])\)?(?:[.:,)\s].*)?|\(?([a-z])\)?\.?", re.DOTALL)


def extract(
    text: str, answer_type: AnswerType = "math", *, thinking: bool = False, forced: str | None = None
) -> str | None:
    """The answer in a completion, or None: the balanced `\\boxed{...}` of the answer part that opens last.

    The answer part follows the last `</think>`. Where thinking began (in the text, or by `thinking=True` in the
    prompt) and never ended there is none: a box among thoughts is not an answer. `forced` is the text that closed
    the thinking of a cut sample and what was drawn after it; then only this counts. For integers and choices an
    "answer is 12" or "Answer: (C)" serves where there is no box. A choice comes back as its capital letter.
    """
    if forced is not None:
        part = forced
    elif THINK_CLOSE in text:
        part = text[text.rindex(THINK_CLOSE) + len(THINK_CLOSE) :]
    elif thinking or THINK_OPEN in text:
        return None
    else:
        part = text
    box = last_box(part)
    if answer_type == "choice":
        if box is not None:
            return _letter(box)
        stated = _STATED_CHOICE.findall(part)
        return stated[-1] if stated else None
    if box is None and answer_type == "integer":
        stated = _STATED_INTEGER.findall(part)
        box = stated[-1].rstrip(",") if stated else None
    return box.strip() or None if box is not None else None


def last_box(text: str) -> str | None:
    """The content of the balanced `\\boxed{...}` that opens last, in one pass over the text."""
    stack: list[int | None] = []  # for each open brace: where the box's content starts, None for other braces
    best: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[0].startswith("\\boxed"):
            stack.append(token.end())
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


def _letter(text: str) -> str | None:
    match = _LETTER.fullmatch(_unwrap(_tidy(text)))
    return (match[1] or match[2]).upper() if match else None


# ---------------------------------------------------------------------------------------------------
# Forms that need no algebra
# ---------------------------------------------------------------------------------------------------

_DROP = re.compile(r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|\\[!()\[\]]|\\?\$")
_BLANK = re.compile(r"\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_INTEGER = re.compile(r"([+-]?)(\d++)(?:\.0++)?")  # possessive, as below: linear in hostile lengths
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?: \d{3})+")
_ROW = re.compile(r"[+-]?\d+(?: [+-]?\d+)+")
_LIST = re.compile(r"\(? ?([+-]?\d+(?:(?: ?[,;] ?| )[+-]?\d+)*) ?\)?")
_WORDS = re.compile(r"[A-Za-z]+(?:(?:, ?| |-)[A-Za-z]+)*")
_TOWER = re.compile(r"\^[{(]*\d+\^[{(]*\d+\^|\^[{(]*\d{7}|\d{6}[})]*!|!!!")


def normalise(text: str) -> str:
    """A form in which spellings of the same answer agree: spaces, delimiters, `\\dfrac`, `1,234`, `007`, `5.0`."""
    text = _unwrap(_tidy(text))
    if _ROW.fullmatch(text):
        return text
    text = re.sub(r" ?([^\w ]) ?", r"\1", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return _integer(text) or text


def _tidy(text: str) -> str:
    """Without what only lays out; runs of blanks are one space."""
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("{,}", ",")
    text = _BLANK.sub(" ", _DROP.sub("", text))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).strip()
    return text[:-1].rstrip() if text.endswith(".") else text


def _unwrap(text: str) -> str:
    """The inside of `\\text{...}` where that is all."""
    match = _TEXT.fullmatch(text)
    return match[1].strip() if match else text


def _integer(text: str) -> str | None:
    """A canonical integer, as text: Python refuses to convert very long ones."""
    match = _INTEGER.fullmatch(text)
    if not match:
        return None
    digits = match[2].lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


def _rows_agree(gold: str, prediction: str) -> bool | None:
    """For integers that stand side by side, which math-verify would add; None where neither answer is such a row."""
    if not _ROW.fullmatch(gold) and not _ROW.fullmatch(prediction):
        return None

    def parts(text: str) -> list[str | None]:
        match = _LIST.fullmatch(text)
        return [_integer(part) for part in re.split(r"[ ,;]+", match[1])] if match else [text]

    if _integer(gold) and _GROUPED.fullmatch(prediction):  # 10 000; but a row that is asked for stays a row
        return _integer(gold) == _integer(prediction.replace(" ", ""))
    return parts(gold) == parts(prediction)


def _words_agree(gold: str, prediction: str) -> bool | None:
    """For answers in words, which math-verify would multiply letter by letter; None where it is not about words."""
    plain = [_TEXT.sub(r" \1 ", text) for text in (gold, prediction)]
    words = [re.split(r"[ ,-]+", text.strip().casefold()) for text in plain]
    if not all(_WORDS.fullmatch(" ".join(w)) for w in words):
        return None
    if "\\" in gold + prediction or any(len(w) > 3 or w in ("yes", "no") for ws in words for w in ws):
        return words[0] == words[1]
    return None


def refusal(text: str) -> str | None:
    """Why an answer should not be computed with, from a look at it; None where it may."""
    if len(text) > MAX_LENGTH or re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return "too long"
    depth = braces = deepest = 0
    for char in re.findall(r"(?<!\\)[{}]|[()\[\]]", text):
        step = 1 if char in "([{" else -1
        depth += step
        braces += step if char in "{}" else 0
        deepest = max(deepest, depth)
        if braces < 0:
            return "unparseable"
    if deepest > MAX_DEPTH:
        return "too deep"
    if braces:
        return "unparseable"
    return "too large" if _TOWER.search(re.sub(r"\s|\\left|\\right", "", text)) else None


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and why (see the module's list of reasons)."""

    correct: bool
    reason: str


def quick_verdict(prediction: str | None, gold: str, answer_type: AnswerType = "math") -> Verdict | None:
    """The verdict where no algebra is needed, or None."""
    if prediction is None or not prediction.strip():
        return Verdict(False, "no answer")
    if prediction.strip() == gold.strip():
        return Verdict(True, "equal")
    if len(prediction) > MAX_LENGTH:
        return Verdict(False, "too long")
    if answer_type == "choice":
        letters = _letter(gold), _letter(prediction)
        if None in letters:
            return Verdict(False, "gold" if letters[0] is None else "unparseable")
        return _verdict(letters[0] == letters[1])
    one, other = normalise(gold), normalise(prediction)
    if one == other and one:
        return Verdict(True, "equal")
    reason = refusal(prediction)
    if reason is None and refusal(gold) is not None:
        reason = "gold"
    if reason is not None:
        return Verdict(False, reason)
    if _integer(one) and _integer(other):
        return Verdict(False, "different")
    for rule in (_rows_agree, _words_agree):
        agree = rule(_tidy(gold), _tidy(prediction))
        if agree is not None:
            return _verdict(agree)
    return None


def _verdict(agree: bool) -> Verdict:
    return Verdict(agree, "equal" if agree else "different")


# ---------------------------------------------------------------------------------------------------
# Algebra, in processes that may die
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one comparison may use. The wall clock only ends what sleeps: busy work meets the CPU limit first."""

    memory_mib: int = 1024
    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    start_seconds: float = 60.0
    comparisons: int = 500  # then the worker is replaced, since sympy's caches grow


class _Worker:
    """One process at a time, started when first asked and again after it was killed."""

    def __init__(self, limits: Limits):
        self.limits, self.process, self.served, self.closed = limits, None, 0, False
        self.process: subprocess.Popen[bytes] | None

    def ask(self, gold: str, prediction: str | None) -> str:
        """The reason of a verdict; with `prediction=None`, `equal` where the gold answer can be read."""
        while True:
            if self.served >= self.limits.comparisons:
                self.stop()
            fresh = self.process is None
            process = self.process or self._start()
            self.served += 1
            reason = self._exchange(process, json.dumps([gold, prediction]).encode() + b"\n")
            if reason in ("timeout", "memory", "crash"):
                self.stop()
                # Memory may have been used up by earlier answers: only a fresh process can tell.
                if reason != "timeout" and not fresh:
                    continue
            return reason

    def _start(self) -> subprocess.Popen[bytes]:
        if self.closed:
            raise RuntimeError("the grader was closed")
        # A path, not a module: nothing of the package (JAX) is imported. A fixed hash seed: sympy orders sets by it.
        command = [sys.executable, "-P", str(Path(__file__).with_name("verify_worker.py")),
                   str(self.limits.memory_mib), str(self.limits.cpu_seconds)]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0"}, start_new_session=True,
        )  # fmt: skip
        self.served = 0
        if (reply := self._read(self.process, self.limits.start_seconds)) != "ready":
            self.stop()
            raise RuntimeError(f"the grading worker did not start ({reply}): try {' '.join(command)}")
        return self.process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> str:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return "crash"
        return self._read(process, self.limits.wall_seconds)

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> str:
        assert process.stdout is not None
        handle, reply, deadline = process.stdout.fileno(), b"", time.monotonic() + seconds
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while not reply.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return "timeout"
            piece = os.read(handle, 4096)
            if not piece:
                died = {-signal.SIGXCPU: "timeout", -signal.SIGKILL: "memory"}  # SIGKILL: the system was out of it
                return died.get(process.wait(), "crash")
            reply += piece
        return json.loads(reply)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError), self.process:  # closes the pipes and waits
                pass
            self.process = None


@dataclass
class Grader:
    """Grades answers; a context manager, since it may have started processes (never more than `workers`).

    `grade` and `grade_many` may be called from one thread at a time. Verdicts are remembered.
    """

    workers: int = 2
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._all = [_Worker(self.limits) for _ in range(max(1, self.workers))]
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()  # last in, first out: one at a time needs one process
        for worker in reversed(self._all):
            self._free.put(worker)
        self._threads: ThreadPoolExecutor | None = None
        self._known: dict[tuple[str, str | None], str] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.closed = True
            if worker.process is not None:
                worker.process.kill()  # ends what a thread may still be waiting for
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.stop()

    @property
    def processes(self) -> int:
        """How many worker processes are alive."""
        return sum(worker.process is not None for worker in self._all)

    def grade(self, prediction: str | None, gold: str, answer_type: AnswerType = "math") -> Verdict:
        return self.grade_many([(prediction, gold, answer_type)])[0]

    def grade_many(self, items: Sequence[tuple[str | None, str, AnswerType]]) -> list[Verdict]:
        """One verdict for each (prediction, gold, answer type), in order."""
        verdicts = [quick_verdict(*item) for item in items]
        keys = {i: (_tidy(items[i][1]), _tidy(items[i][0] or "")) for i, known in enumerate(verdicts) if known is None}
        self._learn(list(keys.values()))
        for i, key in keys.items():
            verdicts[i] = Verdict(self._known[key] == "equal", self._known[key])
        return [verdict for verdict in verdicts if verdict is not None]

    def check_gold(self, gold: str, answer_type: AnswerType = "math") -> str | None:
        """Why a gold answer cannot be graded against, in words for an error message; None where it can."""
        shown = repr(gold if len(gold) <= 60 else gold[:57] + "...")
        if answer_type == "choice":
            return None if _letter(gold) else f"got {shown}, want one letter"
        if answer_type == "integer":
            return None if _integer(normalise(gold)) else f"got {shown}, want an integer"
        reason = "no answer" if not gold.strip() else refusal(gold)
        if reason is None:
            text = _tidy(gold)
            if _integer(normalise(gold)) or _ROW.fullmatch(text) or _words_agree(text, text):
                return None
            self._learn([(text, None)])
            reason = self._known[text, None]
        return None if reason == "equal" else f"got {shown}, want mathematics that can be read ({reason})"

    def _learn(self, keys: Sequence[tuple[str, str | None]]) -> None:
        """Has the workers compare what is not yet known."""
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if len(new) == 1:
            self._known[new[0]] = self._ask(new[0])
        elif new:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(len(self._all), thread_name_prefix="grading")
            self._known.update(zip(new, self._threads.map(self._ask, new), strict=True))

    def _ask(self, key: tuple[str, str | None]) -> str:
        worker = self._free.get()
        try:
            return worker.ask(*key)
        finally:
            self._free.put(worker)


def check_gold(gold: str, answer_type: AnswerType = "math") -> str | None:
    """`Grader.check_gold` for a single answer."""
    with Grader(workers=1) as grader:
        return grader.check_gold(gold, answer_type)
