"""The engine agrees with a loop without cache, slots or batching, and neighbours never matter."""

import dataclasses
import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.errors import UserError
from dail_jax.model import families, pages, transformer, weights
from dail_jax.sample import decode, engine, mixture
from dail_jax.sample import sampler as sampler_lib

CFG = families.ModelConfig(
    "qwen3",
    V=30,
    D=16,
    N=4,
    K=2,
    H=6,
    F=20,
    layers=(families.Layer(families.Rope(10_000.0)),) * 2,
    norm_eps=1e-6,
    tied=True,
    qk_norm="head",
    qkv_bias=False,
    max_positions=512,
)
STOP = 3


@pytest.fixture(scope="module")
def params():
    return weights.init(jax.random.key(0), CFG, std=0.4)


def sampler(params, mesh, roles=2, slots=8, seed=7, tau=0.3, proposals=2, never=(5,), cfg=CFG, pages=None, **kw):
    sampling = config_lib.Sampling(**{"temperature": 0.9, "top_p": 0.97, "presence_penalty": 0.3, **kw})
    return engine.Engine(
        params,
        cfg,
        mesh,
        stops=(STOP,),
        seed=seed,
        slots=slots,
        max_tokens=24,
        sampling=mixture.sampling_params(sampling, tau, proposals),
        roles=roles,
        never=never,
        pages=pages,
    )


def requests(count=5, samples=3, roles=2, limit=24):
    rng = np.random.default_rng(0)
    return [
        sampler_lib.Request(
            f"p{i}",
            tuple(tuple(rng.integers(6, 30, 4 + 9 * i + r).tolist()) for r in range(roles)),
            tuple(range(samples)),
            limit - i,
        )
        for i in range(count)
    ]


def collect(s, reqs):
    out = {(x.name, x.sample): x for x in s.run(reqs)}
    assert len(out) == sum(len(r.samples) for r in reqs)
    return out


def same(a, b, exact=True):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].tokens.tolist() == b[k].tokens.tolist(), k
        assert a[k].finish == b[k].finish
        if exact:
            for name in ("logq", "log_student", "log_privileged", "by_student"):
                assert getattr(a[k], name).tobytes() == getattr(b[k], name).tobytes(), (k, name)
        else:
            np.testing.assert_allclose(a[k].logq, b[k].logq, atol=1e-4)


@pytest.fixture(scope="module")
def reference(params, one_device):
    with jax.set_mesh(one_device):
        return collect(sampler(params, one_device), requests())


def naive(params, s, request, sample):
    """The same sample with one full forward pass per token: no cache, no batch."""
    roles = [list(p) for p in request.prompts]
    data = functools.reduce(
        jax.random.fold_in, engine.key_data(request.name, sample), jax.random.key(s.seed, impl="threefry2x32")
    )
    response, logq = [], []
    while True:
        logits = []
        for prompt in roles:
            ids = np.zeros((1, 96), np.int32)  # fixed shapes: one compilation
            positions = np.full((1, 96), -1, np.int32)
            n = len(prompt) + len(response)
            ids[0, :n], positions[0, :n] = prompt + response, np.arange(n)
            hidden = jitted_encode(params, ids, positions, s.cfg)
            logits.append(transformer.unembed(params, hidden[0, n - 1]))
        seen = np.isin(np.arange(CFG.V), response)
        logits = jnp.stack(logits)[:, None] + s.rules.bias - s.sampling.presence_penalty * seen
        u = jax.random.uniform(jax.random.fold_in(data, len(response)), (1, 2), jnp.float32)
        out = jitted_draw(logits, u, s.sampling)
        response.append(int(out.token[0]))
        logq.append(float(out.logq[0]))
        if response[-1] == STOP or len(response) == request.limit:
            return response, logq


jitted_encode = jax.jit(transformer.encode, static_argnums=3)
jitted_draw = jax.jit(mixture.draw_tokens)


def test_equals_the_naive_loop(params, one_device, reference):
    s = sampler(params, one_device)
    for request in requests():
        for sample in (0, 2):
            tokens, logq = naive(params, s, request, sample)
            got = reference[request.name, sample]
            assert got.tokens.tolist() == tokens
            np.testing.assert_allclose(got.logq, logq, atol=2e-4)
            assert got.finish == ("stop" if tokens[-1] == STOP else "length")
            assert 5 not in tokens


