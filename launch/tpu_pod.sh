#!/usr/bin/env bash
# The same command on every worker of a TPU pod slice, over gcloud's ssh.
#
#   TPU=my-slice ZONE=europe-west4-b PROJECT=my-project \
#     ./launch/tpu_pod.sh run --config configs/qwen3_8b_reasoning.yaml run_dir=/mnt/shared/runs/qwen3
#
# Wants on every worker: the source in $SOURCE with .venv made (pip install -e '.[tpu]'), and one file system mounted
# at the same path for run_dir (Filestore, or a bucket through a mount that supports renames): process 0 writes
# there, and all read from it. SETUP=1 first copies this folder to the workers and installs it.
#
# Preemption: Cloud TPU sends SIGTERM; the processes agree on a step, save and exit with 0. Call again to go on.
# Output: process 0 alone talks; `run_dir/metrics.jsonl` can be followed from anywhere.
set -euo pipefail

: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}" "${1:?usage: TPU=... ZONE=... launch/tpu_pod.sh STAGE --config FILE ...}"
source_dir="${SOURCE:-dail_jax}"
place=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker all)

if [ "${SETUP:-0}" = 1 ]; then
  here="$(cd "$(dirname "$0")/.." && pwd)"
  tar -C "$here" --exclude .venv --exclude .git --exclude runs -czf /tmp/dail_jax.tgz .
  gcloud compute tpus tpu-vm scp /tmp/dail_jax.tgz "$TPU:/tmp/dail_jax.tgz" "${place[@]}"
  gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --command \
    "mkdir -p '$source_dir' && tar -C '$source_dir' -xzf /tmp/dail_jax.tgz && cd '$source_dir' &&
     python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]' -c launch/constraints.txt"
fi

# Arguments travel through a remote shell: quoted once more.
printf -v arguments '%q ' "$@"

# --distributed        jax.distributed.initialize(): on a TPU VM it finds the coordinator and the worker's number itself,
#                      and without it every worker would train alone, and orbax would not hear of preemption.
# JAX_PLATFORMS=tpu    fail where the TPU cannot be opened (another process holds it), and do not train on the host.
# PYTHONUNBUFFERED=1   lines arrive when they are said.
# No XLA flags: the compiler's defaults for TPUs overlap collectives with compute already, and what one stage
# needs besides, the program asks for itself. What is set in LIBTPU_INIT_ARGS or XLA_FLAGS is recorded in run.json.
# exec: ssh's hang-up and the TPU's SIGTERM reach Python, not a shell in between.
exec gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --command \
  "cd '$source_dir' && export JAX_PLATFORMS=tpu PYTHONUNBUFFERED=1 && exec .venv/bin/python -m dail_jax.launch $arguments --distributed"
