#!/usr/bin/env bash
# Starts a training on one or many hosts, and starts it again when a process is lost.
#
#   scripts/launch.sh [--nproc=N] --config=configs/tiny.py [options of jax_sft.train]
#
# --help lists the launcher's options: jax_sft/launch.py. PYTHON names the interpreter (default:
# that of .venv, else python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # paths stay relative to the caller's folder
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
# What was typed, for the line that resumes a run that was told to stop.
export JAX_SFT_TYPED="${JAX_SFT_TYPED:-$(printf "%q " "$0" "$@")}"
exec "$python" -m jax_sft.launch "$@"
