"""The launchers, with stand-ins on PATH for the programs of a cluster: what they are called with, signals, exit statuses."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import tiny
from ruamel.yaml import YAML

LAUNCH = tiny.ROOT / "launch"
RECORD = 'printf "%s\\0" "$(basename "$0")" "$@" "--" >>"$CALLS"\n'


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`stand_in(name, body)` puts a shell script on PATH that records its arguments; `calls()` has them by call."""
    folder, record = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(record))

    def make(name, body=""):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{RECORD}{body}")
        (folder / name).chmod(0o755)

    def calls():
        return [call.split("\0") for call in record.read_text().split("\0--\0")[:-1]]

    return make, calls


def run(script, *arguments, **environment):
    return subprocess.run(
        [LAUNCH / script, *arguments], env={**os.environ, **environment}, text=True, capture_output=True, timeout=60
    )


AWKWARD = ("run", "demo", "train.optimizer={name: adamw}", 'title=it\'s "one"')


def test_tpu_pod_runs_the_command_on_every_worker(stand_in):
    make, calls = stand_in
    make("gcloud")
    assert run("tpu_pod.sh", *AWKWARD, TPU="slice", ZONE="z", PROJECT="p").returncode == 0
    (call,) = calls()
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert call[6:13] == ["--zone", "z", "--project", "p", "--worker", "all", "--command"]
    remote = shlex.split(call[13])
    assert remote[-len(AWKWARD) - 4 :] == [".venv/bin/python", "-m", "dail_jax.launch", *AWKWARD, "--distributed"]
    failed = run("tpu_pod.sh", ZONE="z", TPU="slice")
    assert failed.returncode != 0 and "usage" in failed.stderr


def test_tpu_pod_brings_a_python_that_is_new_enough(stand_in, tmp_path):
    """The remote command, in a shell of its own: without Python 3.11 it installs one, and sets up with it."""
    make, calls = stand_in
    make("gcloud")
    assert run("tpu_pod.sh", "env", TPU="slice", ZONE="z", SETUP="1").returncode == 0
    copied, installed, started = calls()
    assert copied[4] == "scp" and started[4] == "ssh"
    remote = installed[-1].replace("/tmp/", f"{tmp_path}/")
    setup = 'setup() { echo "$PYTHON" "$@" >made; }\n'
    (tmp_path / "source" / "launch").mkdir(parents=True)
    (tmp_path / "source" / "launch" / "setup.sh").write_text(setup)
    subprocess.run(["tar", "-C", tmp_path / "source", "-czf", tmp_path / "dail_jax.tgz", "."], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("mkdir", "tar", "gzip", "basename"):
        (empty / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    (empty / "python3").write_text(f'#!/bin/bash\n{RECORD}[ "$2 $3 $4" != "uv python find" ] || echo /opt/python3.12\n')
    (empty / "python3").chmod(0o755)
    env = {"PATH": str(empty), "CALLS": str(tmp_path / "remote"), "HOME": str(tmp_path)}
    for found in ("/opt/python3.12", str(empty / "python3.11")):
        done = subprocess.run(["/bin/bash", "-c", remote], cwd=tmp_path, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done
        assert (tmp_path / "dail_jax" / "made").read_text() == f"{found} tpu,store\n"
        (empty / "python3.11").write_text("#!/bin/bash\n")  # the second time there is one
        (empty / "python3.11").chmod(0o755)
    asked = (tmp_path / "remote").read_text().replace("\0", " ")
    assert asked.count("install") == 2 and "--user uv" in asked and "python install --quiet 3.12" in asked


def test_xpk_restarts_what_was_stopped(stand_in):
    make, calls = stand_in
    make("xpk")
    settings = {"CLUSTER": "c", "TPU": "v6e-16", "IMAGE": "i", "SLICES": "2", "XPK_OPTIONS": "--dry-run --spot"}
    assert run("xpk.sh", *AWKWARD, **settings).returncode == 0
    (call,) = calls()
    options = dict(zip(call[3::2], call[4::2], strict=False))
    assert call[:3] == ["xpk", "workload", "create"] and options["--num-slices"] == "2"
    assert call[call.index("--restart-on-exit-codes") + 1] == "75" and {"--dry-run", "--spot"} <= set(call)
    assert shlex.split(call[-1])[-len(AWKWARD) - 3 :] == ["exec", "dail", *AWKWARD, "--distributed"]
    assert "--storage" not in call and "--zone" not in call


def test_the_job_set_ends_on_errors_that_are_the_users():
    spec = YAML(typ="safe").load(LAUNCH / "gke.yaml")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["parallelism"] == job["completions"] and "--distributed" in container["args"]


# What SLURM gives its tasks, and JAX looks for.
SRUN = """
for task in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=$task \\
    SLURM_STEP_TASKS_PER_NODE=2 "${@:3}" &
done
wait -n; first=$?; wait -n; second=$?; exit $((first > second ? first : second))
"""


def test_slurm_starts_tasks_that_find_each_other(stand_in, tmp_path):
    """Two tasks under a stand-in for srun; JAX finds the coordinator and the numbers in SLURM's variables."""
    make, _ = stand_in
    make("srun", SRUN)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {**tiny.environment(), "PYTHONPATH": str(tiny.ROOT), "SLURM_JOB_ID": str(os.getpid())}
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "env"],
        cwd=tmp_path,
        env={**environment, "PATH": os.environ["PATH"], "CALLS": os.environ["CALLS"]},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done
    assert " 2 " in next(line for line in done.stdout.splitlines() if "devices" in line), done.stdout


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (2, False)])
def test_slurm_requeues_what_was_stopped(stand_in, status, requeued):
    make, calls = stand_in
    make("srun", f'trap "exit {status}" TERM\necho started\nwhile true; do sleep 0.05; done\n')
    make("scontrol")
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", "train", "--config", "c.yaml"],
        env={**os.environ, "SLURM_JOB_ID": "42"},
        text=True,
        stdout=subprocess.PIPE,
    )
    assert job.stdout is not None and job.stdout.readline() == "started\n"
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert (["scontrol", "requeue", "42"] in calls()) == requeued
    assert calls()[0][-1] == "--distributed"
