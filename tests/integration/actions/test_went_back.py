"""The database loses its last seconds, or never gets an outcome: what this process has done is not done again.

The tests change catfeeder_cron.lineage as a heartbeat does that finds that history went back.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catfeeder_cron.actions.due.leases import Leases
from catfeeder_cron.actions.due.memory import Memory, memory_of
from catfeeder_cron.actions.due.put_back import DETAIL
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Database
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.job import JobContext
from catfeeder_cron.jobs import check_actions
from tests.integration.actions.conftest import Actions, Run
from tests.integration.actions.test_check_actions import in_background
from tests.support.proxy import Proxy
from tests.support.waiting import eventually


class History:
    """The history of the test's database, which the test can turn back."""

    def __init__(self, admin: psycopg.Connection) -> None:
        self._admin = admin

    def heartbeat(self, *databases: Database) -> None:
        """Let the processes learn which history of the database they work on."""
        row = self._admin.execute("SELECT id, since, reason, server, counter FROM catfeeder_cron.lineage").fetchone()
        assert row is not None
        for database in databases:
            database.lineage = Lineage(*row)

    def save(self, *tables: str) -> None:
        for table in tables:
            self._admin.execute(f'CREATE TABLE saved_{table} AS TABLE "{table}"'.encode())

    def go_back(self, *tables: str, ago: str = "1 min") -> None:
        """Restore the tables; a heartbeat noticed it so long `ago`."""
        for table in tables:
            self._admin.execute(f'TRUNCATE "{table}"; INSERT INTO "{table}" TABLE saved_{table}'.encode())
        self.notice(ago)

    def notice(self, ago: str) -> None:
        self._admin.execute(
            """UPDATE catfeeder_cron.lineage
               SET id = gen_random_uuid(), reason = 'restored', since = now() - %s::interval""",
            [ago],
        )


@pytest.fixture
def history(actions: Actions, database: Database) -> History:
    history = History(actions.admin)
    history.heartbeat(database)
    return history


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """Returns the log entries of an event."""
    return lambda name: [record.getMessage() for record in caplog.records if record.getMessage().split()[0] == name]


def counted(report: Any) -> tuple[int, int]:
    return report.counts["due"], report.counts["done"]


def test_a_server_that_lost_its_last_seconds_hands_out_nothing_before_a_heartbeat_has_noticed(
    actions: Actions, history: History, run: Run, database: Database
) -> None:
    action = actions.add("note")
    actions.admin.execute("UPDATE catfeeder_cron.lineage SET counter = 10")
    history.heartbeat(database)
    actions.admin.execute("UPDATE catfeeder_cron.lineage SET counter = 9")

    assert counted(run()) == (0, 0)
    assert actions.get(action, "state, attempts") == ("pending", 0)

    history.notice("1 min")
    assert counted(run()) == (0, 0)
    history.heartbeat(database)
    assert counted(run()) == (1, 1)


def test_what_was_due_before_history_went_back_waits_until_all_have_stored_what_they_remember(
    actions: Actions, history: History, run: Run, context: Callable[..., JobContext], database: Database
) -> None:
    early, ancient = actions.add("note"), actions.add("note")
    actions.admin.execute("""UPDATE "Actions" SET due_at = '-infinity' WHERE id = %s""", [ancient])
    history.notice("-4 s")
    history.heartbeat(database)

    assert counted(run()) == (0, 0)
    assert actions.get(early, "state, attempts") == ("pending", 0)
    assert 0 < (check_actions.due_in(context()) or 0) <= 31

    history.notice("0 s")
    history.heartbeat(database)
    late = actions.add("note")
    assert (check_actions.due_in(context()) or 0) <= 0
    run()
    assert actions.get(late, "state") == "done"

    history.notice("-1 h")  # a clock of the database's that was ahead: nothing waits for that time
    history.heartbeat(database)
    run()
    assert {actions.get(id, "state") for id in (early, ancient)} == {"done"}


def test_what_this_process_has_done_is_stored_again_and_not_done_again(
    actions: Actions, history: History, run: Run, database: Database, told: Callable[[str], list[str]]
) -> None:
    ids = [actions.add("note") for _ in range(10)]
    history.save("Actions", "ActionLog")
    run()
    before = actions.admin.execute('SELECT action_id, started_at FROM "ActionLog" ORDER BY 1').fetchall()
    history.go_back("Actions", "ActionLog")
    history.heartbeat(database)

    report = run()

    assert report.outcome == "succeeded"
    assert len(actions.notes()) == len(ids)
    assert {actions.get(id, "state, attempts, lease_owner") for id in ids} == {("done", 1, None)}
    assert actions.log(ids[0]) == [(1, "done", f"noted; {DETAIL}")]
    assert actions.admin.execute('SELECT action_id, started_at FROM "ActionLog" ORDER BY 1').fetchall() == before
    (entry,) = told("action_was_done_before")
    assert f"actions={len(ids)} " in entry
    run()
    assert len(told("action_was_done_before")) == 1

    history.go_back("Actions", "ActionLog")
    history.heartbeat(database)
    run()
    assert len(actions.notes()) == len(ids), "nor after a second loss"


