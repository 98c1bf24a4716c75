#!/usr/bin/env bash
# The whole pipeline on the embedded micro-world: installs into .venv and runs configs/demo.yaml.
# Overrides are passed on: ./launch/demo.sh train.gamma=0.3 run_dir=runs/gamma03
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
setup ""
# The demo is for a CPU; where libtpu is installed JAX would first look for a TPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/python -m dail_jax.launch run --config configs/demo.yaml "$@"
