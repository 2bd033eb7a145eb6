"""renew-oauth through Crons and the command line: statuses, what is printed, and what a starting daemon takes over."""

import asyncio
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from catfeeder_cron.config import OAuthSettings
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.renewal.entries import Entry
from catfeeder_cron.renewal.journal import new_journal
from catfeeder_cron.renewal.recovery import journal_folder
from catfeeder_cron.scheduler.crons import Crons
from tests.integration.oauth.conftest import World
from tests.integration.oauth.disasters import wait_until
from tests.integration.oauth.provider import Provider
from tests.support.loaded import LoadedProgram

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def config(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("STATE_DIRECTORY", str(world.state_directory))
    path = tmp_path / "config.toml"
    path.write_text(f'[database]\nurl = "{world.url}"\n')
    path.chmod(0o600)
    return path


@pytest.fixture
def run(config: Path, loaded: LoadedProgram) -> Run:
    """Runs a command to its end."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return loaded.run("--config", str(config), *arguments, folder=config.parent, environment=os.environ)

    return run


def test_renew_oaths_returns_0_and_84_with_the_client_that_is_handed_in(
    world: World, config: Path, provider: Provider
) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(200, json={"access_token": "of the transport"})

    id = world.add_link(provider.log_in("tom"))
    client = OAuthClient(OAuthSettings(), httpx.MockTransport(answer))
    with Crons(config=config, oauth=client) as crons:
        assert crons.renew_oaths() == 0
        assert world.link(id).token == "of the transport"
        assert asked == [provider.url]
        world.connection.execute('DROP TABLE "ActiveOauths"')
        assert crons.renew_oaths() == 84


def test_renew_oaths_works_where_an_event_loop_runs(
    world: World, config: Path, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    """As in an async web handler or a notebook, and with something due: without, nothing is asynchronous."""
    caplog.set_level("DEBUG", logger="catfeeder_cron")
    ids = [world.add_link(provider.log_in("tom")), world.add_link("nobody knows this")]

    async def handler() -> int:
        with Crons(config=config) as crons:
            return crons.renew_oaths()

    assert asyncio.run(handler()) == 0
    assert [provider.renewals["tom"], world.link(ids[0]).token != "old-access"] == [1, True]
    told = [record for record in caplog.records if "oauth_needs_new_login" in record.getMessage()]
    assert ["job=renew-oauth" in record.getMessage() for record in told] == [True], "the context of the log is kept"
    assert world.connection.execute("SELECT outcome FROM catfeeder_cron.job_runs").fetchall() == [("succeeded",)]


def test_run_once_tells_what_it_did_by_provider(world: World, run: Run, provider: Provider) -> None:
    world.add_link(provider.log_in("tom"))
    world.add_link(provider.log_in("tim"))
    dry = run("run-once", "renew-oauth", "--dry-run")
    assert (dry.returncode, provider.requests) == (0, [])
    assert "would renew 2" in dry.stdout
    assert "  acme: would renew 2" in dry.stdout
    done = run("run-once", "renew-oauth")
    assert (done.returncode, done.stderr) == (0, "")
    assert "due 2, renewed 2, needs reauth 0, failed 0, postponed 0" in done.stdout


def test_a_reason_of_ours_fails_the_command_in_one_line(world: World, run: Run, provider: Provider) -> None:
    world.connection.execute("UPDATE \"UserOauthConnection\" SET token_grabber_base_url = ''")
    world.add_link("r")
    done = run("run-once", "renew-oauth")
    assert done.returncode == 84
    assert "nothing could be renewed: acme: its token_grabber_base_url is empty" in done.stdout
    assert "Traceback" not in done.stderr


def test_forecast_prints_who_has_to_log_in(world: World, run: Run, provider: Provider) -> None:
    world.add_link("nobody knows this")
    run("run-once", "renew-oauth")
    shown = run("forecast")
    assert shown.returncode == 0
    assert "now" in shown.stdout
    assert "acme" in shown.stdout
    assert run("forecast", "--json").stdout.startswith("[\n  {")
    assert run("forecast", "--days", "1000000000").returncode == 2
    world.connection.execute('DELETE FROM "ActiveOauths"')
    assert run("forecast").stdout == "no link needs a new login within 30 days, as far as is known\n"


def test_a_starting_daemon_takes_over_what_dead_processes_left(world: World, config: Path, provider: Provider) -> None:
    """Long before its first slot: the token in the journal may be the only one that is good for anything."""
    id = world.add_link("sent")
    owner = uuid4()
    row = world.connection.execute(
        "INSERT INTO catfeeder_cron.oauth_tokens (oauth_id, owner, lease_until, sent, sent_at)"
        " VALUES (%s, %s, now() + interval '2 min', sha256('sent'), now()) RETURNING encode(sent, 'hex')",
        [id, owner],
    ).fetchone()
    assert row is not None
    with new_journal(journal_folder(world.context()), owner) as journal:
        journal.append(Entry(id, row[0], 4e9, "received", "next", 3600, lifespan_is_said=True, refresh_lifespan=None))
    with Crons(config=config) as crons:
        assert crons.inject_crons() == 0
        wait_until(lambda: world.link(id).token == "received")
        wait_until(lambda: not world.journals())
    assert world.link(id).refresh_link == "next"
    assert provider.requests == []
