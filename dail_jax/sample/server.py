"""A sampler that asks a server with OpenAI's completions API, such as vLLM or SGLang: see docs/servers.md.

A request asks for one sample, with a seed of its own. What may pass (broken connections, overload, answers that are no
responses) is asked for again; what cannot pass ends the run with one line.
"""

from __future__ import annotations

import asyncio
import collections
import email.utils
import hashlib
import json
import math
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2
import numpy as np
from pydantic import Field, FiniteFloat, ValidationError

from dail_jax import config as config_lib
from dail_jax.errors import UserError, Waiting
from dail_jax.metrics import log
from dail_jax.sample.sampler import Request, Sample, ScoredSample
from dail_jax.shapes import Natural, Shape, Text
from dail_jax.text import Tokenizer

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before a request is repeated; each pause is twice the one before
CONNECT_SECONDS = 30.0
LOOK_SECONDS = 10.0  # for the list of models
PULSE = 1.0  # seconds after which a signal is heard, if no sample arrives
NO_TOP_K = "OpenAI's API has no top_k: want 0, or a server that takes prompts: ids"
NEVER = -100  # the bias that OpenAI's API has for a token that is not to be drawn


def seed_of(seed: int, name: str, sample: int) -> int:
    """A sample's seed, below 2**31, from the run's seed, its request's name and its index."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{sample}".encode()).digest()[:4], "big") >> 1


# ---------------------------------------------------------------------------------------------------
# What a server sends
# ---------------------------------------------------------------------------------------------------


class LogProbs(Shape):
    tokens: list[str] | None = None
    token_logprobs: list[FiniteFloat | None] | None = None


class Choice(Shape):
    text: Text
    finish_reason: str | None = None
    token_ids: list[Natural] | None = None
    prompt_token_ids: list[Natural] | None = None
    logprobs: LogProbs | None = None
    stop_reason: int | str | None = None  # vLLM: the stop token or text; null for the model's own end token
    matched_stop: int | str | None = None  # SGLang: the same, end tokens included


class Usage(Shape):
    prompt_tokens: Natural | None = None
    completion_tokens: Natural | None = None


class Completion(Shape):
    """A response to one request for one sample."""

    model: str | None = None
    choices: list[Choice] = Field(min_length=1, max_length=1)
    usage: Usage | None = None


class ServedModel(Shape):
    id: str
    max_model_len: Natural | None = None  # of vLLM and SGLang: the most tokens of prompt and response together


class ServedModels(Shape):
    data: list[ServedModel]


class Again(Exception):
    """A request that has failed and may be repeated, after `pause` seconds if the server has asked for so many."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