@pytest.mark.parametrize("share", [None, 0.5])
def test_windows_equal_the_naive_loop(share, monkeypatch):
    """Rings go round, prompts are cut to their ends; on four devices, with norms that take all heads at once. Of pages,
    only the layer without a window has any."""
    monkeypatch.setattr(pages, "PAGE", 8)
    rope, mesh = families.Rope(10_000.0), mesh_of(data=2, tensor=2)
    layers = (families.Layer(rope, 10), families.Layer(None), families.Layer(rope, 10))
    cfg = dataclasses.replace(CFG, layers=layers, qk_norm="heads", norms="post")
    params = weights.init(jax.random.key(3), cfg, std=0.4)
    with jax.set_mesh(mesh):
        s = sampler(jax.device_put(params, weights.shardings(cfg, mesh)), mesh, cfg=cfg, slots=4, pages=share)
        got = collect(s, [dataclasses.replace(requests()[2], samples=(0, 1))])
    state = jax.eval_shape(lambda: decode.empty(s.grid(2, 32), cfg, jnp.float32))
    assert [x if x is None else x.shape[2] for x in state.cache.k] == [16, None if share else 32, 16]
    assert [x is not None for x in state.cache.pools] == [False, share is not None, False]
    for (_, sample), one in got.items():
        tokens, logq = naive(params, s, requests()[2], sample)
        assert one.tokens.tolist() == tokens
        np.testing.assert_allclose(one.logq, logq, atol=2e-4)
    assert max(len(one.tokens) for one in got.values()) > 20


def test_samples_differ_and_lengths_vary(reference):
    lengths = {len(x.tokens) for x in reference.values()}
    assert len(lengths) > 3
    assert len({tuple(x.tokens) for x in reference.values() if len(x.tokens) > 4}) > 5


@pytest.mark.parametrize("change", ["order", "subset", "restart"])
def test_neighbours_do_not_matter(params, one_device, reference, change):
    reqs = requests()
    with jax.set_mesh(one_device):
        if change == "order":
            same(collect(sampler(params, one_device), reqs[::-1]), reference)
        elif change == "subset":
            got = collect(sampler(params, one_device), [reqs[3], reqs[1]])
            same(got, {k: v for k, v in reference.items() if k[0] in ("p1", "p3")})
        else:  # as after a crash: some of a problem's samples already exist
            half = [dataclasses.replace(r, samples=(2, 1)) for r in reqs[1:]]
            got = collect(sampler(params, one_device, slots=8), [reqs[0], *half])
            same(got, {k: v for k, v in reference.items() if k[0] == "p0" or k[1] > 0})


def test_what_was_drawn_is_let_go(params, one_device):
    """Memory does not grow with the number of samples; benchmarks/leak.py measures it over 8,192."""
    drawn, arrays = [], []
    with jax.set_mesh(one_device):
        many = [dataclasses.replace(requests()[0], name=f"q{i}") for i in range(24)]
        for sample in sampler(params, one_device).run(many):
            drawn.append(weakref.ref(sample))
            arrays.append(len(jax.live_arrays()))
        del sample
    gc.collect()
    assert len(drawn) == 72 and not any(one() for one in drawn)
    assert max(arrays[36:]) <= max(arrays[:36])


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_slot_counts_do_not_matter(params, one_device, reference, slots):
    with jax.set_mesh(one_device):
        same(collect(sampler(params, one_device, slots=slots), requests()), reference, exact=False)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 2)], ids=str)
def test_devices_do_not_matter(params, reference, shape):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, weights.shardings(CFG, mesh))
        same(collect(sampler(sharded, mesh, slots=8), requests()), reference, exact=False)


