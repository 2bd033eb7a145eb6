"""A local OAuth provider for the demo. It rotates refresh tokens, and refuses some of them as invalid."""

import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

TOKEN_LIFESPAN = 60
"""In seconds; short, so that the demo shows renewals soon."""


class LocalProvider(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1. `good` are the valid refresh tokens."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _TokenEndpoint)
        self.good: set[str] = set()
        # Held by a request's thread while it changes `good`: every request has a thread of its own.
        self._lock = threading.Lock()

    @property
    def token_url(self) -> str:
        """The URL of the token endpoint."""
        return f"http://127.0.0.1:{self.server_port}/token"

    def hand_out(self) -> str:
        """Return a new refresh token, as a login does."""
        token = secrets.token_urlsafe()
        with self._lock:
            self.good.add(token)
        return token

    def spend(self, token: str) -> bool:
        """Return whether a refresh token was valid; after this it is not valid any more."""
        with self._lock:
            was_good = token in self.good
            self.good.discard(token)
            return was_good


class _TokenEndpoint(BaseHTTPRequestHandler):
    server: LocalProvider
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        if not self.server.spend(form.get("refresh_token", [""])[0]):
            self._answer(400, {"error": "invalid_grant", "error_description": "consent was taken back"})
            return
        token = {"access_token": secrets.token_urlsafe(), "refresh_token": self.server.hand_out()}
        self._answer(200, {**token, "token_type": "Bearer", "expires_in": TOKEN_LIFESPAN})

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, because the demo shows the daemon's log."""

    def _answer(self, status: int, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def local_provider() -> Iterator[LocalProvider]:
    """Yield a provider that runs in a thread, and stop it at the end."""
    with LocalProvider() as provider:
        threading.Thread(target=provider.serve_forever, name="demo-provider", daemon=True).start()
        try:
            yield provider
        finally:
            provider.shutdown()
