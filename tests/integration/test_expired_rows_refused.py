"""What a clean-up job says in one line where a table, a column or a privilege is missing, and what it never says."""

import traceback
from collections.abc import Callable

import psycopg
import pytest

from catfeeder_cron.database import Database
from catfeeder_cron.errors import ConstraintViolation, DatabaseError
from catfeeder_cron.report import JobReport

Clean = Callable[..., JobReport]
Role = Callable[..., tuple[str, str]]
OpenDatabase = Callable[..., Database]

TABLE = 'CREATE TABLE "Connections" (id bigint, token text, expiration_date timestamptz)'


def the_reason(report: JobReport) -> str:
    assert report.outcome == "failed"
    assert report.reason is not None
    assert "\n" not in report.reason
    assert "DETAIL" not in report.reason
    return report.reason


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_missing_table_is_named_with_what_helps(clean: Clean, dry_run: bool) -> None:
    reason = the_reason(clean(context={"dry_run": dry_run}))

    assert 'there is no table "public"."Connections"' in reason
    assert "[database.tables]" in reason
    assert "init-db --with-app-tables" in reason


def test_a_missing_schema_is_a_missing_table(clean: Clean) -> None:
    assert 'there is no table "no such"."Connections"' in the_reason(clean(tables={"schema": "no such"}))


def test_a_missing_column_is_named_beside_those_that_are_there(admin: psycopg.Connection, clean: Clean) -> None:
    admin.execute('CREATE TABLE "Connections" (id bigint, gone int, expires timestamptz)')
    admin.execute('ALTER TABLE "Connections" DROP gone')

    assert the_reason(clean()).endswith('"Connections" has no column "expiration_date"; it has id, expires')

    admin.execute('DROP TABLE "Connections"; CREATE TABLE "Connections" ()')
    assert the_reason(clean()).endswith("it has none")


@pytest.mark.parametrize("kind", ["text", "interval", "bigint", "time", "timestamptz[]"])
def test_a_column_that_is_no_time_is_refused_before_anything_is_deleted(
    admin: psycopg.Connection, clean: Clean, kind: str
) -> None:
    admin.execute(
        f'CREATE TABLE "Connections" (expiration_date {kind}); INSERT INTO "Connections" DEFAULT VALUES'.encode()
    )

    assert 'column "expiration_date" of table "public"."Connections" is' in the_reason(clean())
    assert admin.execute('SELECT count(*) FROM "Connections"').fetchone() == (1,)


@pytest.mark.parametrize(
    ("definition", "kind"),
    [
        ('CREATE VIEW "Connections" AS SELECT now() AS expiration_date', "a view"),
        ('CREATE MATERIALIZED VIEW "Connections" AS SELECT now() AS expiration_date', "a materialized view"),
        ('CREATE SEQUENCE "Connections"', "a sequence"),
    ],
)
def test_what_is_no_table_is_called_what_it_is(
    admin: psycopg.Connection, clean: Clean, definition: str, kind: str
) -> None:
    admin.execute(definition.encode())

    assert f'"public"."Connections" is {kind}; set [database.tables]' in the_reason(clean())


