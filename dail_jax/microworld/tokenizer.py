"""The world's tokenizer: 64 tokens in Hugging Face's format, with a chat template.

The text of a token is exactly what it decodes to, so that decoding is concatenation, as with a byte-level BPE:
words and punctuation carry their own spaces, and a bare space stands only between two numbers. Encoding takes
the longest token at each position; there are no merges.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, END, UNKNOWN, USER, ASSISTANT = SPECIALS = ("<|pad|>", "<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>")
CONSONANTS, VOWELS = "bdfghklmnprstvz", "aeiou"
# Prompts and traces together stay far below this; it only bounds RoPE positions.
MODEL_MAX_LENGTH = 512

VOCABULARY: tuple[str, ...] = (
    *SPECIALS,
    *"0123456789",
    *CONSONANTS,
    *VOWELS,
    *("add ", "sub ", "mul ", "rev ", "rot ", "inv "),  # in traces and methods
    *("rev", "rot", "inv"),  # in methods, where nothing follows them
    *("+", "-", "*", "~", "@", "#"),  # the same six in expert solutions
    *("B", ": A=", " B=", "=", " ", "; ", " ; ", " : ", " > ", "\\boxed{", "}"),
    *("\nSolution: ", "\nResults: ", "\nAnswer: "),
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('user', 'assistant') -%}"
    "{{- raise_exception('got role ' ~ message['role'] ~ ', want user or assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build() -> Tokenizer:
    """The tokenizer; ids are indices into VOCABULARY."""
    plain = sorted(VOCABULARY[len(SPECIALS) :], key=len, reverse=True)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(_escape, plain))), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def _escape(token: str) -> str:
    """A regular expression for the token; spaces stay unescaped here, and a newline is written as \\n."""
    return re.escape(token).replace("\\ ", " ").replace("\\\n", "\\n")


def save(folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as AutoTokenizer reads them; the bytes are always the same."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(build().to_str()), indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
