"""How good Elasticsearch's neighbors are, what they cost, and how fast they are indexed: writes build/neighbors.md.

    python -m tools.neighbors [SIZE SHAPE …]

Without arguments: all four shapes of embeddings (tools/embeddings.py) at 30,000, and the clustered ones at 100,000.
"""

import itertools
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from elasticsearch import Elasticsearch

from imagesearch.index import Index, open_index
from imagesearch.index.connection import Connection
from imagesearch.parallel import available_cpus, make_chunks, map_buffered
from imagesearch.records import Document, ImageFile, IndexMetadata, ModelInfo
from tests.server import ROOT
from tests.server import Elasticsearch as Server
from tools.embeddings import SHAPES, Embeddings, nearest, recall

QUERIES, K = 200, 10
WORKERS, CHUNK_SIZE = available_cpus() + 4, 96  # as create.py's
MERGED = 100_000  # the largest index that is merged to one segment as well: a million would take an hour

# num_candidates, and rescore_vector's oversample, by which Elasticsearch multiplies them; None for no rescoring.
Setting = tuple[int, float | None]
SETTINGS: dict[str, list[Setting]] = {
    "hnsw": [(500, None), (1000, None), (1500, None), (2000, None)],
    "int8_hnsw": [(500, 2), (1500, 2), (1500, 3)],
    "bbq_hnsw": [(500, 2), (1500, 2), (1500, 5), (1500, 10)],
}
FIELDS = [{"field": "file_path"}, {"field": "desc"}]
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def load_index(index: Index, embeddings: Embeddings) -> float:
    """Writes embeddings into a new index, as create.py does; returns the seconds it took.

    The number of an embedding is in the `file_path` of its document.
    """
    index.create(IndexMetadata(ModelInfo("thumbnail"), "/"))
    started = time.perf_counter()
    documents = itertools.starmap(_document, enumerate(embeddings))
    with ThreadPoolExecutor(WORKERS) as pool:
        for stored in map_buffered(
            pool, index.write, make_chunks(documents, CHUNK_SIZE, 0, lambda _: 0, 0), 2 * WORKERS
        ):
            assert stored
    index.refresh()
    return time.perf_counter() - started


def _document(number: int, embedding: Embeddings) -> Document:
    path = f"./images/{number % 100}/{number}.jpg"
    image = ImageFile(path, path, str(number % 100), 100_000, 1_700_000_000_000_000_000 + number)
    return Document(image, f"{number:064x}", embedding)


def numbers(response: Any) -> set[int]:
    """Returns the numbers of the embeddings that a search has found."""
    return {int(Path(hit["fields"]["file_path"][0]).stem) for hit in response["hits"]["hits"]}


def search(client: Elasticsearch, index: str, query: Embeddings, setting: Setting) -> set[int]:
    """Returns the numbers of the nearest embeddings, by the graph."""
    candidates, oversample = setting
    knn = {"field": "embeddings", "query_vector": query.tolist(), "k": K, "num_candidates": candidates}
    if oversample:
        knn["rescore_vector"] = {"oversample": oversample}
    return numbers(client.search(index=index, knn=knn, size=K, source=False, docvalue_fields=FIELDS))


def compare(
    client: Elasticsearch, index: str, setting: Setting, queries: Embeddings, truth: Any
) -> tuple[float, float]:
    """Returns the recall of the 10 nearest, and the median milliseconds of a query."""
    found, seconds = [], []
    for query in queries:
        started = time.perf_counter()
        found.append(search(client, index, query, setting))
        seconds.append(time.perf_counter() - started)
    return recall(found, truth), 1000 * statistics.median(seconds)


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


def measure(client: Elasticsearch, server: Server, size: int, shape: str) -> Iterator[str]:
    """Yields the rows of one shape and size."""
    embeddings, queries = SHAPES[shape](size, 1), SHAPES[shape](max(size, QUERIES), 2)[:QUERIES]
    truth = nearest(embeddings, queries, K)
    yield f"\n{size:,} embeddings, {shape}\n"
    yield "| index type | num_candidates | oversample | recall@10 | ms a query |"
    yield "| --- | --- | --- | --- | --- |"
    notes = []
    for index_type, settings in SETTINGS.items():
        index = f"{shape}-{size}-{index_type.replace('_', '-')}"
        connection = Connection.from_env(server.environment)
        with open_index(index, connection, Path(), index_type=index_type, long_retries=True) as opened:
            seconds = load_index(opened, embeddings)
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
    with Server(java_options=[f"-Xms{memory}", f"-Xmx{memory}"]) as server:
        connection = Connection.from_env(server.environment)
        assert connection
        client = Elasticsearch(
            connection.url, headers=connection.headers, ssl_context=connection.ssl_context(), request_timeout=600
        )
        for size, shape in pairs:
            for line in measure(client, server, size, shape):
                print(line, flush=True)
                lines.append(line)
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "neighbors.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
