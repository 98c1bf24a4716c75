"""Draws the samples of an evaluation with vLLM, without a server: python draw.py

`dail export` has written this file once; edit it as you like. It reads settings.json, requests.jsonl and, if it is there,
forced.jsonl beside it, and appends to drawn.jsonl what is not in there yet: call it again after an interruption. The
rows that it writes are compared with what was asked for by `dail grade CONFIG --import drawn.jsonl`.
"""

import json
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

HERE = Path(__file__).resolve().parent
SETTINGS = json.loads((HERE / "settings.json").read_text())
MODEL = SETTINGS["model"]  # a folder, or a name on the hub
ADAPTER = SETTINGS["adapter"] and str(HERE / SETTINGS["adapter"])  # a PEFT folder, or None
ENGINE = {"dtype": SETTINGS["dtype"]}  # further arguments of vLLM, such as tensor_parallel_size
BATCH = 1024  # samples per call of vLLM; those of one that has ended are on the disk


def lines(path):
    """The rows of a file; a last line that an interruption has torn is taken away."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def sampling(request, seed):
    """How one sample is drawn."""
    return SamplingParams(
        temperature=SETTINGS["temperature"],
        top_p=SETTINGS["top_p"],
        top_k=SETTINGS["top_k"] or -1,
        presence_penalty=SETTINGS["presence_penalty"],
        logit_bias=dict.fromkeys(SETTINGS["never"], -100.0) or None,
        stop_token_ids=SETTINGS["stop_token_ids"],
        max_tokens=request["limit"],
        seed=seed,
        detokenize=False,
    )


def main():
    requests = lines(HERE / "requests.jsonl") + lines(HERE / "forced.jsonl")
    done = {(row["name"], row["sample"]) for row in lines(HERE / "drawn.jsonl")}
    todo = [
        (request, sample, seed)
        for request in requests
        for sample, seed in enumerate(request["seeds"])
        if (request["name"], sample) not in done
    ]
    print(f"{len(todo)} samples to draw, {len(done)} drawn before")
    if not todo:
        return
    adapter = LoRARequest("adapter", 1, ADAPTER) if ADAPTER else None
    lora = {"enable_lora": True, "max_lora_rank": SETTINGS["max_lora_rank"]} if ADAPTER else {}
    longest = max(len(request["prompt_ids"]) + request["limit"] for request, _, _ in todo)
    llm = LLM(model=MODEL, max_model_len=longest, **ENGINE, **lora)
    for start in range(0, len(todo), BATCH):
        batch = todo[start : start + BATCH]
        outputs = llm.generate(
            [{"prompt_token_ids": request["prompt_ids"]} for request, _, _ in batch],
            [sampling(request, seed) for request, _, seed in batch],
            lora_request=adapter,
        )
        with open(HERE / "drawn.jsonl", "a") as file:
            for (request, sample, _), output in zip(batch, outputs, strict=True):
                row = {
                    "name": request["name"],
                    "sample": sample,
                    "prompt_hash": request["prompt_hash"],
                    "settings": SETTINGS["hash"],
                    "ids": list(output.outputs[0].token_ids),
                    "finish": output.outputs[0].finish_reason,
                }
                file.write(json.dumps(row) + "\n")
        print(f"{min(start + BATCH, len(todo))} of {len(todo)}")


if __name__ == "__main__":
    main()
