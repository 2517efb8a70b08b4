"""The contract of an index, and which index is used."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from imagesearch.connection import Connection
from imagesearch.documents import Document, FileMetadata, IndexMetadata, MetadataUpdate
from imagesearch.retry import NO_RETRY, RetryPolicy


class Index(Protocol):
    """An index of embeddings. All methods raise ImageSearchError if they cannot do what they say."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def get_metadata(self) -> IndexMetadata | None:
        """Returns what the index records about itself, None if it does not exist.

        Raises UsageError for an index that create.py did not make. Called before all other methods.
        """

    def create(self, metadata: IndexMetadata) -> None:
        """Creates the index. One that exists by now, made by another run, is left as it is."""

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        """Returns the file metadata of those of these documents that exist, by ``_id``."""

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Returns the embeddings, shape (768,), of documents with these contents, by their SHA-256 in hex."""

    def write(self, items: Iterable[Document | MetadataUpdate]) -> Iterator[Document | MetadataUpdate]:
        """Writes documents in bulk and yields each one when it is stored.

        A metadata update for a document that another run has deleted is not yielded.
        """

    def list_paths(self, folder: str) -> Iterator[tuple[str, str]]:
        """Yields ``_id`` and `file_path` of every document below `folder`, ordered by `file_path` as UTF-8."""

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes documents; returns the number deleted."""

    def refresh(self) -> None:
        """Makes everything written visible to searches."""

    def count_classes(self) -> dict[str, int]:
        """Returns the number of documents of each class (`desc`)."""

    def search(
        self, embedding: NDArray[np.float32], k: int, desc: str | None = None, min_score: float | None = None
    ) -> dict[str, Any]:
        """Returns Elasticsearch's response with the `k` documents nearest to `embedding`, shape (768,).

        With `desc` only documents of this class, with `min_score` only those that score at least this.
        """


def open_index(name: str, connection: Connection | None, database: Path, retry: RetryPolicy = NO_RETRY) -> Index:
    """Returns the index `name` on Elasticsearch, or in the file `database` if there is no connection.

    Each kind is imported when it is used.
    """
    if connection is None:
        from imagesearch.sqlite_index import SqliteIndex

        return SqliteIndex(database, name)
    from imagesearch.elasticsearch_index import ElasticsearchIndex

    return ElasticsearchIndex(connection, name, retry)
