"""Whatever happens to the daemons or the database, each slot runs once or is accounted for once."""

import random
import time
from collections.abc import Callable

import psycopg
import pytest

from catfeeder_cron.database.embedded import EmbeddedServer
from tests.proofs.fleet import JOB, Audit, Fleet
from tests.support.waiting import eventually

Launch = Callable[..., Fleet]


def count(url: str, query: str) -> int:
    try:
        with psycopg.connect(url) as connection:
            row = connection.execute(query.encode()).fetchone()
    except psycopg.Error:
        return 0
    return int(row[0]) if row else 0


def living(url: str) -> int:
    return count(url, "SELECT count(*) FROM catfeeder_cron.daemons WHERE heartbeat_at > now() - interval '30 s'")


def open_runs(url: str) -> int:
    return count(url, "SELECT count(*) FROM catfeeder_cron.job_runs WHERE outcome IS NULL")


def accounted(url: str) -> int:
    return count(url, f"SELECT count(*) FROM catfeeder_cron.job_runs WHERE job = '{JOB}' AND outcome = 'succeeded'")


def kill_at_random(fleet: Fleet, seconds: float, pause: tuple[float, float]) -> int:
    """Kill a daemon again and again, each time starting another; return how often."""
    chance, kills, deadline = random.Random(20261123), 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(chance.uniform(*pause))
        alive = [number for number, daemon in enumerate(fleet.daemons) if daemon.poll() is None]
        fleet.kill(chance.choice(alive))
        fleet.start()
        kills += 1
    return kills


def close_dead_runs(fleet: Fleet, url: str) -> None:
    """Wait until the living have closed what the dead left open."""
    eventually(lambda: open_runs(url) == 0)
    fleet.stop()


def test_three_daemons_of_which_one_is_killed_now_and_then_account_for_every_slot_once(
    launch: Launch, database_url: str
) -> None:
    fleet = launch(database_url)
    fleet.start(3)
    eventually(lambda: accounted(database_url) > 0)
    kill_at_random(fleet, 3, (0.7, 1.5))
    fleet.stop()
    # The runs of those that were killed are open: nobody lived long enough to close them.
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE catfeeder_cron.job_runs SET outcome = 'aborted' WHERE outcome IS NULL")
    audit = Audit(database_url)
    audit.require_every_slot_once()
    audit.require_agreement(fleet)


@pytest.mark.proof
def test_three_daemons_run_every_slot_of_a_minute_exactly_once(launch: Launch, database_url: str) -> None:
    fleet = launch(database_url)
    fleet.start(3)
    eventually(lambda: living(database_url) == 3)
    time.sleep(60)
    fleet.stop()
    audit = Audit(database_url)
    audit.require_every_slot_once()
    audit.require_agreement(fleet)
    assert len(audit.runs) >= 60
    assert set(audit.outcomes) == {"succeeded"}
    assert not audit.reasons


@pytest.mark.proof
def test_daemons_killed_every_few_seconds_leave_no_slot_out(launch: Launch, database_url: str) -> None:
    fleet = launch(database_url)
    fleet.start(3)
    eventually(lambda: living(database_url) == 3)
    assert kill_at_random(fleet, 60, (1, 4)) >= 15
    close_dead_runs(fleet, database_url)
    audit = Audit(database_url)
    audit.require_every_slot_once()
    audit.require_agreement(fleet)


@pytest.mark.proof
def test_a_lone_daemon_killed_again_and_again_leaves_no_slot_out(launch: Launch, database_url: str) -> None:
    fleet = launch(database_url)
    fleet.start()
    eventually(lambda: accounted(database_url) > 0)
    kill_at_random(fleet, 40, (2, 6))
    close_dead_runs(fleet, database_url)
    audit = Audit(database_url)
    audit.require_every_slot_once()
    audit.require_agreement(fleet)
    assert audit.triggers["catch_up"] > 0
    assert set(audit.reasons) <= {"no daemon alive", "still running", "no daemon was free"}