def parse(response: httpx2.Response, shape: type[Shape]) -> Any:
    """A response's JSON; raises Again for one that is damaged, or that reports trouble that may pass.

    Raises ValueError, with what the server says, for a request that it will not take.
    """
    status = response.status_code
    if status >= 500 or status in (408, 425, 429):
        raise Again(f"it answered {status}: {_said(response)}", retry_after(response.headers.get("retry-after")))
    if status != 200:
        raise ValueError(f"it answered {status}: {_said(response)}")
    try:
        return shape.model_validate(json.loads(response.content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Again(f"it sent no {shape.__name__}: {where}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise Again(f"it sent no JSON: {response.text[:80]!r}") from None


def _said(response: httpx2.Response) -> str:
    """The message in an error's body, which servers wrap in different ways."""
    try:
        tree = json.loads(response.content)
    except (ValueError, RecursionError):
        tree = response.text
    for key in ("error", "message", "detail"):
        if isinstance(tree, dict) and key in tree:
            tree = tree[key]
    return str(tree)[:300] or "(nothing)"


def retry_after(value: str | None) -> float | None:
    """The seconds of a header Retry-After, which holds a number or a date; None without one that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


# ---------------------------------------------------------------------------------------------------
# Looking
# ---------------------------------------------------------------------------------------------------


def headers(cfg: config_lib.Server) -> dict[str, str]:
    """The API key as a header; raises UserError if its variable is not set."""
    if cfg.key_variable is None:
        return {}
    key = os.environ.get(cfg.key_variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"want an API key in the environment variable {cfg.key_variable}", field="sampler.key_variable")
    return {"Authorization": f"Bearer {key}"}


def find_model(cfg: config_lib.Server) -> ServedModel:
    """The model as the server lists it; raises Waiting if it does not answer, or has no such model."""
    try:
        response = httpx2.get(f"{cfg.url}/models", headers=headers(cfg), timeout=LOOK_SECONDS)
        known = {one.id: one for one in parse(response, ServedModels).data}
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise Waiting(f"no server answers: {_reason(error)}", file=f"{cfg.url}/models") from None
    except (Again, ValueError) as error:
        raise UserError(f"want a list of models, but {error}", file=f"{cfg.url}/models") from None
    for name in names_of(cfg.model):
        if name in known:
            return known[name]
    raise Waiting(f"has no model {cfg.model!r}, only {', '.join(known) or 'none at all'}", file=cfg.url)


def names_of(model: str) -> tuple[str, ...]:
    """What a server may call a model: SGLang knows MODEL:ADAPTER, and lists MODEL."""
    return model, model.rpartition(":")[0] or model


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


# ---------------------------------------------------------------------------------------------------
# The sampler
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One sample to ask for."""

    name: str
    sample: int
    limit: int
    prompt: tuple[int, ...]
    text: str | None  # of the prompt, where it is sent as text


Found = Sample | Exception | None  # an error, or None, is the last that a worker finds


@dataclass
class Server:
    """Draws samples by asking a server. With `scored`, asks for the tokens' log-probabilities as well.

    A sample is a `ScoredSample` where they came, one for each token, and a `Sample` where not. They are the model's own,
    so they are what a token was drawn with only if `sampling.is_plain`.
    """

    cfg: config_lib.Server
    sampling: config_lib.Sampling
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    seed: int
    never: tuple[int, ...] = ()  # token ids that are never drawn
    scored: bool = False
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    def __post_init__(self):
        if self.cfg.prompts == "text" and self.sampling.top_k:
            raise UserError(NO_TOP_K, field="sampling.top_k")
        self.headers = headers(self.cfg)

    def figures(self) -> dict[str, float]:
        """Tokens drawn, responses used, requests that were repeated, and responses whose text was tokenised again."""
        return {name: self.counts[name] for name in ("tokens", "responses", "repeated", "retokenised")}

    def run(self, requests: Iterable[Request]) -> Iterator[Sample | None]:
        """Yields samples as they arrive, and None where none has for PULSE seconds.

        Raises UserError for what repeating a request does not mend, once the requests that are open have ended.
        """
        jobs = collections.deque(job for request in requests for job in self._jobs(request))
        with asyncio.Runner() as runner:
            found: asyncio.Queue[Found] = asyncio.Queue()
            client = httpx2.AsyncClient(
                headers=self.headers,
                timeout=httpx2.Timeout(self.cfg.timeout, connect=min(CONNECT_SECONDS, self.cfg.timeout), pool=None),
                limits=httpx2.Limits(
                    max_connections=self.cfg.concurrency, max_keepalive_connections=self.cfg.concurrency
                ),
            )
            workers = [self._work(client, jobs, found) for _ in range(min(self.cfg.concurrency, len(jobs)))]
            tasks = [runner.get_loop().create_task(worker) for worker in workers]
            working, error = len(tasks), None
            try:
                while working:
                    try:
                        one = runner.run(asyncio.wait_for(found.get(), PULSE))
                    except TimeoutError:
                        yield None
                        continue
                    if isinstance(one, Sample):
                        yield one
                    else:
                        working, error = working - 1, error or one
                if error is not None:
                    raise error
            finally:
                for task in tasks:
                    task.cancel()
                runner.run(client.aclose())

    def _jobs(self, request: Request) -> Iterator[Job]:
        (prompt,) = request.prompts
        text = None
        if self.cfg.prompts == "text":
            text = self.tokenizer.decode(prompt, keep_special=True)
            if self.tokenizer.encode(text) != list(prompt):
                raise UserError(
                    "its prompt is not the same token ids again once it is text, as where a problem holds the text of a "
                    "control token: want prompts: ids",
                    row=request.name,
                )
        for sample in request.samples:
            yield Job(request.name, sample, request.limit, prompt, text)

    async def _work(
        self, client: httpx2.AsyncClient, jobs: collections.deque[Job], found: asyncio.Queue[Found]
    ) -> None:
        """Draws one sample after the other, as long as there are jobs. After an error, nobody begins another."""
        error = None
        try:
            while jobs:
                found.put_nowait(await self._draw(client, jobs.popleft()))
        except Exception as caught:
            jobs.clear()
            error = caught
        found.put_nowait(error)

    async def _draw(self, client: httpx2.AsyncClient, job: Job) -> Sample:
        body = self.body(job)
        for attempt in range(self.cfg.retries + 1):
            try:
                return self.read(job, await self._ask(client, body))
            except Again as failed:
                reason, asked = str(failed), failed.pause
            except ValueError as error:
                raise self._error(job, str(error)) from None
            if attempt == self.cfg.retries:
                break
            if asked is not None and asked > self.cfg.timeout:
                raise self._error(job, f"{reason}; it asks for a pause of {asked:.0f} seconds, longer than timeout")
            self.counts["repeated"] += 1
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # not all at once
            await asyncio.sleep(max(pause, asked or 0.0))
        raise self._error(job, f"{reason}, and so {self.cfg.retries + 1} times; what was drawn is kept: call again")

    async def _ask(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> Completion:
        try:
            async with asyncio.timeout(self.cfg.timeout):
                response = await client.post(f"{self.cfg.url}/completions", json=body)
        except TimeoutError:
            raise Again(f"no response within {self.cfg.timeout:g} seconds") from None
        except httpx2.HTTPError as error:
            raise Again(f"the connection failed: {_reason(error)}") from None
        return parse(response, Completion)

    def _error(self, job: Job, message: str) -> UserError:
        return UserError(message, file=self.cfg.url, row=f"sample {job.sample} of {job.name}")

    def body(self, job: Job) -> dict[str, Any]:
        """What is sent for a sample. Nothing is left to the server's defaults, which may be those of the model's files."""
        s = self.sampling
        body: dict[str, Any] = {
            "model": self.cfg.model,
            "prompt": list(job.prompt) if job.text is None else job.text,
            "max_tokens": job.limit,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "seed": seed_of(self.seed, job.name, job.sample),
        }
        if s.presence_penalty or self.cfg.prompts == "ids":
            body["presence_penalty"] = s.presence_penalty
        if self.never:
            body["logit_bias"] = {str(token): NEVER for token in self.never}
        if self.scored and s.is_plain:
            body["logprobs"] = 1
        if self.cfg.prompts == "ids":
            body |= {
                "top_k": s.top_k or -1,
                "min_p": 0.0,
                "frequency_penalty": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": list(self.stops),
                "skip_special_tokens": False,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,  # those of log-probabilities, where the ids themselves do not come
            }
        return body

    def read(self, job: Job, completion: Completion) -> Sample:
        """The sample in a response; raises ValueError for one that is not what was asked for, Again for half of one."""
        choice, usage = completion.choices[0], completion.usage or Usage()
        if completion.model is not None and completion.model.partition("@")[0] not in names_of(self.cfg.model):
            raise ValueError(f"it answered for the model {completion.model!r}, want {self.cfg.model!r}")
        if choice.finish_reason not in ("stop", "length"):
            raise Again(f"its response ended with the reason {choice.finish_reason!r}, want stop or length")
        self._compare_prompt(job, choice, usage)
        given = _token_ids(choice)
        ids = self.tokenizer.encode(choice.text) if given is None else given
        if any(token in self.stops for token in ids[:-1]):
            raise ValueError("its response goes on after a token that ends replies: does it know stop_token_ids?")
        if choice.finish_reason == "stop" and (not ids or ids[-1] not in self.stops):
            ids = [*ids, self._stop(choice)]
        kept = ids[:-1] if ids and ids[-1] in self.stops else ids
        count = usage.completion_tokens  # as the server counts; None where nobody knows
        if given is not None:
            if count not in (None, len(ids), len(kept)):
                raise ValueError(f"it sent {len(ids)} token ids, and counts {count}")
            if any(token in self.never for token in ids):
                raise ValueError("it drew a token of sampling.suppress: does it know logit_bias?")
            count = len(ids)
        if count is not None and count > job.limit:
            raise ValueError(f"it drew {count} tokens, and {job.limit} were asked for")
        if choice.finish_reason == "length" and count is not None and count < job.limit and kept == ids:
            raise ValueError(
                f"its response was cut after {count} of {job.limit} tokens: want a server with a longer context"
            )
        self._compare_text(choice.text, ids, kept)
        if given is None:
            self._note_retokenised()
            ids = ids[: job.limit]  # another division into tokens may have more of them
        if not ids:
            raise ValueError("its response has neither text nor token ids")
        self.counts.update(tokens=len(ids), responses=1)
        finish: Literal["stop", "length"] = "stop" if ids[-1] in self.stops else "length"
        return self._scored(Sample(job.name, job.sample, np.array(ids), finish), choice.logprobs)

    def _compare_prompt(self, job: Job, choice: Choice, usage: Usage) -> None:
        if choice.prompt_token_ids is not None and choice.prompt_token_ids != list(job.prompt):
            raise ValueError("it read other token ids than those of the prompt: want a server with the same tokenizer")
        if usage.prompt_tokens not in (None, len(job.prompt)):
            raise ValueError(
                f"it read a prompt of {usage.prompt_tokens} tokens, and there are {len(job.prompt)}: want a server with "
                "the same tokenizer, which adds none of its own"
            )

    def _compare_text(self, text: str, ids: Sequence[int], kept: Sequence[int]) -> None:
        """Raises ValueError if the server's text is not that of the token ids: with or without control tokens and the
        stop token, and blanks and halves of characters aside."""
        for tokens, keep_special in ((kept, True), (kept, False), (ids, True)):
            if _squeezed(self.tokenizer.decode(tokens, keep_special)) == _squeezed(text):
                return
        raise ValueError("its token ids stand for another text than it sent: want a server with the same tokenizer")

    def _stop(self, choice: Choice) -> int:
        """The token that ended a response which does not hold it."""
        named = choice.stop_reason if choice.stop_reason is not None else choice.matched_stop
        if named is not None and named not in self.stops:
            raise ValueError(f"it stopped at {named!r}, want one of the model's end tokens {list(self.stops)}")
        eos = self.tokenizer.eos
        return named if isinstance(named, int) else eos if eos in self.stops and eos is not None else self.stops[0]

    def _note_retokenised(self) -> None:
        if not self.counts["retokenised"]:
            log(f"{self.cfg.url}: sends no token ids: its texts are tokenised again, which may divide them otherwise")
        self.counts["retokenised"] += 1

    def _scored(self, sample: Sample, found: LogProbs | None) -> Sample:
        """The sample with its log-probabilities, if there is one for each of its tokens."""
        values = (found and found.token_logprobs) or []
        scores = [value for value in values if value is not None]
        if not self.scored or not self.sampling.is_plain or len(scores) != len(sample.tokens):
            return sample
        logq = np.array(scores, np.float32)
        by_student = np.ones(len(logq), bool)
        return ScoredSample(sample.name, sample.sample, sample.tokens, sample.finish, logq, logq, logq, by_student)


def _token_ids(choice: Choice) -> list[int] | None:
    """A response's token ids, also where they stand in place of the tokens of its log-probabilities."""
    if choice.token_ids is not None:
        return choice.token_ids
    found = [
        re.fullmatch(r"token_id:(\d{1,10})", token) for token in (choice.logprobs and choice.logprobs.tokens) or []
    ]
    return [int(one[1]) for one in found if one] if found and all(found) else None


def _squeezed(text: str) -> str:
    return "".join(text.split()).replace("\ufffd", "")
