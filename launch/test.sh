#!/usr/bin/env bash
# Installs into .venv and runs the linters, the type checker and the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
setup "test"
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
.venv/bin/shellcheck launch/*.sh launch/slurm.sbatch
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
