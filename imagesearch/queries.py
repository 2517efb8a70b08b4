"""Queries to embeddings: an image to search for may be a file, an object, a URL, or standard input."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from imagesearch.embed import CHUNK_SIZE, Embedder
from imagesearch.errors import describe_error
from imagesearch.files import raise_open_file_limit
from imagesearch.index import Index
from imagesearch.models import Model
from imagesearch.parallel import available_cpus, make_chunks, map_buffered
from imagesearch.records import Embedding, OpenedImage, Unreadable
from imagesearch.sources import OpenQuery, is_path

QUERY_READERS = 16  # threads that open queries; most of a download is waiting


@dataclass(frozen=True, slots=True)
class Query:
    """An image to search for, with its embedding or the reason why there is none."""

    name: str
    embedding: Embedding | Unreadable


def embed_queries(
    queries: Iterable[str], open_query: OpenQuery, get_model: Callable[[], Model], index: Index
) -> Generator[Query, None, None]:
    """Yields each query with its embedding, in order.

    That of content that the index has is copied; `get_model` is called if there is other content.
    """
    embedder = Embedder(get_model, index, available_cpus())

    def embed_chunk(chunk: Sequence[str]) -> list[Query]:
        with contextlib.ExitStack() as stack:
            opened = [_open(query, open_query, stack) for query in chunk]
            copies = embedder.find_copies(opened)
            with embedder.cpu_slots:
                return [
                    Query(query, image if isinstance(image, Unreadable) else embedder.embed(image, copies)[0])
                    for query, image in zip(chunk, opened, strict=True)
                ]

    # What is kept in memory is a chunk of its own: chunks that hold some and wait for room would wait for each other.
    size = max(1, min(CHUNK_SIZE, raise_open_file_limit() // 2 // QUERY_READERS))
    chunks = make_chunks(queries, size, QUERY_READERS, lambda query: 0 if is_path(query) else 1)
    with ThreadPoolExecutor(QUERY_READERS) as pool:
        for embedded in map_buffered(pool, embed_chunk, chunks, QUERY_READERS + 1):
            yield from embedded


def _open(query: str, open_query: OpenQuery, stack: contextlib.ExitStack) -> OpenedImage | Unreadable:
    try:
        return stack.enter_context(open_query(query))
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        return Unreadable(query, describe_error(error))
