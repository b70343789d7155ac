# Sourced by quickstart.sh and test.sh: make_venv FILE installs a requirements file and this clone,
# editable, into .venv.

make_venv() {
  local requirements=$1 python=${PYTHON:-python3} constraints=constraints.txt stamp
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $("$python" --version) found, Python 3.11 to 3.13 needed: set PYTHON=/path/to/it" >&2
    exit 64
  fi
  case $requirements in *-gpu.txt | *-plan.txt) constraints=constraints-gpu.txt ;; esac
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  stamp=".venv/installed-$(cat requirements*.txt constraints*.txt pyproject.toml setup.py | cksum | cut -d' ' -f1)-$requirements"
  if [ ! -e "$stamp" ]; then
    echo "installing $requirements into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      -c "$constraints" -r "$requirements" setuptools
    # Without the network: setuptools is there, and so are all dependencies.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      --no-deps --no-build-isolation -e .
    touch "$stamp"
  fi
}
