"""What must be true after an outage, by the jobs' own notes, the ledgers and the logs."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.proofs.fleet import Audit
from tests.proofs.outages.daemons import TICK, Daemon, Daemons
from tests.proofs.outages.postgresql import Cluster
from tests.support.waiting import eventually

AT_WORK_SECONDS = 30
# How far apart the slots of the jobs are.
INTERVALS = {
    TICK: timedelta(seconds=1),
    "polite": timedelta(seconds=5),
    "deaf": timedelta(seconds=5),
    "statement": timedelta(seconds=5),
    "seldom": timedelta(seconds=20),
}

Check = Callable[[], object]

_RUNS = """
    SELECT job, slot, daemon, started_at, outcome, reason FROM catfeeder_cron.job_runs
    WHERE missed IS NULL AND slot IS NOT NULL AND NOT shared"""
_STRETCHES = """
    SELECT job, slot, last_slot, reason FROM catfeeder_cron.job_runs WHERE missed IS NOT NULL AND NOT shared"""
# A run that is recorded again has the start that its process noted.
_SAME_START = timedelta(seconds=0.5)
_BEATS = "SELECT pid FROM catfeeder_cron.daemons WHERE heartbeat_at > %s AND heartbeat_at <= clock_timestamp()"
_OPEN = "SELECT job, pid, started_at FROM catfeeder_cron.job_runs WHERE outcome IS NULL"


def require_all(*checks: Check) -> None:
    """Make all these checks, and say of each that fails what it found."""
    found = [line for check in checks for line in _broken_by(check)]
    assert not found, "\n* ".join([f"{len(found)} promises are broken:", *found])


def _broken_by(check: Check) -> list[str]:
    try:
        check()
    except AssertionError as error:
        first, *more = str(error).split("\n* ")
        return more or [first.split("\nassert ")[0]]
    return []


def require_never_twice_at_once(daemons: Daemons) -> int:
    """By the jobs' own notes no two runs of one job were ever at work at once; return how many runs there were."""
    runs = _notes(daemons.seen)
    broken = []
    for job, spans in runs.items():
        for (_, end, one), (start, its_end, other) in pairwise(sorted(spans)):
            if start < end:
                broken.append(f"{job}: {one} and {other} for {min(end, its_end) - start:.1f} s")
    assert not broken, f"two runs of one job at once: {broken}"
    return sum(map(len, runs.values()))


