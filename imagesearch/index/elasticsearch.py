"""The index on Elasticsearch, read and searched.

All of it goes through one function that sends a request: search.py sends with requests, as the tutorial does, since the
elasticsearch client takes a third of a second to import; create.py sends with the client (elasticsearch_writer.py).
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import orjson
import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry

from imagesearch.console import say
from imagesearch.errors import UsageError
from imagesearch.index.connection import Connection
from imagesearch.index.elasticsearch_errors import connection_error, network_reason, response_error
from imagesearch.records import (
    DIMENSIONS,
    MAX_K,
    SCORE_TOLERANCE,
    Embedding,
    FileMetadata,
    IndexMetadata,
    ModelInfo,
    Search,
    document_id,
)

Body = dict[str, Any]
Response = tuple[int, Mapping[str, str], Any]  # status, headers, and the body as JSON, None if it is not
Transport = Callable[[str, str, Body | None], Response]  # of a method, a path and a body; raises ImageSearchError

TIMEOUT_SECONDS = (10, 30)  # to connect, and for an answer
MAX_SEARCHES = 32  # under way at a time, so that a distant server is not waited for
MAX_CLASSES = 10_000  # that are listed
MIN_CANDIDATES = 1500  # of each segment: docs/scaling.md has the recall that this gives
NO_STORED_FIELDS = "_none_"  # not even the _id, for which each document's source would be decompressed
META_KEY = "imagesearch"  # in the mapping's _meta, which index templates may share

OVERSAMPLE = 2  # times as many candidates, all scored again by their exact vectors, where the graph has none

SAY_RETRY_SECONDS = 10


class _SayingRetry(Retry):
    """urllib3's Retry, which tells the user of it now and then.

    When one request has none left, others are not retried: they would wait for the same server, one after the other.
    """

    _said_at = 0.0
    _gave_up = False

    def increment(self, *args: Any, **kwargs: Any) -> Self:
        try:
            retry = Retry.increment(self.new(total=0) if _SayingRetry._gave_up else self, *args, **kwargs)
        except MaxRetryError:
            _SayingRetry._gave_up = True
            raise
        if time.monotonic() - _SayingRetry._said_at > SAY_RETRY_SECONDS:
            _SayingRetry._said_at = time.monotonic()
            last = retry.history[-1]
            reason = f"HTTP {last.status}" if last.status else f"no answer ({network_reason(last.error)})"
            say(f"Retrying a request to Elasticsearch: {reason}.")
        return retry


# All requests are idempotent. 18 retries last two minutes; a server that is silent is asked four times.
RETRY_OF_A_RUN = _SayingRetry(
    18,
    read=3,
    backoff_factor=1,
    backoff_max=8,
    status_forcelist=(429, 502, 503, 504),
    allowed_methods=None,
    raise_on_status=True,  # so that the bulk helper does not repeat all of it after the last HTTP 429
    respect_retry_after_header=False,
)
RETRY_OF_A_SEARCH = RETRY_OF_A_RUN.new(total=3, read=1, raise_on_status=False)


class _Adapter(HTTPAdapter):
    """Sends requests with an SSLContext of our own, which requests has no option for."""

    def __init__(self, connection: Connection) -> None:
        self._context = connection.ssl_context()
        super().__init__(pool_maxsize=MAX_SEARCHES)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        if self._context:
            options["ssl_context"] = self._context
        super().init_poolmanager(*args, **options)


def open_http_session(connection: Connection) -> requests.Session:
    """Returns a session with the connection's credentials and CA, and no others, which follows no redirects."""
    session = requests.Session()
    session.trust_env = False  # no .netrc and no proxies
    session.max_redirects = 0  # a POST would become a GET without its body
    session.headers.update(connection.headers)
    session.verify = connection.verify_certs and (connection.ca_certs or True)
    session.mount(connection.url.partition("//")[0] + "//", _Adapter(connection))
    if not connection.verify_certs:
        warnings.filterwarnings("ignore", "Unverified HTTPS request")  # the user is warned already
    return session


def session_transport(session: requests.Session, connection: Connection) -> Transport:
    """Returns the function that sends a request with `session`."""

    def send(method: str, path: str, body: Body | None) -> Response:
        data = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": "application/json"}
        try:
            response = session.request(
                method, f"{connection.url}/{path}", data=data, headers=headers, timeout=TIMEOUT_SECONDS
            )
        except (requests.RequestException, ValueError) as error:  # ValueError: no valid host name
            raise connection_error(error, connection) from None
        try:
            answer = orjson.loads(response.content)
        except ValueError:
            answer = None
        return response.status_code, response.headers, answer

    return send


