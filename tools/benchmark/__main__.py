"""`make benchmark`: how fast it is on this machine, as ratios from one run; writes build/benchmark.md.

The model is a stand-in of CLIP's exact shape with random weights (standin.py), the photographs are crops
and scalings of scikit-learn's two.
"""

import functools
import itertools
import json
import os
import platform
import re
import shutil
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
import onnxruntime
from imagesearch.elastic import PROPERTIES, Elastic
from imagesearch.files import File, walk
from imagesearch.local import Local
from PIL import Image
from sklearn.datasets import load_sample_images

from imagesearch import clip
from imagesearch.cache import model_sha256
from imagesearch.connection import connection
from imagesearch.embed import Document, Loaded, batched, cores, load
from imagesearch.index import Index
from imagesearch.int8 import exact_int8
from imagesearch.models import DIMENSIONS, ModelRecord
from tests.server import ROOT, Cluster
from tools.benchmark.standin import build, build_processor
from tools.benchmark.timing import can_drop, cold, timed
from tools.benchmark.tutorial import load as load_as_tutorial

FOLDER = ROOT / "build" / "benchmark"
MODEL, SHALLOW = FOLDER / "clip.onnx", FOLDER / "shallow.onnx"  # CLIP's twelve layers, and three of them
SMALL, LARGE = FOLDER / "small", FOLDER / "large"
PHOTOGRAPHS, LARGE_PHOTOGRAPHS, TINY = 1000, 200, 100_000


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
    return run(ROOT / name, *arguments, **environment)


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ES_")} | {
    "XDG_CACHE_HOME": str(FOLDER / "cache"),
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "",
}