def test_weights_move_between_meshes_without_a_second_copy(params):
    """From training's mesh to sampling's and back: equal bits, and never more than one weight of all layers twice."""
    train, sample = mesh_of(fsdp=2), mesh_of(tensor=2)

    def held(tree):
        """Bytes on all devices, of arrays that share memory once."""
        parts = [s.data for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in parts}.values())

    before = held(jax.live_arrays())
    placed = jax.device_put(params, weights.shardings(CFG, train))
    size, largest, most, put = held(placed), params["layers"]["gate"].nbytes, [], jax.device_put

    def watched(*args):
        out = put(*args)
        most.append(held(jax.live_arrays()) - before)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_put", watched)
        unstacked = weights.moved(placed, CFG, sample, stacked=False)
        assert not placed and isinstance(unstacked["layers"], list)
        assert unstacked["layers"][1]["gate"].sharding.is_equivalent_to(mesh_lib.sharding(sample, "df"), 2)
        back = weights.moved(unstacked, CFG, train, stacked=True)
    assert size < max(most) <= size + 2 * largest < 1.4 * size
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert got.sharding.mesh == train and np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_slots_go_on_while_the_longest_samples_run(params, one_device):
    """Samples differ in length, most are short: every block has waiting prompts, so that no slot idles."""
    stop = tuple(range(0, CFG.V, 10))
    sampling = mixture.sampling_params(config_lib.Sampling(temperature=3.0))
    s = engine.Engine(params, CFG, one_device, stop, seed=1, slots=16, max_tokens=96, sampling=sampling)
    ask = [sampler_lib.Request(f"p{i}", ((7, 8, 9, 11 + i % 9),), tuple(range(8)), 96) for i in range(40)]
    with jax.set_mesh(one_device):
        lengths = [len(x.tokens) for x in collect(s, ask).values()]
    assert s.usage.prefills == len(ask) and np.quantile(lengths, 0.9) < 0.5 * max(lengths)
    assert s.usage.occupancy > 0.7  # lost are only the rest of a chunk after a stop, and the end of the queue
    assert [s.grid(n, c).entries for n, c in ((1, 32), (8, 32), (8, 256), (64, 32))] == [1, 4, 2, 2]
    assert s.grid(8, 32).slots == s.grid(6, 32).slots == s.grid(5, 32).slots + 1 == 16


def test_one_role_draws_from_its_own_softmax(params, one_device):
    with jax.set_mesh(one_device):
        out = collect(
            sampler(params, one_device, roles=1, top_p=1.0, temperature=1.0, presence_penalty=0.0, never=()),
            requests(2, 4, roles=1),
        )
    for request in requests(2, 4, roles=1):
        n = len(request.prompts[0])
        for sample in range(4):
            x = out[request.name, sample]
            ids, positions = np.zeros((1, 96), np.int32), np.full((1, 96), -1, np.int32)
            ids[0, : n + len(x.tokens)] = [*request.prompts[0], *x.tokens]
            positions[0, : n + len(x.tokens)] = np.arange(n + len(x.tokens))
            logits = transformer.unembed(params, jitted_encode(params, ids, positions, CFG)[0])
            logp = np.asarray(jax.nn.log_softmax(logits))
            np.testing.assert_allclose(x.logq, logp[n - 1 + np.arange(len(x.tokens)), x.tokens], atol=1e-4)
            assert x.by_student.all()


def test_one_program_per_bucket_and_none_for_new_sampling_parameters(params, one_device):
    with jax.set_mesh(one_device):
        before = decode.decode._cache_size(), decode.load_prompt._cache_size()
        for temperature, tau in ((1.0, 0.1), (0.5, 0.9), (0.0, 0.5)):
            s = sampler(params, one_device, tau=tau, temperature=temperature, slots=5)
            collect(s, requests())
            assert s.usage.live == sum(len(x.tokens) for x in collect(s, requests()).values())
        buckets = {engine.bucket(max(map(len, r.prompts))) for r in requests()}
        assert len(buckets) == 2
        assert decode.decode._cache_size() - before[0] == len(buckets)
        assert decode.load_prompt._cache_size() - before[1] == len(buckets)


