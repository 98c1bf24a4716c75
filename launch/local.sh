#!/usr/bin/env bash
# N processes on this machine, through the same code path as N hosts: tries on a CPU what a pod does.
#
#   ./launch/local.sh 2 train --config configs/demo.yaml run_dir=runs/two
#
# Process 0's output is shown; the others write to $LOGS (default: a new temporary folder). Ctrl-C or SIGTERM reaches
# all of them: they agree on a step, save, and exit with 75; the same command then resumes.
set -euo pipefail
cd "$(dirname "$0")/.."

processes="${1:?usage: launch/local.sh PROCESSES STAGE --config FILE [key=value ...]}"
shift
logs="${LOGS:-$(mktemp -d)}"
port="${PORT:-$((20000 + RANDOM % 20000))}"
python="${PYTHON:-.venv/bin/python}"

# JAX_PLATFORMS: where libtpu is installed, JAX would first look for a TPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# xla_force_host_platform_device_count: fake devices per process, so that there is something to divide in a larger mesh.
export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=${DEVICES:-1}}"

pids=()
for ((i = processes - 1; i >= 0; i--)); do
  out=/dev/stdout
  [ "$i" -eq 0 ] || out="$logs/process-$i.log"
  "$python" -m dail_jax.launch "$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process-id "$i" \
    >"$out" 2>&1 &
  pids+=("$!")
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

# The exit status is that of the first process that failed. `wait` also returns on a trapped signal, hence the loop.
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" || code=$?
  done
  [ "$status" -ne 0 ] || status=$code
done
[ "$status" -eq 0 ] || [ "$status" -eq 75 ] || echo "failed with status $status; other processes' logs: $logs" >&2
exit "$status"
