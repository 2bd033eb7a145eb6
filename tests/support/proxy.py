"""A TCP proxy before PostgreSQL: it can fall silent, close or refuse connections, and come to mean another server."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Proxy:
    """Listens on a port of its own from the beginning of a `with` block to its end.

    Each connection has two threads, one for each direction.
    """

    def __init__(self, conninfo: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self._conninfo = self._target = conninfo
        self._listening = socket.create_server((host, port))
        self.host, self.port = self._listening.getsockname()[:2]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._requests, self._answers = threading.Event(), threading.Event()
        self._closed = False
        self.change: Callable[[bytes], bytes] = lambda answer: answer
        """Changes what the server says."""
        self.heal()

    @property
    def conninfo(self) -> str:
        """The server's address by way of this proxy."""
        return make_conninfo(
            self._conninfo, host=self.host, hostaddr=None, port=self.port, gssencmode="disable", sslmode="disable"
        )

    @property
    def connections(self) -> int:
        """How many connections were ever made."""
        return len(self._pairs)

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.heal()
        self.close_all()

    def silence(self, *, requests: bool = True, answers: bool = True) -> None:
        """Take everything and pass nothing on: of what the client sends, of what the server does, or both.

        The other side's kernel acknowledges. The end of a connection is held back as well.
        """
        if requests:
            self._requests.clear()
        if answers:
            self._answers.clear()

    def refuse(self) -> None:
        """Break every connection, and each new one at once."""
        self._refuses = True
        self.close_all()

    def heal(self) -> None:
        """Pass on what was held back, and everything from now on; refuse nobody."""
        self._refuses = False
        self._requests.set()
        self._answers.set()

    def mean(self, conninfo: str) -> None:
        """Take new connections to another server. Those that are open stay where they are."""
        self._target = conninfo

    def close_all(self) -> None:
        """Close every connection, as a proxy does that has an idle limit."""
        for each in [side for pair in self._pairs for side in pair]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while not self._closed:
                client, _ = self._listening.accept()
                if self._refuses:
                    client.close()
                    continue
                try:
                    server = _connected(self._target)
                except OSError:
                    client.close()
                    continue
                self._pairs.append((client, server))
                threading.Thread(target=self._carry, args=[client, server, False], daemon=True).start()
                threading.Thread(target=self._carry, args=[server, client, True], daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        flows = self._answers if is_answer else self._requests
        with suppress(OSError):
            while True:
                data = source.recv(65536)
                flows.wait()
                if not data:
                    break
                sink.sendall(self.change(data) if is_answer else data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        if is_answer:
            source.close()
            sink.close()


def _connected(conninfo: str) -> socket.socket:
    given = conninfo_to_dict(conninfo)
    host, port = str(given["host"]), int(given.get("port") or 5432)
    if not host.startswith("/"):
        return socket.create_connection((host, port))
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(f"{host}/.s.PGSQL.{port}")
    except OSError:
        server.close()
        raise
    return server
