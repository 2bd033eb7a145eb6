"""Signs of life for services that notice when a job stays away, in the convention of Healthchecks."""

import queue
import threading
from typing import Literal

from pydantic import SecretStr

from catfeeder_cron.logs import get_logger

log = get_logger(__name__)

Signal = Literal["start", "success", "fail"]

_TIMEOUT_SECONDS = 10
_MOST_WAITING = 1000
_LONGEST_TEXT = 10_000


class Pings:
    """Sends in a thread of its own, in order; a ping that can't be sent is logged and delays nobody.

    The address of a check is its secret, so it is never told.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[str, SecretStr, Signal, str] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def send(self, job_id: str, url: SecretStr | None, signal: Signal, text: str = "") -> None:
        """Have a ping sent, if the job has an address for it. Returns at once."""
        if url is None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pings", daemon=True)
                self._thread.start()
        try:
            self._waiting.put_nowait((job_id, url, signal, text))
        except queue.Full:
            log.warning("ping_not_sent", job=job_id, signal=signal, reason="too many are waiting")

    def close(self, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        """Send what is waiting, at most for this long."""
        if self._thread is not None:
            try:
                self._waiting.put(None, timeout=timeout_seconds)
            except queue.Full:
                return
            self._thread.join(timeout_seconds)

    def _work(self) -> None:
        import httpx

        with httpx.Client(timeout=_TIMEOUT_SECONDS) as client:
            while (ping := self._waiting.get()) is not None:
                job_id, url, signal, text = ping
                try:
                    address = httpx.URL(url.get_secret_value())
                    if signal != "success":
                        address = address.copy_with(path=f"{address.path.rstrip('/')}/{signal}")
                    answer = client.post(address, content=text[:_LONGEST_TEXT].encode())
                    if not answer.is_success:
                        log.warning("ping_refused", job=job_id, signal=signal, status=answer.status_code)
                except Exception as error:  # noqa: BLE001 - whatever it is, the job's run is worth more
                    log.warning("ping_not_sent", job=job_id, signal=signal, reason=type(error).__name__)
