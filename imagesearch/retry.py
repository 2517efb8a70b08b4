"""Retrying a service that has become unreachable, with growing delays."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import TYPE_CHECKING, TypeVar

from imagesearch.errors import ImageSearchError
from imagesearch.parallel import start_thread

if TYPE_CHECKING:
    from imagesearch.interrupt import Interrupt
    from imagesearch.progress import Progress

Result = TypeVar("Result")

INITIAL_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 8.0
POLL_SECONDS = 0.1
INTERRUPTED_SECONDS = 2  # for which an answer is still waited for after an interruption
SILENCE_SECONDS = 5  # without an answer, before the user is told


class RetryableError(Exception):
    """A service cannot do something now but may do it later; the message says why.

    `hint` is what the user can do if it is not retried. `partially_done` is True if the service has done part
    of it, so that the time limit starts again.
    """

    def __init__(self, reason: str, hint: str = "Run the command again later.", partially_done: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.partially_done = partially_done


class RetryPolicy:
    """How long to retry one service, and whom to tell. Safe to use from several threads.

    An outage has one time limit: a call that fails after others have failed, with no success in between,
    has what is left of theirs.
    """

    def __init__(
        self,
        timeout_seconds: float = 0,
        interrupt: "Interrupt | None" = None,
        progress: "Progress | None" = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._interrupt = interrupt
        self._progress = progress
        self._outages: dict[str, float] = {}  # when they began, by service

    def request_timeout(self, seconds: float) -> float:
        """Returns how long to wait for an answer: `seconds`, less if the time limit is shorter, but at least 5."""
        return max(5, min(seconds, self._timeout_seconds)) if self._timeout_seconds else seconds

    @property
    def is_outage(self) -> bool:
        """True if the last call of a service failed."""
        return bool(self._outages)

    @property
    def is_interrupted(self) -> bool:
        """True if the run was interrupted."""
        return self._interrupt is not None and self._interrupt.signal != 0

    def call(self, service: str, function: Callable[[], Result]) -> Result:
        """Returns ``function()``, repeated while it raises RetryableError.

        Raises ImageSearchError if that lasts longer than the timeout, or the run was interrupted.
        """
        began, delay = time.monotonic(), INITIAL_BACKOFF_SECONDS
        started: float | None = None
        while True:
            try:
                with self._said_if_silent(service):
                    result = function()
            except RetryableError as error:
                reason = str(error)
                if self._timeout_seconds == 0:
                    raise ImageSearchError(f"{reason[0].upper()}{reason[1:]}. {error.hint}") from None
                if error.partially_done:
                    self._outages.pop(service, None)
                    began, started, delay = time.monotonic(), None, INITIAL_BACKOFF_SECONDS
                if started is None:  # what has been waited for the answer counts
                    started = self._outages.setdefault(service, began)
            else:
                self._outages.pop(service, None)
                return result
            waited = time.monotonic() - started
            delay = min(delay, self._timeout_seconds - waited)
            if delay <= 0:
                raise ImageSearchError(
                    f"{service} did not recover within {waited:.0f} s: {reason}."
                    " Run the command again to continue from here."
                )
            if self._progress and not self.is_interrupted:
                self._progress.on_retry(reason, delay)
            if not self._sleep(delay):
                raise ImageSearchError(
                    f"Interrupted while retrying: {reason}. Run the command again to continue from here."
                )
            delay = min(2 * delay, MAX_BACKOFF_SECONDS)

    def call_interruptibly(self, service: str, function: Callable[[], Result]) -> Result:
        """Returns what `call` returns; raises ImageSearchError soon after the run is interrupted.

        ``function()`` runs on another thread: while it waits inside a library that is not Python, no signal handler
        could run on this one.
        """
        return self.call(service, lambda: self._on_thread(service, function))

    def _on_thread(self, service: str, function: Callable[[], Result]) -> Result:
        future = start_thread(function)
        interrupted: float | None = None
        while not wait([future], timeout=POLL_SECONDS).done:
            if self.is_interrupted:
                interrupted = interrupted or time.monotonic()
            if interrupted and time.monotonic() - interrupted > INTERRUPTED_SECONDS:
                raise ImageSearchError(f"Interrupted while waiting for an answer. {service} is silent.")
        return future.result()

    def _sleep(self, seconds: float) -> bool:
        """Waits; returns False if the run was interrupted."""
        if self._interrupt:
            return self._interrupt.sleep(seconds)
        time.sleep(seconds)
        return True

    @contextlib.contextmanager
    def _said_if_silent(self, service: str) -> Iterator[None]:
        """Tells the user if the block takes long: a server that answers nothing looks like a program that hangs."""
        if not self._progress:
            yield
            return
        timer = threading.Timer(SILENCE_SECONDS, self._progress.on_silence, [service])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


NO_RETRY = RetryPolicy()
