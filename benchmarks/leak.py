"""Does memory grow with work? Many checkpoint saves, and many samples, with the process's memory along the way.

    python benchmarks/leak.py --saves 1000 --samples 8192     (about fifteen minutes on two cores)

Each row follows a tenth of the work: resident memory before and after the C allocator has returned what it holds free,
Python's objects, and JAX's arrays. Memory that is freed but not returned rises at first and then stays constant; a leak
keeps rising, by as much in each row. The last line has the slope over the second half, per save or sample.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np

from dail_jax import config as config_lib
from dail_jax.checkpoint import store
from dail_jax.sample import engine
from dail_jax.stages import session

MODEL = Path(__file__).resolve().parent.parent / "dail_jax/microworld/assets/model"
ROWS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--megabytes", type=float, default=1.0, help="of a checkpoint's state")
    parser.add_argument("--json", type=Path, help="write one object per row")
    options = parser.parse_args()
    rows = []
    for name, work, count in (("saves", saves, options.saves), ("samples", samples, options.samples)):
        if count:
            rows += measure(name, work(count, options.megabytes), count)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def measure(name: str, work: Iterator[None], count: int) -> list[dict]:
    """Does the work; a row after every tenth of it."""
    rows = []
    for done, _ in enumerate(work, 1):
        if done in (1, count) or done % max(count // ROWS, 1) == 0:
            rows.append({"work": name, "done": done, **memory()})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    half = [row for row in rows if row["done"] >= count / 2]
    slope = (
        np.polyfit([row["done"] for row in half], [row["trimmed_mib"] for row in half], 1)[0] if len(half) > 1 else 0.0
    )
    print(f"{name}: {1024 * slope:.2f} KiB each over the second half", flush=True)
    return rows


def memory() -> dict[str, float]:
    gc.collect()
    before = resident()
    trim()
    return {
        "resident_mib": round(before, 1),
        "trimmed_mib": round(resident(), 1),
        "objects": len(gc.get_objects()),
        "arrays": len(jax.live_arrays()),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def resident() -> float:
    """Resident memory of this process in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def trim() -> None:
    """Makes the C library return free memory, if it can (glibc)."""
    release: Callable | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def saves(count: int, megabytes: float) -> Iterator[None]:
    """Saves checkpoints of 42 arrays, as many as LoRA and Adam have for seven targets; two are kept."""
    with tempfile.TemporaryDirectory(prefix="leak-") as folder:
        kept = store.Store(folder, keep=2)
        size = max(int(megabytes * 2**20 / 4 / 42), 1)
        state = {str(n): jnp.arange(size, dtype=jnp.float32) + n for n in range(42)}
        for step in range(1, count + 1):
            state = jax.tree.map(lambda x: x + 1, state)
            kept.save(step, state, {"data": {"next_index": step}})
            yield
        kept.close()


def samples(count: int, _megabytes: float) -> Iterator[None]:
    """Samples of the micro-world model, eight per problem."""
    config = config_lib.Config(run_dir=".", model=config_lib.Model(path=str(MODEL), dtype="float32"))
    opened = session.open_session(config)
    sampler = opened.sampler(config_lib.Sampling(max_tokens=32), slots=64, max_tokens=32)
    prompt = tuple(opened.prompts.student_only("add 241 310"))
    requests = (engine.Request(str(n), (prompt,), tuple(range(8)), 32) for n in range(count // 8))
    with jax.set_mesh(opened.mesh):
        for sample in sampler.run(requests):
            if sample is not None:
                yield


if __name__ == "__main__":
    sys.exit(main())
