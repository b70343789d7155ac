"""Programs that a test starts."""

import os

DEVICES = "--xla_force_host_platform_device_count"


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a program that has one device until its config says otherwise,
    and compiles as quickly as the tests.
    """
    flags = os.environ["XLA_FLAGS"].split()
    few = " ".join(flag for flag in flags if not flag.startswith(DEVICES))
    return os.environ | {"XLA_FLAGS": few} | more
