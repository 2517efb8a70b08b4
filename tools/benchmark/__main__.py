"""`make benchmark`: how fast it is on this machine, as ratios from one run; writes build/benchmark.md.

The model is one of CLIP's exact shape with random weights (tests/clip_model.py); the photographs are crops
and scalings of scikit-learn's two.
"""

import contextlib
import functools
import json
import os
import platform
import queue
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import onnxruntime
from imagesearch.cache import model_sha256
from imagesearch.connection import Connection
from imagesearch.elasticsearch_index import PROPERTIES, ElasticsearchIndex
from imagesearch.elasticsearch_search import META_KEY
from imagesearch.folder import FolderSource
from imagesearch.int8 import write_probe
from imagesearch.prepared_model import prepared_model_path
from imagesearch.retry import NO_RETRY
from imagesearch.sqlite_index import SqliteIndex
from obstore.store import from_url
from PIL import Image
from sklearn.datasets import load_sample_images

from imagesearch import clip
from imagesearch.files import stream_sha256
from imagesearch.images import open_rgb
from imagesearch.index import WritableIndex
from imagesearch.models import Thumbnail
from imagesearch.parallel import available_cpus
from imagesearch.records import DIMENSIONS, Document, ImageFile, IndexMetadata, ModelInfo
from tests.clip_model import build, build_processor
from tests.server import ROOT, S3, Cluster
from tools.benchmark.tutorial import load as load_as_tutorial

FOLDER = ROOT / "build" / "benchmark"
MODEL, SHALLOW = FOLDER / "clip.onnx", FOLDER / "shallow.onnx"  # CLIP's twelve layers, and three of them
SMALL, LARGE = FOLDER / "small", FOLDER / "large"
PHOTOGRAPHS, LARGE_PHOTOGRAPHS, TINY, PIPELINE = 1000, 200, 100_000, 6000
TINY_RUN = ("--images", "pipeline", "--model", "thumbnail", "--index", "pipeline")
THUMBNAIL = Thumbnail()
GMAC_PER_IMAGE = (12 * (4 * 50 * 768 * 768 + 2 * 50 * 768 * 3072) + 49 * 3072 * 768) / 1e9  # CLIP's matrix products
READ_DELAY_SECONDS = 0.05  # added to each read of an object
DISTANCE_SECONDS = 0.1  # added to each round trip to Elasticsearch
METADATA = IndexMetadata(ModelInfo("thumbnail"), str(FOLDER))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    target: str = ""


@dataclass(frozen=True)
class Run:
    """What a process took: seconds, peak memory in MB, and its output."""

    seconds: float
    peak: float
    stdout: str
    stderr: str


def run(*command: object, **environment: str) -> Run:
    """Runs a Python command in the benchmark's folder to its end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=FOLDER, env=ENVIRONMENT | environment, stdout=out, stderr=err
        )
        peak = 0.0
        end = threading.Thread(target=process.wait)
        end.start()
        while end.is_alive():
            # Not ru_maxrss, which a child begins with its parent's.
            found = re.search(r"VmHWM:\s+(\d+) kB", read_if_there(Path(f"/proc/{process.pid}/status")))
            peak = max(peak, float(found[1]) / 1000 if found else 0)
            end.join(0.05)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read().decode(), err.read().decode()
    if process.returncode:
        sys.exit(f"{command}: {stderr}")
    return Run(seconds, peak, stdout, stderr)


def script(name: str, *arguments: object, **environment: str) -> Run:
    """Runs a script; on Elasticsearch without its ``--db``."""
    kept = list(arguments)
    if "ES_URL" in environment and "--db" in kept:
        del kept[kept.index("--db") : kept.index("--db") + 2]
    return run(ROOT / name, *kept, **environment)


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("ES_", "AWS_"))} | {
    "XDG_CACHE_HOME": str(FOLDER / "cache"),
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "",
}


def rate(call: Callable[[Any], object], items: list[Any], threads: int) -> float:
    """Returns items a second if `threads` threads share the calls."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(call, items))
        return len(items) / (time.perf_counter() - started)


