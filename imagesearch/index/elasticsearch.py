"""The index on Elasticsearch.

It is read and searched with requests, as in IBM's tutorial, and written with the elasticsearch client, which takes a
third of a second to import and so is imported when something is first written. Both send with one session.
"""

import functools
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import orjson
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from imagesearch.console import say_now_and_then
from imagesearch.errors import ImageSearchError, UsageError
from imagesearch.index.connection import Connection
from imagesearch.index.elasticsearch_errors import (
    connection_error,
    deleted_index_error,
    is_blocked,
    is_missing_index,
    missing_shards_error,
    network_reason,
    response_error,
)
from imagesearch.locations import base_of
from imagesearch.records import (
    BATCH_SIZE,
    DIMENSIONS,
    MAX_K,
    SCORE_TOLERANCE,
    Document,
    Embedding,
    FileMetadata,
    IndexMetadata,
    ModelInfo,
    Search,
    document_id,
)

Body = dict[str, Any]

CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS = 10, 30
SECONDS_PER_SEARCH = 2  # more to wait for each of several searches in one request
HEALTH_TIMEOUT_SECONDS = 5
ACTIVE_SHARD_TIMEOUT = "20s"  # how long a new index is given to start its shards
MAX_CONNECTIONS = 32
SEARCH_REQUESTS = 4  # under way at a time, so that a distant server is not waited for
SEARCHES_AT_ONCE = 32  # in one request, below 1 MB: nginx's default limit
MAX_CLASSES = 10_000  # classes that are listed at most
NO_STORED_FIELDS = "_none_"  # not even the _id, for which each document's source would be decompressed
ITEM_HEADERS = {"X-Elastic-Product": "Elasticsearch"}  # for an error within a response of Elasticsearch
META_KEY = "imagesearch"  # in the mapping's _meta, which index templates may share

# num_candidates of each segment, at least, and rescore_vector's oversample, by which Elasticsearch multiplies them:
# of a quantized index, all of these are scored again by their exact vectors. docs/scaling.md has the recall.
CANDIDATES: dict[str, tuple[int, int | None]] = {
    "hnsw": (1500, None),
    "int8_hnsw": (500, 2),
    "bbq_hnsw": (1500, 2),
}

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
DEFAULT_INDEX_TYPE = "int8_hnsw"
GRAPH = {"m": 16, "ef_construction": 100}

# From 9.2 on, vectors are left out of _source, and read back from their normalized form, which loses the last bit.
KEEP_VECTORS = {"index.mapping.exclude_source_vectors": False}

# Seconds between attempts to write documents that are rejected for now: two minutes.
REJECTED_WAITS = (1, 2, 4, *13 * (8,))


class _SayingRetry(Retry):
    """urllib3's Retry, which tells the user of it now and then."""

    def increment(self, *args: Any, **kwargs: Any) -> Self:
        retry = super().increment(*args, **kwargs)
        last = retry.history[-1]
        reason = f"HTTP {last.status}" if last.status else f"no answer ({network_reason(last.error)})"
        say_now_and_then(f"Retrying a request to Elasticsearch: {reason}.")
        return retry


RETRIED_STATUSES = (429, 502, 503, 504)
# All requests are idempotent. 18 retries last two minutes; a server that is silent is asked four times.
LONG_RETRY = _SayingRetry(
    18,
    read=3,
    backoff_factor=1,
    backoff_max=8,
    status_forcelist=RETRIED_STATUSES,
    allowed_methods=None,
    raise_on_status=False,
    respect_retry_after_header=False,
)
SHORT_RETRY = LONG_RETRY.new(total=3, read=1)


