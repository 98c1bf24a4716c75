"""Models with states in place of keys, and with experts, are sampled as all others are: neighbours never matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sample_engine as dense
from conftest import mesh_of

from dail_jax.model import families, transformer, weights
from dail_jax.sample import decode

MODELS = {
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "intermediate_size": 20,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 7,
        "linear_conv_kernel_dim": 3,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "intermediate_size": 20,
        "moe_intermediate_size": 9,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    cfg = families.from_tree({**SIZES, **MODELS[request.param]}, "config.json")
    return cfg, weights.init(jax.random.key(0), cfg, std=0.3)


def sampler(model, mesh, **kw):
    cfg, params = model
    plain = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0}
    return dense.sampler(params, mesh, cfg=cfg, **plain, **kw)


def requests():
    """Five problems of three samples, whose prompts differ in length within one bucket."""
    cut = lambda r: dataclasses.replace(r, prompts=tuple(p[:28] for p in r.prompts))  # noqa: E731
    return [cut(r) for r in dense.requests()]


@pytest.fixture(scope="module")
def reference(model, one_device):
    with jax.set_mesh(one_device):
        return dense.collect(sampler(model, one_device), requests())


def test_equals_one_forward_pass_of_each_text(model, reference):
    """Both roles' log-probabilities of every token, by a pass over the whole text without a cache."""
    cfg, params = model
    encode = jax.jit(lambda tokens, positions: transformer.encode(params, tokens, positions, cfg))
    checked = 0
    for request in requests():
        for sample in request.samples:
            x = reference[request.name, sample]
            for role, prompt in enumerate(request.prompts):
                n, end = len(prompt), len(prompt) + len(x.tokens)
                tokens, positions = np.zeros((1, 64), np.int32), np.full((1, 64), -1, np.int32)
                tokens[0, :end], positions[0, :end] = [*prompt, *x.tokens], np.arange(end)
                logits = np.array(transformer.unembed(params, encode(tokens, positions)[0]))[n - 1 : end - 1]
                logits[:, 5] = -np.inf  # never drawn
                logp = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))[np.arange(len(x.tokens)), x.tokens]
                got = (x.log_student, x.log_privileged)[role]
                np.testing.assert_allclose(got, logp, atol=2e-4)
                checked += len(x.tokens)
    assert checked > 100


def test_neighbours_order_and_restarts_do_not_matter(model, one_device, reference):
    reqs = requests()
    with jax.set_mesh(one_device):
        dense.same(dense.collect(sampler(model, one_device), reqs[::-1]), reference)
        half = [dataclasses.replace(r, samples=(2, 1)) for r in reqs[1:4]]
        got = dense.collect(sampler(model, one_device), half)
    dense.same(got, {k: v for k, v in reference.items() if k[0] in ("p1", "p2", "p3") and k[1] > 0})


@pytest.mark.parametrize("share", [None, 0.5])
def test_devices_slots_and_pages_do_not_matter(model, reference, share):
    """Layers with states keep them, beside others whose keys lie in pages."""
    cfg, params = model
    mesh = mesh_of(2, 1, 2)
    with jax.set_mesh(mesh):
        s = sampler((cfg, jax.device_put(params, weights.shardings(cfg, mesh))), mesh, slots=12, pages=share)
        dense.same(dense.collect(s, requests()), reference, exact=False)


@pytest.mark.parametrize("model", ["qwen3_5"], indirect=True)
def test_a_prompt_keeps_one_state_and_a_row_one(model):
    """States are float32, of the prompt's end; only attention has slots for tokens."""
    cfg, _ = model
    grid = decode.Grid(roles=2, blocks=3, width=4, entries=2, prompt_slots=32, max_tokens=20, chunk=4)
    cache = jax.eval_shape(lambda: decode.empty(grid, cfg, jnp.bfloat16)).cache
    assert cache.states == (0,)
    assert [(x.shape, x.dtype) for x in (cache.k[0], cache.v[0])] == [
        ((24, 2, 2, 24), jnp.bfloat16),
        ((24, 4, 5, 7), jnp.float32),
    ]
    assert [x.shape for x in (cache.prompt_k[0], cache.prompt_v[0])] == [(6, 2, 2 * 2, 24), (6, 4, 2 * 5, 7)]
    assert cache.k[1].shape == (24, 2, 32, 8) and cache.prompt_k[1].shape == (6, 2, 2 * 32, 8)
