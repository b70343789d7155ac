"""What all processes of a run decide together about files: by texts, never over devices."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from jax_sft.hosts import cluster
from jax_sft.runtime.text import at_most

TIMEOUT_S = 600  # for one process to look through a folder, or for the others to read their part


def from_first(what: str, ask: Callable[[], Any]) -> Any:
    """Return on all processes what `ask` returns on the first (JSON), where alone it is called.

    Raises:
        ValueError: it raised a ValueError or an OSError there.
    """
    told: dict[str, Any] = {}
    if cluster.process_id() == 0:
        try:
            told = {"found": ask()}
        except ValueError as error:
            told = {"error": str(error)}
        except OSError as error:
            told = {"error": f"{error.filename}: {error.strerror or error}"}
    told = json.loads(cluster.exchange(what, json.dumps(told), TIMEOUT_S)[0])
    if "error" in told:
        raise ValueError(told["error"])
    return told["found"]


def gather(what: str, problems: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[str]:
    """Return the problems of all processes, each once; it names who has it where not all do."""
    mine = json.dumps(at_most(problems, 50))
    everyone = [json.loads(text) for text in cluster.exchange(what, mine, timeout_s)]
    who: dict[str, list[int]] = {}
    for process, theirs in enumerate(everyone):
        for problem in theirs:
            who.setdefault(problem, []).append(process)
    return [
        problem if len(which) == len(everyone) else f"{problem} [{cluster.names(which)}]"
        for problem, which in who.items()
    ]