def test_another_process_does_it_again_with_the_same_key_and_its_line_says_so(
    actions: Actions,
    history: History,
    run: Run,
    context: Callable[..., JobContext],
    database: Database,
    open_database: Callable[..., Database],
) -> None:
    action, other = actions.add("note", due="2 min"), open_database()
    history.save("Actions")
    run()
    history.go_back("Actions")
    history.heartbeat(database, other)

    run(context(database=other))

    (_, first, key), (_, second, again) = actions.notes()
    assert (first, second, key) == ("1", "1", again)
    again = "noted; it was due before the database lost its last seconds, and may have been done then, too"
    assert actions.log(action) == [(1, "done", "noted"), (1, "done", again)]


def test_a_line_that_the_log_still_has_is_not_written_twice(
    actions: Actions, history: History, run: Run, database: Database
) -> None:
    action = actions.add("note")
    history.save("Actions")
    run()
    history.go_back("Actions")
    history.heartbeat(database)
    run()

    assert actions.get(action, "state") == "done"
    assert actions.log(action) == [(1, "done", "noted")]


def test_a_failed_attempt_is_remembered_with_its_pause(
    actions: Actions, history: History, run: Run, database: Database
) -> None:
    action = actions.add("fail")
    history.save("Actions")
    run(retry_after=3000)
    history.go_back("Actions")
    history.heartbeat(database)

    run(retry_after=3000)

    assert len(actions.notes()) == 1
    assert actions.get(action, "state, attempts, due_at > now() + interval '40 min'") == ("pending", 1, True)


def test_a_repetition_that_was_done_is_not_done_again_and_the_next_one_is(
    actions: Actions, history: History, run: Run, database: Database
) -> None:
    action = actions.add("note", due="90 min", repeat_every="1 h")
    history.save("Actions")
    run()
    due = actions.get(action, "due_at")
    history.go_back("Actions")
    history.heartbeat(database)

    run()
    assert (len(actions.notes()), actions.get(action, "due_at")) == (1, due)

    actions.admin.execute("""UPDATE "Actions" SET due_at = due_at - interval '1 h'""")
    run()
    assert len(actions.notes()) == 2


def test_an_action_that_somebody_sets_pending_again_runs_again(
    actions: Actions, history: History, run: Run, database: Database
) -> None:
    actions.add("note")
    again = """UPDATE "Actions" SET state = 'pending', attempts = 0"""
    run()
    actions.admin.execute(again)
    run()
    assert len(actions.notes()) == 2

    history.notice("1 min")  # and the row is as this process left it
    history.heartbeat(database)
    run()
    actions.admin.execute(again)
    run()
    assert len(actions.notes()) == 3


def test_after_an_outage_it_is_stored_before_any_run(
    actions: Actions, history: History, run: Run, context: Callable[..., JobContext], database: Database
) -> None:
    action = actions.add("note")
    history.save("Actions")
    run()
    history.go_back("Actions", ago="0 s")
    history.heartbeat(database)

    check_actions.recover(context())

    assert actions.get(action, "state") == "done"
    assert len(actions.notes()) == 1


def test_a_row_that_vanished_and_one_that_was_begun_again_are_told_once(
    actions: Actions, history: History, run: Run, database: Database, told: Callable[[str], list[str]]
) -> None:
    gone, elsewhere = actions.add("note"), actions.add("note")
    run()
    actions.admin.execute('DELETE FROM "Actions" WHERE id = %s', [gone])
    actions.admin.execute(
        """UPDATE "Actions" SET state = 'running', lease_owner = 'another', lease_until = now() + interval '1 h'"""
    )
    history.notice("1 min")
    history.heartbeat(database)

    run()
    run()

    (entry,) = told("action_rows_vanished")
    assert f"actions=[{gone}]" in entry
    (entry,) = told("actions_begun_again")
    assert f"actions=[{elsewhere}]" in entry

    actions.admin.execute("""UPDATE "Actions" SET state = 'pending', lease_owner = NULL""")
    run()
    assert actions.get(elsewhere, "state") == "done"
    assert len(actions.notes()) == 2


