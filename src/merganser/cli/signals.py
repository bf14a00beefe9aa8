"""Signals that end a command: it cleans up as after Ctrl-C and exits with 128 and the signal's number."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds after a signal in which others are of the same impatience. Raised while threads are waited for, a second one
#: could leave Python waiting for good.
_BURST = 1.0


@contextmanager
def interrupted_by_signals() -> Iterator[list[signal.Signals]]:
    """Raise KeyboardInterrupt in the main thread when a signal comes that is to end the process.

    A signal that is ignored, as SIGHUP under nohup, stays so, and several within a second count as one. Once a command
    has cleaned up, a further signal ends the process at once, whatever its threads are doing.

    Returns:
        The signals that have come.
    """
    owner, came, raised = os.getpid(), list[signal.Signals](), [-math.inf]

    def interrupt(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker dies of it, as it would without this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        came.append(signal.Signals(number))
        if time.monotonic() - raised[0] > _BURST:
            raised[0] = time.monotonic()
            raise KeyboardInterrupt(came[-1].name)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for one in SIGNALS:
            if signal.getsignal(one) in (signal.SIG_DFL, signal.default_int_handler):
                before[one] = signal.signal(one, interrupt)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if came else handler)
