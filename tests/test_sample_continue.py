"""What follows from a sample is drawn in its slot: the texts of whole prompts, whatever is given up or was drawn before."""

import dataclasses

import jax
import pytest
import test_sample_engine as plain
from conftest import mesh_of
from test_sample_engine import CFG, collect, requests

from dail_jax.model import families, pages, weights
from dail_jax.sample import decode
from dail_jax.sample import sampler as sampler_lib

ASK, ROOM = (7, 9, 8), 16
LIMIT = 6  # of what is drawn after it
CUTS = (0, 3, 9, 24)


@pytest.fixture(scope="module")
def params():
    return weights.init(jax.random.key(0), CFG, std=0.4)


def then(s):
    """At every cut that the text reaches, and where it stops: which leaves out its stop token."""
    end = len(s.tokens) - (s.finish == "stop")
    kept = sorted({*(cut for cut in CUTS if cut < end), end})
    return [sampler_lib.Continuation(f"then/{n}/{s.name}/{s.sample}", n, ASK[: 1 + n % 3], LIMIT) for n in kept]


def asked(**kw):
    return [dataclasses.replace(r, then=then) for r in requests(4, **kw)]


def sampler(params, mesh, **kw):
    s = plain.sampler(params, mesh, **kw)
    return dataclasses.replace(s, params=params, max_tokens=24 + ROOM)


def whole(found, roles=2):
    """A request for every continuation, with all that stands before it as a prompt."""
    prompts = {r.name: r.prompts for r in asked(roles=roles)}
    samples = [s for s in found.values() if not s.name.startswith("then/")]
    return [
        sampler_lib.Request(
            one.name, tuple((*p, *s.tokens[: one.kept].tolist(), *one.tokens) for p in prompts[s.name]), (0,), one.limit
        )
        for s in samples
        for one in then(s)
    ]


def drawn(s, asked):
    """By name and index, through `checked`."""
    return {(x.name, x.sample): x for x in sampler_lib.checked(s, asked) if x is not None}


@pytest.fixture(scope="module")
def found(params, one_device):
    with jax.set_mesh(one_device):
        s = sampler(params, one_device)
        out = drawn(s, asked())
        assert s.usage.prefills == 4 and s.usage.continued == len(out) - 12
        assert s.usage.live == sum(len(x.tokens) for x in out.values())
        assert s.figures()["continued"] == s.usage.continued
    return out


def test_texts_are_those_of_whole_prompts(params, one_device, found):
    """In float32, though these have other shapes; and the samples are those of requests without continuations."""
    later = whole(found)
    assert {kept % 3 for kept in map(int, (r.name.split("/")[1] for r in later))} == {0, 1, 2}
    with jax.set_mesh(one_device):
        s = plain.sampler(params, one_device)
        want = collect(s, [*requests(4), *later])
    assert s.usage.prefills == 4 + len(later) == 40
    plain.same(found, want, exact=False)
    finishes = {s.finish for s in found.values() if s.name.startswith("then/")}
    assert finishes == {"stop", "length"} and {s.finish for s in found.values()} == finishes


def test_a_run_that_has_the_texts_draws_what_is_missing(params, one_device, found):
    """To the bit: the slot reads the text again, a token a step as it was drawn, whichever continuations are missing."""
    texts = {r.name: [found[r.name, i] for i in r.samples] for r in asked()}
    before = {s.name for s in found.values() if s.name.startswith("then/3/") or s.name.endswith("/p3/1")}

    def rest(s):
        return [one for one in then(s) if one.name not in before]

    again = [dataclasses.replace(r, then=rest, samples=(0,), drawn=tuple(texts[r.name][1:])) for r in asked()]
    assert not rest(found["p3", 1]) and any(len(s.tokens) == 1 for r in again for s in r.drawn)
    with jax.set_mesh(one_device):
        s = sampler(params, one_device)
        got = drawn(s, again)
    plain.same(got, {k: v for k, v in found.items() if k[0] not in before and (k[0].startswith("then/") or k[1] == 0)})
    assert s.usage.prefills == 4 and s.usage.live == sum(len(x.tokens) for x in got.values())


def test_pages_are_enough_for_one_text_and_what_follows(params, one_device, found, monkeypatch):
    """Slots that are given up read their texts again; the same to the bit, whatever number of pages there is."""
    monkeypatch.setattr(pages, "PAGE", 4)
    read, got = [], {}
    monkeypatch.setattr(decode, "go_on", lambda *args, go=decode.go_on: read.append((args[-1], args[3])) or go(*args))
    with jax.set_mesh(one_device):
        for share in (1.0, 0.01):
            read.clear()
            s = sampler(params, one_device, pages=share)
            got[share] = drawn(s, asked())
            again = sum(int((chosen & (limit == 0)).sum()) for limit, chosen in read)
            assert (again > 0) == (share < 1) and (s.usage.again > 0) == (share < 1)
            assert s.usage.live == sum(len(x.tokens) for x in got[share].values())
    plain.same(got[1.0], found, exact=False)
    plain.same(got[0.01], got[1.0])


def test_devices_do_not_matter(params, found):
    mesh = mesh_of(data=2, tensor=2)
    with jax.set_mesh(mesh):
        s = sampler(jax.device_put(params, weights.shardings(CFG, mesh)), mesh)
        plain.same(drawn(s, asked()), found, exact=False)


def test_rows_that_cannot_go_back_draw_the_samples_alone(one_device):
    cfg = dataclasses.replace(CFG, layers=(CFG.layers[0], families.Layer(CFG.layers[0].rope, 10)))
    params = weights.init(jax.random.key(0), cfg, std=0.4)
    with jax.set_mesh(one_device):
        s = sampler(params, one_device, cfg=cfg)
        got = drawn(s, asked()[:1])
        assert got.keys() == {("p0", i) for i in range(3)} and s.usage.continued == 0 and not s.continues
        assert not drawn(s, [dataclasses.replace(asked()[0], samples=(), drawn=tuple(got.values()))])
