"""A database with links to renew, providers to ask, and the job itself."""

import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, cast

import httpx
import psycopg
import pytest

from catfeeder_cron.config import DatabaseSettings, OAuthSettings
from catfeeder_cron.database import Database
from catfeeder_cron.job import JobContext, Resources
from catfeeder_cron.jobs import renew_oauth
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.oauth.provider import Provider as KnownProvider
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.report import JobReport
from catfeeder_cron.schedule import IntervalSchedule
from catfeeder_cron.scheduler.executor import run_job
from tests.integration.oauth.provider import Provider, running
from tests.support.loaded import LoadedProgram


@dataclass(frozen=True)
class Link:
    """A row of "ActiveOauths"."""

    token: str | None
    refresh_link: str
    token_lifespan: int
    seconds_left: float | None
    """None where the end is unknown or infinite."""


@cache
def certificates() -> ssl.SSLContext:
    """Read them once for all tests: that takes 30 ms."""
    return httpx.create_ssl_context()


@dataclass
class World:
    url: str
    database: Database
    connection: psycopg.Connection
    state_directory: Path
    loaded: LoadedProgram
    settings: dict[str, Any] = field(default_factory=lambda: {"request_timeout": 20})
    reports: list[JobReport] = field(default_factory=list)

    def add_provider(
        self, provider: Provider | str, name: str = "acme", secret: str | None = "client-secret-01"
    ) -> None:
        url = provider if isinstance(provider, str) else provider.url
        self.connection.execute('INSERT INTO "Services" (name) VALUES (%s)', [name])
        self.connection.execute(
            'INSERT INTO "UserOauthConnection" (provider_name, client_id, client_secret, token_grabber_base_url)'
            " VALUES (%s, 'client-id', %s, %s)",
            [name, secret, url],
        )

    def add_link(
        self, refresh_link: str | None, name: str = "acme", left: str | None = "1 min", span: int = 3600
    ) -> int:
        """Insert a row and return its id; `left` is the time until the token's end, NULL where that is unknown."""
        row = self.connection.execute(
            'INSERT INTO "ActiveOauths" (token, token_expiration, token_lifespan, refresh_link, service_id, user_id)'
            " SELECT 'old-access', now() + %s::interval, %s, %s, id, 7 FROM \"Services\" WHERE name = %s RETURNING id",
            [left, span, refresh_link, name],
        ).fetchone()
        assert row is not None
        return int(row[0])

    def link(self, id: int) -> Link:
        row = self.connection.execute(
            "SELECT token, refresh_link, token_lifespan,"
            " CASE WHEN isfinite(token_expiration) THEN extract(epoch FROM token_expiration - now())::float8 END"
            ' FROM "ActiveOauths" WHERE id = %s',
            [id],
        ).fetchone()
        assert row is not None
        return Link(*row)

    def context(
        self,
        *,
        database: Database | None = None,
        timeout: float = 300,
        every: timedelta = timedelta(minutes=30),
        **more: Any,
    ) -> JobContext:
        return JobContext(
            database=database or self.database,
            tables=DatabaseSettings.model_validate({}).tables,
            timeout=timedelta(seconds=timeout),
            schedule=IntervalSchedule(every, "renew-oauth"),
            resources=Resources(oauth=self.client(), state_directory=self.state_directory),
            **more,
        )

    def client(self) -> OAuthClient:
        client = OAuthClient(OAuthSettings.model_validate(self.settings))
        client._certificates = certificates()
        return client

    def renew(self, **options: Any) -> JobReport:
        return self.run(self.context(**options))

    def run(self, context: JobContext) -> JobReport:
        self.reports.append(run_job(renew_oauth.JOB, context, renew_oauth.JOB.settings()))
        return self.reports[-1]

    def let_time_pass(self) -> None:
        """End all back-offs, pauses and doubts, as if hours had gone by."""
        self.connection.execute(
            "UPDATE catfeeder_cron.oauth_tokens SET not_before = NULL, sent_at = sent_at - interval '1 h'"
        )
        self.connection.execute(
            "UPDATE catfeeder_cron.oauth_providers SET paused_until = paused_until - interval '1 day'"
        )

    def known_provider(self) -> KnownProvider:
        """Return acme as a run would ask it."""
        context = self.context()
        with context.transaction() as connection:
            known = providers.load(
                connection, Links.find(context.database, context.tables), context.resources.oauth.settings, ["acme"]
            )
        return known["acme"][0]

    def now(self) -> datetime:
        """Return what the database's clock says."""
        row = self.connection.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        return cast("datetime", row[0])

    def paused_until(self) -> datetime | None:
        """Return until when the only provider that is known of is paused."""
        row = self.connection.execute("SELECT paused_until FROM catfeeder_cron.oauth_providers").fetchone()
        return row[0] if row else None

    def journals(self) -> list[Path]:
        """Return the files of runs that are under way or were broken off."""
        return list(self.state_directory.rglob("*.journal"))

    def written_down(self) -> int:
        """Return how many answers stand in journals."""
        return sum(path.read_bytes().count(b'"sent"') for path in self.journals())

    def kept(self) -> list[Path]:
        """Return the files with answers that are stored."""
        return list(self.state_directory.rglob("*.answers"))

    def leases(self) -> int:
        row = self.connection.execute("SELECT count(owner) FROM catfeeder_cron.oauth_tokens").fetchone()
        assert row is not None
        return int(row[0])


@pytest.fixture
def world(database_url: str, with_tables: None, tmp_path: Path, loaded: LoadedProgram) -> Iterator[World]:
    settings = DatabaseSettings.model_validate({"url": database_url})
    with Database(settings) as database, psycopg.connect(database_url, autocommit=True) as connection:
        yield World(database_url, database, connection, tmp_path / "state", loaded)


@pytest.fixture
def serve() -> Iterator[Callable[..., Provider]]:
    """Starts a provider with the given behaviour."""
    with ExitStack() as opened:
        yield lambda **behaviour: opened.enter_context(running(Provider(**behaviour)))


@pytest.fixture
def provider(serve: Callable[..., Provider], world: World) -> Provider:
    """A strict provider, named acme in the database."""
    strict = serve()
    world.add_provider(strict)
    return strict
