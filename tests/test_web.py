"""Images to search for from the web, and from standard input."""

import gzip
import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from imagesearch.records import ImageFile
from imagesearch.sources import memory
from imagesearch.sources import web as web_source
from imagesearch.sources.web import open_url
from tests.pictures import Picture, Pictures, png
from tests.running import Scripts
from tests.server import Bucket

pytestmark = pytest.mark.slow


@pytest.fixture
def scripts_with_one_image(scripts_on_file: Scripts, picture: Picture) -> Scripts:
    """An index with one image, which every query that can be read finds."""
    picture("images/a.png", size=(8, 8), seed=1)
    scripts_on_file.create()
    return scripts_on_file


def test_queries_from_everywhere_are_answered_in_order(
    scripts: Scripts, pictures: Pictures, s3: dict[str, str], bucket: Bucket, web: HTTPServer
) -> None:
    scripts.environment |= s3
    pictures(4)
    scripts.create()
    bucket.put({"b.png": png(2)})
    web.expect_request("/a.png").respond_with_data(png(1))
    url = web.url_for("/a.png?token=hunter2").replace("//", "//user:hunter2@")
    queries = (url, f"{bucket.url}/b.png", "-", "images/0.png")
    done = scripts.shell(f"SEARCH {shlex.join(queries)} --html page.html <images/3.png")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = [line["hits"]["hits"][0]["fields"]["file_path"][0] for line in lines]
    assert found == [f"./images/{number}.png" for number in (1, 2, 3, 0)]
    assert [line["image"] for line in lines] == [web.url_for("/a.png"), *queries[1:]]
    html = (scripts.folder / "page.html").read_text()
    assert html.count('role="img"') == 8 and "Nearest to a.png" in html
    assert "hunter2" not in html + done.stdout + done.stderr


@pytest.mark.parametrize(
    ("query", "answer", "reason"),
    [
        ("", Response("", 404), "the server answered HTTP 404"),
        ("", Response(png(1)[:50]), "image file is truncated"),
        ("", Response("<html>Not found</html>"), "not an image that Pillow can read"),
        ("", Response("", 302, {"Location": "/a"}), "Exceeded 30 redirects"),
        ("", Response("", 302, {"Location": "file:///etc/passwd"}), "is not a valid http or https URL"),
        ("http://[x/a.png", None, ""),
        ("http://", None, "is not a valid http or https URL"),
        ("https://user:hunter2@host:99999/a.jpg", None, "is not a valid http or https URL"),
        ("https://user:hun/ter2@h/a.jpg", None, ""),
        ("https://h:99999/", None, ""),
        *((f"s3://{user}@birds", None, "must look like") for user in ("u:hunter2", "u:hun/ter2", "user:hunter2")),
        ("http://127.0.0.1:9/a.png", None, "Connection refused"),
        ("https://127.0.0.1:{}/a.png", None, "that port does not use TLS: the URL must begin with http://"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_line(
    query: str, answer: Response | None, reason: str, scripts_with_one_image: Scripts, web: HTTPServer
) -> None:
    if answer:
        web.expect_request("/a").respond_with_response(answer)
        query, reason = web.url_for("/a?t=hunter2"), f"Cannot read {web.url_for('/a')}: .*{reason}"
    web.expect_request("/good.png").respond_with_data(png(1))
    queries = query.replace("{}", str(web.port)), web.url_for("/good.png")
    done = scripts_with_one_image.run("search.py", *queries)
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1 and re.search(reason, first["error"]["reason"]), first
    assert not re.search("hunter2|ter2", done.stdout + done.stderr)
    assert second["hits"]["max_score"] == pytest.approx(1, abs=1e-6)


def at(web: HTTPServer, path: str) -> ImageFile:
    return ImageFile(web.url_for(path), "", "", 0, 0)


def test_a_download_has_a_size_limit_whatever_the_server_says(web: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_CONTENT_BYTES", 3_000_000)
    web.expect_request("/large").respond_with_handler(lambda _: Response(bytes(65536) for _ in range(10_000)))
    started = time.monotonic()
    with pytest.raises(ValueError, match="more than 3 MB"), open_url(at(web, "/large")):
        pass
    assert time.monotonic() - started < 5


def test_a_server_that_sends_a_byte_now_and_then_is_left(web: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two minutes; here after one second."""
    monkeypatch.setattr(web_source, "DOWNLOAD_TIMEOUT_SECONDS", 1)

    def drip() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x"
            time.sleep(0.1)

    web.expect_request("/drip").respond_with_handler(lambda _: Response(drip()))
    started = time.monotonic()
    with pytest.raises(ValueError, match="it takes more than 1 seconds"), open_url(at(web, "/drip")):
        pass
    assert time.monotonic() - started < 5


def test_what_may_become_larger_reserves_the_most(web: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    content = gzip.compress(png(1))
    web.expect_request("/a.png").respond_with_data(content, headers={"Content-Encoding": "gzip"})
    reserved = list[int]()

    def reserve(size: int) -> nullcontext[None]:
        reserved.append(size)
        return nullcontext()

    monkeypatch.setattr(memory.content_memory, "reserve", reserve)
    with open_url(at(web, "/a.png")) as opened:
        assert opened.stream.read() == png(1)
    assert reserved == [memory.MAX_CONTENT_BYTES]


def test_a_class_of_standard_input_may_be_asked_for(scripts_with_one_image: Scripts) -> None:
    done = scripts_with_one_image.shell("SEARCH - --desc images <images/a.png")
    assert json.loads(done.stdout)["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
    done = scripts_with_one_image.shell("SEARCH - </dev/null")
    line = json.loads(done.stdout)
    assert done.returncode == 1 and line["image"] == "-"
    assert line["error"]["reason"] == "Cannot read standard input: it is empty"