@pytest.mark.proof
def test_a_daemon_frozen_past_its_heartbeat_comes_back_without_harm(launch: Launch, database_url: str) -> None:
    fleet = launch(database_url)
    fleet.start(3)
    eventually(lambda: living(database_url) == 3)
    time.sleep(3)
    fleet.freeze(0)
    time.sleep(40)
    fleet.wake(0)
    time.sleep(12)
    assert living(database_url) == 3
    close_dead_runs(fleet, database_url)
    audit = Audit(database_url)
    audit.require_every_slot_once()
    audit.require_agreement(fleet)
    assert len(audit.runs) > 20


@pytest.mark.proof
def test_when_all_daemons_were_frozen_the_slots_of_that_time_had_no_daemon(launch: Launch, database_url: str) -> None:
    fleet = launch(database_url)
    fleet.start(2)
    eventually(lambda: accounted(database_url) > 1)
    for number in (0, 1):
        fleet.freeze(number)
    time.sleep(35)
    for number in (0, 1):
        fleet.wake(number)
    time.sleep(5)
    close_dead_runs(fleet, database_url)
    audit = Audit(database_url)
    audit.require_every_slot_once()
    audit.require_agreement(fleet)
    assert audit.reasons["no daemon alive"] > 25


@pytest.mark.proof
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_the_database_restarted_in_the_middle(launch: Launch, own_server: EmbeddedServer, mode: str) -> None:
    restart_in_the_middle(launch, own_server, own_server.conninfo, mode)


@pytest.mark.proof
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_the_database_restarted_behind_a_transaction_pooler(
    launch: Launch, own_server: EmbeddedServer, pgbouncer: str, mode: str
) -> None:
    # The pooler may hold a claim back without an error until the server is there again, and slots go by meanwhile.
    restart_in_the_middle(launch, own_server, pgbouncer, mode, "no daemon was free")


def restart_in_the_middle(launch: Launch, server: EmbeddedServer, url: str, mode: str, *further_reasons: str) -> None:
    fleet = launch(url)
    fleet.start(3)
    eventually(lambda: living(url) == 3)
    for pause in (0.0, 1.0, 4.0, 0.2):
        time.sleep(8)
        assert server._programs.run("pg_ctl", "stop", "-D", "data", "-m", mode, "-w").returncode == 0
        time.sleep(pause)
        server._launch()
    time.sleep(25)
    assert living(url) == 3
    close_dead_runs(fleet, url)
    audit = Audit(url)
    audit.require_every_slot_once()
    audit.require_agreement(fleet)
    assert set(audit.reasons) <= {"database unreachable", "still running", *further_reasons}, audit.reasons
    for daemon in range(3):
        outages = [event for event in fleet.events() if event.get("event") == "database_unreachable"]
        assert len(outages) <= 3 * 4, f"daemon {daemon} said once for each outage that it had met one"


@pytest.mark.proof
def test_behind_a_transaction_pooler_daemons_killed_every_few_seconds_leave_no_slot_out(
    launch: Launch, pgbouncer: str
) -> None:
    fleet = launch(pgbouncer)
    fleet.start(3)
    eventually(lambda: living(pgbouncer) == 3)
    kill_at_random(fleet, 30, (1, 4))
    close_dead_runs(fleet, pgbouncer)
    audit = Audit(pgbouncer)
    audit.require_every_slot_once()
    audit.require_agreement(fleet)


@pytest.mark.proof
def test_a_daemon_that_was_down_for_several_intervals_catches_up_once(launch: Launch, database_url: str) -> None:
    fleet = launch(database_url, interval=5)
    fleet.start()
    eventually(lambda: accounted(database_url) == 1)
    fleet.stop()
    # Down while the account of half an hour is moved back in time: 360 intervals.
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE catfeeder_cron.schedule SET accounted_until = accounted_until - interval '30 min'")
        connection.execute("DELETE FROM catfeeder_cron.job_runs")
    fleet.start()
    eventually(lambda: accounted(database_url) == 3)
    fleet.stop()
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT trigger, outcome, reason, missed FROM catfeeder_cron.job_runs WHERE job = %s ORDER BY slot", [JOB]
        ).fetchall()
    assert rows[0][:3] == ("schedule", "skipped", "no daemon alive")
    assert rows[0][3] >= 359
    assert [row[0] for row in rows[1:]] == ["catch_up", "schedule", "schedule"]
