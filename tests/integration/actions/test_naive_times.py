"""check-actions where the columns of times have no zone: due times, leases and repetitions go by the zone's clock."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from catfeeder_cron.database import Database
from catfeeder_cron.job import JobContext
from catfeeder_cron.jobs.check_actions import due_in
from tests.integration.actions.conftest import Actions, Run
from tests.integration.actions.test_went_back import History, counted
from tests.integration.zones import set_back, set_forward

MINUTE = timedelta(minutes=1)
NAIVE = (("Actions", "due_at"), ("Actions", "lease_until"), ("ActionLog", "started_at"), ("ActionLog", "finished_at"))

InZone = Callable[[ZoneInfo], JobContext]


@pytest.fixture
def in_zone(actions: Actions, context: Callable[..., JobContext], open_database: Callable[..., Database]) -> InZone:
    """Gives the columns another type; returns the context of a run that takes them in the zone."""

    def change(zone: ZoneInfo) -> JobContext:
        for table, column in NAIVE:
            actions.admin.execute(f'ALTER TABLE "{table}" ALTER {column} TYPE timestamp'.encode())
        given = context()
        given.database = open_database(naive_timestamps=zone)
        return given

    return change


def add(actions: Actions, zone: ZoneInfo, minutes: float, kind: str = "note", **columns: Any) -> int:
    """Insert an action that is due in so many minutes, as the clocks of the zone will show it."""
    id = actions.add(kind, **columns)
    actions.admin.execute(
        'UPDATE "Actions" SET due_at = (now() + %s) AT TIME ZONE %s WHERE id = %s', [minutes * MINUTE, zone.key, id]
    )
    return id


@pytest.mark.parametrize("name", ["Europe/Paris", "America/New_York"])
def test_an_action_runs_and_is_repeated_by_the_clock_of_the_zone(
    actions: Actions, run: Run, in_zone: InZone, name: str
) -> None:
    zone = ZoneInfo(name)
    context = in_zone(zone)
    due = add(actions, zone, -1)
    later = add(actions, zone, 1)
    repeated = add(actions, zone, -90, repeat_every=timedelta(hours=1))
    begun = actions.get(repeated, "due_at")
    seconds = due_in(context)
    assert seconds is not None
    assert -91 * 60 < seconds < -89 * 60

    run(context, retry_after="1h")

    assert {int(id) for id, _, _ in actions.notes()} == {due, repeated}
    assert actions.get(repeated, "due_at") == begun + timedelta(hours=2)
    assert actions.get(later, "state") == "pending"
    seconds = due_in(context)
    assert seconds is not None
    assert 0 < seconds < 60
    logged = actions.admin.execute(
        """SELECT count(*) FROM "ActionLog" WHERE started_at <= finished_at
           AND finished_at AT TIME ZONE %s BETWEEN now() - interval '10 min' AND now()""",
        [name],
    ).fetchone()
    assert logged == (2,)


@pytest.mark.parametrize("name", ["Europe/Paris", "America/New_York"])
def test_a_lease_without_a_zone_lasts_and_lapses_by_the_clock_of_the_zone(
    actions: Actions, run: Run, in_zone: InZone, name: str
) -> None:
    zone = ZoneInfo(name)
    context = in_zone(zone)
    held, lapsed = (add(actions, zone, -5, state="running", lease_owner="someone", attempts=1) for _ in range(2))
    for id, minutes in ((held, 1), (lapsed, -1)):
        actions.admin.execute(
            'UPDATE "Actions" SET lease_until = (now() + %s) AT TIME ZONE %s WHERE id = %s',
            [minutes * MINUTE, name, id],
        )

    run(context)

    assert actions.get(held, "state, lease_owner") == ("running", "someone")
    assert actions.get(lapsed, "state") == "done"


def test_the_slot_of_a_repetition_outlives_its_retries(actions: Actions, run: Run, in_zone: InZone) -> None:
    zone = ZoneInfo("Europe/Paris")
    context = in_zone(zone)
    failing = add(actions, zone, -185, kind="fail", repeat_every=timedelta(hours=1))
    (slot,) = actions.admin.execute('SELECT due_at AT TIME ZONE %s FROM "Actions"', [zone.key]).fetchone() or (None,)

    for _ in range(3):
        run(context, retry_after=0)

    assert actions.get(failing, "attempts") >= 3
    assert actions.admin.execute("SELECT due_at FROM catfeeder_cron.action_retries").fetchall() == [(slot,)]


@pytest.mark.parametrize("name", ["Europe/Paris", "America/New_York"])
def test_what_was_due_before_history_went_back_waits_by_the_clock_of_the_zone(
    actions: Actions, run: Run, in_zone: InZone, name: str
) -> None:
    zone = ZoneInfo(name)
    context, history = in_zone(zone), History(actions.admin)
    early = add(actions, zone, -1)
    history.notice("-4 s")
    history.heartbeat(context.database)

    assert counted(run(context)) == (0, 0)
    assert actions.get(early, "state, attempts") == ("pending", 0)
    assert 0 < (due_in(context) or 0) <= 31

    history.notice("0 s")
    history.heartbeat(context.database)
    late = add(actions, zone, 0)
    assert (due_in(context) or 0) <= 0
    run(context)
    assert actions.get(late, "state") == "done"

    history.notice("28 s")
    history.heartbeat(context.database)
    run(context)
    assert actions.get(early, "state") == "done"


@pytest.mark.parametrize("lost", [("Actions", "ActionLog"), ("Actions",)])
@pytest.mark.parametrize("change", range(-45, 91, 45))
@pytest.mark.parametrize("set_clocks", [set_back, set_forward])
def test_what_the_database_has_lost_is_stored_again_while_the_clocks_change(
    actions: Actions,
    run: Run,
    in_zone: InZone,
    set_clocks: Callable[[timedelta], ZoneInfo],
    change: int,
    lost: tuple[str, ...],
) -> None:
    zone = set_clocks(change * MINUTE)
    context, history = in_zone(zone), History(actions.admin)
    for kind, more in (("note", {}), ("note", {"repeat_every": timedelta(hours=1)}), ("fail", {})):
        add(actions, zone, -185, kind, **more)
    history.heartbeat(context.database)
    history.save("Actions", "ActionLog")
    run(context, retry_after="1h")
    rows = "SELECT id, state, attempts, due_at FROM \"Actions\" WHERE kind = 'note' ORDER BY id"
    lines = 'SELECT action_id, attempt, started_at, outcome FROM "ActionLog" ORDER BY action_id'
    before = [actions.admin.execute(each.encode()).fetchall() for each in (rows, lines)]
    history.go_back(*lost)
    history.heartbeat(context.database)

    run(context, retry_after="1h")

    assert [actions.admin.execute(each.encode()).fetchall() for each in (rows, lines)] == before
    assert len(actions.notes()) == 3


def test_a_lease_lasts_although_its_end_has_a_later_reading(actions: Actions, run: Run, in_zone: InZone) -> None:
    """Its owner claimed when the database's clock was ahead, and has extended it since that was set right."""
    zone = set_back(30 * MINUTE)
    context, history = in_zone(zone), History(actions.admin)
    held = add(actions, zone, -60, state="running", attempts=1)
    actions.admin.execute(
        """UPDATE "Actions" SET lease_until = (now() + interval '50 s') AT TIME ZONE %s, lease_owner = 'host 1 since '
           || to_char((now() + interval '1 h') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')""",
        [zone.key],
    )
    actions.admin.execute("UPDATE catfeeder_cron.lineage SET heard_since = now() - interval '1 h', written_at = now()")
    history.heartbeat(context.database)

    run(context)

    assert actions.get(held, "state") == "running"


