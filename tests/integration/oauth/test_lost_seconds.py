"""A server that lost its last seconds, or a restored backup: no received token is lost, and no spent one is sent.

The rows are put back by SQL to what they were, as a restored dump puts them back; the provider is strict, and its
records decide.
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Database
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.job import JobContext
from catfeeder_cron.jobs import renew_oauth
from catfeeder_cron.renewal import hosts
from catfeeder_cron.scheduler.crons import Crons
from catfeeder_cron.times import elapsed_seconds
from tests.integration.oauth.conftest import World
from tests.integration.oauth.disasters import processes, stored, wait_until
from tests.integration.oauth.provider import Provider, Raw, Request
from tests.support.waiting import SOON

TABLES = ('"ActiveOauths"', "catfeeder_cron.oauth_tokens", "catfeeder_cron.oauth_hosts", "catfeeder_cron.lineage")

MINUTE = 60


def back_up(world: World) -> None:
    world.connection.execute("DROP SCHEMA IF EXISTS backup CASCADE; CREATE SCHEMA backup")
    for number, table in enumerate(TABLES):
        world.connection.execute(f"CREATE TABLE backup.t{number} AS TABLE {table}".encode())


def restore(world: World) -> None:
    """Set all rows back; no process has noticed anything."""
    with world.connection.transaction():
        for number, table in enumerate(TABLES):
            world.connection.execute(f"DELETE FROM {table}".encode())
            # The identity of "ActiveOauths" is restored as well.
            overriding = "OVERRIDING SYSTEM VALUE" if number == 0 else ""
            world.connection.execute(f"INSERT INTO {table} {overriding} SELECT * FROM backup.t{number}".encode())


def history_went_back(world: World, seconds_ago: float) -> None:
    """Do what the first heartbeat does that notices it."""
    world.connection.execute(
        "UPDATE catfeeder_cron.lineage SET id = gen_random_uuid(), since = now() - %s * interval '1 s',"
        " reason = 'a test', server = catfeeder_cron.server()",
        [seconds_ago],
    )


def notice(*worlds: World) -> None:
    """Do what each heartbeat does."""
    for world in worlds:
        row = world.connection.execute(
            "SELECT id, since, reason, server, counter FROM catfeeder_cron.lineage"
        ).fetchone()
        assert row is not None
        world.database.lineage = Lineage(*row)


def recover(world: World) -> None:
    assert renew_oauth.JOB.recover is not None
    renew_oauth.JOB.recover(world.context())


def make_due(world: World) -> None:
    world.let_time_pass()
    world.connection.execute('UPDATE "ActiveOauths" SET token_expiration = now()')


def restored(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Return how many answers were put back, for each time that this was logged."""
    messages = [record.getMessage() for record in caplog.records]
    words = [message.split() for message in messages if message.startswith("oauth_answers_restored")]
    return [int(part.removeprefix("answers=")) for each in words for part in each if part.startswith("answers=")]


def log_in(world: World, provider: Provider, count: int) -> tuple[list[int], set[str]]:
    users = [f"user{number}" for number in range(count)]
    return [world.add_link(provider.log_in(user)) for user in users], set(users)


@pytest.fixture
def other(world: World) -> Iterator[World]:
    """Another host: its state folder, its connections."""
    with Database(DatabaseSettings.model_validate({"url": world.url})) as database:
        yield replace(world, database=database, state_directory=world.state_directory.parent / "other", reports=[])


