"""Images to search for from the web, and from standard input."""

import json
import re
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import imagesearch.content
import imagesearch.web
import pytest
from imagesearch.web import open_url

from tests.certificates import CA
from tests.http_servers import REPLIES, Web, redirect, serving
from tests.pictures import png
from tests.running import Scripts
from tests.server import S3, Bucket


def test_queries_from_everywhere_are_answered_in_order(scripts: Scripts, s3: S3, bucket: Bucket, web: str) -> None:
    scripts.environment |= s3.environment
    (scripts.folder / "images").mkdir()
    for seed in range(4):
        (scripts.folder / "images" / f"{seed}.png").write_bytes(png(seed))
    scripts.create()
    bucket.put("b.png", png(2))
    with (scripts.folder / "images" / "3.png").open("rb") as stdin:
        process = scripts.start("search.py", f"{web}/a.png", f"{bucket.url}/b.png", "-", "images/0.png", stdin=stdin)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    found = [json.loads(line)["hits"]["hits"][0]["fields"]["file_path"][0] for line in stdout.splitlines()]
    assert found == [f"./images/{number}.png" for number in (1, 2, 3, 0)]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none.png", "the server answered HTTP 404"),
        ("/loop", "more than 5 redirects"),
        ("/file", "not a valid http or https URL"),
        ("/gzip", "the server sends it compressed"),
        ("/short", "IncompleteRead|before the image was complete"),
        ("/large", "more than 200 MB"),
        ("/page", "not an image that Pillow can read"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_line(path: str, reason: str, indexed: Scripts, web: str) -> None:
    done = indexed.run("search.py", f"{web}{path}?token=hunter2", f"{web}/moved")
    assert done.returncode == 1
    first, second = map(json.loads, done.stdout.splitlines())
    shown = f"http://127.0.0.1:{web.rpartition(':')[2]}{path}"
    assert re.search(f"Cannot read {re.escape(shown)}: .*({reason})", first["error"]["reason"]), first
    assert "hunter2" not in done.stdout + done.stderr
    assert second["hits"]["max_score"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "url",
    [
        "http://[x/a.png",
        "http://",
        "http://user:pa/ss@localhost/x.png",
        "https://h:99999/",
        "http://user:pa/ss@h:99999/x.jpg",
    ],
)
def test_a_url_that_cannot_be_is_one_line(url: str, indexed: Scripts) -> None:
    done = indexed.run("search.py", url)
    assert done.returncode == 1 and done.stdout.count("\n") == 1
    assert "pa/ss" not in done.stdout + done.stderr


def test_the_page_shows_a_query_from_the_web(indexed: Scripts, web: str) -> None:
    indexed.search(f"{web}/a.png?token=hunter2", "--html", "page.html")
    html = (indexed.folder / "page.html").read_text()
    assert html.count("<img") == 2 and "Nearest to a.png" in html
    assert "hunter2" not in html


def test_an_empty_standard_input_is_reported(indexed: Scripts) -> None:
    process = indexed.start("search.py", "-")  # /dev/null
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    reasons = [json.loads(line)["error"]["reason"] for line in stdout.splitlines()]
    assert reasons == ["Cannot read 'standard input': it is empty"]
    assert indexed.run("search.py", "-", "-").returncode == 2  # it can be read only once


LIMITED = ["/stalls", "/drips", "/drips-headers", "/continues", "/drips-sizes"]


@pytest.mark.parametrize("path", LIMITED)
def test_a_download_has_one_time_limit_however_the_server_spends_it(
    path: str, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagesearch.web, "DOWNLOAD_TIMEOUT_SECONDS", 2)
    started = time.monotonic()
    with pytest.raises(ValueError, match="not complete after 2 seconds"), open_url(f"{web}{path}"):
        pass
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("path", ["/gigabyte", "/large", "/odd-length"])
def test_a_download_has_a_size_limit_whatever_the_server_says(
    path: str, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagesearch.content, "MAX_CONTENT_BYTES", 3_000_000)
    with pytest.raises(ValueError, match="more than 3 MB"), open_url(f"{web}{path}"):
        pass


def test_the_body_of_a_redirect_is_not_read(web: str) -> None:
    started = time.monotonic()
    with open_url(f"{web}/moved-at-length") as image:
        assert image.stream.read() == png(1)
    assert time.monotonic() - started < 5


def test_a_host_that_does_not_answer_is_one_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Connection refused"), open_url("http://user:hunter2@127.0.0.1:9/a.png"):
        pass


@pytest.fixture
def secure_web(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same server over https, whose CA is trusted."""
    ca = CA()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca.write(tmp_path / "ca.pem")))
    certificate, key = ca.issue(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(Web, context) as port:
        monkeypatch.setitem(REPLIES, "/to-https", lambda handler: redirect(handler, f"https://localhost:{port}/a.png"))
        monkeypatch.setitem(REPLIES, "/to-http", lambda handler: redirect(handler, f"{web}/a.png"))
        yield f"https://localhost:{port}"


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="requests verifies strictly there, and the tests' CA is like IBM's"
)
def test_http_may_redirect_to_https_and_not_the_other_way_round(web: str, secure_web: str) -> None:
    with open_url(f"{web}/to-https") as image:
        assert image.stream.read() == png(1)
    with pytest.raises(ValueError, match="it redirects from https to http"), open_url(f"{secure_web}/to-http"):
        pass
