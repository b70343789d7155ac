# Sourced by quickstart.sh and test.sh. make_venv FILE installs a requirements file and this clone
# (editable) into a virtual environment: folder $VENV (.venv), interpreter $PYTHON (python3).
# Another interpreter needs another folder: PYTHON=python3.13 VENV=.venv-3.13

make_venv() {
  local requirements=$1 python=${PYTHON:-python3} venv=${VENV:-.venv} constraints=constraints.txt stamp
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $("$python" --version) found, Python 3.11 to 3.13 needed: set PYTHON=/path/to/it" >&2
    exit 64
  fi
  case $requirements in *-gpu.txt | *-plan.txt) constraints=constraints-gpu.txt ;; esac
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  stamp="$venv/installed-$(cat requirements*.txt constraints*.txt pyproject.toml setup.py | cksum | cut -d' ' -f1)-$requirements"
  if [ ! -e "$stamp" ]; then
    echo "installing $requirements into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -c "$constraints" -r "$requirements" setuptools
    # Without the network, as setuptools and all dependencies are installed by now.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --no-deps --no-build-isolation -e .
    touch "$stamp"
  fi
}

# Print the newest supported interpreter that runs on this machine. PYENV_VERSION makes pyenv select
# the version.
newest_python() {
  local version
  for version in 3.13 3.12 3.11; do
    if PYENV_VERSION=$version "python$version" -c '' 2>/dev/null; then
      PYENV_VERSION=$version "python$version" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  echo "error: no python3.11 to python3.13 found" >&2
  return 64
}
