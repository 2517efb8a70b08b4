"""How good Elasticsearch's neighbors are, and what limits indexing speed: writes build/neighbors.md.

    python -m tools.benchmark.neighbors [SIZE …]

Sizes are numbers of documents: 10,000, 20,000 and 100,000 unless given; if given, loads are left out.
Embeddings are clustered as those of photographs are: a tenth as many centres as there are embeddings, each
embedding close around one, all of it in 64 of the 768 directions but for a little noise. Recall depends on
that number (Elliott and Clark, https://arxiv.org/abs/2405.17813), and photographs need fewer: ImageNet's
intrinsic dimension is 26 to 43 (Pope et al., https://arxiv.org/abs/2104.08894). The exact scan of the local
index is the truth.
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
from imagesearch.connection import Connection
from imagesearch.elasticsearch_index import ElasticsearchIndex
from imagesearch.retry import NO_RETRY
from imagesearch.sqlite_index import SqliteIndex
from numpy.typing import NDArray

from imagesearch import elasticsearch_index as module
from imagesearch.records import DIMENSIONS, Document, ImageFile, IndexMetadata, ModelInfo
from tests.server import ROOT, Cluster
from tools.benchmark.timing import can_drop, drop, timed

INTRINSIC = 64
QUERIES = 500
K, OTHER_KS = 10, (1, 100)
CANDIDATES, OVERSAMPLES = (50, 100, 200, 500, 1000), (None, 2.0)
SENDERS, BULK_SIZE = 2, module.BULK_SIZE
METADATA = IndexMetadata(ModelInfo("thumbnail"), "/")
MERGED = 100_000  # the largest index that is merged to one segment as well: a million would take an hour


def clustered(size: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """`size` embeddings, each of shape (768,), around size / 10 centres that are the same for every seed."""
    shared = np.random.default_rng(0)
    directions = np.linalg.qr(shared.standard_normal((DIMENSIONS, INTRINSIC)))[0].T.astype(np.float32)
    centres = shared.standard_normal((max(1, size // 10), INTRINSIC), np.float32)
    random = np.random.default_rng(seed)
    for start in range(0, size, 1000):
        count = min(1000, size - start)
        spread = np.float32(0.5) * random.standard_normal((count, INTRINSIC), np.float32)
        noise = np.float32(0.01) * random.standard_normal((count, DIMENSIONS), np.float32)
        yield from (centres[random.integers(0, len(centres), count)] + spread) @ directions + noise


def documents(size: int, seed: int) -> Iterator[Document]:
    for number, embedding in enumerate(clustered(size, seed)):
        path = f"./images/{number % 100}/{number}.jpg"
        yield Document(ImageFile(path, path, str(number % 100), 1, 1), f"{number:064x}", embedding)


def open_index(cluster: Cluster, name: str) -> ElasticsearchIndex:
    connection = Connection.from_env({"ES_URL": cluster.url, "ES_CA_CERT": str(cluster.ca)})
    assert connection
    return ElasticsearchIndex(connection, name, NO_RETRY)


def fill(cluster: Cluster, name: str, parts: list[Iterable[Document]], bulk: int) -> float:
    """Documents a second into a new index, from a sender for each part, so many to a bulk request."""
    with open_index(cluster, name) as index:
        index.create(METADATA)
    module.BULK_SIZE = bulk

    def one(part: Iterable[Document]) -> int:
        with open_index(cluster, name) as index:
            index.get_metadata()
            return sum(1 for _ in index.write(part))

    started = time.perf_counter()
    with ThreadPoolExecutor(len(parts)) as pool:
        written = sum(pool.map(one, parts))
    return written / (time.perf_counter() - started)


Search = Callable[[NDArray[np.float32]], dict[str, Any]]


def with_settings(index: ElasticsearchIndex, candidates: int, oversample: float | None) -> Search:
    """The search for K neighbors with other settings than search.py's own."""

    def search(query: NDArray[np.float32]) -> dict[str, Any]:
        knn = {"field": "embeddings", "query_vector": query.tolist(), "k": K, "num_candidates": candidates}
        if oversample:
            knn["rescore_vector"] = {"oversample": oversample}
        body = {"knn": knn, "size": K, "_source": False, "fields": ["file_path"]}
        status, answer = index._send("POST", f"{index._name}/_search", body)
        assert status == 200, answer
        return answer

    return search


def compare(how: str, search: Search, k: int, queries: list[NDArray[np.float32]], truth: list[dict[str, float]]) -> str:
    """The row of one setting: recall@1, recall@k, the greatest score error and the median time of a query."""
    first, all_k, error, times = 0, 0, 0.0, []
    for query, right in zip(queries, truth, strict=True):
        started = time.perf_counter()
        hits = search(query)["hits"]["hits"]
        times.append(time.perf_counter() - started)
        found = {hit["_id"]: hit["_score"] for hit in hits}
        first += next(iter(found)) == next(iter(right))
        all_k += len(found.keys() & set(itertools.islice(right, k)))
        error = max([error, *(abs(found[name] - right[name]) for name in found.keys() & right.keys())])
    count = len(queries)
    took = 1000 * statistics.median(times)
    return f"| {how} | {k} | {first / count:.3f} | {all_k / k / count:.3f} | {error:.1e} | {took:.1f} |"


