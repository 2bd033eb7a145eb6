"""A fleet of real daemons on one database, and the audit of their ledger."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

JOB = "test-hello-world"
SECOND = timedelta(seconds=1)

CONFIG = """
[database]
url = "{url}"
connect_timeout = 5

[scheduler]
shutdown_grace = 10

[logging]
format = "json"

[jobs.test-hello-world]
enabled = true
interval = {interval}

[jobs.clean-tokens]
enabled = false

[jobs.clean-verification]
enabled = false

[jobs.renew-oauth]
enabled = false
"""


class Fleet:
    """Daemons with one job, numbered in the order of their start. Their logs can be compared with the ledger."""

    def __init__(self, url: str, folder: Path, interval: int = 1) -> None:
        self._folder = folder
        self._config = folder / "config.toml"
        self._config.write_text(CONFIG.format(url=url, interval=interval))
        self._config.chmod(0o600)
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self, number: int = 1) -> None:
        for _ in range(number):
            with self._log(len(self.daemons)).open("wb") as file:
                command = [sys.executable, "-m", "catfeeder_cron", "--config", str(self._config), "start"]
                self.daemons.append(subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True))

    def kill(self, number: int) -> None:
        self.daemons[number].kill()
        self.daemons[number].wait()

    def freeze(self, number: int) -> None:
        self.daemons[number].send_signal(signal.SIGSTOP)

    def wake(self, number: int) -> None:
        self.daemons[number].send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End all that live, and insist on their exit status."""
        living = [daemon for daemon in self.daemons if daemon.poll() is None]
        for number, daemon in enumerate(self.daemons):
            while daemon in living and b"daemon_started" not in self._log(number).read_bytes():
                time.sleep(0.05)  # before that a signal ends it as it ends any program
            daemon.terminate()
        assert [daemon.wait(timeout=30) for daemon in living] == [0] * len(living), self.log()

    def end(self) -> None:
        for daemon in self.daemons:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()

    def runs_logged(self) -> Counter[int]:
        """Count how often the job said hello, by run."""
        return Counter(event["run_id"] for event in self.events() if event.get("event") == "hello_world")

    def events(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self.daemons)):
            for line in self._log(number).read_text().splitlines():
                if line.startswith("{") and line.endswith("}"):  # a killed process may leave half a line
                    yield json.loads(line)

    def log(self) -> str:
        return "\n".join(self._log(number).read_text()[-2000:] for number in range(len(self.daemons)))

    def _log(self, number: int) -> Path:
        return self._folder / f"daemon-{number}.log"


class Audit:
    """What the ledger says of every slot of a job."""

    def __init__(self, url: str, interval: timedelta = SECOND, job: str = JOB) -> None:
        with psycopg.connect(url) as connection:
            rows = connection.execute(
                "SELECT run_id, slot, last_slot, missed, trigger, outcome, reason FROM catfeeder_cron.job_runs "
                "WHERE job = %s ORDER BY slot, run_id",
                [job],
            ).fetchall()
            account = connection.execute(
                "SELECT accounted_until FROM catfeeder_cron.schedule WHERE job = %s", [job]
            ).fetchone()
        assert account is not None
        self._rows = rows
        self.accounted_until: datetime = account[0]
        self.runs: dict[int, datetime | None] = {}
        self.outcomes: Counter[str] = Counter()
        self.triggers: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.slots: Counter[datetime] = Counter()
        self.stretches: list[tuple[datetime, datetime, str]] = []
        for run_id, slot, last_slot, missed, trigger, outcome, reason in rows:
            if missed is None:
                self.runs[run_id] = slot
                self.slots.update([slot] if slot else [])
                self.outcomes[outcome] += 1
                self.triggers[trigger] += 1
                continue
            assert last_slot == slot + (missed - 1) * interval, "a stretch counts the slots that it spans"
            self.reasons[reason] += missed
            self.stretches.append((slot, last_slot, reason))
            self.slots.update(slot + number * interval for number in range(missed))
        self.interval = interval

    def require_no_slot_without_row(self) -> set[datetime]:
        """Return the slots from the first row to the account."""
        assert self.slots, "no slot has a row"
        first, interval = min(self.slots), self.interval
        expected = {first + n * interval for n in range(round((self.accounted_until - first) / interval) + 1)}
        without = expected - set(self.slots)
        assert not without, f"{len(without)} slots without a row, up to {max(without)}; {self._around(min(without))}"
        return expected

    def _around(self, slot: datetime) -> str:
        """Say what the ledger has before and after a slot."""
        before = [row for row in self._rows if row[1] and row[1] < slot][-2:]
        after = [row for row in self._rows if row[1] and row[1] > slot][:3]
        return f"at {slot:%H:%M:%S.%f} between " + " and ".join(
            "; ".join(
                f"{run_id} {first:%H:%M:%S} {missed or ''} {' '.join(map(str, rest))}"
                for run_id, first, _, missed, *rest in rows
            )
            for rows in (before, after)
        )

    def require_every_slot_once(self) -> None:
        expected, last = self.require_no_slot_without_row(), max(self.slots)
        assert last == self.accounted_until, f"the last row is {last}, the account {self.accounted_until}"
        assert set(self.slots) == expected
        twice = [slot for slot, rows in self.slots.items() if rows > 1]
        assert not twice, f"{len(twice)} slots with several rows, from {min(twice)} to {max(twice)}"
        for (_, end, reason), (start, _, following) in zip(self.stretches, self.stretches[1:], strict=False):
            assert end + self.interval != start or reason != following, "one stretch for each reason"

    def require_agreement(self, fleet: Fleet) -> None:
        """No run took place twice, nor without its row; and what is said to have succeeded did."""
        logged = fleet.runs_logged()
        assert max(logged.values()) == 1
        assert set(logged) <= set(self.runs)
        assert self.outcomes["succeeded"] <= len(logged)
        assert None not in self.outcomes, "no run is left open"
