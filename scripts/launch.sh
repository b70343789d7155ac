#!/usr/bin/env bash
# Starts a training on this machine, as one process or several that work together.
#
#   scripts/launch.sh [--nproc=N] --config=configs/tiny.py [options of jax_sft.train]
#
# --nproc=N   processes to start (default 1: one process drives all local GPUs)
# Output lines carry the number of their process. When one process fails, the others are stopped
# and its exit code is returned. PYTHON names the interpreter (default: .venv's, else python3).
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # paths stay relative to the caller's folder

usage() { sed -n '2,9s/^# \{0,1\}//p' "$root/scripts/launch.sh"; }

nproc=1
options=()
for option in "$@"; do
  case $option in
    --nproc=*) nproc=${option#--nproc=} ;;
    --help | -h) usage; exit 0 ;;
    *) options+=("$option") ;;
  esac
done
if ! [[ $nproc =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --nproc=$nproc is not a positive number" >&2
  exit 64
fi
if [ ${#options[@]} = 0 ]; then usage >&2; exit 64; fi

python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python

if [ "$nproc" = 1 ]; then
  exec "$python" -m jax_sft.train "${options[@]}"
fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export JAX_SFT_COORDINATOR=127.0.0.1:$port JAX_SFT_NUM_PROCESSES=$nproc
pids=()
for ((id = 0; id < nproc; id++)); do
  # Process substitution, not a pipe, so that $! is the trainer and its exit code is kept.
  JAX_SFT_PROCESS_ID=$id PYTHONUNBUFFERED=1 "$python" -m jax_sft.train "${options[@]}" \
    > >(sed -u "s/^/[$id] /") 2> >(sed -u "s/^/[$id] /" >&2) &
  pids+=($!)
done
stop() { kill -TERM "${pids[@]}" 2>/dev/null; }
trap stop INT TERM

code=0
failed_at=0
while [ ${#pids[@]} -gt 0 ]; do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}"
    this=$?
    unset 'pids[i]'
    if [ $this != 0 ] && [ $code = 0 ]; then
      code=$this failed_at=$SECONDS
      stop
    fi
  done
  # A process stuck in a collective does not hear TERM.
  [ $code = 0 ] || [ $((SECONDS - failed_at)) -lt 20 ] || kill -KILL "${pids[@]}" 2>/dev/null
  sleep 0.2
done
exit $code
