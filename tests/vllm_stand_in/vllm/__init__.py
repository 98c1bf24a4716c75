"""As much of vLLM's interface as the script of `export` uses, by transformers and peft. Importable as `vllm`."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

CALLS: list[int] = []  # the number of samples of every call


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    presence_penalty: float
    logit_bias: dict[int, float] | None
    stop_token_ids: list[int]
    max_tokens: int
    seed: int
    detokenize: bool


class LLM:
    def __init__(self, model, dtype, max_model_len, enable_lora=False, max_lora_rank=16):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.max_model_len, self.enable_lora, self.max_lora_rank = max_model_len, enable_lora, max_lora_rank
        assert max_lora_rank in (8, 16, 32, 64, 128, 256)

    def generate(self, prompts, sampling_params, lora_request=None):
        CALLS.append(len(prompts))
        if lora_request is not None and not isinstance(self.model, PeftModel):
            assert self.enable_lora and lora_request.lora_int_id == 1
            self.model = PeftModel.from_pretrained(self.model, lora_request.lora_path).eval()
            assert self.model.peft_config["default"].r <= self.max_lora_rank
        return [self.draw(*pair) for pair in zip(prompts, sampling_params, strict=True)]

    def draw(self, prompt, params):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        assert ids.shape[1] + params.max_tokens <= self.max_model_len and params.top_k != 0
        torch.manual_seed(params.seed)
        how = dict(do_sample=False)
        if params.temperature > 0:
            how = dict(do_sample=True, temperature=params.temperature, top_p=params.top_p, top_k=max(params.top_k, 0))
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=params.max_tokens,
                eos_token_id=params.stop_token_ids,
                pad_token_id=params.stop_token_ids[0],
                **how,
            )
        drawn = out[0, ids.shape[1] :].tolist()
        reason = "stop" if drawn[-1] in params.stop_token_ids else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=drawn, finish_reason=reason)])