class _Adapter(HTTPAdapter):
    """Sends requests with an SSLContext of our own, which requests has no option for.

    When a request has failed for good, others are not repeated any more: they would wait for the same server.
    """

    def __init__(self, connection: Connection) -> None:
        self._context = connection.ssl_context()
        super().__init__(pool_maxsize=MAX_CONNECTIONS)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        if self._context:
            options["ssl_context"] = self._context
        super().init_poolmanager(*args, **options)

    def send(self, *args: Any, **options: Any) -> requests.Response:
        status = RETRIED_STATUSES[0]
        try:
            response = super().send(*args, **options)
            try:
                response.content  # noqa: B018  # it is read and kept
            except requests.exceptions.ChunkedEncodingError:  # it broke off, which urllib3 does not repeat
                response = super().send(*args, **options)
            status = response.status_code
            return response
        finally:
            if status in RETRIED_STATUSES:
                self.max_retries = self.max_retries.new(total=0)


def _open_session(connection: Connection, adapter: _Adapter) -> requests.Session:
    """Returns a session with the connection's credentials and CA, and no others, which follows no redirects."""
    session = requests.Session()
    session.trust_env = False  # no .netrc and no proxies
    session.max_redirects = 0  # a POST would become a GET without its body
    session.headers.update(connection.headers)
    session.verify = connection.verify_certs and (connection.ca_certs or True)
    session.mount(connection.url.partition("//")[0] + "//", adapter)
    if not connection.verify_certs:
        warnings.filterwarnings("ignore", "Unverified HTTPS request")  # the user is warned already
    return session


