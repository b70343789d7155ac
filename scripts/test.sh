#!/usr/bin/env bash
# Formats, lints, type-checks and tests: what must pass before a change lands.
# Extra arguments go to pytest: scripts/test.sh -m slow, scripts/test.sh tests/test_chat.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv requirements-dev.txt
export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
ruff format --check .
ruff check .
pyright
exec python -m pytest "$@"
