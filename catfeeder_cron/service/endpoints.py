"""Serve a few read-only pages over HTTP, for Prometheus and for health checks.

The server sleeps in the kernel between requests; those of the libraries wake twice a second to see whether to stop.
"""

import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.service")

_CLIENT_TIMEOUT_SECONDS = 10
_ACCEPT_AGAIN_SECONDS = 1


@dataclass(frozen=True)
class Page:
    """The answer to a request."""

    status: int
    content_type: str
    body: bytes


class Endpoints:
    """Serves `pages` (by their paths) on `address`, "host:port", from `open` to `close`.

    Each page's function is called in a thread of its request, so several may run at the same time.
    """

    def __init__(self, address: str, pages: Mapping[str, Callable[[], Page]]) -> None:
        self._address = address
        self._pages = pages
        self._server: _Server | None = None

    def open(self) -> None:
        """Listen, and serve in a thread. Raises OSError if the address can't be used."""
        host, _, port = self._address.rpartition(":")
        family, _, _, _, name = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        self._server = _Server(family, name, self._pages)
        threading.Thread(target=self._server.run, name="endpoints", daemon=True).start()

    @property
    def port(self) -> int:
        """The port that it listens on, also if the system chose it."""
        assert self._server is not None, "it is not open"
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening, without waiting for the requests under way. A second call does nothing."""
        server, self._server = self._server, None
        if server:
            server.end()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    # Not http.server's class, which asks the DNS for the name of its address.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, family: int, name: Any, pages: Mapping[str, Callable[[], Page]]) -> None:
        self.address_family = family
        self.pages = pages
        # Set by the thread that calls `end`; the thread of `run` reads it after each connection, and so leaves.
        self._ending = threading.Event()
        self._refused = False
        super().__init__(name, _Handler)

    def run(self) -> None:
        while not self._ending.is_set():
            self.handle_request()
        self.server_close()

    def end(self) -> None:
        self._ending.set()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes `run`

    def get_request(self) -> tuple[Any, Any]:
        try:
            request = super().get_request()
        except OSError as error:
            # There are no file descriptors left. The connection stays in the queue, so the next wait for one would
            # return at once: pause first.
            if not self._ending.wait(_ACCEPT_AGAIN_SECONDS) and not self._refused:
                self._refused = True
                log.warning("connection_not_accepted", reason=error.strerror or str(error))
            raise
        self._refused = False
        return request

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.debug("request_aborted", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_TIMEOUT_SECONDS
    server_version = "catfeeder-cron"
    sys_version = ""

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            self._answer(Page(404, "text/plain", f"there is {', '.join(self.server.pages)}\n".encode()))
            return
        try:
            answer = page()
        except Exception:
            log.exception("page_failed", path=self.path)
            answer = Page(500, "text/plain", b"it failed; the log says why\n")
        self._answer(answer)

    do_HEAD = do_GET  # noqa: N815 - the names are http.server's

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("request", text=format % args)

    def _answer(self, page: Page) -> None:
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)
