"""Sends pings to services that notice when a job does not run, by the convention of Healthchecks.

It uses urllib, not httpx: the answer of the one request does not matter, and httpx logs the address of each request.
"""

import queue
import threading
import time
from typing import Literal
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pydantic import SecretStr

from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.listeners import Run, RunListener
from catfeeder_cron.version import __version__

log = get_logger("catfeeder_cron.pings")

Signal = Literal["start", "success", "fail"]

_TIMEOUT_SECONDS = 10
_MOST_WAITING = 100
_LONGEST_TEXT = 10_000
# All printable characters of ASCII but space, so that quoting leaves a quoted address unchanged.
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


class Pings(RunListener):
    """Sends the pings of each job in order, in a thread for each job.

    A ping that can't be sent is logged, and delays no run. The address of a check is a secret, so it is never logged.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _PingQueue] = {}
        # Held by the thread of a run while it finds or makes its job's queue, and by the thread that closes all.
        self._lock = threading.Lock()

    def began(self, run: Run, /) -> None:
        """Send the ping of a start."""
        self._send(run, "start")

    def ended(self, run: Run, report: JobReport, /) -> None:
        """Send the ping of a success or a failure, with the reason."""
        self._send(run, "success" if report.outcome in ("succeeded", "skipped") else "fail", report.reason or "")

    def _send(self, run: Run, signal: Signal, text: str = "") -> None:
        """Queue a ping, if the job has an address for it. Return at once."""
        url = run.settings.ping_url
        if url is None:
            return
        try:
            with self._lock:
                pings = self._queues.get(run.job_id)
                if pings is None:
                    pings = self._queues[run.job_id] = _PingQueue(run.job_id)
        except RuntimeError as error:  # no thread can be started
            log.warning("ping_not_sent", job=run.job_id, signal=signal, reason=str(error))
        else:
            pings.put((url, signal, text))

    def close(self, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        """Send the pings that are waiting, for this long at most."""
        with self._lock:
            queues, self._queues = list(self._queues.values()), {}
        until = time.monotonic() + timeout_seconds
        for pings in queues:
            pings.end()
        for pings in queues:
            pings.join(max(0.0, until - time.monotonic()))


class _PingQueue:
    """The pings of one job, sent by a thread of their own: a check that hangs delays no other job's pings."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._waiting: queue.Queue[tuple[SecretStr, Signal, str] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"pings of {job_id}", daemon=True)
        self._thread.start()

    def put(self, ping: tuple[SecretStr, Signal, str]) -> None:
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put(ping)
        else:
            log.warning("ping_not_sent", job=self._job_id, signal=ping[1], reason="too many are waiting")

    def end(self) -> None:
        self._waiting.put(None)

    def join(self, timeout_seconds: float) -> None:
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            log.warning("ping_not_sent", job=self._job_id, reason="no answer before the end of this process")

    def _work(self) -> None:
        while (ping := self._waiting.get()) is not None:
            url, signal, text = ping
            try:
                _post(_address(url.get_secret_value(), signal), text[:_LONGEST_TEXT].encode(errors="replace"))
            except HTTPError as refusal:
                log.warning("ping_refused", job=self._job_id, signal=signal, status=refusal.code)
                refusal.close()
            except Exception as error:  # noqa: BLE001 - no failure of a ping may harm the job's run
                log.warning("ping_not_sent", job=self._job_id, signal=signal, reason=_kind(error))


class _NoRedirect(HTTPRedirectHandler):
    """Treats a redirect as a refusal: its target need not be the check."""

    def redirect_request(self, *_: object) -> None:
        return None


def _post(address: str, body: bytes) -> None:
    headers = {"User-Agent": f"catfeeder-cron/{__version__}", "Content-Type": "text/plain; charset=utf-8"}
    request = Request(address, data=body, headers=headers)  # noqa: S310 - the configuration takes http and https alone
    with build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_SECONDS):
        pass


def _address(url: str, signal: Signal) -> str:
    """Return the address of a signal: for start and failure a path below the check's, before its query."""
    parts = urlsplit(quote(url, safe=_PRINTABLE))
    path = parts.path if signal == "success" else f"{parts.path.rstrip('/')}/{signal}"
    return urlunsplit(parts._replace(path=path, fragment=""))


def _kind(error: Exception) -> str:
    """Return the name of the error's class: its text may hold the address."""
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    return type(cause).__name__
