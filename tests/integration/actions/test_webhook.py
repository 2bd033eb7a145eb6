"""Webhooks against a real HTTP server that answers, refuses, resets, stalls and redirects."""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from catfeeder_cron.actions.action import Action
from catfeeder_cron.actions.webhook import open_webhooks
from catfeeder_cron.config import ActionsSettings
from catfeeder_cron.errors import HopelessAction, PostponedAction
from catfeeder_cron.job import JobContext
from tests.integration.actions.conftest import Actions, Run


@dataclass
class Received:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """Answers each path in its own way, and remembers what it was asked."""

    origin: str
    received: list[Received] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.origin.rpartition(":")[2])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:  # noqa: C901 - a list of ways to answer
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.remembered.append(Received(self.command, self.path, headers, body))
        match self.path.strip("/").split("/")[-1].partition("?")[0]:
            case "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True
            case "stall":
                self.server.ended.wait()
            case "drip":
                while not self.server.ended.wait(0.1):
                    try:
                        self.wfile.write(b"H")
                    except OSError:
                        return
            case "flood":
                self.send_response(500)
                self.send_header("content-length", str(10**12))
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(b"x" * 65536)
                except OSError:
                    self.close_connection = True
            case "garbage":
                self.wfile.write(b"\x00\xff what?\r\n\r\n")
                self.close_connection = True
            case "redirect":
                self._answer(302, {"location": f"{self.server.origin}/hooks/200"})
            case "later":
                self._answer(429, {"retry-after": "1800"})
            case "echo":
                self._answer(400, {}, json.dumps(headers).encode() + self.path.encode())
            case status:
                self._answer(int(status), {})

    do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815 - the names are BaseHTTPRequestHandler's

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def http() -> Iterator[Server]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.origin = f"http://127.0.0.1:{server.server_port}"
    found = Server(server.origin)
    server.remembered, server.ended = found.received, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


Send = Callable[..., str | None]


@pytest.fixture
def send(http: Server) -> Send:
    """Performs one webhook; `path` is below what is allowed unless a whole URL is given."""

    def send(path: str = "200", *, allowed: tuple[str, ...] = (), timeout: float = 10, **more: Any) -> str | None:
        resolve = more.pop("resolve", None)
        url = path if "://" in path else f"{http.origin}/hooks/{path}"
        settings = ActionsSettings.model_validate({"webhook": {"allowed": (f"{http.origin}/hooks/", *allowed)}})
        action = Action(1, None, None, "webhook", {"url": url, **more}, datetime.now(UTC), 1, "the-key")

        async def perform() -> str | None:
            options = {"resolve": resolve} if resolve else {}
            async with open_webhooks(settings, timeout_seconds=timeout, **options) as webhook:
                return await webhook(action)

        return asyncio.run(perform())

    return send


def test_it_sends_what_the_payload_says(http: Server, send: Send) -> None:
    assert send("200?x=1", body={"cat": "Tom"}, headers={"Authorization": "Bearer abc", "X-N": 5}) == "HTTP 200"

    (received,) = http.received
    assert (received.method, received.path) == ("POST", "/hooks/200?x=1")
    assert json.loads(received.body) == {"cat": "Tom"}
    assert received.headers["idempotency-key"] == "the-key"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["authorization"] == "Bearer abc"
    assert received.headers["x-n"] == "5"
    assert received.headers["host"] == f"127.0.0.1:{http.port}"
    assert received.headers["user-agent"].startswith("catfeeder-cron/")


def test_the_method_may_be_another_one(http: Server, send: Send) -> None:
    send(method="put", body=0)
    send(method="GET")

    assert [(each.method, each.body) for each in http.received] == [("PUT", b"0"), ("GET", b"")]


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_2xx_is_done(send: Send, status: int) -> None:
    assert send(f"{status}") == f"HTTP {status}"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_these_answers_are_tried_again(send: Send, status: int) -> None:
    with pytest.raises(PostponedAction, match=f"HTTP {status}"):
        send(f"{status}")


@pytest.mark.parametrize("status", [300, 400, 401, 403, 404, 409, 410, 422])
def test_other_answers_are_hopeless(send: Send, status: int) -> None:
    with pytest.raises(HopelessAction, match=f"HTTP {status}"):
        send(f"{status}")


def test_retry_after_is_heeded(send: Send) -> None:
    with pytest.raises(PostponedAction) as postponed:
        send("later")

    assert postponed.value.after_seconds == 1800


