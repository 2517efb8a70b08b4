"""How good Elasticsearch's neighbors are, what they cost, and how fast they are indexed: writes build/neighbors.md.

    python -m tools.neighbors [SIZE SHAPE …]

Without arguments: all four shapes of embeddings (tools/embeddings.py) at 30,000, and the clustered ones at 100,000.
"""

import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elasticsearch import Elasticsearch, OrjsonSerializer, helpers

from imagesearch.index.connection import Connection
from imagesearch.index.elasticsearch_writer import GRAPH, PROPERTIES
from tests.server import ROOT, Cluster
from tools.embeddings import SHAPES, Embeddings, nearest

QUERIES, K = 200, 10
MERGED = 100_000  # the largest index that is merged to one segment as well: a million would take an hour

# Candidates of each shard, and how many times k are scored again with exact vectors; None for not at all.
Setting = tuple[int, float | None]
SETTINGS: dict[str, list[Setting]] = {
    "hnsw": [(500, None), (1000, None), (1500, None), (2000, None)],
    "int8_hnsw": [(500, 2), (500, 5), (1500, 2), (1500, 10)],
    "bbq_hnsw": [(500, 2), (500, 5), (1500, 3), (1500, 10), (1500, 100)],
}
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def properties(index_type: str) -> dict[str, Any]:
    """Returns the mapping that create.py makes."""
    options = {"type": index_type, **GRAPH}
    return PROPERTIES | {"embeddings": PROPERTIES["embeddings"] | {"index_options": options}}


def load(client: Elasticsearch, index: str, index_type: str, embeddings: Embeddings) -> float:
    """Writes the embeddings with two senders; returns the seconds it took."""
    mappings = {"dynamic": "strict", "properties": properties(index_type)}
    client.indices.create(index=index, mappings=mappings)
    documents = (
        {
            "_id": f"{number:064x}",
            "desc": "birds",
            "file_path": f"./images/birds/{number}.jpg",
            "size": 100_000,
            "mtime": 1_700_000_000_000_000_000 + number,
            "sha256": f"{number:064x}",
            "embeddings": embedding,
        }
        for number, embedding in enumerate(embeddings)
    )
    started = time.perf_counter()
    for _ in helpers.parallel_bulk(client, documents, thread_count=2, chunk_size=128, index=index):
        pass
    client.indices.refresh(index=index)
    return time.perf_counter() - started


def search(client: Elasticsearch, index: str, query: Embeddings, setting: Setting) -> list[int]:
    """Returns the numbers of the nearest embeddings, by the graph."""
    candidates, oversample = setting
    knn = {"field": "embeddings", "query_vector": query.tolist(), "k": K, "num_candidates": candidates}
    if oversample:
        knn["rescore_vector"] = {"oversample": oversample}
    response = client.search(index=index, knn=knn, size=K, source=False, docvalue_fields=["file_path", "desc"])
    return [int(hit["_id"], 16) for hit in response["hits"]["hits"]]


def compare(
    client: Elasticsearch, index: str, setting: Setting, queries: Embeddings, truth: Any
) -> tuple[float, float]:
    """Returns the recall of the 10 nearest, and the median milliseconds of a query."""
    found, seconds = 0, []
    for query, right in zip(queries, truth, strict=True):
        started = time.perf_counter()
        ids = search(client, index, query, setting)
        seconds.append(time.perf_counter() - started)
        found += len(set(ids) & set(right.tolist()))
    return found / K / len(queries), 1000 * statistics.median(seconds)


