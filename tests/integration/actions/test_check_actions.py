"""What becomes of the rows of "Actions"."""

import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from catfeeder_cron.actions.action import Action, Handler, Perform
from catfeeder_cron.actions.due.attempts import Attempts
from catfeeder_cron.actions.due.handlers import Handlers
from catfeeder_cron.actions.due.leases import Claimed
from catfeeder_cron.children.pool import Children
from catfeeder_cron.config import ActionsSettings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import JobAborted
from catfeeder_cron.job import JobContext
from catfeeder_cron.report import JobReport
from tests.integration.actions.conftest import Actions, Run
from tests.support.waiting import SOON, eventually

FREE = ("pending", None, None)


wait_until = eventually


@pytest.mark.parametrize("kind", ["note", "note_later", "scribble"])
def test_what_is_due_is_done_once_and_leaves_a_trace(actions: Actions, run: Run, kind: str) -> None:
    due, later = actions.add(kind), actions.add(kind, due="-1 h")

    first, second = run(), run()

    assert first.outcome == second.outcome == "succeeded"
    assert first.counts == {"due": 1, "done": 1, "retried": 0, "given_up": 0}
    assert second.counts == {"due": 0, "done": 0, "retried": 0, "given_up": 0}
    assert [note[0] for note in actions.notes()] == [str(due)]
    state = actions.get(due, "state, attempts, lease_owner, lease_until, last_error")
    assert state == ("done", 1, None, None, None)
    assert [line[:2] for line in actions.log(due)] == [(1, "done")]
    assert actions.get(later, "state, attempts") == ("pending", 0)
    assert actions.admin.execute('SELECT bool_and(started_at <= finished_at) FROM "ActionLog"').fetchone() == (True,)


def test_a_text_that_the_database_can_not_hold_keeps_no_action_from_being_done(actions: Actions, run: Run) -> None:
    action = actions.add("garble")

    assert run().counts["done"] == 1
    assert actions.log(action) == [(1, "done", "a cat and")]


def test_an_attempt_that_is_stopped_before_its_first_step_is_told_of_like_any_other() -> None:
    holding, released = threading.Event(), threading.Event()

    @asynccontextmanager
    async def opened(_settings: ActionsSettings) -> AsyncIterator[Perform]:
        async def hold_the_loop(_action: Action) -> None:
            holding.set()
            released.wait(SOON)

        yield hold_the_loop

    first, second = (
        Claimed(Action(number, None, None, "hold", None, datetime.now(UTC), 1, ""), "us") for number in (1, 2)
    )
    with Attempts(Handlers(ActionsSettings(), {"hold": Handler("hold", opened)}, Children(), 60, 60)) as attempts:
        attempts.begin([first])
        assert holding.wait(SOON)
        attempts.begin([second])
        attempts.cancel([2])
        released.set()
        verdicts: dict[int, str] = {}
        wait_until(
            lambda: verdicts.update({e.claimed.action.id: e.verdict for e in attempts.wait(1)}) or len(verdicts) > 1
        )

    assert verdicts == {1: "done", 2: "cancelled"}


def test_an_insert_needs_kind_and_due_at_alone(actions: Actions, run: Run) -> None:
    actions.admin.execute("""INSERT INTO "Actions" (kind, due_at) VALUES ('noop', now())""")

    assert run().counts["done"] == 1


def test_a_dry_run_counts_and_changes_nothing(actions: Actions, run: Run, context: Callable[..., JobContext]) -> None:
    action = actions.add("note")
    actions.add("note", due="-1 h")

    report = run(context(dry_run=True))

    assert report.counts == {"would_run": 1}
    assert actions.get(action, "state, attempts") == ("pending", 0)
    assert actions.notes() == []


def test_without_the_table_there_is_nothing_to_do(run: Run) -> None:
    report = run()

    assert report.outcome == "skipped"
    assert report.reason is not None
    assert '"public"."Actions"' in report.reason


