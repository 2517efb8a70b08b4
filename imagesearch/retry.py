"""Retrying a service that has become unreachable, with growing delays."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import TypeVar

from imagesearch import console
from imagesearch.errors import ImageSearchError
from imagesearch.interrupt import POLL_SECONDS, Interrupt
from imagesearch.parallel import start_thread

T = TypeVar("T")

INITIAL_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 8.0
INTERRUPTED_SECONDS = 2  # for which an answer is still waited for after an interruption
SLOW_SECONDS = 5  # of one call, before the user is told
SLOW_INTERVAL_SECONDS = 30  # before the user is told again


class RetryableError(Exception):
    """A service cannot do something now but may do it later; the message says why.

    `hint` is what the user can do if it is not retried. `partially_done` is True if the service has done part
    of it, so that the time limit starts again.
    """

    def __init__(self, reason: str, hint: str = "Run the command again later.", partially_done: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.partially_done = partially_done


class Retry:
    """How long to retry a service, and how the user is told. Safe to use from several threads.

    An outage has one time limit: a call that fails after others have failed, with no success in between,
    has what is left of theirs. With a time limit of 0 nothing is retried.
    """

    def __init__(
        self, timeout_seconds: float = 0, interrupt: Interrupt | None = None, say: Callable[[str], None] = console.say
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._interrupt = interrupt or Interrupt()
        self._say = say
        self._outages: dict[str, float] = {}  # when they began, by service
        self._said: dict[str, float] = {}  # when it may be said again
        self._lock = threading.Lock()

    def request_timeout(self, seconds: float) -> float:
        """Returns how long to wait for an answer: `seconds`, or the time limit if it is shorter, but at least 5."""
        return min(seconds, max(5, self._timeout_seconds)) if self._timeout_seconds else seconds

    @property
    def is_outage(self) -> bool:
        """True while a service has not recovered."""
        return bool(self._outages)

    def call(self, service: str, function: Callable[[], T]) -> T:
        """Returns ``function()``, repeated while it raises RetryableError.

        Raises ImageSearchError if that lasts longer than the timeout, or the run was interrupted.
        """
        call_began, delay = time.monotonic(), INITIAL_BACKOFF_SECONDS
        outage_began: float | None = None
        while True:
            try:
                with self._say_if_slow(service):
                    result = function()
            except RetryableError as error:
                reason = str(error)
                if self._timeout_seconds == 0:
                    self._outages[service] = call_began
                    raise _unrecovered(error) from None
                if error.partially_done:
                    self._outages.pop(service, None)
                    call_began, outage_began, delay = time.monotonic(), None, INITIAL_BACKOFF_SECONDS
                if outage_began is None:  # what has been waited for the answer counts
                    outage_began = self._outages.setdefault(service, call_began)
            except Exception:  # an answer, too
                self._outages.pop(service, None)
                raise
            else:
                self._outages.pop(service, None)
                return result
            waited = time.monotonic() - outage_began
            delay = min(delay, self._timeout_seconds - waited)
            if delay <= 0:
                raise ImageSearchError(
                    f"{service} did not recover within {waited:.0f} s: {reason}."
                    " Run the command again to continue from here."
                )
            if not self._interrupt.signal:
                when = f" in {delay:.0f} s" if delay >= 1 else ""
                self._say_rarely(f"Retrying{when}: {reason}.", delay / 2)
            if not self._interrupt.sleep(delay):
                raise ImageSearchError(
                    f"Interrupted while retrying: {reason}. Run the command again to continue from here."
                )
            delay = min(2 * delay, MAX_BACKOFF_SECONDS)

    def call_without_retry(self, service: str, function: Callable[[], T]) -> T:
        """Returns ``function()``, not repeated. Raises ImageSearchError in place of RetryableError."""
        try:
            with self._say_if_slow(service):
                return function()
        except RetryableError as error:
            raise _unrecovered(error) from None

    def run_interruptibly(self, service: str, function: Callable[[], T]) -> T:
        """Returns ``function()``; raises ImageSearchError soon after the run is interrupted.

        It runs on another thread: while it waits inside a library that is not Python, no signal handler could run on
        this one.
        """
        future = start_thread(function)
        interrupted: float | None = None
        while not wait([future], timeout=POLL_SECONDS).done:
            if self._interrupt.signal:
                interrupted = interrupted or time.monotonic()
            if interrupted and time.monotonic() - interrupted > INTERRUPTED_SECONDS:
                raise ImageSearchError(f"Interrupted while waiting for an answer. {service} is silent.")
        return future.result()

    @contextlib.contextmanager
    def _say_if_slow(self, service: str) -> Iterator[None]:
        """Tells the user if the block takes long: a server that answers nothing looks like a program that hangs."""
        text = f"Waiting for an answer of {service}, which takes more than {SLOW_SECONDS} seconds."
        timer = threading.Timer(SLOW_SECONDS, self._say_rarely, [text, SLOW_INTERVAL_SECONDS])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _say_rarely(self, text: str, seconds: float) -> None:
        """Prints a line, unless another thread has printed the same less than `seconds` ago."""
        with self._lock:
            if time.monotonic() < self._said.get(text, 0):
                return
            self._said[text] = time.monotonic() + seconds
        self._say(text)


def _unrecovered(error: RetryableError) -> ImageSearchError:
    reason = str(error)
    return ImageSearchError(f"{reason[0].upper()}{reason[1:]}. {error.hint}")


NO_RETRY = Retry()
