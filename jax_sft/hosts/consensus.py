"""Let all processes of a run decide together about files, by texts and never over devices."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from jax_sft.hosts import cluster
from jax_sft.runtime.text import at_most

TIMEOUT_S = 600  # for a process to search a folder, or for the others to read their part


def from_first(what: str, ask: Callable[[], Any]) -> Any:
    """Call `ask` on process 0 only and return its result (JSON) on all processes.

    Raises:
        ValueError: `ask` raised a ValueError or an OSError.
    """
    reply: dict[str, Any] = {}
    if cluster.process_id() == 0:
        try:
            reply = {"found": ask()}
        except ValueError as error:
            reply = {"error": str(error)}
        except OSError as error:
            reply = {"error": f"{error.filename}: {error.strerror or error}"}
    reply = json.loads(cluster.exchange(what, json.dumps(reply), TIMEOUT_S)[0])
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["found"]


def gather(what: str, problems: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[str]:
    """Return the problems of all processes, each once; name the processes if not all have it."""
    mine = json.dumps(at_most(problems, 50))
    everyone = [json.loads(text) for text in cluster.exchange(what, mine, timeout_s)]
    processes: dict[str, list[int]] = {}  # by problem
    for process, reported in enumerate(everyone):
        for problem in reported:
            processes.setdefault(problem, []).append(process)
    return [
        problem if len(numbers) == len(everyone) else f"{problem} [{cluster.names(numbers)}]"
        for problem, numbers in processes.items()
    ]
