"""The index on Elasticsearch: written with its Python client, searched with `requests`."""

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

import numpy as np
import requests
from numpy.typing import NDArray

from imagesearch.connection import Connection
from imagesearch.embed import Document, Stored, batched
from imagesearch.errors import Failure, Misuse
from imagesearch.explain import distrusts, explained, innermost, locked_out, passing, remedy, untrusted
from imagesearch.index import Pause
from imagesearch.models import DIMENSIONS, ModelRecord

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

Answer = TypeVar("Answer")

SECONDS = 60  # for one request
BULK = 128  # documents in one bulk request: about 1 MB
PAGE = 1000  # documents in one page of a listing
FIELDS = ["file_path", "desc"]

# Pinned, so that Elasticsearch 8.19 and 9.x build the same index. Shards, replicas and the rest
# are left to the server's index templates.
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
    "sha256": {"type": "keyword", "index": False},
}


class Busy(Exception):
    """Elasticsearch cannot take something just now; the text says why. `progress`: it has taken a part."""

    def __init__(self, why: str, progress: bool = False) -> None:
        super().__init__(why)
        self.progress = progress


class Elastic:
    """The index `name`, or the one that the alias `name` stands for, on Elasticsearch.

    `concrete` is that index's own name, which `model` finds out. Where the name has become another
    index's since, writing and searching raise Failure: that one may hold another model's embeddings.

    `pause` is called when Elasticsearch is away or busy in the middle of a run. A run that it keeps
    waiting for more than `patience` seconds at a time ends with Failure.
    """

    def __init__(self, connection: Connection, name: str, pause: Pause, patience: float) -> None:
        self.connection = connection
        self.name = name
        self.pause = pause
        self.patience = patience
        self.urls = list(connection.urls)
        self.concrete = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if "client" in self.__dict__:
            self.client.close()
        if "session" in self.__dict__:
            self.session.close()

    @functools.cached_property
    def client(self) -> "Elasticsearch":
        """The client that writes. Imported when it is needed: it takes longer than a search."""
        from elasticsearch import Elasticsearch, OrjsonSerializer

        options: dict[str, Any] = {}
        if self.connection.urls[0].startswith("https"):
            options = {"verify_certs": not self.connection.insecure, "ssl_show_warn": False}
            if self.connection.ca and not self.connection.insecure:
                options["ca_certs"] = self.connection.ca
        return Elasticsearch(
            list(self.connection.urls),
            headers=self.connection.headers,
            request_timeout=SECONDS,
            serializer=OrjsonSerializer(),  # takes numpy's vectors as they are, 15 times faster
            **options,
        )

    @functools.cached_property
    def session(self) -> requests.Session:
        """The session that searches, with the same addresses, credentials and CA as the client and no others."""
        session = requests.Session()
        session.trust_env = False  # no .netrc and no proxies, which the client does not read either
        session.headers.update(self.connection.headers)
        session.verify = self.connection.ca or True
        if self.connection.insecure:
            session.verify = False
            warnings.filterwarnings("ignore", "Unverified HTTPS request")  # the command line has said it, once
        return session

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Sends one request to the first node that answers; its status, and its body if that is JSON.

        Raises Misuse where no node answers, or something answers that is not this user's Elasticsearch.
        """
        for url in self.urls:
            try:
                response = self.session.request(method, f"{url}/{path}", json=body, timeout=(10, SECONDS))
                self.urls.sort(key=lambda other: other != url)  # the next request goes there first
                break
            except (requests.exceptions.RequestException, ValueError) as error:  # ValueError: no such host name
                if distrusts(error):
                    raise Misuse(untrusted(url, error)) from None
                unanswered = f"No Elasticsearch answers at {self.connection.place}: {innermost(error)}."
        else:
            raise Misuse(f"{unanswered} Check ES_URL and that the server runs.")
        if response.status_code == 401:
            raise Misuse(locked_out(url))
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.headers.get("X-Elastic-Product") != "Elasticsearch" or not isinstance(answer, dict):
            kind = response.headers.get("Content-Type", "nothing")
            raise Misuse(
                f"{url} is not Elasticsearch, or something stands before it:"
                f" it answered HTTP {response.status_code} with {kind}. Check ES_URL."
            )
        return response.status_code, answer

    def model(self) -> ModelRecord | None:
        """See `Index.model`. Raises Misuse for an index that this project did not make."""
        status, answer = self.ask("GET", f"{quote(self.name)}/_mapping")
        if status == 404:
            return None
        if status != 200:
            raise Misuse(f"Elasticsearch does not show the index {self.name}: {explained(answer)}.")
        if len(answer) != 1:
            raise Misuse(f"{self.name} is an alias of several indices ({', '.join(sorted(answer))}): give one of them.")
        mappings = next(iter(answer.values()))["mappings"]
        meta = mappings.get("_meta", {})
        dimensions = mappings.get("properties", {}).get("embeddings", {}).get("dims")
        try:
            record = ModelRecord(**meta)
        except TypeError:
            record = None
        if record is None or dimensions != DIMENSIONS:
            raise Misuse(
                f"The index {self.name} was not made by create.py: it has no record of its model."
                " Choose another name with --index."
            )
        (self.concrete,) = answer
        return record

    def create(self, record: ModelRecord) -> None:
        from elasticsearch import BadRequestError

        mappings = {"dynamic": "strict", "_meta": vars(record), "properties": PROPERTIES}

        def send() -> None:
            try:
                self.client.indices.create(index=self.name, mappings=mappings)
            except BadRequestError as error:
                if error.error != "resource_already_exists_exception":
                    raise

        self.patiently(send)

    def stored(self, ids: Sequence[str]) -> dict[str, Stored]:
        hits = self.hits({"ids": {"values": list(ids)}}, size=len(ids), docvalue_fields=["size", "mtime", "sha256"])
        return {hit["_id"]: Stored(**{name: values[0] for name, values in hit["fields"].items()}) for hit in hits}

    def paths(self, folder: str) -> Iterator[tuple[str, str]]:
        after: dict[str, Any] = {}
        while hits := self.hits(
            {"prefix": {"file_path": folder.rstrip("/") + "/"}},
            size=PAGE,
            docvalue_fields=["file_path"],
            sort=[{"file_path": "asc"}],
            **after,
        ):
            yield from ((hit["_id"], hit["fields"]["file_path"][0]) for hit in hits)
            after = {"search_after": hits[-1]["sort"]}

    def hits(self, query: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        """The hits of a search without vectors, complete: a missing shard is waited for."""

        def send() -> list[dict[str, Any]]:
            answer = self.client.search(index=self.name, query=query, source=False, track_total_hits=False, **options)
            if answer["_shards"]["failed"] or answer["timed_out"]:
                raise Busy(f"a shard of the index {self.name} is missing")
            hits: list[dict[str, Any]] = answer["hits"]["hits"]
            return hits

        return self.patiently(send)

    def write(self, documents: Iterable[Document]) -> Iterator[Document]:
        for bulk in batched(documents, BULK):
            waiting = {document.file.id: self.action(document) for document in bulk}
            missing: set[str] = set()
            failure: Failure | None = None
            try:
                self.patiently(functools.partial(self.send, waiting, missing))
            except Failure as error:
                failure = error
            undone = waiting.keys() | missing
            yield from (document for document in bulk if document.file.id not in undone)
            if failure:
                raise failure

    def send(self, waiting: dict[str, dict[str, Any]], missing: set[str]) -> None:
        """Sends these bulk actions, by `_id`, and takes from `waiting` what Elasticsearch has done.

        What another run has deleted meanwhile goes to `missing`. Raises Busy where Elasticsearch has
        rejected some for now, Failure where it has for good or they went to another index.
        """
        from elasticsearch.helpers import streaming_bulk

        refused: list[dict[str, Any]] = []
        actions = list(waiting.values())
        for accepted, item in streaming_bulk(self.client, actions, chunk_size=len(actions), raise_on_error=False):
            result = next(iter(item.values()))
            if accepted:
                self.check_index(result)
            gone = result.get("result") == "not_found" or "document_missing_exception" in str(result.get("error"))
            if accepted or gone:
                del waiting[result["_id"]]
            else:
                refused.append(result)
            if gone:
                missing.add(result["_id"])
        for result in refused:
            if not passing(result["status"], result["error"]):
                raise Failure(f"Elasticsearch refuses documents: {explained(result)}. {remedy(result)}")
        if refused:
            why = f"it has no room for {len(refused)} documents now ({explained(refused[0])})"
            raise Busy(why, progress=len(refused) < len(actions))

    def action(self, document: Document) -> dict[str, Any]:
        """The bulk action that brings the index up to date with `document`."""
        file = document.file
        body: dict[str, Any] = {"size": file.size, "mtime": file.mtime}
        if document.embedding is None:
            return {"_op_type": "update", "_index": self.name, "_id": file.id, "retry_on_conflict": 3, "doc": body}
        body |= {
            "file_path": file.file_path,
            "desc": file.desc,
            "sha256": document.sha256,
            "embeddings": document.embedding,
        }
        return {"_op_type": "index", "_index": self.name, "_id": file.id, "_source": body}

    def delete(self, ids: Sequence[str]) -> int:
        waiting = {name: {"_op_type": "delete", "_index": self.name, "_id": name} for name in ids}
        missing: set[str] = set()
        if waiting:
            self.patiently(functools.partial(self.send, waiting, missing))
        return len(ids) - len(missing)

    def refresh(self) -> None:
        self.patiently(lambda: self.client.indices.refresh(index=self.name))

    def search(self, embedding: NDArray[np.float32], k: int, desc: str | None) -> dict[str, Any]:
        # Candidates are found with int8 vectors, and twice as many as are asked for scored exactly.
        # docs/scaling.md says why, with the recall.
        knn: dict[str, Any] = {
            "field": "embeddings",
            "query_vector": embedding.tolist(),
            "k": k,
            "num_candidates": min(10_000, max(500, 10 * k)),
            "rescore_vector": {"oversample": 2},
        }
        if desc is not None:
            knn["filter"] = {"term": {"desc": desc}}
        status, answer = self.ask(
            "POST", f"{quote(self.name)}/_search", {"knn": knn, "size": k, "_source": False, "fields": FIELDS}
        )
        if status == 200:
            for hit in answer["hits"]["hits"]:
                self.check_index(hit)
            return answer
        why = explained(answer)
        if "rescore_vector" in why:
            raise Misuse("This Elasticsearch is too old: search.py needs version 8.18 or newer (rescore_vector).")
        raise Failure(f"Elasticsearch cannot search the index {self.name}: {why}.")

    def check_index(self, item: dict[str, Any]) -> None:
        """Raises Failure where a hit or the result of a bulk action is of another index than `model` asked."""
        if item["_index"] != self.concrete:
            raise Failure(f"{self.name} has become the name of another index meanwhile: run this again.")

    def patiently(self, call: Callable[[], Answer]) -> Answer:
        """The result of `call()`, repeated with growing pauses while Elasticsearch is away or busy.

        Raises Failure when it stays so, when the run is to end, and for what no wait will mend.
        """
        from elasticsearch import ApiError, ConnectionTimeout, TransportError
        from elasticsearch import ConnectionError as Away

        since, delay = time.monotonic(), 1.0
        while True:
            try:
                return call()
            except Busy as error:
                why = str(error)
                if error.progress:
                    since, delay = time.monotonic(), 1.0
            except (Away, ConnectionTimeout) as error:
                if distrusts(error):
                    raise Misuse(untrusted(self.connection.place, error)) from None
                why = f"no answer from {self.connection.place} ({innermost(error)})"
            except ApiError as error:
                body = error.body if isinstance(error.body, dict) else {}
                why = explained(body) if body else f"HTTP {error.status_code}"
                if error.status_code == 401:
                    raise Misuse(locked_out(self.connection.place)) from None
                if not passing(error.status_code, body.get("error")):
                    raise Failure(f"Elasticsearch refuses a request: {why}. {remedy(body)}") from None
            except TransportError as error:
                raise Failure(
                    f"{self.connection.place} does not answer as Elasticsearch does: {innermost(error)}."
                ) from None
            waited = time.monotonic() - since
            if waited >= self.patience or not self.pause(delay, f"Elasticsearch: {why}; trying again in {delay:g} s"):
                gave_up = f"Gave up on Elasticsearch after {waited:.0f} s of waiting: {why}."
                raise Failure(f"{gave_up} Run this again to go on from here.")
            delay = min(2 * delay, 16.0)
