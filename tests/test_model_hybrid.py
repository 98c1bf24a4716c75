"""Qwen3-MoE and Qwen3.5: adapters, folders in every layout, devices, released configurations, refusals."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import peft as peft_library
import pytest
import torch
import transformers
from conftest import mesh_of
from safetensors.torch import load_file, save_file
from test_model_families import released
from test_model_parity import DELTA, EXPERTS, SIZES, batch, close, expected

from dail_jax import config as config_lib
from dail_jax.ahead import programs
from dail_jax.checkpoint import hf, peft
from dail_jax.errors import UserError
from dail_jax.model import families, transformer, weights
from dail_jax.model import lora as lora_lib

TWO = {**SIZES, "num_hidden_layers": 2}
NET = {**DELTA, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
NET["linear_num_value_heads"] = 4
KINDS = {
    "qwen3_5": (
        lambda: transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**TWO, **NET)),
        ("q", "k", "v", "o", "in_qkv", "in_b", "in_a", "in_z", "out", "gate", "up", "down"),
    ),
    "qwen3_moe": (
        lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **TWO, **{**EXPERTS, "num_experts": 6}, norm_topk_prob=True, mlp_only_layers=[0]
            )
        ),
        ("q", "k", "v", "o"),
    ),
}


def noise(module):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return module.eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory, one_device):
    """(folder, transformers' model, our weights and sizes, an adapter on every linear map that may have one)."""
    make, targets = KINDS[request.param]
    folder, theirs = tmp_path_factory.mktemp(request.param), noise(make())
    theirs.save_pretrained(folder)
    params, cfg = hf.load(folder, one_device, "float32")
    settings = config_lib.LoraConfig(rank=3, alpha=6, targets=targets)
    lora = lora_lib.init(jax.random.key(1), cfg, settings)
    tree = {
        name: {side: x + 0.2 * jax.random.normal(jax.random.key(i), x.shape) for side, x in pair.items()}
        for i, (name, pair) in enumerate(lora.tree.items())
    }
    return folder, theirs, params, cfg, settings, lora_lib.Lora(tree, lora.scale)


def logits(params, cfg, lora=None):
    return transformer.unembed(params, transformer.encode(params, *batch(), cfg, lora=lora))


def test_peft_loads_the_adapter_with_equal_logits(model, one_device, tmp_path):
    folder, theirs, params, cfg, settings, lora = model
    peft.save(tmp_path / "adapter", lora, cfg, settings, str(folder))
    adapted = peft_library.PeftModel.from_pretrained(type(theirs).from_pretrained(folder), tmp_path / "adapter").eval()
    want, live = expected(adapted, *batch()), batch()[1] >= 0
    assert close(logits(params, cfg, lora), want, live) < 1e-4
    assert np.abs(want - expected(theirs, *batch()))[live].max() > 0.1 * np.abs(want).max()
    again, found = peft.load(tmp_path / "adapter", cfg, one_device)
    assert found == settings and jax.tree.all(jax.tree.map(np.array_equal, again.tree, lora.tree))
    hf.save(tmp_path / "merged", lora_lib.merge(params, lora, cfg), cfg, theirs.config.to_dict())
    merged = type(theirs).from_pretrained(tmp_path / "merged").eval()
    assert close(expected(merged, *batch()), want, live) < 1e-4


def test_devices_do_not_matter(model):
    """The gradient in the adapter, with experts and heads divided among devices."""
    *_, params, cfg, _, lora = model
    tokens, positions = (np.tile(x[:2], (2, 1)) for x in batch())

    def loss(lora, params):
        hidden = transformer.encode(params, tokens, positions, cfg, lora=lora, remat="full")
        return jnp.where((positions >= 0)[..., None], jnp.sin(transformer.unembed(params, hidden)), 0).sum()

    want = jax.jit(jax.grad(loss))(lora, params)
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss))(lora, jax.device_put(params, weights.shardings(cfg, mesh)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 1e-2
        np.testing.assert_allclose(a, b, atol=2e-4 * float(np.abs(b).max()))


def test_experts_in_one_tensor_are_read_as_in_many(one_device, tmp_path):
    theirs = noise(KINDS["qwen3_moe"][0]())
    theirs.save_pretrained(tmp_path / "many")
    fused = {name: x.contiguous().clone() for name, x in theirs.state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused
    assert "model.layers.1.mlp.experts.5.down_proj.weight" in load_file(tmp_path / "many" / "model.safetensors")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text((tmp_path / "many" / "config.json").read_text())
    save_file(fused, tmp_path / "one" / "model.safetensors")
    (many, cfg), (one, _) = (hf.load(tmp_path / name, one_device, "float32") for name in ("many", "one"))
    assert jax.tree.all(jax.tree.map(np.array_equal, many, one))
    hf.check(tmp_path / "one", cfg)
    fused["model.layers.1.mlp.experts.down_proj"] = fused["model.layers.1.mlp.experts.down_proj"][:5].clone()
    save_file(fused, tmp_path / "one" / "model.safetensors")
    with pytest.raises(UserError, match=r"missing tensors: model.layers.1.mlp.experts.5.down_proj.weight"):
        hf.load(tmp_path / "one", one_device, "float32")


def test_a_multimodal_folder_gives_its_text_model(one_device, tmp_path):
    """Vision and extra prediction heads are left out, and what is written is a text model that others read."""
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=20, out_hidden_size=24)
    text = transformers.Qwen3_5TextConfig(**TWO, **NET, eos_token_id=7).to_dict()
    whole = noise(
        transformers.Qwen3_5ForConditionalGeneration(
            transformers.Qwen3_5Config(text_config=text, vision_config={**vision, "num_position_embeddings": 16})
        )
    )
    whole.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    assert any(name.startswith("model.visual.") for name in tensors)
    save_file({**tensors, "mtp.fc.weight": torch.ones(3, 2)}, file)
    params, cfg = hf.load(tmp_path / "whole", one_device, "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    live = batch()[1] >= 0
    assert close(logits(params, cfg), expected(theirs, *batch()), live) < 1e-4
    description = json.loads((tmp_path / "whole" / "config.json").read_text())
    hf.save(tmp_path / "text", params, cfg, description)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(again) is transformers.Qwen3_5ForCausalLM and again.config.eos_token_id == 7
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert families.read_config(tmp_path / "text") == cfg


PATTERN = ["linear_attention"] * 3 + ["full_attention"]


def smallest():
    """Qwen3.5-0.8B, by its sizes: a tied model with as many key heads as value heads."""
    tree = released("Qwen/Qwen3.5-9B")
    sizes = dict(hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=2, linear_num_value_heads=16, layer_types=PATTERN * 6, tie_word_embeddings=True)
    return {**tree, "text_config": tree["text_config"] | sizes, "tie_word_embeddings": True}


RELEASED = {  # parameters as published, of the text model alone
    "Qwen/Qwen3-30B-A3B": (released("Qwen/Qwen3-30B-A3B"), 30_532_122_624),
    "Qwen/Qwen3-235B-A22B": (released("Qwen/Qwen3-235B-A22B"), 235_093_634_560),
    "Qwen/Qwen3.5-0.8B": (smallest(), 752_393_024),
    "Qwen/Qwen3.5-9B": (released("Qwen/Qwen3.5-9B"), 8_953_803_264),
    "Qwen/Qwen3.5-27B": (released("Qwen/Qwen3.5-27B"), 26_895_998_464),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations(name):
    tree, count = RELEASED[name]
    cfg = families.from_tree(tree, "config.json")
    assert weights.count(cfg) == count
    if cfg.deltanet:
        net, depth = cfg.deltanet, cfg.L
        assert (net.K, net.H, net.I, net.Z, cfg.period) == (16, 128, 128, 4, 4)
        assert [layer.mixer for layer in cfg.layers] == (["deltanet"] * 3 + ["attention"]) * (depth // 4)
        rope = cfg.layers[3].rope
        assert rope is not None and len(rope.frequencies(cfg.H)[0]) == 32 and rope.theta == 1e7
        cache = jax.eval_shape(lambda: transformer.empty_cache(cfg, 1, 1024, 1, 32, jnp.bfloat16))
        held = [sum(math.prod(x[i].shape) * x[i].dtype.itemsize for x in (cache.k, cache.v)) for i in (0, 3)]
        assert held == [net.N * 128 * 128 * 4 + 3 * (32 + net.N) * 128 * 2, 1024 * 2 * cfg.K * 256 * 2]
    else:
        assert cfg.experts == families.Experts(128, tree["moe_intermediate_size"], 8, True)
        assert cfg.period == 1 and cfg.layers[0].mlp == "experts"


def test_useful_work_is_that_of_the_experts_that_a_token_picks():
    moe, hybrid = (
        families.from_tree(RELEASED[name][0], "config.json") for name in ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3.5-0.8B")
    )
    work = sum(len(w.layers(moe)) * programs.work(w, moe) for w in weights.declare(moe).values())
    assert work == 48 * (2048 * 128 * (32 + 4 + 4 + 32) + 8 * 3 * 2048 * 768)
    assert programs.mixing(hybrid.layers[0], hybrid, 100) == 100 * 3 * 16 * 128 * 128
    assert programs.mixing(hybrid.layers[3], hybrid, 100) == 100**2 * 8 * 256


def test_a_released_model_is_counted_as_transformers_counts_it():
    tree = RELEASED["Qwen/Qwen3.5-0.8B"][0]
    with torch.device("meta"):
        theirs = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**tree["text_config"]))
    assert sum(p.numel() for p in theirs.parameters()) == RELEASED["Qwen/Qwen3.5-0.8B"][1]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok: got 9, want at most the 7 experts"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"num_experts": 10**9}, "num_experts"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("qwen3_5_moe", {}, "qwen3_5_moe"),
        ("qwen3_next", {}, "qwen3_next"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate"),
        ("qwen3_5_text", {"output_gate_type": "sigmoid"}, "output_gate_type"),
        ("qwen3_5_text", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype"),
        ("qwen3_5_text", {"linear_num_value_heads": 5}, "linear_num_value_heads: got 5, want a multiple"),
        ("qwen3_5_text", {"layer_types": ["linear_attention"] * 3}, "layer_types: got no full_attention"),
        ("qwen3_5_text", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("qwen3_5_text", {"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor"),
        ("qwen3_5", {}, "text_config"),
        ("qwen3_5", {"text_config": {"model_type": "qwen3_5_moe_text"}}, "text_config"),
        ("qwen3_5", {"quantization_config": {"bits": 4}, "text_config": {}}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(kind, change, words):
    own = EXPERTS if kind == "qwen3_moe" else {**DELTA, "layer_types": ["linear_attention", *["full_attention"] * 2]}
    with pytest.raises(UserError, match=words):
        families.from_tree({**SIZES, **own, "model_type": kind, **change}, "config.json")


@pytest.mark.parametrize(
    ("kind", "targets", "words"),
    [
        ("qwen3_moe", ["q", "gate"], r"got gate, want some of q, k, v, o \(its MLPs get no adapters\)"),
        ("qwen3_moe", ["in_qkv"], "got in_qkv, want some of q, k, v, o"),
        (
            "qwen3",
            ["q", "out", "in_a"],
            "got out, in_a, want some of q, k, v, o, gate, up, down: a qwen3 has no others",
        ),
    ],
)
def test_adapters_on_what_a_model_lacks_are_refused(kind, targets, words):
    own = EXPERTS if kind == "qwen3_moe" else {}
    cfg = families.from_tree({**SIZES, **own, "model_type": kind}, "config.json")
    with pytest.raises(UserError, match=words):
        lora_lib.init(jax.random.key(0), cfg, config_lib.LoraConfig(rank=2, alpha=2, targets=targets))