@pytest.mark.parametrize("missing", ["SELECT", "UPDATE", "DELETE"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_missing_privilege_is_named_with_the_grant_that_helps(
    admin: psycopg.Connection, clean: Clean, role: Role, open_database: OpenDatabase, missing: str, dry_run: bool
) -> None:
    name, url = role()
    admin.execute(TABLE)
    granted = ", ".join({"SELECT", "UPDATE", "DELETE"} - {missing})
    admin.execute(f'GRANT {granted} ON "Connections" TO {name}'.encode())
    database = open_database(url)

    reason = the_reason(clean(database=database, context={"dry_run": dry_run}))

    assert reason.startswith(f'role "{name}" lacks {missing} on "public"."Connections"; its owner can say: GRANT ')
    admin.execute(reason.partition("its owner can say: ")[2].encode())
    assert clean(database=database).outcome == "succeeded"


def test_privileges_are_needed_on_every_partition(
    admin: psycopg.Connection, clean: Clean, role: Role, open_database: OpenDatabase
) -> None:
    name, url = role()
    admin.execute("""
        CREATE TABLE "Connections" (id bigint, expiration_date timestamptz) PARTITION BY RANGE (id);
        CREATE TABLE part PARTITION OF "Connections" DEFAULT""")
    admin.execute(f'GRANT SELECT, UPDATE, DELETE ON "Connections" TO {name}'.encode())

    assert f'role "{name}" lacks SELECT, UPDATE, DELETE on "public"."part"' in the_reason(
        clean(database=open_database(url))
    )


def test_a_schema_that_the_role_may_not_use_is_named(
    admin: psycopg.Connection, clean: Clean, role: Role, open_database: OpenDatabase
) -> None:
    name, url = role()
    admin.execute("CREATE SCHEMA closed")
    admin.execute(TABLE.replace('"Connections"', 'closed."Connections"').encode())
    admin.execute(f'GRANT ALL ON closed."Connections" TO {name}'.encode())

    reason = the_reason(clean(database=open_database(url), tables={"schema": "closed"}))

    assert reason.startswith(f'role "{name}" lacks USAGE on schema "closed"; its owner can say: GRANT USAGE ON SCHEMA ')


def test_privileges_by_membership_and_on_columns_are_enough(
    admin: psycopg.Connection, clean: Clean, role: Role, open_database: OpenDatabase
) -> None:
    name, url = role()
    group, _ = role()
    admin.execute(TABLE)
    admin.execute(f'GRANT SELECT, DELETE, UPDATE (token) ON "Connections" TO {group}; GRANT {group} TO {name}'.encode())
    admin.execute('INSERT INTO "Connections" SELECT n, NULL, now() FROM generate_series(1, 5) n')

    assert clean(database=open_database(url)).counts == {"deleted": 5, "remaining": 0}


def test_rows_that_row_security_hides_are_not_touched(
    admin: psycopg.Connection, clean: Clean, role: Role, open_database: OpenDatabase
) -> None:
    name, url = role()
    admin.execute(TABLE)
    admin.execute('INSERT INTO "Connections" SELECT n, NULL, now() FROM generate_series(1, 6) n')
    admin.execute(
        f"""
        GRANT SELECT, DELETE, UPDATE ON "Connections" TO {name};
        ALTER TABLE "Connections" ENABLE ROW LEVEL SECURITY;
        CREATE POLICY others ON "Connections" TO {name} USING (id > 2)""".encode()
    )

    assert clean(database=open_database(url)).counts == {"deleted": 4, "remaining": 0}


def test_the_secrets_in_an_errors_detail_reach_no_message_and_no_traceback(
    admin: psycopg.Connection, database: Database
) -> None:
    """DETAIL: Key (token)=(the-secret) already exists."""
    admin.execute('CREATE TABLE "Connections" (token text CONSTRAINT only_once UNIQUE)')
    admin.execute("INSERT INTO \"Connections\" VALUES ('the-secret')")
    with pytest.raises(ConstraintViolation) as caught, database.transaction() as connection:
        connection.execute("INSERT INTO \"Connections\" VALUES ('the-secret')")

    told = "".join(traceback.format_exception(caught.value))
    assert caught.value.constraint == "only_once"
    assert "only_once" in told
    assert "the-secret" not in str(caught.value)
    assert "DETAIL" not in told
    assert "already exists" not in told


def test_a_trigger_that_raises_fails_the_run_in_one_line(admin: psycopg.Connection, clean: Clean) -> None:
    admin.execute(TABLE)
    admin.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'not today' USING DETAIL = 'the-secret', HINT = 'the-hint'; END $$;
        CREATE TRIGGER refuse BEFORE DELETE ON "Connections" FOR EACH ROW EXECUTE FUNCTION refuse()""")
    admin.execute('INSERT INTO "Connections" (expiration_date) VALUES (now())')

    assert the_reason(clean()) == "not today (SQLSTATE P0001)"


def test_a_read_only_server_is_told_as_such(
    admin: psycopg.Connection, clean: Clean, role: Role, open_database: OpenDatabase
) -> None:
    name, url = role("SUPERUSER")
    admin.execute(f"ALTER ROLE {name} SET default_transaction_read_only = on".encode())
    admin.execute(TABLE)
    admin.execute('INSERT INTO "Connections" (expiration_date) VALUES (now())')

    assert "takes no writes: default_transaction_read_only is on" in the_reason(clean(database=open_database(url)))


def test_a_value_that_does_not_fit_is_no_outage(database: Database) -> None:
    with pytest.raises(DatabaseError) as caught, database.transaction() as connection:
        connection.execute("SELECT %s", ["a\0b"])

    assert type(caught.value) is DatabaseError
