"""Bounded parallel map, batches, available CPUs, and a limit on memory."""

import contextlib
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
T = TypeVar("T")


def map_buffered(
    executor: Executor, function: Callable[[Item], T], items: Iterable[Item], buffersize: int
) -> Iterator[T]:
    """Yields ``function(item)`` for each item, in order; at most `buffersize` calls are ahead of the consumer.

    ``Executor.map`` has a `buffersize` of its own from Python 3.14 on.
    """
    pending: deque[Future[T]] = deque()
    errors: list[Exception] = []
    try:
        for item in _until_error(items, errors):
            pending.append(executor.submit(function, item))
            if len(pending) >= buffersize:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
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

    Unlike ``itertools.batched`` (Python 3.12), it yields what it has before it raises what `items` raises,
    so that the embeddings made before an error are still written.
    """
    return make_chunks(items, size, workers=0)


def make_chunks(
    items: Iterable[Item], size: int, workers: int, weight: Callable[[Item], int] = lambda item: 0, max_weight: int = 0
) -> Iterator[list[Item]]:
    """Yields lists of at most `size` items, for `workers` to share.

    The last lists are smaller, so that all workers end at about the same time; to know when they begin, up to
    2 * workers * size items are read ahead. A list of several items weighs at
    most `max_weight`. What `items` raises is raised after the items before it.
    """
    errors: list[Exception] = []
    iterator = _until_error(items, errors)
    ahead: deque[Item] = deque()
    is_last = False
    while True:
        if not is_last:
            wanted = max(1, 2 * workers) * size
            ahead.extend(itertools.islice(iterator, wanted - len(ahead)))
            is_last = len(ahead) < wanted
        if not ahead:
            break
        count = max(1, min(size, len(ahead) // (2 * workers))) if is_last and workers else size
        chunk = [ahead.popleft()]
        total = weight(chunk[0])
        while ahead and len(chunk) < count and total + (more := weight(ahead[0])) <= max_weight:
            chunk.append(ahead.popleft())
            total += more
        yield chunk
    if errors:
        raise errors[0]


def start_thread(function: Callable[[], T]) -> "Future[T]":
    """Returns the future of ``function()``, which runs on a thread of its own; the process may end before it."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def available_cpus() -> int:
    """Returns how many CPUs this process may use, by its affinity and its cgroups' quotas."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        cgroups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return count
    for _, controllers, name in cgroups:
        if controllers and "cpu" not in controllers.split(","):  # version 2 names no controllers
            continue
        folder = Path("/sys/fs/cgroup", "cpu" if controllers else "", name.lstrip("/"))
        for cgroup in (folder, *folder.parents):
            count = int(min(count, max(1, _cpu_quota(cgroup))))
    return count


def _cpu_quota(cgroup: Path) -> float:
    """Returns the CPUs that a cgroup may use, by version 2 or 1; infinity if it sets no limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html
    """
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
        except (OSError, ValueError):  # the files of the other version, or none
            continue
        if quota not in ("max", "-1"):
            return int(quota) / int(period)
    return math.inf


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
