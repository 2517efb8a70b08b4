"""How good Elasticsearch's neighbors are, what they cost, and how fast they are indexed: writes build/neighbors.md.

    python -m tools.neighbors [--size SIZE] [--index-type TYPE]

Without arguments: all four shapes of embeddings (tools/embeddings.py) at 30,000, and the clustered ones at 100,000.
With a size: the clustered ones, in an index of each type or of one; a million takes some hours and 30 GB of the disk.
"""

import argparse
import itertools
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from elasticsearch import Elasticsearch

from imagesearch.index import Index, open_index
from imagesearch.index.connection import Connection
from imagesearch.index.elasticsearch import CANDIDATES
from imagesearch.parallel import available_cpus, batch_until_error, map_buffered
from imagesearch.records import Document, ImageFile, IndexMetadata, ModelInfo
from tests.server import ROOT
from tests.server import Elasticsearch as Server
from tools.embeddings import SHAPES, Embeddings, nearest, recall

QUERIES, K = 200, 10
WORKERS, CHUNK_SIZE = available_cpus() + 4, 96  # as create.py's
LARGE = 30_000  # a larger index is measured when its own merges have ended, and merged to one segment, as well
MARKS = (10_000, 100_000, 300_000)  # documents after which the rate of a load is told

# num_candidates, and rescore_vector's oversample, by which Elasticsearch multiplies them; None for no rescoring.
Setting = tuple[int, float | None]
SETTINGS: dict[str, list[Setting]] = {
    "hnsw": [(500, None), (1500, None)],
    "int8_hnsw": [(375, 2), (500, 2), (750, 2), (1500, 2)],
    "bbq_hnsw": [(500, 2), (1500, 2), (1500, 10)],
}
HEADER = "| embeddings | index | num_candidates | oversample | recall@10 | ms a query |\n|" + 6 * " --- |"
FIELDS = [{"field": "file_path"}, {"field": "desc"}]
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def load_index(index: Index, embeddings: Iterable[Embeddings]) -> float:
    """Writes embeddings into a new index, as create.py does; returns the seconds it took.

    The number of an embedding is in the `file_path` of its document.
    """
    index.create(IndexMetadata(ModelInfo("thumbnail"), "/"))
    started = time.perf_counter()
    documents = itertools.starmap(_document, enumerate(embeddings))
    with ThreadPoolExecutor(WORKERS) as pool:
        for stored in map_buffered(pool, index.write, batch_until_error(documents, CHUNK_SIZE), 2 * WORKERS):
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
        figures["segments"]["count"], *parts
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


def note_rates(embeddings: Embeddings, notes: list[str]) -> Iterator[Embeddings]:
    """Yields each embedding, and notes how many documents a second were written at each of the marks."""
    started = time.perf_counter()
    for number, embedding in enumerate(embeddings):
        if number in MARKS:
            notes.append(f"{number / (time.perf_counter() - started):,.0f}/s to {number:,}")
        yield embedding


def wait_for_merges(client: Elasticsearch, index: str) -> None:
    """Waits until no merge has been under way for half a minute."""
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 30:
        if client.indices.stats(index=index)["_all"]["primaries"]["merges"]["current"]:
            quiet_since = time.monotonic()
        time.sleep(1)


def measure(
    client: Elasticsearch,
    server: Server,
    shape: str,
    embeddings: Embeddings,
    queries: Embeddings,
    truth: Any,
    index_type: str,
) -> Iterator[str]:
    """Yields the rows of some embeddings in an index of one type, then a line about it."""
    size, settings = len(embeddings), SETTINGS[index_type]
    index, notes = f"{shape}-{size}-{index_type.replace('_', '-')}", list[str]()

    def rows(when: str) -> Iterator[str]:
        for setting in settings:
            recall, milliseconds = compare(client, index, setting, queries, truth)
            yield (
                f"| {size:,} {shape} | {index_type}, {when} | {setting[0]:,} | {setting[1] or ''} |"
                f" {recall:.4f} | {milliseconds:.0f} |"
            )

    connection = Connection.from_env(server.environment)
    with open_index(index, connection, Path(), index_type=index_type, long_retries=True) as opened:
        seconds = load_index(opened, note_rates(embeddings, notes))
    notes += [f"{size / seconds:,.0f}/s in all", f"as loaded {disk_usage(client, index)}"]
    yield from rows("as loaded")
    if size > LARGE:
        started = time.perf_counter()
        wait_for_merges(client, index)
        notes.append(f"its own merges ended {time.perf_counter() - started:.0f} s later: {disk_usage(client, index)}")
        yield from rows("after its own merges")
    if os.access(DROP_CACHES, os.W_OK):
        times = [cold_query(client, index, query, CANDIDATES[index_type]) for query in queries[:5]]
        notes.append(f"a query with nothing in the page cache {statistics.median(times):,.0f} ms")
    if size > LARGE:
        started = time.perf_counter()
        client.options(request_timeout=6 * 3600).indices.forcemerge(index=index, max_num_segments=1)
        client.indices.refresh(index=index)
        notes.append(f"merged to one segment in {time.perf_counter() - started:.0f} s")
        yield from rows("one segment")
    client.indices.delete(index=index)
    yield f"- {size:,} {shape}, {index_type}: {'; '.join(notes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="how many embeddings")
    parser.add_argument("--index-type", choices=list(SETTINGS), help="one index type, in place of all")
    arguments = parser.parse_args()
    types = [arguments.index_type] if arguments.index_type else list(SETTINGS)
    pairs = [(arguments.size or 100_000, "clustered")]
    if not arguments.size:
        pairs += [(30_000, shape) for shape in SHAPES]
    memory = f"{max(2, max(size for size, _ in pairs) // 250_000)}g"
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} CPUs, {cpu[1] if cpu else platform.processor()}"
    rows, notes = [HEADER], list[str]()
    with Server(java_options=[f"-Xms{memory}", f"-Xmx{memory}"]) as server:
        connection = Connection.from_env(server.environment)
        assert connection
        client = Elasticsearch(
            connection.url, headers=connection.headers, ssl_context=connection.ssl_context(), request_timeout=600
        )
        print(HEADER)
        for size, shape in pairs:
            embeddings, queries = SHAPES[shape](size, 1), SHAPES[shape](size, 2)[:QUERIES].copy()
            truth = nearest(embeddings, queries, K)
            for index_type in types:
                for line in measure(client, server, shape, embeddings, queries, truth, index_type):
                    print(line, flush=True)
                    (rows if line.startswith("|") else notes).append(line)
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "neighbors.md").write_text("\n".join([machine, "", *rows, "", *notes]) + "\n")


if __name__ == "__main__":
    main()
