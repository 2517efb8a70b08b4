"""Images to embeddings on all CPUs: chunks are opened and looked up in the index, then embedded one by one."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from imagesearch.errors import ImageSearchError, describe_error
from imagesearch.files import raise_open_file_limit
from imagesearch.images import open_rgb
from imagesearch.index import Index
from imagesearch.interrupt import Interrupt
from imagesearch.models import Model
from imagesearch.parallel import available_cpus, make_chunks, map_buffered, start_thread
from imagesearch.records import Candidate, Document, Embedding, MetadataUpdate, OpenedImage, Unreadable
from imagesearch.report import Report
from imagesearch.sources import Source

CHUNK_SIZE = 32  # images that are opened and looked up together
CHUNK_BYTES = 64_000_000  # of their contents; a larger image is a chunk of its own
RECENT_SIZE = 4096  # embeddings kept for copies of images that a search of the index may not find yet


def embed_images(
    candidates: Iterable[Candidate],
    source: Source,
    model: Model,
    index: Index,
    report: Report,
    interrupt: Interrupt,
) -> Generator[Document | MetadataUpdate, None, None]:
    """Yields what is to be written for each image, in order.

    The embedding of content that the index has, or that was embedded earlier in this run, is copied.
    `report` is told of each image that cannot be read. Memory and the number of open files are bounded,
    however many images there are.
    """
    cpus = available_cpus()
    workers = cpus + max(1, int(cpus * source.readers_per_cpu))
    embedder = Embedder(lambda: model, index, cpus)

    def embed_chunk(chunk: Sequence[Candidate]) -> list[Document | MetadataUpdate | Unreadable]:
        if interrupt.signal:  # what has begun is finished; the next run does the rest
            return []
        with source.open_images([candidate.image for candidate in chunk]) as opened:
            pairs = list(zip(chunk, opened, strict=True))
            copies = embedder.find_copies(image for candidate, image in pairs if not _is_unchanged(candidate, image))
            with embedder.cpu_slots:
                return [_document(candidate, image, embedder, copies) for candidate, image in pairs]

    size = max(1, min(CHUNK_SIZE, raise_open_file_limit() // 2 // workers))
    chunks = make_chunks(candidates, size, cpus, lambda candidate: candidate.image.size, CHUNK_BYTES)
    with ThreadPoolExecutor(workers) as pool:
        for results in map_buffered(pool, embed_chunk, chunks, workers + cpus):
            for result in results:
                if isinstance(result, Unreadable):
                    report.count_unreadable(result.name, result.reason)
                else:
                    yield result


def _document(
    candidate: Candidate, opened: OpenedImage | Unreadable, embedder: "Embedder", copies: dict[str, Embedding]
) -> Document | MetadataUpdate | Unreadable:
    """Returns what is to be written for an image."""
    if isinstance(opened, Unreadable):
        return opened
    image = replace(candidate.image, size=opened.size, mtime=opened.mtime)
    if _is_unchanged(candidate, opened):
        return MetadataUpdate(image)
    embedding, is_copy = embedder.embed(opened, copies)
    if isinstance(embedding, Unreadable):
        return embedding
    return Document(image, opened.sha256, embedding, candidate.indexed is not None, is_copy)


def _is_unchanged(candidate: Candidate, opened: OpenedImage | Unreadable) -> bool:
    """Returns True if the content is what the index holds of this image."""
    indexed = candidate.indexed
    return indexed is not None and isinstance(opened, OpenedImage) and indexed.sha256 == opened.sha256


class Embedder:
    """Makes embeddings, and remembers the last ones. Safe to use from several threads.

    `get_model` is called when the first image has to be embedded. A slot of `cpu_slots` is to be held while decoding
    and embedding: as many threads can do that as there are CPUs.
    """

    def __init__(self, get_model: Callable[[], Model], index: Index, cpus: int) -> None:
        self.cpu_slots = threading.Semaphore(cpus)
        self._get_model = get_model
        self._model: Future[Model] | None = None
        self._index = index
        self._recent: OrderedDict[str, Embedding] = OrderedDict()
        self._lock = threading.Lock()

    def find_copies(self, images: Iterable[OpenedImage | Unreadable]) -> dict[str, Embedding]:
        """Returns the embeddings of those contents that the index has, by SHA-256."""
        sha256s = {image.sha256 for image in images if isinstance(image, OpenedImage)}
        sha256s = {sha256 for sha256 in sha256s if sha256 not in self._recent}
        with contextlib.suppress(ImageSearchError):  # an index that cannot answer now has none to offer
            return self._index.find_embeddings(sorted(sha256s)) if sha256s else {}
        return {}

    def embed(self, image: OpenedImage, copies: dict[str, Embedding]) -> tuple[Embedding | Unreadable, bool]:
        """Returns the image's embedding, or why there is none, and whether it is a copy: in `copies`, or made lately.

        Raises ImageSearchError if the model cannot be loaded.
        """
        with self._lock:
            copy = copies.get(image.sha256, self._recent.get(image.sha256))
        if copy is not None:
            return copy, True
        try:
            embedding = _embed(image, self._load_model())
        except ImageSearchError:
            raise
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            return Unreadable(image.name, describe_error(error)), False
        with self._lock:
            self._recent[image.sha256] = embedding
            if len(self._recent) > RECENT_SIZE:
                self._recent.popitem(last=False)
        return embedding, False

    def _load_model(self) -> Model:
        """Returns the model, loaded once; raises the same error each time if it cannot be."""
        with self._lock:
            self._model = self._model or start_thread(self._get_model)
        return self._model.result()


def _embed(image: OpenedImage, model: Model) -> Embedding:
    """Raises ValueError if the model gives no embedding that is usable."""
    with open_rgb(image.stream) as rgb:
        pixels = model.preprocess(rgb)
    embedding = model.embed(pixels)
    with np.errstate(over="ignore"):
        length = np.sqrt(np.dot(embedding, embedding))
    if not (np.isfinite(length) and length > 0):
        raise ValueError("the model gives it no usable embedding (zero, or not finite)")
    return embedding
