"""Images to embeddings on all CPUs, one image at a time."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

# Threads for each CPU: one works; the others open the next images, which takes long in a bucket, or wait for the
# look-up of their contents.
READERS_PER_CPU, MAX_READERS = 32, 256
READY_PER_CPU = 8  # contents that are ready to be computed while more are looked up: some 70 ms of work
BUFFER_PER_CPU = 64  # results, of 3 kB each, that may wait for the index
RECENT_SIZE = 4096  # embeddings kept for copies of images that a search may not find yet


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
    with (
        ThreadPoolExecutor(cpus) as embedders,
        _Embeddings(find_embeddings, READY_PER_CPU * cpus) as known,
        ThreadPoolExecutor(_reader_count(cpus)) as readers,
    ):

        def embed_one(
            candidate: tuple[ImageFile, FileMetadata | None],
        ) -> tuple[ImageFile, Document | MetadataUpdate | _Unreadable]:
            image, indexed = candidate
            try:
                with source.open_image(image) as (image, stream):
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
                    if indexed and indexed.sha256 == sha256:
                        return image, MetadataUpdate(image)
                    embedding, is_copy = known.get(sha256, lambda: embedders.submit(_embed, stream, model).result())
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

    def embed_one(query: str) -> tuple[str, Embedding | str]:
        try:
            with open_query(query) as stream:
                return query, embedders.submit(_embed, stream, model).result()
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            return query, describe_error(error)

    with ThreadPoolExecutor(cpus) as embedders, ThreadPoolExecutor(_reader_count(cpus)) as readers:
        yield from map_buffered(readers, embed_one, queries, BUFFER_PER_CPU * cpus)


def _reader_count(cpus: int) -> int:
    return min(READERS_PER_CPU * cpus, MAX_READERS)


def _embed(stream: BinaryIO, model: Model) -> Embedding:
    """Returns the embedding of the image in `stream`. Raises ValueError if the model gives none that is usable."""
    stream.seek(0)
    embedding = model.embed(model.preprocess(read_image(stream)))
    with np.errstate(over="ignore"):
        length = np.sqrt(np.dot(embedding, embedding))
    if not (np.isfinite(length) and length > 0):
        raise ValueError("the model gives it no usable embedding (zero, or not finite)")
    return embedding


class _Embeddings:
    """The embeddings of contents, by SHA-256: computed once, or copied from the index.

    Contents are looked up together, since many small look-ups would cost Elasticsearch as much as
    storing them: as long as there is enough to compute, they wait.
    """

    def __init__(self, find_embeddings: Callable[[Sequence[str]], dict[str, Embedding]], busy: int) -> None:
        self._find_embeddings = find_embeddings
        self._busy = busy  # contents that have been looked up and not been computed yet, as long as the rest waits
        self._ready = 0
        self._waiting: list[tuple[str, Future[Embedding | None]]] = []
        self._closed = False
        self._changed = threading.Condition()
        self._recent: dict[str, Future[Embedding]] = {}
        self._thread = threading.Thread(target=self._look_up, daemon=True)

    def __enter__(self) -> "_Embeddings":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def get(self, sha256: str, compute: Callable[[], Embedding]) -> tuple[Embedding, bool]:
        """Returns the content's embedding, and True if it was copied. Raises what `compute` raises."""
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
                self._changed.wait_for(lambda: self._closed or (self._waiting and self._ready <= self._busy))
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
