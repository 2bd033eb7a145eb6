"""Clocks that are set wrong and right again: those of the daemons, one after the other, and that of the database."""

import time
from collections.abc import Callable
from functools import partial

import pytest

from tests.proofs.outages import audits
from tests.proofs.outages.clock import RIGHT, Clock
from tests.proofs.outages.daemons import NO_RENEWAL, TICK, Daemon, Daemons
from tests.proofs.outages.postgresql import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.outage
MakeClock = Callable[[str], Clock]
ALL = ["+1h", "-1h", "+50m", "-50m", "+3d", "-3d"]
WRONG_SECONDS = 25
RIGHT_SECONDS = 12
# A slot is claimed when it is due, by the database's clock; the rest is for a busy machine.
AHEAD_SECONDS = 5
JOBS = f"""{NO_RENEWAL}
[jobs.polite]
call = "recorded:polite"
kwargs = {{ job = "polite", seconds = 15 }}
interval = 5

[jobs.seldom]
sql = "SELECT 1"
interval = 20
"""
_AHEAD = """
    SELECT job, extract(epoch FROM accounted_until - clock_timestamp())::float8 FROM catfeeder_cron.schedule
    WHERE accounted_until > clock_timestamp() + %s * interval '1 s'"""
_RUNS_SINCE = """
    SELECT count(*) FROM catfeeder_cron.job_runs WHERE job = %s AND outcome = 'succeeded' AND run_id > %s"""
_LIES = """
    SELECT job, sum(missed)::int FROM catfeeder_cron.job_runs WHERE reason = 'no daemon alive' GROUP BY job"""


def require_slots_run(cluster: Cluster, state: str, seconds: float = audits.AT_WORK_SECONDS) -> None:
    """Three slots more are run within so many seconds."""
    with cluster.admin() as connection:

        def runs_since(before: int) -> int:
            row = connection.execute(_RUNS_SINCE, [TICK, before]).fetchone()
            return row[0] if row else 0

        row = connection.execute("SELECT coalesce(max(run_id), 0) FROM catfeeder_cron.job_runs").fetchone()
        assert row is not None
        eventually(lambda: runs_since(row[0]) >= 3, f"slots of {TICK} run while {state}", seconds)


def require_nothing_taken_ahead(cluster: Cluster, state: str) -> None:
    """No job is accounted for beyond the present, and no slot is said to have had no daemon."""
    with cluster.admin() as connection:
        ahead = connection.execute(_AHEAD, [AHEAD_SECONDS]).fetchall()
        lies = connection.execute(_LIES).fetchall()
    assert not ahead, f"{state}: accounts in the future, by seconds: {ahead}"
    assert not lies, f"{state}: slots said to have had no daemon alive: {lies}"


def require_difference_told(daemon: Daemon, offset: str, before: int) -> None:
    """The daemon says, once, that its clock differs, and has it as a trouble."""
    eventually(
        lambda: len(daemon.events("clock_differs")) > before,
        f"{daemon.name} says that its clock is off by {offset}",
        30,
    )
    told = daemon.events("clock_differs")[before:]
    assert len(told) == 1, f"{daemon.name} said {len(told)} times that its clock is off by {offset}"
    assert "this machine's clock is" in daemon.ready(), f"{daemon.name} is ready: {daemon.ready()}"


@pytest.mark.parametrize(
    ("number", "offsets"),
    [
        pytest.param(2, ["+50m"], id="two-daemons"),
        pytest.param(1, ["-1h"], id="alone"),
        pytest.param(1, ALL, id="alone-long", marks=pytest.mark.proof),
        pytest.param(4, ALL, id="four-daemons-long", marks=pytest.mark.proof),
    ],
)
def test_a_daemon_with_a_wrong_clock_takes_no_slot_and_leaves_none_out(
    daemons: Daemons, primary: Cluster, make_clock: MakeClock, number: int, offsets: list[str]
) -> None:
    clocks = [make_clock(f"daemon-{each + 1}") for each in range(number)]
    for clock in clocks:
        daemons.add(primary.url(), JOBS, variables=clock.variables)
    daemons.prepare()
    daemons.start()
    audits.require_all_at_work(daemons, primary)
    wrong = list(zip(daemons, clocks, strict=True))[: number if offsets == ALL else 1]
    checks = [
        partial(go_wrong_and_right, daemon, clock, offset, primary) for daemon, clock in wrong for offset in offsets
    ]
    audits.require_all(
        *checks,
        lambda: audits.require_no_run_closed_as_dead(daemons),
        lambda: audits.require_never_twice_at_once(daemons),
        lambda: audits.require_all_at_work(daemons, primary),
        lambda: audits.require_orderly_end(daemons, primary, "tick", "polite", "seldom"),
    )


