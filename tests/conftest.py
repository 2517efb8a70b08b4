"""The fixtures of all tests."""

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from imagesearch.files import atomic_write
from tests.clip_model import build
from tests.http_servers import Hub, Web, serving
from tests.pictures import Picture, averaging_model, image, png
from tests.running import COUNTING, MANY, Scripts, environment, wait_until
from tests.server import (
    FETCH_SECONDS,
    FEWER,
    ROLES,
    ROOT,
    S3,
    START_SECONDS,
    Bucket,
    Cluster,
    Server,
    cluster,
    newest_release,
    s3_server,
    unavailable,
)
from tests.tcp_proxy import TcpProxy

TEST_ES_URL = os.environ.get("TEST_ES_URL")
Fixture = TypeVar("Fixture", bound=Callable[..., Any])


def slow(fixture: Fixture) -> Fixture:
    """Marks a fixture: the tests that use it are slow, since it needs a server or a browser, or runs the scripts."""
    fixture.is_slow = True  # type: ignore[attr-defined]
    return fixture


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that use a slow fixture as slow, for `make test-fast`, and puts them after the others.

    Those with a fixture that should be made once are on one worker of pytest-xdist, and come first of the slow ones.
    """
    for item in items:
        fixtures = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009
        if any(getattr(definitions[-1].func, "is_slow", False) for definitions in fixtures):
            item.add_marker(pytest.mark.slow)
        for fixture in set(GROUPS) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(GROUPS[fixture]))
    items.sort(key=lambda item: (bool(item.get_closest_marker("slow")), not item.get_closest_marker("xdist_group")))


# Servers, which start in the background, one after the other, while the first tests run. With several workers
# (pytest-xdist), the process that starts them starts the servers that all share, and hands them over in files.


@contextlib.contextmanager
def elasticsearch() -> Iterator[Server]:
    with cluster(1, roles=ROLES | FEWER) as node:
        yield Server(node.url, str(node.ca), {role: node.url_as(role) for role in ROLES | FEWER})


SERVERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "server": elasticsearch,
    "s3": s3_server,
    # It takes one bulk at a time for one shard and lets one more wait.
    "fragile_server": lambda: cluster(
        1, release=newest_release(), thread_pool__write__size=1, thread_pool__write__queue_size=1
    ),
    "memory_s3": lambda: s3_server(in_memory=True),
    "three_nodes": lambda: cluster(3),
}
SHARED = ("server", "s3")  # by all workers
# The groups of tests that run on one worker, by what they share.
GROUPS = {name: name for name in SERVERS if name not in SHARED} | {"small_clip": "clip", "process_inputs": "clip"}
HANDED_OVER = "IMAGESEARCH_TEST_SERVERS"  # the folder of the files with the shared servers
_started: dict[str, "Future[tuple[Any, ExitStack]]"] = {}
_pool = ThreadPoolExecutor(1)


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and config.option.markexpr != "not slow":
        os.environ[HANDED_OVER] = tempfile.mkdtemp(prefix="imagesearch-servers-")
        for name in SHARED if not TEST_ES_URL else ("s3",):
            _started[name] = _pool.submit(_start, name)
            _started[name].add_done_callback(functools.partial(_hand_over, Path(os.environ[HANDED_OVER], name)))


def _hand_over(path: Path, started: "Future[tuple[Any, ExitStack]]") -> None:
    """Writes a server, or the reason why there is none, to a file."""
    error = started.exception()
    with atomic_write(path) as temporary:
        temporary.write_bytes(pickle.dumps(str(error) if error else started.result()[0]))


def pytest_unconfigure(config: pytest.Config) -> None:
    if HANDED_OVER in os.environ and not hasattr(config, "workerinput"):
        for started in _started.values():
            if not started.exception():
                started.result()[1].close()
        shutil.rmtree(os.environ[HANDED_OVER])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins to start the servers that the selected tests need, unless there are several workers."""
    if session.config.option.collectonly or HANDED_OVER in os.environ:
        return
    needed = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if any(getattr(item, "callspec", None) and "elastic" in item.callspec.params.values() for item in session.items):  # type: ignore[attr-defined]
        needed.add("server")
    for name in SERVERS:
        if name in needed and not (name == "server" and TEST_ES_URL):
            _started[name] = _pool.submit(_start, name)


def _start(name: str) -> tuple[Any, ExitStack]:
    stack = ExitStack()
    return stack.enter_context(SERVERS[name]()), stack


def started(name: str) -> Iterator[Any]:
    """Yields a server as soon as it has started, and ends it unless it is shared with other workers."""
    if name in SHARED and HANDED_OVER in os.environ:
        path = Path(os.environ[HANDED_OVER], name)
        wait_until(path.exists, FETCH_SECONDS + 2 * START_SECONDS)
        server = pickle.loads(path.read_bytes())
        if isinstance(server, str):
            unavailable(server)
        yield server
        return
    if name not in _started:
        _started[name] = _pool.submit(_start, name)
    server, stack = _started[name].result()
    with stack:
        yield server


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's caches alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
@slow
def s3() -> Iterator[S3]:
    """An S3 server whose objects are on disk."""
    yield from started("s3")


@pytest.fixture(scope="session")
@slow
def memory_s3() -> Iterator[S3]:
    """An S3 server that keeps objects in memory, so that their keys may be what no file name can."""
    yield from started("memory_s3")


