"""A tiny configuration on the embedded micro-world, and ways to run stages with it: shared by the stage tests."""

import contextlib
import functools
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dail_jax import config as config_lib
from dail_jax import launch
from dail_jax import mesh as mesh_lib
from dail_jax.sample import engine

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "dail_jax" / "microworld" / "assets"
STAGES = ("generate", "train", "evaluate", "export", "report")
UPDATES = 6


def tree(run_dir, **changes) -> dict:
    """12 rows, two traces each, 6 updates, 2 x 3 problems with 4 samples. Keys of `changes` have __ for a dot."""
    templates = {role: str(ASSETS / "templates" / f"{role}.txt") for role in ("student", "privileged", "negative")}
    out = {
        "run_dir": str(run_dir),
        "seed": 5,
        "model": {"path": str(ASSETS / "model"), "dtype": "float32"},
        "data": {"path": str(ASSETS / "train.jsonl"), "limit": 12},
        "prompts": templates,
        "generate": {"tau": 0.8, "samples": 2, "slots": 8, "sampling": {"temperature": 1.0, "max_tokens": 96}},
        "filters": {"correct": True, "artefacts": [], "keep": "all"},
        "train": {
            "objective": "dail",
            "epochs": 2,
            "batch_size": 8,
            "bucket": 96,
            "chunk": 4096,
            "remat": "none",
            "save_every": 2,
            "max_tokens": 192,
            "lora": {"rank": 4, "alpha": 4},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 1},
        },
        "evaluate": {
            "samples": 4,
            "slots": 8,
            "bootstrap": 50,
            "sampling": {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "max_tokens": 96},
            "benchmarks": [
                {"name": n, "rows": {"path": str(ASSETS / f"{n}.jsonl"), "limit": 3}} for n in ("hard", "chain")
            ],
        },
    }
    for key, value in changes.items():
        config_lib.assign(out, key.replace("__", "."), value)
    return out


def write(run_dir, **changes) -> Path:
    """The same as a file beside the run directory."""
    path = Path(f"{run_dir}.yaml")
    path.write_text(json.dumps(tree(run_dir, **changes)))  # JSON is YAML
    return path


def write_pretrain(run_dir, corpus: Path, **changes) -> Path:
    """A configuration of `pretrain` beside the run directory: 12 steps of 7,000 weights, written to RUN_DIR/model."""
    architecture = json.loads((ASSETS / "model" / "config.json").read_text())
    architecture |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    if not corpus.exists():
        rows = [{"prompt": r["problem"], "response": r["solution"]} for r in lines(ASSETS / "train.jsonl")[:60]]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = {"rows": str(corpus), "architecture": architecture, "steps": 12, "tokens_per_step": 512, "bucket": 96}
    cfg |= {"max_tokens": 96, "log_every": 4, "save_every": 5}
    model = {"path": f"{run_dir}/model", "tokenizer": str(ASSETS / "tokenizer"), "dtype": "float32"}
    return write(run_dir, **{"model": model, "pretrain": cfg, **changes})


@contextlib.contextmanager
def alone():
    """One device of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "make_mesh", functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:1]))
        yield


def run(stage: str, path: Path, *overrides: str) -> int:
    """A stage in this process, through the command line."""
    return launch.main([stage, "--config", str(path), *overrides])


def environment() -> dict[str, str]:
    """Of a process with one device."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"]),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }


@contextlib.contextmanager
def small_files(limit: int):
    """No file of this process, or of those that it starts, may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def start(stage: str, path: Path, *more: str, **variables: str) -> subprocess.Popen:
    """A stage in a process of its own, with these variables in its environment."""
    command = [sys.executable, "-m", "dail_jax.launch", stage, "--config", str(path), *more]
    env = {**environment(), **variables}
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pair(code: str, *arguments: str) -> list[tuple[int, str, str]]:
    """What two processes of two devices end with: `code` is given where the first listens, and which one it is."""
    at = f"127.0.0.1:{free_port()}"
    env = {**environment(), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, at, str(i), *arguments],
            env=env,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(path: Path, count: int, process: subprocess.Popen, stage: str = "") -> None:
    """Until a file has `count` lines (of a stage, in metrics.jsonl), or the process has ended."""
    mark = f'"stage": "{stage}"'.encode() if stage else b""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if sum(mark in line for line in path.read_bytes().splitlines()) >= count:
                return
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    """The processes that one has started, by any of its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            found += map(int, (task / "children").read_text().split())
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended counts as dead even if nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(update, loss, gradient norm) of every row of a run's training."""
    rows = [r for r in lines(folder / "metrics.jsonl") if r["stage"] == "train"]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows]


@contextlib.contextmanager
def no_network():
    """Fails where this process connects to anything."""

    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        yield


@contextlib.contextmanager
def nothing_is_drawn():
    """Fails where a sampler is asked for a sample."""

    def run(self, requests):
        assert not list(requests), "a finished problem is drawn again"
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "run", run)
        yield