def test_an_outcome_that_an_outage_kept_from_being_stored_is_stored_later(
    actions: Actions,
    run: Run,
    context: Callable[..., JobContext],
    open_database: Callable[..., Database],
    database_url: str,
    tmp_path: Path,
    told: Callable[[str], list[str]],
) -> None:
    action = actions.add("wait_for", {"until": str(tmp_path / "go")})
    with Proxy(database_url) as proxy:
        cut_off = open_database(proxy.conninfo, connect_timeout=2)
        given = context(database=cut_off)
        thread, reports = in_background(run, given, lease=3)
        eventually(actions.notes)
        proxy.refuse()
        (tmp_path / "go").touch()
        thread.join()
        assert reports[0].outcome == "failed"
        (entry,) = told("action_outcomes_not_stored")
        assert f"actions=['{action}']" in entry
        assert actions.get(action, "state") == "running"

        proxy.heal()
        assert run(context(database=cut_off)).outcome == "succeeded"

    assert actions.get(action, "state, attempts") == ("done", 1)
    assert len(actions.notes()) == 1
    assert [line[:2] for line in actions.log(action)] == [(1, "done")]


def lapsed(actions: Actions, owner: str, lease_until: str) -> int:
    action = actions.add("note", due="1 h")
    actions.admin.execute(
        """UPDATE "Actions" SET state = 'running', attempts = 1, lease_owner = %s, lease_until = now() + %s::interval
           WHERE id = %s""",
        [owner, lease_until, action],
    )
    return action


def test_a_lease_is_taken_over_when_its_owner_had_time_to_come_back(
    actions: Actions, history: History, database: Database
) -> None:
    action = lapsed(actions, "another", "-1 s")
    leases = Leases(ActionTables(DatabaseTables()), timedelta(seconds=60), lambda: database.lineage)

    def take_over() -> tuple[str, bool]:
        with database.transaction() as connection:
            leases.take_over(connection, [])
            return actions_state(connection, action), leases.lapsed_too_short_ago(connection, [])

    for heard, written in (("1 s", "1 s"), ("1 h", "1 min"), ("1 h", "-1 h")):
        actions.admin.execute(
            """UPDATE catfeeder_cron.lineage
               SET heard_since = now() - %s::interval, written_at = now() - %s::interval""",
            [heard, written],
        )
        assert take_over() == ("running", True)
    actions.admin.execute("UPDATE catfeeder_cron.lineage SET heard_since = now() - interval '1 h', written_at = now()")
    assert take_over() == ("pending", False)


def actions_state(connection: Any, action: int) -> str:
    return str(connection.execute('SELECT state FROM "Actions" WHERE id = %s', [action]).fetchone()[0])


def test_a_run_waits_for_the_owners_of_lapsed_leases_and_does_what_becomes_due_meanwhile(
    actions: Actions, history: History, run: Run, context: Callable[..., JobContext]
) -> None:
    action = lapsed(actions, "another", "-1 s")
    thread, reports = in_background(run, context())
    late = actions.add("note")
    eventually(lambda: actions.get(late, "state") == "done")
    assert actions.get(action, "state") == "running"
    actions.admin.execute("UPDATE catfeeder_cron.lineage SET heard_since = now() - interval '1 h', written_at = now()")
    thread.join()

    assert counted(reports[0]) == (2, 2)
    assert actions.get(action, "state") == "done"


def test_a_lease_that_a_wrong_clock_left_in_the_future_keeps_nobody_waiting(
    actions: Actions, history: History, database: Database
) -> None:
    row = actions.admin.execute(
        """SELECT to_char((now() + interval '59 min') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                  to_char((now() - interval '1 min') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
    ).fetchone()
    assert row is not None
    ahead, long = (lapsed(actions, f"host 1 since {since}", "1 h") for since in row)
    actions.admin.execute("UPDATE catfeeder_cron.lineage SET heard_since = now() - interval '1 h', written_at = now()")

    leases = Leases(ActionTables(DatabaseTables()), timedelta(seconds=60), lambda: database.lineage)

    with database.transaction() as connection:
        leases.take_over(connection, [])

    assert actions.get(ahead, "state") == "pending"
    assert actions.get(long, "state") == "running"


def test_a_memory_is_that_of_one_database_and_goes_with_it(open_database: Callable[..., Database]) -> None:
    first, second = open_database(), open_database()
    assert isinstance(memory_of(first), Memory)
    assert memory_of(first) is memory_of(first) is not memory_of(second)
