"""A tiny configuration on the embedded micro-world, and ways to run stages with it: shared by the stage tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dail_jax import config as config_lib
from dail_jax import launch

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "dail_jax" / "microworld" / "assets"
STAGES = ("generate", "train", "evaluate", "export", "report")


def tree(run_dir, **changes) -> dict:
    """12 rows, two traces each, 6 updates, 2 x 3 problems with 4 samples; dotted keys of `changes` with _ for a dot."""
    templates = {role: str(ASSETS / "templates" / f"{role}.txt") for role in ("student", "privileged", "negative")}
    out = {
        "run_dir": str(run_dir), "seed": 5,
        "model": {"path": str(ASSETS / "model"), "dtype": "float32"},
        "data": {"path": str(ASSETS / "train.jsonl"), "limit": 12},
        "prompts": templates,
        "generate": {"tau": 0.8, "samples": 2, "slots": 8, "sampling": {"temperature": 1.0, "max_tokens": 96}},
        "filters": {"correct": True, "artefacts": [], "keep": "all"},
        "train": {"objective": "dail", "epochs": 2, "batch_size": 8, "bucket": 32, "chunk": 4096, "remat": "none",
                  "save_every": 2, "max_tokens": 192, "lora": {"rank": 4, "alpha": 4},
                  "optimizer": {"learning_rate": 3e-3, "warmup_steps": 1}},
        "evaluate": {"samples": 4, "slots": 8, "bootstrap": 50,
                     "sampling": {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "max_tokens": 96},
                     "benchmarks": [{"name": n, "rows": {"path": str(ASSETS / f"{n}.jsonl"), "limit": 3}}
                                    for n in ("hard", "chain")]},
    }  # fmt: skip
    for key, value in changes.items():
        config_lib.assign(out, key.replace("__", "."), value)
    return out


def write(run_dir, **changes) -> Path:
    """The same as a file beside the run directory."""
    path = Path(run_dir).with_suffix(".yaml")
    path.write_text(json.dumps(tree(run_dir, **changes)))  # JSON is YAML
    return path


def run(stage: str, path: Path, *overrides: str) -> int:
    """A stage in this process, through the command line."""
    return launch.main([stage, "--config", str(path), *overrides])


def environment(devices: int = 1) -> dict[str, str]:
    """What a process of its own needs: fake devices, and programs that were compiled before."""
    return {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def command(stage: str, path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "dail_jax.launch", stage, "--config", str(path), *more]


def start(stage: str, path: Path, *more: str, devices: int = 1) -> subprocess.Popen:
    return subprocess.Popen(command(stage, path, *more), env=environment(devices), cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


CACHE = Path("/tmp/w/rel/cache")