def rate(call: Callable[[Any], object], items: list[Any], threads: int, each: int = 1) -> float:
    """Items a second (`each` to a call) when so many threads share the calls."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(call, items))
        return len(items) * each / (time.perf_counter() - started)


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
            shutil.copy(LARGE / f"0-{number % 20}.jpg", LARGE / f"{number // 20}-{number % 20}.jpg")


def save(photograph: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph.save(path, quality=90)


def int8() -> Iterator[Row]:
    """The rewritten model against the original."""
    rewritten = exact_int8(MODEL, model_sha256(MODEL))
    pixels = np.random.default_rng(0).standard_normal((64, 3, 224, 224), np.float32)
    rates: dict[str, list[tuple[float, int, int]]] = {"original": [], "int8": []}
    results = {}
    for threads, workers in ((cores(), 1), (1, cores())):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        sessions = {
            name: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for name, path in (("original", MODEL), ("int8", rewritten))
        }
        for batch, (name, session) in itertools.product((1, 8, 16), sessions.items()):
            parts = [{"pixel_values": part} for part in np.split(pixels, 64 // batch)]
            embed = functools.partial(session.run, None)
            results[name, batch] = np.concatenate([embed(part)[0] for part in parts])
            if batch > 1:  # one image at a time is slower, with either model
                rates[name].append((rate(embed, 2 * parts, workers, batch), batch, workers))
    best = {name: max(of_model) for name, of_model in rates.items()}
    difference = max(float(np.abs(results["original", n] - results["int8", n]).max()) for n in (1, 8, 16))
    same = "the same file: this CPU's kernel is not exact" if rewritten == MODEL else f"{difference:g}"
    yield Row("int8 weights: greatest difference of 64 embeddings, batches of 1, 8, 16", same, "0")
    ratio = best["int8"][0] / best["original"][0]
    yield Row(
        f"int8 weights: images/s at best, {best['original'][0]:.0f} → {best['int8'][0]:.0f}"
        f" (batches of {best['int8'][1]}, {best['int8'][2]} at once)",
        f"{ratio:.2f}×",
        "≥ 1.8× with VNNI",
    )


@dataclass(frozen=True)
class Rates:
    """Images a second of embedding alone and of decoding alone, each on all cores."""

    embedding: float
    decoding: float


def rates_alone(model: clip.Clip) -> Rates:
    """Measures the parts of create.py."""
    files = [(file, None) for file in walk(str(SMALL), lambda _: None, lambda *_: None)]
    loaded = [item for item in map(functools.partial(load, model), files[:192]) if isinstance(item, Loaded)]
    arrays = [item.pixels for item in loaded if item.pixels is not None]
    embedding = max(rate(model.embed, list(batched(arrays, batch)), cores(), batch) for batch in (8, 16))
    return Rates(embedding, rate(functools.partial(load, model), files, cores()))


def create(model: clip.Clip, elastic: dict[str, str], server_cpu: Callable[[], float]) -> Iterator[Row]:
    """create.py as a whole against its parts perfectly shared."""
    starts = [script("create.py", "--help").seconds + run("-c", LOADING, str(MODEL)).seconds for _ in range(3)]
    start = min(starts) - run("-c", "pass").seconds
    before = rates_alone(model)
    # A server just started is compiling its code.
    for place, environment, target in (
        ("local", {}, "≥ 90%"),
        ("Elasticsearch just started", elastic, ""),
        ("Elasticsearch after such a run", elastic, "≥ 90%"),
    ):
        index = place.replace(" ", "-").lower()
        cpu = server_cpu()
        done = script(
            "create.py", "--images", "small", "--model", MODEL, "--db", "create.db", "--index", index, **environment
        )
        share = (server_cpu() - cpu) / (done.seconds * cores())
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
    before = rate(theirs.to_embeddings, paths, threads=1)
    done = script("create.py", "--images", "large", "--model", MODEL, "--db", "large.db")
    own = (before + rate(theirs.to_embeddings, paths, threads=1)) / 2
    yield Row(
        f"create.py, 200 JPEGs of 12 megapixels: {LARGE_PHOTOGRAPHS / done.seconds:.1f} images/s,"
        f" imgbeddings' own path {own:.2f}",
        f"{LARGE_PHOTOGRAPHS / done.seconds / own:.1f}×",
        "≥ 8×",
    )
    yield Row("create.py, peak memory, 12 megapixels", f"{done.peak:.0f} MB", "< 600 MB")


def growth() -> Iterator[Row]:
    """create.py's memory for ten times the images; with three of CLIP's layers, to take less time."""
    ten = FOLDER / "ten"
    if not ten.exists():
        for number in range(10):
            shutil.copytree(SMALL, ten / str(number), copy_function=os.link)
    exact_int8(SHALLOW, model_sha256(SHALLOW))  # rewritten in advance
    few, many = (
        script("create.py", "--images", name, "--model", SHALLOW, "--db", f"{name}.db").peak
        for name in ("small", "ten")
    )
    yield Row(
        f"create.py, peak memory, 3 of CLIP's 12 layers: 1,000 images {few:.0f} MB, 10,000 images {many:.0f} MB",
        f"{many / few:.2f}×",
        "≤ 1.10×",
    )


LOADING = "import sys; from imagesearch.models import load_model; load_model(sys.argv[1], threads=1)"


def search(model: clip.Clip) -> Iterator[Row]:
    """search.py as a whole against its floor."""
    image = SMALL / "3" / "3.jpg"
    light = exact_int8(MODEL, model.record.sha256)
    floor = median(lambda: run(ROOT / "tests/benchmark/floor.py", light, image, cores()))
    one = median(lambda: script("search.py", image, "--db", "create.db", "--index", "local"))
    yield Row(f"search.py, one cold query: {one:.2f} s, floor {floor:.2f} s", f"{one / floor:.2f}×", "≤ 1.3×")
    images = sorted(SMALL.rglob("*.jpg"))[:100]
    hundred = median(lambda: script("search.py", *images, "--db", "create.db", "--index", "local"), times=3)
    each = 99 / (hundred - one)
    yield Row(
        f"search.py, 100 images in one call: {hundred:.2f} s, {each:.0f} a second after the first",
        f"{100 * each / rates_alone(model).embedding:.0f}%",
        "≥ 80%",
    )


def tutorial(elastic: dict[str, str]) -> Iterator[Row]:
    """Against the tutorial's own way, on 100 images."""
    folder = FOLDER / "hundred"
    if not folder.exists():
        shutil.copytree(SMALL / "0", folder)
    theirs = run("-m", "tools.benchmark.tutorial", "create", folder, MODEL, "tutorial", **elastic)
    ours = script("create.py", "--images", folder, "--model", MODEL, "--index", "hundred", **elastic)
    yield Row(
        f"100 images, the tutorial's own way {100 / theirs.seconds:.1f} images/s ({theirs.peak:.0f} MB),"
        f" create.py {100 / ours.seconds:.1f} ({ours.peak:.0f} MB)",
        f"{theirs.seconds / ours.seconds:.1f}×",
        "≥ 10×",
    )
    image = SMALL / "3" / "3.jpg"
    slow = median(lambda: run("-m", "tools.benchmark.tutorial", "search", image, MODEL, "tutorial", **elastic), 3)
    fast = median(lambda: script("search.py", image, "--index", "hundred", **elastic), 3)
    yield Row(f"a query, the tutorial's own way {slow:.2f} s, search.py {fast:.2f} s", f"{fast / slow:.2f}×", "≤ 0.33×")


