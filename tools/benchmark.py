"""How fast it is, in one table: writes build/benchmark.md, in some minutes.

Each row compares with plain imgbeddings, as the tutorial uses it (tools/plain_imgbeddings.py), or with another part of
the same run. The model is one of CLIP's exact shape and cost with random weights (tools/clip_model.py).
"""

import contextlib
import io
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import onnxruntime
from PIL import Image

from imagesearch.index import open_index
from imagesearch.index.connection import Connection
from imagesearch.records import Search
from tests.running import environment
from tests.server import ROOT, S3, Bucket, Elasticsearch
from tools.clip_model import build
from tools.embeddings import clustered, nearest, recall
from tools.neighbors import load_index, numbers
from tools.tcp_proxy import TcpProxy

PHOTOGRAPHS, LARGE, PLAIN = 1000, 200, 20  # images; plain imgbeddings is measured on so many
FILES, EMBEDDINGS, QUERIES = 100_000, 100_000, 100
FEW_EMBEDDINGS, MANY_QUERIES = 20_000, 1000
DELAY_SECONDS = 0.05
HEADER = "| you want to … | this project | plain imgbeddings | ratio | at least |\n| --- | --- | --- | --- | --- |"


@dataclass(frozen=True)
class Machine:
    """A folder to work in, the model, and the greatest memory of each script so far, in MB."""

    folder: Path
    model: Path
    peaks: dict[str, float]

    def seconds(self, *command: object, **more: str) -> float:
        """Runs `create.py …`, `search.py …` or a module of tools in the folder; returns the seconds it took."""
        script, *arguments = map(str, command)
        program = ["-m", script] if script.startswith("tools.") else [str(ROOT / script)]
        settings = environment(self.folder) | {"PYTHONPATH": str(ROOT)} | more
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=self.folder,
            env=settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1000
                self.peaks[script] = max(peak, self.peaks.get(script, 0))
            time.sleep(0.01)
        assert process.returncode == 0, command
        return time.perf_counter() - started

    def photographs(self, name: str, count: int, size: tuple[int, int]) -> None:
        """Writes JPEGs below images/`name`, each as different from the others as photographs are."""
        random = np.random.default_rng(count)
        (self.folder / name).mkdir(parents=True)
        for number in range(count):
            patches = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
            patches.resize(size, Image.Resampling.BICUBIC).save(self.folder / name / f"{number}.jpg", quality=90)


def row(what: str, ours: str, plain: str, ratio: float, least: str) -> str:
    return f"| {what} | {ours} | {plain} | {ratio:.1f}× | {least} |"


def rate(number: int, seconds: float) -> str:
    return f"{seconds:.1f} s, {number / seconds:,.0f}/s"


def photograph_rows(machine: Machine, server: Elasticsearch) -> Iterator[str]:
    """Rows of indexing and searching photographs; each of ours in turn with plain imgbeddings."""
    create, model = "create.py", ["--model", machine.model]
    plain = ["tools.plain_imgbeddings", "create", "few", machine.model]
    machine.photographs("few", PLAIN, (500, 375))
    machine.photographs("photographs", PHOTOGRAPHS, (500, 375))
    machine.photographs("large", LARGE, (4000, 3000))
    machine.photographs("large-few", 5, (4000, 3000))
    machine.photographs("new", QUERIES, (500, 375))
    machine.seconds(create, *model, "--images", "few", "--index", "warm")  # prepares the model

    for where, more in (("local file", {}), ("Elasticsearch", server.environment)):
        theirs = machine.seconds(*plain, **more) / PLAIN
        ours = machine.seconds(create, *model, "--images", "photographs", **more)
        what = f"index {PHOTOGRAPHS:,} photographs, {where}"
        yield row(what, rate(PHOTOGRAPHS, ours), f"{1 / theirs:.1f}/s", theirs * PHOTOGRAPHS / ours, "10×")
        if not more:
            local = ours
    theirs = machine.seconds("tools.plain_imgbeddings", "create", "large-few", machine.model) / 5
    ours = machine.seconds(create, *model, "--images", "large", "--index", "large")
    what = f"index {LARGE} photographs of 12 megapixels"
    yield row(what, rate(LARGE, ours), f"{1 / theirs:.1f}/s", theirs * LARGE / ours, "8×")

    with S3() as s3, TcpProxy(urlsplit(s3.environment["AWS_ENDPOINT_URL"]).port or 0, DELAY_SECONDS) as proxy:
        photographs = (machine.folder / "photographs").iterdir()
        Bucket(s3.environment, "photographs").put({path.name: path.read_bytes() for path in photographs})
        distant = s3.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        ours = machine.seconds(create, *model, "--images", "s3://photographs", "--index", "bucket", **distant)
    what = f"index {PHOTOGRAPHS:,} from a bucket {1000 * DELAY_SECONDS:.0f} ms away, against a folder"
    yield row(what, rate(PHOTOGRAPHS, ours), "", local / ours, "0.8×")

    (machine.folder / "photographs").rename(machine.folder / "renamed")
    ours = machine.seconds(create, "--images", "renamed")
    yield row(f"rename a folder of {PHOTOGRAPHS:,}, against embedding it", f"{ours:.1f} s", "", local / ours, "5×")

    new = sorted((machine.folder / "new").iterdir())
    plain = ["tools.plain_imgbeddings", "search"]
    pairs = [
        (
            machine.seconds(*plain, path, machine.model, **server.environment),
            machine.seconds("search.py", path, **server.environment),
        )
        for path in new[:5]
    ]
    theirs, ours = (statistics.median(each) for each in zip(*pairs, strict=True))
    yield row("find one new picture, Elasticsearch", f"{ours:.2f} s", f"{theirs:.2f} s", theirs / ours, "3×")
    all_ours = machine.seconds("search.py", "new", **server.environment)
    what = f"find {QUERIES} in one call, Elasticsearch"
    yield row(what, f"{all_ours:.1f} s", f"{QUERIES * theirs:.0f} s", QUERIES * theirs / all_ours, "10×")


