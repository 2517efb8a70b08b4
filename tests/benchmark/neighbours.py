"""How good Elasticsearch's neighbours are, and what bounds a load: writes build/neighbours.md.

    python -m tests.benchmark.neighbours [SIZE …]

Sizes are numbers of documents, 20,000 unless given. Embeddings are clustered as those of photographs are:
a tenth as many centres as there are embeddings, each embedding close around one. The exact scan of the
local index is the truth.
"""

import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagesearch import elastic as module
from imagesearch.connection import connection
from imagesearch.elastic import Elastic
from imagesearch.embed import Document
from imagesearch.files import File
from imagesearch.local import Local
from imagesearch.models import DIMENSIONS, ModelRecord
from tests.server import ROOT, Cluster

QUERIES, K = 500, 10


def clustered(size: int, seed: int) -> NDArray[np.float32]:
    """`size` embeddings, shape (size, 768), around size / 10 centres that are the same for every seed."""
    centres = np.random.default_rng(0).standard_normal((max(1, size // 10), DIMENSIONS), np.float32)
    random = np.random.default_rng(seed)
    noise = random.standard_normal((size, DIMENSIONS), np.float32)
    return centres[random.integers(0, len(centres), size)] + np.float32(0.5) * noise


def documents(embeddings: NDArray[np.float32]) -> Iterator[Document]:
    for number, embedding in enumerate(embeddings):
        yield Document(File(f"./images/{number % 100}/{number}.jpg", 1, 1), None, "0" * 64, embedding)


def open_elastic(cluster: Cluster, name: str) -> Elastic:
    place = connection({"ES_URL": cluster.url, "ES_CA_CERT": str(cluster.ca)}, insecure=False)
    assert place
    return Elastic(place, name, lambda seconds, why: False, 0)


def send(cluster: Cluster, name: str, embeddings: NDArray[np.float32], senders: int, bulk: int) -> float:
    """Documents a second into a new index, from so many senders, so many to a bulk request."""
    with open_elastic(cluster, name) as index:
        index.create(ModelRecord("thumbnail"))
    module.BULK = bulk
    parts = np.array_split(np.arange(len(embeddings)), senders)
    all_documents = list(documents(embeddings))

    def one(numbers: NDArray[np.int64]) -> int:
        with open_elastic(cluster, name) as index:
            return sum(1 for _ in index.write(all_documents[number] for number in numbers))

    started = time.perf_counter()
    with ThreadPoolExecutor(senders) as pool:
        written = sum(pool.map(one, parts))
    return written / (time.perf_counter() - started)


def search(index: Elastic, candidates: int, oversample: float | None, query: NDArray[np.float32]) -> dict[str, Any]:
    """A search with other settings than search.py's own."""
    knn: dict[str, Any] = {"field": "embeddings", "query_vector": query.tolist(), "k": K, "num_candidates": candidates}
    if oversample:
        knn["rescore_vector"] = {"oversample": oversample}
    body = {"knn": knn, "size": K, "_source": False, "fields": ["file_path"]}
    status, answer = index.ask("POST", f"{index.name}/_search", body)
    assert status == 200, answer
    return answer


def compare(
    ask: Callable[[NDArray[np.float32]], dict[str, Any]], queries: NDArray[np.float32], truth: list[dict[str, float]]
) -> tuple[float, float, float, float]:
    """Recall@1, recall@10, the greatest score error and the median milliseconds of a query."""
    first, ten, error, times = 0, 0, 0.0, []
    for query, right in zip(queries, truth, strict=True):
        started = time.perf_counter()
        hits = ask(query)["hits"]["hits"]
        times.append(time.perf_counter() - started)
        found = {hit["_id"]: hit["_score"] for hit in hits}
        first += next(iter(found)) == next(iter(right))
        ten += len(found.keys() & right.keys())
        error = max([error, *(abs(found[name] - right[name]) for name in found.keys() & right.keys())])
    return first / len(queries), ten / K / len(queries), error, 1000 * statistics.median(times)


def recall(cluster: Cluster, size: int) -> Iterator[str]:
    """Rows for one size: the load, the index's size, and each setting's recall, error and time."""
    embeddings, queries = clustered(size, 1), clustered(max(size, QUERIES), 2)[:QUERIES]
    name = f"recall-{size}"
    with tempfile.TemporaryDirectory() as folder, Local(Path(folder) / "index.db", name) as local:
        local.create(ModelRecord("thumbnail"))
        for _ in local.write(documents(embeddings)):
            pass
        answers = [local.search(query, K, None)["hits"]["hits"] for query in queries]
        truth = [{hit["_id"]: hit["_score"] for hit in hits} for hits in answers]
    with open_elastic(cluster, name) as index:
        index.create(ModelRecord("thumbnail"))
        started = time.perf_counter()
        for _ in index.write(documents(embeddings)):
            pass
        rate = size / (time.perf_counter() - started)
        index.refresh()
        index.client.options(request_timeout=3600).indices.forcemerge(index=name, max_num_segments=1)
        index.client.indices.refresh(index=name)
        bytes_ = index.client.indices.stats(index=name)["indices"][name]["primaries"]["store"]["size_in_bytes"]
        yield f"\n{size:,} documents, written at {rate:,.0f}/s, {bytes_ / size:,.0f} bytes each in the index:\n"
        yield "| num_candidates | rescore_vector | recall@1 | recall@10 | score error | ms a query |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for candidates, oversample in itertools.product((20, 50, 100, 200, 500), (None, 2.0)):
            ask = functools.partial(search, index, candidates, oversample)
            one, ten, error, took = compare(ask, queries, truth)
            how = f"oversample {oversample:g}" if oversample else "none"
            yield f"| {candidates} | {how} | {one:.3f} | {ten:.3f} | {error:.1e} | {took:.1f} |"
        one, ten, error, took = compare(lambda query: index.search(query, K, None), queries, truth)
        yield f"| search.py's own | | {one:.3f} | {ten:.3f} | {error:.1e} | {took:.1f} |"
        index.client.indices.delete(index=name)


def load(cluster: Cluster) -> Iterator[str]:
    """Rows for documents a second by bulk size and senders."""
    embeddings = clustered(4000, 3)
    for bulk, senders in ((16, 1), (64, 1), (128, 1), (512, 1), (2048, 1), (128, 2), (128, 4), (512, 2)):
        rate = send(cluster, f"load-{bulk}-{senders}", embeddings, senders, bulk)
        yield f"| {len(cluster.nodes)} | {bulk} ({bulk * 8.4 / 1000:.1f} MB) | {senders} | {rate:,.0f} |"


def main() -> None:
    sizes = [int(text.replace(",", "")) for text in sys.argv[1:]] or [20_000]
    lines: list[str] = []

    def add(rows: Iterator[str]) -> None:
        for row in rows:
            print(row, flush=True)
            lines.append(row)

    head = ["| nodes | documents in a bulk request | senders | documents/s |", "| --- | --- | --- | --- |"]
    add(iter(head))
    for size in (1, 3):
        with Cluster(size=size, memory="1g") as cluster:
            add(load(cluster))
    with Cluster(memory="2g") as cluster:
        for size in sizes:
            add(recall(cluster, size))
    (ROOT / "build" / "neighbours.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
