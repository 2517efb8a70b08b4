"""Retrying a service that has become unreachable, with growing delays."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from imagesearch.errors import ImageSearchError

Result = TypeVar("Result")

INITIAL_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 16.0


class RetryableError(Exception):
    """A service cannot do something now but may do it later; the message says why.

    `progress` is True if it has done part of it, so that the time limit starts again.
    """

    def __init__(self, reason: str, progress: bool = False) -> None:
        super().__init__(reason)
        self.progress = progress


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True


@dataclass(frozen=True)
class RetryPolicy:
    """How long to retry, how to wait, and whom to tell.

    `sleep` waits for a number of seconds and returns False if the run was interrupted.
    `on_retry` is called with the reason and the delay in seconds.
    """

    timeout_seconds: float = 0
    sleep: Callable[[float], bool] = _sleep
    on_retry: Callable[[str, float], None] = lambda reason, delay: None

    def call(self, service: str, function: Callable[[], Result]) -> Result:
        """Returns ``function()``, repeated while it raises RetryableError.

        Raises ImageSearchError if that lasts longer than the timeout, or the run was interrupted.
        """
        started, delay = time.monotonic(), INITIAL_BACKOFF_SECONDS
        while True:
            try:
                return function()
            except RetryableError as error:
                if error.progress:
                    started, delay = time.monotonic(), INITIAL_BACKOFF_SECONDS
                reason = str(error)
            waited = time.monotonic() - started
            delay = min(delay, self.timeout_seconds - waited)
            if self.timeout_seconds == 0:
                raise ImageSearchError(f"{service}: {reason}. Run the command again later.")
            if delay <= 0:
                raise ImageSearchError(
                    f"{service} did not recover within {waited:.0f} s: {reason}."
                    " Run the command again to continue from here."
                )
            self.on_retry(reason, delay)
            if not self.sleep(delay):
                raise ImageSearchError(
                    f"Interrupted while retrying: {reason}. Run the command again to continue from here."
                )
            delay = min(2 * delay, MAX_BACKOFF_SECONDS)


NO_RETRY = RetryPolicy()