class ElasticsearchIndex:
    """An `Index` on Elasticsearch. `name` is that of the index, or an alias of one index.

    The index that the name points to is found when its metadata is read; all other requests name that one.
    """

    searches_at_once = SEARCHES_AT_ONCE

    def __init__(self, connection: Connection, name: str, index_type: str | None, long_retries: bool) -> None:
        adapter = _Adapter(connection)
        self._connection = connection
        self._session = _open_session(connection, adapter)
        self._name = self._concrete_index = name
        self._wanted_type = index_type
        self._search_slots = threading.Semaphore(SEARCH_REQUESTS)
        self.location = connection.url
        self.metadata = self._read_metadata()
        self.base = base_of(self.metadata.base if self.metadata else None)
        # Only now: a wrong address is reported at once.
        adapter.max_retries = LONG_RETRY if long_retries else SHORT_RETRY

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def _read_metadata(self) -> IndexMetadata | None:
        """Finds the index that the name points to. Raises UsageError if create.py did not make it, or of this type."""
        body = self._send("GET", quote(self._name), may_be_missing=True)
        if body is None:
            return None
        if len(body) != 1:
            raise UsageError(
                f"{self._name} is an alias of several indices ({', '.join(sorted(body))}): use one with --index."
            )
        ((self._concrete_index, index),) = body.items()
        self._uuid = index["settings"]["index"]["uuid"]
        self._meta = index["mappings"].get("_meta", {})
        field = index["mappings"].get("properties", {}).get("embeddings", {})
        self._index_type = field.get("index_options", {}).get("type", "")
        metadata = _parse_metadata(self._name, self._meta, field.get("dims"))
        if self._wanted_type not in (None, self._index_type):
            raise UsageError(
                f"The index {self._name} is of type {self._index_type}, not {self._wanted_type}: leave out"
                " --index-type, or use another --index."
            )
        return metadata

    def list_indexes(self) -> dict[str, str]:
        path = f"*/_mapping?filter_path=*.mappings._meta.{META_KEY}.name"
        try:
            status, _, body = self._request("GET", path)
        except requests.RequestException as error:
            raise self._connection_error(error) from None
        if status != 200 or not body:  # there is none, or the user may not see the others
            return {}
        return {name: index["mappings"]["_meta"][META_KEY]["name"] for name, index in sorted(body.items())}

    # Reading

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        fields = ["file_path", "size", "mtime", "sha256"]
        query = {"ids": {"values": list(ids)}}
        hits = self._find(query, size=len(ids), docvalue_fields=fields, stored_fields=NO_STORED_FIELDS)
        rows = ([hit["fields"][name][0] for name in fields] for hit in hits)
        return {document_id(file_path): FileMetadata(*metadata) for file_path, *metadata in rows}

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, Embedding]:
        if not sha256s:
            return {}
        options: Body = {"fields": ["embeddings"], "docvalue_fields": ["sha256"], "size": 2 * len(sha256s)}
        query = {"terms": {"sha256": list(sha256s)}}
        hits = self._find(query, **options)
        if len(hits) == options["size"]:  # many copies of one content may hide another; collapsing costs more
            hits = self._find(query, **options, collapse={"field": "sha256"})
        return {hit["fields"]["sha256"][0]: np.array(hit["fields"]["embeddings"], np.float32) for hit in hits}

    def list_classes(self) -> list[str]:
        body = {"size": 0, "aggs": {"classes": {"terms": {"field": "desc", "size": MAX_CLASSES}}}}
        response = self._send("POST", self._path("_search?allow_partial_search_results=false"), body)
        return [bucket["key"] for bucket in response["aggregations"]["classes"]["buckets"]]

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

    def _find(self, query: Body, **options: Any) -> list[dict[str, Any]]:
        """Returns all hits of a search on all shards."""
        body = {"query": query, "_source": False, "track_total_hits": False, **options}
        response = self._send("POST", self._path("_search?allow_partial_search_results=false"), body)
        hits: list[dict[str, Any]] = response["hits"]["hits"]
        return hits

    # Searching

    def search(self, searches: Sequence[Search]) -> list[dict[str, Any]]:
        with self._search_slots:
            if len(searches) == 1:
                responses = [self._send("POST", self._path("_search"), self._search_body(searches[0]))]
            else:
                timeout = READ_TIMEOUT_SECONDS + SECONDS_PER_SEARCH * len(searches)
                lines = [line for search in searches for line in ({}, self._search_body(search))]
                responses = self._send("POST", self._path("_msearch"), lines, timeout_seconds=timeout)["responses"]
        for response in responses:
            status = response.pop("status", 200)  # each response of _msearch has a status
            if status != 200:
                raise self._response_error(status, ITEM_HEADERS, response)
            _limit_scores(response)
        return responses

    def _search_body(self, search: Search) -> Body:
        candidates, oversample = CANDIDATES.get(self._index_type, CANDIDATES["bbq_hnsw"])
        knn: Body = {
            "field": "embeddings",
            "query_vector": search.embedding,
            "k": search.k,
            "num_candidates": min(MAX_K, max(candidates, 10 * search.k)),
        }
        if oversample:
            knn["rescore_vector"] = {"oversample": oversample}
        body: Body = {"knn": knn, "size": search.k, "_source": False, "docvalue_fields": ["file_path", "desc"]}
        filters: list[Body] = [] if search.desc is None else [{"term": {"desc": search.desc}}]
        if search.excluded_id is not None:
            filters.append({"bool": {"must_not": {"ids": {"values": [search.excluded_id]}}}})
        if filters:
            knn["filter"] = filters
        if search.min_score is not None:
            body["min_score"] = search.min_score - SCORE_TOLERANCE
            knn["similarity"] = 2 * body["min_score"] - 1  # the cosine
        return body

    # Writing

    @functools.cached_property
    def _client(self) -> Any:
        """The elasticsearch client. Two threads may each make one: both send with the same session."""
        from elastic_transport import RequestsHttpNode
        from elasticsearch import Elasticsearch, OrjsonSerializer

        client = Elasticsearch(
            self._connection.url,
            node_class=RequestsHttpNode,
            request_timeout=READ_TIMEOUT_SECONDS,
            max_retries=0,  # the session retries
            serializer=OrjsonSerializer(),
        )
        # The client has one node, and the node one session: ours, which has the credentials, the CA, and the retries.
        client.transport.node_pool.get().session = self._session  # type: ignore[attr-defined]
        return client

    def create(self, metadata: IndexMetadata) -> None:
        from elasticsearch import BadRequestError

        meta = {META_KEY: vars(metadata.model) | {"folder": metadata.base}}
        options = {"type": self._wanted_type or DEFAULT_INDEX_TYPE, **GRAPH}
        properties = PROPERTIES | {"embeddings": PROPERTIES["embeddings"] | {"index_options": options}}
        mappings = {"dynamic": "strict", "_meta": meta, "properties": properties}
        is_active = True
        with self._translated_errors():
            for settings in (KEEP_VECTORS, {}):
                try:
                    created = self._client.indices.create(
                        index=self._name, mappings=mappings, settings=settings, timeout=ACTIVE_SHARD_TIMEOUT
                    )
                    is_active = created["shards_acknowledged"]
                except BadRequestError as error:
                    if settings and "unknown setting" in str(error):  # 8.x and 9.0 know none of this
                        continue
                    if error.error != "resource_already_exists_exception":
                        raise
                break
        self.metadata = self._read_metadata()
        if not is_active:
            raise missing_shards_error(self._name, self._missing_shards())

    def record_model(self, model: ModelInfo) -> None:
        meta = self._meta | {META_KEY: self._meta[META_KEY] | vars(model)}
        with self._translated_errors():
            self._client.indices.put_mapping(index=self._concrete_index, meta=meta)

    def write(self, documents: Sequence[Document]) -> list[Document]:
        done = self._bulk([_action(document) for document in documents])
        return [document for document in documents if document.image.id in done]

    def delete(self, ids: Sequence[str]) -> int:
        return len(self._bulk([{"_op_type": "delete", "_id": id_} for id_ in ids]))

    def _bulk(self, actions: Sequence[Body]) -> set[str]:
        """Returns the ``_id`` of each action that is done, not of those whose document is not there.

        Actions that are rejected for now are repeated. Raises ImageSearchError, after all others, if one is refused.
        """
        done, refused = set[str](), Body()
        for wait_seconds in (*REJECTED_WAITS, 0):
            rejected = []
            for action, result in zip(actions, self._bulk_results(actions), strict=True):
                if result["status"] < 300:
                    done.add(result["_id"])
                elif result["status"] == 429 and wait_seconds and not is_blocked(result):
                    rejected.append(action)
                elif result["status"] != 404 or is_missing_index(result):
                    refused = result
            if not rejected:
                break
            say_now_and_then(f"Retrying {len(rejected):,} documents that Elasticsearch rejected for now (HTTP 429).")
            time.sleep(wait_seconds)
            actions = rejected
        if refused:
            raise self._response_error(refused["status"], ITEM_HEADERS, refused)
        return done

    def _bulk_results(self, actions: Sequence[Body]) -> list[Body]:
        from elasticsearch import helpers

        if not actions:
            return []
        options: Body = {"chunk_size": len(actions), "max_retries": 0, "raise_on_error": False}
        with self._translated_errors():
            items = list(helpers.streaming_bulk(self._client, actions, index=self._concrete_index, **options))
        return [result for _, item in items for result in item.values()]

    def refresh(self) -> None:
        """Raises ImageSearchError if the index was replaced since its metadata was read."""
        self._send("POST", self._path("_refresh"))
        found = self._send("GET", self._path("_settings"))
        if found[self._concrete_index]["settings"]["index"]["uuid"] != self._uuid:
            raise deleted_index_error(self._concrete_index)

    # Requests

    def _path(self, rest: str) -> str:
        return f"{quote(self._concrete_index)}/{rest}"

    def _send(
        self,
        method: str,
        path: str,
        body: Body | list[Body] | None = None,
        *,
        may_be_missing: bool = False,
        timeout_seconds: float | None = None,
    ) -> Any:
        """Returns the body of the response; None for HTTP 404 if `may_be_missing`. Raises ImageSearchError."""
        try:
            status, headers, response = self._request(method, path, body, timeout_seconds)
        except (requests.RequestException, ValueError) as error:  # ValueError: no valid host name
            raise self._connection_error(error) from None
        if headers.get("X-Elastic-Product") == "Elasticsearch" and isinstance(response, dict):
            if status == 200:
                return response
            if status == 404 and may_be_missing:
                return None
        raise self._response_error(status, headers, response)

    def _request(
        self,
        method: str,
        path: str,
        body: Body | list[Body] | None = None,
        timeout_seconds: float | None = None,
    ) -> tuple[int, Mapping[str, str], Any]:
        """Returns status, headers, and the body as JSON, None if it is not. A list is sent as lines of JSON."""
        lines = body if isinstance(body, list) else [] if body is None else [body]
        data = b"".join(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n" for line in lines)
        headers = {"Content-Type": f"application/{'x-ndjson' if isinstance(body, list) else 'json'}"}
        timeout = (CONNECT_TIMEOUT_SECONDS, timeout_seconds or READ_TIMEOUT_SECONDS)
        response = self._session.request(
            method, f"{self._connection.url}/{path}", data=data or None, headers=headers, timeout=timeout
        )
        try:
            answer = orjson.loads(response.content)
        except ValueError:
            answer = None
        return response.status_code, response.headers, answer

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translates the client's errors into messages that say what to do."""
        from elasticsearch import ApiError, TransportError

        try:
            yield
        except ApiError as error:
            raise self._response_error(error.meta.status, error.meta.headers, error.body) from None
        except (TransportError, ValueError) as error:  # ValueError: no valid host name
            cause = error.__context__ if isinstance(error, TransportError) else None  # the exception of requests
            raise self._connection_error(cause or error) from None

    def _response_error(self, status: int, headers: Mapping[str, str], body: Any) -> ImageSearchError:
        if status == 503 and (shards := self._missing_shards()):
            return missing_shards_error(self._name, shards)
        return response_error(status, headers, body, self._connection, self._name)

    def _connection_error(self, error: BaseException) -> ImageSearchError:
        # Elasticsearch may have been waiting for a shard.
        if "Read timed out" in str(error) and (shards := self._missing_shards()):
            return missing_shards_error(self._name, shards)
        return connection_error(error, self._connection)

    def _missing_shards(self) -> list[str]:
        """Returns the numbers of the index's shards that are not allocated; none if Elasticsearch does not say."""
        path = f"_cluster/health/{quote(self._concrete_index)}?level=shards&timeout=1s"
        try:
            _, _, health = self._request("GET", path, timeout_seconds=HEALTH_TIMEOUT_SECONDS)
            shards = health["indices"][self._concrete_index]["shards"]
            return [number for number, shard in shards.items() if not shard["primary_active"]]
        except (requests.RequestException, ValueError, LookupError, TypeError):  # or it may not be asked
            return []


def _limit_scores(response: Body) -> None:
    """Limits scores to 1: of the same vector, they come out up to 8e-7 more."""
    hits = response["hits"]
    for hit in hits["hits"]:
        hit["_score"] = min(1.0, hit["_score"])
    if hits["max_score"] is not None:
        hits["max_score"] = min(1.0, hits["max_score"])


def _parse_metadata(index: str, meta: Body, dims: int | None) -> IndexMetadata:
    """Returns what create.py recorded in the mapping. Raises UsageError for an index that it did not make."""
    recorded = dict(meta.get(META_KEY, {}))
    try:
        base = recorded.pop("folder")
        metadata = IndexMetadata(ModelInfo(**recorded), base)
    except (KeyError, TypeError):
        metadata = None
    if metadata is None or dims != DIMENSIONS:
        raise UsageError(
            f"The index {index} was not made by this version of create.py: it has no record of its model."
            " Use --index with another name, or delete the index and run create.py again."
        )
    return metadata


def _action(document: Document) -> Body:
    """Returns the bulk action that writes a document."""
    image = document.image
    file = {"size": image.size, "mtime": image.mtime}
    if document.embedding is None:
        return {"_op_type": "update", "_id": image.id, "retry_on_conflict": 3, "doc": file}
    fields = {"file_path": image.file_path, "desc": image.desc, "sha256": document.sha256}
    return {"_op_type": "index", "_id": image.id, **file, **fields, "embeddings": document.embedding}
