#!/usr/bin/env bash
# The same command on every worker of a TPU pod slice, over gcloud's ssh.
#
#   TPU=my-slice ZONE=europe-west4-b PROJECT=my-project \
#     ./launch/tpu_pod.sh run --config configs/qwen3_8b_reasoning.yaml run_dir=gs://my-bucket/runs/qwen3
#
# Every worker needs the source in $SOURCE with a .venv (pip install -e '.[tpu,store]'). run_dir is on an object store, where
# each worker works in a folder of its own, or on a file system that all of them mount (Filestore). SETUP=1 first copies
# this folder to the workers and installs it, with Python 3.12 if the image has none that is new enough (that of Ubuntu
# 22.04 is 3.10).
#
# On preemption, Cloud TPU sends SIGTERM; the processes agree on a step, save and exit with 75. Call again to resume.
# Only process 0 prints; `run_dir/metrics.jsonl` can be followed from anywhere.
set -euo pipefail

: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}" "${1:?usage: TPU=... ZONE=... launch/tpu_pod.sh STAGE --config FILE ...}"
source_dir="${SOURCE:-dail_jax}"
place=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker all)

if [ "${SETUP:-0}" = 1 ]; then
  here="$(cd "$(dirname "$0")/.." && pwd)"
  packed="$(mktemp -d)/dail_jax.tgz"
  tar -C "$here" --exclude .venv --exclude .git --exclude runs -czf "$packed" .
  gcloud compute tpus tpu-vm scp "$packed" "$TPU:/tmp/dail_jax.tgz" "${place[@]}"
  gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --command \
    "mkdir -p '$source_dir' && tar -C '$source_dir' -xzf /tmp/dail_jax.tgz && cd '$source_dir' &&
     PYTHON=\$(command -v python3.13 || command -v python3.12 || command -v python3.11) ||
       { python3 -m pip install --quiet --user uv && python3 -m uv python install --quiet 3.12 &&
         PYTHON=\$(python3 -m uv python find 3.12); } &&
     export PYTHON && . launch/setup.sh && setup tpu,store"
fi

# Arguments pass through a remote shell, hence quoted once more.
printf -v arguments '%q ' "$@"

# --distributed        jax.distributed.initialize(): on a TPU VM it finds the coordinator and the worker's number by itself.
#                      Without it every worker would train alone, and orbax would not be told of preemption.
# JAX_PLATFORMS=tpu    fail if the TPU cannot be opened (another process holds it), rather than train on the host.
# PYTHONUNBUFFERED=1   log lines appear at once.
# No XLA flags: by default the compiler for TPUs already overlaps collectives with computation, and the program itself
# passes the options that a stage needs. Whatever LIBTPU_INIT_ARGS and XLA_FLAGS hold is recorded in run.json.
# exec: ssh's hang-up and the TPU's SIGTERM reach Python, not a shell in between.
exec gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --command \
  "cd '$source_dir' && export JAX_PLATFORMS=tpu PYTHONUNBUFFERED=1 && exec .venv/bin/python -m dail_jax.launch $arguments --distributed"
