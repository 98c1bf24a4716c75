"""The sampler that asks a server: what it sends, what it makes of responses, what it repeats and what it gives up."""

import email.utils
import re
import time

import completions
import numpy as np
import pytest
from completions import StandIn

from dail_jax import config as config_lib
from dail_jax.errors import UserError
from dail_jax.sample import server
from dail_jax.sample.sampler import Request, ScoredSample, checked

PROMPTS = ((3, 14, 15, 9), (3, 26, 5))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def requests():
    return [Request("a", (PROMPTS[0],), (0, 1, 2), 40), Request("b", (PROMPTS[1],), (1, 4), 12)]


def sampler(stand_in, sampling=None, never=(), scored=False, stops=None, **more):
    cfg = stand_in.config(**more)
    stops = stops or (stand_in.tokenizer.eos_id,)
    found = config_lib.Sampling.model_validate({"temperature": 0.7, "top_p": 0.9, **(sampling or {})})
    return server.Server(cfg, found, stand_in.tokenizer, stops, 7, never, scored)


def samples(one, requests):
    """All samples, which keep the protocol, as they arrive."""
    return (s for s in checked(one, requests) if s is not None)


def drawn(one, requests):
    """{(name, index): token ids} of all samples."""
    return {(s.name, s.sample): s.tokens.tolist() for s in samples(one, requests)}


def expected(stand_in, requests, seed=7):
    return {
        (r.name, i): completions.reply(
            stand_in.tokenizer,
            {"prompt": list(r.prompts[0]), "seed": server.seed_of(seed, r.name, i), "max_tokens": r.limit},
        )
        for r in requests
        for i in r.samples
    }


