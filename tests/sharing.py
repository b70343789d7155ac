"""Share the compiled program between the runs of a test."""

import contextlib
from collections.abc import Iterator

import pytest

from jax_sft.training import run as training_run
from jax_sft.training.program import Program, program


@contextlib.contextmanager
def one_program() -> Iterator[list[Program]]:
    """Give all runs within the block the program of the first: tracing and lowering it takes most
    of the time of a short run. Their configs differ in nothing that the program depends on.

    Yields:
        That program, once it is built.
    """
    built: list[Program] = []

    def build_once(*arguments, **options) -> Program:
        if not built:
            built.append(program(*arguments, **options))
        return built[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "program", build_once)
        yield built
