"""sd_notify: what systemd hears, on both kinds of socket, and that nothing of it can hurt the daemon."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catfeeder_cron.service.sd_notify import Notifier


@pytest.fixture(params=["file", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = f"@catfeeder-cron-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        listener.settimeout(10)
        yield listener, name


@pytest.mark.parametrize(
    ("tell", "heard"),
    [
        (lambda notifier: notifier.ready("2 jobs"), ["READY=1", "STATUS=2 jobs"]),
        (lambda notifier: notifier.status("läuft 🐈"), ["STATUS=läuft 🐈"]),
        (lambda notifier: notifier.stopping("stopping"), ["STOPPING=1", "STATUS=stopping"]),
        (lambda notifier: notifier.alive(), ["WATCHDOG=1"]),
        (lambda notifier: notifier.extend_timeout(timedelta(seconds=1.5)), ["EXTEND_TIMEOUT_USEC=1500000"]),
        (lambda notifier: notifier.status("a\nSTOPPING=1\r\nb"), ["STATUS=a STOPPING=1 b"]),
    ],
)
def test_systemd_hears_it(
    listening: tuple[socket.socket, str], tell: Callable[[Notifier], None], heard: list[str]
) -> None:
    listener, name = listening
    tell(Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000"}))
    assert listener.recv(4096).decode().split("\n") == heard


def test_a_reload_is_told_with_its_time_so_that_systemd_knows_which_one_is_meant(
    listening: tuple[socket.socket, str],
) -> None:
    listener, name = listening
    before = time.monotonic()
    Notifier({"NOTIFY_SOCKET": name}).reloading()
    reloading, at = listener.recv(4096).decode().split("\n")
    assert reloading == "RELOADING=1"
    assert before <= int(at.removeprefix("MONOTONIC_USEC=")) / 1e6 + 0.001 <= time.monotonic() + 0.001


def everything(notifier: Notifier) -> None:
    notifier.ready("")
    notifier.reloading()
    notifier.status("")
    notifier.alive()
    notifier.extend_timeout(timedelta(seconds=1))
    notifier.stopping("")


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere"}, {"NOTIFY_SOCKET": "@x"}])
def test_nothing_is_told_and_nothing_raised_where_nobody_listens(environ: dict[str, str]) -> None:
    everything(Notifier({**environ, "WATCHDOG_USEC": "1000000"}))


def test_a_manager_that_does_not_read_holds_up_nothing_for_long(listening: tuple[socket.socket, str]) -> None:
    _, name = listening
    notifier = Notifier({"NOTIFY_SOCKET": name})
    longest = 0.0
    for _ in range(1000):
        begun = time.monotonic()
        notifier.status("x" * 1000)
        longest = max(longest, time.monotonic() - begun)
        if longest > 0.5:
            break
    assert longest > 0.5


@pytest.mark.parametrize(
    ("environ", "watchdog"),
    [
        ({"WATCHDOG_USEC": "60000000"}, timedelta(seconds=60)),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, timedelta(seconds=60)),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_when_it_watches_this_process(environ: dict[str, str], watchdog: timedelta | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/nowhere", **environ}).watchdog == watchdog
    assert Notifier(environ).watchdog is None


@given(text=st.text())
def test_a_status_is_one_assignment_whatever_its_text(text: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("")  # the kernel chooses an abstract name
        Notifier({"NOTIFY_SOCKET": "@" + listener.getsockname()[1:].decode()}).status(text)
        assert listener.recv(65536).count(b"\n") == 0