def _notes(seen: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Return when the runs of each job were seen first and last, and who they are."""
    moments: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in seen.read_text().splitlines() if seen.exists() else []:
        entry = json.loads(line)
        moments[entry["job"], entry["run"]].append(entry["at"])
    runs: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for (job, run), seen_at in moments.items():
        runs[job].append((min(seen_at), max(seen_at), run))
    return runs


def require_every_slot_once(cluster: Cluster, job: str) -> None:
    """Every slot between a job's first and its account has a row, and one only."""
    try:
        Audit(cluster.own_url, interval=INTERVALS[job], job=job).require_every_slot_once()
    except AssertionError as error:
        raise AssertionError(f"{job}: {error}") from None


def require_no_slot_without_row(cluster: Cluster, job: str) -> None:
    """Every slot between a job's first and its account has a row; one that a clock told twice may have several."""
    try:
        Audit(cluster.own_url, interval=INTERVALS[job], job=job).require_no_slot_without_row()
    except AssertionError as error:
        raise AssertionError(f"{job}: {error}") from None


def require_all_at_work(daemons: Iterable[Daemon], cluster: Cluster, seconds: float = AT_WORK_SECONDS) -> None:
    """Every daemon writes heartbeats in this cluster within so many seconds, and slots are run."""
    with cluster.admin() as connection:
        row = connection.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        moment: datetime = row[0]
        expected = {daemon.pid: daemon.name for daemon in daemons}

        def away() -> list[str]:
            beating = {pid for (pid,) in connection.execute(_BEATS, [moment]).fetchall()}
            return [name for pid, name in expected.items() if pid not in beating]

        def ticks() -> int:
            query = "SELECT count(*) FROM catfeeder_cron.job_runs WHERE job = %s AND outcome = 'succeeded'"
            row = connection.execute(query + " AND started_at > %s", [TICK, moment]).fetchone()
            return row[0] if row else 0

        try:
            eventually(lambda: not away() and ticks(), seconds=seconds)
        except AssertionError:
            where = f"in {cluster.folder.name} {seconds:g} s later"
            raise AssertionError(f"not at work {where}: {away()}; slots run there: {ticks()}") from None


def require_said_once(daemons: Iterable[Daemon], event: str, since: datetime | None = None, least: int = 1) -> None:
    """Every daemon has said this, and once only."""
    for daemon in daemons:
        said = daemon.said_after(event, since) if since else daemon.events(event)
        assert least <= len(said) <= 1, f"{daemon.name} said {event} {len(said)} times: {said[:3]}"


def require_never_said(daemons: Iterable[Daemon], event: str) -> None:
    for daemon in daemons:
        said = daemon.events(event)
        assert not said, f"{daemon.name} said {event} {len(said)} times: {said[:3]}"


def require_calm(daemons: Iterable[Daemon], most: int, since: Sequence[int] = ()) -> None:
    """No daemon has repeated a warning or an error more often than so."""
    for number, daemon in enumerate(daemons):
        repeated = {
            event: count for event, count in daemon.alarms(since[number] if since else 0).items() if count > most
        }
        assert not repeated, f"{daemon.name} repeated itself: {repeated}"


def require_no_run_closed_as_dead(daemons: Daemons) -> None:
    """No daemon took another one, of which none was killed, for dead."""
    closed = [event["run"] for daemon in daemons for event in daemon.events("dead_run_closed")]
    assert not closed, f"runs of living daemons were closed: {closed}"


def require_orderly_end(daemons: Daemons, cluster: Cluster, *jobs: str, kept: bool = True) -> None:
    """All stop when asked to; then no run is open, and every slot of these jobs has its row.

    In a database that has not `kept` all that it was told, a run that is recorded again may lie in a stretch of slots.
    """
    living = {daemon.pid for daemon in daemons}
    require_slots = require_every_slot_once if kept else require_no_slot_without_row
    require_all(
        lambda: eventually(lambda: not _open_runs_of_others(cluster, living), "runs of the dead are closed", 60),
        daemons.stop,
        lambda: require_no_run_left_open(cluster),
        *(partial(require_slots, cluster, job) for job in jobs or (TICK,)),
    )


def _open_runs_of_others(cluster: Cluster, living: set[int]) -> list[tuple[Any, ...]]:
    with cluster.admin() as connection:
        return [run for run in connection.execute(_OPEN).fetchall() if run[1] not in living]


def require_no_run_left_open(cluster: Cluster) -> None:
    with cluster.admin() as connection:
        left = connection.execute(_OPEN).fetchall()
    assert not left, f"runs left open: {left}"


class Memory:
    """What a ledger said before it was lost, to be held against the one that took its place."""

    def __init__(self, cluster: Cluster) -> None:
        with cluster.admin() as connection:
            self._ran = {
                (job, slot): (daemon, started_at, outcome)
                for job, slot, daemon, started_at, outcome, _ in connection.execute(_RUNS).fetchall()
            }

    def require_agreement(self, cluster: Cluster) -> None:
        """Nothing that a living daemon knew better was run again, or told otherwise."""
        with cluster.admin() as connection:
            runs = connection.execute(_RUNS).fetchall()
            stretches = connection.execute(_STRETCHES).fetchall()
        again, otherwise = self._again(runs), self._otherwise(runs, stretches)
        assert not again, f"slots that were run again although the daemon that had run them lives: {again}"
        assert not otherwise, f"slots that succeeded, and of which the ledger now says otherwise: {otherwise[:10]}"

    def _again(self, runs: list[tuple[Any, ...]]) -> list[str]:
        return [
            f"{job} {slot:%H:%M:%S}: {self._ran[job, slot][1]:%M:%S.%f}, {started_at:%M:%S.%f} ({outcome} {reason})"
            for job, slot, _, started_at, outcome, reason in runs
            if (job, slot) in self._ran and abs(started_at - self._ran[job, slot][1]) > _SAME_START
        ]

    def _otherwise(self, runs: list[tuple[Any, ...]], stretches: list[tuple[Any, ...]]) -> list[str]:
        succeeded = {key: daemon for key, (daemon, _, outcome) in self._ran.items() if outcome == "succeeded"}
        aborted = [
            f"{job} {slot:%H:%M:%S}: {reason}"
            for job, slot, daemon, _, outcome, reason in runs
            if outcome == "aborted" and succeeded.get((job, slot)) == daemon
        ]
        untrue = ("no daemon was free", "no daemon alive")
        missed = [
            f"{job} {slot:%H:%M:%S}: {reason}"
            for job, slot in succeeded
            for its, first, last, reason in stretches
            if its == job and first <= slot <= last and reason in untrue
        ]
        return aborted + missed
