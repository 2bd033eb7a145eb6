"""Tell systemd the state of the service, by the protocol of sd_notify(3)."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta

_SEND_TIMEOUT_SECONDS = 1


class Notifier:
    """Sends the service's state to systemd. Does nothing without systemd, and never raises.

    All methods may be called from any thread. `watchdog` is how often systemd expects `alive`; None if never.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A name that begins with @ is in the abstract namespace, where the kernel wants a zero byte instead of it.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = _watchdog(environ) if address else None

    def ready(self, status: str) -> None:
        """Say that the start, or a reload, is complete."""
        self._send("READY=1", _status(status))

    def reloading(self) -> None:
        """Say that a reload has begun; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """Say that the service is stopping."""
        self._send("STOPPING=1", _status(status))

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(_status(text))

    def alive(self) -> None:
        """Reset the watchdog's timer, if there is one."""
        if self.watchdog:
            self._send("WATCHDOG=1")

    def extend_timeout(self, duration: timedelta) -> None:
        """Ask systemd to allow this much time from now for the start or stop under way."""
        self._send(f"EXTEND_TIMEOUT_USEC={duration // timedelta(microseconds=1)}")

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        # The timeout keeps a manager that doesn't read its socket from delaying the schedule.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(_SEND_TIMEOUT_SECONDS)
            # An unconnected socket always counts as writable: sendto() would spend the timeout's time trying.
            sender.connect(self._address)
            sender.send("\n".join(assignments).encode("utf-8", "replace"))


def _status(text: str) -> str:
    """Return the assignment of a status in one line, because a newline would begin another assignment."""
    return "STATUS=" + " ".join(text.split())


def _watchdog(environ: Mapping[str, str]) -> timedelta | None:
    """Return the watchdog's timeout if it watches this process."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return timedelta(microseconds=int(environ.get("WATCHDOG_USEC", ""))) or None
    except (OverflowError, ValueError):
        return None