def exact(size: int, queries: list[NDArray[np.float32]]) -> list[dict[str, float]]:
    """The true neighbors of each query, by the local index: their scores by `_id`, nearest first."""
    with (
        tempfile.TemporaryDirectory(dir=ROOT / "build") as folder,
        SqliteIndex(Path(folder) / "index.db", "exact") as local,
    ):
        local.create(METADATA)
        for _ in local.write(documents(size, 1)):
            pass
        answers = [local.search(query, max(OTHER_KS))["hits"]["hits"] for query in queries]
    return [{hit["_id"]: hit["_score"] for hit in hits} for hits in answers]


def stored(index: ElasticsearchIndex) -> str:
    """How many segments the index has, and its bytes on disk for each document, by kind."""
    figures = index._client.indices.stats(index=index._name)["_all"]["primaries"]
    with warnings.catch_warnings(action="ignore"):  # the analysis is a technical preview
        client = index._client.options(request_timeout=3600)
        usage = client.indices.disk_usage(index=index._name, run_expensive_tasks=True)[index._name]
    vectors = usage["all_fields"]["knn_vectors_in_bytes"]
    source = usage["fields"]["_source"]["total_in_bytes"]
    parts = (part / figures["docs"]["count"] for part in (usage["store_size_in_bytes"], vectors, source))
    segments = figures["segments"]["count"]
    return "{} segments, {:,.0f} bytes a document, of which vectors and graph {:,.0f}, source {:,.0f}".format(
        segments, *parts
    )


def after_opening(index: ElasticsearchIndex, call: Callable[[], object]) -> float:
    """Seconds of a call with nothing of the index in the file cache: what is mapped in memory cannot be dropped."""
    index._client.indices.close(index=index._name)
    drop()
    index._client.indices.open(index=index._name)
    index._client.cluster.health(index=index._name, wait_for_status="yellow")
    return timed(call)


def recall(size: int) -> Iterator[str]:
    """Yields rows for one size: the load, the index's size, and each setting's recall, error and time."""
    queries = list(itertools.islice(clustered(max(size, QUERIES), 2), QUERIES))
    truth = exact(size, queries)
    memory = f"{max(2, size // 125_000)}g"
    with Cluster(java_options=[f"-Xms{memory}", f"-Xmx{memory}"]) as cluster, open_index(cluster, "recall") as index:
        parts = [itertools.islice(documents(size, 1), sender, None, SENDERS) for sender in range(SENDERS)]
        rate = fill(cluster, index._name, [*parts], BULK_SIZE)
        index.get_metadata()
        index.refresh()
        yield f"\n{size:,} documents, written by {SENDERS} senders in {size / rate:,.0f} s ({rate:,.0f}/s)\n"
        yield f"- as loaded: {stored(index)}"
        if can_drop():
            times = [after_opening(index, functools.partial(index.search, query, K)) for query in queries[:5]]
            yield f"- a query with nothing in the file cache: {1000 * statistics.median(times):,.0f} ms"
        yield "\n| index | num_candidates | rescore_vector | k | recall@1 | recall@k | score error | ms a query |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
        for candidates, oversample in itertools.product(CANDIDATES, OVERSAMPLES):
            how = f"as loaded | {candidates} | " + (f"oversample {oversample:g}" if oversample else "none")
            yield compare(how, with_settings(index, candidates, oversample), K, queries, truth)
        for k in (K, *OTHER_KS):
            yield compare("as loaded | search.py's own |", ours(index, k), k, queries, truth)
        if size <= MERGED:
            index._client.options(request_timeout=3600).indices.forcemerge(index=index._name, max_num_segments=1)
            index.refresh()
            for k in (K, *OTHER_KS):
                yield compare("one segment | search.py's own |", ours(index, k), k, queries, truth)
            yield f"\n- as one segment: {stored(index)}"


def ours(index: ElasticsearchIndex, k: int) -> Search:
    """The search that search.py makes."""
    return lambda query: index.search(query, k)


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
    (ROOT / "build").mkdir(exist_ok=True)

    def add(rows: Iterable[str]) -> None:
        for row in rows:
            print(row, flush=True)
            lines.append(row)

    if not sizes:
        add(["| nodes | documents in a bulk request | senders | documents/s |", "| --- | --- | --- | --- |"])
        for size in (1, 3):
            with Cluster(size=size, java_options=["-Xms1g", "-Xmx1g"]) as cluster:
                add(load(cluster))
    for size in sizes or (10_000, 20_000, 100_000):
        add(recall(size))
    (ROOT / "build" / "neighbors.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
