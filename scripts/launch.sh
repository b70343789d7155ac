#!/usr/bin/env bash
# Starts a training run on one or many hosts, and restarts it when a process is lost.
#
#   scripts/launch.sh [--nproc=N] --config=configs/tiny.py [options of jax_sft.train]
#
# --help lists the launcher's options (jax_sft/launch.py). PYTHON sets the interpreter; the default
# is that of .venv, or else python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # paths stay relative to the caller's folder
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
# The command as typed, for the message that says how to resume a stopped run.
export JAX_SFT_TYPED="${JAX_SFT_TYPED:-$(printf "%q " "$0" "$@")}"
exec "$python" -m jax_sft.launch "$@"
