"""HTTP servers that stand in for others, and misbehave."""

import contextlib
import gzip
import http.client
import http.server
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

from tests.pictures import png


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serves with `handler` on a port of this machine, which it yields; over https with a `context`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that give up
        server.daemon_threads = True
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


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
    handler: http.server.BaseHTTPRequestHandler,
    content: bytes,
    kind: str = "image/png",
    length: str = "",
    encoding: str = "",
) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    if encoding:
        handler.send_header("Content-Encoding", encoding)
    handler.send_header("Content-Length", length or str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def redirect(handler: http.server.BaseHTTPRequestHandler, target: str, length: int = 0) -> None:
    """Redirects, with a body of `length` bytes that never ends."""
    handler.send_response(302)
    handler.send_header("Location", target)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
    if length:
        time.sleep(20)


def send_without_end(handler: http.server.BaseHTTPRequestHandler, total: int, pause: float) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(total // 65536):
        handler.wfile.write(bytes(65536))
        time.sleep(pause)


def drip(handler: http.server.BaseHTTPRequestHandler, start: bytes, drop: bytes) -> None:
    """Sends something every half a second, for 20 seconds."""
    handler.wfile.write(start)
    for _ in range(40):
        handler.wfile.write(drop)
        handler.wfile.flush()
        time.sleep(0.5)


REPLIES: dict[str, Reply] = {
    "/a.png": lambda handler: send(handler, png(1)),
    "/moved": lambda handler: redirect(handler, "/a.png"),
    "/moved-at-length": lambda handler: redirect(handler, "/a.png", length=10**9),
    "/loop": lambda handler: redirect(handler, "/loop"),
    "/file": lambda handler: redirect(handler, "file:///etc/passwd"),
    "/short": lambda handler: send(handler, png(1)[:50], length="5000"),
    "/large": lambda handler: send(handler, b"x", length=str(10**9)),
    "/page": lambda handler: send(handler, b"<html>Not found</html>", "text/html"),
    "/gigabyte": lambda handler: send_without_end(handler, 10**9, 0),
    "/stalls": lambda handler: time.sleep(60),
    "/drips": lambda handler: send_without_end(handler, 10**8, 0.3),
    "/drips-headers": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\n", b"X-Header: 1\r\n"),
    "/continues": lambda handler: drip(handler, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "/drips-sizes": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "/odd-length": lambda handler: send(handler, bytes(4_000_000), length="\xb2"),
    "/gzip": lambda handler: send(handler, gzip.compress(png(1)), encoding="gzip"),
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
