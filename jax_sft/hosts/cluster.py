"""The processes of a run: how they meet, and short texts between them.

Texts travel over JAX's coordination service, never over devices: they arrive while a collective
hangs, and before processes that disagree about their devices run anything together.
"""

import collections
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import jax
from jax._src import distributed  # its key-value store has no public name

from jax_sft.runtime import exit_codes

VARIABLES = ("JAX_SFT_COORDINATOR", "JAX_SFT_NUM_PROCESSES", "JAX_SFT_PROCESS_ID")
JOIN_TIMEOUT_S = 300  # for all processes to come
# After this JAX itself ends the processes of a run in which one no longer answers. It goes by the
# wall clock: a clock set forward by more ends all processes. So it is kept out of the way where the
# watchdog, which is faster and names the process, looks on.
HEARTBEAT_TIMEOUT_S = 100
WATCHED_HEARTBEAT_TIMEOUT_S = 10 * 24 * 3600
PORT_TIMEOUT_S = 30  # for the process before us to free the coordinator's port
GOODBYE_S = 3.0
_PREFIX = "jax_sft/"
_TICKS_S = (0.01, 0.5)  # between looks for the others' texts: the first, and the longest


class Lost(RuntimeError):
    """Some process did not come: it died, it hangs, or nothing reaches it."""

    exit_code = exit_codes.LOST


class Stopped(RuntimeError):
    """Another process has told why it ends; all end with its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def initialize(watched: bool = False) -> None:
    """Join the other processes of a launched run, if the launcher started several.

    `scripts/launch.sh` sets JAX_SFT_COORDINATOR (host:port), JAX_SFT_NUM_PROCESSES,
    JAX_SFT_PROCESS_ID and, where several processes share the GPUs of a host,
    JAX_SFT_LOCAL_DEVICE_IDS. They are passed on explicitly: automatic detection can give a process
    one of its eight GPUs without a word.

    Args:
        watched: a watchdog with a timeout looks for processes that no longer answer.

    Raises:
        ValueError: only some of the variables are set, or one makes no sense.
        Lost: the coordinator's port is taken.
    """
    values = [os.environ.get(name) for name in VARIABLES]
    if not any(values) or jax.distributed.is_initialized():
        return
    if not all(values):
        missing = [name for name, value in zip(VARIABLES, values, strict=True) if not value]
        raise ValueError(f"{missing} not set: start processes with scripts/launch.sh")
    coordinator, count, process = values[0] or "", _number(VARIABLES[1]), _number(VARIABLES[2])
    if not process < count:
        raise ValueError(f"JAX_SFT_PROCESS_ID = {process} is not below their number, {count}")
    ids = os.environ.get("JAX_SFT_LOCAL_DEVICE_IDS", "")
    listens_at = bind_address(coordinator)
    if process == 0:
        _wait_for_port(listens_at)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM away from us, and knows no other signal.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=coordinator,
        coordinator_bind_address=listens_at,
        num_processes=count,
        process_id=process,
        local_device_ids=[int(number) for number in ids.split(",")] if ids else None,
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN_TIMEOUT_S,
        heartbeat_timeout_seconds=(WATCHED_HEARTBEAT_TIMEOUT_S if watched else HEARTBEAT_TIMEOUT_S),
        shutdown_timeout_seconds=60,
    )


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise ValueError(f"{variable} = {text!r} is not a number")
    return int(text)


def bind_address(coordinator: str) -> str:
    """Return the host:port at which process 0 listens: the one address that the others use.

    Whoever reaches the port can stop the run, so it is not open on all interfaces, which is JAX's
    default. It is where the host's name does not lead to exactly one address of this host: an
    alias, several addresses, a container, or a name that only this host maps to its loopback
    (Debian's 127.0.1.1). JAX_COORDINATOR_BIND_ADDRESS overrides the choice.

    Raises:
        ValueError: not host:port.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"JAX_SFT_COORDINATOR = {coordinator!r} is not host:port")
    if given := os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return given
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:  # JAX reports it when the others cannot reach the host
        found = set()
    address = str(found.pop()) if len(found) == 1 else ""
    if host == "localhost":
        address = "127.0.0.1"
    elif not _is_ours(address) or (address.startswith("127.") and address != host):
        return f"[::]:{port}"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _is_ours(address: str) -> bool:
    """Whether an address belongs to an interface of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return bool(address)


def _wait_for_port(listens_at: str) -> None:
    """Wait until the coordinator's port can be bound: JAX crashes on one that is taken."""
    host, _, port = listens_at.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    # All interfaces are probed by IPv4, which a host without IPv6 has too.
    host = "" if host == "::" else host
    began = time.monotonic()
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
                return
            except OSError as error:
                if time.monotonic() - began > PORT_TIMEOUT_S:
                    raise Lost(
                        f"port {port} of this host is taken ({error}): end what uses it, or "
                        "choose another with --port"
                    ) from error
        time.sleep(0.5)


def num_processes() -> int:
    """Return the number of processes, without asking for devices."""
    return distributed.global_state.num_processes or 1


def process_id() -> int:
    """Return the number of this process, without asking for devices."""
    return distributed.global_state.process_id or 0


