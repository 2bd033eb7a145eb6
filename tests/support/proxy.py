"""A TCP proxy before PostgreSQL's Unix socket: it can fall silent, close connections and come to mean another one."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo


def _socket_of(conninfo: str) -> str:
    given = conninfo_to_dict(conninfo)
    return str(Path(str(given["host"]), f".s.PGSQL.{given['port']}"))


class Proxy:
    """Listens on a port of its own from the beginning of a `with` block to its end."""

    def __init__(self, conninfo: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self._conninfo = conninfo
        self._target = _socket_of(conninfo)
        self._listening = socket.create_server((host, port))
        self.host, self.port = self._listening.getsockname()[:2]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._flows = threading.Event()
        self._flows.set()
        self._closed = False
        self.change: Callable[[bytes], bytes] = lambda answer: answer
        """Changes what the server says."""

    @property
    def conninfo(self) -> str:
        """The server's address by way of this proxy."""
        return make_conninfo(self._conninfo, host=self.host, port=self.port, gssencmode="disable", sslmode="disable")

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
        self._flows.set()
        self.close_all()

    def fall_silent(self) -> None:
        """Take everything and pass nothing on: the other side acknowledges, and never answers."""
        self._flows.clear()

    def speak(self) -> None:
        """Pass on what was held back, and everything from now on."""
        self._flows.set()

    def mean(self, conninfo: str) -> None:
        """Take new connections to another server. Those that are open stay where they are."""
        self._target = _socket_of(conninfo)

    def close_all(self) -> None:
        """Close every connection, as a proxy does that has an idle limit."""
        for each in [side for pair in self._pairs for side in pair]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while not self._closed:
                client, _ = self._listening.accept()
                server = socket.socket(socket.AF_UNIX)
                try:
                    server.connect(self._target)
                except OSError:
                    client.close()
                    server.close()
                    continue
                self._pairs.append((client, server))
                threading.Thread(target=self._carry, args=[client, server, False], daemon=True).start()
                threading.Thread(target=self._carry, args=[server, client, True], daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                sink.sendall(self.change(data) if is_answer else data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        if is_answer:
            source.close()
            sink.close()
