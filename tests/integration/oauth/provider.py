"""A provider of our own: a strict one by default (a refresh token serves once, its second use revokes the link), or as
faulty as a test asks for. It keeps its own records, and those decide what happened.
"""

import asyncio
import contextlib
import itertools
import json
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import parse_qsl

from tests.support.waiting import SOON


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    form: dict[str, str]


@dataclass(frozen=True)
class Raw:
    """Bytes as they go over the wire; then the connection ends, at once with a reset, or not at all."""

    data: bytes = b""
    reset: bool = False
    hang: bool = False


Reply = Raw | Awaitable[Raw]
Script = Callable[[Request], Reply]


def reply(status: int, body: object = b"", headers: dict[str, str] | None = None) -> Raw:
    """A complete response; a body that is not bytes goes as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "content-type": "text/plain" if isinstance(body, bytes) else "application/json",
        "content-length": str(len(data)),
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return Raw(f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + data)


@dataclass
class Provider:
    """Knows its users' refresh tokens. Everything it has ever handed out or been told stands in `secrets`."""

    delay: float = 0.0
    script: Script | None = None
    expires_in: int = 3600
    requests: list[Request] = field(default_factory=list)
    renewals: Counter[str] = field(default_factory=Counter)
    reused: list[str] = field(default_factory=list)
    live: dict[str, str] = field(default_factory=dict)
    """The user of every refresh token that is good for something."""
    access_tokens: dict[str, str] = field(default_factory=dict)
    secrets: set[str] = field(default_factory=set)
    under_way: int = 0
    most_under_way: int = 0
    port: int = 0
    _spent: dict[str, str] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/token"

    def log_in(self, user: str) -> str:
        """Return the refresh token of a new link."""
        return self._hand_out(user)

    def renew(self, request: Request) -> Raw:
        """What a strict server does."""
        sent = request.form.get("refresh_token", "")
        self.secrets.add(sent)
        if sent in self._spent:
            user = self._spent[sent]
            self.reused.append(user)
            for token in [token for token, its in self.live.items() if its == user]:
                del self.live[token]
            return reply(400, {"error": "invalid_grant", "error_description": "reuse detected"})
        user = self.live.pop(sent, "")
        if not user:
            return reply(400, {"error": "invalid_grant", "error_description": "no such token"})
        self._spent[sent] = user
        self.renewals[user] += 1
        access = f"access-{user}-{next(self._numbers)}-0123456789abcdef"
        self.access_tokens[user] = access
        self.secrets.add(access)
        refresh = self._hand_out(user)
        return reply(200, {"access_token": access, "refresh_token": refresh, "expires_in": self.expires_in})

    def _hand_out(self, user: str) -> str:
        token = f"refresh-{user}-{next(self._numbers)}-fedcba9876543210"
        self.live[token] = user
        self.secrets.add(token)
        return token

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    request = await _read(reader)
                    self.requests.append(request)
                    self.under_way += 1
                    self.most_under_way = max(self.most_under_way, self.under_way)
                    try:
                        if self.delay:
                            await asyncio.sleep(self.delay)
                        raw = (self.script or self.renew)(request)
                        answer = raw if isinstance(raw, Raw) else await raw
                    finally:
                        self.under_way -= 1
                    if answer.reset:
                        raw_socket = writer.get_extra_info("socket")
                        raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        break
                    writer.write(answer.data)
                    await writer.drain()
                    if answer.hang:
                        await reader.read()
                        break
                    if b"content-length" not in answer.data.lower() or b"connection: close" in answer.data.lower():
                        break
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(first.split()[1], headers, dict(parse_qsl(body.decode())))


@contextlib.contextmanager
def running(provider: Provider) -> Iterator[Provider]:
    """RenewalRun the provider on a loopback port, in a thread of its own."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        server = await asyncio.start_server(provider.serve, "127.0.0.1", 0, backlog=512)
        provider.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stopped.wait()
        server.close()
        others = asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.01)  # for the transports to close

    stopped = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(SOON)
    try:
        yield provider
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(SOON)
        loop.close()
