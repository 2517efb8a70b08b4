"""One time limit for one outage; interruptions end it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from imagesearch import retry
from imagesearch.errors import ImageSearchError
from imagesearch.interrupt import Interrupt
from imagesearch.retry import NO_RETRY, Retry, RetryableError


def quietly(text: str) -> None:
    """Says nothing."""


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "INITIAL_BACKOFF_SECONDS", 0.1)


def fail() -> None:
    raise RetryableError("no answer")


def test_an_outage_has_one_time_limit_however_many_calls_meet_it(fast: None) -> None:
    retrying = Retry(0.5, Interrupt(), quietly)
    started = time.monotonic()
    with pytest.raises(ImageSearchError, match="did not recover"):
        retrying.call("It", fail)
    first = time.monotonic() - started
    assert 0.5 <= first < 2
    with pytest.raises(ImageSearchError, match="did not recover"):
        retrying.call("It", fail)
    assert time.monotonic() - started < first + 0.3
    assert retrying.call("It", lambda: 7) == 7  # the outage has ended
    started = time.monotonic()
    with pytest.raises(ImageSearchError):
        retrying.call("It", fail)
    assert time.monotonic() - started >= 0.5


def test_a_call_that_always_fails_gives_up_though_others_succeed(fast: None) -> None:
    retrying = Retry(0.5, Interrupt(), quietly)
    stop = threading.Event()

    def succeed() -> None:
        while not stop.is_set():
            retrying.call("It", lambda: None)
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(succeed)
        try:
            with pytest.raises(ImageSearchError, match="did not recover"):
                retrying.call("It", fail)
        finally:
            stop.set()


def test_progress_starts_the_time_limit_again(fast: None) -> None:
    retrying = Retry(0.3, Interrupt(), quietly)
    results = [RetryableError("half", partially_done=True)] * 8

    def half() -> str:
        if results:
            raise results.pop()
        return "done"

    started = time.monotonic()
    assert retrying.call("It", half) == "done"
    assert time.monotonic() - started > 0.3


def test_without_a_time_limit_the_hint_is_said_at_once() -> None:
    with pytest.raises(ImageSearchError, match=r"^No answer\. Run the command again later\.$"):
        NO_RETRY.call("It", fail)


def test_silence_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "SLOW_SECONDS", 0.05)
    said: list[str] = []
    retrying = Retry(10, Interrupt(), said.append)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: retrying.call("It", lambda: time.sleep(0.3)), range(4)))
    assert said == ["Waiting for an answer of It, which takes more than 0.05 seconds."]


def test_an_interruption_ends_a_call_that_hangs() -> None:
    interrupt = Interrupt()
    retrying = Retry(100, interrupt, quietly)
    threading.Timer(0.2, lambda: setattr(interrupt, "signal", 2)).start()
    started = time.monotonic()
    with pytest.raises(ImageSearchError, match="Interrupted"):
        retrying.run_interruptibly("It", lambda: time.sleep(30))
    assert time.monotonic() - started < 5
