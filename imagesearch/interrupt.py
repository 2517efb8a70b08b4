"""Stops a run cleanly at Ctrl-C or SIGTERM."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Self, TypeVar

from imagesearch.errors import ImageSearchError, InterruptedRunError

Item = TypeVar("Item")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.1
DOUBLED_SECONDS = 0.5  # `timeout`, and wrappers that forward Ctrl-C, signal a process and its group at once


class Interrupt:
    """Stops a run cleanly at the first Ctrl-C (SIGINT) or SIGTERM, immediately at the second.

    `signal` is the number of the signal received, 0 if none was.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._received = 0.0

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._stop) for number in SIGNALS}
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.signal and isinstance(error, ImageSearchError):  # a retry that was cut short
            raise InterruptedRunError(str(error), self.signal) from error

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal and now - self._received > DOUBLED_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal:
            return
        self.signal, self._received = number, now
        with contextlib.suppress(OSError):  # of `2>&1 | tee log`, which the same Ctrl-C ends
            # os.write: the signal may have interrupted a print.
            os.write(2, b"\nInterrupted: writing what has been embedded. Press Ctrl-C again to stop immediately.\n")

    def until_interrupted(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields `items` until the run is interrupted; the one that is then being made is still yielded."""
        if self.signal:
            return
        for item in items:
            yield item
            if self.signal:
                return

    def sleep(self, seconds: float) -> bool:
        """Waits; returns False if the run was interrupted.

        It polls: a threading.Event could deadlock, since `_stop` runs on the main thread, which may hold its lock.
        """
        deadline = time.monotonic() + seconds
        while not self.signal and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
        return not self.signal
