"""A bounded parallel map, batches and chunks, CPUs, and a limit on memory."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagesearch.parallel import MemoryLimit, available_cpus, batch_until_error, make_chunks, map_buffered


def failing() -> Iterator[int]:
    yield from range(6)
    raise ValueError


def test_memory_is_reserved_in_turns() -> None:
    limit, most, reserved, lock = MemoryLimit(100), 0, 0, threading.Lock()

    def use(size: int) -> None:
        nonlocal most, reserved
        with limit.reserve(size):
            with lock:
                reserved += size
                most = max(most, reserved)
            time.sleep(0.001)
            with lock:
                reserved -= size

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [60, 30, 50, 100, 10] * 20))
        assert 60 < most <= 100
        use(500)  # more than the limit, alone
    assert most == 500


def test_the_order_is_kept_and_what_is_ahead_is_bounded() -> None:
    pulled = 0

    def items() -> Iterator[int]:
        nonlocal pulled
        for number in range(200):
            pulled += 1
            yield number

    def slow(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * number

    with ThreadPoolExecutor(4) as pool:
        results = map_buffered(pool, slow, items(), buffersize=10)
        for number in range(200):
            assert next(results) == number * number
            assert pulled <= number + 11


def test_a_consumer_that_stops_early_cancels_the_rest() -> None:
    begun, stopped = list[int](), threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number:
            stopped.wait()

    with ThreadPoolExecutor(1) as pool:
        results = map_buffered(pool, work, range(1000), buffersize=50)
        next(results)
        threading.Timer(1, stopped.set).start()  # long after the rest was cancelled
        results.close()
    assert len(begun) <= 2  # one was under way


def test_an_error_waits_for_what_is_under_way_and_starts_nothing_more() -> None:
    done, seen = list[int](), list[int]()

    def work(number: int) -> int:
        if number == 0:
            raise ValueError
        time.sleep(0.05)
        done.append(number)
        return number

    with ThreadPoolExecutor(3) as pool, pytest.raises(ValueError):
        for result in map_buffered(pool, work, range(100), buffersize=6):
            seen.append(result)
    assert seen == sorted(done) and 1 <= len(seen) < 6


def test_what_came_before_an_error_is_not_lost() -> None:
    assert [len(batch) for batch in batch_until_error(range(10), 4)] == [4, 4, 2]
    batches = batch_until_error(failing(), 4)
    assert [next(batches), next(batches)] == [[0, 1, 2, 3], [4, 5]]
    with ThreadPoolExecutor(1) as pool:
        results = map_buffered(pool, lambda item: item, failing(), 3)
        assert [next(results) for _ in range(6)] == list(range(6))
        for iterator in (batches, results):
            with pytest.raises(ValueError):
                next(iterator)
    items = []
    with pytest.raises(ValueError):
        for chunk in make_chunks(failing(), 100, 1, lambda item: 0, 0):
            items += chunk
    assert items == list(range(6))


@given(st.lists(st.integers(0, 9)), st.integers(1, 9), st.integers(1, 4))
def test_chunks_keep_all_items_in_order_within_their_limits(items: list[int], size: int, workers: int) -> None:
    chunks = list(make_chunks(items, size, workers, lambda item: item, 10))
    assert [item for chunk in chunks for item in chunk] == items
    assert all(len(chunk) <= size and (sum(chunk) <= 10 or len(chunk) == 1) for chunk in chunks)


def test_the_last_chunks_are_smaller() -> None:
    sizes = [len(chunk) for chunk in make_chunks(range(100), 16, 2, lambda item: 0, 0)]
    assert sizes[0] == 16 and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [(None, 6), ("max 100000\n", 6), ("250000 100000\n", 2), ("50000 100000\n", 1), ("900000 100000\n", 6)],
)
def test_available_cpus_heed_the_quota(quota: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        if quota is None or str(path) != "/sys/fs/cgroup/cpu.max":
            raise FileNotFoundError
        return quota

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_cpus() == expected
