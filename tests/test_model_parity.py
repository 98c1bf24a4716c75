"""Parity with transformers: equal logits in float32, for random weights whose dimensions all differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import mesh_of

from dail_jax import config as config_lib
from dail_jax.checkpoint import hf
from dail_jax.errors import UserError
from dail_jax.model import attention, families, transformer, weights
from dail_jax.model import lora as lora_lib

SIZES = dict(
    vocab_size=62,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
SLIDES, FULL = "sliding_attention", "full_attention"
EXPERTS = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=28, head_dim=10)
DELTA = dict(
    head_dim=16,
    linear_num_key_heads=3,
    linear_num_value_heads=9,
    linear_key_head_dim=5,
    linear_value_head_dim=7,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
)
CASES = {
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_windows": (
        "Qwen2",
        dict(tie_word_embeddings=False, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(head_dim=10, tie_word_embeddings=False, rope_parameters=YARN)),
    "llama": ("Llama", dict(head_dim=8, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(head_dim=14, sliding_window=5, rope_parameters={**LINEAR, "rope_theta": 10000.0})),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=4, no_rope_layer_interval=2)),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        dict(sliding_window=5, num_hidden_layers=4, layer_types=[SLIDES, FULL] * 2)
        | dict(rope_parameters={FULL: {**YARN, "rope_theta": 5e5}, SLIDES: {"rope_type": "default"}}),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(head_dim=10, query_pre_attn_scalar=7, sliding_window=5, layer_types=[SLIDES, SLIDES, FULL, SLIDES])
        | dict(num_hidden_layers=4, rope_parameters={FULL: {**LINEAR, "rope_theta": 1e6}}),
    ),
    "qwen3_moe": ("Qwen3Moe", dict(**EXPERTS, norm_topk_prob=True, mlp_only_layers=[1])),
    "qwen3_5": ("Qwen3_5", dict(**DELTA, num_hidden_layers=5, tie_word_embeddings=True)),
    "phi3": ("Phi3", dict(hidden_size=48, partial_rotary_factor=0.5, sliding_window=5)),
}


def make(case, folder):
    """A random transformers model saved to `folder`; norms and biases are random too."""
    kind, extra = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    of = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = of(**SIZES | dict(pad_token_id=None, bos_token_id=1, eos_token_id=2) | extra)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.2 if "norm" in name or "bias" in name else 0.08))
    model.save_pretrained(folder)
    return model


def batch():
    """Three rows, padded on the left to 19 tokens: [3, 19] tokens and positions."""
    rng = np.random.default_rng(0)
    lengths = [19, 12, 5]
    tokens, positions = np.zeros((3, 19), np.int32), np.full((3, 19), -1, np.int32)
    for row, n in enumerate(lengths):
        tokens[row, 19 - n :] = rng.integers(1, 61, n)
        positions[row, 19 - n :] = np.arange(n)
    return tokens, positions


def expected(model, tokens, positions):
    mask = torch.tensor(positions >= 0).long()
    with torch.no_grad():
        out = model(
            torch.tensor(tokens).long(), attention_mask=mask, position_ids=torch.tensor(positions).clamp(min=0).long()
        )
    return out.logits.numpy()


def close(ours, theirs, live):
    scale = np.abs(theirs[live]).max()
    return np.abs(np.asarray(ours)[live] - theirs[live]).max() / scale


PROMPT = 9


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, one_device):
    folder = tmp_path_factory.mktemp(request.param)
    model = make(request.param, folder)
    params, cfg = hf.load(folder, one_device, "float32")
    return model, params, cfg


@pytest.fixture(scope="module")
def found(pair):
    """What one program finds: the logits of scanned and of unrolled layers, and two prompts' logits, keys and values."""
    _, params, cfg = pair

    @jax.jit
    def run(params):
        listed, rows = weights.unstack(params, cfg), batch()
        scanned = transformer.encode(params, *rows, cfg, remat="full")
        unrolled = transformer.encode(listed, *rows, cfg)
        hidden, ks, vs = transformer.prefill(listed, *prompts(), cfg)
        return [transformer.unembed(params, x) for x in (scanned, unrolled, hidden)], ks, vs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "TILE", 4)  # small rings
        return run(params)


