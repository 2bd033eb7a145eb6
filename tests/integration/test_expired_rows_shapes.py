"""The clean-up jobs on tables of every shape: types of the expiry, partitions, inheritance, names."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql

from catfeeder_cron.report import JobReport

Clean = Callable[..., JobReport]

ALL_GONE = {"remaining": 0}


def numbers(admin: psycopg.Connection, table: str = '"Connections"') -> list[int]:
    return [row[0] for row in admin.execute(f"SELECT id FROM {table} ORDER BY id".encode())]


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def test_timestamps_without_a_zone_are_in_utc_whatever_zone_the_role_has(
    admin: psycopg.Connection, clean: Clean, indexed: bool, zone: str
) -> None:
    """Tokyo is 9 hours ahead of UTC, Los Angeles 7 or 8 behind: a minute would be on the wrong side there."""
    admin.execute('CREATE TABLE "Connections" (id bigint, expiration_date timestamp)')
    if indexed:
        admin.execute('CREATE INDEX ON "Connections" (expiration_date)')
    admin.execute("""INSERT INTO "Connections" VALUES
        (1, now() AT TIME ZONE 'UTC' - interval '1 min'), (2, now() AT TIME ZONE 'UTC' + interval '1 min'),
        (3, 'infinity'), (4, '-infinity'), (5, NULL)""")
    database = sql.Identifier(admin.info.dbname)
    admin.execute(sql.SQL("ALTER DATABASE {} SET timezone = {}").format(database, sql.Literal(zone)))
    admin.execute(sql.SQL("ALTER DATABASE {} SET datestyle = 'SQL, DMY'").format(database))

    assert clean(context={"dry_run": True}).counts == {"would_delete": 2}
    assert clean().counts == {"deleted": 2, "remaining": 0}
    assert numbers(admin) == [2, 3, 5]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_date_expires_as_its_day_begins_in_utc(admin: psycopg.Connection, clean: Clean, indexed: bool) -> None:
    admin.execute('CREATE TABLE "Connections" (id bigint, expiration_date date)')
    if indexed:
        admin.execute('CREATE INDEX ON "Connections" (expiration_date)')
    admin.execute("""INSERT INTO "Connections"
        SELECT n, (now() AT TIME ZONE 'UTC')::date + n FROM generate_series(-40, 2) n""")

    assert clean(batch_size=7, keep_expired_for="1d").counts == {"deleted": 40, "remaining": 0}
    assert numbers(admin) == [0, 1, 2]
    assert clean().counts == {"deleted": 1, "remaining": 0}


RANGES = """
    CREATE SCHEMA archive;
    CREATE TABLE "Connections" (id bigint, expiration_date timestamptz) PARTITION BY RANGE (id);
    CREATE TABLE low PARTITION OF "Connections" FOR VALUES FROM (0) TO (100);
    CREATE TABLE archive.middle PARTITION OF "Connections" FOR VALUES FROM (100) TO (200);
    CREATE TABLE "rest, of %s" PARTITION OF "Connections" DEFAULT"""
HASHES = """
    CREATE TABLE "Connections" (id bigint, expiration_date timestamptz) PARTITION BY HASH (id);
    CREATE TABLE h0 PARTITION OF "Connections" FOR VALUES WITH (MODULUS 3, REMAINDER 0);
    CREATE TABLE h1 PARTITION OF "Connections" FOR VALUES WITH (MODULUS 3, REMAINDER 1);
    CREATE TABLE h2 PARTITION OF "Connections" FOR VALUES WITH (MODULUS 3, REMAINDER 2)"""
LEVELS = """
    CREATE TABLE "Connections" (id bigint, expiration_date timestamptz) PARTITION BY RANGE (id);
    CREATE TABLE low PARTITION OF "Connections" FOR VALUES FROM (0) TO (100) PARTITION BY HASH (id);
    CREATE TABLE low0 PARTITION OF low FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE low1 PARTITION OF low FOR VALUES WITH (MODULUS 2, REMAINDER 1) PARTITION BY RANGE (id);
    CREATE TABLE low1a PARTITION OF low1 DEFAULT;
    CREATE TABLE high PARTITION OF "Connections" DEFAULT"""
BY_EXPIRY = """
    CREATE TABLE "Connections" (id bigint, expiration_date timestamptz) PARTITION BY RANGE (expiration_date);
    CREATE TABLE old PARTITION OF "Connections" FOR VALUES FROM (MINVALUE) TO (now() - interval '10 min');
    CREATE TABLE new PARTITION OF "Connections" DEFAULT"""
INHERITANCE = """
    CREATE TABLE "Connections" (id bigint, expiration_date timestamptz);
    CREATE TABLE child (kind text) INHERITS ("Connections");
    CREATE TABLE grandchild () INHERITS (child);
    CREATE TABLE "another child" (LIKE "Connections", PRIMARY KEY (id)) INHERITS ("Connections")"""
# A column of other position and a dropped one, as a table has that was attached later.
ATTACHED = """
    CREATE TABLE "Connections" (id bigint, gone text, expiration_date timestamptz) PARTITION BY RANGE (id);
    CREATE TABLE low (expiration_date timestamptz, also_gone int, gone text, id bigint);
    ALTER TABLE low DROP also_gone;
    ALTER TABLE "Connections" ATTACH PARTITION low DEFAULT;
    ALTER TABLE "Connections" DROP gone"""
SHAPES = {
    "range": (RANGES, ["low", "archive.middle", '"rest, of %s"']),
    "hash": (HASHES, ["h0", "h1", "h2"]),
    "several levels": (LEVELS, ["low0", "low1a", "high"]),
    "by expiry": (BY_EXPIRY, ["old", "new"]),
    "inheritance": (INHERITANCE, ['"Connections"', "child", "grandchild", '"another child"']),
    "attached": (ATTACHED, ["low"]),
}


@pytest.mark.parametrize("indexed", ["none", "all", "some"])
@pytest.mark.parametrize("shape", SHAPES)
def test_only_expired_rows_go_from_partitions_whose_rows_have_the_same_places(
    admin: psycopg.Connection, clean: Clean, shape: str, indexed: str
) -> None:
    statements, leaves = SHAPES[shape]
    admin.execute(statements.replace("%", "%").encode())
    for leaf in leaves[: {"none": 0, "some": 1, "all": None}[indexed]]:
        admin.execute(f"CREATE INDEX ON {leaf} (expiration_date)".encode())
    for target in leaves if shape == "inheritance" else ['"Connections"']:
        # Odd ids have expired, so the places of what has and what has not alternate in every leaf differently.
        admin.execute(
            f"""INSERT INTO {target} (id, expiration_date)
                SELECT n, now() + (CASE WHEN n % 2 = 1 THEN -n ELSE n END) * interval '1 min'
                FROM generate_series(1, 300) n""".encode()
        )
    expired = [n for n in numbers(admin) if n % 2]
    live = [n for n in numbers(admin) if not n % 2]

    assert clean(batch_size=40, max_rows=90).counts == {"deleted": 90, "remaining": 0}
    assert clean(context={"dry_run": True}).counts == {"would_delete": len(expired) - 90}
    assert clean(batch_size=40).counts == {"deleted": len(expired) - 90, "remaining": 0}
    assert numbers(admin) == live


def test_a_partition_can_be_cleaned_by_itself(admin: psycopg.Connection, clean: Clean) -> None:
    admin.execute(RANGES)
    admin.execute('INSERT INTO "Connections" SELECT n, now() FROM generate_series(50, 249) n')

    assert clean(tables={"schema": "archive", "connections": "middle"}).counts["deleted"] == 100
    assert min(numbers(admin)) == 50


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    "name", ["sessions", "Capital", "with space", 'a%b {x} "y"', "%s", "%(cutoff)s", "{leaf}", "naïve ünï", "leaf"]
)
def test_any_name_serves_for_schema_and_table(
    admin: psycopg.Connection, clean: Clean, name: str, indexed: bool
) -> None:
    table = sql.Identifier(name, name)
    admin.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
    admin.execute(sql.SQL("CREATE TABLE {} (id bigint PRIMARY KEY, expiration_date timestamptz)").format(table))
    referring = sql.SQL("CREATE TABLE {}.{} ({} bigint CONSTRAINT {} REFERENCES {})")
    admin.execute(referring.format(*map(sql.Identifier, (name, name + "2", name, name)), table))
    if indexed:
        admin.execute(sql.SQL("CREATE INDEX ON {} (expiration_date)").format(table))
    admin.execute(sql.SQL("INSERT INTO {} SELECT n, now() FROM generate_series(1, 20) n").format(table))
    admin.execute(sql.SQL("INSERT INTO {} VALUES (7)").format(sql.Identifier(name, name + "2")))
    where = {"schema": name, "connections": name}

    assert clean(tables=where, context={"dry_run": True}).counts == {"would_delete": 19}
    report = clean(tables=where, batch_size=5)

    assert (report.outcome, report.counts) == ("succeeded", {"deleted": 19, "remaining": 1})


@pytest.mark.parametrize("indexed", [False, True])
def test_columns_named_like_the_words_of_the_statements_do_no_harm(
    admin: psycopg.Connection, clean: Clean, indexed: bool
) -> None:
    admin.execute("""CREATE TABLE "Connections" (id bigint, place int DEFAULT 9, expiry int DEFAULT 1, leaf int,
        referring int, picked int, deleted int, cutoff int, expiration_date timestamptz)""")
    if indexed:
        admin.execute('CREATE INDEX ON "Connections" (expiration_date)')
    admin.execute("""INSERT INTO "Connections" (id, expiration_date)
        SELECT n, now() + (n - 100.5) * interval '1 h' FROM generate_series(1, 110) n""")

    assert clean(batch_size=30).counts == {"deleted": 100, "remaining": 0}
    assert numbers(admin) == list(range(101, 111))


@pytest.mark.parametrize(
    ("index", "picked"),
    [
        ("(expiration_date)", True),
        ("(expiration_date DESC NULLS LAST, id)", True),
        ("(id, expiration_date)", False),
        ("(expiration_date) WHERE id > 50", False),
        ("USING brin (expiration_date)", False),
        ("USING hash (expiration_date)", False),
        ("(date_trunc('hour', expiration_date AT TIME ZONE 'UTC'))", False),
    ],
)
def test_any_index_is_right_and_those_that_lead_to_all_expired_rows_are_used(
    admin: psycopg.Connection, clean: Clean, index: str, picked: bool
) -> None:
    admin.execute('CREATE TABLE "Connections" (id bigint, expiration_date timestamptz)')
    admin.execute(f'CREATE INDEX ON "Connections" {index}'.encode())
    admin.execute("""INSERT INTO "Connections"
        SELECT n, now() - (n % 50) * interval '1 h' + interval '30 min' FROM generate_series(1, 1000) n""")
    # In the order of the expiry, the oldest go first; in the order of the blocks, the first.
    oldest_first = [n for n in range(1, 1001) if n % 50 == 49]

    assert clean(max_rows=20).counts == {"deleted": 20, "remaining": 0}
    gone = sorted(set(range(1, 1001)) - set(numbers(admin)))
    assert (gone == oldest_first) is picked
    assert clean(batch_size=300).counts == {"deleted": 960, "remaining": 0}


def test_a_domain_over_a_time_is_a_time(admin: psycopg.Connection, clean: Clean) -> None:
    admin.execute("""
        CREATE DOMAIN expiry AS timestamptz NOT NULL;
        CREATE TABLE "Connections" (id bigint, expiration_date expiry);
        INSERT INTO "Connections" SELECT n, now() FROM generate_series(1, 5) n""")

    assert clean().counts == {"deleted": 5, "remaining": 0}


def test_progress_goes_up_to_the_whole_over_all_partitions(admin: psycopg.Connection, clean: Clean) -> None:
    admin.execute(HASHES)
    admin.execute('INSERT INTO "Connections" SELECT n, now() FROM generate_series(1, 2000) n')
    told: list[tuple[Any, Any]] = []

    assert clean(batch_size=100, context={"progress": lambda *numbers: told.append(numbers)}).outcome == "succeeded"

    assert told == sorted(told)
    assert {total for _, total in told} == {told[-1][0]}
    assert len({done for done, _ in told}) > 5
