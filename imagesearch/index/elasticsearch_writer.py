"""The index on Elasticsearch, written with its Python client and the client's own helper for bulk requests."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from elastic_transport import RequestsHttpNode
from elasticsearch import ApiError, BadRequestError, Elasticsearch, OrjsonSerializer, TransportError, helpers

from imagesearch.errors import ImageSearchError, UsageError
from imagesearch.index.connection import Connection
from imagesearch.index.elasticsearch import (
    META_KEY,
    NO_STORED_FIELDS,
    RETRY_OF_A_RUN,
    TIMEOUT_SECONDS,
    Body,
    ElasticsearchIndex,
    Response,
    open_http_session,
)
from imagesearch.index.elasticsearch_errors import (
    connection_error,
    deleted_index_error,
    is_missing_index,
    response_error,
)
from imagesearch.parallel import batch_until_error, map_buffered
from imagesearch.records import BATCH_SIZE, DIMENSIONS, Document, IndexMetadata, MetadataUpdate

BULK_SIZE = 96  # documents in one bulk request, below 1 MB: nginx's default limit
BULK_REQUESTS = 4  # under way at once, so that a distant server is not waited for
DOCUMENT_RETRIES = 17  # of documents that are rejected for now, with waits of up to 8 seconds: two minutes

NETWORK_ERRORS = (TransportError, ValueError)  # ValueError: no valid host name

# Pinned, so that all versions of Elasticsearch build the same index. Shards, replicas and everything
# else are left to the cluster's index templates.
PROPERTIES: Body = {
    "embeddings": {"type": "dense_vector", "dims": DIMENSIONS, "index": True, "similarity": "cosine"},
    "desc": {"type": "keyword"},
    "file_path": {"type": "keyword"},
    "size": {"type": "long", "index": False},
    "mtime": {"type": "long", "index": False},
    "sha256": {"type": "keyword"},
}
DEFAULT_INDEX_TYPE = "hnsw"
GRAPH = {"m": 16, "ef_construction": 100}

# From 9.2 on, vectors are left out of _source, and read back from their normalized form, which loses the last bit.
KEEP_VECTORS = {"index.mapping.exclude_source_vectors": False}


class WritableElasticsearchIndex(ElasticsearchIndex):
    """A `WritableIndex` on Elasticsearch, of this `index_type`; None for that of the index, or the default."""

    def __init__(self, connection: Connection, name: str, index_type: str | None) -> None:
        session = open_http_session(connection)
        super().__init__(connection, name, session, self._send_with_client, RETRY_OF_A_RUN)
        self._wanted_type = index_type
        self._client = Elasticsearch(
            connection.url,
            node_class=RequestsHttpNode,
            request_timeout=TIMEOUT_SECONDS[1],
            max_retries=0,  # the session retries
            serializer=OrjsonSerializer(),
        )
        # The client has one node, and the node one session: ours, which has the credentials, the CA, and the retries.
        self._client.transport.node_pool.get().session = session  # type: ignore[attr-defined]

    def get_metadata(self) -> IndexMetadata | None:
        metadata = super().get_metadata()
        if metadata and self._wanted_type not in (None, self._index_type):
            raise UsageError(
                f"The index {self._name} is of type {self._index_type}, not {self._wanted_type}: leave out"
                " --index-type, or use another --index."
            )
        return metadata

    def create(self, metadata: IndexMetadata) -> None:
        meta = {META_KEY: vars(metadata.model) | {"folder": metadata.folder}}
        options = {"type": self._wanted_type or DEFAULT_INDEX_TYPE, **GRAPH}
        properties = PROPERTIES | {"embeddings": PROPERTIES["embeddings"] | {"index_options": options}}
        mappings = {"dynamic": "strict", "_meta": meta, "properties": properties}
        with self._translated_errors():
            for settings in (KEEP_VECTORS, {}):
                try:
                    self._client.indices.create(index=self._name, mappings=mappings, settings=settings)
                except BadRequestError as error:
                    if settings and "unknown setting" in str(error):  # 8.x and 9.0 know none of this
                        continue
                    if error.error != "resource_already_exists_exception":
                        raise
                break

    def count_below(self, folder: str) -> int:
        query = {"query": {"prefix": {"file_path": folder.rstrip("/") + "/"}}}
        return int(self._send("POST", self._path("_count"), query)["count"])

    def list_paths(self, folder: str) -> Iterator[str]:
        query = {"prefix": {"file_path": folder.rstrip("/") + "/"}}
        options: Body = {"size": BATCH_SIZE, "docvalue_fields": ["file_path"], "sort": [{"file_path": "asc"}]}
        options["stored_fields"] = NO_STORED_FIELDS
        while hits := self._find(query, **options):
            yield from (hit["fields"]["file_path"][0] for hit in hits)
            options["search_after"] = hits[-1]["sort"]

    def write(self, items: Iterable[Document | MetadataUpdate]) -> Iterator[Document | MetadataUpdate]:
        with ThreadPoolExecutor(BULK_REQUESTS) as pool:
            errors: list[ImageSearchError] = []
            batches = batch_until_error(items, BULK_SIZE)
            wanted = (batch for batch in iter(lambda: None if errors else next(batches, None), None))
            for written, error in map_buffered(pool, self._write_batch, wanted, BULK_REQUESTS):
                yield from written
                errors += [error] if error else []
        if errors:
            raise errors[0]

    def _write_batch(
        self, batch: Sequence[Document | MetadataUpdate]
    ) -> tuple[list[Document | MetadataUpdate], ImageSearchError | None]:
        """Writes documents; returns those that are stored, and the error that kept it from writing the others."""
        done: set[str] = set()
        error: ImageSearchError | None = None
        try:
            done.update(self._bulk([_action(item) for item in batch]))
        except ImageSearchError as some_refused:
            error = some_refused
        return [item for item in batch if item.image.id in done], error

    def delete(self, ids: Sequence[str]) -> int:
        return sum(1 for _ in self._bulk([{"_op_type": "delete", "_id": id_} for id_ in ids]))

    def _bulk(self, actions: Sequence[Body]) -> Iterator[str]:
        """Yields the ``_id`` of each action that is done, not of those whose document is not there.

        Raises ImageSearchError, after all others, if one is refused.
        """
        refused: Body = {}
        with self._translated_errors():
            for is_done, item in helpers.streaming_bulk(
                self._client,
                actions,
                index=self._concrete_index,
                chunk_size=len(actions),
                max_retries=DOCUMENT_RETRIES,
                initial_backoff=1,
                max_backoff=8,
                raise_on_error=False,
            ):
                (result,) = item.values()
                if is_done:
                    yield result["_id"]
                elif result["status"] != 404 or is_missing_index(result):
                    refused = result
        if refused:
            headers = {"X-Elastic-Product": "Elasticsearch"}
            raise response_error(refused["status"], headers, refused, self._connection, self._name)

    def refresh(self) -> None:
        """Raises ImageSearchError if the index was replaced since its metadata was read."""
        with self._translated_errors():
            self._client.indices.refresh(index=self._concrete_index)
            found = self._client.indices.get_settings(index=self._concrete_index)
        if found[self._concrete_index]["settings"]["index"]["uuid"] != self._uuid:
            raise deleted_index_error(self._concrete_index)

    def _send_with_client(self, method: str, path: str, body: Body | None) -> Response:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        try:
            response: Any = self._client.perform_request(method, f"/{path}", headers=headers, body=body)
        except ApiError as error:
            return error.meta.status, error.meta.headers, error.body
        except NETWORK_ERRORS as error:
            raise self._connection_error(error) from None
        return response.meta.status, response.meta.headers, response.body

    def _connection_error(self, error: Exception) -> ImageSearchError:
        cause = error.__context__ if isinstance(error, TransportError) else None  # the exception of requests
        return connection_error(cause or error, self._connection)

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translates the client's errors into messages that say what to do."""
        try:
            yield
        except ApiError as error:
            raise response_error(
                error.meta.status, error.meta.headers, error.body, self._connection, self._name
            ) from None
        except NETWORK_ERRORS as error:
            raise self._connection_error(error) from None


def _action(item: Document | MetadataUpdate) -> Body:
    """Returns the bulk action that brings the index up to date with `item`."""
    image = item.image
    file = {"size": image.size, "mtime": image.mtime}
    if isinstance(item, MetadataUpdate):
        return {"_op_type": "update", "_id": image.id, "retry_on_conflict": 3, "doc": file}
    fields = {"file_path": image.file_path, "desc": image.desc, "sha256": item.sha256}
    return {"_op_type": "index", "_id": image.id, **file, **fields, "embeddings": item.embedded.embedding}
