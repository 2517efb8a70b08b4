"""What the tests share: a real Elasticsearch, the two scripts as a user runs them, small images and models."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pytest
import requests
from onnx import TensorProto, helper
from PIL import Image

from imagesearch.images import open_rgb
from tests.certificates import trusting_session
from tests.server import ROOT, S3, Cluster, UnavailableError

# Privileges on the index: the smallest with which each script can do all it can, and too few.
ROLES = {
    "creator": ["create_index", "read", "write", "maintenance", "view_index_metadata"],
    "searcher": ["read", "view_index_metadata"],
    "reader": ["read"],
}
FEWER = {
    f"{role}-without-{privilege}": [other for other in ROLES[role] if other != privilege]
    for role in ("creator", "searcher")
    for privilege in ROLES[role]
}


@dataclass(frozen=True)
class Server:
    """A running Elasticsearch: `ES_URL` and `ES_CA_CERT` for it."""

    url: str
    ca: str
    urls: dict[str, str] = field(default_factory=dict)
    """`ES_URL` for users with fewer privileges, by role."""

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Sends a request as the administrator; its JSON."""
        kind = (
            {"json": body}
            if not isinstance(body, bytes)
            else {"data": body, "headers": {"Content-Type": "application/x-ndjson"}}
        )
        with trusting_session(Path(self.ca)) if self.ca else requests.Session() as session:
            answer = session.request(method, f"{self.url.split(',')[0]}/{path}", timeout=60, **kind)
        assert answer.ok, answer.text
        return answer.json()