@pytest.mark.parametrize("change", range(-90, 91, 20))
@pytest.mark.parametrize("set_clocks", [set_back, set_forward])
def test_while_the_clocks_change_an_action_runs_once_and_its_slot_is_kept(
    actions: Actions, run: Run, in_zone: InZone, set_clocks: Callable[[timedelta], ZoneInfo], change: int
) -> None:
    """A retry moves `due_at`, to a time that the clocks may show twice; a repetition does, too."""
    zone = set_clocks(change * MINUTE)
    context = in_zone(zone)
    added = {add(actions, zone, minutes): minutes for minutes in (-85, -45, -5, 5, 45)}
    repeated = add(actions, zone, -185, repeat_every=timedelta(minutes=30))
    failing = add(actions, zone, -185, kind="fail", repeat_every=timedelta(minutes=30))
    slot = actions.admin.execute(
        'SELECT due_at AT TIME ZONE %s FROM "Actions" WHERE id = %s', [zone.key, failing]
    ).fetchone()

    run(context, retry_after="20m")
    run(context, retry_after="20m")

    ran = [int(id) for id, _, _ in actions.notes()]
    assert len(ran) == len(set(ran))
    assert repeated in ran
    assert all(minutes < 0 for id, minutes in added.items() if id in ran)
    waits = {minutes for id, minutes in added.items() if minutes < 0 and id not in ran}
    assert all(set_clocks is set_back and change - 60 < minutes < change for minutes in waits)
    assert actions.get(failing, "state, attempts") == ("pending", 1)
    kept = actions.admin.execute(
        """SELECT r.due_at FROM catfeeder_cron.action_retries r JOIN "Actions" a ON r.action = a.id::text
           WHERE a.due_at = r.retry_at AT TIME ZONE %s""",
        [zone.key],
    ).fetchall()
    assert kept == [slot]
