"""`init-db`: the daemon's own schema, Cat Feeder's tables, the indexes; repeated, at once, and by those who may not."""

from collections.abc import Callable

import psycopg
import pytest

from tests.support.program import Program, count

TABLES = """pg_tables WHERE schemaname IN ('public', 'catfeeder_cron')"""
INDEXES = """pg_indexes WHERE indexdef ~ '\\((expiration_date|expiration)\\)'"""


def test_it_creates_what_is_asked_for_and_says_so_once(
    program: Program, database_url: str, admin: psycopg.Connection
) -> None:
    program.configure(database_url)
    listed = program.run("list", "--json")
    assert (listed.status, listed.stderr) == (0, "")
    assert {job["last_run"] for job in listed.document} == {None}
    assert "init-db" in program.run("history").error

    everything = ("init-db", "--with-app-tables", "--with-indexes")
    planned = program.run(*everything, "--dry-run")
    assert (planned.status, planned.stderr) == (0, "")
    assert all(line.startswith("would create ") for line in planned.stdout.splitlines())
    assert count(admin, TABLES) == 0

    created = program.run(*everything)
    assert (created.status, created.stderr) == (0, "")
    for told in ("schema catfeeder_cron", 'table "public"."Connections"', "index on", "Verification"):
        assert told in created.stdout
    assert len(created.stdout.splitlines()) == len(planned.stdout.splitlines())
    assert count(admin, INDEXES) == 2

    again = program.run(*everything)
    assert (again.status, again.stdout, again.stderr) == (0, "nothing to do\n", "")


# Goes before PostgreSQL's own function.
OLD_SERVER = """
    CREATE SCHEMA fake;
    CREATE FUNCTION fake.current_setting(name text) RETURNS text LANGUAGE sql AS $$
        SELECT CASE name WHEN 'server_version_num' THEN '130022' WHEN 'server_version' THEN '13.22'
                         ELSE pg_catalog.current_setting(name) END $$;
    DO $$ BEGIN
        EXECUTE format('ALTER DATABASE %I SET search_path = fake, pg_catalog, public', current_database());
    END $$"""


def test_a_server_that_is_too_old_is_named_before_anything_is_created(
    program: Program, database_url: str, admin: psycopg.Connection
) -> None:
    admin.execute(OLD_SERVER)
    program.configure(database_url)
    refused = program.run("init-db", "--with-app-tables", "--with-indexes")
    assert (refused.status, refused.stdout) == (84, "")
    assert "PostgreSQL 13.22 is too old; upgrade the server to 14 or newer" in refused.error
    assert count(admin, TABLES) == 0
    assert "PostgreSQL 13.22 is too old" in program.run("check").stdout


def test_an_index_on_a_table_that_an_enabled_job_needs_and_that_is_missing_is_a_failure(
    program: Program, database_url: str, admin: psycopg.Connection
) -> None:
    program.configure(database_url, "[jobs.clean-verification]\nenabled = false\n")
    for arguments in (["--dry-run"], []):
        failed = program.run("init-db", "--with-indexes", *arguments)
        assert failed.status == 84
        assert [line.split()[4] for line in failed.stderr.splitlines()] == [
            '"public"."Connections"',
            '"public"."ActiveOauths"',
        ]
        assert failed.stderr.count("`catfeeder-cron init-db --with-app-tables`") == 2
        assert "Actions" in failed.stdout
        assert "Verification" in failed.stdout

    admin.execute('CREATE TABLE "Connections" (expiration_date timestamptz)')
    admin.execute('CREATE TABLE "ActiveOauths" (token_expiration timestamptz)')
    done = program.run("init-db", "--with-indexes")
    assert (done.status, done.stderr) == (0, "")


def test_several_at_once_do_it_once(program: Program, database_url: str, admin: psycopg.Connection) -> None:
    program.configure(database_url)
    racing = [program.start("init-db", "--with-app-tables", "--with-indexes") for _ in range(4)]
    ended = [each.finish() for each in racing]
    assert [(each.status, each.stderr) for each in ended] == [(0, "")] * 4
    created = [line for each in ended for line in each.stdout.splitlines() if line.startswith("created schema")]
    assert len(created) == len(set(created)) > 0
    assert count(admin, INDEXES) == 2
    assert count(admin, "pg_index WHERE NOT indisvalid") == 0


def test_an_index_is_built_beside_a_web_server_that_writes(
    program: Program, database_url: str, admin: psycopg.Connection
) -> None:
    program.configure(database_url, "statement_timeout = 1\n")
    assert program.run("init-db", "--with-app-tables").status == 0
    admin.execute('CREATE INDEX catfeeder_cron_unrelated ON "Connections" (user_id)')
    with psycopg.connect(database_url) as web_server:
        web_server.execute("""INSERT INTO "Connections" (token) VALUES ('a')""")
        building = program.start("init-db", "--with-indexes")
        # CREATE INDEX CONCURRENTLY waits for us; others go on writing meanwhile, longer than a statement may take.
        with psycopg.connect(database_url, autocommit=True) as another:
            while not count(
                another,
                "pg_stat_activity WHERE datname = current_database()"
                " AND query LIKE 'CREATE INDEX%' AND now() - query_start > '1.2s'",
            ):
                another.execute("""INSERT INTO "Connections" (token) VALUES (random()::text)""")
                assert building.process.poll() is None, building.finish()
    assert building.finish().status == 0
    assert count(admin, INDEXES) == 2


def test_who_may_not_is_told_so_in_one_line(program: Program, role: Callable[[], tuple[str, str]]) -> None:
    _, url = role()
    program.configure(url)
    for command in (["init-db"], ["run-once", "clean-tokens"], ["history"]):
        failed = program.run(*command)
        assert (failed.status, failed.stdout.count("\n")) == (84, 1 if command[0] == "run-once" else 0)
    assert "init-db" in failed.error
    assert "as the owner" in program.run("init-db").error
    daemon = program.daemon()
    daemon.wait_for_text("init-db")
    assert daemon.stop().status == 0


def test_a_schema_that_is_too_new_is_left_alone(program: Program, database_url: str, admin: psycopg.Connection) -> None:
    program.configure(database_url)
    assert program.run("init-db").status == 0
    admin.execute("INSERT INTO catfeeder_cron.schema_version (version) VALUES (1000)")
    for command in (["init-db"], ["run-once", "test-hello-world"]):
        failed = program.run(*command)
        assert failed.status == 84
        assert "version 1000" in failed.error
        assert "newer catfeeder-cron" in failed.error


@pytest.mark.usefixtures("app_tables")
def test_the_daemons_schema_is_the_only_place_of_its_state(admin: psycopg.Connection) -> None:
    assert admin.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'Actions'").fetchall()
    documented = {
        *("job", "slot", "trigger", "outcome", "reason", "counts", "error"),
        *("started_at", "finished_at", "host", "pid", "daemon"),
    }
    columns = admin.execute(
        "SELECT column_name FROM information_schema.columns "
        "WHERE table_schema = 'catfeeder_cron' AND table_name = 'job_runs'"
    ).fetchall()
    assert documented <= {name for (name,) in columns}
    assert (
        count(admin, "information_schema.role_table_grants WHERE table_name = 'job_runs' AND grantee = 'PUBLIC'") == 1
    )
