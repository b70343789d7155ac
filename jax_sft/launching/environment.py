"""The environment of the trainers: variables that the launcher sets, and those the user has set.

The launcher sets only variables that are known to matter, and never overrides one that is set.
"""

from collections.abc import Mapping

SETTINGS = {
    "PYTHONUNBUFFERED": "1",  # lines appear when printed and are not lost in a crash
    "PYTHONFAULTHANDLER": "1",  # SIGABRT, SIGSEGV and others print the stacks of all threads
    "NCCL_DEBUG": "WARN",  # by default NCCL does not say why it fails
}
# gRPC, over which the processes join, would otherwise reach the coordinator through a proxy.
# https://github.com/grpc/grpc/blob/master/doc/environment_variables.md
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY = "no_grpc_proxy"
# Variables that affect a run: printed at start, and passed on to hosts reached by ssh or Ray.
PREFIXES = ("JAX_", "XLA_", "NCCL_", "CUDA_", "LIBTPU_")
_OWN = {
    *("JAX_SFT_COORDINATOR", "JAX_SFT_NUM_PROCESSES", "JAX_SFT_PROCESS_ID"),
    *("JAX_SFT_STATUS", "JAX_SFT_ATTEMPT"),
}


def settings(environ: Mapping[str, str], address: str | None) -> dict[str, str]:
    """Return the variables to add to the environment.

    Args:
        environ: the existing environment, whose variables are kept.
        address: host:port of the coordinator; None for a single process.
    """
    added = {name: value for name, value in SETTINGS.items() if name not in environ}
    if address and _NO_PROXY not in environ and any(environ.get(name) for name in _PROXIES):
        # This variable replaces no_proxy for gRPC, so keep the hosts of no_proxy in it.
        no_proxy = [part for part in environ.get("no_proxy", "").split(",") if part]
        added[_NO_PROXY] = ",".join([address.rpartition(":")[0], *no_proxy])
    return added


def given(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables set by the user that affect a run."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(PREFIXES) and name not in _OWN
    }


def describe(environ: Mapping[str, str], address: str | None) -> list[str]:
    """Return lines that list the variables set by the launcher and those that were set before."""
    lines = []
    for label, variables in (
        ("set here", settings(environ, address)),
        ("set before", given(environ)),
    ):
        if variables:
            texts = " ".join(f"{name}={value}" for name, value in variables.items())
            lines.append(f"environment {label}: {texts}")
    return lines
