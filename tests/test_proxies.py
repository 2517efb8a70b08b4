"""Something stands between the scripts and Elasticsearch: it redirects, limits sizes, or is away."""

import contextlib
import http.server
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.certificates import trusting_session
from tests.http_servers import Answering
from tests.pictures import Picture
from tests.running import Scripts, counts
from tests.server import Server

Answer = tuple[int, dict[str, str], bytes] | None


@contextlib.contextmanager
def proxy(server: Server, intercept: Callable[[str, str, bytes], Answer]) -> Iterator[str]:
    """A proxy in front of Elasticsearch: it answers itself, or passes on what `intercept` returns None for."""
    upstream = trusting_session(Path(server.ca))

    class Handler(Answering):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            answer = intercept(self.command, self.path, body)
            if answer is None:
                headers = {name: self.headers[name] for name in ("Content-Type", "Accept") if name in self.headers}
                response = upstream.request(
                    self.command, server.url + self.path, data=body, headers=headers, timeout=60
                )
                kept = ("Content-Type", "X-Elastic-Product")
                answer = response.status_code, {n: response.headers[n] for n in kept}, response.content
            status, headers, content = answer
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as front:
        threading.Thread(target=front.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{front.server_port}"
        front.shutdown()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status: int, elastic: Scripts, server: Server, picture: Picture) -> None:
    path = picture("images/a.png")
    elastic.create()
    moved = {"Location": "https://admin:hunter2@db.example.com:9243/images?token=hunter2"}
    with proxy(server, lambda method, path, body: (status, moved, b"")) as url:
        for arguments in (("create.py",), ("search.py", path)):
            done = elastic.run(*arguments, ES_URL=url)
            assert done.returncode == 2 and done.stdout == ""
            assert f"redirects to https://db.example.com:9243 (HTTP {status}): set ES_URL to that" in done.stderr
            assert "hunter2" not in done.stderr
    with proxy(server, lambda method, path, body: (status, {"Location": "/login?token=hunter2"}, b"")) as url:
        done = elastic.run("search.py", path, ES_URL=url)
        assert done.returncode == 2 and done.stdout == ""
        assert f"a proxy answers for it: it redirects to another path (HTTP {status}). Check ES_URL." in done.stderr
        assert "hunter2" not in done.stderr
    with proxy(server, lambda method, path, body: (status, moved, b"") if method == "POST" else None) as url:
        done = elastic.run("search.py", path, ES_URL=url)  # the search alone is redirected
        assert done.returncode == 2 and done.stdout == ""


def test_a_bulk_request_that_is_too_large_is_split(elastic: Scripts, server: Server, picture: Picture) -> None:
    for number in range(150):
        picture(f"images/{number}.png", size=(8, 8), seed=number)
    sizes: list[int] = []

    def limit(method: str, path: str, body: bytes) -> Answer:
        if path.startswith("/_bulk"):
            sizes.append(len(body))
        return (413, {"Content-Type": "text/html"}, b"<html>Too large</html>") if len(body) > 300_000 else None

    with proxy(server, limit) as url:
        assert counts(elastic.create(ES_URL=url)) == {"new": 150}
    assert max(sizes) > 300_000 and len([size for size in sizes if size > 300_000]) <= 3  # it remembers
    assert len(elastic.paths()) == 150


def test_a_single_document_that_is_too_large_is_reported(elastic: Scripts, server: Server, picture: Picture) -> None:
    picture("images/a.png")
    refuse = (413, {"Content-Type": "text/html"}, b"")
    with proxy(server, lambda method, path, body: refuse if path.startswith("/_bulk") else None) as url:
        stderr = elastic.create(code=2, ES_URL=url)
    assert "(HTTP 413): raise the limit of the proxy" in stderr and stderr.count("create.py:") == 1


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_search_goes_to_the_next_host_if_the_first_cannot_answer(
    status: int, elastic: Scripts, server: Server, picture: Picture
) -> None:
    path = picture("images/a.png")
    elastic.create()
    away: Answer = (status, {"Content-Type": "text/html"}, b"<html>away</html>")
    with proxy(server, lambda *_: away) as first, proxy(server, lambda *_: None) as second:
        assert elastic.search(path, ES_URL=f"{first},{second}")[0]["hits"]["total"]["value"] == 1
        done = elastic.run("search.py", path, ES_URL=first)
    assert done.returncode == 1
    assert re.search(rf"No answer from Elasticsearch \(http://\S+ answered HTTP {status} with text/html\)", done.stderr)


def test_a_missing_shard_is_named_before_an_empty_index(elastic: Scripts, server: Server, picture: Picture) -> None:
    path = picture("images/a.png")
    elastic.create()
    answer = b"""{"took": 1, "timed_out": false, "_shards": {"total": 1, "successful": 0, "skipped": 0, "failed": 1},
                  "hits": {"total": {"value": 0, "relation": "eq"}, "max_score": null, "hits": []}}"""
    headers = {"Content-Type": "application/json", "X-Elastic-Product": "Elasticsearch"}
    with proxy(server, lambda method, path, body: (200, headers, answer) if "_search" in path else None) as url:
        done = elastic.run("search.py", path, ES_URL=url)
    assert done.returncode == 1
    assert "some shards failed or timed out" in done.stderr and "is empty" not in done.stderr
    assert done.stdout.count("\n") == 1


def test_an_index_templates_meta_does_not_lock_the_user_out(elastic: Scripts, server: Server, picture: Picture) -> None:
    picture("images/a.png")
    meta = {"owner": "search team", "model": "theirs", "version": 7}
    template = {"index_patterns": [elastic.index], "template": {"mappings": {"_meta": meta}}}
    server.request("PUT", f"_index_template/{elastic.index}", template)
    try:
        assert counts(elastic.create()) == {"new": 1}
    finally:
        server.request("DELETE", f"_index_template/{elastic.index}")
    assert counts(elastic.create()) == {"unchanged": 1}
    mappings = server.request("GET", f"{elastic.index}/_mapping")[elastic.index]["mappings"]
    assert mappings["_meta"]["owner"] == "search team" and "imagesearch" in mappings["_meta"]