def test_caches_are_updated_in_place(params, one_device):
    """No cache is copied in the compiled decode loop, and all of the state is aliased to its input."""
    grid = decode.Grid(2, 2, 8, 2, 128, 96, 8)
    with jax.set_mesh(one_device):
        s = sampler(params, one_device)
        state = jax.eval_shape(lambda: decode.empty(grid, CFG, jnp.float32))
        compiled = decode.decode.lower(grid, CFG, s.params, None, state, s.rules, s.sampling).compile()
    text = compiled.as_text()
    assert text is not None
    for scope in ("unembed", "decode_step", "attend", "mlp"):  # what a profile shows
        assert f"/{scope}/" in text
    for shape in ("32,2,112,6", "4,2,256,6"):
        assert f"f32[{shape}]" in text
        assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_no_device_fetches_what_others_hold(params):
    """On eight devices: a prefill exchanges no more than its own keys, and a token nothing of weights, caches,
    probabilities or responses."""
    mesh, grid = mesh_of(data=4, tensor=2), decode.Grid(2, 4, 1, 2, 128, 96, 8)

    def gathered(jitted, *args):
        """The largest array, in elements, that devices fetch from each other."""
        text = jitted.lower(grid, CFG, *args).compile().as_text()
        found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
        return max((int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found), default=0)

    with jax.set_mesh(mesh):
        s = sampler(jax.device_put(params, weights.shardings(CFG, mesh)), mesh)
        state = decode.empty(grid, CFG, jnp.float32)
        keys = grid.roles * CFG.K * grid.prompt_slots * CFG.H
        prompt = np.zeros((2, 128), np.int32), np.ones(2, np.int32), 0, 0
        assert 0 < gathered(decode.load_prompt, s.params, None, state, *prompt) <= keys
        assert min(grid.max_tokens, CFG.D * CFG.K * CFG.H) > CFG.V
        assert 0 < gathered(decode.decode, s.params, None, state, s.rules, s.sampling) < CFG.V


BAD = 29  # the token whose weights are damaged


@pytest.mark.parametrize("kw", [{}, {"temperature": 0.0}, {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0}])
@pytest.mark.parametrize("reached", ["by a prompt", "by a response", "by all"])
def test_logits_that_are_not_finite_are_refused_by_name(params, one_device, reached, kw):
    """One row of the weights is NaN. A prompt with it poisons its shared buffer, yet only that prompt is named."""
    cfg = dataclasses.replace(CFG, tied=False)
    clean = {**params, "unembed": jnp.roll(params["embed"], 3, 0)}
    table = "unembed" if reached == "by all" else "embed"
    damaged = {**clean, table: clean[table].at[BAD].set(jnp.nan)}
    never = (STOP,) if reached == "by a response" else (BAD,)
    prompts = {f"p{i}": tuple(range(6 + i, 12 + i)) for i in range(4)}
    if reached == "by a prompt":
        prompts["p2"] = (7, BAD, 9)
    ask = [sampler_lib.Request(name, (p, p[::-1]), (0, 1, 2), 24) for name, p in prompts.items()]
    sampling = mixture.sampling_params(config_lib.Sampling(**{"temperature": 0.9, "top_p": 0.97, **kw}), 0.3, 2)

    def engine_of(weights):
        return engine.Engine(weights, cfg, one_device, (STOP, 4, 5, 6), 7, 3, 24, sampling, roles=2, never=never)

    got = {}
    place = {"by a prompt": "token 0 of sample 0 of p2", "by a response": r"token [1-9]\d* of sample \d of p\d"}
    with jax.set_mesh(one_device):
        if reached == "by a response" and kw.get("temperature") == 0.0:
            damaged["unembed"] = (
                damaged["unembed"].at[BAD].set(20 * damaged["norm"])
            )  # so that greedy decoding draws it
        with pytest.raises(UserError, match=f"not finite for {place.get(reached, 'token 0 of sample 0 of p0')}: check"):
            for x in engine_of(damaged).run(ask):
                got[x.name, x.sample] = x
        if reached == "by a prompt":  # samples drawn before the damage are unchanged
            want = {(x.name, x.sample): x for x in engine_of(clean).run(ask)}
            assert got.keys() <= {(f"p{i}", s) for i in (0, 1) for s in range(3)} and len(got) >= 3
            same(got, {key: want[key] for key in got})


def test_bucket_depends_on_the_length_alone():
    assert [engine.bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 96, 97, 1025)] == [
        32,
        32,
        48,
        48,
        64,
        64,
        96,
        96,
        128,
        1536,
    ]
