"""The index on Elasticsearch: written with its Python client, searched with requests."""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

import numpy as np
import requests
from numpy.typing import NDArray
from requests.adapters import HTTPAdapter

from imagesearch.connection import Connection
from imagesearch.documents import DIMENSIONS, Document, FileMetadata, IndexMetadata, MetadataUpdate, ModelInfo
from imagesearch.elasticsearch_errors import (
    connection_error,
    deleted_index_error,
    error_reason,
    hint,
    is_certificate_error,
    is_missing_index,
    is_retryable,
    response_error,
    translate_error,
)
from imagesearch.errors import ImageSearchError, UsageError
from imagesearch.parallel import batched
from imagesearch.retry import NO_RETRY, RetryableError, RetryPolicy

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

Result = TypeVar("Result")
Body = dict[str, Any]
Pending = dict[str, list[Any]]  # by _id, the lines of the bulk actions that are not done yet, as JSON

REQUEST_TIMEOUT_SECONDS = 60
CONNECT_TIMEOUT_SECONDS = 10
BULK_SIZE = 128  # documents in one bulk request: about 1 MB
PAGE_SIZE = 1000  # documents in one page of a listing
MIN_CANDIDATES, MAX_CANDIDATES = 500, 10_000  # Elasticsearch's limit is 10,000

META_KEY = "imagesearch"  # in the mapping's _meta, which index templates may share

# Pinned, so that Elasticsearch 8.19 and 9.x build the same index. Shards, replicas and everything
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


class _SSLContextAdapter(HTTPAdapter):
    """Sends requests with an SSLContext of our own, which requests has no option for."""

    def __init__(self, context: Any) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)