def go_wrong_and_right(daemon: Daemon, clock: Clock, offset: str, cluster: Cluster) -> None:
    told = len(daemon.events("clock_differs"))
    state = f"the clock of {daemon.name} is off by {offset}"
    clock.set(offset)
    time.sleep(WRONG_SECONDS)  # a clock has to be wrong for a while
    while_wrong = [
        lambda: require_nothing_taken_ahead(cluster, state),
        lambda: require_slots_run(cluster, state),
        lambda: require_difference_told(daemon, offset, told),
    ]

    def while_right() -> None:
        clock.set(RIGHT)
        time.sleep(RIGHT_SECONDS)
        after = f"it is right again, after {offset}"
        audits.require_all(
            lambda: require_nothing_taken_ahead(cluster, after), lambda: require_slots_run(cluster, after)
        )

    audits.require_all(*while_wrong, while_right, lambda: audits.require_calm([daemon], 3 * len(ALL)))


@pytest.mark.parametrize(
    ("number", "offsets"),
    [
        pytest.param(2, ["+1h"], id="short"),
        pytest.param(4, ALL, id="long", marks=pytest.mark.proof),
    ],
)
def test_a_database_with_a_wrong_clock_kills_no_run_and_keeps_no_dead_daemon_alive(
    daemons: Daemons, cluster: Callable[..., Cluster], make_clock: MakeClock, number: int, offsets: list[str]
) -> None:
    clock = make_clock("database")
    database = cluster(variables=clock.variables)
    database.create()
    for _ in range(number):
        daemons.add(database.url(), JOBS)
    daemons.prepare()
    daemons.start()
    audits.require_all(
        *(partial(set_wrong_kill_and_set_right, clock, offset, database, daemons) for offset in offsets),
        lambda: audits.require_never_twice_at_once(daemons),
        daemons.stop,
        lambda: audits.require_no_run_left_open(database),
        *(partial(audits.require_no_slot_without_row, database, job) for job in ("tick", "polite", "seldom")),
    )


def set_wrong_kill_and_set_right(clock: Clock, offset: str, database: Cluster, daemons: Daemons) -> None:
    """A daemon dies while the database's clock is wrong."""
    state = f"the database's clock is off by {offset}"
    clock.set(offset)
    time.sleep(WRONG_SECONDS)
    before = [lambda: require_slots_run(database, state), lambda: require_no_living_run_closed(daemons)]
    owner = owner_of(database, daemons)

    def die() -> None:
        owner.lives[-1].kill()
        clock.set(RIGHT)

    audits.require_all(
        *before,
        die,
        lambda: require_slots_run(database, f"the database's clock is right again, after {offset}"),
        lambda: eventually(
            partial(has_no_run, database, owner), f"the dead runs of {owner.name} are closed, after {offset}", 60
        ),
        owner.start,
        lambda: audits.require_all_at_work(daemons, database),
    )


def require_no_living_run_closed(daemons: Daemons) -> None:
    """No daemon has closed a run of one that had not been killed."""
    killed = {str(life.pid) for daemon in daemons for life in daemon.lives if life.process.poll() is not None}
    closed = [event["run"] for daemon in daemons for event in daemon.events("dead_run_closed")]
    wrongly = [run for run in closed if not any(f"pid {pid}" in run for pid in killed)]
    assert not wrongly, f"runs of living daemons were closed: {wrongly}"


def owner_of(cluster: Cluster, daemons: Daemons) -> Daemon:
    """Return the daemon that runs the recorded job, as soon as one does."""
    return eventually(lambda: next((each for each in daemons if runs_of(cluster, each)), None), "a run")  # type: ignore[no-any-return]


def has_no_run(cluster: Cluster, daemon: Daemon) -> bool:
    return not runs_of(cluster, daemon)


def runs_of(cluster: Cluster, daemon: Daemon) -> int:
    with cluster.admin() as connection:
        query = "SELECT count(*) FROM catfeeder_cron.job_runs WHERE outcome IS NULL AND job = 'polite' AND pid = %s"
        row = connection.execute(query, [daemon.pid]).fetchone()
    return row[0] if row else 0
