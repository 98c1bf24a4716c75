#!/usr/bin/env bash
# One or more TPU slices on GKE through XPK, which writes the JobSet itself (launch/gke.yaml is the same by hand).
#
#   CLUSTER=my-cluster ZONE=us-east5-b PROJECT=my-project TPU=v6e-16 IMAGE=my-registry/dail \
#     ./launch/xpk.sh run qwen3_8b_reasoning run_dir=gs://my-bucket/runs/qwen3 model.path=gs://my-bucket/models/qwen3_8b
#
# IMAGE: docker build -f launch/Dockerfile --target tpu -t IMAGE . and push it. run_dir may also lie on an XPK storage
# (`xpk storage list`) that all workers mount and that supports renames, such as Filestore; STORAGE names it.
# SLICES=2 for two slices, with mesh.data over them. NAME is the workload's (default: dail). Further options of xpk go into
# XPK_OPTIONS, such as --dry-run.
#
# On preemption the processes agree on a step, save within the grace period and exit with 75, at which XPK starts the slice
# again; an error that is yours (exit status 2) ends the workload at once.
set -euo pipefail

: "${CLUSTER:?the GKE cluster}" "${TPU:?the TPU type, such as v6e-16}" "${IMAGE:?the image}" "${1:?usage: CLUSTER=... launch/xpk.sh STAGE ...}"

# XPK hands the command to a shell, hence quoted once more; exec, so that SIGTERM reaches Python.
printf -v arguments '%q ' "$@"
read -ra more <<<"${XPK_OPTIONS:-}"
exec xpk workload create --cluster "$CLUSTER" --workload "${NAME:-dail}" --tpu-type "$TPU" --num-slices "${SLICES:-1}" \
  ${PROJECT:+--project "$PROJECT"} ${ZONE:+--zone "$ZONE"} ${STORAGE:+--storage "$STORAGE"} --docker-image "$IMAGE" \
  --max-restarts 10 --restart-on-exit-codes 75 --termination-grace-period-seconds 300 \
  ${more[@]+"${more[@]}"} \
  --command "export JAX_PLATFORMS=tpu PYTHONUNBUFFERED=1; exec dail ${arguments}--distributed"
