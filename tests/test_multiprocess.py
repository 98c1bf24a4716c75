"""Two real processes (jax.distributed, gloo) run the stages together, and give what one process gives."""

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import store as stores
import tiny

from dail_jax import config as config_lib
from dail_jax import launch, mirror, rundir, storage
from dail_jax.data.batches import Example
from dail_jax.errors import UserError
from dail_jax.train import references


def start(stage, path, *more, machines=()):
    """Two processes; on `machines`, each has the folder for its caches."""
    found = ("--coordinator", f"127.0.0.1:{tiny.free_port()}", "--processes", "2")
    own = [{mirror.SCRATCH: f"{folder}/runs", storage.CACHE: f"{folder}/cache"} for folder in machines] or [{}, {}]
    return [tiny.start(stage, path, *found, "--process-id", str(i), *more, **own[i]) for i in range(2)]


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
    """Each feeds its share of the rows. Both are preempted; losses equal one process's."""
    folder = tmp_path / "run"
    path = tiny.write(folder, traces=str(pipeline / "traces.jsonl"), train__save_every=1)
    processes = start("train", path)
    tiny.wait_for(folder / "metrics.jsonl", 2, processes[0], "train")
    processes[1].send_signal(signal.SIGTERM)  # one hears of it, both stop at the same update
    statuses, out, err = finish(processes)
    is_done = len(tiny.losses(folder)) == tiny.UPDATES
    assert statuses == ([0, 0] if is_done else [launch.STOPPED] * 2), err
    if not is_done:
        assert "train: stopped and saved at update" in out
        statuses, out, err = finish(start("train", path))
        assert statuses == [0, 0] and "train: resuming at update" in out, err
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
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
from dail_jax import launch
assert launch.main(["env", "--coordinator", sys.argv[1], "--processes", "2", "--process-id", sys.argv[2]]) == 0
import jax, numpy as np
from dail_jax import mesh as mesh_lib, rundir
from dail_jax.errors import UserError
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(1, 4, 1)  # two of each process, as a TPU slice may order them
mesh = jax.sharding.Mesh(devices, mesh_lib.AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(mesh_lib.AXES))
local, rows = mesh_lib.local_rows(mesh, 8), np.arange(8)[None] * 10
x = mesh_lib.to_devices({"x": rows[:, local]}, mesh, 8)["x"]
print(local.tolist(), all((np.asarray(s.data) == rows[s.index]).all() for s in x.addressable_shards), flush=True)
here = Path(sys.argv[3])
print(mesh_lib.first_sharers(here), mesh_lib.first_sharers(here / sys.argv[2]), flush=True)

def fail():
    raise UserError("a fault")

for work in (
    lambda: rundir.refuse_apart(here / sys.argv[2]),
    lambda: mesh_lib.from_each(lambda: jax.process_index() and fail()),
):
    try:
        work()
    except UserError as error:
        print(error, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""


def test_hosts_whose_rows_are_not_side_by_side(tmp_path):
    """Each process feeds the rows of its own devices, wherever the mesh has put them; a folder that they do not share is
    noticed, and an error of one raised in both; and SIGTERM still ends them."""
    found = tiny.pair(INTERLEAVED, str(tmp_path))
    assert [status for status, _, _ in found] == [7, 7], found
    rows, faults = ("[0, 1, 4, 5] True", "[2, 3, 6, 7] True"), ("a fault (process 1)", "a fault")
    for i, (_, out, _) in enumerate(found):
        apart = f"{tmp_path}/{i}:run_dir: {rundir.APART}"
        said = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert said[-4:] == [rows[i], "[0, 0] [0, 1]", apart, faults[i]]
    assert [path.name for path in tmp_path.rglob("*")] == ["0", "1"]


def test_errors_of_one_are_errors_of_all(tmp_path):
    """What only the first process can see ends both, in one line each."""
    path = tiny.write(tmp_path / "run", data__path=str(tiny.ASSETS / "train.jsonl"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    statuses, _, err = finish(start("generate", path))
    assert (
        statuses[0] == 2 and statuses[1] != 0 and f"error: {tmp_path}/run/run.json: got a file that is not JSON" in err
    )


def test_hosts_that_share_nothing_but_a_store(tmp_path, pipeline, monkeypatch):
    """One is lost for good while they train. The run goes on with another; meanwhile, a second run is refused."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    path, there = tiny.write(tmp_path / "run", train__save_every=1), "run_dir=s3://bucket/runs/two"
    with stores.running(tmp_path / "cache") as server:

        def wait(processes, key, is_there):
            deadline = time.monotonic() + 240
            while not (server.keys(f"runs/two/{key}") and is_there(server.send("GET", f"runs/two/{key}"))):
                assert processes[0].poll() is None and time.monotonic() < deadline, tiny.finish(processes[0])
                time.sleep(0.02)

        processes = start("run", path, there, machines=(first, second))
        with ended(processes):
            wait(processes, "checkpoints/manifests/1.json", bool)
            processes[1].kill()
            status, _, err = tiny.finish(processes[0])  # by itself
        assert status not in (0, 2, launch.STOPPED) and (status != 1 or "error: another process has ended" in err), err

        processes = start("run", path, there, machines=(first, third))
        wait(processes, mirror.OWNER, lambda data: not json.loads(data)["released"])
        monkeypatch.setenv(mirror.SCRATCH, str(tmp_path / "fourth"))
        with pytest.raises(UserError, match="in use by process"), mirror.opened(config_lib.load(path, [there])):
            pass
        statuses, out, err = finish(processes)
        assert statuses == [0, 0], err
        assert "train: resuming at update" in out and "generate: already done" in out
        folder, other = (next((one / "runs").glob("*/two")) for one in (first, third))
        kept = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
        sent = {name: server.send("GET", f"runs/two/{name}") for name in kept if name.name != "metrics.jsonl"}
    assert all((folder / name).read_bytes() == data for name, data in sent.items())
    theirs = {name.parts[0] for name in kept if (other / name).is_file()}
    assert {"traces.jsonl", "references", "checkpoints", "adapter", "samples.jsonl"} <= theirs
    traces, wanted = (tiny.lines(run / "traces.jsonl") for run in (folder, pipeline))
    assert [t["response_ids"] for t in traces] == [t["response_ids"] for t in wanted]
    for got, want in zip(traces, wanted, strict=True):
        np.testing.assert_allclose(got["logq"], want["logq"], atol=1e-3)
    np.testing.assert_allclose(tiny.losses(folder), tiny.losses(pipeline), rtol=1e-5)
    same_references(folder, pipeline)
    samples, wanted = (tiny.lines(run / "samples.jsonl") for run in (folder, pipeline))
    pairs = list(zip(samples, wanted, strict=True))
    assert all(a[key] == b[key] for a, b in pairs for key in ("benchmark", "problem_id", "sample", "gold"))
    assert sum(a["text"] == b["text"] for a, b in pairs) > 0.8 * len(pairs)  # of adapters that agree to rounding