class ElasticsearchIndex:
    """An `Index` on Elasticsearch. `name` is that of the index, or an alias of one index.

    The index that the name points to is found when its metadata is read; all other requests name that one.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        session: requests.Session,
        transport: Transport,
        retry: Retry = RETRY_OF_A_SEARCH,
    ) -> None:
        self._connection = connection
        self._name = name
        self._session = session
        self._transport = transport
        self._retry = retry
        self._concrete_index = name
        self._uuid = ""
        self._index_type = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    @property
    def max_searches(self) -> int:
        return MAX_SEARCHES

    @property
    def location(self) -> str:
        return self._connection.url

    def get_metadata(self) -> IndexMetadata | None:
        body = self._send("GET", quote(self._name), may_be_missing=True)
        for adapter in self._session.adapters.values():  # not before: a wrong address is reported at once
            adapter.max_retries = self._retry  # type: ignore[attr-defined]
        if body is None:
            return None
        if len(body) != 1:
            raise UsageError(
                f"{self._name} is an alias of several indices ({', '.join(sorted(body))}): use one with --index."
            )
        ((self._concrete_index, index),) = body.items()
        self._uuid = index["settings"]["index"]["uuid"]
        field = index["mappings"].get("properties", {}).get("embeddings", {})
        self._index_type = field.get("index_options", {}).get("type", "")
        return _read_metadata(self._name, index["mappings"].get("_meta", {}), field.get("dims"))

    def list_indexes(self) -> dict[str, str]:
        path = f"*/_mapping?filter_path=*.mappings._meta.{META_KEY}.name"
        status, _, body = self._transport("GET", path, None)
        if status != 200 or not body:  # there is none, or the user may not see the others
            return {}
        return {name: index["mappings"]["_meta"][META_KEY]["name"] for name, index in sorted(body.items())}

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        fields = ["file_path", "size", "mtime", "sha256"]
        query = {"ids": {"values": list(ids)}}
        hits = self._find(query, size=len(ids), docvalue_fields=fields, stored_fields=NO_STORED_FIELDS)
        rows = ([hit["fields"][name][0] for name in fields] for hit in hits)
        return {document_id(file_path): FileMetadata(*metadata) for file_path, *metadata in rows}

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, Embedding]:
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

    def search(self, search: Search) -> dict[str, Any]:
        knn: Body = {
            "field": "embeddings",
            "query_vector": search.embedding.tolist(),
            "k": search.k,
            "num_candidates": min(MAX_K, max(MIN_CANDIDATES, 10 * search.k)),
        }
        if self._index_type != "hnsw":
            knn["rescore_vector"] = {"oversample": OVERSAMPLE}
        body: Body = {"knn": knn, "size": search.k, "_source": False, "docvalue_fields": ["file_path", "desc"]}
        filters: list[Body] = [] if search.desc is None else [{"term": {"desc": search.desc}}]
        if search.excluded_id is not None:
            filters.append({"bool": {"must_not": {"ids": {"values": [search.excluded_id]}}}})
        if filters:
            knn["filter"] = filters
        if search.min_score is not None:
            body["min_score"] = search.min_score - SCORE_TOLERANCE
            knn["similarity"] = 2 * body["min_score"] - 1  # the cosine
        return _with_scores_up_to_1(self._send("POST", self._path("_search"), body))

    def _find(self, query: Body, **options: Any) -> list[dict[str, Any]]:
        """Returns all hits of a search on all shards."""
        body = {"query": query, "_source": False, "track_total_hits": False, **options}
        response = self._send("POST", self._path("_search?allow_partial_search_results=false"), body)
        hits: list[dict[str, Any]] = response["hits"]["hits"]
        return hits

    def _path(self, rest: str) -> str:
        return f"{quote(self._concrete_index)}/{rest}"

    def _send(self, method: str, path: str, body: Body | None = None, may_be_missing: bool = False) -> Any:
        """Returns the body of the response; None for HTTP 404 if `may_be_missing`. Raises ImageSearchError."""
        status, headers, response = self._transport(method, path, body)
        if headers.get("X-Elastic-Product") == "Elasticsearch" and isinstance(response, dict):
            if status == 200:
                return response
            if status == 404 and may_be_missing:
                return None
        raise response_error(status, headers, response, self._connection, self._name)


def _with_scores_up_to_1(response: dict[str, Any]) -> dict[str, Any]:
    """Returns a response whose scores are at most 1: of the same vector, they come out up to 8e-7 more."""
    hits = response["hits"]
    for hit in hits["hits"]:
        hit["_score"] = min(1.0, hit["_score"])
    if hits["max_score"] is not None:
        hits["max_score"] = min(1.0, hits["max_score"])
    return response


def _read_metadata(index: str, meta: dict[str, Any], dims: int | None) -> IndexMetadata:
    """Returns what create.py recorded in the mapping. Raises UsageError for an index that it did not make."""
    recorded = dict(meta.get(META_KEY, {}))
    try:
        folder = recorded.pop("folder")
        metadata = IndexMetadata(ModelInfo(**recorded), folder)
    except (KeyError, TypeError):
        metadata = None
    if metadata is None or dims != DIMENSIONS:
        raise UsageError(
            f"The index {index} was not made by this version of create.py: it has no record of its model."
            " Use --index with another name, or delete the index and run create.py again."
        )
    return metadata
