"""Parity with transformers: equal logits in float32, for random weights whose dimensions all differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dail_jax.checkpoint import hf
from dail_jax.errors import UserError
from dail_jax.model import attention, families, transformer, weights

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
    "qwen2_untied": ("Qwen2", dict(tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(head_dim=10, tie_word_embeddings=False)),
    "qwen3_yarn": ("Qwen3", dict(head_dim=10, tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen3_moe": ("Qwen3Moe", dict(**EXPERTS, norm_topk_prob=True, mlp_only_layers=[1])),
    "qwen3_5": ("Qwen3_5", dict(**DELTA, num_hidden_layers=5, tie_word_embeddings=True)),
    "llama": ("Llama", dict(tie_word_embeddings=False, head_dim=8)),
    "llama3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(head_dim=14, sliding_window=6)),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=6, pad_token_id=None, bos_token_id=1, eos_token_id=2)),
    "llama_linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})),
}


def make(case, folder):
    """A random transformers model saved to `folder`; norms and biases are random too."""
    kind, extra = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    of = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = of(**SIZES | extra)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.2 if "norm" in name or "bias" in name else 0.08))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, one_device):
    folder = tmp_path_factory.mktemp(request.param)
    model = make(request.param, folder)
    params, cfg = hf.load(folder, one_device, "float32")
    return model, params, cfg


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


def test_full_forward(pair):
    model, params, cfg = pair
    tokens, positions = batch()
    hidden = transformer.encode(params, tokens, positions, cfg)
    assert close(transformer.unembed(params, hidden), expected(model, tokens, positions), positions >= 0) < 1e-4


def test_a_profile_shows_the_parts_of_prefill(pair):
    _, params, cfg = pair
    tokens, positions = batch()
    text = jax.jit(lambda: transformer.prefill(params, tokens, positions, cfg)).lower().as_text(debug_info=True)
    assert all(f"prefill/{scope}/" in text for scope in ("attend", "mlp"))


def test_prefill_and_decode_equal_the_full_forward(pair):
    """Two prompts share a buffer; four rows decode them, with the cache committed in between; one row ends early."""
    model, params, cfg = pair
    params = weights.unstack(params, cfg)
    tokens, positions = batch()
    prompt, last = 9, 19
    tokens, positions = tokens[:1], positions[:1]
    other = (tokens + 7) % 62
    both = np.concatenate([tokens, other])
    pad = np.concatenate([both[:, :prompt], np.zeros((2, 2), np.int32)], 1)
    pad_positions = np.concatenate([np.tile(positions[:, :prompt], (2, 1)), np.full((2, 2), -1, np.int32)], 1)
    hidden, ks, vs = transformer.prefill(params, pad, pad_positions, cfg)
    cache = transformer.empty_cache(cfg, rows=4, slots=18, blocks=1, prompt_slots=11, dtype=jnp.float32, entries=2)
    flat = lambda x: x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[3])  # noqa: E731
    rows = np.array([0, 1, 1, 0], np.int32)
    cache = cache.replace(
        prompt_k=tuple(map(flat, ks)),
        prompt_v=tuple(map(flat, vs)),
        prompt_length=jnp.full((1, 2), prompt),
    )
    cache = transformer.begin(cache, np.ones(4, bool), rows)
    theirs = expected(model, both, np.tile(positions, (2, 1)))
    ours = transformer.unembed(params, hidden)[:, prompt - 1]
    assert np.abs(ours - theirs[:, prompt - 1]).max() / np.abs(theirs).max() < 1e-4
    step = jax.jit(lambda t, p, c, r, s: transformer.decode_step(params, t, p, cfg, c, r, s))
    commit = jax.jit(transformer.commit)

    def check(at, cache, recent, slot):
        """One token of each row at its position; -1 for a row that has ended."""
        live = at >= 0
        hidden, recent = step(both[rows, at], at, cache, recent, slot)
        out, want = transformer.unembed(params, hidden), theirs[rows, at]
        assert np.abs(out - want)[live].max() / np.abs(theirs).max() < 1e-4
        return recent

    at, recent = np.full(4, prompt), transformer.empty_recent(cache, 4)
    for slot in range(4):
        recent = check(at + slot, cache, recent, slot)
    cache, at = commit(cache, recent), at + 4
    recent = transformer.empty_recent(cache, 4)
    for slot in range(4):
        ended = (np.arange(4) == 2) & (slot >= 2)
        recent = check(np.where(ended, -1, at + slot), cache, recent, slot)
    cache, at = commit(cache, recent), at + np.array([4, 4, 2, 4])
    recent = transformer.empty_recent(cache, 4)
    assert cache.count.tolist() == [8, 8, 6, 8]
    for slot in range(2):
        recent = check(at + slot, cache, recent, slot)
    assert at.max() + 2 == last


def test_unrolled_equals_scanned(pair):
    _, params, cfg = pair
    tokens, positions = batch()
    scanned = transformer.encode(params, tokens, positions, cfg, remat="full")
    unrolled = transformer.encode(weights.unstack(params, cfg), tokens, positions, cfg)
    np.testing.assert_allclose(scanned, unrolled, atol=2e-5)


def test_round_trip_is_exact(pair, tmp_path):
    model, params, cfg = pair
    hf.save(tmp_path / "out", params, cfg, model.config.to_dict())
    again = type(model).from_pretrained(tmp_path / "out")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "mamba", "mamba"),
        ("hidden_act", "gelu", "gelu"),
        ("layer_types", ["chunked_attention"] * 3, "layer_types: got .*chunked"),
        ("rope_scaling", {"rope_type": "longrope"}, "longrope"),
        ("hidden_size", 10**12, "hidden_size"),
        ("num_hidden_layers", "3", "num_hidden_layers"),
        ("num_key_value_heads", 4, "divisor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(key, value, words):
    tree = {"model_type": "qwen3", **SIZES, key: value}
    with pytest.raises(UserError, match=words):
        families.from_tree(tree, "config.json")


def test_count_matches(pair):
    model, _, cfg = pair
    assert weights.count(cfg) == sum(p.numel() for p in model.parameters())


def test_long_texts_attend_in_turns(monkeypatch):
    """Values and gradients equal those of a single einsum over all queries."""
    q, k, v, g = (jax.random.normal(jax.random.key(i), (2, 21, n, 8)) for i, n in enumerate((4, 2, 2, 4)))
    positions = jnp.stack([jnp.arange(21), jnp.maximum(jnp.arange(21) - 4, -1)])

    def run():
        return jax.vjp(
            lambda *x: jnp.where((positions >= 0)[..., None, None], attention.attend(*x, positions), 0), q, k, v
        )

    whole, back = run()
    monkeypatch.setattr(attention, "QUERIES", 8)
    turns, back_turns = run()
    for got, want in ((turns, whole), *zip(back_turns(g), back(g), strict=True)):
        np.testing.assert_allclose(got, want, atol=2e-6)
