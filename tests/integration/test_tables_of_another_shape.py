"""Jobs on tables that are not as they need them: a run says what `check` says, and not what PostgreSQL makes of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from catfeeder_cron import Crons
from catfeeder_cron.checks import check
from catfeeder_cron.database import Database
from tests.support.waiting import eventually


@pytest.fixture
def crons(
    with_tables: None, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Crons]]:
    """Opens one on the tables that `init-db --with-app-tables` creates."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    opened: list[Crons] = []

    def open_one(url: str = database_url) -> Crons:
        path = tmp_path / "config.toml"
        path.write_text(f'[database]\nurl = "{url}"\n')
        path.chmod(0o600)
        opened.append(Crons(config=path))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def reason(crons: Crons, job: str) -> str:
    report = crons.run(job)
    assert report.outcome == "failed"
    return report.reason or ""


def told_by_check(crons: Crons, database: Database, job: str) -> list[str]:
    return [
        found.message for found in check(crons.settings, database) if (found.subject, found.level) == (job, "error")
    ]


@pytest.mark.parametrize(
    ("change", "job", "told"),
    [
        (
            'ALTER TABLE "ActiveOauths" DROP COLUMN service_id',
            "renew-oauth",
            'table "public"."ActiveOauths" has no column service_id; correct [database.tables], or add what is missing',
        ),
        (  # In no statement before a token was sent, whose answer could then not be stored.
            'ALTER TABLE "ActiveOauths" DROP COLUMN token',
            "renew-oauth",
            'table "public"."ActiveOauths" has no column token; correct [database.tables], or add what is missing',
        ),
        (
            'ALTER TABLE "ActiveOauths" ALTER token_lifespan TYPE text',
            "renew-oauth",
            'column "token_lifespan" of table "public"."ActiveOauths" is text, not a number; '
            "correct [database.tables], or the column's type",
        ),
        (
            'ALTER TABLE "UserOauthConnection" DROP COLUMN client_secret',
            "renew-oauth",
            'table "public"."UserOauthConnection" has no column client_secret; correct [database.tables], or add what '
            "is missing",
        ),
        (
            'DROP TABLE "Actions" CASCADE; CREATE TABLE "Actions" (id bigint, name text, due_at timestamptz)',
            "check-actions",
            'table "public"."Actions" has no column user_id, kind, payload, repeat_every, state, lease_owner, '
            "last_error, attempts, max_attempts, lease_until; if that table is another program's, name Cat Feeder's "
            "own in [database.tables] actions, or let the job rest: `catfeeder-cron pause check-actions`; else add "
            "what is missing",
        ),
        (
            'ALTER TABLE "Pet" DROP COLUMN time_reset_hours',
            "reset-food-counters",
            'table "public"."Pet" has no column time_reset_hours; correct [database.tables], or add what is missing',
        ),
    ],
)
def test_a_run_fails_with_what_check_says(
    crons: Callable[..., Crons],
    database: Database,
    admin: psycopg.Connection,
    change: str,
    job: str,
    told: str,
) -> None:
    admin.execute(change.encode())
    opened = crons()
    assert reason(opened, job) == told
    if job != "reset-food-counters":  # which is not enabled
        assert told_by_check(opened, database, job) == [told]


def test_all_that_is_missing_is_told_at_once(crons: Callable[..., Crons], admin: psycopg.Connection) -> None:
    admin.execute('DROP TABLE "Services" CASCADE; ALTER TABLE "ActiveOauths" DROP COLUMN service_id')
    told = reason(crons(), "renew-oauth")
    assert 'table "public"."ActiveOauths" has no column service_id' in told
    assert 'there is no table "public"."Services"' in told
    assert "SQLSTATE" not in told


def test_what_a_role_may_not_do_is_told_with_the_grant(
    crons: Callable[..., Crons], admin: psycopg.Connection, role: Callable[..., tuple[str, str]]
) -> None:
    name, url = role()
    admin.execute(f'GRANT USAGE ON SCHEMA catfeeder_cron, public TO "{name}"'.encode())
    admin.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA catfeeder_cron TO "{name}"'.encode())
    admin.execute(
        f'GRANT SELECT, UPDATE ON "Actions" TO "{name}"; INSERT INTO "Actions" (kind, due_at)'
        " VALUES ('webhook', now())".encode()
    )
    told = reason(crons(url), "check-actions")
    assert f'role "{name}" lacks INSERT on "public"."ActionLog"; its owner can say: GRANT INSERT ON' in told


def test_who_looks_for_due_actions_says_it_too(
    crons: Callable[..., Crons], admin: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    admin.execute('ALTER TABLE "Actions" DROP COLUMN state CASCADE')
    opened = crons()
    assert opened.inject_crons() == 0
    eventually(lambda: "waker_failed" in caplog.text)
    told = next(record.getMessage() for record in caplog.records if "waker_failed" in record.getMessage())
    assert 'table "public"."Actions" has no column state; if that table is another program' in told


def test_a_statement_of_ones_own_is_told_as_postgresql_tells_it(
    crons: Callable[..., Crons], database_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        f'[database]\nurl = "{database_url}"\n[jobs.own]\ninterval = 3600\nsql = "SELECT paws FROM \\"Pet\\""\n'
    )
    path.chmod(0o600)
    with Crons(config=path) as opened:
        assert reason(opened, "own") == 'column "paws" does not exist (SQLSTATE 42703)'
