"""A TCP proxy whose outage is that of the server behind it, which goes on running."""

import contextlib
import socket
import threading
import time
from typing import Self


class TcpProxy:
    """Passes on what goes to 127.0.0.1:`port` to a server's port, between `start` and `stop`. A context manager.

    What the server answers comes `delay_seconds` later.
    """

    def __init__(self, server_port: int, delay_seconds: float = 0) -> None:
        self.port = 0
        self._server_port, self._delay_seconds = server_port, delay_seconds

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens, after an outage on the same port as before."""
        listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = listener.getsockname()[1]
        self._sockets = [listener]
        self._thread = threading.Thread(target=self._accept, args=[listener], daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends all connections and refuses new ones, as if the server was killed."""
        _end(self._sockets[0])
        self._thread.join()
        for connection in self._sockets:
            _end(connection)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the proxy is stopped
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets += [client, server]
                for pair in ((client, server, 0), (server, client, self._delay_seconds)):
                    threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, delay_seconds: float) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            time.sleep(delay_seconds)
            target.sendall(content)
    _end(target)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # which wakes a thread that waits for it
    connection.close()
