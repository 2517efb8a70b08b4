"""No picture is embedded twice: embeddings are copied from images with the same content."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Self

import numpy as np
from numpy.typing import NDArray

from imagesearch.parallel import available_cpus

Embedding = NDArray[np.float32]
FindEmbeddings = Callable[[Sequence[str]], dict[str, Embedding]]  # by SHA-256 in hex, those that are in the index

RECENT_SIZE = 4096  # embeddings kept for copies of images that a search of the index may not find yet
READY_PER_CPU = 8  # the next batch is looked up when this many contents are left to embed: 70 ms of work


class KnownEmbeddings:
    """The embeddings of contents, by SHA-256: computed once, or copied from the index.

    `find_embeddings` looks up contents in the index. Look-ups are batched: the contents of all threads
    wait until the CPUs are about to run out of work, then go into one query. Safe to use from several
    threads; a context manager.
    """

    def __init__(self, find_embeddings: FindEmbeddings) -> None:
        self._find_embeddings = find_embeddings
        self._enough = READY_PER_CPU * available_cpus()
        self._ready = 0  # contents that have been looked up and whose embedding is not finished
        self._waiting: list[tuple[str, Future[Embedding | None]]] = []
        self._closed = False
        self._changed = threading.Condition()
        self._recent: dict[str, Future[Embedding]] = {}
        self._thread = threading.Thread(target=self._look_up, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def get(self, sha256: str, compute: Callable[[], Embedding]) -> tuple[Embedding, bool]:
        """Returns the content's embedding, shape (768,), and True if it was copied.

        If it is not known, it is ``compute()``; raises what that raises.
        """
        with self._changed:
            recent = self._recent.get(sha256)
            if recent is None:
                result = self._recent[sha256] = Future()
                if len(self._recent) > RECENT_SIZE:
                    del self._recent[next(iter(self._recent))]
                found: Future[Embedding | None] = Future()
                self._waiting.append((sha256, found))
                self._changed.notify_all()
        if recent is not None:
            with contextlib.suppress(Exception):  # if the other file could not be read, perhaps this one can
                return recent.result(), True
            return compute(), False
        try:
            indexed = found.result()
            embedding = compute() if indexed is None else indexed
        except BaseException as error:
            result.set_exception(error)
            raise
        finally:
            with self._changed:
                self._ready -= 1
                self._changed.notify_all()
        result.set_result(embedding)
        return embedding, indexed is not None

    def _look_up(self) -> None:
        """Looks up the contents that wait, whenever there is little left to compute."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._waiting and self._ready <= self._enough))
                if self._closed:
                    return
                batch, self._waiting = self._waiting, []
                self._ready += len(batch)
            try:
                embeddings = self._find_embeddings([sha256 for sha256, _ in batch])
            except Exception:  # an index that cannot answer now has no copies to offer; writing reports its errors
                embeddings = {}
            for sha256, found in batch:
                found.set_result(embeddings.get(sha256))
