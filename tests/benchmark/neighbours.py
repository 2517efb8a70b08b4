"""How good Elasticsearch's neighbours are, and what bounds a load: writes build/neighbours.md.

    python -m tests.benchmark.neighbours [SIZE …]

Sizes are numbers of documents: 10,000, 20,000 and 100,000 unless given; if given, loads are left out.
Embeddings are clustered as those of photographs are: a tenth as many centres as there are embeddings, each
embedding close around one. The exact scan of the local index is the truth.
"""

import functools
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
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
from tests.benchmark.timing import can_drop, drop, timed
from tests.server import ROOT, Cluster

QUERIES, K = 500, 10
CANDIDATES, OVERSAMPLES = (20, 50, 100, 200, 500), (None, 2.0)


def clustered(size: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """`size` embeddings, each of shape (768,), around size / 10 centres that are the same for every seed."""
    centres = np.random.default_rng(0).standard_normal((max(1, size // 10), DIMENSIONS), np.float32)
    random = np.random.default_rng(seed)
    for start in range(0, size, 1000):
        count = min(1000, size - start)
        noise = np.float32(0.5) * random.standard_normal((count, DIMENSIONS), np.float32)
        yield from centres[random.integers(0, len(centres), count)] + noise


def documents(size: int, seed: int) -> Iterator[Document]:
    for number, embedding in enumerate(clustered(size, seed)):
        yield Document(File(f"./images/{number % 100}/{number}.jpg", 1, 1), None, "0" * 64, embedding)


def open_elastic(cluster: Cluster, name: str) -> Elastic:
    place = connection({"ES_URL": cluster.url, "ES_CA_CERT": str(cluster.ca)}, insecure=False)
    assert place
    return Elastic(place, name, lambda seconds, why: False, 0)


def fill(cluster: Cluster, name: str, parts: list[Iterable[Document]], bulk: int) -> float:
    """Documents a second into a new index, from a sender for each part, so many to a bulk request."""
    with open_elastic(cluster, name) as index:
        index.create(ModelRecord("thumbnail"))
    module.BULK = bulk

    def one(part: Iterable[Document]) -> int:
        with open_elastic(cluster, name) as index:
            return sum(1 for _ in index.write(part))

    started = time.perf_counter()
    with ThreadPoolExecutor(len(parts)) as pool:
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
    how: str,
    ask: Callable[[NDArray[np.float32]], dict[str, Any]],
    queries: list[NDArray[np.float32]],
    truth: list[dict[str, float]],
) -> str:
    """The row of one setting: recall@1, recall@10, the greatest score error and the median time of a query."""
    first, ten, error, times = 0, 0, 0.0, []
    for query, right in zip(queries, truth, strict=True):
        started = time.perf_counter()
        hits = ask(query)["hits"]["hits"]
        times.append(time.perf_counter() - started)
        found = {hit["_id"]: hit["_score"] for hit in hits}
        first += next(iter(found)) == next(iter(right))
        ten += len(found.keys() & right.keys())
        error = max([error, *(abs(found[name] - right[name]) for name in found.keys() & right.keys())])
    count = len(queries)
    took = 1000 * statistics.median(times)
    return f"| {how} | {first / count:.3f} | {ten / K / count:.3f} | {error:.1e} | {took:.1f} |"


def exact(size: int, queries: list[NDArray[np.float32]]) -> list[dict[str, float]]:
    """The true neighbours of each query, by the local index: their scores by `_id`, nearest first."""
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder, Local(Path(folder) / "index.db", "exact") as local:
        local.create(ModelRecord("thumbnail"))
        for _ in local.write(documents(size, 1)):
            pass
        answers = [local.search(query, K, None)["hits"]["hits"] for query in queries]
    return [{hit["_id"]: hit["_score"] for hit in hits} for hits in answers]


def stored(index: Elastic) -> str:
    """How many segments the index has, and its bytes on disk for each document, by kind."""
    figures = index.client.indices.stats(index=index.name)["_all"]["primaries"]
    with warnings.catch_warnings(action="ignore"):  # the analysis is a technical preview
        client = index.client.options(request_timeout=3600)
        usage = client.indices.disk_usage(index=index.name, run_expensive_tasks=True)[index.name]
    vectors = usage["all_fields"]["knn_vectors_in_bytes"]
    source = usage["fields"]["_source"]["total_in_bytes"]
    parts = (part / figures["docs"]["count"] for part in (usage["store_size_in_bytes"], vectors, source))
    segments = figures["segments"]["count"]
    return "{} segments, {:,.0f} bytes a document, of which vectors and graph {:,.0f}, source {:,.0f}".format(
        segments, *parts
    )


def after_opening(index: Elastic, call: Callable[[], object]) -> float:
    """Seconds of a call with nothing of the index in the file cache: what is mapped in memory cannot be dropped."""
    index.client.indices.close(index=index.name)
    drop()
    index.client.indices.open(index=index.name)
    index.client.cluster.health(index=index.name, wait_for_status="yellow")
    return timed(call)


def recall(cluster: Cluster, size: int) -> Iterator[str]:
    """Rows for one size: the load, the index's size, and each setting's recall, error and time."""
    queries = list(itertools.islice(clustered(max(size, QUERIES), 2), QUERIES))
    truth = exact(size, queries)
    name = f"recall-{size}"
    rate = fill(cluster, name, [documents(size, 1)], module.BULK)
    with open_elastic(cluster, name) as index:

        def ours(query: NDArray[np.float32]) -> dict[str, Any]:
            return index.search(query, K, None)

        index.refresh()
        yield f"\n{size:,} documents, written in {size / rate:,.0f} s ({rate:,.0f}/s)\n"
        yield f"- as loaded: {stored(index)}"
        as_loaded = compare("as loaded | search.py's own |", ours, queries, truth)
        if can_drop():
            times = [after_opening(index, functools.partial(ours, query)) for query in queries[:5]]
            yield f"- a query with nothing in the file cache: {1000 * statistics.median(times):,.0f} ms"
        started = time.perf_counter()
        index.client.options(request_timeout=7200).indices.forcemerge(index=name, max_num_segments=1)
        index.refresh()
        yield f"- merged in {time.perf_counter() - started:,.0f} s: {stored(index)}\n"
        yield "| index | num_candidates | rescore_vector | recall@1 | recall@10 | score error | ms a query |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        yield as_loaded
        for candidates, oversample in itertools.product(CANDIDATES, OVERSAMPLES):
            ask = functools.partial(search, index, candidates, oversample)
            how = f"oversample {oversample:g}" if oversample else "none"
            yield compare(f"merged | {candidates} | {how}", ask, queries, truth)
        yield compare("merged | search.py's own |", ours, queries, truth)
        index.client.indices.delete(index=name)


def load(cluster: Cluster) -> Iterator[str]:
    """Rows for documents a second by bulk size and senders."""
    all_documents = list(documents(4000, 3))
    for bulk, senders in ((16, 1), (64, 1), (128, 1), (256, 1), (512, 1), (2048, 1), (128, 2), (128, 4), (512, 2)):
        parts = [all_documents[number::senders] for number in range(senders)]
        rate = fill(cluster, f"load-{bulk}-{senders}", [*parts], bulk)
        yield f"| {len(cluster.nodes)} | {bulk} ({bulk * 8.4 / 1000:.1f} MB) | {senders} | {rate:,.0f} |"


def main() -> None:
    sizes = [int(text.replace(",", "")) for text in sys.argv[1:]]
    lines: list[str] = []

    def add(rows: Iterable[str]) -> None:
        for row in rows:
            print(row, flush=True)
            lines.append(row)

    if not sizes:
        add(["| nodes | documents in a bulk request | senders | documents/s |", "| --- | --- | --- | --- |"])
        for size in (1, 3):
            with Cluster(size=size, memory="1g") as cluster:
                add(load(cluster))
    for size in sizes or (10_000, 20_000, 100_000):
        with Cluster(memory="2g") as cluster:
            add(recall(cluster, size))
    (ROOT / "build" / "neighbours.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
