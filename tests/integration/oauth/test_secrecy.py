"""No token and no client secret in a log at any level, an error, a traceback, the history or the daemon's tables."""

import io
import json
import logging
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, quote_plus

import httpx
import pytest

from catfeeder_cron import logs
from catfeeder_cron.oauth.client import OAuthClient
from tests.integration.oauth.conftest import World
from tests.integration.oauth.provider import Provider, Raw, Request, reply

Serve = Callable[..., Provider]
CLIENT_SECRET = "client-secret-of-ours-9876"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, at debug level, as the program's own handler writes it."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    yield stream
    root.handlers[:], root.level = before[0], before[1]
    for name in ("apscheduler", "httpx", "psycopg.pool", "httpcore"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def told(world: World, log: io.StringIO) -> str:
    tables = ["job_runs", "oauth_tokens", "oauth_providers", "daemons"]
    dump = [
        str(row)
        for table in tables
        for row in world.connection.execute(f"SELECT to_jsonb(t) FROM catfeeder_cron.{table} t".encode())
    ]
    reports = [json.dumps(report.as_json()) for report in world.reports]
    return "\n".join([log.getvalue(), *dump, *reports])


def leaks(text: str, secrets: set[str]) -> set[str]:
    return {secret for secret in secrets if secret and (secret in text or secret[:16] in text)}


def echoing(provider: Provider, kind: int, request: Request) -> Raw:
    """Answers that quote what was sent, in every place that is shown to somebody."""
    sent = request.form["refresh_token"]
    provider.secrets.add(sent)
    quoted = f"no use for {sent} of {CLIENT_SECRET} " + "access-that-is-new-123"
    answers = [
        reply(400, {"error": "invalid_grant", "error_description": quoted}),
        reply(400, {"error": quoted}),
        reply(400, {"error": "invalid_scope", "error_description": quoted}),
        reply(500, {"message": quoted}),
        reply(200, {"error": quoted, "refresh_token": None}),
        reply(302, b"", {"location": f"/?token={sent}"}),
        reply(200, f"<html>{quoted}".encode()),
        reply(200, {"refresh_token": sent + "-next", "error": quoted}),
        reply(429, {"message": quoted}, {"retry-after": sent}),
        Raw(f"HTTP/1.1 {sent}\r\n\r\n".encode()),
        Raw(f"HTTP/1.1 200 OK\r\n{sent}\r\n\r\n".encode()),
    ]
    return answers[kind] if kind < len(answers) else provider.renew(request)


def test_whatever_a_provider_quotes_is_not_told(world: World, serve: Serve, log: io.StringIO) -> None:
    secrets = {CLIENT_SECRET, "access-that-is-new-123"}
    providers = []
    for kind in range(13):
        each = serve()
        each.script = lambda request, each=each, kind=kind: echoing(each, kind, request)
        world.add_provider(each, f"provider-{kind}", CLIENT_SECRET)
        for number in range(2):
            world.add_link(each.log_in(f"user-{kind}-{number}"), f"provider-{kind}")
        providers.append(each)
    for _ in range(2):
        assert world.renew().counts["due"]
        world.let_time_pass()
    for each in providers:
        secrets |= each.secrets
    text = told(world, log)
    assert "oauth_provider_paused" in text
    assert "oauth_needs_new_login" in text
    assert leaks(text, secrets) == set()


def test_nor_in_the_forms_in_which_it_was_sent(world: World, serve: Serve, log: io.StringIO) -> None:
    secret = "a secret with : and % and +"
    basic = b64encode(f"client-id:{quote_plus(secret)}".encode()).decode()
    for number, quoted in enumerate((basic, quote_plus(secret), quote(secret))):
        told_back = {"error": "invalid_scope", "error_description": f"you sent {quoted}"}
        name = f"provider-{number}"
        world.settings.setdefault("providers", {})[name] = {"client_auth": "basic"}
        world.add_provider(serve(script=lambda _, back=told_back: reply(400, back)), name, secret)
        world.add_link("refresh-0123456789", name)
    assert world.renew().outcome == "failed"
    text = told(world, log)
    assert "invalid_scope" in text
    assert leaks(text, {secret, quote_plus(secret), quote(secret), basic}) == set()


def test_a_trigger_that_quotes_a_token_is_not_quoted(world: World, provider: Provider, log: io.StringIO) -> None:
    world.connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no %', NEW.token; END $$"
    )
    world.connection.execute(
        'CREATE TRIGGER refuse BEFORE UPDATE ON "ActiveOauths" FOR EACH ROW EXECUTE FUNCTION refuse()'
    )
    world.add_link(provider.log_in("tom"))
    assert world.renew().counts["failed"] == 1
    text = told(world, log)
    assert "oauth_answer_refused" in text
    assert leaks(text, provider.secrets) == set()


def test_a_database_that_refuses_a_token_does_not_quote_it(world: World, serve: Serve, log: io.StringIO) -> None:
    each = serve()
    world.add_provider(each, secret=CLIENT_SECRET)
    world.connection.execute("ALTER TABLE \"ActiveOauths\" ADD CHECK (token NOT LIKE 'access%')")
    world.add_link(each.log_in("tom"))
    assert world.renew().counts["failed"] == 1
    text = told(world, log)
    assert "oauth_answer_refused" in text
    assert leaks(text, each.secrets | {CLIENT_SECRET}) == set()


class Exploding(httpx.AsyncBaseTransport):
    """Fails as no library should, with all it knows in its message."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:  # noqa: ARG002
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("something unforeseen") from error


def test_a_traceback_shows_no_variables_and_the_next_run_makes_up_for_it(
    world: World, serve: Serve, log: io.StringIO
) -> None:
    each = serve()
    world.add_provider(each, secret=CLIENT_SECRET)
    for number in range(20):
        world.add_link(each.log_in(f"user{number}"))
    context = world.context()
    context.resources = replace(context.resources, oauth=OAuthClient(context.resources.oauth.settings, Exploding()))
    assert world.run(context).outcome == "failed"
    text = told(world, log)
    assert "Traceback" in text
    assert leaks(text, each.secrets | {CLIENT_SECRET}) == set()

    assert world.renew().counts["renewed"] == 20
    assert world.leases() == 0


def test_the_program_itself_tells_nothing_at_debug_level(world: World, serve: Serve, tmp_path: Path) -> None:
    each = serve()
    world.add_provider(each, secret=CLIENT_SECRET)
    for number in range(5):
        world.add_link(each.log_in(f"user{number}"))
    world.add_link("a-token-that-nobody-knows-0123")
    config = tmp_path / "config.toml"
    config.write_text(f'[database]\nurl = "{world.url}"\n[logging]\nlevel = "debug"\n')
    config.chmod(0o600)
    program = [sys.executable, "-m", "catfeeder_cron", "--config", str(config)]
    said = ""
    for command in (["run-once", "renew-oauth", "--json"], ["history", "--json"], ["forecast", "--json"]):
        done = subprocess.run(
            [*program, *command], env={"STATE_DIRECTORY": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        said += done.stdout + done.stderr
    assert '"renewed": 5' in said
    assert "the provider called its refresh token invalid" in said
    assert leaks(said, each.secrets | {CLIENT_SECRET, "a-token-that-nobody-knows-0123"}) == set()