def median(call: Callable[[], Run], times: int = 7) -> float:
    """Median seconds of a run, after one to warm the file cache."""
    call()
    return statistics.median(call().seconds for _ in range(times))


def prepare() -> None:
    """Writes the model and the photographs, once."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not MODEL.exists():
        build_processor(FOLDER / "processor")
        build(MODEL)
    if not SHALLOW.exists():
        build(SHALLOW, layers=3)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    random = np.random.default_rng(0)
    if not SMALL.exists():
        for number in range(PHOTOGRAPHS):
            width = int(random.integers(300, 560))
            x, y = int(random.integers(0, 640 - width)), int(random.integers(0, 427 - width * 3 // 4))
            crop = photographs[number % 2].crop((x, y, x + width, y + width * 3 // 4))
            save(crop.resize((500, 375)), SMALL / str(number % 10) / f"{number}.jpg")
    if not LARGE.exists():
        for number in range(20):
            save(photographs[number % 2].resize((4000 - number, 3000)), LARGE / f"0-{number}.jpg")
        for number in range(20, LARGE_PHOTOGRAPHS):
            copy_as_new(b"%d" % number, str(LARGE / f"0-{number % 20}.jpg"), str(LARGE / f"{number}.jpg"))


def save(photograph: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph.save(path, quality=90)


def int8() -> Iterator[Row]:
    """The rewritten model against the model as shipped, one image at a time on all CPUs; and the CPU's own limit."""
    rewritten = prepared_model_path(MODEL, model_sha256(MODEL))
    random = np.random.default_rng(0)
    inputs = [{"pixel_values": random.standard_normal((1, 3, 224, 224), np.float32)} for _ in range(64)]
    sessions = {"shipped": open_session(MODEL), "int8": open_session(rewritten)}
    results = {name: [session.run(None, x)[0] for x in inputs[:16]] for name, session in sessions.items()}
    difference = max(
        float(np.abs(one - other).max()) for one, other in zip(results["shipped"], results["int8"], strict=True)
    )
    same = "the same file: this CPU's kernel is not exact" if rewritten == MODEL else f"{difference:g}"
    yield Row("int8 weights: greatest difference of 16 embeddings", same, "0")
    rates: dict[str, list[float]] = {"shipped": [], "int8": [], "limit": []}
    product = FOLDER / "product.onnx"
    write_probe(product, random.integers(-128, 128, (768, 3072)).astype(np.int8))  # as in CLIP's MLP
    limit = open_session(product)
    left = {"left": random.integers(0, 256, (50, 768), np.uint8)}
    for _ in range(3):  # in turn, since the machine's speed changes
        for name, session in sessions.items():
            rates[name].append(rate(functools.partial(session.run, None), inputs, available_cpus()))
        products = rate(functools.partial(limit.run, None), [left] * 2000, available_cpus())
        rates["limit"].append(products * 50 * 768 * 3072 / 1e9 / GMAC_PER_IMAGE)
    shipped, fast, bound = (statistics.median(rates[name]) for name in ("shipped", "int8", "limit"))
    yield Row(
        f"int8 weights: images/s, {shipped:.0f} → {fast:.0f}, one image at a time on each CPU",
        f"{fast / shipped:.2f}×",
        "≥ 1.7× with VNNI",
    )
    yield Row(
        f"embedding {fast:.0f} images/s; the CPU's limit for its matrix products (50 rows, int8) {bound:.0f}",
        f"{100 * fast / bound:.0f}%",
        "≥ 65%",
    )


