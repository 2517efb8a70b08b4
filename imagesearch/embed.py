"""Images to embeddings on all CPUs, one image at a time."""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from imagesearch.copies import Embedding, FindEmbeddings, KnownEmbeddings
from imagesearch.documents import Document, FileMetadata, ImageFile, MetadataUpdate
from imagesearch.errors import ImageSearchError, describe_error
from imagesearch.images import OnError, open_rgb
from imagesearch.models import Model
from imagesearch.parallel import available_cpus, map_buffered
from imagesearch.sources import Source

# Reader threads for each CPU. They open images, which takes long in a bucket, and wait for look-ups and embedders.
READERS_PER_CPU, MAX_READERS = 32, 256
BUFFER_PER_CPU = 64  # results, of 3 kB each, that may wait for the index


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Why there is no embedding of an image or query."""

    reason: str


def embed_images(
    changed: Iterable[tuple[ImageFile, FileMetadata | None]],
    source: Source,
    model: Model,
    find_embeddings: FindEmbeddings,
    on_error: OnError,
) -> Generator[Document | MetadataUpdate, None, None]:
    """Yields what is to be written for each image, in order.

    `changed` has each image with what the index holds of it, None for a new one. The embedding of
    content that is in the index, or was embedded earlier in this run, is copied. `on_error` is called for
    each image that cannot be read. Memory is bounded, however many images there are.
    """
    cpus = available_cpus()
    source_error: ImageSearchError | None = None
    with (
        ThreadPoolExecutor(cpus) as embedders,
        KnownEmbeddings(find_embeddings) as known,
        ThreadPoolExecutor(_reader_count(cpus)) as readers,
    ):

        def embed_one(
            item: tuple[ImageFile, FileMetadata | None],
        ) -> tuple[ImageFile, Document | MetadataUpdate | _Unreadable]:
            nonlocal source_error
            image, indexed = item
            if source_error:  # the images that wait in the buffer are not retried, each for its own time
                raise source_error
            try:
                with source.open_image(image) as (image, stream):
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
                    if indexed and indexed.sha256 == sha256:
                        return image, MetadataUpdate(image)
                    embedding, is_copy = known.get(sha256, lambda: embedders.submit(_embed, stream, model).result())
                    return image, Document(image, sha256, embedding, indexed is not None, is_copy)
            except ImageSearchError as error:  # the source stays unreachable: the run ends
                source_error = error
                raise
            except Exception as error:  # Pillow raises nearly anything for a damaged file
                return image, _Unreadable(describe_error(error))

        for image, result in map_buffered(readers, embed_one, changed, BUFFER_PER_CPU * cpus):
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
    with open_rgb(stream) as image:
        pixels = model.preprocess(image)
    embedding = model.embed(pixels)
    with np.errstate(over="ignore"):
        length = np.sqrt(np.dot(embedding, embedding))
    if not (np.isfinite(length) and length > 0):
        raise ValueError("the model gives it no usable embedding (zero, or not finite)")
    return embedding
