"""The environment of the trainers: what we set, why, and what the user has set.

Only what is known to matter, and never over what is set already.
"""

from collections.abc import Mapping

SETTINGS = {
    "PYTHONUNBUFFERED": "1",  # a line is seen when it is printed, and not lost in a crash
    "PYTHONFAULTHANDLER": "1",  # SIGABRT, SIGSEGV and others print the stacks of all threads
    "NCCL_DEBUG": "WARN",  # by default NCCL does not say why it fails
}
# gRPC, over which the processes meet, would ask a proxy for the way to the coordinator.
# https://github.com/grpc/grpc/blob/master/doc/environment_variables.md
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY = "no_grpc_proxy"
# Variables that decide about a run: shown at start, and handed to hosts that are reached by ssh.
PREFIXES = ("JAX_", "XLA_", "NCCL_", "CUDA_", "LIBTPU_")
_OURS = {
    *("JAX_SFT_COORDINATOR", "JAX_SFT_NUM_PROCESSES", "JAX_SFT_PROCESS_ID"),
    *("JAX_SFT_STATUS", "JAX_SFT_ATTEMPT"),
}


def settings(environ: Mapping[str, str], address: str | None) -> dict[str, str]:
    """Return the variables to add.

    Args:
        environ: what is set already, and stays.
        address: host:port of the coordinator, if there are several processes.
    """
    added = {name: value for name, value in SETTINGS.items() if name not in environ}
    if address and _NO_PROXY not in environ and any(environ.get(name) for name in _PROXIES):
        known = [part for part in environ.get("no_proxy", "").split(",") if part]
        added[_NO_PROXY] = ",".join([address.rpartition(":")[0], *known])
    return added


def given(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the user that decide about a run."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(PREFIXES) and name not in _OURS
    }


def describe(environ: Mapping[str, str], address: str | None) -> list[str]:
    """Return lines that say what is set by us, and what was set before."""
    lines = []
    for what, variables in (
        ("set here", settings(environ, address)),
        ("set before", given(environ)),
    ):
        if variables:
            texts = " ".join(f"{name}={value}" for name, value in variables.items())
            lines.append(f"environment {what}: {texts}")
    return lines
