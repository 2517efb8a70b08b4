"""Bounded parallel map, batches, available CPUs, and a limit on memory."""

import contextlib
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
T = TypeVar("T")

POLL_SECONDS = 0.2

exit_lock = threading.Lock()
"""Held while a file is written that must not be left half-written; a signal waits for it, a second at most."""


def call_on_thread(function: Callable[[], T], timeout_seconds: float = math.inf) -> T:
    """Returns ``function()``, which runs on a thread of its own while this one waits. Raises TimeoutError.

    It waits for a moment, again and again, so that the main thread notices signals: one that another thread receives
    does not wake it.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    deadline = time.monotonic() + timeout_seconds
    while not wait([future], timeout=POLL_SECONDS).done:
        if time.monotonic() > deadline:
            raise TimeoutError
    return future.result()


def map_buffered(
    executor: Executor, function: Callable[[Item], T], items: Iterable[Item], buffersize: int
) -> Generator[T, None, None]:
    """Yields ``function(item)`` for each item, in order; at most `buffersize` calls are ahead of the consumer.

    What a call or `items` raises is raised when the calls under way have ended, and their results have been yielded.
    ``Executor.map`` has a `buffersize` of its own from Python 3.14 on.
    """
    pending: deque[Future[T]] = deque()
    errors: list[Exception] = []
    iterator = _until_error(items, errors)
    try:
        while True:
            pending.extend(
                executor.submit(function, item) for item in itertools.islice(iterator, buffersize - len(pending))
            )
            if not pending:
                break
            try:
                result = pending.popleft().result()
            except Exception as error:
                errors.append(error)
                iterator = iter(())
                pending = deque(future for future in pending if not future.cancel())
                continue
            yield result
    finally:  # the consumer may stop early
        for future in pending:
            future.cancel()
    if errors:
        raise errors[0]


def _until_error(items: Iterable[Item], errors: list[Exception]) -> Iterator[Item]:
    """Yields `items`; what they raise is added to `errors`, to be raised after what came before it is dealt with."""
    try:
        yield from items
    except Exception as error:
        errors.append(error)


def batch_until_error(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of `size` items; the last one may be shorter.

    Unlike ``itertools.batched`` (Python 3.12), it yields what it has before it raises what `items` raises, so that
    the embeddings made before an error are still written.
    """
    errors: list[Exception] = []
    iterator = _until_error(items, errors)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
    if errors:
        raise errors[0]


def make_chunks(
    items: Iterable[Item], size: int, workers: int, weight: Callable[[Item], int], max_weight: int
) -> Iterator[list[Item]]:
    """Yields lists of at most `size` items for `workers` to share, weighing at most `max_weight` unless it is one item.

    The last lists are smaller, so that all workers end at about the same time; to know when they begin, up to
    2 * workers * size items are read ahead. With 0 workers they are not. What `items` raises is raised after the items
    before it.
    """
    errors: list[Exception] = []
    iterator = _until_error(items, errors)
    ahead: deque[Item] = deque()
    while True:
        ahead.extend(itertools.islice(iterator, max(1, 2 * workers) * size - len(ahead)))
        if not ahead:
            break
        count = max(1, min(size, len(ahead) // (2 * workers))) if workers else size
        chunk = [ahead.popleft()]
        total = weight(chunk[0])
        while ahead and len(chunk) < count and (total := total + weight(ahead[0])) <= max_weight:
            chunk.append(ahead.popleft())
        yield chunk
    if errors:
        raise errors[0]


def available_cpus() -> int:
    """Returns how many CPUs this process may use, by its affinity and its container's quota.

    https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or the quota "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = max(1, min(count, int(quota) // int(period)))
    return count


class MemoryLimit:
    """Lets threads reserve bytes from a common limit; a thread that finds no room waits for the others."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._reserved_bytes = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Reserves `size_bytes` for the block. More than the limit is granted if nothing else is reserved."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._reserved_bytes == 0 or self._reserved_bytes + size_bytes <= self._limit_bytes
            )
            self._reserved_bytes += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._reserved_bytes -= size_bytes
                self._changed.notify_all()
