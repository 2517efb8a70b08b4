"""Stops a run cleanly at Ctrl-C or SIGTERM."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Self, TypeVar

from imagesearch.errors import ImageSearchError

Item = TypeVar("Item")


class Interrupt:
    """Stops a run cleanly at the first Ctrl-C (SIGINT) or SIGTERM, immediately at the second.

    `signal` is the signal's number, 0 before there was one.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._interrupted = threading.Event()

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.signal and isinstance(error, ImageSearchError):  # a retry that was cut short
            error.exit_code = 128 + self.signal

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._interrupted.set()
        # os.write: the signal may have interrupted a print.
        os.write(2, b"\nInterrupted: writing what has been embedded. Press Ctrl-C again to stop immediately.\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def until_interrupted(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields `items` until the run is interrupted."""
        for item in items:
            if self.signal:
                return
            yield item

    def sleep(self, seconds: float) -> bool:
        """Waits; returns False if the run was interrupted."""
        return not self._interrupted.wait(seconds)
