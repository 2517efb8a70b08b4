"""The contract of an index, and which one is used."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from imagesearch.index.connection import Connection
from imagesearch.records import Document, Embedding, FileMetadata, IndexMetadata, ModelInfo, Search

INDEX_TYPES = ("int8_hnsw", "hnsw", "bbq_hnsw")  # index_options.type of a dense_vector


class Index(Protocol):
    """An index of embeddings. Safe to use from several threads.

    All methods raise ImageSearchError if they cannot do what they say.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    @property
    def location(self) -> str:
        """Where the index is, as messages say it: the file, or the address."""

    @property
    def metadata(self) -> IndexMetadata | None:
        """What the index recorded about itself when it was opened or created; None if it does not exist."""

    @property
    def base(self) -> str:
        """The absolute folder, an operating system path, that a `file_path` of ``./…`` is relative to."""

    @property
    def searches_at_once(self) -> int:
        """How many searches are worth asking for together."""

    def list_indexes(self) -> dict[str, str]:
        """Returns the model of each index there is, by the index's name."""

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        """Returns the file metadata of those of these documents that exist, by ``_id``."""

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, Embedding]:
        """Returns the embeddings of documents with these contents, by their SHA-256 in hex."""

    def list_classes(self) -> list[str]:
        """Returns the classes (`desc`) that documents have, at most 10,000."""

    def search(self, searches: Sequence[Search]) -> list[dict[str, Any]]:
        """Returns Elasticsearch's response to each search, with the nearest documents as its hits.

        The searches have the same `k`, `desc` and `min_score`.
        """

    def create(self, metadata: IndexMetadata) -> None:
        """Creates the index, and reads its metadata: one that another run has made by now is left as it is."""

    def record_model(self, model: ModelInfo) -> None:
        """Records the model under another name: its file was moved."""

    def write(self, documents: Sequence[Document]) -> list[Document]:
        """Writes documents together; returns those that are stored.

        One without an embedding, whose document another run has deleted, is not.
        """

    def count_below(self, folder: str) -> int:
        """Returns the number of documents whose `file_path` is below `folder`."""

    def list_paths(self, folder: str) -> Iterator[str]:
        """Yields the `file_path` of every document below `folder`, ordered by its UTF-8."""

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes documents; returns the number deleted."""

    def refresh(self) -> None:
        """Makes everything written visible to searches."""


def open_index(
    name: str,
    connection: Connection | None,
    database: Path,
    *,
    index_type: str | None = None,
    long_retries: bool = False,
) -> Index:
    """Returns the index `name` on Elasticsearch, or the local file `database` if there is no connection.

    Its metadata has been read; it need not exist. On Elasticsearch, it must be of this `index_type`, if not None, and
    requests are repeated for two minutes if `long_retries`, otherwise for some seconds; but not the first one, so that
    a wrong address is reported at once. Raises UsageError for an index that create.py did not make. Each kind is
    imported when it is used.
    """
    if connection is None:
        from imagesearch.index.sqlite import SqliteIndex

        return SqliteIndex(database)
    from imagesearch.index.elasticsearch import ElasticsearchIndex

    return ElasticsearchIndex(connection, name, index_type, long_retries)