def test_a_redirect_is_not_followed(http: Server, send: Send) -> None:
    with pytest.raises(HopelessAction, match="not followed"):
        send("redirect")

    assert len(http.received) == 1


@pytest.mark.parametrize("path", ["reset", "garbage"])
def test_a_broken_answer_is_tried_again(send: Send, path: str) -> None:
    with pytest.raises(PostponedAction, match="http://127"):
        send(path)


@pytest.mark.parametrize("path", ["stall", "drip"])
def test_a_whole_request_has_its_time(send: Send, path: str) -> None:
    with pytest.raises(PostponedAction):
        send(path, timeout=0.5)


def test_of_a_long_answer_little_is_read(send: Send) -> None:
    with pytest.raises(PostponedAction) as postponed:
        send("flood")

    assert len(str(postponed.value)) < 300


def test_a_refused_connection_is_tried_again(send: Send) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(PostponedAction, match="ConnectError"):
            send(url, allowed=(url,))


def test_an_answer_that_echoes_tells_no_secret(send: Send) -> None:
    with pytest.raises(HopelessAction) as refused:
        send(
            "very-secret-path/echo?key=hidden-query",
            headers={"X-Api-Key": "hunter2hunter2", "Authorization": "Basic x5ecret"},
        )

    for secret in ("hunter2", "x5ecret", "very-secret-path", "hidden-query"):
        assert secret not in str(refused.value)


@pytest.mark.parametrize(
    "payload",
    [
        {"method": "CONNECT"},
        {"method": 5},
        {"headers": ["a"]},
        {"headers": {"Host": "internal"}},
        {"headers": {"Transfer-Encoding": "chunked"}},
        {"headers": {"X": "a\r\nHost: internal"}},
        {"headers": {"bad name": "x"}},
        {"headers": {"X": None}},
        {"headers": {"": "x"}},
    ],
)
def test_what_can_not_be_sent_is_hopeless(http: Server, send: Send, payload: dict[str, Any]) -> None:
    with pytest.raises(HopelessAction):
        send(**payload)

    assert http.received == []


@pytest.mark.parametrize("host", ["localhost", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]", "2130706433"])
def test_a_private_address_is_reached_only_where_it_is_listed_literally(http: Server, send: Send, host: str) -> None:
    url = f"http://{host}:{http.port}/hooks/200"
    listed = () if host.startswith("[") else (url,)

    with pytest.raises(HopelessAction):
        send(url, allowed=listed)

    assert http.received == []


class Rebinding:
    """A name server that gives another address at each look-up."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def __call__(self, _host: str, _port: int) -> list[str]:
        self.asked += 1
        return self._answers.pop(0)


def test_a_name_that_leads_to_a_forbidden_address_at_the_second_look_up(http: Server, send: Send) -> None:
    url = f"http://rebind.example:{http.port}/hooks/200"
    # 203.0.113.0/24 is not public; this one is, and nothing answers there within the time.
    names = Rebinding(["192.88.99.1"], ["127.0.0.1"])

    with pytest.raises(PostponedAction):
        send(url, allowed=(url,), resolve=names, timeout=0.5)
    assert names.asked == 1, "the address that was checked is the one that is connected to"
    with pytest.raises(HopelessAction, match="not public"):
        send(url, allowed=(url,), resolve=names)

    assert http.received == []


def test_of_several_addresses_the_forbidden_ones_are_passed_over(http: Server, send: Send) -> None:
    url = f"http://mixed.example:{http.port}/hooks/200"

    with pytest.raises(PostponedAction):
        send(url, allowed=(url,), resolve=Rebinding(["127.0.0.1", "192.88.99.1", "::1"]), timeout=0.5)

    assert http.received == []


def test_a_proxy_from_the_environment_is_no_way_around(
    http: Server, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, http.origin)
    with pytest.raises(HopelessAction):
        send("http://localhost/", allowed=("http://localhost/",))
    assert http.received == []


def test_every_attempt_of_an_action_has_one_key(
    actions: Actions, run: Run, context: Callable[..., JobContext], http: Server
) -> None:
    ids = [actions.add("webhook", {"url": f"{http.origin}/hooks/503"}, max_attempts=2) for _ in range(2)]
    for _ in range(2):
        run(context(allowed=(f"{http.origin}/hooks/",)))
        actions.admin.execute('UPDATE "Actions" SET due_at = now()')

    keys = [each.headers["idempotency-key"] for each in http.received]
    assert (len(keys), len(set(keys))) == (4, 2)
    assert [actions.get(each, "state, last_error") for each in ids] == [("failed", "HTTP 503")] * 2
