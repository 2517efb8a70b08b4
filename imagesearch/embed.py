"""From files to embeddings: decoding on threads ahead of the model, the model on batches."""

import functools
import hashlib
import itertools
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from imagesearch.files import File, read, reason
from imagesearch.models import Model

Item = TypeVar("Item")
Result = TypeVar("Result")

# Batches of 8 to 16 are where Onnx Runtime is fastest on this model (`make benchmark`).
BATCH = 8


@dataclass(frozen=True, slots=True)
class Stored:
    """What the index holds of a file: its size in bytes, mtime in nanoseconds and content's SHA-256 in hex."""

    size: int
    mtime: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Document:
    """What is to be written for one file.

    `embedding` has shape (768,); None says that the index has it already, as the content is the same.
    `stored` is what the index held before, None for a new file.
    """

    file: File
    stored: Stored | None
    sha256: str
    embedding: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that gave no embedding, and why, in a few words."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A file as `Model.pixels` has it; `pixels` is None where the content is what the index holds."""

    file: File
    stored: Stored | None
    sha256: str
    pixels: NDArray[np.uint8] | None


def embed(files: Iterable[tuple[File, Stored | None]], model: Model, workers: int) -> Iterator[Document | Unreadable]:
    """The document of each file, in order; at most a few batches are under way at any time.

    `workers` batches are embedded at once, and as many files decoded.
    """
    with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(workers) as embedders:
        loaded = ahead(decoders, functools.partial(load, model), files, (workers + 2) * BATCH)
        for batch in ahead(embedders, functools.partial(embed_batch, model), batched(loaded, BATCH), workers + 1):
            yield from batch


def load(model: Model, candidate: tuple[File, Stored | None]) -> Loaded | Unreadable:
    """Reads one file: its hash, and its pixels unless the hash is what the index holds."""
    file, stored = candidate
    try:
        if not stat.S_ISREG(os.stat(file.path).st_mode):  # opening a pipe could wait for ever
            return Unreadable(file.path, "not a regular file")
        with open(file.path, "rb") as stream:
            status = os.fstat(stream.fileno())  # of what is read, whatever the walk saw
            file = replace(file, size=status.st_size, mtime=status.st_mtime_ns)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            if stored and stored.sha256 == sha256:
                return Loaded(file, stored, sha256, None)
            stream.seek(0)
            return Loaded(file, stored, sha256, model.pixels(read(stream)))
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        return Unreadable(file.path, reason(error))


def embed_batch(model: Model, batch: list[Loaded | Unreadable]) -> list[Document | Unreadable]:
    """The documents of a batch, in order."""
    pixels = [item.pixels for item in batch if isinstance(item, Loaded) and item.pixels is not None]
    embeddings = iter(model.embed(pixels) if pixels else ())
    results: list[Document | Unreadable] = []
    for item in batch:
        if isinstance(item, Unreadable):
            results.append(item)
            continue
        embedding = None if item.pixels is None else next(embeddings)
        if embedding is not None and not (np.isfinite(embedding).all() and embedding.any()):
            results.append(Unreadable(item.file.path, "the model gives it no usable embedding (zero or not finite)"))
        else:
            results.append(Document(item.file, item.stored, item.sha256, embedding))
    return results


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Iterator[Result]:
    """`map(function, items)` on the pool's threads, in order, at most `window` calls ahead of the reader."""
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # the reader has stopped early
        for future in pending:
            future.cancel()


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter (`itertools.batched` is there from Python 3.12 on)."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def cores() -> int:
    """How many CPUs this process may use: its affinity and its cgroups' quotas, not the machine's size."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        cgroups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return count
    for _, controllers, name in cgroups:
        if controllers and "cpu" not in controllers.split(","):  # version 2 names none
            continue
        folder = Path("/sys/fs/cgroup", "cpu" if controllers else "", name.lstrip("/"))
        for group in (folder, *folder.parents):
            count = int(min(count, max(1, quota(group))))
    return count


def quota(cgroup: Path) -> float:
    """How many CPUs' time the cgroup of this folder has, by version 2 or 1; infinite where it sets no limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html
    """
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            time, period = " ".join((cgroup / name).read_text() for name in names).split()
        except (OSError, ValueError):  # the other version's file, or none
            continue
        if time not in ("max", "-1"):
            return int(time) / int(period)
    return math.inf
