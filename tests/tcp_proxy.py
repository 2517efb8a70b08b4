"""A TCP proxy whose outage is that of the server behind it, which goes on running."""

import contextlib
import socket
import socketserver
import threading
import time
from typing import Self


class TcpProxy:
    """Passes on what goes to 127.0.0.1:`port` to a server's port, between `start` and `stop`. A context manager.

    What the server answers comes `delay_seconds` later.
    """

    def __init__(self, server_port: int, delay_seconds: float = 0) -> None:
        self.port = 0
        self._server_port = server_port
        self._delay_seconds = delay_seconds

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens, after an outage on the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.server_port = self._server_port
        self._server.delay_seconds = self._delay_seconds
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()

    def stop(self) -> None:
        """Ends all connections and refuses new ones, as if the server was killed."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections.copy():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    server_port: int
    delay_seconds: float

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.connections: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.connections.add(request)  # whose end, at an outage, ends the one behind it
        super().process_request(request, client_address)


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.server_port)) as upstream:
            delay = self.server.delay_seconds
            thread = threading.Thread(target=_pass_on, args=[upstream, self.request, delay])
            thread.start()
            _pass_on(self.request, upstream)
            thread.join()
        self.server.connections.discard(self.request)


def _pass_on(source: socket.socket, target: socket.socket, delay_seconds: float = 0) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            time.sleep(delay_seconds)
            target.sendall(content)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
