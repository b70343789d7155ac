"""How a program ends, for launchers: what is worth a restart and what is not.

The numbers from 64 on are those of BSD's sysexits.h where one fits.
"""

DONE = 0
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


def of(error: BaseException) -> int:
    """Return the code to end with after an error; errors of ours carry theirs as `exit_code`."""
    if isinstance(error, ValueError):
        return USER_ERROR
    if isinstance(error, FloatingPointError):
        return BAD_DATA
    if isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_code", 1)
