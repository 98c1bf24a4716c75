"""config.json as released, read to the right number of parameters, or refused by name."""

import json
from pathlib import Path

import pytest

from dail_jax.errors import UserError
from dail_jax.model import families, weights

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.2079441541679836,
}
SWITCHED_OFF = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
SLIDES, FULL = "sliding_attention", "full_attention"


def sizes(kind, vocabulary, width, inner, depth, heads, kv_heads, theta, **more):
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": theta,
        "tie_word_embeddings": False,
        **more,
    }


LLAMA_8B = sizes(
    "llama", 128256, 4096, 14336, 32, 32, 8, 5e5, rope_scaling=LLAMA3, attention_bias=False, mlp_bias=False
)


def released(name):
    """A checkpoint's config.json as published."""
    return json.loads((Path(__file__).parent / "released" / f"{name.replace('/', '--')}.json").read_text())


QWEN_7B, PHI4 = released("Qwen/Qwen2.5-7B-Instruct"), released("microsoft/phi-4")
QWEN3 = dict(head_dim=128, attention_bias=False, use_sliding_window=False, sliding_window=None, max_window_layers=36)
FILES = {  # parameters as published
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Meta-Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/Olmo-3.1-32B-Instruct": 32_233_522_176,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/phi-4": 14_659_507_200,
}
FIELDS = {  # those that matter, of further checkpoints
    "Qwen/Qwen2.5-1.5B-Instruct": (
        sizes("qwen2", 151936, 1536, 8960, 28, 12, 2, 1e6, tie_word_embeddings=True, **SWITCHED_OFF),
        1_543_714_304,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (LLAMA_8B, 8_030_261_248),
    "Qwen/Qwen3-4B-Thinking-2507": (
        sizes("qwen3", 151936, 2560, 9728, 36, 32, 8, 5e6, **{**QWEN3, "tie_word_embeddings": True}),
        4_022_468_096,
    ),
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": (LLAMA_8B, 8_030_261_248),
    "mistralai/Mistral-7B-v0.1": (
        sizes("mistral", 32000, 4096, 14336, 32, 32, 8, 1e4, sliding_window=4096),
        7_241_732_096,
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": (
        sizes("mistral", 131072, 5120, 14336, 40, 32, 8, 1e6, head_dim=128, sliding_window=None),
        12_247_782_400,
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": (
        sizes("mistral", 131072, 5120, 32768, 40, 32, 8, 1e8, head_dim=128, sliding_window=None),
        23_572_403_200,
    ),
    "allenai/OLMo-2-1124-7B-Instruct": (sizes("olmo2", 100352, 4096, 11008, 32, 32, 32, 500000), 7_298_617_344),
    "allenai/Olmo-3-7B-Think": (
        sizes("olmo3", 100278, 4096, 11008, 32, 32, 32, 500000, sliding_window=4096, rope_scaling=YARN)
        | {"layer_types": [SLIDES, SLIDES, SLIDES, FULL] * 8},
        7_298_011_136,
    ),
    "microsoft/Phi-4-reasoning": ({**PHI4, "rope_theta": 500000}, 14_659_507_200),
    "microsoft/Phi-3-mini-4k-instruct": (
        sizes("phi3", 32064, 3072, 8192, 32, 32, 32, 1e4, sliding_window=2047, rope_scaling=None),
        3_821_079_552,
    ),
}
RELEASED = {name: (released(name), count) for name, count in FILES.items()} | FIELDS
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
REFUSED = {
    "Qwen/Qwen3-32B-FP8": (released("Qwen/Qwen3-32B-FP8"), "quantization_config: got"),
    "Qwen/Qwen3.5-35B-A3B": (released("Qwen/Qwen3.5-35B-A3B"), "model type 'qwen3_5_moe', a text model among others"),
    "microsoft/Phi-4-mini-instruct": (
        sizes("phi3", 200064, 3072, 8192, 32, 24, 8, 1e4, rope_scaling=LONG, partial_rotary_factor=0.75),
        "rope_scaling: rope type 'longrope' is not supported; want default",
    ),
    "google/gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560},
            "vision_config": {},
        },
        "model_type: model type 'gemma3', a text model among others, is not supported; save the text model alone",
    ),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": (
        {"model_type": "mistral3", "text_config": {"model_type": "mistral"}},
        "model type 'mistral3', a text model among others",
    ),
    "google/gemma-2-9b-it": (
        sizes("gemma2", 256000, 3584, 14336, 42, 16, 8, 1e4, attn_logit_softcapping=50.0),
        "model type 'gemma2' is not supported; want one of",
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (
        sizes("mixtral", 32000, 4096, 14336, 32, 32, 8, 1e6, num_local_experts=8),
        "model type 'mixtral' is not supported",
    ),
    "Qwen/Qwen2.5-7B-Instruct-AWQ": ({**QWEN_7B, "quantization_config": {"bits": 4}}, "quantization_config: got"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_have_the_parameters_that_are_published(name):
    tree, parameters = RELEASED[name]
    assert weights.count(families.from_tree(tree, name)) == parameters


@pytest.mark.parametrize("name", REFUSED)
def test_other_checkpoints_are_refused_by_name(name):
    tree, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        families.from_tree(tree, "config.json")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_layers_are_described_one_by_one():
    def of(name):
        model = families.from_tree(RELEASED[name][0], name)
        return model, [layer.window for layer in model.layers], [layer.rope for layer in model.layers]

    model, windows, ropes = of("allenai/Olmo-3-7B-Think")
    assert windows == [4096, 4096, 4096, None] * 8 and model.period == 4
    assert {(r.theta, r.kind) for r in ropes[:3]} == {(5e5, "default")} and ropes[3].kind == "yarn"
    model, windows, ropes = of("google/gemma-3-1b-it")
    assert windows == ([512] * 5 + [None]) * 4 + [512] * 2 and model.period == 6
    assert [r.theta for r in ropes[4:7]] == [1e4, 1e6, 1e4]
    assert model.attention_scale == 1 / 16 and model.embedding_scale == 1152**0.5
    model, windows, ropes = of("HuggingFaceTB/SmolLM3-3B")
    assert [r is None for r in ropes] == [False, False, False, True] * 9 and set(windows) == {None}
    assert of("mistralai/Mistral-7B-v0.1")[1] == [4096] * 32 and of("Qwen/Qwen3-8B")[0].period == 1
    switched = {**QWEN_7B, "use_sliding_window": True, "max_window_layers": 20}
    layers = families.from_tree(switched, "config.json").layers
    assert [layer.window for layer in layers] == [None] * 20 + [131072] * 8


def test_rotations_of_layer_types_are_read_in_both_spellings():
    """One entry for each type, as transformers 5 writes them, and the older keys."""
    old = RELEASED["google/gemma-3-1b-it"][0] | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {k: v for k, v in old.items() if "rope" not in k} | {
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDES: {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    assert families.from_tree(old, "a").layers == families.from_tree(new, "b").layers
    assert families.from_tree(old, "a").layers[5].rope == families.Rope(1e6, "linear", 8.0)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("allenai/Olmo-3-7B-Think", {"layer_types": [FULL] * 31}, "layer_types: got .* want 32 of full_attention"),
        ("allenai/Olmo-3-7B-Think", {"layer_types": ["chunked_attention"] * 32}, "layer_types: got"),
        ("allenai/Olmo-3-7B-Think", {"sliding_window": -1}, "sliding_window: got -1"),
        ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": [1, 2]}, "no_rope_layers: got"),
        ("google/gemma-3-1b-it", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: got 30.0"),
        ("google/gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention: got True"),
        ("google/gemma-3-1b-it", {"hidden_activation": "relu"}, "hidden_activation: got 'relu'"),
        ("microsoft/phi-4", {"rope_scaling": {"type": "su"}}, "rope type 'su' is not supported; want default"),
        (
            "Qwen/Qwen3-8B",
            {"rope_scaling": {**YARN, "attn_factor": 0.878}},
            "rope_scaling: attn_factor is read by some",
        ),
        ("Qwen/Qwen3-8B", {"layer_types": [SLIDES] * 36}, "layer_types: got"),
        (
            "Qwen/Qwen3-8B",
            {"rope_parameters": {FULL: {"rope_theta": 1e6}}},
            "full_attention: one rotation for each type",
        ),
        ("mistralai/Mistral-7B-v0.1", {"layer_types": [SLIDES, FULL] * 16}, "layer_types: got"),
        ("meta-llama/Meta-Llama-3.1-8B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
    ],
)
def test_what_a_family_does_not_support_is_refused_by_name(name, change, words):
    with pytest.raises(UserError, match=words):
        families.from_tree({**RELEASED[name][0], **change}, "config.json")