def open_session(path: Path, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Rates:
    """Images a second of embedding alone and of decoding alone, each on all cores."""

    embedding: float
    decoding: float


def rates_alone(model: clip.Clip) -> Rates:
    """Measures the parts of create.py."""
    paths = list_images(SMALL)
    pixels = list(map(functools.partial(preprocess, model), paths[:192]))
    embedding = rate(model.embed, pixels, available_cpus())
    return Rates(embedding, rate(functools.partial(preprocess, model), paths, available_cpus()))


def list_images(folder: Path) -> list[str]:
    images = FolderSource(str(folder), str(FOLDER)).find_images()
    return [image.location for image in images]


def preprocess(model: clip.Clip, path: str) -> np.ndarray:
    with open(path, "rb") as stream, open_rgb(stream) as image:
        return model.preprocess(image)


def create(model: clip.Clip, elasticsearch: dict[str, str], server_cpu: Callable[[], float]) -> Iterator[Row]:
    """create.py as a whole against its parts perfectly shared."""
    starts = [script("create.py", "--help").seconds + run("-c", LOADING, str(MODEL)).seconds for _ in range(3)]
    start = min(starts) - run("-c", "pass").seconds
    before = rates_alone(model)
    # A server just started is compiling its code.
    for place, environment, target in (
        ("local", {}, "≥ 90%"),
        ("Elasticsearch just started", elasticsearch, ""),
        ("Elasticsearch after such a run", elasticsearch, "≥ 90%"),
    ):
        index = place.replace(" ", "-").lower()
        cpu = server_cpu()
        done = script(
            "create.py", "--images", "small", "--model", MODEL, "--db", "create.db", "--index", index, **environment
        )
        share = (server_cpu() - cpu) / (done.seconds * available_cpus())
        settle(server_cpu)
        after = rates_alone(model)  # the machine's speed changes from one minute to the next
        embedding = (before.embedding + after.embedding) / 2
        decoding = (before.decoding + after.decoding) / 2
        best = PHOTOGRAPHS / embedding + PHOTOGRAPHS / decoding + start
        server = f"; the server used {100 * share:.0f}% of the CPU" if environment else ""
        yield Row(
            f"create.py, 1,000 JPEGs of 500×375, {place}: {done.seconds:.1f} s, ideal {best:.1f} s"
            f" (embedding {embedding:.0f}/s, decoding {decoding:.0f}/s){server}",
            f"{100 * best / done.seconds:.0f}%",
            target,
        )
        yield Row(f"create.py, peak memory, {place}", f"{done.peak:.0f} MB", "< 600 MB")
        before = after


def settle(server_cpu: Callable[[], float]) -> None:
    """Waits until the server is idle."""
    used, before = server_cpu(), 0.0
    while used - before > 0.1:
        time.sleep(1)
        used, before = server_cpu(), used


def large() -> Iterator[Row]:
    """create.py on large photographs against imgbeddings' own path, which is measured before and after."""
    theirs = load_as_tutorial(str(MODEL))
    paths = [str(path) for path in sorted(LARGE.iterdir())[:10]]
    before = rate(theirs.to_embeddings, paths, 1)
    done = script("create.py", "--images", "large", "--model", MODEL, "--db", "large.db")
    own = (before + rate(theirs.to_embeddings, paths, 1)) / 2
    yield Row(
        f"create.py, 200 JPEGs of 12 megapixels: {LARGE_PHOTOGRAPHS / done.seconds:.1f} images/s,"
        f" imgbeddings' own path {own:.2f}",
        f"{LARGE_PHOTOGRAPHS / done.seconds / own:.1f}×",
        "≥ 8×",
    )
    yield Row("create.py, peak memory, 12 megapixels", f"{done.peak:.0f} MB", "< 600 MB")


def copy_as_new(mark: bytes, source: str, target: str) -> None:
    """Copies a JPEG with a comment after its end, so that its content is another one."""
    Path(target).write_bytes(Path(source).read_bytes() + mark)


def growth() -> Iterator[Row]:
    """create.py's memory for ten times the images; with three of CLIP's layers, to take less time."""
    ten = FOLDER / "ten"
    if not ten.exists():
        for number in range(10):
            shutil.copytree(SMALL, ten / str(number), copy_function=functools.partial(copy_as_new, b"%d" % number))
    prepared_model_path(SHALLOW, model_sha256(SHALLOW))  # rewritten in advance
    few, many = (
        script("create.py", "--images", name, "--model", SHALLOW, "--db", f"{name}.db").peak
        for name in ("small", "ten")
    )
    yield Row(
        f"create.py, peak memory, 3 of CLIP's 12 layers: 1,000 images {few:.0f} MB, 10,000 images {many:.0f} MB",
        f"{many / few:.2f}×",
        "≤ 1.10×",
    )


LOADING = "import sys; from imagesearch.models import load_model; load_model(sys.argv[1])"


def search(model: clip.Clip) -> Iterator[Row]:
    """search.py as a whole against its floor."""
    image = SMALL / "3" / "3.jpg"
    floor = median(lambda: run(ROOT / "tools/benchmark/floor.py", MODEL, image, available_cpus()))
    new = FOLDER / "new"
    if not new.exists():
        new.mkdir()
        for number, path in enumerate(sorted(SMALL.rglob("*.jpg"))[:100]):
            copy_as_new(b"new", str(path), str(new / f"{number}.jpg"))
    images = sorted(new.iterdir())  # whose content the index does not have
    one = median(lambda: script("search.py", images[0], "--db", "create.db", "--index", "local"))
    yield Row(f"search.py, one cold query: {one:.2f} s, floor {floor:.2f} s", f"{one / floor:.2f}×", "≤ 0.85×")
    known = median(lambda: script("search.py", image, "--db", "create.db", "--index", "local"))
    yield Row(
        f"search.py, one indexed picture: {known:.2f} s, one that is not {one:.2f} s", f"{known / one:.2f}×", "≤ 0.6×"
    )
    hundred = median(lambda: script("search.py", *images, "--db", "create.db", "--index", "local"), times=3)
    each = 99 / (hundred - one)
    rates = rates_alone(model)
    best = 1 / (1 / rates.embedding + 1 / rates.decoding)
    yield Row(
        f"search.py, 100 images in one call: {hundred:.2f} s, {each:.0f} a second after the first; ideal {best:.0f}"
        f" (embedding {rates.embedding:.0f}/s, decoding {rates.decoding:.0f}/s)",
        f"{100 * each / best:.0f}%",
        "≥ 80%",
    )


def pipeline() -> Iterator[Row]:
    """create.py's own work, with tiny pictures and the thumbnail model, against the same in a plain loop."""
    folder = FOLDER / "pipeline"
    if not folder.exists():
        random = np.random.default_rng(3)
        for number in range(PIPELINE):
            path = folder / str(number % 10) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    paths = list_images(folder)

    def loop(path: str) -> None:
        with open(path, "rb") as stream:
            stream_sha256(stream)
            with open_rgb(stream) as image:
                THUMBNAIL.embed(THUMBNAIL.preprocess(image))

    plain = statistics.median(rate(loop, paths, 1) for _ in range(3))
    found = re.search(r"\(([\d.]+) images/s", script("create.py", *TINY_RUN, "--db", "pipeline.db").stderr)
    assert found
    yield Row(
        f"create.py, {PIPELINE:,} PNGs of 16×16, thumbnail, local: {float(found[1]):,.0f} images/s,"
        f" in a plain loop {plain:,.0f}",
        f"{float(found[1]) / plain:.2f}×",
        "≥ 0.5×",
    )


def distant(elasticsearch: dict[str, str]) -> Iterator[Row]:
    """Elasticsearch behind 100 ms, the time from a laptop to another continent's cloud, against direct."""
    port = int(elasticsearch["ES_URL"].rpartition(":")[2])
    with delaying_proxy(port, DISTANCE_SECONDS / 2) as far_port:
        far = elasticsearch | {"ES_URL": elasticsearch["ES_URL"].replace(f":{port}", f":{far_port}")}
        arguments = ("--images", "small", "--model", MODEL, "--index")
        near_seconds = script("create.py", *arguments, "distant-near", **elasticsearch).seconds
        far_seconds = script("create.py", *arguments, "distant-far", **far).seconds
        yield Row(
            f"create.py, 1,000 JPEGs of 500×375, Elasticsearch behind 100 ms {far_seconds:.1f} s, direct"
            f" {near_seconds:.1f} s",
            f"{near_seconds / far_seconds:.2f}×",
            "≥ 0.85×",
        )
        images = sorted(SMALL.rglob("*.jpg"))[:300]
        searches = [
            median(lambda env=env: script("search.py", *images, "--index", "distant-near", **env), 3)  # type: ignore[misc]
            for env in (elasticsearch, far)
        ]
        yield Row(
            f"search.py, 300 indexed pictures in one call, Elasticsearch: {searches[0]:.2f} s, behind 100 ms"
            f" {searches[1]:.2f} s",
            f"{searches[0] / searches[1]:.2f}×",
            "≥ 0.7×",
        )


def tutorial(elasticsearch: dict[str, str]) -> Iterator[Row]:
    """Against the tutorial's own way, on 100 images."""
    folder = FOLDER / "hundred"
    if not folder.exists():
        shutil.copytree(SMALL / "0", folder)
    theirs = run("-m", "tools.benchmark.tutorial", "create", folder, MODEL, "tutorial", **elasticsearch)
    ours = script("create.py", "--images", folder, "--model", MODEL, "--index", "hundred", **elasticsearch)
    yield Row(
        f"100 images, the tutorial's own way {100 / theirs.seconds:.1f} images/s ({theirs.peak:.0f} MB),"
        f" create.py {100 / ours.seconds:.1f} ({ours.peak:.0f} MB)",
        f"{theirs.seconds / ours.seconds:.1f}×",
        "≥ 10×",
    )
    image = SMALL / "3" / "3.jpg"
    slow = median(lambda: run("-m", "tools.benchmark.tutorial", "search", image, MODEL, "tutorial", **elasticsearch), 3)
    fast = median(lambda: script("search.py", image, "--index", "hundred", **elasticsearch), 3)
    yield Row(f"a query, the tutorial's own way {slow:.2f} s, search.py {fast:.2f} s", f"{fast / slow:.2f}×", "≤ 0.33×")


def unchanged(elasticsearch: dict[str, str]) -> Iterator[Row]:
    """A second run over many small files of which none has changed."""
    folder = FOLDER / "tiny"
    if not folder.exists():
        (FOLDER / "tiny.png").unlink(missing_ok=True)
        Image.new("RGB", (2, 2)).save(FOLDER / "tiny.png")
        content = (FOLDER / "tiny.png").read_bytes()
        for number in range(TINY):
            path = folder / str(number % 100) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    connection = Connection.from_env(elasticsearch)
    assert connection
    # No graph for Elasticsearch to build while it is filled: a look-up does not touch it.
    flat = PROPERTIES | {"embeddings": {"type": "dense_vector", "dims": DIMENSIONS, "index": False}}
    meta = {META_KEY: vars(METADATA.model) | {"folder": METADATA.folder}}
    with ElasticsearchIndex(connection, "tiny", NO_RETRY) as empty:
        empty._client.indices.create(index="tiny", mappings={"_meta": meta, "properties": flat})
    with ExitStack() as stack:
        indexes: dict[str, WritableIndex] = {
            "local": SqliteIndex(FOLDER / "tiny.db", "tiny"),
            "Elasticsearch": ElasticsearchIndex(connection, "tiny", NO_RETRY),
        }
        for name, index in indexes.items():
            stack.enter_context(index)
            index.create(METADATA)
            index.get_metadata()
            started = time.perf_counter()
            written = sum(1 for _ in index.write(documents(folder)))
            index.refresh()
            filled = written / (time.perf_counter() - started)
            environment = elasticsearch if name == "Elasticsearch" else {}
            target = "≥ 8,000/s" if environment else "≥ 20,000/s; ≥ 5,000 documents/s"
            arguments = ("--images", "tiny", "--index", "tiny", "--db", "tiny.db")
            done = script("create.py", *arguments, **environment)
            assert f"{TINY:,} unchanged" in done.stderr, done.stderr
            yield Row(
                f"an unchanged run over 100,000 files, {name}: {done.seconds:.1f} s, {done.peak:.0f} MB"
                f" (they were written at {filled:,.0f} documents/s)",
                f"{TINY / done.seconds:,.0f}/s",
                target,
            )


def documents(folder: Path) -> Iterator[Document]:
    """Yields a document with a random embedding for each file below `folder`."""
    random = np.random.default_rng(1)
    source = FolderSource(str(folder), os.path.realpath(FOLDER))
    for number, image in enumerate(source.find_images()):
        yield Document(image, f"{number:064x}", random.standard_normal(DIMENSIONS, np.float32))


def scan() -> Iterator[Row]:
    """search.py on local indexes of several sizes, as whole processes with a warm file cache."""
    random = np.random.default_rng(2)
    model = "thumbnail"
    image = next(iter(sorted(SMALL.rglob("*.jpg"))))
    base = 0.0
    for size in (100, 10_000, 100_000, 300_000):
        path = FOLDER / f"scan-{size}.db"
        with SqliteIndex(path, "scan") as index:
            index.create(IndexMetadata(ModelInfo(model), "/"))
            written = sum(1 for _ in index.write(numbered(size, random)))
        assert written == size
        runs: list[Run] = []

        def search(path: Path = path, runs: list[Run] = runs) -> Run:
            runs.append(script("search.py", image, "-k", 10, "--db", path, "--index", "scan"))
            return runs[-1]

        seconds = median(search, 5)
        base = base or seconds
        peak = max(run.peak for run in runs)
        if size == 100:
            yield Row(f"a local search of 100 images, model thumbnail: {seconds:.2f} s, {peak:.0f} MB", "")
        else:
            target = {100_000: "≤ 150 ms"}.get(size, "")
            yield Row(
                f"a local search of {size:,} images: {seconds:.2f} s, {peak:.0f} MB (< 150 MB); beyond one of 100",
                f"{1000 * (seconds - base):.0f} ms",
                target,
            )
        path.unlink()


def numbered(size: int, random: np.random.Generator) -> Iterator[Document]:
    for number in range(size):
        path = f"/scan/{number}.jpg"
        yield Document(ImageFile(path, path, "scan", 1, 1), f"{number:064x}", random.standard_normal(768, np.float32))


def bucket() -> Iterator[Row]:
    """create.py on a bucket whose reads take 50 ms longer, against a local folder."""
    with S3() as server, delaying_proxy(server.port, READ_DELAY_SECONDS / 2) as port:
        server.put("photographs")
        settings: Any = {name.lower(): value for name, value in server.environment.items() if "HTTP" not in name}
        store = from_url("s3://photographs", config=settings, client_options={"allow_http": True})
        paths = list_images(SMALL)
        keys = [os.path.relpath(path, SMALL) for path in paths]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: obstore.put(store, key, (SMALL / key).read_bytes()), keys))
        environment = server.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        for key in 5 * keys:  # until Java has compiled its code
            obstore.get(store, key).bytes()
        process = server.process
        assert process
        distant = from_url(
            "s3://photographs",
            config=settings | {"aws_endpoint_url": environment["AWS_ENDPOINT_URL"]},
            client_options={"allow_http": True},
        )
        started = time.perf_counter()
        obstore.get(distant, keys[0]).bytes()
        one = time.perf_counter() - started
        runs = []
        for number in range(2):
            local = script("create.py", "--images", "small", "--model", MODEL, "--db", f"near-{number}.db")
            cpu = cpu_seconds(process.pid)
            far = script(
                "create.py", "--images", "s3://photographs", "--model", MODEL, "--db", f"far-{number}.db", **environment
            )
            share = (cpu_seconds(process.pid) - cpu) / (far.seconds * available_cpus())
            runs.append((local.seconds, far.seconds, far.peak, share))
        near, away, peak, share = (statistics.mean(run[n] for run in runs) for n in range(4))
        yield Row(
            f"create.py, 1,000 JPEGs in a bucket, {1000 * one:.0f} ms a read: {PHOTOGRAPHS / away:.0f} images/s"
            f" ({peak:.0f} MB; the server used {100 * share:.0f}% of the CPU), in a folder {PHOTOGRAPHS / near:.0f}",
            f"{100 * near / away:.0f}%",
            "≥ 90%",
        )


