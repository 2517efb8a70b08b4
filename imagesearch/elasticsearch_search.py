"""The index on Elasticsearch, read and searched with requests; its own client takes a third of a second to import."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import quote

import numpy as np
import orjson
import requests
from requests.adapters import HTTPAdapter

from imagesearch.connection import Connection
from imagesearch.elasticsearch_errors import (
    connection_error,
    deleted_index_error,
    error_reason,
    hint,
    is_missing_index,
    parse_response,
)
from imagesearch.errors import ImageSearchError, UsageError
from imagesearch.records import DIMENSIONS, SCORE_TOLERANCE, Embedding, FileMetadata, IndexMetadata, ModelInfo
from imagesearch.retry import NO_RETRY, Retry, RetryableError

T = TypeVar("T")
Body = dict[str, Any]

CONNECT_TIMEOUT_SECONDS, REQUEST_TIMEOUT_SECONDS = 10, 30
MAX_SEARCHES = 32  # under way at a time, so that a distant server is not waited for
MAX_CLASSES = 10_000  # that are listed
MIN_CANDIDATES, MAX_CANDIDATES = 500, 10_000  # Elasticsearch's limit is 10,000

META_KEY = "imagesearch"  # in the mapping's _meta, which index templates may share


class _SSLContextAdapter(HTTPAdapter):
    """Sends requests with an SSLContext of our own, which requests has no option for."""

    def __init__(self, context: Any) -> None:
        self._context = context
        super().__init__(pool_maxsize=MAX_SEARCHES)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)


class ElasticsearchSearch:
    """An `Index` on Elasticsearch. `name` is that of the index, or an alias of one index.

    The index that the name points to is remembered when its metadata is read. If the name later points
    to another index, ImageSearchError is raised, since embeddings of another model may be there.
    """

    def __init__(self, connection: Connection, name: str, retry: Retry = NO_RETRY) -> None:
        self._connection = connection
        self._name = name
        self._retry = retry
        self._hosts = list(connection.hosts)
        self._concrete_index = name
        self._uuid: str | None = None
        self._session = _open_session(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    @property
    def max_searches(self) -> int:
        return MAX_SEARCHES

    @property
    def location(self) -> str:
        return str(self._connection)

    def get_metadata(self) -> IndexMetadata | None:
        status, body = self._request("GET", quote(self._name))
        if status == 404:
            return None
        if status != 200:
            raise ImageSearchError(f"The index {self._name} cannot be read: {error_reason(body)}.{hint(body)}")
        if len(body) != 1:
            raise UsageError(
                f"{self._name} is an alias of several indices ({', '.join(sorted(body))}): use one with --index."
            )
        ((concrete_index, index),) = body.items()
        metadata = _read_metadata(self._name, index["mappings"])
        self._concrete_index, self._uuid = concrete_index, index["settings"]["index"]["uuid"]
        return metadata

    def list_indexes(self) -> dict[str, str]:
        try:
            status, body = self._request("GET", f"*/_mapping?filter_path=*.mappings._meta.{META_KEY}.name")
        except UsageError:  # a user who may not see the others
            return {}
        if status != 200:
            return {}
        return {name: index["mappings"]["_meta"][META_KEY]["name"] for name, index in sorted(body.items())}

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        fields = ["size", "mtime", "sha256"]
        query = {"ids": {"values": list(ids)}}
        hits = self._retried(lambda: self._search_all(query, size=len(ids), docvalue_fields=fields))
        return {hit["_id"]: FileMetadata(*(hit["fields"][name][0] for name in fields)) for hit in hits}

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, Embedding]:
        options: Body = {"fields": ["embeddings"], "docvalue_fields": ["sha256"], "size": 2 * len(sha256s)}
        query = {"terms": {"sha256": list(sha256s)}}
        # Not retried: an unreachable index has no copies to offer, and the run has to continue.
        hits = self._retry.call_without_retry("Elasticsearch", lambda: self._search_all(query, **options))
        if len(hits) == options["size"]:  # many copies of one content may hide another; collapsing costs more
            options["collapse"] = {"field": "sha256"}
            hits = self._retry.call_without_retry("Elasticsearch", lambda: self._search_all(query, **options))
        return {hit["fields"]["sha256"][0]: np.array(hit["fields"]["embeddings"], np.float32) for hit in hits}

    def list_classes(self) -> list[str]:
        aggregation = {"classes": {"terms": {"field": "desc", "size": MAX_CLASSES}}}
        status, body = self._request("POST", f"{quote(self._name)}/_search", {"size": 0, "aggs": aggregation})
        if status != 200 or body["_shards"]["failed"]:
            raise ImageSearchError(f"Elasticsearch cannot list the classes of {self._name}: {error_reason(body)}.")
        return [bucket["key"] for bucket in body["aggregations"]["classes"]["buckets"]]

    def search(
        self, embedding: Embedding, k: int, desc: str | None = None, min_score: float | None = None
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
        body: Body = {"knn": knn, "size": k, "_source": False, "docvalue_fields": ["file_path", "desc"]}
        if desc is not None:
            knn["filter"] = {"term": {"desc": desc}}
        if min_score is not None:
            knn["similarity"] = 2 * (min_score - SCORE_TOLERANCE) - 1  # the cosine
            body["min_score"] = min_score - SCORE_TOLERANCE
        status, response = self._request("POST", f"{quote(self._name)}/_search", body)
        if is_missing_index(response):
            raise ImageSearchError(f"The index {self._name} was deleted during the search.")
        if status == 200 and any(hit["_index"] != self._concrete_index for hit in response["hits"]["hits"]):
            raise ImageSearchError(
                f"{self._name} no longer points to the index that it pointed to before. Run the command again."
            )
        if status != 200:
            reason = error_reason(response)
            if "rescore_vector" in reason:
                raise UsageError("This Elasticsearch is too old: search.py needs version 8.18 or newer.")
            raise ImageSearchError(f"Elasticsearch cannot search the index {self._name}: {reason}.{hint(response)}")
        return _with_scores_up_to_1(response)

    def _search_all(self, query: Body, **options: Any) -> list[dict[str, Any]]:
        """Returns all hits of a search on all shards. Raises RetryableError while a shard is missing."""
        body = {"query": query, "_source": False, "track_total_hits": False, **options}
        status, response = self._send("POST", f"{quote(self._name)}/_search", body)
        if is_missing_index(response):
            raise deleted_index_error(self._name)
        if status != 200:
            raise ImageSearchError(f"Elasticsearch refused a request: {error_reason(response)}.{hint(response)}")
        if response["_shards"]["failed"] or response["timed_out"]:
            raise RetryableError(f"a shard of the index {self._name} is missing")
        hits: list[dict[str, Any]] = response["hits"]["hits"]
        return hits

    def _retried(self, function: Callable[[], T]) -> T:
        """Returns ``function()``, retried while Elasticsearch is unreachable or overloaded."""
        return self._retry.call("Elasticsearch", function)

    def _request(self, method: str, path: str, body: Body | None = None) -> tuple[int, dict[str, Any]]:
        """Sends a request as `_send` does, but never raises RetryableError."""
        return self._retry.call_without_retry("Elasticsearch", lambda: self._send(method, path, body))

    def _send(self, method: str, path: str, body: Body | None = None) -> tuple[int, dict[str, Any]]:
        """Sends one request to the first host that answers; returns the status and the JSON body.

        Raises RetryableError if no host answers or Elasticsearch is overloaded, UsageError if something
        other than this user's Elasticsearch answers.
        """
        error: RetryableError | None = None
        for host in self._hosts.copy():
            try:
                response = self._session.request(
                    method,
                    f"{host}/{path}",
                    data=None if body is None else orjson.dumps(body),
                    headers={"Content-Type": "application/json"},
                    timeout=(CONNECT_TIMEOUT_SECONDS, self._retry.request_timeout(REQUEST_TIMEOUT_SECONDS)),
                    allow_redirects=False,  # a POST would become a GET without its body
                )
                answer = parse_response(response, host, self._connection)
            except RetryableError as retryable:
                error = retryable
            except (requests.exceptions.RequestException, ValueError) as exception:  # ValueError: no valid host name
                failed = connection_error(exception, self._connection, host)
                if isinstance(failed, UsageError):
                    raise failed from None
                error = failed
            else:
                self._hosts = [host, *(other for other in self._hosts if other != host)]  # for the next request
                return response.status_code, answer
        assert error
        raise error


def _open_session(connection: Connection) -> requests.Session:
    """Returns a session with the connection's credentials and CA, and no others."""
    session = requests.Session()
    session.trust_env = False  # no .netrc and no proxies: the client reads neither
    session.headers.update(connection.headers)
    if context := connection.ssl_context():
        session.verify = connection.ca_certs
        session.mount("https://", _SSLContextAdapter(context))
    else:
        session.mount(connection.hosts[0].partition(":")[0] + "://", HTTPAdapter(pool_maxsize=MAX_SEARCHES))
        session.verify = connection.verify_certs
        if not connection.verify_certs:
            warnings.filterwarnings("ignore", "Unverified HTTPS request")  # the user is warned already
    return session


def _with_scores_up_to_1(response: dict[str, Any]) -> dict[str, Any]:
    """Returns a response whose scores are at most 1: of the same vector, they come out up to 8e-7 more."""
    hits = response["hits"]
    for hit in hits["hits"]:
        hit["_score"] = min(1.0, hit["_score"])
    if hits["max_score"] is not None:
        hits["max_score"] = min(1.0, hits["max_score"])
    return response


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
