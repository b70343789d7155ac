#!/usr/bin/env bash
# Installs jax_sft into .venv and proves that it trains: see scripts/quickstart.py.
# Needs Python 3.11 to 3.13 with pip. PYTHON=/path/to/python selects another one than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv requirements.txt
# The simulated devices are CPUs, even on a machine with a GPU.
JAX_PLATFORMS=cpu exec "${VENV:-.venv}/bin/python" -m scripts.quickstart
