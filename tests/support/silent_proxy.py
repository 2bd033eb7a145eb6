"""A TCP proxy before the database that can fall silent, as a network does that drops every packet."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class SilentProxy:
    """Forwards connections. What is held back is neither lost nor refused, and goes on with `heal`.

    Each connection has two threads, one for each direction. They stop before they read when their event is cleared.
    """

    def __init__(self, url: str) -> None:
        self._server = conninfo_to_dict(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = make_conninfo(url, host="127.0.0.1", hostaddr=None, port=self._listener.getsockname()[1])
        self._requests, self._answers = threading.Event(), threading.Event()
        self._sockets: list[socket.socket] = []
        self.heal()
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self, *, requests: bool = True, answers: bool = True) -> None:
        """Forward nothing more: of what the client sends, of what the server does, or both."""
        if requests:
            self._requests.clear()
        if answers:
            self._answers.clear()

    def refuse(self) -> None:
        """Break every connection, and each new one at once."""
        self._refuses = True
        self._break_all()

    def heal(self) -> None:
        self._refuses = False
        self._requests.set()
        self._answers.set()

    def close(self) -> None:
        """Break every connection, and take no more."""
        self._listener.close()
        self._break_all()
        self.heal()

    def _break_all(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._refuses:
                    client.close()
                    continue
                server = self._connect()
                self._sockets += [client, server]
                for pump in ((client, server, self._requests), (server, client, self._answers)):
                    threading.Thread(target=_pump, args=pump, daemon=True).start()

    def _connect(self) -> socket.socket:
        host, port = str(self._server["host"]), int(self._server.get("port") or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server


def _pump(source: socket.socket, target: socket.socket, open_: threading.Event) -> None:
    with suppress(OSError):
        while True:
            read = source.recv(65536)
            open_.wait()
            if not read:
                break
            target.sendall(read)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy_to(url: str) -> Iterator[SilentProxy]:
    proxy = SilentProxy(url)
    try:
        yield proxy
    finally:
        proxy.close()
