"""Images to embeddings on all CPUs, one image at a time."""

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from imagesearch.documents import Document, FileMetadata, ImageFile, MetadataUpdate
from imagesearch.errors import ImageSearchError, describe_error
from imagesearch.images import OnError, read_image
from imagesearch.models import Model
from imagesearch.parallel import available_cpus, map_buffered
from imagesearch.sources import Source

Embedding = NDArray[np.float32]

# Threads for each CPU: one works, the others open the next images, which takes long in a bucket.
READERS_PER_CPU = 8
BUFFER_PER_CPU = 32  # results, of 3 kB each, that may wait for the index
RECENT_SIZE = 4096  # embeddings kept for copies of images that a search may not find yet
LOOKUP_SIZE = 1000  # contents in one look-up


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Why there is no embedding of an image or query."""

    reason: str


def embed_images(
    candidates: Iterable[tuple[ImageFile, FileMetadata | None]],
    source: Source,
    model: Model,
    find_embeddings: Callable[[Sequence[str]], dict[str, Embedding]],
    on_error: OnError,
) -> Generator[Document | MetadataUpdate, None, None]:
    """Yields what is to be written for each image, in order.

    A candidate is an image and what the index holds of it. The embedding of content that is in the
    index already, or was embedded a moment ago, is copied. `on_error` is told of each image that
    cannot be read. Memory is bounded, however many the images.
    """
    cpus = available_cpus()
    slots = threading.Semaphore(cpus)
    with _Embeddings(find_embeddings) as known, ThreadPoolExecutor(READERS_PER_CPU * cpus) as readers:

        def embed_one(
            candidate: tuple[ImageFile, FileMetadata | None],
        ) -> tuple[ImageFile, Document | MetadataUpdate | _Unreadable]:
            image, indexed = candidate
            try:
                with source.open_image(image) as (image, stream):
                    with slots:
                        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
                    if indexed and indexed.sha256 == sha256:
                        return image, MetadataUpdate(image)
                    embedding, is_copy = known.get(sha256, functools.partial(_embed, stream, model, slots))
                    return image, Document(image, sha256, embedding, indexed is not None, is_copy)
            except ImageSearchError:  # the source is away for good: the run ends
                raise
            except Exception as error:  # Pillow raises nearly anything for a damaged file
                return image, _Unreadable(describe_error(error))

        for image, result in map_buffered(readers, embed_one, candidates, BUFFER_PER_CPU * cpus):
            if isinstance(result, _Unreadable):
                on_error(image.file_path, result.reason)
            else:
                yield result


def embed_queries(
    queries: Sequence[str], open_query: Callable[[str], AbstractContextManager[BinaryIO]], model: Model
) -> Iterator[tuple[str, Embedding | str]]:
    """Yields each query with its embedding, in order, or with the reason why there is none."""
    cpus = available_cpus()
    slots = threading.Semaphore(cpus)

    def embed_one(query: str) -> tuple[str, Embedding | str]:
        try:
            with open_query(query) as stream:
                return query, _embed(stream, model, slots)
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            return query, describe_error(error)

    with ThreadPoolExecutor(min(len(queries), READERS_PER_CPU * cpus)) as readers:
        yield from map_buffered(readers, embed_one, queries, BUFFER_PER_CPU * cpus)


def _embed(stream: BinaryIO, model: Model, slots: threading.Semaphore) -> Embedding:
    """Returns the embedding of the image in `stream`. Raises ValueError if the model gives none that is usable."""
    with slots:
        stream.seek(0)
        embedding = model.embed(model.preprocess(read_image(stream)))
    with np.errstate(over="ignore"):
        length = np.sqrt(np.dot(embedding, embedding))
    if not (np.isfinite(length) and length > 0):
        raise ValueError("the model gives it no usable embedding (zero, or not finite)")
    return embedding


class _Embeddings:
    """The embeddings of contents, by SHA-256: computed once, or copied from the index.

    Look-ups of all threads are sent together: what has gathered while one is under way is the next one.
    """

    def __init__(self, find_embeddings: Callable[[Sequence[str]], dict[str, Embedding]]) -> None:
        self._find_embeddings = find_embeddings
        self._requests: SimpleQueue[tuple[str, Future[Embedding | None]] | None] = SimpleQueue()
        self._recent: dict[str, Future[Embedding]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._look_up, daemon=True)

    def __enter__(self) -> "_Embeddings":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self._thread.join()

    def get(self, sha256: str, compute: Callable[[], Embedding]) -> tuple[Embedding, bool]:
        """Returns the content's embedding, and True if it was copied. Raises what `compute` raises."""
        with self._lock:
            recent = self._recent.get(sha256)
            if recent is None:
                result = self._recent[sha256] = Future()
                if len(self._recent) > RECENT_SIZE:
                    del self._recent[next(iter(self._recent))]
        if recent is not None:
            with contextlib.suppress(Exception):  # if the other file could not be read, perhaps this one can
                return recent.result(), True
            return compute(), False
        found: Future[Embedding | None] = Future()
        self._requests.put((sha256, found))
        indexed = found.result()
        try:
            embedding = compute() if indexed is None else indexed
        except BaseException as error:
            result.set_exception(error)
            raise
        result.set_result(embedding)
        return embedding, indexed is not None

    def _look_up(self) -> None:
        """Answers requests until there is a None among them."""
        while (request := self._requests.get()) is not None:
            batch = [request]
            while not self._requests.empty() and len(batch) < LOOKUP_SIZE:
                if (request := self._requests.get()) is None:
                    break
                batch.append(request)
            try:
                embeddings = self._find_embeddings([sha256 for sha256, _ in batch])
            except Exception:  # an index that cannot answer now has no copies to offer; writing reports its errors
                embeddings = {}
            for sha256, found in batch:
                found.set_result(embeddings.get(sha256))
            if request is None:
                return