def test_a_failure_is_tried_again_later_and_later_until_the_last_attempt(actions: Actions, run: Run) -> None:
    action = actions.add("fail", max_attempts=3)
    waits = []

    for attempt in range(1, 4):
        report = run(retry_after=100)
        state, waits_seconds = actions.get(action, "state, extract(epoch FROM due_at - now())::float")
        assert actions.get(action, "attempts, last_error") == (attempt, "ValueError: it did not work")
        if attempt < 3:
            assert (state, report.counts["retried"]) == ("pending", 1)
            waits.append(waits_seconds)
            assert run().counts["due"] == 0
            actions.admin.execute('UPDATE "Actions" SET due_at = now()')

    assert (state, report.counts["given_up"], report.counts["retried"]) == ("failed", 1, 0)
    assert 90 < waits[0] < 126
    assert 190 < waits[1] < 251
    assert [line[:2] for line in actions.log(action)] == [(1, "retried"), (2, "retried"), (3, "failed")]
    assert len({note[2] for note in actions.notes()}) == 1, "one idempotency key for all attempts"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("hopeless", "no such cat"), ("nonsense", 'no handler for the kind "nonsense"'), ("generate", "generator")],
)
def test_what_is_hopeless_fails_at_once(actions: Actions, run: Run, kind: str, reason: str) -> None:
    action = actions.add(kind)

    assert run().counts == {"due": 1, "done": 0, "retried": 0, "given_up": 1}

    state, error = actions.get(action, "state, last_error")
    assert state == "failed"
    assert reason in error


def test_a_handler_may_say_when_to_try_again(actions: Actions, run: Run) -> None:
    action = actions.add("postponed")

    run()

    assert 2900 < actions.get(action, "extract(epoch FROM due_at - now())::float") < 3800


def test_a_done_row_repeats_at_the_next_multiple_in_the_future(actions: Actions, run: Run) -> None:
    hourly = actions.add("note", due="10 hours 30 minutes", repeat_every=timedelta(hours=1))
    monthly = actions.add("note", repeat_every="1 mon")
    actions.admin.execute("""UPDATE "Actions" SET due_at = '2001-01-15 08:00Z' WHERE id = %s""", [monthly])

    assert run().counts == {"due": 2, "done": 2, "retried": 0, "given_up": 0}

    assert actions.get(hourly, "state, attempts, due_at - now() BETWEEN '29 min' AND '30 min'") == ("pending", 0, True)
    due = actions.get(monthly, "due_at").astimezone(UTC)
    assert (due.day, due.hour) == (15, 8)
    assert timedelta(0) < due - datetime.now(UTC) <= timedelta(days=31)
    assert len({note[2] for note in actions.notes()}) == 2


def test_a_retry_does_not_shift_the_grid_of_repetitions(actions: Actions, run: Run) -> None:
    action = actions.add("fail", due="30 minutes", repeat_every=timedelta(hours=1))
    slot = actions.get(action, "due_at")
    run()
    assert actions.get(action, "due_at") != slot
    actions.admin.execute("""UPDATE "Actions" SET kind = 'note'""")
    time.sleep(0.01)
    actions.admin.execute("UPDATE catfeeder_cron.action_retries SET retry_at = now() - interval '1 s'")
    actions.admin.execute('UPDATE "Actions" SET due_at = (SELECT retry_at FROM catfeeder_cron.action_retries)')

    run()

    assert actions.get(action, "due_at") == slot + timedelta(hours=1)
    assert len({note[2] for note in actions.notes()}) == 1, "both attempts were made for one slot"
    assert actions.admin.execute("SELECT count(*) FROM catfeeder_cron.action_retries").fetchone() == (0,)


def test_a_new_due_time_of_a_row_that_was_to_be_retried_counts(actions: Actions, run: Run) -> None:
    action = actions.add("fail", due="30 minutes", repeat_every=timedelta(hours=1))
    run()
    actions.admin.execute("""UPDATE "Actions" SET kind = 'noop', due_at = now() - interval '10 minutes'""")
    due = actions.get(action, "due_at")

    run()

    assert actions.get(action, "due_at") == due + timedelta(hours=1)


@pytest.mark.parametrize("repeat", ["0", "-1 hour"])
def test_a_repetition_that_leads_nowhere_is_none(actions: Actions, run: Run, repeat: str) -> None:
    action = actions.add("noop", repeat_every=repeat)

    run()

    assert actions.get(action, "state") == "done"


def test_extreme_times_hold_up_nobody(actions: Actions, run: Run) -> None:
    old = actions.add("noop", repeat_every="1 s")
    never = actions.add("noop")
    too_far = actions.add("noop", repeat_every="170000 years")
    actions.admin.execute("""UPDATE "Actions" SET due_at = '-infinity' WHERE id = %s""", [old])
    actions.admin.execute("""UPDATE "Actions" SET due_at = 'infinity' WHERE id = %s""", [never])
    actions.admin.execute(
        """UPDATE "Actions" SET due_at = '2000-01-01', repeat_every = '178000000 years'
                             WHERE id = %s""",
        [too_far],
    )
    normal = actions.add("noop")

    run()

    assert actions.get(old, "state") == "done"
    assert actions.get(never, "state") == "pending"
    assert actions.get(normal, "state") == "done"


