"""Match untrusted regular expressions within hard bounds of time and memory.

The patterns come from a config (`train.freeze`, `lora.targets`) or an adapter folder. Python's `re`
can take exponential time to match and any amount of memory to compile. Patterns that can do neither
are matched in this process. For the others, this file runs as a program with resource limits.
"""

import contextlib
import functools
import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 5  # of CPU time for all patterns of a call
PATIENCE = 20  # seconds of wall time, longer because the machine may be busy
MEMORY = 1 << 30  # bytes of address space
LONGEST = 10_000  # characters of a pattern
# A pattern without these has no quantifiers and no groups: its time is at most pattern x name.
_COSTLY = frozenset("*+?{()|")


def matches(
    key: str, patterns: Sequence[str], names: Sequence[str], method: str
) -> list[list[bool]]:
    """Match every pattern with every name, exactly as Python's `re` does.

    Args:
        key: source of the patterns for messages.
        method: "search", "match", "fullmatch" or "ending". "ending" means that the whole name
            matches, or everything after one of its dots.

    Returns:
        For each pattern, whether it matches each name.

    Raises:
        ValueError: a pattern is not a regular expression, or takes too much time or memory.
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(
                f"{key}: {pattern!r:.80} is not a regular expression, as it is not text"
            )
        if len(pattern) > LONGEST:
            raise ValueError(
                f"{key}: {_shown(pattern)} has {len(pattern):,} characters: use at most {LONGEST:,}"
            )
    costly = tuple(pattern for pattern in patterns if _COSTLY.intersection(pattern))
    answers = dict(zip(costly, _bounded(key, costly, tuple(names), method), strict=True))
    return [
        answers[pattern] if pattern in answers else _match(key, pattern, names, method)
        for pattern in patterns
    ]


def _match(key: str, pattern: str, names: Sequence[str], method: str) -> list[bool]:
    answer = _answer(pattern, names, method)
    if isinstance(answer, str):
        raise ValueError(f"{key}: {_shown(pattern)} is no regular expression: {answer}")
    return answer


@functools.lru_cache(maxsize=16)  # a start makes the same call several times
def _bounded(
    key: str, patterns: tuple[str, ...], names: tuple[str, ...], method: str
) -> list[list[bool]]:
    """Match like `matches` in a process with resource limits, which can be killed."""
    if not patterns:
        return []
    request = json.dumps([patterns, names, method, SECONDS])
    # Isolated: no user site, no PYTHON* variables, no modules of the working folder.
    command = [sys.executable, "-I", "-S", __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            output, _ = process.communicate(request, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    answers = [json.loads(line) for line in output.splitlines() if line.endswith("]")]
    for pattern, answer in zip(patterns, answers, strict=False):
        if answer and isinstance(answer[0], str):
            raise ValueError(f"{key}: {_shown(pattern)} is no regular expression: {answer[0]}")
    if len(answers) < len(patterns):
        raise ValueError(
            f"{key}: {_shown(patterns[len(answers)])} takes over {SECONDS} s or "
            f"{MEMORY >> 30} GiB to compile or to match: use a simpler regular expression, with no "
            "quantifier inside another, or plain names"
        )
    return answers


def _shown(pattern: str) -> str:
    return f"{pattern!r}" if len(pattern) <= 200 else f"{pattern[:200]!r}..."


def _answer(text: str, names: Sequence[str], method: str) -> list[bool] | str:
    """Return whether a pattern matches each name, or why it is not a regular expression."""
    try:
        pattern = re.compile(text)
        if method == "ending":
            return [_matches_ending(pattern, name) for name in names]
        return [getattr(pattern, method)(name) is not None for name in names]
    except MemoryError:
        return "it needs too much memory"
    except RecursionError:
        return "its groups are nested too deep"
    except (re.error, OverflowError) as error:
        return str(error)


def _matches_ending(pattern: re.Pattern, name: str) -> bool:
    starts = [0, *(index + 1 for index, letter in enumerate(name) if letter == ".")]
    return any(pattern.fullmatch(name, start) for start in starts)


def _serve() -> None:
    """Read one request from stdin and print one line per pattern.

    Each line is flushed, so that the first pattern without a line is the one that took too long.
    """
    patterns, names, method, seconds = json.load(sys.stdin)
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: MEMORY, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit the address space
            resource.setrlimit(kind, (limit, limit))
    for pattern in patterns:
        answer = _answer(pattern, names, method)
        print(json.dumps([answer] if isinstance(answer, str) else answer), flush=True)


if __name__ == "__main__":
    _serve()
