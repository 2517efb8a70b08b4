"""The index on Elasticsearch, written with its Python client, which spreads requests over the live nodes.

Not with the client's ``helpers.streaming_bulk``: it limits how often it retries, not for how long, cannot be
interrupted, and has no way to tell the user.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote

import orjson
from elasticsearch import ApiError, BadRequestError, Elasticsearch, OrjsonSerializer, TransportError

from imagesearch.connection import Connection
from imagesearch.elasticsearch_errors import (
    SIZE_HINT,
    authentication_error,
    connection_error,
    deleted_index_error,
    error_reason,
    hint,
    is_missing_index,
    is_retryable,
    moved_index_error,
)
from imagesearch.elasticsearch_search import META_KEY, REQUEST_TIMEOUT_SECONDS, Body, ElasticsearchSearch
from imagesearch.errors import ImageSearchError, LostIndexError, UsageError
from imagesearch.parallel import batch_until_error, map_buffered
from imagesearch.records import BATCH_SIZE, DIMENSIONS, Document, IndexMetadata, MetadataUpdate
from imagesearch.retry import Retry, RetryableError

T = TypeVar("T")

Pending = dict[str, list[Any]]  # by _id, the lines of the bulk actions that are not done yet, as JSON

BULK_SIZE = 128  # documents in one bulk request: about 1 MB
DEAD_NODE_SECONDS = 60  # for which a node that has failed gets no requests, if there are others
BULK_REQUESTS = 4  # under way at once, so that a distant server is not waited for

# Pinned, so that all versions of Elasticsearch build the same index. Shards, replicas and everything
# else are left to the cluster's index templates.
PROPERTIES = {
    "embeddings": {
        "type": "dense_vector",
        "dims": DIMENSIONS,
        "index": True,
        "similarity": "cosine",
        "index_options": {"type": "int8_hnsw", "m": 16, "ef_construction": 100},
    },
    "desc": {"type": "keyword"},
    "file_path": {"type": "keyword"},
    "size": {"type": "long", "index": False},
    "mtime": {"type": "long", "index": False},
    "sha256": {"type": "keyword"},
}

# From 9.2 on, vectors are left out of _source, and read back from their normalized form, which loses the last bit.
KEEP_VECTORS = {"index.mapping.exclude_source_vectors": False}


class ElasticsearchIndex(ElasticsearchSearch):
    """A `WritableIndex` on Elasticsearch. What it does is retried by `retry` while Elasticsearch is unreachable."""

    def __init__(self, connection: Connection, name: str, retry: Retry) -> None:
        super().__init__(connection, name, retry)
        self._bulk_size = BULK_SIZE
        options: dict[str, Any] = {}
        if context := connection.ssl_context():
            options = {"ssl_context": context}
        elif connection.uses_tls and not connection.verify_certs:
            options = {"verify_certs": False, "ssl_show_warn": False}
        self._client = Elasticsearch(
            list(connection.hosts),
            headers=connection.headers,
            request_timeout=retry.request_timeout(REQUEST_TIMEOUT_SECONDS),
            serializer=OrjsonSerializer(),
            # Doubled with each failure: a node that is frozen would otherwise be tried again after a second.
            dead_node_backoff_factor=DEAD_NODE_SECONDS,
            max_dead_node_backoff=10 * DEAD_NODE_SECONDS,
            **options,
        )

    def __exit__(self, *exception: object) -> None:
        _, error, _ = exception  # its type, itself, its traceback
        try:
            if isinstance(error, ImageSearchError) and self._uuid and not self._retry.is_outage:
                self._ensure_same_index()  # which may be why it failed
        except LostIndexError:
            raise
        except ImageSearchError:  # the error that ended the run is reported, not this one
            pass
        finally:
            super().__exit__()
            self._client.close()

    def create(self, metadata: IndexMetadata) -> None:
        meta = {META_KEY: vars(metadata.model) | {"folder": metadata.folder}}
        mappings = {"dynamic": "strict", "_meta": meta, "properties": PROPERTIES}

        def create_index(settings: Body) -> None:
            try:
                self._client.indices.create(index=self._name, mappings=mappings, settings=settings)
            except BadRequestError as error:
                if settings and "unknown setting" in str(error):  # 8.x and 9.0 know none of this
                    create_index({})
                elif error.error != "resource_already_exists_exception":
                    raise

        self._with_client(lambda: create_index(KEEP_VECTORS))

    def count_below(self, folder: str) -> int:
        query = {"query": {"prefix": {"file_path": folder.rstrip("/") + "/"}}}
        status, body = self._retried(lambda: self._send("POST", f"{quote(self._name)}/_count", query))
        if status != 200 or body["_shards"]["failed"]:
            raise ImageSearchError(f"Elasticsearch cannot count the documents of {self._name}: {error_reason(body)}.")
        return int(body["count"])

    def list_paths(self, folder: str) -> Iterator[str]:
        query = {"prefix": {"file_path": folder.rstrip("/") + "/"}}
        options: Body = {"size": BATCH_SIZE, "docvalue_fields": ["file_path"], "sort": [{"file_path": "asc"}]}
        while hits := self._retried(lambda: self._search_all(query, **options)):
            yield from (hit["fields"]["file_path"][0] for hit in hits)
            options["search_after"] = hits[-1]["sort"]

    def write(self, items: Iterable[Document | MetadataUpdate]) -> Iterator[Document | MetadataUpdate]:
        errors: list[ImageSearchError] = []  # after the first one, nothing more is sent

        def batches() -> Iterator[list[Document | MetadataUpdate]]:
            batches = batch_until_error(items, BULK_SIZE)
            while not errors and (batch := next(batches, None)):
                yield batch

        with ThreadPoolExecutor(BULK_REQUESTS) as pool:
            for written, error in map_buffered(pool, self._write_batch, batches(), BULK_REQUESTS):
                yield from written
                if error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def delete(self, ids: Sequence[str]) -> int:
        self._ensure_same_index()
        pending: Pending = {id_: [_dumps({"delete": {"_index": self._name, "_id": id_}})] for id_ in ids}
        missing: set[str] = set()
        self._send_pending(pending, missing)
        return len(ids) - len(missing)

    def refresh(self) -> None:
        self._with_client(lambda: self._client.indices.refresh(index=self._name))
        self._ensure_same_index()

    def _write_batch(
        self, batch: Sequence[Document | MetadataUpdate]
    ) -> tuple[list[Document | MetadataUpdate], ImageSearchError | None]:
        """Writes documents; returns those that are stored, and the error that kept it from writing the others."""
        pending: Pending = {item.image.id: _bulk_action(self._name, item) for item in batch}
        missing: set[str] = set()
        error: ImageSearchError | None = None
        try:
            self._send_pending(pending, missing)
        except ImageSearchError as some_refused:
            error = some_refused
        unwritten = pending.keys() | missing
        return [item for item in batch if item.image.id not in unwritten], error

    def _send_pending(self, pending: Pending, missing: set[str]) -> None:
        """Sends bulk actions, by ``_id``, and removes from `pending` what Elasticsearch has done.

        The documents that are not there to update or delete are added to `missing`.
        """
        while pending:
            ids = list(itertools.islice(pending, self._bulk_size))
            self._with_client(functools.partial(self._send_bulk, pending, missing, ids))

    def _send_bulk(self, pending: Pending, missing: set[str], ids: list[str]) -> None:
        """Sends those of the actions `ids` that are still pending; adds the documents that are not there to `missing`.

        If a proxy finds the request too large, nothing is done, and the next ones are half as large.
        Raises RetryableError if actions were rejected temporarily, ImageSearchError if permanently.
        """
        ids = [id_ for id_ in ids if id_ in pending]
        try:
            response = self._client.bulk(operations=[line for id_ in ids for line in pending[id_]])
        except ApiError as error:
            if error.status_code != 413 or len(ids) == 1:
                raise
            self._bulk_size = len(ids) // 2
            return
        rejected: list[dict[str, Any]] = []
        for item in response["items"]:
            (result,) = item.values()
            if result["_index"] != self._concrete_index:
                self._ensure_same_index()
            error_type = (result.get("error") or {}).get("type")
            if error_type == "document_missing_exception" or result.get("result") == "not_found":
                missing.add(result["_id"])
            elif error_type is not None:
                rejected.append(result)
                continue
            del pending[result["_id"]]
        for result in rejected:
            if is_missing_index(result):
                raise deleted_index_error(self._name)
            if not is_retryable(result["status"], result["error"]):
                raise ImageSearchError(f"Elasticsearch refused documents: {error_reason(result)}.{hint(result)}")
        if rejected:
            reason = f"Elasticsearch temporarily rejected {len(rejected)} documents ({error_reason(rejected[0])})"
            raise RetryableError(reason, partially_done=len(rejected) < len(ids))

    def _ensure_same_index(self) -> None:
        """Raises ImageSearchError if the name no longer points to the index whose metadata was read.

        If that index was deleted, Elasticsearch has created another one from the bulk requests, with a guessed
        mapping. It is deleted; if that is not permitted, its missing metadata keeps others from using it.
        """
        found = self._with_client(
            lambda: dict(self._client.indices.get(index=self._name, ignore_unavailable=True, allow_no_indices=True))
        )
        uuids = {name: index["settings"]["index"]["uuid"] for name, index in found.items()}
        if uuids == {self._concrete_index: self._uuid}:
            return
        if found and not (self._name in found and _is_guessed(found[self._name]["mappings"])):
            raise moved_index_error(self._name)
        if found:
            try:
                self._client.indices.delete(index=self._name)
            except ApiError:
                raise ImageSearchError(
                    f"The index {self._name} was deleted during the run, and Elasticsearch created another one from"
                    " what this run wrote, with a guessed mapping. Delete it, then run the command again."
                ) from None
        raise deleted_index_error(self._name)

    def _with_client(self, function: Callable[[], T]) -> T:
        """Returns ``function()``, which uses the client; retried while Elasticsearch is unreachable or overloaded."""

        def attempt() -> T:
            try:
                return function()
            except (ApiError, TransportError) as error:
                raise _translate_error(error, self._connection, self._name) from None

        return self._retried(attempt)


def _translate_error(error: ApiError | TransportError, connection: Connection, index: str) -> Exception:
    """Returns the exception to raise in place of one of the elasticsearch client's.

    A RetryableError if waiting may help, otherwise an ImageSearchError with a hint.
    """
    if not isinstance(error, ApiError):
        return connection_error(error, connection)
    body = error.body if isinstance(error.body, dict) else {}
    reason = error_reason(body) if body else f"HTTP {error.status_code}"
    if error.status_code == 401:
        return authentication_error(connection)
    if error.status_code == 403:
        return UsageError(f"Elasticsearch denied access (HTTP 403): {reason}.{hint(body)}")
    if error.status_code == 413:
        return UsageError(f"{connection} refused a request because it is too large (HTTP 413): {SIZE_HINT}.")
    if is_missing_index(body):
        return deleted_index_error(index)
    if is_retryable(error.status_code, body.get("error")):
        return RetryableError(reason)
    return ImageSearchError(f"Elasticsearch refused a request: {reason}.{hint(body)}")


def _is_guessed(mappings: Body) -> bool:
    """Returns True for a mapping that Elasticsearch has guessed from our documents."""
    return (
        "dynamic" not in mappings
        and "_meta" not in mappings
        and {"size", "mtime"} <= mappings.get("properties", {}).keys() <= PROPERTIES.keys()
    )


def _bulk_action(index: str, item: Document | MetadataUpdate) -> list[bytes]:
    """Returns the two lines of the bulk action that brings the index up to date with `item`."""
    image = item.image
    body: Body = {"size": image.size, "mtime": image.mtime}
    target = {"_index": index, "_id": image.id}
    if isinstance(item, MetadataUpdate):
        return [_dumps({"update": target | {"retry_on_conflict": 3}}), _dumps({"doc": body})]
    body |= {"file_path": image.file_path, "desc": image.desc, "sha256": item.sha256, "embeddings": item.embedding}
    return [_dumps({"index": target}), _dumps(body)]


def _dumps(value: Body) -> bytes:
    """Returns `value` as JSON; numpy's vectors are taken as they are, 15 times faster than as lists."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
