"""The contracts of an index, and which index is used."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from imagesearch.index.connection import Connection
from imagesearch.records import Document, Embedding, FileMetadata, IndexMetadata, MetadataUpdate, Search

INDEX_TYPES = ("hnsw", "int8_hnsw", "bbq_hnsw")  # of Elasticsearch's dense_vector


class Index(Protocol):
    """An index of embeddings, as search.py needs it. Safe to use from several threads.

    All methods raise ImageSearchError if they cannot do what they say.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    @property
    def location(self) -> str:
        """Where the index is, as messages say it: the file, or the address."""

    @property
    def max_searches(self) -> int:
        """How many searches are worth having under way at a time."""

    def get_metadata(self) -> IndexMetadata | None:
        """Returns what the index records about itself, None if it does not exist.

        Raises UsageError for an index that create.py did not make. Called before all other methods.
        """

    def list_indexes(self) -> dict[str, str]:
        """Returns the model of each index there is, by the index's name."""

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        """Returns the file metadata of those of these documents that exist, by ``_id``."""

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, Embedding]:
        """Returns the embeddings of documents with these contents, by their SHA-256 in hex."""

    def list_classes(self) -> list[str]:
        """Returns the classes (`desc`) that documents have, at most 10,000."""

    def search(self, search: Search) -> dict[str, Any]:
        """Returns Elasticsearch's response, with the nearest documents as its hits."""


class WritableIndex(Index, Protocol):
    """An index as create.py needs it."""

    def create(self, metadata: IndexMetadata) -> None:
        """Creates the index. One that exists by now, made by another run, is left as it is."""

    def write(self, items: Iterable[Document | MetadataUpdate]) -> Iterator[Document | MetadataUpdate]:
        """Writes documents in bulk and yields each one when it is stored.

        A metadata update for a document that another run has deleted is not yielded.
        """

    def count_below(self, folder: str) -> int:
        """Returns the number of documents whose `file_path` is below `folder`."""

    def list_paths(self, folder: str) -> Iterator[str]:
        """Yields the `file_path` of every document below `folder`, ordered by its UTF-8."""

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes documents; returns the number deleted."""

    def refresh(self) -> None:
        """Makes everything written visible to searches."""


def open_index(name: str, connection: Connection | None, database: Path) -> Index:
    """Returns the index `name` on Elasticsearch, or the local file `database` if there is no connection.

    Each kind is imported when it is used.
    """
    if connection is None:
        from imagesearch.index.sqlite import SqliteIndex

        return SqliteIndex(database)
    from imagesearch.index.elasticsearch import ElasticsearchIndex, open_http_session, session_transport

    session = open_http_session(connection)
    return ElasticsearchIndex(connection, name, session, session_transport(session, connection))


def open_writable_index(
    name: str, connection: Connection | None, database: Path, index_type: str | None
) -> WritableIndex:
    """Returns the index as `open_index` does, to be written to; on Elasticsearch with this `index_type`, if not None.

    The first request to Elasticsearch is not retried, later ones are for two minutes.
    """
    if connection is None:
        from imagesearch.index.sqlite import SqliteIndex

        return SqliteIndex(database)
    from imagesearch.index.elasticsearch_writer import WritableElasticsearchIndex

    return WritableElasticsearchIndex(connection, name, index_type)