class ElasticsearchIndex:
    """An `Index` on Elasticsearch. `index` is its name, or an alias of one index.

    The index that the name points to is remembered when its metadata is read. If the name later points
    to another index, writing raises ImageSearchError, since embeddings of another model may be there.
    Writing and looking up are retried by `retry` while Elasticsearch is unreachable or overloaded;
    searching and reading metadata try each host once.
    """

    def __init__(self, connection: Connection, index: str, retry: RetryPolicy) -> None:
        self._connection = connection
        self._index = index
        self._retry = retry
        self._hosts = list(connection.hosts)
        self._concrete_index = index
        self._uuid: str | None = None
        self._bulk_size = BULK_SIZE
        self._metadata: IndexMetadata | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if "_client" in self.__dict__:
            self._client.close()
        if "_session" in self.__dict__:
            self._session.close()

    @functools.cached_property
    def _client(self) -> "Elasticsearch":
        """The client that writes; imported late, since importing it takes longer than a search."""
        from elasticsearch import Elasticsearch, OrjsonSerializer

        options: dict[str, Any] = {}
        if context := self._connection.ssl_context():
            options = {"ssl_context": context}
        elif self._connection.uses_tls and not self._connection.verify_certs:
            options = {"verify_certs": False, "ssl_show_warn": False}
        return Elasticsearch(
            list(self._connection.hosts),
            headers=self._connection.headers,
            request_timeout=REQUEST_TIMEOUT_SECONDS,
            serializer=OrjsonSerializer(),
            **options,
        )

    @functools.cached_property
    def _session(self) -> requests.Session:
        """The session that searches, with the client's hosts, credentials and CA, and no others."""
        session = requests.Session()
        session.trust_env = False  # no .netrc and no proxies: the client reads neither
        session.headers.update(self._connection.headers)
        if context := self._connection.ssl_context():
            session.verify = self._connection.ca_certs or True
            session.mount("https://", _SSLContextAdapter(context))
        elif not self._connection.verify_certs:
            session.verify = False
            warnings.filterwarnings("ignore", "Unverified HTTPS request")  # cli.py has warned already
        return session

    def get_metadata(self) -> IndexMetadata | None:
        status, body = self._request("GET", quote(self._index))
        if status == 404:
            return None
        if status != 200:
            raise UsageError(f"The index {self._index} cannot be read: {error_reason(body)}. {hint(body)}")
        if len(body) != 1:
            raise UsageError(
                f"{self._index} is an alias of several indices ({', '.join(sorted(body))}): use one with --index."
            )
        ((concrete_index, index),) = body.items()
        self._metadata = _read_metadata(self._index, index["mappings"])
        self._concrete_index, self._uuid = concrete_index, index["settings"]["index"]["uuid"]
        return self._metadata

    def create(self, metadata: IndexMetadata) -> None:
        meta = {META_KEY: vars(metadata.model) | {"folder": metadata.folder}}
        mappings = {"dynamic": "strict", "_meta": meta, "properties": PROPERTIES}

        def create_index(settings: Body) -> None:
            from elasticsearch import BadRequestError

            try:
                self._client.indices.create(index=self._index, mappings=mappings, settings=settings)
            except BadRequestError as error:
                if settings and "unknown setting" in str(error):  # 8.x and 9.0 know none of this
                    create_index({})
                elif error.error != "resource_already_exists_exception":
                    raise

        self._with_retries(lambda: create_index(KEEP_VECTORS))

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        fields = ["size", "mtime", "sha256"]
        hits = self._search_all({"ids": {"values": list(ids)}}, size=len(ids), docvalue_fields=fields)
        return {hit["_id"]: FileMetadata(*(hit["fields"][name][0] for name in fields)) for hit in hits}

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        options = {"fields": ["embeddings"], "docvalue_fields": ["sha256"], "size": 2 * len(sha256s)}
        query = {"terms": {"sha256": list(sha256s)}}
        # Not retried: an unreachable index has no copies to offer, and the run has to continue.
        hits = self._search_all(query, retry=NO_RETRY, **options)
        if len(hits) == options["size"]:  # many copies of one content may hide another; collapsing costs more
            hits = self._search_all(query, retry=NO_RETRY, collapse={"field": "sha256"}, **options)
        return {hit["fields"]["sha256"][0]: np.array(hit["fields"]["embeddings"], np.float32) for hit in hits}

    def list_paths(self, folder: str) -> Iterator[tuple[str, str]]:
        page: dict[str, Any] = {}
        while hits := self._search_all(
            {"prefix": {"file_path": folder.rstrip("/") + "/"}},
            size=PAGE_SIZE,
            docvalue_fields=["file_path"],
            sort=[{"file_path": "asc"}],
            **page,
        ):
            yield from ((hit["_id"], hit["fields"]["file_path"][0]) for hit in hits)
            page = {"search_after": hits[-1]["sort"]}

    def count_classes(self) -> dict[str, int]:
        aggregation = {"classes": {"terms": {"field": "desc", "size": MAX_CANDIDATES}}}
        status, body = self._request("POST", f"{quote(self._index)}/_search", {"size": 0, "aggs": aggregation})
        if status != 200 or body["_shards"]["failed"]:
            raise ImageSearchError(f"Elasticsearch cannot list the classes of {self._index}: {error_reason(body)}.")
        return {bucket["key"]: bucket["doc_count"] for bucket in body["aggregations"]["classes"]["buckets"]}

    def write(self, items: Iterable[Document | MetadataUpdate]) -> Iterator[Document | MetadataUpdate]:
        for batch in batched(items, BULK_SIZE):
            pending: Pending = {item.image.id: _bulk_action(self._index, item) for item in batch}
            missing: set[str] = set()
            error: ImageSearchError | None = None
            try:
                self._send_pending(pending, missing)
            except ImageSearchError as some_refused:
                error = some_refused
            else:
                self._ensure_same_index()  # otherwise nothing of this batch is stored where it should be
            unwritten = pending.keys() | missing
            yield from (item for item in batch if item.image.id not in unwritten)
            if error:
                raise error

    def delete(self, ids: Sequence[str]) -> int:
        pending: Pending = {id_: [_dumps({"delete": {"_index": self._index, "_id": id_}})] for id_ in ids}
        missing: set[str] = set()
        if pending:
            self._send_pending(pending, missing)
            self._ensure_same_index()
        return len(ids) - len(missing)

    def refresh(self) -> None:
        self._with_retries(lambda: self._client.indices.refresh(index=self._index))

    def search(
        self, embedding: NDArray[np.float32], k: int, desc: str | None = None, min_score: float | None = None
    ) -> dict[str, Any]:
        # The candidates are found by their int8 vectors; twice as many as are asked for are scored
        # again by their exact ones. docs/scaling.md has the recall that this gives.
        knn: Body = {
            "field": "embeddings",
            "query_vector": embedding.tolist(),
            "k": k,
            "num_candidates": min(MAX_CANDIDATES, max(MIN_CANDIDATES, 10 * k)),
            "rescore_vector": {"oversample": 2},
        }
        body: Body = {"knn": knn, "size": k, "_source": False, "fields": ["file_path", "desc"]}
        if desc is not None:
            knn["filter"] = {"term": {"desc": desc}}
        if min_score is not None:
            knn["similarity"] = 2 * min_score - 1  # the cosine
            body["min_score"] = min_score
        return self._search_once(body) or self._search_moved(body)

    def _search_once(self, body: Body) -> dict[str, Any] | None:
        """Returns the response, or None if the name no longer points to the index whose metadata was read."""
        status, response = self._request("POST", f"{quote(self._index)}/_search", body)
        if status == 200:
            moved = any(hit["_index"] != self._concrete_index for hit in response["hits"]["hits"])
            return None if moved else response
        if status == 404:
            return None
        reason = error_reason(response)
        if "rescore_vector" in reason:
            raise UsageError("This Elasticsearch is too old: search.py needs version 8.18 or newer (rescore_vector).")
        raise ImageSearchError(f"Elasticsearch cannot search the index {self._index}: {reason}.")

    def _search_moved(self, body: Body) -> dict[str, Any]:
        """Repeats a search that was cut off because the name was moved to another index."""
        before = self._metadata
        after = self.get_metadata()
        if after is None:
            raise ImageSearchError(f"The index {self._index} was deleted during the search.")
        compatible = before and after and before.model.is_compatible(after.model)
        response = self._search_once(body) if compatible else None
        if response is None:
            raise ImageSearchError(f"{self._index} now points to another index. Run the command again.")
        return response

    def _request(self, method: str, path: str, body: Body | None = None) -> tuple[int, dict[str, Any]]:
        """Sends one request to the first host that answers; returns the status and the JSON body.

        Raises UsageError if no host answers, or if something other than this user's Elasticsearch does.
        """
        error: UsageError | None = None
        for host in self._hosts.copy():
            try:
                response = self._session.request(
                    method,
                    f"{host}/{path}",
                    json=body,
                    timeout=(CONNECT_TIMEOUT_SECONDS, REQUEST_TIMEOUT_SECONDS),
                    allow_redirects=False,  # a POST would become a GET without its body
                )
            except (requests.exceptions.RequestException, ValueError) as exception:  # ValueError: no valid host name
                error = connection_error(exception, self._connection, host)
                if is_certificate_error(exception):
                    break
                continue
            error = response_error(response, host, self._connection)
            if response.status_code in (502, 503, 504) and host != self._hosts[-1]:
                continue
            if error:
                break
            self._hosts.sort(key=lambda other: other != host)  # the next request goes there first
            return response.status_code, response.json()
        raise error or UsageError("ES_URL names no host.")

    def _search_all(self, query: Body, retry: RetryPolicy | None = None, **options: Any) -> list[dict[str, Any]]:
        """Returns all hits of a search on all shards; retried while a shard is missing."""

        def search() -> list[dict[str, Any]]:
            response = self._client.search(
                index=self._index, query=query, source=False, track_total_hits=False, **options
            )
            if response["_shards"]["failed"] or response["timed_out"]:
                raise RetryableError(f"a shard of the index {self._index} is missing")
            hits: list[dict[str, Any]] = response["hits"]["hits"]
            return hits

        return self._with_retries(search, retry)

    def _send_pending(self, pending: Pending, missing: set[str]) -> None:
        """Sends bulk actions, by ``_id``, and removes from `pending` what Elasticsearch has done.

        `missing` receives the documents that are not there to update or delete.
        """
        while pending:
            ids = list(itertools.islice(pending, self._bulk_size))
            self._with_retries(functools.partial(self._send_bulk, pending, missing, ids))

    def _send_bulk(self, pending: Pending, missing: set[str], ids: list[str]) -> None:
        """Sends those of the actions `ids` that are still pending.

        If a proxy finds the request too large, nothing is done, and the next ones are half as large.
        Raises RetryableError if actions were rejected temporarily, ImageSearchError if permanently.
        """
        from elasticsearch import ApiError

        ids = [id_ for id_ in ids if id_ in pending]
        try:
            response = self._client.bulk(operations=list(itertools.chain.from_iterable(pending[id_] for id_ in ids)))
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
                raise deleted_index_error(self._index)
            if not is_retryable(result["status"], result["error"]):
                raise ImageSearchError(f"Elasticsearch refused documents: {error_reason(result)}. {hint(result)}")
        if rejected:
            reason = f"Elasticsearch temporarily rejected {len(rejected)} documents ({error_reason(rejected[0])})"
            raise RetryableError(reason, progress=len(rejected) < len(ids))

    def _ensure_same_index(self) -> None:
        """Raises ImageSearchError if the name no longer points to the index whose metadata was read.

        If that index was deleted, Elasticsearch has created another one from the bulk request, with a guessed
        mapping. It is deleted; if that is not permitted, its missing metadata keeps others from using it.
        """
        from elasticsearch import ApiError

        found = self._with_retries(
            lambda: dict(self._client.indices.get(index=self._index, ignore_unavailable=True, allow_no_indices=True))
        )
        uuids = {name: index["settings"]["index"]["uuid"] for name, index in found.items()}
        if uuids == {self._concrete_index: self._uuid}:
            return
        if found and not (self._index in found and _is_guessed(found[self._index]["mappings"])):
            raise ImageSearchError(f"{self._index} now points to another index. Run the command again.")
        if found:
            try:
                self._client.indices.delete(index=self._index)
            except ApiError:
                raise ImageSearchError(
                    f"The index {self._index} was deleted during the run, and Elasticsearch created another one from"
                    " what this run wrote, with a guessed mapping. Delete it, then run the command again."
                ) from None
        raise deleted_index_error(self._index)

    def _with_retries(self, function: Callable[[], Result], retry: RetryPolicy | None = None) -> Result:
        """Returns ``function()``, retried while Elasticsearch is unreachable or overloaded.

        By the index's own policy, unless another one is given.
        """
        from elasticsearch import ApiError, TransportError

        def attempt() -> Result:
            try:
                return function()
            except (ApiError, TransportError) as error:
                raise translate_error(error, self._connection, self._index) from None

        return (retry or self._retry).call("Elasticsearch", attempt)


def _read_metadata(index: str, mappings: dict[str, Any]) -> IndexMetadata:
    """Returns what create.py recorded in the mapping. Raises UsageError for an index that it did not make."""
    meta = dict(mappings.get("_meta", {}).get(META_KEY, {}))
    dims = mappings.get("properties", {}).get("embeddings", {}).get("dims")
    try:
        folder = meta.pop("folder")
        metadata = IndexMetadata(ModelInfo(**meta), folder)
    except (KeyError, TypeError):
        metadata = None
    if metadata is None or dims != DIMENSIONS:
        raise UsageError(
            f"The index {index} was not made by this version of create.py: it has no record of its model."
            " Use --index with another name, or delete the index and run create.py again."
        )
    return metadata


def _is_guessed(mappings: dict[str, Any]) -> bool:
    """Returns True for a mapping that Elasticsearch has guessed from our documents."""
    return (
        "dynamic" not in mappings
        and "_meta" not in mappings
        and mappings.get("properties", {}).keys() <= PROPERTIES.keys()
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
    import orjson

    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