def large_rows(machine: Machine, server: Elasticsearch) -> Iterator[str]:
    """Rows of many files and of many embeddings."""
    tiny = io.BytesIO()
    Image.new("RGB", (4, 4), "teal").save(tiny, "PNG")
    for number in range(FILES):
        path = machine.folder / "files" / str(number % 100) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.getvalue())
    command = ["create.py", "--model", "thumbnail", "--images", "files", "--index", "files"]
    machine.seconds(*command)
    ours = machine.seconds(*command)
    yield f"| run again over {FILES:,} unchanged files | {rate(FILES, ours)} | | | 20,000/s |"

    embeddings, queries = clustered(EMBEDDINGS, 1), clustered(EMBEDDINGS, 2)[:QUERIES]
    database = machine.folder / "many.db"
    with open_index("many", None, database) as local:
        load_index(local, embeddings)
    searches = [Search(query, 10) for query in clustered(EMBEDDINGS, 2)[:MANY_QUERIES]]
    with open_index("few", None, machine.folder / "few.db") as local:
        load_index(local, embeddings[:FEW_EMBEDDINGS])
        started = time.perf_counter()
        for number in range(0, MANY_QUERIES, local.searches_at_once):
            local.search(searches[number : number + local.searches_at_once])
        ours = (time.perf_counter() - started) / MANY_QUERIES
        started = time.perf_counter()
        for query in searches[:20]:
            local.search([query])
        alone = (time.perf_counter() - started) / 20
    what = f"find {MANY_QUERIES:,} among {FEW_EMBEDDINGS:,} in the local file, against one at a time"
    yield row(what, f"{1000 * ours:.1f} ms each", "", alone / ours, "5×")

    ours = statistics.median(machine.seconds("search.py", "--db", database, "files/0/0.png") for _ in range(5))
    yield f"| search {EMBEDDINGS:,} in the local file | {ours:.2f} s | | | < 1 s |"

    with open_index("many", Connection.from_env(server.environment), Path()) as many:
        load_index(many, embeddings)
        found = [numbers(response) for query in queries for response in many.search([Search(query, 10)])]
    share = recall(found, nearest(embeddings, queries, 10))
    yield f"| find all of the 10 nearest of {EMBEDDINGS:,}, Elasticsearch | {share:.1%} | | | 95% |"


def build_processor(folder: Path, words: int = 49_408, seed: int = 0) -> None:
    """Writes a `CLIPProcessor` whose tokenizer has CLIP's size, made of random merges, to `folder`."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    random = np.random.default_rng(seed)
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    known, merges = set(tokens), []
    while len(tokens) < words - 2:
        first, second = (tokens[n] for n in random.integers(0, len(tokens), 2))
        if "</w>" not in first and first + second not in known and len(first + second) < 16:
            merges.append((first, second))
            tokens.append(first + second)
            known.add(first + second)
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)


def main() -> None:
    started = time.monotonic()
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    flags = {flag for flag in ("avx512_vnni", "avx_vnni", "amx_int8") if flag in Path("/proc/cpuinfo").read_text()}
    lines = [HEADER]
    print(HEADER, flush=True)
    with (
        tempfile.TemporaryDirectory(dir=ROOT / "build") as folder,
        Elasticsearch(java_options=["-Xms2g", "-Xmx2g"]) as server,
    ):
        machine = Machine(Path(folder), Path(folder) / "clip.onnx", {})
        build(machine.model)
        build_processor(machine.folder / "processor")
        for part in (photograph_rows, large_rows):
            for line in part(machine, server):
                print(line, flush=True)
                lines.append(line)
    lines.append(
        f"\n{os.cpu_count()} CPUs, {cpu[1] if cpu else platform.processor()} ({', '.join(sorted(flags)) or 'no VNNI'});"
        f" Python {platform.python_version()}, ONNX Runtime {onnxruntime.__version__}; peak memory of create.py"
        f" {machine.peaks['create.py']:.0f} MB; {time.monotonic() - started:.0f} s in all."
    )
    print(lines[-1])
    (ROOT / "build" / "benchmark.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