def prompts():
    """The first tokens of two texts, padded on the right: [2, 11] tokens and positions."""
    tokens, positions = both()
    cut = lambda x, fill: np.concatenate([x[:, :PROMPT], np.full((2, 2), fill, np.int32)], 1)  # noqa: E731
    return cut(tokens, 0), cut(positions, -1)


def both():
    """Two texts without padding: [2, 19] tokens and positions."""
    tokens, positions = batch()
    return np.concatenate([tokens[:1], (tokens[:1] + 7) % 62]), np.tile(positions[:1], (2, 1))


def test_full_forward(pair, found):
    tokens, positions = batch()
    assert close(found[0][0], expected(pair[0], tokens, positions), positions >= 0) < 1e-4


def test_unrolled_equals_scanned(found):
    scanned, unrolled, _ = found[0]
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5 * np.abs(scanned).max())


def test_prefill_and_decode_equal_the_full_forward(pair, found, monkeypatch):
    """Two prompts share a buffer; four rows decode them, with the cache committed in between; one row ends early."""
    monkeypatch.setattr(transformer, "TILE", 4)
    model, params, cfg = pair
    params = weights.unstack(params, cfg)
    (_, _, ours), ks, vs = found
    tokens, positions = both()
    theirs = expected(model, tokens, positions)
    assert np.abs(ours[:, :PROMPT] - theirs[:, :PROMPT]).max() / np.abs(theirs).max() < 1e-4
    cache = transformer.empty_cache(cfg, rows=4, slots=18, blocks=1, prompt_slots=11, dtype=jnp.float32, entries=2)
    rings = [x.shape[2] for x, layer in zip(cache.k, cfg.layers, strict=True) if layer.window]
    assert rings == [4] * sum(layer.window is not None for layer in cfg.layers)  # they go round below
    flat = lambda x: x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[3])  # noqa: E731
    rows = np.array([0, 1, 1, 0], np.int32)
    cache = cache.replace(
        prompt_k=tuple(map(flat, ks)),
        prompt_v=tuple(map(flat, vs)),
        prompt_length=jnp.full((1, 2), PROMPT),
    )
    cache = transformer.begin(cache, np.ones(4, bool), rows)

    @jax.jit
    def step(params, tokens, at, cache, recent, slot):
        hidden, recent = transformer.decode_step(params, tokens, at, cfg, cache, recent, slot)
        return transformer.unembed(params, hidden), recent

    commit = jax.jit(transformer.commit)

    def check(at, cache, recent, slot):
        """One token of each row at its position; -1 for a row that has ended."""
        live = at >= 0
        out, recent = step(params, tokens[rows, at], at, cache, recent, slot)
        assert np.abs(out - theirs[rows, at])[live].max() / np.abs(theirs).max() < 1e-4
        return recent

    recent, last = transformer.empty_recent(cache, 4), np.array([10, 10, 6, 10])  # tokens of each row
    for index in range(10):
        if index in (4, 8):
            with monkeypatch.context() as patch:
                patch.setattr(attention, "target", lambda: "gpu")
                at_once = jax.jit(lambda *x: transformer.commit(*x))(cache, recent)
            cache = commit(cache, recent)
            jax.tree.map(np.testing.assert_array_equal, at_once, cache)
            recent = transformer.empty_recent(cache, 4)
        recent = check(np.where(index < last, PROMPT + index, -1), cache, recent, index % 4)
    assert cache.count.tolist() == [8, 8, 6, 8] and tokens.shape[1] == PROMPT + 10