def test_a_row_that_went_back_gets_its_answer_instead_of_a_request(
    world: World, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has noticed that history went back."""
    _, users = log_in(world, provider, 12)
    back_up(world)
    assert world.renew().counts["renewed"] == 12
    restore(world)

    report = world.renew()

    assert (report.outcome, report.counts["due"], len(provider.requests)) == ("succeeded", 0, 12)
    assert stored(world, provider) == users
    assert restored(caplog) == [12]
    assert world.leases() == 0
    make_due(world)
    assert world.renew().counts["renewed"] == 12
    assert provider.reused == []


def test_recovery_puts_answers_back_before_their_rows_are_due(
    world: World, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    _, users = log_in(world, provider, 5)
    back_up(world)
    world.renew()
    restore(world)
    world.connection.execute("UPDATE \"ActiveOauths\" SET token_expiration = now() + interval '1 day'")

    recover(world)
    recover(world)

    assert stored(world, provider) == users
    assert restored(caplog) == [5]


def test_a_chain_of_renewals_is_followed_to_its_end(world: World, provider: Provider) -> None:
    [id], users = log_in(world, provider, 1)
    back_up(world)
    world.renew()
    make_due(world)
    world.renew()
    restore(world)
    assert world.renew().counts["due"] == 0
    assert stored(world, provider) == users
    left = world.link(id).seconds_left
    assert left is not None
    assert 3600 - 2 * SOON < left <= 3600
    assert provider.reused == []


def test_an_answer_that_is_put_back_when_its_token_is_over_is_renewed_in_the_same_run(
    world: World, provider: Provider
) -> None:
    """By the refresh token in the answer."""
    provider.expires_in = 1
    _, users = log_in(world, provider, 3)
    back_up(world)
    world.renew()
    restore(world)
    assert world.renew().counts["renewed"] == 3
    assert stored(world, provider) == users
    assert provider.reused == []


def test_a_newer_login_is_never_overwritten(world: World, provider: Provider) -> None:
    ids, _ = log_in(world, provider, 2)
    back_up(world)
    world.renew()
    restore(world)
    login = provider.log_in("user0")
    world.connection.execute('UPDATE "ActiveOauths" SET refresh_link = %s WHERE id = %s', [login, ids[0]])
    recover(world)
    assert world.link(ids[0]).refresh_link == login
    assert world.renew().counts["renewed"] == 1
    assert stored(world, provider) == {"user0", "user1"}
    assert provider.reused == []


def test_what_the_forecast_knows_of_a_link_outlives_the_lost_seconds(world: World, provider: Provider) -> None:
    """When its user has logged in: a renewal does not prolong what the provider allows."""
    log_in(world, provider, 1)
    world.renew()
    world.connection.execute("UPDATE catfeeder_cron.oauth_tokens SET consented_at = now() - interval '100 days'")
    make_due(world)
    back_up(world)
    world.renew()
    restore(world)
    recover(world)
    make_due(world)
    assert world.renew().counts["renewed"] == 1
    ages = world.connection.execute("SELECT now() - consented_at FROM catfeeder_cron.oauth_tokens").fetchall()
    assert ages[0][0] > timedelta(days=99)


def test_the_second_of_two_links_with_one_refresh_token_gets_the_answer_as_well(
    world: World, provider: Provider
) -> None:
    token = provider.log_in("tom")
    first = world.add_link(token)
    world.renew()
    second = world.add_link(token)
    assert world.renew().counts["due"] == 0
    assert world.link(first).refresh_link == world.link(second).refresh_link
    assert provider.reused == []


def test_a_locked_row_gets_its_answer_later(world: World, provider: Provider) -> None:
    ids, users = log_in(world, provider, 3)
    back_up(world)
    world.renew()
    restore(world)
    with psycopg.connect(world.url) as web:
        web.execute('SELECT FROM "ActiveOauths" WHERE id = %s FOR UPDATE', [ids[0]])
        recover(world)
        assert len(stored(world, provider)) == 2
    world.renew()
    assert stored(world, provider) == users
    assert provider.reused == []


def test_no_answer_is_kept_longer_than_it_is_told_to(world: World, provider: Provider) -> None:
    log_in(world, provider, 1)
    world.settings["keep_answers"] = 0
    world.renew()
    assert world.kept() == []

    world.settings["keep_answers"] = "1h"
    make_due(world)
    world.renew()
    assert len(world.kept()) == 1
    world.settings["keep_answers"] = 0
    assert renew_oauth.JOB.tend is not None
    renew_oauth.JOB.tend(world.context())
    assert world.kept() == []


def test_a_daemon_deletes_old_answers_though_it_renews_nothing(
    world: World, provider: Provider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(world.state_directory))
    log_in(world, provider, 1)
    world.renew()
    [path] = world.kept()
    (config := tmp_path / "config.toml").write_text(
        f'[database]\nurl = "{world.url}"\n[oauth]\nkeep_answers = "2s"\n[jobs.renew-oauth]\nenabled = false\n'
    )
    config.chmod(0o600)
    boot = path.name.split(".")[1].partition("-")[0]
    path.rename(path.with_name(f"{uuid4()}.{boot}-{int(elapsed_seconds()) - 5}.answers"))
    with Crons(config=config) as crons:
        assert crons.inject_crons() == 0
        wait_until(lambda: world.kept() == [])


@contextmanager
def running(world: World, context: JobContext) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=world.run, args=[context])
    thread.start()
    try:
        yield thread
    finally:
        thread.join(SOON)


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.getMessage().startswith("oauth_waits_for_other_hosts")
    ]


def two_hosts_of_which_the_other_renews(world: World, other: World, provider: Provider, count: int) -> set[str]:
    """Have both hosts known as renewing, then have the other one renew what is lost afterwards."""
    notice(world, other)
    for each in (world, other):
        each.add_link(provider.log_in(f"first of {each.state_directory.name}"))
        assert each.renew().counts["renewed"] == 1
    world.connection.execute('DELETE FROM "ActiveOauths"')
    _, users = log_in(world, provider, count)
    back_up(world)
    assert other.renew().counts["renewed"] == count
    restore(world)
    return users


def test_nothing_is_sent_until_the_other_host_has_put_back_its_answers(
    world: World, other: World, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    users = two_hosts_of_which_the_other_renews(world, other, provider, 8)
    asked = len(provider.requests)
    history_went_back(world, 31)
    notice(world, other)

    with running(world, world.context()):
        wait_until(lambda: waits(caplog))
        recover(other)

    assert world.reports[-1].outcome == "succeeded"
    assert len(provider.requests) == asked
    assert stored(world, provider) == users
    [said] = waits(caplog)
    assert f"hosts={socket.gethostname()} " in said
    assert restored(caplog) == [8]


def test_each_host_has_half_a_minute_to_be_heard_of(world: World, other: World, provider: Provider) -> None:
    """The other one renewed for the first time in the seconds that are lost, so nobody knows of it."""
    notice(world, other)
    _, users = log_in(world, provider, 3)
    recover(world)
    back_up(world)
    other.renew()
    restore(world)
    history_went_back(world, 10)
    notice(world, other)
    asked = len(provider.requests)

    assert world.renew(timeout=3).outcome == "timed_out"
    recover(other)
    world.connection.execute("UPDATE catfeeder_cron.lineage SET since = now() - interval '31 s'")
    assert world.renew().outcome == "succeeded"

    assert len(provider.requests) == asked
    assert stored(world, provider) == users


def test_a_host_whose_folder_is_gone_is_waited_for_five_minutes_and_no_longer(
    world: World, other: World, provider: Provider
) -> None:
    two_hosts_of_which_the_other_renews(world, other, provider, 1)
    shutil.rmtree(other.state_directory)
    history_went_back(world, 4 * MINUTE)
    notice(world)
    asked = len(provider.requests)
    assert world.renew(timeout=3).outcome == "timed_out"
    assert len(provider.requests) == asked
    world.connection.execute("UPDATE catfeeder_cron.lineage SET since = now() - interval '301 s'")
    assert world.renew().counts["due"] == 1
    assert len(provider.requests) == asked + 1


def test_hosts_that_renew_no_more_are_not_waited_for(world: World, other: World, provider: Provider) -> None:
    two_hosts_of_which_the_other_renews(world, other, provider, 1)
    world.connection.execute(
        "UPDATE catfeeder_cron.oauth_hosts SET renewed_at = renewed_at - interval '2 h' WHERE folder = %s",
        [hosts.require_host(other.state_directory).folder],
    )
    history_went_back(world, 31)
    notice(world)
    assert world.renew(timeout=20).outcome == "succeeded"


def test_by_an_old_backup_the_hosts_that_renewed_last_are_waited_for(
    world: World, other: World, provider: Provider
) -> None:
    two_hosts_of_which_the_other_renews(world, other, provider, 1)
    world.connection.execute("UPDATE catfeeder_cron.oauth_hosts SET renewed_at = renewed_at - interval '2 days'")
    history_went_back(world, 31)
    notice(world)
    asked = len(provider.requests)
    assert world.renew(timeout=3).outcome == "timed_out"
    assert len(provider.requests) == asked


@pytest.mark.parametrize("first", ["world", "other"])
def test_a_chain_over_two_hosts_is_followed_whoever_looks_first(
    world: World, other: World, provider: Provider, first: str
) -> None:
    notice(world, other)
    for each in (world, other):
        each.add_link(provider.log_in(f"first of {each.state_directory.name}"))
        each.renew()
    world.connection.execute('DELETE FROM "ActiveOauths"')
    _, users = log_in(world, provider, 3)
    back_up(world)
    provider.expires_in = 60  # so an answer that is put back is due at once
    assert other.renew().counts["renewed"] == 3
    make_due(world)
    assert world.renew().counts["renewed"] == 3
    restore(world)
    history_went_back(world, 31)
    notice(world, other)

    both = [world, other] if first == "world" else [other, world]
    recover(both[0])
    with running(both[0], both[0].context()), running(both[1], both[1].context()):
        pass

    assert [each.reports[-1].outcome for each in both] == ["succeeded"] * 2
    assert provider.reused == []
    assert stored(world, provider) == users


def test_a_folder_in_which_a_run_is_under_way_is_not_looked_through_yet(
    world: World, other: World, provider: Provider
) -> None:
    """Its run may still get answers to what it sent before it noticed."""
    notice(world, other)
    other.add_link(provider.log_in("first"))
    other.renew()
    log_in(world, provider, 1)
    let_go = threading.Event()

    async def late(request: Request) -> Raw:
        await asyncio.to_thread(let_go.wait, SOON)
        return provider.renew(request)

    provider.script = late
    with running(other, other.context()):
        wait_until(lambda: len(provider.requests) == 2)
        history_went_back(world, 31)
        notice(world, other)
        recover(other)
        world.add_link("something due")
        assert world.renew(timeout=3).outcome == "timed_out"
        assert len(provider.requests) == 2
        let_go.set()
    assert other.reports[-1].outcome == "failed"
    assert "lost its last seconds" in (other.reports[-1].reason or "")
    provider.script = None
    assert world.renew(timeout=60).outcome == "succeeded"
    assert len(provider.requests) == 3  # what is due, and nothing that was sent before


def test_a_run_whose_server_loses_seconds_claims_nothing_more_and_says_so(world: World, provider: Provider) -> None:
    """It has not noticed. The next run, which has, puts right what was lost."""
    _, users = log_in(world, provider, 200)
    back_up(world)
    notice(world)

    def lose(request: Request) -> Raw:
        answer = provider.renew(request)
        if len(provider.requests) == 8:
            restore(world)
            history_went_back(world, 31)
        return answer

    provider.script = lose
    report = world.renew()
    asked = len(provider.requests)
    assert report.outcome == "failed"
    assert "the database has lost its last seconds" in (report.reason or "")
    assert asked <= 8 + 4 * 8  # under way, claimed and being claimed

    notice(world)
    provider.script = None
    assert world.renew().outcome == "succeeded"
    assert stored(world, provider) == users
    assert provider.reused == []


def test_a_run_on_a_server_that_went_back_unnoticed_waits_for_a_heartbeat(world: World, provider: Provider) -> None:
    notice(world)
    log_in(world, provider, 3)
    world.connection.execute("UPDATE catfeeder_cron.lineage SET counter = counter - 1")
    assert world.renew(timeout=3).outcome == "timed_out"
    world.connection.execute("UPDATE catfeeder_cron.lineage SET counter = counter + 1, server = 'another'")
    assert world.renew(timeout=3).outcome == "timed_out"
    assert provider.requests == []


def test_a_dry_run_says_what_a_run_would_wait_for(world: World, other: World, provider: Provider) -> None:
    two_hosts_of_which_the_other_renews(world, other, provider, 2)
    history_went_back(world, 31)
    world.database.lineage = None  # a dry run sends no heartbeat
    report = world.renew(dry_run=True)
    assert report.counts["would_renew"] == 2
    assert "hosts may have answers that it has lost; they have not put back yet:" in report.provider_reasons["acme"]
    assert socket.gethostname() in report.provider_reasons["acme"]


def test_what_a_killed_process_had_stored_is_put_back_too(world: World, provider: Provider) -> None:
    _, users = log_in(world, provider, 40)
    back_up(world)
    provider.delay = 0.1
    with processes(world) as start:
        process = start()
        wait_until(lambda: len(stored(world, provider)) >= 10)
        process.kill()
        process.wait()
    known = stored(world, provider)
    restore(world)
    world.renew()
    world.let_time_pass()
    provider.delay = 0
    world.renew()
    # What nobody had read when the process was killed is the only thing that may be lost.
    assert known <= stored(world, provider)
    assert len(users - stored(world, provider)) <= 8
    assert not set(provider.reused) & known


def test_files_of_others_and_torn_lines_cost_no_link(world: World, provider: Provider, tmp_path: Path) -> None:
    _, users = log_in(world, provider, 4)
    back_up(world)
    world.renew()
    [path] = world.kept()
    path.write_bytes(b"torn\n" + path.read_bytes() + b'12345678+{"id": 1, "sent": "')
    (path.parent / f"{uuid4()}.answers").symlink_to(tmp_path / "nowhere")
    (path.parent / f"{uuid4()}.journal").symlink_to(tmp_path / "nowhere")
    restore(world)
    world.renew()
    assert stored(world, provider) == users
    assert provider.reused == []


LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.mark.skipif(LIBFAKETIME is None, reason="libfaketime is not installed")
def test_what_is_due_does_not_depend_on_this_machines_clock(world: World, provider: Provider, tmp_path: Path) -> None:
    """A token that outlasts the next run of a job that runs every 30 minutes, on a machine that is 50 minutes ahead."""
    world.add_link(provider.log_in("tom"), left="50 min")
    config = tmp_path / "config.toml"
    config.write_text(f'[database]\nurl = "{world.url}"\n')
    config.chmod(0o600)
    command = ["--config", str(config), "run-once", "renew-oauth", "--dry-run", "--json"]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(LIBFAKETIME),
        "FAKETIME": "+50m",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "STATE_DIRECTORY": str(world.state_directory),
    }
    done = subprocess.run(
        [sys.executable, "-m", "catfeeder_cron", *command], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)[0]["counts"] == {"would_renew": 0}
