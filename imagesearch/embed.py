"""Images to embeddings on all CPUs: chunks are opened and looked up in the index, then embedded one by one."""

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from imagesearch.errors import ImageSearchError, describe_error
from imagesearch.files import raise_open_file_limit
from imagesearch.images import open_rgb
from imagesearch.index import Index
from imagesearch.models import Model
from imagesearch.parallel import available_cpus, make_chunks, map_buffered
from imagesearch.paths import BUCKET_URL, HTTP_URL
from imagesearch.records import Candidate, Document, Embedded, Embedding, MetadataUpdate, OpenedImage, Unreadable
from imagesearch.sources import Query, Source

if TYPE_CHECKING:
    from imagesearch.progress import Progress  # which search.py does not need

CHUNK_SIZE = 32  # images that are opened and looked up together
CHUNK_BYTES = 64_000_000  # of their contents; a larger image is a chunk of its own
QUERY_READERS = 16  # threads that open queries; most of a download is waiting
RECENT_SIZE = 4096  # embeddings kept for copies of images that a search of the index may not find yet


def embed(image: OpenedImage, model: Model) -> Embedding:
    """Returns the embedding of an image, shape (768,) float32.

    Raises ValueError if the model gives no usable embedding, and whatever Pillow raises for a damaged file.
    """
    with open_rgb(image.stream) as rgb:
        pixels = model.preprocess(rgb)
    embedding = model.embed(pixels)
    with np.errstate(over="ignore"):
        length = np.sqrt(np.dot(embedding, embedding))
    if not (np.isfinite(length) and length > 0):
        raise ValueError("the model gives it no usable embedding (zero, or not finite)")
    return embedding


class Embedder:
    """Embeds images, or copies what is known of the same content. Safe to use from several threads.

    Known is what the index has, and what was embedded lately. `get_model` is called when the first image has to be
    embedded. As many threads embed at a time as there are CPUs.
    """

    def __init__(self, index: Index, get_model: Callable[[], Model]) -> None:
        self._index = index
        self._get_model = get_model
        self._model: Future[Model] | None = None
        self._recent = OrderedDict[str, Embedding]()
        self._lock = threading.Lock()  # of the model and the recent embeddings
        self._cpu_slots = threading.Semaphore(available_cpus())

    def embed(self, images: Sequence[OpenedImage | Unreadable]) -> list[Embedded | Unreadable]:
        """Returns the embedding of each image, or why there is none. Raises ImageSearchError if the model has none."""
        sha256s = {image.sha256 for image in images if isinstance(image, OpenedImage)}
        sha256s = {sha256 for sha256 in sha256s if sha256 not in self._recent}
        indexed = self._index.find_embeddings(sorted(sha256s)) if sha256s else {}
        with self._cpu_slots:
            return [image if isinstance(image, Unreadable) else self._embed_one(image, indexed) for image in images]

    def _embed_one(self, image: OpenedImage, indexed: dict[str, Embedding]) -> Embedded | Unreadable:
        with self._lock:
            recent = self._recent.get(image.sha256)
        if recent is not None:
            return Embedded(recent, "run")
        if image.sha256 in indexed:
            return Embedded(indexed[image.sha256], "index")
        model = self._load_model()
        try:
            embedding = embed(image, model)
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            return Unreadable(image.name, describe_error(error))
        with self._lock:
            self._recent[image.sha256] = embedding
            if len(self._recent) > RECENT_SIZE:
                self._recent.popitem(last=False)
        return Embedded(embedding)

    def _load_model(self) -> Model:
        """Returns the model, loaded once; raises the same error each time if it cannot be."""
        with self._lock:
            if self._model is None:
                self._model = Future()
                try:
                    self._model.set_result(self._get_model())
                except ImageSearchError as error:
                    self._model.set_exception(error)
        return self._model.result()