def disk_usage(client: Elasticsearch, index: str) -> str:
    """Returns how many segments the index has, and its bytes on disk for each document."""
    figures = client.indices.stats(index=index)["_all"]["primaries"]
    with warnings.catch_warnings(action="ignore"):  # the analysis is a technical preview
        usage = client.indices.disk_usage(index=index, run_expensive_tasks=True)[index]
    vectors = usage["all_fields"]["knn_vectors_in_bytes"]
    source = usage["fields"]["_source"]["total_in_bytes"]
    parts = [part / figures["docs"]["count"] for part in (usage["store_size_in_bytes"], vectors, source)]
    return "{:,} segments; {:,.0f} bytes a document: vectors and graph {:,.0f}, source {:,.0f}".format(
        figures["segments"]["count"], *(parts[0], parts[1], parts[2])
    )


def cold_query(client: Elasticsearch, index: str, query: Embeddings, setting: Setting) -> float:
    """Returns the milliseconds of a query with nothing of the index in the file cache."""
    client.indices.close(index=index)
    os.sync()
    DROP_CACHES.write_text("3")  # all but what a process has mapped in memory
    client.indices.open(index=index)
    client.cluster.health(index=index, wait_for_status="yellow")
    started = time.perf_counter()
    search(client, index, query, setting)
    return 1000 * (time.perf_counter() - started)


def measure(client: Elasticsearch, size: int, shape: str) -> Iterator[str]:
    """Yields the rows of one shape and size."""
    embeddings, queries = SHAPES[shape](size, 1), SHAPES[shape](max(size, QUERIES), 2)[:QUERIES]
    truth = nearest(embeddings, queries, K)
    yield f"\n{size:,} embeddings, {shape}\n"
    yield "| index type | num_candidates | oversample | recall@10 | ms a query |"
    yield "| --- | --- | --- | --- | --- |"
    notes = []
    for index_type, settings in SETTINGS.items():
        index = f"{shape}-{size}-{index_type.replace('_', '-')}"
        seconds = load(client, index, index_type, embeddings)
        note = f"- {index_type}: {size / seconds:,.0f} documents/s; {disk_usage(client, index)}"
        if os.access(DROP_CACHES, os.W_OK):
            times = [cold_query(client, index, query, settings[0]) for query in queries[:5]]
            note += f"; a query with nothing in the page cache {statistics.median(times):,.0f} ms"
        for setting in settings:
            recall, milliseconds = compare(client, index, setting, queries, truth)
            yield f"| {index_type} | {setting[0]:,} | {setting[1] or ''} | {recall:.3f} | {milliseconds:.1f} |"
        if shape == "clustered" and 30_000 < size <= MERGED:
            started = time.perf_counter()
            client.options(request_timeout=3600).indices.forcemerge(index=index, max_num_segments=1)
            client.indices.refresh(index=index)
            merged = time.perf_counter() - started
            recall, milliseconds = compare(client, index, settings[0], queries, truth)
            note += f"; merged to one segment in {merged:.0f} s: recall {recall:.3f}, {milliseconds:.1f} ms"
        notes.append(note)
        client.indices.delete(index=index)
    yield ""
    yield from notes


def main() -> None:
    arguments = sys.argv[1:]
    pairs = (
        [(int(size), shape) for size, shape in zip(arguments[::2], arguments[1::2], strict=True)] if arguments else []
    )
    pairs = pairs or [*((30_000, shape) for shape in SHAPES), (100_000, "clustered")]
    memory = f"{max(2, max(size for size, _ in pairs) // 125_000)}g"
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    lines = [f"{os.cpu_count()} CPUs, {cpu[1] if cpu else platform.processor()}"]
    with Cluster(java_options=[f"-Xms{memory}", f"-Xmx{memory}"]) as cluster:
        connection = Connection.from_env({"ES_URL": cluster.url, "ES_CA_CERT": str(cluster.ca)})
        assert connection
        client = Elasticsearch(
            list(connection.hosts), headers=connection.headers, ssl_context=connection.ssl_context(),
            request_timeout=600, serializer=OrjsonSerializer(),
        )  # fmt: skip
        for size, shape in pairs:
            for line in measure(client, size, shape):
                print(line, flush=True)
                lines.append(line)
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "neighbors.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
