"""Signs of life for services that notice when a job stays away, in the convention of Healthchecks.

urllib instead of httpx: this is one request without an answer that matters, and httpx logs the address of each.
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
# All printable characters of ASCII but space: what is quoted already stays as it is.
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


class Pings(RunListener):
    """Sends in order, with a thread for each job; a ping that can't be sent is logged and delays nobody.

    The address of a check is its secret, so it is never told.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()

    def began(self, run: Run, /) -> None:
        self._send(run, "start")

    def ended(self, run: Run, report: JobReport, /) -> None:
        self._send(run, "success" if report.outcome in ("succeeded", "skipped") else "fail", report.reason or "")

    def _send(self, run: Run, signal: Signal, text: str = "") -> None:
        """Have a ping sent, if the job has an address for it. Returns at once."""
        url = run.settings.ping_url
        if url is None:
            return
        try:
            with self._lock:
                line = self._lines.get(run.job_id)
                if line is None:
                    line = self._lines[run.job_id] = _Line(run.job_id)
        except RuntimeError as error:  # there is no thread to be had
            log.warning("ping_not_sent", job=run.job_id, signal=signal, reason=str(error))
        else:
            line.put((url, signal, text))

    def close(self, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        """Send what is waiting, for this long at most."""
        with self._lock:
            lines, self._lines = list(self._lines.values()), {}
        until = time.monotonic() + timeout_seconds
        for line in lines:
            line.end()
        for line in lines:
            line.join(max(0.0, until - time.monotonic()))


class _Line:
    """The pings of one job: a check that hangs holds up no other job's."""

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
            except Exception as error:  # noqa: BLE001 - whatever it is, the job's run is worth more
                log.warning("ping_not_sent", job=self._job_id, signal=signal, reason=_kind(error))


class _NoRedirect(HTTPRedirectHandler):
    """Takes a redirect for a refusal: what it leads to need not be the check."""

    def redirect_request(self, *_: object) -> None:
        return None


def _post(address: str, body: bytes) -> None:
    headers = {"User-Agent": f"catfeeder-cron/{__version__}", "Content-Type": "text/plain; charset=utf-8"}
    request = Request(address, data=body, headers=headers)  # noqa: S310 - the configuration takes http and https alone
    with build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_SECONDS):
        pass


def _address(url: str, signal: Signal) -> str:
    """Return where a signal goes: for start and failure a path below the check's, before its query."""
    parts = urlsplit(quote(url, safe=_PRINTABLE))
    path = parts.path if signal == "success" else f"{parts.path.rstrip('/')}/{signal}"
    return urlunsplit(parts._replace(path=path, fragment=""))


def _kind(error: Exception) -> str:
    """Say what kind of error it is: its text may hold the address."""
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    return type(cause).__name__
