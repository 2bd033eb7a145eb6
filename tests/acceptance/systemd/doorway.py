"""A TCP port in front of the tests' PostgreSQL, which has but a socket of its own: open and shut at will."""

import contextlib
import select
import socket
import threading
from collections.abc import Callable

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Doorway:
    def __init__(self, conninfo: str) -> None:
        self._parts = conninfo_to_dict(conninfo)
        self._socket = f"{self._parts['host']}/.s.PGSQL.{self._parts.get('port', 5432)}"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self._listener: socket.socket | None = None
        self._clients: set[socket.socket] = set()

    def url(self, database: str) -> str:
        """An address with a password, which nobody asks for, and which must appear nowhere."""
        user = self._parts["user"]
        return f"postgresql://{user}:hunter2@127.0.0.1:{self.port}/{database}"

    def open(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._in_thread(self._welcome, self._listener)

    def shut(self) -> None:
        """Refuse new connections and cut off those that there are."""
        listener, self._listener = self._listener, None
        for end in [*([listener] if listener else []), *self._clients]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # whoever reads from it wakes up, and closes it

    def _welcome(self, listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._in_thread(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        self._clients.add(client)
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(self._socket)
            other = {client: server, server: client}
            while True:
                for end in select.select(list(other), [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        self._clients.discard(client)
                        return
                    other[end].sendall(data)

    @staticmethod
    def _in_thread(target: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()


def database_of(conninfo: str) -> str:
    return str(conninfo_to_dict(make_conninfo(conninfo))["dbname"])