@contextlib.contextmanager
def delaying_proxy(port: int, delay: float) -> Iterator[int]:
    """A TCP proxy that passes on what it receives after a delay each way, in seconds; yields its port."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def arrive() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, content = under_way.get()
                    time.sleep(max(0, due - time.monotonic()))
                    if not content:
                        target.shutdown(socket.SHUT_WR)
                        return
                    target.sendall(content)

        threading.Thread(target=arrive, daemon=True).start()
        content = b"start"
        while content:
            try:
                content = source.recv(1 << 16)
            except OSError:
                content = b""
            under_way.put((time.monotonic() + delay, content))

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield int(listener.getsockname()[1])


def copies(elasticsearch: dict[str, str]) -> Iterator[Row]:
    """What looking up contents costs a first run, and how fast a renamed folder is."""
    folder = FOLDER / "renamed"
    for name, environment in (("local", {}), ("Elasticsearch", elasticsearch)):
        programs = {"with": "create.py", "without": "tools/benchmark/without_copies.py"}
        ratios = []
        for number in range(4):
            seconds = {}
            # In turn, since a server that is still compiling its code favors whichever is second.
            for kind in sorted(programs, reverse=number % 2 == 1):
                arguments = ("--images", "small", "--model", MODEL, "--db", f"copies-{number}-{kind}.db")
                index = f"copies-{name.lower()}-{number}-{kind}"
                seconds[kind] = script(programs[kind], *arguments, "--index", index, **environment).seconds
            ratios.append(seconds["without"] / seconds["with"])
        yield Row(
            f"create.py, 1,000 new JPEGs, {name}: its rate against that without looking up contents",
            f"{100 * statistics.median(ratios):.0f}%",
            "≥ 97%",
        )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(SMALL, folder / "before")
        options = ("--images", "renamed", "--model", MODEL, "--db", "renamed.db", "--index", f"renamed-{name.lower()}")
        first = script("create.py", *options, **environment)
        (folder / "before").rename(folder / "after")
        second = script("create.py", *options, "--prune", **environment)
        assert "1,000 new (1,000 with a known embedding)" in second.stderr, second.stderr
        yield Row(
            f"a renamed folder of 1,000 images, {name}: {second.seconds:.1f} s, embedding it {first.seconds:.1f} s",
            f"{first.seconds / second.seconds:.1f}×",
            "≥ 5×",
        )


def cpu_seconds(group: int) -> float:
    """The CPU time that a process group has used so far, from /proc; 0 where there is none."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
    found = re.search(r"^model name\s*: (.+)$", read_if_there(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def read_if_there(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def table(rows: list[Row], seconds: float) -> str:
    flags = read_if_there(Path("/proc/cpuinfo"))
    vnni = next((name for name in ("amx_int8", "avx512_vnni", "avx_vnni") if name in flags), "none")
    lines = [
        f"Measured on {available_cpus()} cores of {cpu_name()} (dot-product instructions: {vnni}), Python"
        f" {platform.python_version()}, ONNX Runtime {onnxruntime.__version__}, in {seconds:.0f} s:",
        "",
        "| what | figure | target |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*lines, *(f"| {row.what} | {row.figure} | {row.target} |" for row in rows)]) + "\n"


def main() -> None:
    started = time.perf_counter()
    os.environ["XDG_CACHE_HOME"] = ENVIRONMENT["XDG_CACHE_HOME"]
    prepare()
    for stale in FOLDER.glob("*.db*"):
        stale.unlink()
    model = clip.load_onnx(str(MODEL), MODEL, None)
    rows = []
    with Cluster(java_options=["-Xms1g", "-Xmx1g"]) as server:
        group = server.nodes[0].process
        assert group
        elasticsearch = {"ES_URL": server.url, "ES_CA_CERT": str(server.ca)}
        server_cpu = functools.partial(cpu_seconds, group.pid)
        parts = [
            int8(),
            create(model, elasticsearch, server_cpu),
            large(),
            growth(),
            search(model),
            pipeline(),
            distant(elasticsearch),
            tutorial(elasticsearch),
            copies(elasticsearch),
            bucket(),
            unchanged(elasticsearch),
            scan(),
        ]
        for part in parts:
            for row in part:
                print(json.dumps(vars(row), ensure_ascii=False), flush=True)
                rows.append(row)
    text = table(rows, time.perf_counter() - started)
    (ROOT / "build" / "benchmark.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
