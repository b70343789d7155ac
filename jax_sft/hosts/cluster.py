"""Join the processes of a run and exchange short texts between them.

Texts travel over JAX's coordination service, never over devices. They therefore arrive while a
collective hangs, and before processes that disagree about their devices run anything together.
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
JOIN_TIMEOUT_S = 300  # for all processes to join
# If a process does not answer for this long, JAX itself ends the processes of the run. JAX measures
# by the wall clock, so setting a clock forward by more also ends all processes. With a watchdog,
# which is faster and names the process, JAX's timeout is set so high that it never fires.
HEARTBEAT_TIMEOUT_S = 100
WATCHED_HEARTBEAT_TIMEOUT_S = 10 * 24 * 3600
PORT_TIMEOUT_S = 30  # for the previous process to free the coordinator's port
GOODBYE_S = 3.0  # for a goodbye message to be published, and for the others to read it
_PREFIX = "jax_sft/"
_TICKS_S = (0.01, 0.5)  # first and longest pause between polls for the texts of other processes


class Lost(RuntimeError):
    """A process did not respond: it died, hangs or cannot be reached."""

    exit_code = exit_codes.LOST


class Stopped(RuntimeError):
    """Another process reported why it ends; all processes end with its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def initialize(watched: bool = False) -> None:
    """Join the other processes of a launched run, if the launcher started several.

    `scripts/launch.sh` sets JAX_SFT_COORDINATOR (host:port), JAX_SFT_NUM_PROCESSES,
    JAX_SFT_PROCESS_ID and, where several processes share the GPUs of a host,
    JAX_SFT_LOCAL_DEVICE_IDS. They are passed to JAX explicitly, because its automatic detection can
    silently give a process only one of its eight GPUs.

    Args:
        watched: whether a watchdog with a timeout looks for processes that no longer answer.

    Raises:
        ValueError: only some of the variables are set, or a value is invalid.
        Lost: the coordinator's port is in use.
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
    # JAX's preemption service would take over SIGTERM, and handles no other signal.
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
    """Return the host:port at which process 0 listens: only the address that the others use.

    Anyone who can reach the port can stop the run, so it is not opened on all interfaces, which is
    JAX's default. It is opened on all interfaces only if the host's name does not resolve to
    exactly one address of this host: an alias, several addresses, a container, or a name that only
    this host maps to its loopback (Debian's 127.0.1.1). JAX_COORDINATOR_BIND_ADDRESS overrides the
    choice.

    Raises:
        ValueError: `coordinator` is not host:port.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"JAX_SFT_COORDINATOR = {coordinator!r} is not host:port")
    if override := os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return override
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:  # JAX reports the error when the other processes cannot reach the host
        addresses = set()
    address = str(addresses.pop()) if len(addresses) == 1 else ""
    if host == "localhost":
        address = "127.0.0.1"
    elif not _is_local(address) or (address.startswith("127.") and address != host):
        return f"[::]:{port}"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _is_local(address: str) -> bool:
    """Return whether an address belongs to an interface of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return bool(address)


def _wait_for_port(listens_at: str) -> None:
    """Wait until the coordinator's port can be bound; JAX crashes if it is in use."""
    host, _, port = listens_at.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    # Probe all interfaces over IPv4, which also works on a host without IPv6.
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
    """Return the number of processes, without initializing devices."""
    return distributed.global_state.num_processes or 1


def process_id() -> int:
    """Return the number of this process, without initializing devices."""
    return distributed.global_state.process_id or 0


@functools.cache
def hosts() -> tuple[str, ...]:
    """Return the host name of each process. Every process must call it at the same point."""
    return tuple(exchange("hosts", socket.gethostname()))


def name(process: int) -> str:
    """Return the name of a process in messages; it includes the host once `hosts` was called."""
    host_names = hosts() if hosts.cache_info().currsize else ()
    return f"process {process} (host {host_names[process]})" if host_names else f"process {process}"


def names(processes: Sequence[int]) -> str:
    """Return the names of several processes in messages."""
    return ", ".join(name(process) for process in processes)


def publish(key: str, text: str) -> None:
    """Publish `text` under `key` to every process; a later text replaces it."""
    if num_processes() == 1:
        _own[key] = text
    else:
        _client().key_value_set(_PREFIX + key, text, allow_overwrite=True)