@functools.cache
def hosts() -> tuple[str, ...]:
    """Return the host name of each process; every process asks at the same point."""
    return tuple(exchange("hosts", socket.gethostname()))


def name(process: int) -> str:
    """Return how a process is called in messages, after `hosts` was asked for once."""
    known = hosts() if hosts.cache_info().currsize else ()
    return f"process {process} (host {known[process]})" if known else f"process {process}"


def names(processes: Sequence[int]) -> str:
    """Return how several processes are called in messages."""
    return ", ".join(name(process) for process in processes)


def publish(key: str, text: str) -> None:
    """Let every process read `text` under `key`; a later text replaces it."""
    if num_processes() == 1:
        _own[key] = text
    else:
        _client().key_value_set(_PREFIX + key, text, allow_overwrite=True)


def read(key: str) -> str | None:
    """Return what was published under `key`, or None."""
    if num_processes() == 1:
        return _own.get(key)
    try:
        return _client().key_value_try_get(_PREFIX + key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def read_all(folder: str) -> dict[str, str]:
    """Return {key: text} of all that was published under `folder/`."""
    if num_processes() == 1:
        return {k: v for k, v in _own.items() if k.startswith(folder + "/")}
    found = _client().key_value_dir_get(_PREFIX + folder)
    return {key.removeprefix(_PREFIX): text for key, text in found}


def exchange(what: str, text: str, timeout_s: float = 60) -> list[str]:
    """Return the texts of all processes, by their number; each calls it with its own.

    Every process has to call it in the same order per `what`. Threads may use it at the same time
    with different `what`.

    Raises:
        Lost: some processes did not call it in time; they are named.
        Stopped: another process has said why it ends.
    """
    count, ours = num_processes(), process_id()
    if count == 1:
        return [text]
    turn = _turns[what]
    _turns[what] += 1
    folder = f"exchange/{what}/{turn}"
    publish(f"{folder}/{ours}", text)
    deadline, tick = time.monotonic() + timeout_s, _TICKS_S[0]
    wanted = [f"{folder}/{n}" for n in range(count)]
    while missing := [n for n in range(count) if wanted[n] not in (found := read_all(folder))]:
        check_others()
        if time.monotonic() > deadline:
            raise Lost(f"{names(missing)} did not come within {timeout_s:.0f} s to compare {what}")
        time.sleep(tick)
        tick = min(1.5 * tick, _TICKS_S[1])
    if turn >= 2:  # whoever came to this turn has read the one before the last
        _client().key_value_delete(f"{_PREFIX}exchange/{what}/{turn - 2}/{ours}")
    return [found[key] for key in wanted]


def check_same(
    what: str, facts: Mapping[str, str], remedy: str = "", timeout_s: float = 60
) -> None:
    """Compare facts that must be equal on all processes.

    Raises:
        ValueError: they differ; what differs is listed, with the processes that are in the
            minority (of two, the second).
    """
    lines = [f"{key}={value}" for key, value in sorted(facts.items())]
    everyone = [text.split("\n") for text in exchange(f"check {what}", "\n".join(lines), timeout_s)]
    problems = []
    for index, line in enumerate(lines):
        theirs = [texts[index] if index < len(texts) else "(missing)" for texts in everyone]
        counts = collections.Counter(theirs)
        if len(counts) > 1:
            usual = max(counts, key=lambda value: (counts[value], -theirs.index(value)))
            key = line.partition("=")[0]
            odd = [n for n, value in enumerate(theirs) if value != usual]
            values = sorted({theirs[n].partition("=")[2] for n in odd})
            problems.append(
                f"{key} of {names(odd)} is {', '.join(values)}, of the others "
                f"{usual.partition('=')[2]}"
            )
    if problems:
        raise ValueError(f"the processes differ in {what}: {'; '.join(problems)}. {remedy}".strip())


def say_goodbye(message: str, exit_code: int) -> None:
    """Tell the other processes why this one ends, so that they end with the same exit code.

    It takes at most 2 GOODBYE_S, also where the coordinator hangs. Process 0 stays that long for
    the others to read it.
    """
    if num_processes() == 1:
        return
    arguments = (f"goodbye/{process_id()}", f"{exit_code} {message}")
    telling = threading.Thread(target=_try_to_publish, args=arguments, daemon=True)
    telling.start()
    telling.join(timeout=GOODBYE_S)
    if process_id() == 0:
        time.sleep(GOODBYE_S)


def _try_to_publish(key: str, text: str) -> None:
    try:
        publish(key, text)
    except jax.errors.JaxRuntimeError as error:
        print(f"the other processes could not be told: {error}", file=sys.stderr, flush=True)


def check_others() -> None:
    """Find out whether another process has said why it ends.

    Raises:
        Stopped: it has.
    """
    if num_processes() == 1:
        return
    for key, text in sorted(read_all("goodbye").items()):
        process = int(key.rpartition("/")[2])
        if process != process_id():
            code, _, message = text.partition(" ")
            raise Stopped(f"{name(process)} stopped: {message}", int(code))


def _client():
    client = distributed.global_state.client
    assert client is not None, "cluster.initialize comes first"
    return client


_own: dict[str, str] = {}  # of a process that is alone
_turns: collections.Counter[str] = collections.Counter()