def embed_images(
    candidates: Iterable[Candidate], source: Source, model: Model, index: Index, progress: "Progress"
) -> Generator[Document | MetadataUpdate, None, None]:
    """Yields what is to be written for each image, in order; counts images that cannot be read.

    Memory and the number of open files are bounded, however many images there are.
    """
    cpus = available_cpus()
    workers = cpus + max(1, int(cpus * source.readers_per_cpu))
    embedder = Embedder(index, lambda: model)

    def embed_chunk(chunk: Sequence[Candidate]) -> list[Document | MetadataUpdate | Unreadable]:
        with source.open_images([candidate.image for candidate in chunk]) as opened:
            pairs = list(zip(chunk, opened, strict=True))
            changed = [not _is_unchanged(candidate, image) for candidate, image in pairs]
            embedded = iter(embedder.embed(list(itertools.compress(opened, changed))))
            results = [
                _to_write(candidate, image, next(embedded) if is_changed else None)
                for (candidate, image), is_changed in zip(pairs, changed, strict=True)
            ]
        progress.advance(len(chunk))
        return results

    size = max(1, min(CHUNK_SIZE, raise_open_file_limit() // 2 // workers))
    chunks = make_chunks(candidates, size, cpus, lambda candidate: candidate.image.size, CHUNK_BYTES)
    with ThreadPoolExecutor(workers) as pool:
        for results in map_buffered(pool, embed_chunk, chunks, workers + cpus):
            for result in results:
                if isinstance(result, Unreadable):
                    progress.count_unreadable(result)
                else:
                    yield result


def _is_unchanged(candidate: Candidate, opened: OpenedImage | Unreadable) -> bool:
    """Returns True if the content is what the index holds of this image."""
    indexed = candidate.indexed
    return indexed is not None and isinstance(opened, OpenedImage) and indexed.sha256 == opened.sha256


def _to_write(
    candidate: Candidate, opened: OpenedImage | Unreadable, embedded: Embedded | Unreadable | None
) -> Document | MetadataUpdate | Unreadable:
    """Returns what is to be written for an image; `embedded` is None if its content is unchanged."""
    if isinstance(opened, Unreadable):
        return opened
    image = replace(candidate.image, size=opened.size, mtime=opened.mtime)
    if embedded is None:
        return MetadataUpdate(image)
    if isinstance(embedded, Unreadable):
        return embedded
    return Document(image, opened.sha256, embedded, candidate.indexed is not None)


@dataclass(frozen=True, slots=True)
class EmbeddedQuery:
    """A query's name and `file_path` (see `sources.Query`), with its embedding or the reason why there is none."""

    name: str
    file_path: str
    embedded: Embedded | Unreadable


def embed_queries(
    queries: Iterable[Query | Unreadable], index: Index, get_model: Callable[[], Model]
) -> Generator[EmbeddedQuery, None, None]:
    """Yields each query with its embedding, in order. `get_model` is called if one has content that is not indexed."""
    embedder = Embedder(index, get_model)

    def embed_chunk(chunk: Sequence[Query | Unreadable]) -> list[EmbeddedQuery]:
        with contextlib.ExitStack() as stack:
            opened = [query if isinstance(query, Unreadable) else _open(query, stack) for query in chunk]
            pairs = zip(chunk, embedder.embed(opened), strict=True)
            return [EmbeddedQuery(query.name, getattr(query, "file_path", ""), embedded) for query, embedded in pairs]

    # What is kept in memory is a chunk of its own: chunks that hold some and wait for room would wait for each other.
    size = max(1, min(CHUNK_SIZE, raise_open_file_limit() // 2 // QUERY_READERS))
    chunks = make_chunks(queries, size, QUERY_READERS, _is_remote, 0)
    with ThreadPoolExecutor(QUERY_READERS) as pool:
        for embedded in map_buffered(pool, embed_chunk, chunks, QUERY_READERS + 1):
            yield from embedded


def _is_remote(query: Query | Unreadable) -> bool:
    return bool(HTTP_URL.match(query.name) or BUCKET_URL.match(query.name))


def _open(query: Query, stack: contextlib.ExitStack) -> OpenedImage | Unreadable:
    try:
        return stack.enter_context(query.open())
    except (OSError, ValueError, ImageSearchError) as error:
        return Unreadable(query.name, describe_error(error).rstrip("."))
