"""Against django-oauth-toolkit: rotation on, reuse protection on. Its own records decide."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from catfeeder_cron.jobs import renew_oauth
from catfeeder_cron.scheduler.executor import run_job
from tests.integration.oauth.conftest import World

USERS = 160
SCRIPT = Path(__file__).with_name("authorization_server.py")


@dataclass
class Toolkit:
    port: int
    client_id: str
    client_secret: str
    tokens: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/o/token/"

    def records(self) -> dict[str, list[str]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/records", timeout=20) as answer:
            told: dict[str, list[str]] = json.load(answer)
        return told


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toolkit]:
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("provider")), str(USERS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Toolkit(**json.loads(process.stdout.readline()))
        finally:
            process.kill()


def links(world: World, toolkit: Toolkit, users: list[str], **settings: Any) -> dict[str, int]:
    world.settings |= {"request_timeout": 20, "providers": {"toolkit": {"concurrency": 4, **settings}}}
    world.add_provider(toolkit.url, "toolkit", secret=toolkit.client_secret)
    world.connection.execute('UPDATE "UserOauthConnection" SET client_id = %s', [toolkit.client_id])
    return {user: world.add_link(toolkit.tokens[user], "toolkit") for user in users}


def test_two_rounds_renew_every_user_and_the_rows_hold_what_the_server_has(world: World, toolkit: Toolkit) -> None:
    users = [f"user{number}" for number in range(USERS - 20)]
    ids = links(world, toolkit, users)
    for _ in range(2):
        report = world.renew()
        assert report.counts["renewed"] == len(users), report
        world.connection.execute('UPDATE "ActiveOauths" SET token_expiration = now()')
    records = toolkit.records()
    assert {user: [world.link(id).refresh_link] for user, id in ids.items()} == {user: records[user] for user in users}


@pytest.mark.parametrize("auth", ["basic", "body", None])
def test_either_method_works_with_a_secret_that_has_to_be_encoded(world: World, toolkit: Toolkit, auth: Any) -> None:
    users = [f"user{USERS - 1 - ['basic', 'body', None].index(auth)}"]
    links(world, toolkit, users, **({"client_auth": auth} if auth else {}))
    assert world.renew().counts["renewed"] == 1


def test_a_wrong_secret_spends_no_token_and_blames_nobody(world: World, toolkit: Toolkit) -> None:
    user = f"user{USERS - 5}"
    id = links(world, toolkit, [user])[user]
    world.connection.execute("UPDATE \"UserOauthConnection\" SET client_secret = 'wrong'")
    report = world.renew()
    assert report.outcome == "failed"
    assert report.counts["needs_reauth"] == 0

    world.connection.execute('UPDATE "UserOauthConnection" SET client_secret = %s', [toolkit.client_secret])
    assert world.renew().counts["renewed"] == 1
    assert toolkit.records()[user] == [world.link(id).refresh_link]


def test_a_spent_token_revokes_the_family_there_and_needs_a_login_here(world: World, toolkit: Toolkit) -> None:
    """So the server really is as strict as the other tests rely on."""
    user = f"user{USERS - 6}"
    id = links(world, toolkit, [user])[user]
    assert world.renew().counts["renewed"] == 1
    world.connection.execute(
        'UPDATE "ActiveOauths" SET refresh_link = %s, token_expiration = now() WHERE id = %s',
        [toolkit.tokens[user], id],
    )
    world.state_directory /= "of another machine"  # which does not know what was answered
    assert run_job(renew_oauth.JOB, world.context(), renew_oauth.JOB.settings()).counts["needs_reauth"] == 1
    assert user not in toolkit.records()