def test_what_is_sent_and_what_comes_back(requests):
    with StandIn(pause=0.1) as stand_in:
        one = sampler(stand_in, {"top_k": 5, "presence_penalty": 1.5}, never=(2,))
        assert drawn(one, requests) == expected(stand_in, requests)
        bodies = {body["seed"]: body for body in stand_in.bodies}
        assert len(bodies) == len(stand_in.bodies) == 5  # each sample once, each with a seed of its own
        assert bodies[server.seed_of(7, "b", 4)] == {
            "model": "mine",
            "prompt": list(PROMPTS[1]),
            "max_tokens": 12,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": server.seed_of(7, "b", 4),
            "presence_penalty": 1.5,
            "logit_bias": {"2": -100},
            "top_k": 5,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [stand_in.tokenizer.eos_id],
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        assert stand_in.most == stand_in.connections == 3  # at a time, over connections that stay open
        assert "Authorization" not in stand_in.headers[0]
        tokens = sum(map(len, expected(stand_in, requests).values()))
        assert one.figures() == {"tokens": tokens, "responses": 5, "repeated": 0, "retokenised": 0}


def test_seeds_follow_from_seed_name_and_index():
    seeds = {server.seed_of(seed, name, i) for seed in (1, 2) for name in ("a", "b") for i in range(100)}
    assert len(seeds) == 400 and min(seeds) >= 0 and max(seeds) < 2**31
    assert server.seed_of(1, "a", 0) == server.seed_of(1, "a", 0)


def test_text_where_a_server_takes_no_ids(requests, capsys):
    """OpenAI's own fields alone, and texts that are tokenised again: here, they are the same tokens."""
    with StandIn(sends_ids=False) as stand_in:
        one = sampler(stand_in, prompts="text")
        texts = {p: stand_in.tokenizer.decode(p, keep_special=True) for p in PROMPTS}
        found = drawn(one, requests)
        fields = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
        assert all(body.keys() == fields for body in stand_in.bodies)
        assert {body["prompt"] for body in stand_in.bodies} == set(texts.values())
        assert one.figures()["retokenised"] == 5
        assert capsys.readouterr().out.count("sends no token ids") == 1
        wanted = {}
        for (name, i), ids in found.items():
            request = next(r for r in requests if r.name == name)
            body = {
                "prompt": texts[request.prompts[0]],
                "seed": server.seed_of(7, name, i),
                "max_tokens": request.limit,
            }
            wanted[name, i] = completions.reply(stand_in.tokenizer, body)
            assert ids == wanted[name, i]
        with pytest.raises(UserError, match="no top_k"):
            sampler(stand_in, {"top_k": 3}, prompts="text")
        with pytest.raises(UserError, match="odd: its prompt is not the same token ids again once it is text"):
            list(one.run([Request("odd", ((41, 54),), (0,), 8)]))  # "rev" and " ", where "rev " is a token


@pytest.mark.parametrize("counts", [True, False])
def test_a_text_that_is_divided_otherwise(counts):
    """12 tokens are drawn, "rev" and " " in turn, and 6 come of their text: "rev "."""
    with StandIn(sends_ids=False) as stand_in:
        stand_in.reply = lambda tokenizer, body: [41, 54] * 6
        whole = stand_in.completion
        stand_in.completion = lambda body: {**whole(body), **({} if counts else {"usage": None})}
        (s,) = samples(sampler(stand_in), [Request("a", (PROMPTS[0],), (0,), 12)])
        assert s.tokens.tolist() == [38] * 6 and s.finish == "length"


# What passes: the fault, and the least that the pauses take in all.
PASSING = {
    "drop": ("drop", 0),
    "overload": ((429, {"Retry_After": "0.4"}), 0.4),
    "overload, with a date": ((429, {"Retry_After": email.utils.formatdate(time.time() - 10)}), 0),
    "failure": (500, 0),
    "no gateway": ((503, {}), 0),
    "slow": ("slow", 2.0),
    "no JSON": ('{"choices": [', 0),
    "no object": ("[]", 0),
    "too deep": ("[" * 100_000, 0),
    "truncated": ("truncate", 0),
    "no choice": (lambda tree: {**tree, "choices": []}, 0),
    "ill-typed": (lambda tree: {**tree, "choices": [{**tree["choices"][0], "token_ids": ["1"]}]}, 0),
    "aborted": (lambda tree: {**tree, "choices": [{**tree["choices"][0], "finish_reason": "abort"}]}, 0),
}


@pytest.mark.parametrize("what", PASSING)
def test_what_passes_is_asked_for_again(requests, what):
    fault, least = PASSING[what]
    with StandIn() as stand_in:
        stand_in.faults = {1: fault, 3: fault}
        one = sampler(stand_in, timeout=2.0 if what == "slow" else 60)
        started = time.monotonic()
        assert drawn(one, requests) == expected(stand_in, requests)
        assert time.monotonic() - started >= least
        assert one.figures()["repeated"] == 2 and len(stand_in.bodies) == 7
        assert len({str(body) for body in stand_in.bodies}) == 5  # the same samples, asked for in the same words


def changed(**fields):
    return lambda tree: {**tree, "choices": [{**tree["choices"][0], **fields}]}


def longer(tree):
    ids = [7] * 41
    return {**changed(token_ids=ids, text="7" * 41, finish_reason="length")(tree), "usage": {}}


def shorter(tree):
    return {**changed(token_ids=[7], text="x", finish_reason="length")(tree), "usage": {}}


def misread(tree):
    return {**changed(prompt_token_ids=None)(tree), "usage": {"prompt_tokens": 1000}}


FATAL = {
    "refused": (400, "it answered 400: this is a 400"),
    "no key": (401, "it answered 401: this is a 401"),
    "unknown model": (404, "it answered 404: this is a 404"),
    "too many tokens": (longer, "it drew 41 tokens, and 40 were asked for"),
    "a short context": (shorter, "its response was cut after 1 of 40 tokens: want a server with a longer context"),
    "another model": (lambda tree: {**tree, "model": "yours"}, "it answered for the model 'yours', want 'mine'"),
    "another prompt": (changed(prompt_token_ids=[1, 3, 14, 15, 9]), "it read other token ids than those of the prompt"),
    "another length": (misread, "it read a prompt of 1000 tokens, and there are 4"),
    "another text": (changed(text="something else"), "its token ids stand for another text than it sent"),
    "another count": (lambda tree: {**tree, "usage": {"completion_tokens": 99}}, "token ids, and counts 99"),
    "a stop that is none": (changed(stop_reason=5, token_ids=[7], text="7"), "it stopped at 5, want one of"),
    "no stop": (changed(token_ids=[1, 7, 1]), "its response goes on after a token that ends replies"),
    "a long pause": ((429, {"Retry_After": "3600"}), "it asks for a pause of 3600 seconds, longer than timeout"),
}


@pytest.mark.parametrize("what", FATAL)
def test_what_does_not_pass_is_one_line(what):
    fault, message = FATAL[what]
    with StandIn() as stand_in:
        stand_in.faults = {0: fault}
        with pytest.raises(UserError) as error:
            list(sampler(stand_in).run([Request("a", (PROMPTS[0],), (3,), 40)]))
        assert len(stand_in.bodies) == 1
        assert str(error.value).startswith(f"{stand_in.url}:sample 3 of a: ")
        assert message in str(error.value) and "\n" not in str(error.value)


def test_giving_up(requests):
    with StandIn() as stand_in:
        stand_in.faults = dict.fromkeys(range(3), 500)
        message = "it answered 500: this is a 500, and so 3 times; what was drawn is kept: call again"
        with pytest.raises(UserError, match=re.escape(message)):
            list(sampler(stand_in, retries=2, concurrency=1).run(requests))
        assert len(stand_in.bodies) == 3
        one = sampler(stand_in)
    with pytest.raises(UserError, match=r"the connection failed: .*, and so 9 times"):
        list(one.run(requests))


def test_after_an_error_open_requests_end_and_no_other_begins(requests):
    with StandIn(pause=0.5) as stand_in:
        stand_in.faults = {1: 400}
        found = {}
        with pytest.raises(UserError, match="it answered 400"):
            for s in samples(sampler(stand_in), requests):
                found[s.name, s.sample] = s.tokens.tolist()
        assert len(stand_in.bodies) == 3 and len(found) == 2
        assert found.items() <= expected(stand_in, requests).items()


def test_a_signal_is_heard_while_nothing_arrives(monkeypatch, requests):
    monkeypatch.setattr(server, "PULSE", 0.05)
    with StandIn(pause=0.3) as stand_in:
        assert [s is None for s in sampler(stand_in).run(requests)].count(True) >= 4


def test_pauses_grow(monkeypatch, requests):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    with StandIn() as stand_in:
        stand_in.faults = dict.fromkeys(range(9), 500)
        monkeypatch.setattr(server, "FIRST_PAUSE", 0.5)
        monkeypatch.setattr(server.asyncio, "sleep", sleep)
        with pytest.raises(UserError):
            list(sampler(stand_in, concurrency=1).run(requests))
    longest = [0.5, 1, 2, 4, 8, 16, 32, 60]
    assert len(slept) == 8 and all(m / 2 <= s <= m for s, m in zip(slept, longest, strict=True))


def test_retry_after():
    assert server.retry_after("7") == 7.0 and server.retry_after("-1") == 0.0
    assert 58 < (server.retry_after(email.utils.formatdate(time.time() + 60)) or 0) <= 60
    assert [server.retry_after(value) for value in (None, "soon", "nan", "inf")] == [None] * 4


@pytest.mark.parametrize("sends_ids", [True, False])
def test_log_probabilities(sends_ids, requests):
    """They are asked for where they are what tokens are drawn with; ids may stand in place of the tokens."""
    with StandIn(sends_ids=sends_ids) as stand_in:
        one = sampler(stand_in, {"temperature": 1.0, "top_p": 1.0}, scored=True)
        found = list(samples(one, requests))
        assert {(s.name, s.sample): s.tokens.tolist() for s in found} == expected(stand_in, requests)
        for s in found:
            assert isinstance(s, ScoredSample)
            np.testing.assert_allclose(s.logq, -0.5 - s.tokens / 64, atol=1e-4)
        assert all(body["logprobs"] == 1 for body in stand_in.bodies) and one.figures()["retokenised"] == 0
        other = sampler(stand_in, {"temperature": 0.5}, scored=True)
        assert not any(isinstance(s, ScoredSample) for s in samples(other, requests))
        assert not any("logprobs" in body for body in stand_in.bodies[5:])
        stand_in.scores = False
        one = sampler(stand_in, {"temperature": 1.0, "top_p": 1.0}, scored=True)
        assert not any(isinstance(s, ScoredSample) for s in samples(one, requests))


def test_a_stop_token_that_is_not_sent_is_added(requests):
    """By servers that send no stop token, and with several that may end a reply."""
    with StandIn() as stand_in:
        eos = stand_in.tokenizer.eos_id
        whole = stand_in.completion

        def without(body):
            tree = whole(body)
            choice = tree["choices"][0]
            ids = [i for i in choice["token_ids"] if i != eos]
            stopped = ids != choice["token_ids"]
            return {**changed(token_ids=ids, stop_reason=0 if stopped else None)(tree), "usage": {}}

        stand_in.completion = without
        found = drawn(sampler(stand_in, stops=(0, eos)), requests)
        assert found == {
            k: [*ids[:-1], 0] if ids[-1] == eos else ids for k, ids in expected(stand_in, requests).items()
        }


def test_a_key_comes_from_the_environment(monkeypatch, requests):
    with StandIn() as stand_in:
        with pytest.raises(UserError, match="want an API key in the environment variable MY_KEY"):
            sampler(stand_in, key_variable="MY_KEY")
        monkeypatch.setenv("MY_KEY", "abc\n")
        list(sampler(stand_in, key_variable="MY_KEY").run(requests))
        assert {headers["Authorization"] for headers in stand_in.headers} == {"Bearer abc"}


def test_models(monkeypatch):
    with StandIn() as stand_in:
        assert server.find_model(stand_in.config()).max_model_len == 4096
        assert server.find_model(stand_in.config(model="mine:adapter")).id == "mine"
        with pytest.raises(UserError, match=r"/v1: has no model 'yours', only mine$"):
            server.find_model(stand_in.config(model="yours"))
        wrong = stand_in.config(url=f"{stand_in.url}/v2")
        assert server.find_model(wrong)  # (the stand-in has one answer for all paths)
        cfg = stand_in.config()
    with pytest.raises(UserError, match=r"/v1/models: no server answers: "):
        server.find_model(cfg)
