"""Exit codes of the programs, by which launchers decide whether to restart.

The numbers from 64 on follow BSD's sysexits.h where one of its codes fits.
"""

DONE = 0
CRASH = 1  # an error that may be gone after a restart
USER_ERROR = 64  # invalid config, model, data or command line: a restart would fail again
BAD_DATA = 65  # training stopped itself, e.g. after too many losses that were not finite
NOT_SAVED = 74  # trained to the end, but the last state could not be stored
REQUEUE = 75  # asked to stop (preemption) and saved: start again later, perhaps on another machine
LOST = 76  # a process died, stalled or was cut off: restart all processes

FINAL = (DONE, USER_ERROR, BAD_DATA, NOT_SAVED, REQUEUE)  # not restarted by the launcher of jax_sft

WORDS = {
    DONE: "done",
    USER_ERROR: "an error in the config, the model, the data or the command line",
    BAD_DATA: "training stopped itself: the loss was not finite",
    NOT_SAVED: "trained, but the last state could not be saved",
    REQUEUE: "asked to stop; to be queued again",
    LOST: "a process was lost or stalled",
}


def describe(code: int) -> str:
    """Describe an exit code in words; negative codes and codes above 128 are signals."""
    signal = -code if code < 0 else code - 128
    words = WORDS.get(code)
    if words is None:
        words = f"killed by signal {signal}" if 0 < signal < 65 else "a crash"
    return f"exit code {code}: {words}"


# Errors that describe invalid input, not a bug of jax_sft or of a library.
_USER_ERRORS = (
    *(ValueError, FileNotFoundError, FileExistsError, PermissionError),
    *(NotADirectoryError, IsADirectoryError),
)
# Errors of devices, links, storage or memory, which a restart may fix. All other errors recur.
_PASSING = (RuntimeError, OSError, MemoryError)


def is_expected(error: BaseException) -> bool:
    """Return whether the message of an error is all that a user needs."""
    return isinstance(error, (*_USER_ERRORS, FloatingPointError)) or hasattr(error, "exit_code")


def of(error: BaseException) -> int:
    """Return the exit code for an error; jax_sft's own errors have the attribute `exit_code`.

    An error that a library raises about its input file, including a panic, recurs at the next
    start. It therefore counts as a user's error.
    """
    if isinstance(error, FloatingPointError):
        return BAD_DATA
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", 130)
    # RecursionError and NotImplementedError are subclasses of RuntimeError, but always recur.
    passes = isinstance(error, _PASSING) and not isinstance(
        error, (*_USER_ERRORS, RecursionError, NotImplementedError)
    )
    return getattr(error, "exit_code", CRASH if passes else USER_ERROR)
