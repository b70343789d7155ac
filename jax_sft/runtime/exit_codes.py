"""How a program ends, for launchers: what is worth a restart and what is not.

The numbers from 64 on are those of BSD's sysexits.h where one fits.
"""

DONE = 0
CRASH = 1  # an error that may be gone after a restart
USER_ERROR = 64  # config, model, data or command line: a restart would find the same
BAD_DATA = 65  # training stopped itself, e.g. after too many losses that were not finite
NOT_SAVED = 74  # trained to the end, but the last state could not be stored
REQUEUE = 75  # told to stop (preemption), saved: to be started again later, elsewhere perhaps
LOST = 76  # a process died, stalled or was cut off: all should be started again

FINAL = (DONE, USER_ERROR, BAD_DATA, NOT_SAVED, REQUEUE)  # not restarted by our own launcher

WORDS = {
    DONE: "done",
    USER_ERROR: "an error in the config, the model, the data or the command line",
    BAD_DATA: "training stopped itself: the loss was not finite",
    NOT_SAVED: "trained, but the last state could not be saved",
    REQUEUE: "told to stop; to be queued again",
    LOST: "a process was lost or stalled",
}


def describe(code: int) -> str:
    """Say in words how a process ended; negative codes and those above 128 are signals."""
    signal = -code if code < 0 else code - 128
    words = WORDS.get(code)
    if words is None:
        words = f"killed by signal {signal}" if 0 < signal < 65 else "a crash"
    return f"exit code {code}: {words}"


# Errors that say what the user gave wrong; no bug of ours and no surprise of a library.
_OF_USER = (
    *(ValueError, FileNotFoundError, FileExistsError, PermissionError),
    *(NotADirectoryError, IsADirectoryError),
)
# What may be gone after a restart: devices, links, storage, memory. All other kinds come again.
_PASSING = (RuntimeError, OSError, MemoryError)


def is_expected(error: BaseException) -> bool:
    """Whether the message of an error says all that a user needs."""
    return isinstance(error, (*_OF_USER, FloatingPointError)) or hasattr(error, "exit_code")


def of(error: BaseException) -> int:
    """Return the code to end with after an error; errors of ours carry theirs as `exit_code`.

    What a library raises about a file that it was given, a panic included, is the same at the next
    start, and so a user's error.
    """
    if isinstance(error, FloatingPointError):
        return BAD_DATA
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", 130)
    # RecursionError and NotImplementedError are RuntimeErrors to Python, but come again each time.
    passes = isinstance(error, _PASSING) and not isinstance(
        error, (*_OF_USER, RecursionError, NotImplementedError)
    )
    return getattr(error, "exit_code", CRASH if passes else USER_ERROR)