@pytest.fixture(scope="session")
@slow
def server() -> Iterator[Server]:
    """Elasticsearch 8.19, or the one that `TEST_ES_URL` (and `TEST_ES_CA_CERT`) name."""
    if TEST_ES_URL:
        yield Server(TEST_ES_URL, os.environ.get("TEST_ES_CA_CERT", ""))
        return
    yield from started("server")


@pytest.fixture(scope="session")
@slow
def fragile_server() -> Iterator[Cluster]:
    """Elasticsearch to kill: 9.2 where a JDK 21 or newer is found, else 8.19."""
    yield from started("fragile_server")


@pytest.fixture(scope="session")
@slow
def three_nodes() -> Iterator[Cluster]:
    """Three nodes to kill."""
    yield from started("three_nodes")


@pytest.fixture(autouse=True)
def all_nodes_run(request: pytest.FixtureRequest) -> None:
    """A test that kills a node leaves it so, and the next one that needs it starts it again."""
    for name in {"fragile_server", "three_nodes"} & set(request.fixturenames):
        request.getfixturevalue(name).start_missing()


@pytest.fixture
@slow
def proxy(server: Server) -> Iterator[TcpProxy]:
    """A proxy in front of Elasticsearch, for an outage."""
    with TcpProxy(urlsplit(server.url).port or 0) as proxy:
        yield proxy


@pytest.fixture
@slow
def local(tmp_path: Path) -> Scripts:
    """The scripts on the local index file."""
    return Scripts(tmp_path, environment(tmp_path))


@pytest.fixture
@slow
def elastic(tmp_path: Path, server: Server) -> Iterator[Scripts]:
    """The scripts on the real Elasticsearch."""
    scripts = Scripts(tmp_path, environment(tmp_path) | {"ES_URL": server.url, "ES_CA_CERT": server.ca})
    index = scripts.index
    yield scripts
    for name in {index, scripts.index}:
        server.request("DELETE", f"{name}?ignore_unavailable=true")


@pytest.fixture(params=["local", "elastic"])
@slow
def scripts(request: pytest.FixtureRequest) -> Scripts:
    """The scripts on each kind of index in turn."""
    scripts: Scripts = request.getfixturevalue(request.param)
    return scripts


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    """Makes an image file, different for each name, below the test's folder; gives its path."""

    def make(name: str, size: tuple[int, int] = (40, 30), seed: int | None = None, **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(size, sum(name.encode()) if seed is None else seed).save(path, **options)
        return path

    return make


@pytest.fixture
@slow
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A hub on this machine with a small model; the environment in which scripts find it."""
    content = averaging_model(tmp_path / "hub.onnx").read_bytes()
    monkeypatch.setattr(Hub, "content", content)
    monkeypatch.setattr(Hub, "promised", hashlib.sha256(content).hexdigest())
    with serving(Hub) as port:
        yield environment(tmp_path) | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf")}


@pytest.fixture
@slow
def bucket(s3: S3) -> Bucket:
    return Bucket(s3, f"test-{uuid.uuid4()}")


@pytest.fixture
@slow
def memory_bucket(memory_s3: S3) -> Bucket:
    return Bucket(memory_s3, f"test-{uuid.uuid4()}")


@pytest.fixture
@slow
def on_s3(scripts: Scripts, s3: S3) -> Scripts:
    """The scripts on each kind of index, with the S3 server's credentials."""
    scripts.environment |= s3.environment
    return scripts


@pytest.fixture
@slow
def local_s3(local: Scripts, s3: S3) -> Scripts:
    local.environment |= s3.environment
    return local


@pytest.fixture(scope="session")
@slow
def web() -> Iterator[str]:
    """A server of images that misbehaves, with credentials in its URL."""
    with serving(Web) as port:
        yield f"http://user:hunter2@127.0.0.1:{port}"


@pytest.fixture
@slow
def indexed(local: Scripts) -> Scripts:
    """An index with one image, which every query that can be read finds."""
    (local.folder / "images").mkdir()
    (local.folder / "images" / "a.png").write_bytes(png(1))
    local.create()
    return local


@pytest.fixture
@slow
def counting(scripts: Scripts) -> Scripts:
    """The scripts with a model that counts its calls."""
    calls = scripts.folder / "calls"
    (scripts.folder / "sitecustomize.py").write_text(COUNTING.format(path=str(calls)))
    scripts.environment["PYTHONPATH"] = os.pathsep.join([str(scripts.folder), str(ROOT)])
    return scripts


@pytest.fixture(scope="session")
@slow
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images/`: thousands of small pictures in ten classes."""
    folder = tmp_path_factory.mktemp("many_images")
    for number in range(MANY):
        path = folder / "images" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        color = (number % 256, number // 256 * 16, 99)
        Image.new("RGB", (4, 4), color).save(path)
    return folder


@pytest.fixture(scope="session")
@slow
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        unavailable(
            "there is no Chromium on the PATH: install it (Debian: apt-get install chromium); that leaves how the page"
            " looks untested"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def birds(picture: Picture) -> list[Path]:
    """Thirty images in three classes and one in none."""
    names = [
        f"images/{bird}/{number}.png" for bird in ("Bald_Eagle", "Osprey", "deep/down/Wren") for number in range(10)
    ]
    return [picture(name) for name in [*names, "images/loose.jpg"]]


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's shape and operators, three layers of it, with random weights."""
    path = tmp_path_factory.mktemp("model") / "clip.onnx"
    build(path, layers=3)
    return path
