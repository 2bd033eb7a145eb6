"""An action is never at work when another daemon may have claimed it, however the database was cut off."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from catfeeder_cron.actions.due.fence import Fence
from catfeeder_cron.database import Database
from catfeeder_cron.errors import PostponedAction
from catfeeder_cron.job import JobContext
from catfeeder_cron.times import elapsed_seconds
from tests.integration.actions.conftest import HERE, Actions, Run
from tests.integration.actions.test_check_actions import in_background
from tests.support.program import Program
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

LEASE_SECONDS = 12.0
NOT_EXTENDED = "its lease could not be extended in time"


@pytest.fixture
def proxy(database_url: str) -> Iterator[Proxy]:
    with Proxy(database_url) as proxy:
        yield proxy


class Listener:
    """Takes requests and never answers; knows when the client closed each."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.origin = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.taken: list[float] = []
        self.closed: list[float] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._hold, args=[self._socket.accept()[0]], daemon=True).start()

    def _hold(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            self.taken.append(time.time())
            while connection.recv(65536):
                pass
        self.closed.append(time.time())


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def lease_until(admin: psycopg.Connection) -> float:
    row = admin.execute("""SELECT extract(epoch FROM min(lease_until))::float8 FROM "Actions" """).fetchone()
    assert row is not None
    return float(row[0])


@pytest.mark.parametrize("cut", [{}, {"requests": False}, {"answers": False}], ids=["both ways", "answers", "requests"])
def test_cut_off_it_ends_every_handler_before_the_lease_does(
    actions: Actions,
    run: Run,
    context: Callable[..., JobContext],
    open_database: Callable[..., Database],
    proxy: Proxy,
    listener: Listener,
    tmp_path: Path,
    cut: dict[str, bool],
) -> None:
    beats = {kind: tmp_path / kind for kind in ("beat", "beat_until_stopped")}
    ids = {kind: actions.add(kind, {"beats": str(file)}) for kind, file in beats.items()}
    ids["webhook"] = actions.add("webhook", {"url": f"{listener.origin}/hook"})
    given = context(allowed=(listener.origin,), database=open_database(proxy.conninfo))
    thread, _ = in_background(run, given, lease=LEASE_SECONDS, action_timeout=200, retry_after=3600)
    eventually(lambda: listener.taken and all(file.exists() and file.read_text() for file in beats.values()))

    proxy.silence(**cut)
    # If an extension gets through without its answer, the lease ends later than this process may rely on.
    ends = lease_until(actions.admin)
    eventually(lambda: time.time() > ends + 1)
    proxy.heal()
    thread.join()

    assert len(listener.closed) == 1
    assert listener.closed[0] < ends
    for file in beats.values():
        assert float(file.read_text().split()[-1]) < ends
    logged = {kind: actions.log(id)[0] for kind, id in ids.items()}
    assert logged["webhook"] == (1, "retried", NOT_EXTENDED)
    assert logged["beat_until_stopped"] == (1, "retried", f"{NOT_EXTENDED}: it was asked to stop")
    assert logged["beat"][:2] == (1, "retried")


CONFIG = f"""
[scheduler]
shutdown_grace = 10

[actions.beat]
call = "handlers:beat"

[jobs.check-actions]
lease = {LEASE_SECONDS}
action_timeout = 200
retry_after = 3600
"""


def test_a_frozen_daemon_leaves_no_handler_at_work_and_says_so_when_it_goes_on(
    actions: Actions, program: Program, database_url: str, tmp_path: Path
) -> None:
    action = actions.add("beat", {"beats": str(tmp_path / "beats")})
    program.configure(database_url, CONFIG)
    daemon = program.start("start", variables={"PYTHONPATH": str(HERE)})
    eventually((tmp_path / "beats").exists)

    daemon.signal(signal.SIGSTOP)
    ends = lease_until(actions.admin)
    eventually(lambda: time.time() > ends + 1)
    beats = (tmp_path / "beats").read_text().split()
    daemon.signal(signal.SIGCONT)
    killed = "its process was still at work at its deadline, and was killed"
    eventually(lambda: actions.log(action) == [(1, "retried", killed)])
    daemon.stop()

    assert float(beats[-1]) < ends
    assert (tmp_path / "beats").read_text().split() == beats


def test_woken_after_its_lease_a_built_in_handler_takes_no_further_step() -> None:
    """A frozen process that goes on finds its sockets ready before its timers."""
    steps: list[str] = []

    async def scenario() -> None:
        loop, connected = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        fence = Fence(lease_seconds=0.6, lease_ends=elapsed_seconds() + 0.6)

        async def handler() -> None:
            try:
                await connected
                steps.append("sent")
            finally:
                await asyncio.sleep(0)
                steps.append("closed")

        def freeze() -> None:
            time.sleep(1)
            connected.set_result(None)

        loop.call_soon(freeze)
        with pytest.raises(PostponedAction, match=NOT_EXTENDED):
            await fence.perform(handler)

    asyncio.run(scenario())
    assert steps == ["closed"]


def test_an_extended_lease_lets_a_built_in_handler_go_on() -> None:
    async def scenario() -> str:
        fence = Fence(lease_seconds=0.3, lease_ends=elapsed_seconds() + 0.3)

        async def handler() -> str:
            fence.extend(elapsed_seconds() + 1000)
            await asyncio.sleep(0.4)
            return "done"

        return await fence.perform(handler)

    assert asyncio.run(scenario()) == "done"
