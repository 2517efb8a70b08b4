"""The fixtures of all tests."""

import os
import signal
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
from pytest_httpserver import HTTPServer

from tests.pictures import Picture, Pictures, averaging_model, image
from tests.running import MANY, Scripts, environment
from tests.server import RELEASE, RELEASE_9, S3, Bucket, Elasticsearch, UnavailableError, jdks
from tools.clip_model import build
from tools.tcp_proxy import TcpProxy

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in `make test &`; the scripts would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def unavailable(reason: str) -> NoReturn:
    """Skips, with the reason; in CI what is missing is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's caches alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


# Servers, one of each for each worker of pytest-xdist


@contextmanager
def started(make: Callable[[], Any], untested: str) -> Iterator[Any]:
    """Starts a server, or skips the test if there can be none here."""
    try:
        server = make()
    except UnavailableError as reason:
        unavailable(f"{reason}; that leaves {untested} untested")
    with server:
        yield server


@pytest.fixture(scope="session")
def elasticsearch() -> Iterator[dict[str, str]]:
    """The environment of an Elasticsearch with its administrator: of TEST_ES_URL, or one that is started."""
    if "TEST_ES_URL" in os.environ:
        yield {"ES_URL": os.environ["TEST_ES_URL"], "ES_CA_CERT": os.environ.get("TEST_ES_CA_CERT", "")}
        return
    with started(Elasticsearch, "most of it") as server:
        yield server.environment


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """The environment of an S3 server."""
    with started(S3, "buckets") as server:
        yield server.environment


@pytest.fixture(scope="session")
def _killed_server() -> Iterator[Elasticsearch]:
    release = RELEASE_9 if any(version >= 21 for version, _ in jdks()) else RELEASE
    # It takes one bulk request at a time for one shard, and lets one more wait.
    make = partial(Elasticsearch, release, thread_pool__write__size=1, thread_pool__write__queue_size=1)
    with started(make, "outages") as server:
        yield server


@pytest.fixture
def elasticsearch_to_kill(_killed_server: Elasticsearch) -> Elasticsearch:
    """An Elasticsearch of its own: 9.2 where a JDK 21 or newer is found, else 8.19."""
    if not _killed_server.process:
        _killed_server.start()
    return _killed_server


@pytest.fixture
def tcp_proxy(elasticsearch: dict[str, str]) -> Iterator[TcpProxy]:
    """A proxy in front of Elasticsearch, for an outage."""
    with TcpProxy(urlsplit(elasticsearch["ES_URL"]).port or 0) as proxy:
        yield proxy


@pytest.fixture
def web() -> Iterator[HTTPServer]:
    """A web server, whose answers the test sets; without one it answers with HTTP 500."""
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def hub(tmp_path: Path, web: HTTPServer) -> dict[str, str]:
    """A hub on this machine with a small model; the environment in which scripts find it."""
    content = averaging_model(tmp_path / "hub.onnx").read_bytes()
    headers = {"X-Repo-Commit": "a" * 40, "ETag": f'"{"b" * 64}"'}
    path = "/minimaxir/imgbeddings/resolve/main/patch32_v1.onnx"
    web.expect_request(path).respond_with_data(content, headers=headers)
    return environment(tmp_path) | {"HF_ENDPOINT": web.url_for("").rstrip("/"), "HF_HOME": str(tmp_path / "hf")}


@pytest.fixture
def bucket(s3: dict[str, str]) -> Bucket:
    return Bucket(s3, f"test-{uuid.uuid4()}")


# The scripts, on an index of their own


@pytest.fixture
def scripts_on_file(tmp_path: Path) -> Scripts:
    """The scripts on the local index file."""
    return Scripts(tmp_path, environment(tmp_path))


@pytest.fixture
def scripts_on_elasticsearch(tmp_path: Path, elasticsearch: dict[str, str]) -> Iterator[Scripts]:
    """The scripts on the real Elasticsearch; the indices whose names begin like the index's are deleted."""
    scripts = Scripts(tmp_path, environment(tmp_path) | elasticsearch)
    index = scripts.index
    yield scripts
    scripts = Scripts(tmp_path, elasticsearch)
    if indices := list(scripts.request("GET", f"{index}*?ignore_unavailable=true")):
        scripts.request("DELETE", ",".join(indices))


@pytest.fixture(params=["file", "elasticsearch"])
def scripts(request: pytest.FixtureRequest) -> Scripts:
    """The scripts on each kind of index in turn."""
    scripts: Scripts = request.getfixturevalue(f"scripts_on_{request.param}")
    return scripts


@pytest.fixture
def many(scripts: Scripts, many_images: Path) -> Scripts:
    """The scripts on many images, on each kind of index in turn."""
    return scripts.move_to(many_images)


@pytest.fixture
def many_on_file(scripts_on_file: Scripts, many_images: Path) -> Scripts:
    return scripts_on_file.move_to(many_images)


@pytest.fixture
def many_on_elasticsearch(scripts_on_elasticsearch: Scripts, many_images: Path) -> Scripts:
    return scripts_on_elasticsearch.move_to(many_images)


# Images and models


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    """Makes an image file, different for each name, below the test's folder; gives its path."""

    def make(name: str, size: tuple[int, int] = (40, 30), seed: int | None = None, **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(size, zlib.crc32(name.encode()) if seed is None else seed).save(path, **options)
        return path

    return make


@pytest.fixture
def pictures(picture: Picture) -> Pictures:
    """Makes images/0.png to images/{count - 1}.png, or images/0/0.png and so on in several classes."""

    def make(count: int, classes: int = 0, folder: str = "images") -> list[Path]:
        names = [f"{number % classes}/{number}" if classes else f"{number}" for number in range(count)]
        return [picture(f"{folder}/{name}.png", size=(8, 8), seed=seed) for seed, name in enumerate(names)]

    return make


@pytest.fixture
def bird_images(picture: Picture) -> list[Path]:
    """Thirty images in three classes and one in none."""
    birds = ("Bald_Eagle", "Osprey", "deep/down/Wren")
    names = [f"images/{bird}/{number}.png" for bird in birds for number in range(10)]
    return [picture(name) for name in [*names, "images/loose.jpg"]]


@pytest.fixture(scope="session")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images/`: MANY small pictures in four classes."""
    folder = tmp_path_factory.mktemp("many_images")
    for number in range(MANY):
        path = folder / "images" / str(number % 4) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image((4, 4), number).save(path)
    return folder


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's shape and operators, three layers of it, with random weights."""
    path = tmp_path_factory.mktemp("model") / "clip.onnx"
    build(path, layers=3)
    return path