def in_background(run: Run, context: JobContext, **options: Any) -> tuple[threading.Thread, list[JobReport]]:
    reports: list[JobReport] = []
    thread = threading.Thread(target=lambda: reports.append(run(context, **options)))
    thread.start()
    return thread, reports


def test_cancelled_while_it_runs_stays_cancelled(
    actions: Actions, run: Run, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    action = actions.add("wait_for", {"until": str(tmp_path / "go")}, repeat_every="1 s")
    thread, _ = in_background(run, context())
    wait_until(actions.notes)
    actions.admin.execute("""UPDATE "Actions" SET state = 'cancelled'""")
    (tmp_path / "go").touch()
    thread.join()

    assert actions.get(action, "state, lease_owner") == ("cancelled", None)
    assert [line[:2] for line in actions.log(action)] == [(1, "done")]
    assert run().counts["due"] == 0


def test_a_handler_whose_action_was_cancelled_is_stopped(
    actions: Actions, run: Run, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    action = actions.add("wait_for", {"until": str(tmp_path / "never")})
    thread, reports = in_background(run, context(), lease=2)
    wait_until(actions.notes)
    actions.admin.execute("""UPDATE "Actions" SET state = 'cancelled'""")
    thread.join()

    assert actions.get(action, "state") == "cancelled"
    assert [line[:2] for line in actions.log(action)] == [(1, "cancelled")]
    assert reports[0].outcome == "succeeded"


def test_a_deleted_row_is_no_fault(
    actions: Actions, run: Run, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    actions.add("wait_for", {"until": str(tmp_path / "go")})
    thread, reports = in_background(run, context())
    wait_until(actions.notes)
    actions.admin.execute('DELETE FROM "Actions"')
    (tmp_path / "go").touch()
    thread.join()

    assert (reports[0].outcome, reports[0].counts["done"]) == ("succeeded", 0)


def test_the_lease_is_extended_while_the_handler_runs(
    actions: Actions, run: Run, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    action = actions.add("wait_for", {"until": str(tmp_path / "go")})
    thread, _ = in_background(run, context(), lease=1)
    wait_until(actions.notes)
    first = actions.get(action, "lease_until")
    wait_until(lambda: actions.get(action, "lease_until") > first + timedelta(seconds=1.5))

    assert run(lease=1).counts["due"] == 0, "another daemon leaves it alone"
    (tmp_path / "go").touch()
    thread.join()
    assert len(actions.notes()) == 1
    assert actions.get(action, "state") == "done"


def test_a_lease_that_ran_out_is_taken_over_and_its_attempt_counted(actions: Actions, run: Run) -> None:
    action, spent = actions.add("note", max_attempts=2), actions.add("note", max_attempts=2)
    dead = """UPDATE "Actions" SET state = 'running', attempts = %s, lease_owner = 'somebody', lease_until = %s
              WHERE id = %s"""
    past = datetime.now(UTC) - timedelta(seconds=1)
    actions.admin.execute(dead, [1, past, action])
    actions.admin.execute(dead, [2, past, spent])

    report = run()

    assert report.counts == {"due": 2, "done": 1, "retried": 0, "given_up": 1}
    assert actions.get(action, "state, attempts") == ("done", 2)
    assert [line[:2] for line in actions.log(action)] == [(1, "lost"), (2, "done")]
    assert actions.get(spent, "state, attempts, lease_owner") == ("failed", 2, None)
    assert [line[:2] for line in actions.log(spent)] == [(2, "lost")]


def test_a_row_that_somebody_has_locked_is_left(
    actions: Actions, run: Run, connect: Callable[..., psycopg.Connection]
) -> None:
    locked, free = actions.add("note"), actions.add("note")
    other = connect(autocommit=False)
    other.execute('SELECT FROM "Actions" WHERE id = %s FOR UPDATE', [locked])

    assert run().counts["done"] == 1
    other.rollback()

    assert actions.get(free, "state") == "done"
    assert actions.get(locked, "state") == "pending"


def test_an_outcome_waits_for_a_row_that_somebody_has_locked(
    actions: Actions,
    run: Run,
    context: Callable[..., JobContext],
    connect: Callable[..., psycopg.Connection],
    tmp_path: Path,
) -> None:
    action, other = actions.add("wait_for", {"until": str(tmp_path / "go")}), connect(autocommit=False)
    thread, reports = in_background(run, context())
    wait_until(actions.notes)
    other.execute('SELECT FROM "Actions" FOR UPDATE')
    (tmp_path / "go").touch()
    time.sleep(0.3)  # whether it did not wait can't be waited for
    other.rollback()
    thread.join()

    assert actions.get(action, "state") == "done"
    assert reports[0].counts["done"] == 1


def test_asked_to_stop_it_lets_the_handlers_at_work_end(
    actions: Actions, run: Run, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    first = actions.add("wait_for", {"until": str(tmp_path / "go")}, due="1 h")
    second = actions.add("wait_for", {"until": str(tmp_path / "go")})
    given = context()
    thread, reports = in_background(run, given, concurrency=1)
    wait_until(actions.notes)
    given.stop.set(JobAborted("the process was asked to stop"))
    (tmp_path / "go").touch()
    thread.join()

    assert (reports[0].outcome, reports[0].counts["done"]) == ("aborted", 1)
    assert actions.get(first, "state") == "done"
    assert actions.get(second, "state, attempts") == ("pending", 0)


def test_a_handler_that_looks_ends_at_its_timeout_and_is_retried(actions: Actions, run: Run) -> None:
    action = actions.add("until_stopped")

    assert run(action_timeout=1).counts["retried"] == 1
    assert actions.log(action) == [(1, "retried", "longer than the action_timeout of 1 s")]


def test_a_handler_that_looks_ends_when_the_daemon_stops_and_is_retried(
    actions: Actions, run: Run, context: Callable[..., JobContext]
) -> None:
    action = actions.add("until_stopped")
    given = context()
    thread, reports = in_background(run, given)
    wait_until(actions.notes)
    given.stop.set(JobAborted("the process was asked to stop"))
    thread.join()

    assert (reports[0].outcome, reports[0].counts["retried"]) == ("aborted", 1)
    assert actions.log(action) == [(1, "retried", "it was asked to stop")]


def test_out_of_time_it_stops_the_handlers_as_well(
    actions: Actions, run: Run, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    action = actions.add("wait_for", {"until": str(tmp_path / "never")})

    report = run(context(timeout=1))

    assert (report.outcome, report.counts["retried"]) == ("timed_out", 1)
    assert actions.get(action, "state, attempts, lease_owner") == ("pending", 1, None)


def test_a_flood_of_one_kind_or_user_holds_up_no_other(actions: Actions, run: Run) -> None:
    for _ in range(60):
        actions.add("note", due="1 h", user_id=1)
    other_user = actions.add("note", user_id=2)
    other_kind = actions.add("note_later", user_id=1)

    run(concurrency=1)

    order = [int(note[0]) for note in actions.notes()]
    assert max(order.index(other_user), order.index(other_kind)) < 8


@pytest.mark.parametrize("kind", ["kill", "leave", "resign", "freeze", "hang"])
def test_a_poison_action_fails_after_its_attempts_and_holds_up_nobody(actions: Actions, run: Run, kind: str) -> None:
    poison = actions.add(kind, max_attempts=2, due="1 h")
    others = [actions.add("noop") for _ in range(20)]

    hangs = kind in ("freeze", "hang")
    options = {"action_timeout": 3 if hangs else 60, "retry_after": 0}
    report = run(**options)
    for _ in range(20):
        if actions.get(poison, "state") == "failed":
            break
        run(**options)

    assert report.counts["done"] == len(others)
    assert actions.get(poison, "state, attempts") == ("failed", 2)
    begun = [int(attempt) for _, attempt, _ in actions.notes()]
    assert begun == [1, 2] or (hangs and begun in ([1], [2], [])), "the time may be up before a busy machine begins"
    assert [line[:2] for line in actions.log(poison)] == [(1, "retried"), (2, "failed")]


def test_times_without_a_zone_are_taken_as_utc(actions: Actions, run: Run, database: Database) -> None:
    for table, column in (("Actions", "due_at"), ("Actions", "lease_until"), ("ActionLog", "started_at")):
        actions.admin.execute(
            f"ALTER TABLE \"{table}\" ALTER {column} TYPE timestamp USING {column} AT TIME ZONE 'UTC'"
        )
    actions.admin.execute(f"ALTER DATABASE {actions.admin.info.dbname} SET timezone = 'Asia/Tokyo'".encode())
    statement = """INSERT INTO "Actions" (kind, due_at, repeat_every, payload)
                   VALUES ('note', now() AT TIME ZONE 'UTC' - interval '90 min', '1 h', %s) RETURNING id, due_at"""
    row = actions.admin.execute(statement, [Jsonb({"file": str(actions.file)})]).fetchone()
    assert row is not None

    run()

    assert actions.get(row[0], "due_at") == row[1] + timedelta(hours=2)
    assert len(actions.notes()) == 1