@pytest.mark.parametrize("case", ["mistral", "smollm3", "olmo2", "olmo3", "gemma3", "phi3"])
def test_gradients_of_scanned_layers_on_eight_devices_equal_unrolled_ones(case, one_device, tmp_path):
    make(case, tmp_path)
    params, cfg = hf.load(tmp_path, one_device, "float32")
    settings = config_lib.LoraConfig(rank=3, alpha=6)
    fresh = lora_lib.init(jax.random.key(1), cfg, settings)
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)

    @jax.jit
    def gradient(params, lora):
        def total(lora):
            hidden = transformer.encode(params, *batch(), cfg, lora=lora, remat="full")
            return jnp.where(batch()[1][..., None] >= 0, hidden * jnp.arange(cfg.D), 0).sum()

        return jax.grad(total)(lora)

    want, mesh = gradient(weights.unstack(params, cfg), lora), mesh_of(2, 2, 2)
    spread = jax.device_put((params, lora), (weights.shardings(cfg, mesh), lora_lib.shardings(cfg, settings, mesh)))
    with jax.set_mesh(mesh):
        got = gradient(*spread)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(y).max() > 0
        np.testing.assert_allclose(x, y, atol=2e-4 * np.abs(y).max())
    (forward,) = [step for step in gradient.trace(params, lora).jaxpr.eqns if step.primitive.name == "scan"][:1]
    kept = [x.aval.shape for x in forward.outvars[forward.params["num_carry"] :]]
    assert kept == [(cfg.L // cfg.period, *batch()[0].shape, cfg.D)] * cfg.period  # each layer's input, and no weights


def test_scaled_embeddings_are_rounded_as_in_transformers():
    """In bfloat16 the scale itself is rounded, to 9.8125 for a width of 96."""
    config = transformers.Gemma3TextConfig(**SIZES | dict(hidden_size=96, pad_token_id=None))
    theirs = transformers.Gemma3ForCausalLM(config).bfloat16().model.embed_tokens
    cfg = families.from_tree(config.to_dict(), "config.json")
    embed = jnp.asarray(theirs.weight.detach().float().numpy(), jnp.bfloat16)
    ours = transformer._embed({"embed": embed}, batch()[0], cfg)
    with torch.no_grad():
        assert np.array_equal(np.asarray(ours, np.float32), theirs(torch.tensor(batch()[0])).float().numpy())


def test_round_trip_is_exact(pair, tmp_path):
    model, params, cfg = pair
    hf.save(tmp_path / "out", params, cfg, model.config.to_dict())
    again = type(model).from_pretrained(tmp_path / "out")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_count_matches(pair):
    model, _, cfg = pair
    assert weights.count(cfg) == sum(p.numel() for p in model.parameters())


def test_a_profile_shows_the_parts_of_prefill(one_device, tmp_path):
    make("qwen2", tmp_path)
    params, cfg = hf.load(tmp_path, one_device, "float32")
    text = jax.jit(lambda: transformer.prefill(params, *batch(), cfg)).lower().as_text(debug_info=True)
    assert all(f"prefill/{scope}/" in text for scope in ("attend", "mlp"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "mamba", "mamba"),
        ("hidden_act", "gelu", "gelu"),
        ("layer_types", ["chunked_attention"] * 3, "layer_types: got .*chunked"),
        ("rope_scaling", {"rope_type": "longrope"}, "longrope"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor: got 0.5"),
        ("hidden_size", 10**12, "hidden_size"),
        ("num_hidden_layers", "3", "num_hidden_layers"),
        ("num_key_value_heads", 4, "divisor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(key, value, words):
    tree = {"model_type": "qwen3", **SIZES, key: value}
    with pytest.raises(UserError, match=words):
        families.from_tree(tree, "config.json")


@pytest.mark.parametrize("window", [None, 5])
def test_long_texts_attend_in_turns(monkeypatch, window):
    """Values and gradients equal those of a single einsum over all queries."""
    q, k, v, g = (jax.random.normal(jax.random.key(i), (2, 21, n, 8)) for i, n in enumerate((4, 2, 2, 4)))
    positions = jnp.stack([jnp.arange(21), jnp.maximum(jnp.arange(21) - 4, -1)])

    def run():
        return jax.vjp(
            lambda *x: jnp.where((positions >= 0)[..., None, None], attention.attend(*x, positions, window), 0), q, k, v
        )

    whole, back = run()
    monkeypatch.setattr(attention, "QUERIES", 8)
    turns, back_turns = run()
    for got, want in ((turns, whole), *zip(back_turns(g), back(g), strict=True)):
        np.testing.assert_allclose(got, want, atol=2e-6)
