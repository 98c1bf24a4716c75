# shellcheck shell=bash
# Sourced by demo.sh and test.sh: makes .venv with Python 3.11 or newer and installs the project into it.
# Usage: setup EXTRAS   ("" or e.g. "test"). Does nothing if the installation is up to date.
setup() {
  local extras="$1" python="" candidate stamp
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "error: want Python 3.11 or newer (set PYTHON to its path)" >&2
    return 2
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  stamp="$(cat pyproject.toml launch/constraints.txt | cksum) ${extras}"
  if [ ! -f .venv/installed ] || ! grep -qxF "$stamp" .venv/installed; then
    echo "installing into .venv (once; a minute or two)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".${extras:+[$extras]}"
    echo "$stamp" >>.venv/installed
  fi
}