# Tests that use one of these need a server or a browser, or start many processes.
SLOW_FIXTURES = {"server", "s3", "three", "fragile", "newest", "browser", "hub", "web", "scripts", "local", "many"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests as slow by what they need, for `make test-fast`."""
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def unavailable(reason: str) -> NoReturn:
    """Skips, with the reason; in CI a missing server is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's caches alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@contextlib.contextmanager
def cluster(size: int, **settings: object) -> Iterator[Cluster]:
    """Starts `size` nodes of Elasticsearch 8.19 with these settings."""
    try:
        nodes = Cluster(size=size, **settings)  # type: ignore[arg-type]
    except UnavailableError as reason:
        unavailable(str(reason))
    with nodes:
        yield nodes


@contextlib.contextmanager
def s3_server(in_memory: bool = False) -> Iterator[S3]:
    """An S3 server."""
    try:
        server = S3(in_memory)
    except UnavailableError as reason:
        unavailable(str(reason))
    with server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server whose objects are on disk."""
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Elasticsearch 8.19, or the one that `TEST_ES_URL` (and `TEST_ES_CA_CERT`) name."""
    if url := os.environ.get("TEST_ES_URL"):
        yield Server(url, os.environ.get("TEST_ES_CA_CERT", ""))
        return
    with cluster(1, roles=ROLES | FEWER) as node:
        yield Server(node.url, str(node.ca), {role: node.url_as(role) for role in ROLES | FEWER})


@pytest.fixture(scope="session")
def three() -> Iterator[Cluster]:
    """Three nodes; a test that kills one starts it again."""
    with cluster(3) as nodes:
        yield nodes


@dataclass
class Scripts:
    """Runs create.py and search.py as a user does, in a folder of their own, on an index of their own."""

    folder: Path
    environment: dict[str, str]
    index: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex}")

    def start(
        self, script: str, *arguments: object, stdin: Any = subprocess.DEVNULL, **environment: str
    ) -> "subprocess.Popen[str]":
        """Starts a script; its output is text, on pipes."""
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, arguments), "--index", self.index],
            cwd=self.folder,
            env=self.environment | environment,
            text=True,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(script, *arguments, **environment)
        stdout, stderr = process.communicate(timeout=120)
        assert "Traceback" not in stderr, stderr
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def create(self, *arguments: object, code: int = 0, **environment: Any) -> str:
        """Runs create.py with the thumbnail model, unless told otherwise, to the exit `code`; its stderr."""
        model = () if "--model" in arguments else ("--model", "thumbnail")
        done = self.run("create.py", *model, *arguments, **environment)
        assert done.returncode == code, done.stderr
        return done.stderr

    def search(self, *arguments: object, **environment: str) -> list[dict[str, Any]]:
        """Runs search.py; the JSON that it prints, a line each."""
        done = self.run("search.py", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def paths(self) -> list[str]:
        """The `file_path` of every document, sorted."""
        anything = self.folder / "anything.png"
        Image.new("RGB", (20, 20), "teal").save(anything)
        hits = self.search(anything, "-k", 10_000)[0]["hits"]["hits"]
        return sorted(hit["fields"]["file_path"][0] for hit in hits)


def environment(home: Path) -> dict[str, str]:
    """The environment without what would lead the scripts elsewhere; the caches are in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ES_", "HF_", "TEST_", "AWS_"))}
    return kept | {"XDG_CACHE_HOME": str(home / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}


def scripts_on(nodes: Cluster, folder: Path, cache: Path) -> Scripts:
    """The scripts on a cluster, run in `folder`."""
    return Scripts(folder, environment(cache) | {"ES_URL": nodes.url, "ES_CA_CERT": str(nodes.ca)})


@pytest.fixture
def local(tmp_path: Path) -> Scripts:
    """The scripts on the local index file."""
    return Scripts(tmp_path, environment(tmp_path))


@pytest.fixture
def elastic(tmp_path: Path, server: Server) -> Iterator[Scripts]:
    """The scripts on the real Elasticsearch."""
    scripts = Scripts(tmp_path, environment(tmp_path) | {"ES_URL": server.url, "ES_CA_CERT": server.ca})
    index = scripts.index
    yield scripts
    for name in {index, scripts.index}:
        server.request("DELETE", f"{name}?ignore_unavailable=true")


@pytest.fixture(params=["local", "elastic"])
def scripts(request: pytest.FixtureRequest) -> Scripts:
    """The scripts on each kind of index in turn."""
    scripts: Scripts = request.getfixturevalue(request.param)
    return scripts


Picture = Callable[..., Path]


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    """Makes an image file, different for each name, below the test's folder; gives its path."""

    def make(name: str, size: tuple[int, int] = (40, 30), seed: int | None = None, **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(size, sum(name.encode()) if seed is None else seed).save(path, **options)
        return path

    return make


def image(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture with large coloured patches, as different from another seed's as two photographs."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def read_image(stream: BinaryIO) -> Image.Image:
    """Decodes an image as the scripts do."""
    with open_rgb(stream) as picture:
        return picture


def averaging_model(path: Path, scale: float = 1.0) -> Path:
    """An ONNX model with imgbeddings' input and output: the pixels averaged to 16×16, times `scale`."""
    pool = helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[14, 14], strides=[14, 14])
    flat = helper.make_node("Flatten", ["pooled"], ["flat"])
    constant = helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])
    scaled = helper.make_node("Mul", ["flat", "scale"], ["embeddings"])
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 224, 224])
    embeddings = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 768])
    graph = helper.make_graph([pool, flat, scaled], "averaging", [pixels], [embeddings], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


class Answering(http.server.BaseHTTPRequestHandler):
    """A quiet handler whose `answer` answers every method."""

    def answer(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def do_DELETE(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None: ...


class Hub(http.server.BaseHTTPRequestHandler):
    """The one file of the hub, as the hub serves it: large-file headers, then the bytes."""

    content = b""
    promised = ""  # the SHA-256 that its header says
    cut = 0  # bytes left out at the end

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/minimaxir/imgbeddings/resolve/main/patch32_v1.onnx" else 404)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{self.promised}"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content[: len(self.content) - self.cut])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A hub on this machine with a small model; the environment in which scripts find it."""
    content = averaging_model(tmp_path / "hub.onnx").read_bytes()
    monkeypatch.setattr(Hub, "content", content)
    monkeypatch.setattr(Hub, "promised", hashlib.sha256(content).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield environment(tmp_path) | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
        }
        server.shutdown()