def unchanged(elastic: dict[str, str]) -> Iterator[Row]:
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
    place = connection(elastic, insecure=False)
    assert place
    # No graph for Elasticsearch to build while it is filled: a look-up does not touch it.
    flat = PROPERTIES | {"embeddings": {"type": "dense_vector", "dims": DIMENSIONS, "index": False}}
    meta = vars(ModelRecord("thumbnail"))
    with Elastic(place, "tiny", lambda *_: False, 0) as empty:
        empty.client.indices.create(index="tiny", mappings={"_meta": meta, "properties": flat})
    with ExitStack() as stack:
        indices: dict[str, Index] = {
            "local": Local(FOLDER / "tiny.db", "tiny"),
            "Elasticsearch": Elastic(place, "tiny", lambda *_: False, 0),
        }
        (FOLDER / "tiny.db").unlink(missing_ok=True)
        for name, index in indices.items():
            stack.enter_context(index)
            index.create(ModelRecord("thumbnail"))
            started = time.perf_counter()
            written = sum(1 for _ in index.write(documents("./tiny")))
            index.refresh()
            filled = written / (time.perf_counter() - started)
            environment = elastic if name == "Elasticsearch" else {}
            target = "≥ 8,000/s" if environment else "≥ 20,000/s"
            arguments = ("--images", "tiny", "--model", "thumbnail", "--index", "tiny", "--db", "tiny.db")
            done = script("create.py", *arguments, **environment)
            assert f"{TINY:,} unchanged" in done.stderr, done.stderr
            yield Row(
                f"an unchanged run over 100,000 files, {name}: {done.seconds:.1f} s, {done.peak:.0f} MB"
                f" (they were written at {filled:,.0f} documents/s)",
                f"{TINY / done.seconds:,.0f}/s",
                target,
            )


def documents(folder: str) -> Iterator[Document]:
    """A document with a random embedding for each file below `folder`, which is in the benchmark's folder."""
    random = np.random.default_rng(1)
    here = Path.cwd()
    os.chdir(FOLDER)
    try:
        for file in walk(folder, lambda _: None, lambda *_: None):
            yield Document(file, None, "0" * 64, random.standard_normal(768, np.float32))
    finally:
        os.chdir(here)


def scan() -> Iterator[Row]:
    """The local index's exact scan against its floor."""
    path = FOLDER / "scan.db"
    path.unlink(missing_ok=True)
    random = np.random.default_rng(2)
    query = random.standard_normal(768, np.float32)
    with Local(path, "scan") as index:
        index.create(ModelRecord("thumbnail"))
        written = 0
        for size in (10_000, 100_000, 300_000):
            numbers = range(written, size)
            written += sum(1 for _ in index.write(numbered(numbers, random)))
            matrix = random.standard_normal((size, 768), np.float32)
            product = min(timed(functools.partial(np.matmul, matrix, query)) for _ in range(3))
            raw = FOLDER / "raw"
            matrix.tofile(raw)
            del matrix
            # In turn, since the disk's speed changes from one second to the next.
            pairs = [
                (cold(functools.partial(read_through, raw)), cold(functools.partial(once, path, query)))
                for _ in range(7)
            ]
            reading, took = (statistics.median(times) for times in zip(*pairs, strict=True))
            floor = product + reading
            how = "cold" if can_drop() else "warm"
            yield Row(
                f"local search of {size:,} images, {how} file cache: {1000 * took:.0f} ms, floor {1000 * floor:.0f} ms",
                f"{took / floor:.2f}×",
                "≤ 1.5×" if size == 100_000 else "",
            )
            raw.unlink()


def numbered(numbers: range, random: np.random.Generator) -> Iterator[Document]:
    for number in numbers:
        yield Document(File(f"./scan/{number}.jpg", 1, 1), None, "0" * 64, random.standard_normal(768, np.float32))


def once(path: Path, query: np.ndarray) -> None:
    """One search in the local file, from opening it on."""
    with Local(path, "scan") as index:
        index.search(query, 10, None)


def read_through(path: Path) -> None:
    """Reads a file as fast as it can be read."""
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def cpu_seconds(group: int) -> float:
    """The CPU time that a process group has used so far, from /proc; 0 where there is none."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
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
        f"Measured on {cores()} cores of {cpu_name()} (dot-product instructions: {vnni}), Python"
        f" {platform.python_version()}, Onnx Runtime {onnxruntime.__version__}, in {seconds:.0f} s:",
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
    model = clip.load(str(MODEL), MODEL, threads=1)
    rows = []
    with Cluster(memory="1g") as server:
        group = server.nodes[0].process
        assert group
        elastic = {"ES_URL": server.url, "ES_CA_CERT": str(server.ca)}
        server_cpu = functools.partial(cpu_seconds, group.pid)
        parts = [
            int8(),
            create(model, elastic, server_cpu),
            large(),
            growth(),
            search(model),
            tutorial(elastic),
            unchanged(elastic),
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
