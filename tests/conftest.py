"""The fixtures of all tests."""

import json
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import obstore
import pytest
from obstore.store import from_url
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from pytest_httpserver import HTTPServer

from tests.clip_model import build
from tests.pictures import Picture, averaging_model, image
from tests.running import Scripts, environment, wait_until
from tests.server import S3, START_SECONDS, Elasticsearch, Process, UnavailableError, newest_release
from tests.tcp_proxy import TcpProxy

Fixture = TypeVar("Fixture", bound=Callable[..., Any])
MANY = 2500  # images in `many_images`
# Of the servers that all workers share, as JSON: their environment for the scripts, or the reason why there is none.
SERVERS = "IMAGESEARCH_TEST_SERVERS"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in `make test &`; the scripts would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def slow(fixture: Fixture) -> Fixture:
    """Marks a fixture: the tests that use it are slow, since it needs a server or a browser, or runs the scripts."""
    fixture.is_slow = True  # type: ignore[attr-defined]
    return fixture


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that use a slow fixture as slow, for `make test-fast`, and puts them after the others.

    What is made once, a server to kill and CLIP's shape, is made on one worker of pytest-xdist.
    """
    for item in items:
        definitions = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
        if any(getattr(fixtures[-1].func, "is_slow", False) for fixtures in definitions.values()):
            item.add_marker(pytest.mark.slow)
        for name in {"elasticsearch_to_kill", "small_clip"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: (bool(item.get_closest_marker("slow")), not item.get_closest_marker("xdist_group")))


def unavailable(reason: str) -> NoReturn:
    """Skips, with the reason; in CI what is missing is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


_shared: list[Process] = []
_starting = ThreadPoolExecutor(1)  # one server after the other, while the first tests run


def pytest_configure(config: pytest.Config) -> None:
    """Starts the shared servers, if there are several workers and slow tests."""
    if getattr(config.option, "numprocesses", None) and config.option.markexpr != "not slow":
        start_servers()


def pytest_unconfigure() -> None:
    for server in _shared:
        server.__exit__()


def start_servers() -> None:
    """Starts Elasticsearch, unless TEST_ES_URL names one, and an S3 server; SERVERS says where they are."""
    try:
        servers: list[Elasticsearch | S3] = [Elasticsearch(), S3()]
    except UnavailableError as reason:
        os.environ[SERVERS] = json.dumps({"unavailable": f"{reason}; that leaves most of it untested"})
        return
    os.environ[SERVERS] = json.dumps({type(server).__name__: server.environment for server in servers})
    for server in servers:
        _shared.append(server)
        _starting.submit(server.start)


def server_environment(kind: type[Elasticsearch | S3]) -> dict[str, str]:
    """The environment in which scripts find a shared server, which answers."""
    if kind is Elasticsearch and "TEST_ES_URL" in os.environ:
        return {"ES_URL": os.environ["TEST_ES_URL"], "ES_CA_CERT": os.environ.get("TEST_ES_CA_CERT", "")}
    if SERVERS not in os.environ:
        start_servers()
    servers: dict[str, Any] = json.loads(os.environ[SERVERS])
    if "unavailable" in servers:
        unavailable(servers["unavailable"])
    settings: dict[str, str] = servers[kind.__name__]
    wait_until(lambda: kind.is_up(settings), 2 * START_SECONDS)
    return settings


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's caches alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
@slow
def elasticsearch() -> dict[str, str]:
    """The environment of the shared Elasticsearch, with its administrator."""
    return server_environment(Elasticsearch)


@pytest.fixture(scope="session")
@slow
def s3() -> dict[str, str]:
    """The environment of the shared S3 server."""
    return server_environment(S3)


@pytest.fixture(scope="session")
def _killed_server() -> Iterator[Elasticsearch]:
    try:
        # It takes one bulk request at a time for one shard, and lets one more wait.
        server = Elasticsearch(newest_release(), thread_pool__write__size=1, thread_pool__write__queue_size=1)
    except UnavailableError as reason:
        unavailable(str(reason))
    with server:
        yield server


