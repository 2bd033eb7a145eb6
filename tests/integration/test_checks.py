"""`check`: every line of what the enabled jobs rely on, and what helps where it is missing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from catfeeder_cron.checks import check
from catfeeder_cron.config import DatabaseTables, OAuthSettings, load
from catfeeder_cron.database import Database
from catfeeder_cron.database.embedded import EmbeddedServer
from catfeeder_cron.jobs import load_settings
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.checks import check_links
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.report import Finding
from tests.integration.zones import named

Findings = Callable[..., list[Finding]]

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def findings(database_url: str, tmp_path: Path) -> Findings:
    """Gives what `check` finds with these jobs and as this user."""

    def find(jobs: str = "", url: str = database_url, mode: int = 0o600, environ: dict[str, str] | None = None) -> Any:
        path = tmp_path / "config.toml"
        path.write_text(f"[database]\nurl = '{url}'\n{jobs}\n")
        path.chmod(mode)
        settings = load_settings(path, environ=environ or {})
        with Database(settings.database) as database:
            return list(check(settings, database))

    return find


@pytest.fixture
def complete(with_indexes: None, database_url: str) -> None:
    """All that `init-db --with-app-tables --with-indexes` creates."""


def worst(findings: list[Finding], subject: str) -> Finding:
    """The gravest finding about the subject."""
    of_it = [finding for finding in findings if finding.subject == subject]
    assert of_it, findings
    return max(of_it, key=lambda finding: ("ok", "warning", "error").index(finding.level))


RESET = "[jobs.reset-food-counters]\nenabled = true"


def test_where_all_is_there_every_line_is_ok(findings: Findings, complete: None) -> None:
    found = findings(RESET)

    assert {finding.level for finding in found} == {"ok"}, found
    assert {"configuration", "database", "clock", "schema", "clean-tokens", "clean-verification"} <= {
        finding.subject for finding in found
    }


NAIVE = (("Connections", "expiration_date"), ("Pet", "food_reset"), ("ActiveOauths", "token_expiration"))


@pytest.fixture
def naive(admin: psycopg.Connection, complete: None) -> psycopg.Connection:
    """A database in which some columns have no zone."""
    for table, column in (*NAIVE, ("Connections", "creation_date"), ("Connections", "edit_date")):
        admin.execute(f'ALTER TABLE "{table}" ALTER {column} TYPE timestamp'.encode())
    return admin


def test_each_column_without_a_zone_is_named_with_the_zone_that_it_is_taken_in(
    findings: Findings, naive: psycopg.Connection
) -> None:
    unset = [each for each in findings(RESET) if "time zone" in each.message]
    said = [each for each in findings(f"naive_timestamps = 'Europe/Paris'\n{RESET}") if "time zone" in each.message]

    assert {finding.level for finding in unset} == {"warning"}
    assert {finding.level for finding in said} == {"ok"}
    for found, zone in ((unset, "UTC"), (said, "Europe/Paris")):
        assert len(found) == len(NAIVE)
        for table, column in NAIVE:
            assert any(f'"{table}" ({column}) has no time zone' in each.message for each in found)
        assert all(f"taken in {zone}" in each.message for each in found)


@pytest.mark.parametrize(
    ("configured", "written", "ahead"),
    [
        ("UTC", "Asia/Tokyo", "9h"),
        ("America/New_York", "Asia/Kathmandu", "(645|585)m"),
        ("Asia/Tokyo", "UTC", None),
        ("Asia/Tokyo", "Asia/Tokyo", None),
    ],
)
def test_rows_in_the_future_show_that_another_zone_is_written(
    findings: Findings, naive: psycopg.Connection, configured: str, written: str, ahead: str | None
) -> None:
    naive.execute(
        """INSERT INTO "Connections" (token, creation_date, edit_date)
           SELECT n, at, at FROM generate_series(1, 3) n, LATERAL (SELECT
               CASE n WHEN 1 THEN now() AT TIME ZONE %s WHEN 2 THEN 'infinity' END) AS row(at) WHERE n < 3""",
        [written],
    )
    found = findings(f"naive_timestamps = '{configured}'")
    wrong = [each for each in found if "lie in the future" in each.message]

    assert len(wrong) == (2 if ahead else 0)
    for each in wrong:
        assert (each.level, each.subject) == ("warning", "clean-tokens")
        assert re.search(f"at least {ahead} ahead; correct database.naive_timestamps$", each.message)


def test_a_zone_that_only_this_machine_knows_is_an_error_with_its_remedy(
    database_url: str, naive: psycopg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"[database]\nurl = '{database_url}'")
    path.chmod(0o600)
    settings = load_settings(path, environ={})
    section = settings.database.model_copy(update={"naive_timestamps": named("Cat/Moon")})
    with Database(section) as database:
        found = list(check(settings.model_copy(update={"database": section}), database))

    problem = worst(found, "database")
    assert problem.level == "error"
    assert problem.message.startswith(
        'this PostgreSQL does not know the zone "Cat/Moon" of database.naive_timestamps; '
    )


def test_an_empty_database_is_told_job_by_job(findings: Findings) -> None:
    found = findings(RESET)

    assert worst(found, "schema") == Finding(
        "warning", "schema", "catfeeder_cron is missing; `start` sees to it, or `catfeeder-cron init-db`"
    )
    for job, table in (("clean-tokens", "Connections"), ("reset-food-counters", "Pet")):
        assert worst(found, job).level == "error"
        assert f'there is no table "public"."{table}"' in worst(found, job).message
        assert "init-db --with-app-tables" in worst(found, job).message


def test_a_disabled_job_needs_nothing(findings: Findings) -> None:
    assert "clean-tokens" not in {finding.subject for finding in findings("[jobs.clean-tokens]\nenabled = false")}


@pytest.mark.parametrize(
    ("change", "job", "message"),
    [
        (
            'ALTER TABLE "Pet" DROP time_reset_hours',
            "reset-food-counters",
            'table "public"."Pet" has no column time_reset_hours; correct [database.tables], or add what is missing',
        ),
        (
            'ALTER TABLE "Pet" ALTER food_eaten DROP DEFAULT, ALTER food_eaten TYPE text',
            "reset-food-counters",
            'column "food_eaten" of table "public"."Pet" is text, not a number; correct [database.tables], or the '
            "column's type",
        ),
        (
            'ALTER TABLE "Connections" ALTER expiration_date TYPE text',
            "clean-tokens",
            'column "expiration_date" of table "public"."Connections" is text, not a time; correct [database.tables], '
            "or the column's type",
        ),
    ],
)
def test_missing_columns_and_wrong_types_are_errors(
    findings: Findings, complete: None, admin: psycopg.Connection, change: LiteralString, job: str, message: str
) -> None:
    admin.execute(change)

    assert worst(findings(RESET), job) == Finding("error", job, message)


def test_a_domain_over_a_time_is_a_time(findings: Findings, complete: None, admin: psycopg.Connection) -> None:
    admin.execute("CREATE DOMAIN instant AS timestamptz")
    admin.execute('ALTER TABLE "Pet" ALTER food_reset TYPE instant')

    assert worst(findings(RESET), "reset-food-counters").level == "ok"


def test_a_missing_index_is_a_warning_with_its_statement_which_helps(
    findings: Findings, complete: None, admin: psycopg.Connection
) -> None:
    admin.execute('ALTER TABLE "Connections" RENAME expiration_date TO old')
    admin.execute('ALTER TABLE "Connections" ADD expiration_date timestamptz')

    found = worst(findings(), "clean-tokens")

    assert found.level == "warning"
    assert "init-db --with-indexes" in found.message
    admin.execute(found.message[found.message.index("CREATE INDEX") :].encode())
    assert worst(findings(), "clean-tokens").level == "ok"


GRANTS = re.findall(r"^((?:GRANT|ALTER DEFAULT) .* TO) catfeeder_cron;$", README.read_text("utf-8"), re.MULTILINE)


def grant(admin: psycopg.Connection, role: str) -> None:
    """Say what the README tells to say."""
    for statement in GRANTS:
        admin.execute(f"{statement} {role}".encode())


def test_a_role_with_the_readmes_grants_lacks_nothing(
    findings: Findings, complete: None, admin: psycopg.Connection, role: Callable[..., tuple[str, str]]
) -> None:
    name, url = role()
    grant(admin, name)

    found = findings(RESET, url)

    assert {finding.level for finding in found} == {"ok"}, found


def test_a_role_with_too_little_is_told_what_it_lacks_and_the_grants_help(
    findings: Findings, complete: None, admin: psycopg.Connection, role: Callable[..., tuple[str, str]]
) -> None:
    name, url = role()
    admin.execute(f'GRANT SELECT ON "Connections", "Verification" TO {name}'.encode())
    admin.execute(f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA catfeeder_cron TO {name}".encode())

    found = findings(RESET, url)

    for job, lacking in (
        ("clean-tokens", 'lacks UPDATE, DELETE on "public"."Connections"'),
        ("clean-verification", 'lacks UPDATE, DELETE on "public"."Verification"'),
        ("reset-food-counters", 'lacks SELECT, UPDATE on "public"."Pet"'),
        ("renew-oauth", 'lacks SELECT, UPDATE on "public"."ActiveOauths"'),
        ("renew-oauth", 'lacks SELECT on "public"."Services"'),
        ("renew-oauth", 'lacks SELECT on "public"."UserOauthConnection"'),
        ("check-actions", 'lacks SELECT, UPDATE on "public"."Actions"'),
        ("check-actions", 'lacks INSERT on "public"."ActionLog"'),
        ("schema", "lacks DELETE, UPDATE on tables of the schema catfeeder_cron"),
    ):
        assert worst(found, job).level == "error"
        (told,) = (each.message for each in found if each.subject == job and f'role "{name}" {lacking}' in each.message)
        admin.execute(told[told.index("GRANT") :].encode())
    assert {finding.level for finding in findings(RESET, url)} == {"ok"}


def test_a_schema_that_the_role_may_not_use_is_told(
    findings: Findings, complete: None, admin: psycopg.Connection, role: Callable[..., tuple[str, str]]
) -> None:
    name, url = role()
    grant(admin, name)
    admin.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")

    told = worst(findings(RESET, url), "clean-tokens")

    assert told.level == "error"
    assert f'GRANT USAGE ON SCHEMA "public" TO "{name}"' in told.message


def test_rows_that_a_policy_hides_are_a_warning(
    findings: Findings, complete: None, admin: psycopg.Connection, role: Callable[..., tuple[str, str]]
) -> None:
    name, url = role()
    grant(admin, name)
    admin.execute('ALTER TABLE "Pet" ENABLE ROW LEVEL SECURITY')

    told = worst(findings(RESET, url), "reset-food-counters")

    assert told.level == "warning"
    assert "row-level security" in told.message


def test_a_partitioned_table_is_looked_at_where_its_job_works(
    findings: Findings, complete: None, admin: psycopg.Connection, role: Callable[..., tuple[str, str]]
) -> None:
    name, url = role()
    grant(admin, name)
    admin.execute('DROP TABLE "Connections"')
    admin.execute('CREATE TABLE "Connections" (expiration_date timestamptz) PARTITION BY RANGE (expiration_date)')
    admin.execute('CREATE TABLE part PARTITION OF "Connections" DEFAULT')
    admin.execute(f'GRANT SELECT, UPDATE, DELETE ON "Connections" TO {name}'.encode())

    assert (
        f'role "{name}" lacks SELECT, UPDATE, DELETE on "public"."part"'
        in worst(findings("", url), "clean-tokens").message
    )


def test_an_old_schema_is_an_error_for_a_role_that_can_not_upgrade_it(
    findings: Findings, complete: None, admin: psycopg.Connection, role: Callable[..., tuple[str, str]]
) -> None:
    name, url = role()
    grant(admin, name)
    admin.execute("DELETE FROM catfeeder_cron.schema_version WHERE version > 2")

    assert worst(findings("", url), "schema").level == "error"
    assert worst(findings(), "schema").level == "warning"
    for found in (findings(), findings("", url)):
        assert "init-db" in worst(found, "schema").message


def test_a_schema_from_the_future_is_an_error(findings: Findings, complete: None, admin: psycopg.Connection) -> None:
    admin.execute("INSERT INTO catfeeder_cron.schema_version (version) VALUES (1000)")

    assert worst(findings(), "schema").level == "error"
    assert "install a newer catfeeder-cron" in worst(findings(), "schema").message


def test_no_database_is_one_error_and_the_rest_is_told_still(findings: Findings) -> None:
    found = findings("[jobs.report]\ncall = 'nowhere:main'\ninterval = 60", "postgresql://127.0.0.1:1/none")

    assert [finding.subject for finding in found if finding.level == "error"] == ["report", "database"]
    assert found[-1].message.endswith("; the rest was not looked at")


def test_a_database_that_goes_away_meanwhile_is_one_error(
    mortal_server: EmbeddedServer, stop_server: Callable[[str], Callable[[], None]], tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"[database]\nurl = '{mortal_server.conninfo}'\nconnect_timeout = 1\n")
    settings = load_settings(path, environ={})
    with Database(settings.database) as database:
        to_come = check(settings, database)
        while next(to_come).subject != "schema":
            pass
        stop_server("fast")

        (found,) = to_come

    assert (found.level, found.subject) == ("error", "database")


def test_nothing_is_said_twice(
    findings: Findings, complete: None, admin: psycopg.Connection, role: Callable[..., tuple[str, str]]
) -> None:
    _, url = role()
    lacking_tables = findings("", url)
    admin.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    lacking_schema = findings("", url)

    for found in (lacking_tables, lacking_schema):
        assert len(found) == len(set(found)), found
        # The table of the providers has its line among those of the job that reads it.
        assert "providers" not in {finding.subject for finding in found}


@pytest.mark.parametrize(("enabled", "level"), [("true", "error"), ("false", "warning")])
def test_a_callable_that_can_not_be_imported_is_told(findings: Findings, enabled: str, level: str) -> None:
    found = worst(findings(f"[jobs.report]\ncall = 'nowhere:main'\ninterval = 60\nenabled = {enabled}"), "report")

    assert found.level == level
    assert found.message == (
        "\"nowhere:main\" can't be imported: ModuleNotFoundError: No module named 'nowhere'; "
        "install its package where catfeeder-cron is installed"
    )


CHECKED = "[jobs.report]\ninterval = 60\nsql = '''{}'''"


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("DELETE FORM news", 'syntax error at or near "FORM"; correct it, or create what it needs'),
        ("DELETE FROM olds", 'relation "olds" does not exist; correct it, or create what it needs'),
        ("SELECT name FROM news", 'column "name" does not exist; correct it, or create what it needs'),
        ("DELETE FROM news; SELECT 1", "cannot insert multiple commands into a prepared statement; correct it, or"),
        ("DELETE FROM news WHERE id = $1", "it has parameters ($1), and a job has nothing to give for them"),
        ("SELECT id FROM news WHERE id = 'tom'", 'invalid input syntax for type integer: "tom"'),
    ],
)
def test_a_statement_that_the_server_refuses_is_told_with_its_reason(
    findings: Findings, complete: None, admin: psycopg.Connection, statement: str, told: str
) -> None:
    admin.execute("CREATE TABLE news (id int)")

    for enabled, level in (("true", "error"), ("false", "warning")):
        found = worst(findings(f"{CHECKED.format(statement)}\nenabled = {enabled}"), "report")
        assert found.level == level
        assert found.message.startswith(f"sql: {told}")


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM news WHERE title LIKE '%s' OR title = '{x}'",
        "SELECT purge();",
        "SELECT purge_while_planning()",
        "-- nothing",
        "CALL purge_all()",
        "CREATE TABLE olds AS SELECT * FROM news",
        "CREATE INDEX ON news (title)",
        "ANALYZE news",
        "TRUNCATE news",
        "WITH gone AS (DELETE FROM news RETURNING id) SELECT count(*) FROM gone",
    ],
)
def test_a_statement_that_is_right_is_ok_and_nothing_of_it_is_run(
    findings: Findings, complete: None, admin: psycopg.Connection, statement: str
) -> None:
    admin.execute("""
        CREATE TABLE news (id int, title text);
        INSERT INTO news VALUES (1, 'old');
        CREATE FUNCTION purge() RETURNS void LANGUAGE sql AS 'TRUNCATE news';
        CREATE FUNCTION purge_while_planning() RETURNS int IMMUTABLE LANGUAGE plpgsql
            AS 'BEGIN PERFORM purge(); RETURN 1; END';
        CREATE PROCEDURE purge_all() LANGUAGE sql AS 'TRUNCATE news'""")

    assert worst(findings(CHECKED.format(statement)), "report").level == "ok"

    assert admin.execute("SELECT id FROM news").fetchall() == [(1,)]
    assert admin.execute("SELECT FROM pg_class WHERE relname IN ('olds', 'news_title_idx')").rowcount == 0


@pytest.mark.parametrize("statement", ["SELECT id FROM hidden.news", "UPDATE cats SET id = 2"])
def test_what_a_statement_may_not_do_is_told_with_the_role(
    findings: Findings,
    complete: None,
    admin: psycopg.Connection,
    role: Callable[..., tuple[str, str]],
    statement: str,
) -> None:
    name, url = role()
    grant(admin, name)
    admin.execute("CREATE SCHEMA hidden; CREATE TABLE hidden.news (id int); CREATE TABLE cats (id int)")

    found = worst(findings(CHECKED.format(statement), url), "report")

    assert found.level == "error"
    assert found.message.startswith("sql: permission denied for ")
    assert f'its owner can say: GRANT ... ON ... TO "{name}"' in found.message
    assert "`catfeeder-cron check`" not in found.message


def test_the_handler_of_an_action_is_imported_too(findings: Findings) -> None:
    assert worst(findings("[actions.feed]\ncall = 'nowhere:feed'"), "actions.feed").level == "error"
    assert worst(findings("[actions.feed]\ncall = 'json:dumps'"), "actions.feed").level == "ok"


def test_what_a_callable_prints_at_import_does_not_get_among_the_results(
    findings: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talkative.py").write_text("print('hello')\ndef main(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert worst(findings("[jobs.report]\ncall = 'talkative:main'\ninterval = 60"), "report").level == "ok"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("secret", "mode", "level"),
    [
        ("[jobs.clean-tokens]\nping_url = 'https://example.org/secret'", 0o644, "warning"),
        ("[jobs.clean-tokens]\nping_url = 'https://example.org/secret'", 0o600, "ok"),
        ("# ping_url = 'https://example.org/secret'", 0o644, "ok"),
        ("", 0o644, "ok"),
    ],
)
def test_a_configuration_that_holds_secrets_is_for_its_owner_alone(
    findings: Findings, secret: str, mode: int, level: str
) -> None:
    found = worst(findings(secret, "postgresql://cat@127.0.0.1:1/x", mode), "configuration")

    assert found.level == level
    assert "example.org" not in found.message


def test_so_is_one_with_a_password_and_the_file_that_holds_the_url(
    findings: Findings, database_url: str, tmp_path: Path
) -> None:
    assert worst(findings(url="postgresql://cat:meow@127.0.0.1:1/x", mode=0o640), "configuration").level == "warning"

    url_file = tmp_path / "url"
    url_file.write_text(database_url)
    config = tmp_path / "other.toml"
    config.write_text('[database]\nurl_file = "url"\n')
    for mode, level in ((0o600, "ok"), (0o644, "warning")):
        url_file.chmod(mode)
        settings = load(config, environ={})
        with Database(settings.database) as database:
            found = worst(list(check(settings, database)), "database.url_file")
        assert found.level == level
    assert f"chmod 600 {url_file}" in found.message


def test_a_key_that_only_the_web_server_may_know_is_a_warning(findings: Findings) -> None:
    found = worst(findings("[Crons]\nclean_tokens = true\nprune_photos = true"), "configuration")
    assert found.level == "warning"
    assert "Crons.prune_photos: unknown key, which has no effect" in found.message


def test_providers_must_have_a_token_endpoint_that_keeps_secrets(
    database_url: str, database: Database, complete: None, admin: psycopg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        f'[database]\nurl = "{database_url}"\n[oauth.providers.inside]\nallow_http = true\n[oauth.providers.typo]'
    )
    for name, client, endpoint in (
        ("safe", "me", "https://example.org/token?secret=1"),
        ("local", "me", "http://127.0.0.1:80/token"),
        ("inside", "me", "http://intranet/token"),
        ("open", "me", "http://example.org/token?secret=1"),
        ("nowhere", "me", None),
        ("user", "me", "https://me:secret@example.org/token"),
        ("odd", "me", "https://[bad/token"),
        ("unused", "", None),
    ):
        admin.execute(
            'INSERT INTO "UserOauthConnection" (provider_name, client_id, token_grabber_base_url) VALUES (%s, %s, %s)',
            [name, client, endpoint],
        )

    _, *found = check_links("renew-oauth", database, load_settings(path, environ={}), True)

    assert {finding.subject: finding.level for finding in found} == {
        "provider safe": "ok",
        "provider local": "ok",
        "provider inside": "ok",
        "provider open": "error",
        "provider nowhere": "error",
        "provider user": "error",
        "provider odd": "error",
        "provider unused": "warning",
        "provider typo": "warning",
    }
    assert not any("secret" in finding.message for finding in found)


def test_providers_that_can_not_be_read_are_an_error(database: Database, database_url: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[database]\nurl = "{database_url}"\n')

    _, found = check_links("renew-oauth", database, load_settings(path, environ={}), True)

    assert found.level == "error"


@pytest.fixture
def ten_links(complete: None, admin: psycopg.Connection) -> None:
    """Of google, whose tokens live an hour, in a table that may say nothing of it."""
    admin.execute('ALTER TABLE "ActiveOauths" ALTER token_lifespan DROP NOT NULL')
    admin.execute("INSERT INTO \"Services\" (name) VALUES ('google')")
    admin.execute(
        'INSERT INTO "UserOauthConnection" (provider_name, client_id, token_grabber_base_url)'
        " VALUES ('google', 'me', 'https://example.org/token')"
    )
    admin.execute(
        'INSERT INTO "ActiveOauths" (token, refresh_link, token_lifespan, service_id, user_id)'
        " SELECT 't', 'r' || n, 3600, (SELECT id FROM \"Services\"), 1 FROM generate_series(1, 10) n"
    )


LIFESPAN: LiteralString = 'UPDATE "ActiveOauths" SET token_lifespan = %s WHERE id <= %s'


@pytest.mark.parametrize(
    ("lifespan", "rows", "job", "message"),
    [
        (3600, 10, "", None),
        (1801, 10, "", None),
        (0, 10, "", None),  # never renewed
        (
            1200,
            3,
            "",
            "its tokens live 20m (3 of its 10 links), and up to 30m pass between two runs of renew-oauth, so those "
            'links are dead in between; set jobs.renew-oauth.interval = "900s" or less',
        ),
        (1801, 10, 'jitter = "1m"', 'links are dead in between; set jobs.renew-oauth.interval = "1441s" or less'),
        (3600, 10, 'cron = "*/10 9-17 * * *"', "up to 910m pass"),
        (None, 4, "interval = 7200", "its tokens live 1h (10 of its 10 links), and up to 2h pass"),
        (None, 4, "interval = 1800", None),
        (600, 10, "date = 2099-01-01T00:00:00Z", None),
    ],
)
def test_a_provider_whose_tokens_end_between_two_runs_needs_a_shorter_interval(
    findings: Findings,
    ten_links: None,
    admin: psycopg.Connection,
    lifespan: int | None,
    rows: int,
    job: str,
    message: str | None,
) -> None:
    admin.execute(LIFESPAN, [lifespan, rows])

    found = worst(findings(f"[jobs.renew-oauth]\n{job}"), "provider google")

    assert found.level == ("warning" if message else "ok"), found
    assert (message or "are filled in") in found.message


def test_the_interval_that_it_names_is_short_enough(
    findings: Findings, ten_links: None, admin: psycopg.Connection
) -> None:
    for lifespan in (1, 30, 600, 1700):
        admin.execute(LIFESPAN, [lifespan, 10])
        warning = worst(findings(), "provider google").message
        (interval,) = re.findall(r'interval = "(\w+)"', warning)

        found = worst(findings(f"[jobs.renew-oauth]\ninterval = '{interval}'"), "provider google")

        assert found.level == ("ok" if lifespan > 1 else "warning"), (lifespan, interval)


def test_links_of_a_service_without_a_provider_are_named(
    findings: Findings, ten_links: None, admin: psycopg.Connection
) -> None:
    admin.execute("UPDATE \"Services\" SET name = 'Google'")

    assert worst(findings(), "provider Google") == Finding(
        "warning",
        "provider Google",
        '10 links can\'t be renewed: their service has no row in "UserOauthConnection"; its provider_name must be the '
        "service's name",
    )


def test_links_of_no_service_are_named(findings: Findings, ten_links: None, admin: psycopg.Connection) -> None:
    admin.execute('UPDATE "ActiveOauths" SET service_id = NULL WHERE id <= 3')

    assert worst(findings(), "renew-oauth").message.startswith("3 links can't be renewed: their service_id is none of")


@pytest.mark.parametrize(("refused", "level"), [(True, "error"), (False, "warning")])
def test_a_paused_provider_is_told_with_its_reason(
    findings: Findings, ten_links: None, admin: psycopg.Connection, database: Database, refused: bool, level: str
) -> None:
    with database.transaction() as connection:
        known = providers.load(connection, Links.find(database, DatabaseTables()), OAuthSettings(), ["google"])
    pause = providers.refused("401: invalid_client") if refused else providers.out_of_order("503")
    providers.pause(database, known["google"][0], pause)

    found = worst(findings(), "provider google")

    assert found.level == level
    assert re.match(r"it is paused for \d+[sm] more: (401: invalid_client; correct its row|503$)", found.message)


def test_a_place_for_the_answers_of_providers_is_needed(
    findings: Findings, complete: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "not" / "there" / "yet"))
    assert worst(findings(), "renew-oauth").level == "ok"
    assert not (tmp_path / "not").exists()

    (tmp_path / "not").write_text("a file")
    found = worst(findings(), "renew-oauth")

    assert found.level == "error"
    assert f"{tmp_path / 'not'} is no directory; make that directory writable or set STATE_DIRECTORY" in found.message
