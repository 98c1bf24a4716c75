"""Two real processes (jax.distributed, gloo) run the stages together, and give what one process gives."""

import contextlib
import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import tiny

from dail_jax import launch
from dail_jax.data.batches import Example
from dail_jax.sample import engine
from dail_jax.train import references


def start(stage, path, *more):
    at = f"127.0.0.1:{tiny.free_port()}"
    return [
        tiny.start(stage, path, "--coordinator", at, "--processes", "2", "--process-id", str(i), *more)
        for i in range(2)
    ]


@contextlib.contextmanager
def ended(processes):
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(processes):
    """(exit statuses, the first one's stdout, all stderr)."""
    with ended(processes):
        found = [tiny.finish(process) for process in processes]
    return [status for status, _, _ in found], found[0][1], "".join(err for _, _, err in found)


def test_two_processes_train_as_one(tmp_path, pipeline):
    """Each feeds its share of the rows. Both are killed, then both preempted; losses equal one process's."""
    folder = tmp_path / "run"
    path = tiny.write(folder, traces=str(pipeline / "traces.jsonl"), train__save_every=1)
    log, tail = folder / "metrics.jsonl", 1
    processes = start("train", path)
    with ended(processes):
        tiny.wait_for(log, 2, processes[0], "train")
    assert log.exists(), [p.returncode for p in processes]
    tail = len(tiny.losses(folder))
    assert tail < tiny.UPDATES

    processes = start("train", path)
    tiny.wait_for(log, tail + 1, processes[0], "train")
    processes[1].send_signal(signal.SIGTERM)  # one hears of it, both stop at the same update
    statuses, out, err = finish(processes)
    is_done = len(tiny.losses(folder)) == tiny.UPDATES
    assert statuses == ([0, 0] if is_done else [launch.STOPPED] * 2), err
    assert "train: resuming at update" in out
    if not is_done:
        assert "train: stopped and saved at update" in out
        statuses, _, err = finish(start("train", path))
        assert statuses == [0, 0], err
    got, want = np.array(tiny.losses(folder)), np.array(tiny.losses(pipeline))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    same_references(folder, pipeline)

    env = {**tiny.environment(), "PYTHON": sys.executable, "LOGS": str(tmp_path)}  # as people start it
    done = subprocess.run(
        [tiny.ROOT / "launch" / "local.sh", "2", "export", "--config", path],
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0 and "export: wrote" in done.stdout, done
    assert (tmp_path / "process-1.log").exists() and "Traceback" not in (tmp_path / "process-1.log").read_text()
    from safetensors.numpy import load_file

    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, pipeline))
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[k] - theirs[k]).max() for k in ours) < 1e-4


def same_references(two, one):
    """Each of two processes has written its own part of the cached states; together they are what one process writes."""
    scores, wanted = (tiny.lines(run / "token_scores.jsonl") for run in (two, one))
    for got, want in zip(scores, wanted, strict=True):
        np.testing.assert_allclose(got["log_ratio"], want["log_ratio"], atol=2e-3)
    examples = [Example(row["problem_id"], {}, tuple(row["log_ratio"])) for row in wanted]
    keys = [json.loads((run / "references" / "manifest.json").read_text())["key"] for run in (two, one)]
    parts, whole = (
        references.load(run / "references", key, examples, 128, np.float32)
        for run, key in zip((two, one), keys, strict=True)
    )
    assert parts is not None and whole is not None and whole.parts["negative"] == [list(range(len(examples)))]
    for role, of_role in parts.parts.items():
        assert all(of_role) and sorted(itertools.chain(*of_role)) == list(range(len(examples)))
        for index in range(len(examples)):
            np.testing.assert_allclose(parts(role, index), whole(role, index), atol=1e-4)


INTERLEAVED = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
from dail_jax import launch
assert launch.main(["env", "--coordinator", sys.argv[1], "--processes", "2", "--process-id", sys.argv[2]]) == 0
import jax, numpy as np
from dail_jax import mesh as mesh_lib
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(1, 4, 1)  # two of each process, as a TPU slice may order them
mesh = jax.sharding.Mesh(devices, mesh_lib.AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(mesh_lib.AXES))
local, rows = mesh_lib.local_rows(mesh, 8), np.arange(8)[None] * 10
x = mesh_lib.to_devices({"x": rows[:, local]}, mesh, 8)["x"]
print(local.tolist(), all((np.asarray(s.data) == rows[s.index]).all() for s in x.addressable_shards), flush=True)
mesh_lib.barrier("both are here")
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""


def test_hosts_whose_rows_are_not_side_by_side():
    """Each process feeds the rows of its own devices, wherever the mesh has put them; and SIGTERM still ends it."""
    found = tiny.pair(INTERLEAVED)
    assert [status for status, _, _ in found] == [7, 7], found
    for (_, out, _), line in zip(found, ("[0, 1, 4, 5] True", "[2, 3, 6, 7] True"), strict=True):
        assert line in out.splitlines()


def test_errors_of_one_are_errors_of_all(tmp_path):
    """What only the first process can see ends both, in one line each."""
    path = tiny.write(tmp_path / "run", data__path=str(tiny.ASSETS / "train.jsonl"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    statuses, _, err = finish(start("generate", path))
    assert (
        statuses[0] == 2 and statuses[1] != 0 and f"error: {tmp_path}/run/run.json: got a file that is not JSON" in err
    )


def test_two_processes_generate_the_same_traces(tmp_path, pipeline):
    traces = tiny.lines(pipeline / "traces.jsonl")
    longest = {t["problem_id"]: max(t["prompt_tokens"].values()) for t in traces}
    chosen = [name for name, n in longest.items() if engine.bucket(n) == engine.bucket(max(longest.values()))][:4]
    rows = [r for r in tiny.lines(tiny.ASSETS / "train.jsonl") if r["problem_id"] in chosen]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tiny.write(tmp_path / "run", data__path=str(tmp_path / "rows.jsonl"))
    statuses, _, err = finish(start("generate", path))
    assert statuses == [0, 0], err
    got, want = tiny.lines(tmp_path / "run" / "traces.jsonl"), [t for t in traces if t["problem_id"] in chosen]
    assert [t["response_ids"] for t in got] == [t["response_ids"] for t in want]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g["logq"], w["logq"], atol=1e-3)