@pytest.fixture
@slow
def elasticsearch_to_kill(_killed_server: Elasticsearch) -> Elasticsearch:
    """An Elasticsearch of its own: 9.2 where a JDK 21 or newer is found, else 8.19."""
    if not _killed_server.process:
        _killed_server.start()
    return _killed_server


@pytest.fixture
@slow
def scripts_on_file(tmp_path: Path) -> Scripts:
    """The scripts on the local index file."""
    return Scripts(tmp_path, environment(tmp_path))


@pytest.fixture
@slow
def scripts_on_elasticsearch(tmp_path: Path, elasticsearch: dict[str, str]) -> Iterator[Scripts]:
    """The scripts on the real Elasticsearch."""
    scripts = Scripts(tmp_path, environment(tmp_path) | elasticsearch)
    index = scripts.index
    yield scripts
    for name in {index, scripts.index}:
        Scripts(tmp_path, elasticsearch).request("DELETE", f"{name}?ignore_unavailable=true")


@pytest.fixture(params=["file", "elasticsearch"])
@slow
def scripts(request: pytest.FixtureRequest) -> Scripts:
    """The scripts on each kind of index in turn."""
    scripts: Scripts = request.getfixturevalue(f"scripts_on_{request.param}")
    return scripts


@pytest.fixture
@slow
def tcp_proxy(elasticsearch: dict[str, str]) -> Iterator[TcpProxy]:
    """A proxy in front of Elasticsearch, for an outage."""
    with TcpProxy(urlsplit(elasticsearch["ES_URL"]).port or 0) as proxy:
        yield proxy


@pytest.fixture
@slow
def web() -> Iterator[HTTPServer]:
    """A web server, whose answers the test sets; without one it answers with HTTP 500."""
    with HTTPServer(threaded=True) as server:
        yield server


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
def bird_images(picture: Picture) -> list[Path]:
    """Thirty images in three classes and one in none."""
    birds = ("Bald_Eagle", "Osprey", "deep/down/Wren")
    names = [f"images/{bird}/{number}.png" for bird in birds for number in range(10)]
    return [picture(name) for name in [*names, "images/loose.jpg"]]


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


class Bucket:
    """A bucket of its own for each test."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self.name = environment, f"test-{uuid.uuid4()}"
        self.url = f"s3://{self.name}"
        S3.put(environment, self.name)
        settings: Any = {name.lower(): value for name, value in environment.items()}
        settings["aws_disable_bulk_delete"] = "true"  # which S3Proxy does not have
        self._store = from_url(self.url, config=settings, client_options={"allow_http": True})

    def put(self, objects: dict[str, bytes]) -> None:
        """Puts objects, by their keys, whatever these are."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: S3.put(self.environment, self.name, key, objects[key]), objects))

    def delete(self, *keys: str) -> None:
        for key in keys:
            obstore.delete(self._store, key)


@pytest.fixture
@slow
def bucket(s3: dict[str, str]) -> Bucket:
    return Bucket(s3)


@pytest.fixture(scope="session")
@slow
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        unavailable("no Chromium (Debian: apt-get install chromium); that leaves how the page looks untested")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's shape and operators, three layers of it, with random weights."""
    path = tmp_path_factory.mktemp("model") / "clip.onnx"
    build(path, layers=3)
    return path


@pytest.fixture
@slow
def hub(tmp_path: Path, web: HTTPServer) -> dict[str, str]:
    """A hub on this machine with a small model; the environment in which scripts find it."""
    content = averaging_model(tmp_path / "hub.onnx").read_bytes()
    headers = {"X-Repo-Commit": "a" * 40, "ETag": f'"{"b" * 64}"'}
    web.expect_request("/minimaxir/imgbeddings/resolve/main/patch32_v1.onnx").respond_with_data(
        content, headers=headers
    )
    return environment(tmp_path) | {"HF_ENDPOINT": web.url_for("").rstrip("/"), "HF_HOME": str(tmp_path / "hf")}