def read(key: str) -> str | None:
    """Return the text published under `key`, or None."""
    if num_processes() == 1:
        return _own.get(key)
    try:
        return _client().key_value_try_get(_PREFIX + key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def read_all(folder: str) -> dict[str, str]:
    """Return {key: text} of all texts published under `folder/`."""
    if num_processes() == 1:
        return {k: v for k, v in _own.items() if k.startswith(folder + "/")}
    items = _client().key_value_dir_get(_PREFIX + folder)
    return {key.removeprefix(_PREFIX): text for key, text in items}


def exchange(what: str, text: str, timeout_s: float = 60) -> list[str]:
    """Return the texts of all processes in order of process number; each passes its own text.

    Every process must make the calls with the same `what` in the same order. Threads may call it
    concurrently with different `what`.

    Raises:
        Lost: some processes did not call it in time; the message names them.
        Stopped: another process reported why it ends.
    """
    count, process = num_processes(), process_id()
    if count == 1:
        return [text]
    turn = _turns[what]
    _turns[what] += 1
    folder = f"exchange/{what}/{turn}"
    publish(f"{folder}/{process}", text)
    deadline, tick = time.monotonic() + timeout_s, _TICKS_S[0]
    keys = [f"{folder}/{n}" for n in range(count)]
    while missing := [n for n in range(count) if keys[n] not in (texts := read_all(folder))]:
        check_others()
        if time.monotonic() > deadline:
            raise Lost(f"{names(missing)} did not come within {timeout_s:.0f} s to compare {what}")
        time.sleep(tick)
        tick = min(1.5 * tick, _TICKS_S[1])
    # A process that has reached this turn has read all texts of the turn before the last.
    if turn >= 2:
        _client().key_value_delete(f"{_PREFIX}exchange/{what}/{turn - 2}/{process}")
    return [texts[key] for key in keys]


def check_same(
    what: str, facts: Mapping[str, str], remedy: str = "", timeout_s: float = 60
) -> None:
    """Compare facts that must be equal on all processes.

    Raises:
        ValueError: facts differ. The message lists each of them with the processes in the minority
            (the second of two processes).
    """
    lines = [f"{key}={value}" for key, value in sorted(facts.items())]
    everyone = [text.split("\n") for text in exchange(f"check {what}", "\n".join(lines), timeout_s)]
    problems = []
    for index, line in enumerate(lines):
        values = [texts[index] if index < len(texts) else "(missing)" for texts in everyone]
        counts = collections.Counter(values)
        if len(counts) > 1:
            usual = max(counts, key=lambda value: (counts[value], -values.index(value)))
            key = line.partition("=")[0]
            odd = [n for n, value in enumerate(values) if value != usual]
            odd_values = sorted({values[n].partition("=")[2] for n in odd})
            problems.append(
                f"{key} of {names(odd)} is {', '.join(odd_values)}, of the others "
                f"{usual.partition('=')[2]}"
            )
    if problems:
        raise ValueError(f"the processes differ in {what}: {'; '.join(problems)}. {remedy}".strip())


def say_goodbye(message: str, exit_code: int) -> None:
    """Report to the other processes why this one ends, so that they end with the same exit code.

    It takes at most 2 GOODBYE_S, even if the coordinator hangs. Process 0 always waits GOODBYE_S
    for the others to read the message.
    """
    if num_processes() == 1:
        return
    arguments = (f"goodbye/{process_id()}", f"{exit_code} {message}")
    publisher = threading.Thread(target=_try_to_publish, args=arguments, daemon=True)
    publisher.start()
    publisher.join(timeout=GOODBYE_S)
    if process_id() == 0:
        time.sleep(GOODBYE_S)


def _try_to_publish(key: str, text: str) -> None:
    try:
        publish(key, text)
    except jax.errors.JaxRuntimeError as error:
        print(f"the other processes could not be notified: {error}", file=sys.stderr, flush=True)


def check_others() -> None:
    """Check whether another process has reported why it ends.

    Raises:
        Stopped: another process has.
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


_own: dict[str, str] = {}  # texts published by a process that is alone
_turns: collections.Counter[str] = collections.Counter()
