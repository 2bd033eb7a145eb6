"""Daemons that a test starts one by one, each as on a machine of its own: folder, state, clock, network."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.proofs.outages import recorded
from tests.support.program import Program, Running, command

CONFIG = """
[scheduler]
shutdown_grace = 10
max_workers = 8

[logging]
format = "json"

[metrics]
listen = "127.0.0.1:0"

[jobs.clean-tokens]
enabled = false

[jobs.clean-verification]
enabled = false

[jobs.tick]
sql = "SELECT 1"
interval = 1
"""
# What is said of every run that fails or takes long: of a job of two seconds, often.
OF_EACH_RUN = ("job_finished", "job_slow")
NO_RENEWAL = "[jobs.renew-oauth]\nenabled = false\n"
TICK = "tick"


@dataclass
class Daemon:
    """One daemon, over its restarts. Its log is that of all of them."""

    name: str
    program: Program
    prefix: Sequence[str]
    variables: Mapping[str, str]
    jobs: str = ""
    lives: list[Running] = field(default_factory=list)

    def start(self) -> None:
        """Start it, or start it again, and wait until it is at work."""
        self.launch()
        self.lives[-1].wait_for("daemon_started")

    def launch(self) -> None:
        """Start it, or start it again."""
        self.lives.append(self.program.start_command(*self.prefix, *command(), "start", variables=self.variables))

    @property
    def pid(self) -> int:
        return self.lives[-1].pid

    def stop(self) -> int:
        """Ask it to stop and return its exit status."""
        return self.lives[-1].stop().status

    def ready(self) -> str:
        """Return what its /ready says: the troubles that it knows of, a line each."""
        port = self.lives[-1].wait_for("metrics_served")["port"]
        try:
            with urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as answer:
                return str(answer.read().decode())
        except HTTPError as error:
            return error.read().decode()

    def events(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        return [event for life in self.lives for event in life.events(name, **fields)]

    def alarms(self, since: int = 0) -> Counter[str]:
        """Count, by event, what it has said at warning or above, but of single runs and in the first `since` lines."""
        lines = self.log.splitlines()[since:]
        return Counter(
            entry["event"][:90]
            for entry in _entries(lines)
            if entry["level"] in ("warning", "error", "critical") and entry["event"] not in OF_EACH_RUN
        )

    @property
    def log(self) -> str:
        return "".join(life.stderr for life in self.lives)

    def digest(self) -> list[str]:
        """Return its log for people: without runs that went well, and what it repeated once, with how often."""
        lines: list[tuple[str, str, int]] = []
        for line in self.log.splitlines():
            entry = next(_entries([line]), {"event": line})
            what = " ".join(str(entry[key]) for key in ("level", "event", "job", "reason") if key in entry)
            if entry.get("outcome") == "succeeded":
                continue
            if lines and lines[-1][1] == what:
                lines[-1] = (*lines[-1][:2], lines[-1][2] + 1)
            else:
                lines.append((line, what, 1))
        return [line[:400] + (f" ... {times} times" if times > 1 else "") for line, _, times in lines]

    @property
    def state(self) -> Path:
        return Path(self.variables["STATE_DIRECTORY"])

    def said_after(self, name: str, moment: datetime) -> list[dict[str, Any]]:
        """Return the entries of this name that are younger than a moment of this machine's clock."""
        return [event for event in self.events(name) if datetime.fromisoformat(event["timestamp"]) > moment]


def _entries(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("{") and line.endswith("}"):  # a killed process may leave half a line
            yield json.loads(line)


class Daemons(list[Daemon]):
    """All daemons of a test, in the order of their start."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        shutil.copy(recorded.__file__, folder / "recorded.py")

    def add(
        self,
        url: str,
        jobs: str = NO_RENEWAL,
        *,
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        state: Path | None = None,
    ) -> Daemon:
        """Set up a daemon without starting it."""
        name = f"daemon-{len(self) + 1}"
        home = self.folder / name
        home.mkdir()
        program = Program(home, None)
        program.configure(url, CONFIG + jobs)
        its = {
            "STATE_DIRECTORY": str(state or home / "state"),
            "PYTHONPATH": str(self.folder),
            "RECORDED_AS": name,
            **(variables or {}),
        }
        self.append(Daemon(name, program, prefix, its, CONFIG + jobs))
        return self[-1]

    def start(self) -> None:
        """Start all that do not run, and wait until they are at work."""
        idle = [daemon for daemon in self if not daemon.lives or daemon.lives[-1].process.poll() is not None]
        for daemon in idle:
            daemon.launch()
        for daemon in idle:
            daemon.lives[-1].wait_for("daemon_started")

    def stop(self) -> None:
        """Ask all that run to stop, and insist on their exit status."""
        living = [daemon for daemon in self if daemon.lives and daemon.lives[-1].process.poll() is None]
        for daemon in living:
            daemon.lives[-1].signal(signal.SIGTERM)
        statuses = {daemon.name: daemon.lives[-1].finish().status for daemon in living}
        assert set(statuses.values()) <= {0}, f"exit statuses {statuses}"

    def end(self) -> None:
        """Kill what is left."""
        for daemon in self:
            for life in daemon.lives:
                life.kill()

    @property
    def seen(self) -> Path:
        """What the recorded jobs wrote down."""
        return self.folder / "seen"

    def prepare(self) -> None:
        """Create all tables in the database of the first daemon."""
        first = self[0]
        done = first.program.run_command(
            *first.prefix, *command(), "init-db", "--with-app-tables", "--with-indexes", variables=first.variables
        )
        assert done.status == 0, done.stderr
