#!/usr/bin/env bash
# Runs all checks that must pass before a change lands: format, lint, types and tests.
# --all also runs the tests marked `full`: the same claims on more families, meshes and seeds.
# Other arguments go to pytest: scripts/test.sh -m slow, scripts/test.sh --all tests/data -x
# Tests run on all cores; -n 0 runs them in one process, where --pdb and -s work.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv requirements-dev.txt
export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
ruff format --check .
ruff check .
pyright
if [ "${1:-}" = --all ]; then
  shift
  set -- -m "not slow" "$@"
fi
# worksteal: a worker keeps the tests of a file, and what they share, until another one is idle.
exec python -m pytest -n auto --dist worksteal "$@"
