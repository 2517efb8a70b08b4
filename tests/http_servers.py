"""HTTP servers that stand in for others, and misbehave."""

import http.client
import http.server
import time
from collections.abc import Callable
from typing import ClassVar

from tests.pictures import png


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


class NotElasticsearch(Answering):
    """A server that is no Elasticsearch, or stands before one."""

    answers: ClassVar[dict[str, tuple[int, str, bytes]]] = {
        "page": (200, "text/html", b"<html><body>It works!</body></html>"),
        "gateway": (502, "text/html", b"<html><body>Bad gateway</body></html>"),
        "empty": (200, "application/json", b""),
        "other": (200, "application/json", b'{"hello": "world"}'),
        "list": (200, "application/json", b"[]"),
    }

    def answer(self) -> None:
        status, kind, body = self.answers[self.path.split("/")[1]]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class RecordingServer(Answering):
    """Records each request's method and credentials; answers 404 to GET and 401 to everything else."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def answer(self) -> None:
        self.seen.append((self.command, self.headers["Authorization"]))
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(404 if self.command == "GET" else 401)
        self.send_header("X-Elastic-Product", "Elasticsearch")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


Reply = Callable[[http.server.BaseHTTPRequestHandler], None]


def send(
    handler: http.server.BaseHTTPRequestHandler, content: bytes, kind: str = "image/png", length: str = ""
) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", length or str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def redirect(handler: http.server.BaseHTTPRequestHandler, target: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", target)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def send_without_end(handler: http.server.BaseHTTPRequestHandler, total: int, pause: float) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(total // 65536):
        handler.wfile.write(bytes(65536))
        time.sleep(pause)


REPLIES: dict[str, Reply] = {
    "/a.png": lambda handler: send(handler, png(1)),
    "/moved": lambda handler: redirect(handler, "/a.png"),
    "/loop": lambda handler: redirect(handler, "/loop"),
    "/elsewhere": lambda handler: redirect(handler, "https://user:hunter2@example.com/a.png?key=hunter2"),
    "/file": lambda handler: redirect(handler, "file:///etc/passwd"),
    "/short": lambda handler: send(handler, png(1)[:50], length="5000"),
    "/large": lambda handler: send(handler, b"x", length=str(10**9)),
    "/page": lambda handler: send(handler, b"<html>Not found</html>", "text/html"),
    "/gigabyte": lambda handler: send_without_end(handler, 10**9, 0),
    "/stalls": lambda handler: time.sleep(60),
    "/drips": lambda handler: send_without_end(handler, 10**8, 1),
}


class Web(http.server.BaseHTTPRequestHandler):
    """Serves an image, and misbehaves."""

    def do_GET(self) -> None:
        reply = REPLIES.get(self.path.partition("?")[0])
        if reply:
            reply(self)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None: ...
