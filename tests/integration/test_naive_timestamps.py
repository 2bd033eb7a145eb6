"""`database.naive_timestamps`: columns without a zone hold a zone's wall clock, also while that is set back or forward.

The oracle is Python's zoneinfo: a time that the clock shows twice has two readings, by `fold`; one that it skips too.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg import sql

from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.schema.application import create_tables
from catfeeder_cron.database.time_columns import TimeColumn
from catfeeder_cron.errors import SchemaProblem
from catfeeder_cron.renewal.links import Links, Window
from catfeeder_cron.report import JobReport
from tests.integration.zones import named
from tests.support.waiting import eventually

STEP = timedelta(minutes=15)


class Change(NamedTuple):
    """The moment at which the clocks of a zone are set, by `by`."""

    zone: str
    at: datetime
    by: timedelta


CHANGES = [
    Change("Europe/Paris", datetime(2024, 10, 27, 1, tzinfo=UTC), timedelta(hours=-1)),
    Change("Europe/Paris", datetime(2024, 3, 31, 1, tzinfo=UTC), timedelta(hours=1)),
    Change("America/New_York", datetime(2024, 11, 3, 6, tzinfo=UTC), timedelta(hours=-1)),
    Change("America/New_York", datetime(2024, 3, 10, 7, tzinfo=UTC), timedelta(hours=1)),
    Change("Australia/Lord_Howe", datetime(2024, 4, 6, 15, tzinfo=UTC), timedelta(minutes=-30)),
    Change("Australia/Lord_Howe", datetime(2024, 10, 5, 15, 30, tzinfo=UTC), timedelta(minutes=30)),
    Change("Europe/Dublin", datetime(2024, 10, 27, 1, tzinfo=UTC), timedelta(hours=-1)),
    Change("Pacific/Apia", datetime(2011, 12, 30, 10, tzinfo=UTC), timedelta(hours=24)),
    Change("UTC", datetime(2024, 10, 27, 1, tzinfo=UTC), timedelta(0)),
]
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change.zone} {change.at:%b}")


def readings(shown: datetime, zone: str) -> tuple[datetime, datetime]:
    """The earlier and the later instant at which the clocks of a zone may show this; the same, if there is one only."""
    both = [shown.replace(tzinfo=ZoneInfo(zone), fold=fold).astimezone(UTC) for fold in (0, 1)]
    return min(both), max(both)


def is_shown(shown: datetime, zone: str) -> bool:
    return readings(shown, zone)[0].astimezone(ZoneInfo(zone)).replace(tzinfo=None) == shown


def around(change: Change, hours: int = 4) -> list[datetime]:
    """Instants around a change, right before and after it, and between the quarters of an hour."""
    instants = [change.at + n * STEP for n in range(-hours * 4, hours * 4 + 1)]
    more = [change.at + change.by, change.at - change.by, change.at]
    tick = timedelta(microseconds=1)
    return sorted({*instants, *(instant + d for instant in more for d in (-tick, tick, timedelta(minutes=7)))})


def shown_around(change: Change) -> list[datetime]:
    """Everything that the clocks may show around a change, and what they skip."""
    offset = change.at.astimezone(ZoneInfo(change.zone)).utcoffset()
    assert offset is not None
    walls = {(instant + o).replace(tzinfo=None) for instant in around(change) for o in (offset, offset - change.by)}
    return sorted(walls)


def one(connection: psycopg.Connection[Any], statement: sql.Composed, parameters: Any = None) -> Any:
    row = connection.execute(statement, parameters).fetchone()
    assert row is not None
    return row[0]


@pytest.fixture
def connection(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with database.transaction() as connection:
        yield connection


def test_the_changes_of_this_file_are_those_of_the_zones() -> None:
    for zone, at, by in CHANGES:
        before, after = (at + d for d in (timedelta(microseconds=-1), timedelta(0)))
        walls = [instant.astimezone(ZoneInfo(zone)).replace(tzinfo=None) for instant in (before, after)]
        assert walls[1] - walls[0] - (after - before) == by, zone


@changes
def test_nothing_has_expired_before_the_later_of_its_readings(
    connection: psycopg.Connection[Any], change: Change
) -> None:
    column = TimeColumn(change.zone)
    for instant in around(change):
        bound = datetime.fromisoformat(column.first_not_over(connection, instant.isoformat()))
        just_set_forward = change.by > timedelta(0) and change.at < instant < change.at + change.by
        for shown in shown_around(change):
            _, later = readings(shown, change.zone)
            # Right after the change, the skipped times come first in the index's order and may not be over.
            is_kept = just_set_forward and readings(shown, change.zone) >= (change.at, change.at)
            assert (shown < bound) == (later < instant and not is_kept), f"{shown} at {instant}"


@changes
def test_a_column_is_read_by_the_earlier_or_the_later_reading(
    connection: psycopg.Connection[Any], change: Change
) -> None:
    column = TimeColumn(change.zone)
    statement = sql.SQL("SELECT array[{}, {}] FROM (SELECT %s::timestamp AS shown) AS value").format(
        column.earliest("shown"), column.latest("shown")
    )
    longest = timedelta(hours=1)
    for shown in shown_around(change):
        if change.by <= longest or is_shown(shown, change.zone):
            assert tuple(one(connection, statement, [shown])) == readings(shown, change.zone), shown


@changes
def test_what_is_stored_is_what_the_clock_shows_and_is_never_read_as_later(
    connection: psycopg.Connection[Any], change: Change
) -> None:
    column = TimeColumn(change.zone)
    store = sql.SQL("SELECT {}").format(column.stored("%s::timestamptz"))
    read = sql.SQL("SELECT {} FROM (SELECT %s::timestamp AS shown) AS value").format(column.earliest("shown"))
    for instant in around(change):
        shown = one(connection, store, [instant])
        assert shown == instant.astimezone(ZoneInfo(change.zone)).replace(tzinfo=None)
        back = one(connection, read, [shown])
        assert back <= instant
        assert back == instant or instant - back == -change.by


@changes
def test_the_bound_for_the_index_leaves_out_nothing_that_ends_before(
    connection: psycopg.Connection[Any], change: Change
) -> None:
    column = TimeColumn(change.zone)
    statement = sql.SQL("SELECT {}").format(column.none_earlier_from("%(at)s::timestamptz"))
    far = abs(change.by) + timedelta(hours=25)
    for instant in [*around(change), change.at - 2 * far, change.at + 2 * far]:
        bound = one(connection, statement, {"at": instant})
        assert all(shown < bound for shown in shown_around(change) if readings(shown, change.zone)[0] < instant)
        if abs(instant - change.at) > far:
            assert bound == instant.astimezone(ZoneInfo(change.zone)).replace(tzinfo=None)


def test_times_at_the_limits_of_the_type_are_read_without_an_error(connection: psycopg.Connection[Any]) -> None:
    column = TimeColumn("Asia/Tokyo")
    for value in ("infinity", "-infinity", "294276-12-31 23:59:59.999999", "4714-11-24 00:00:00 BC", None):
        for reading in (column.earliest("shown"), column.latest("shown")):
            statement = sql.SQL("SELECT (({})::timestamptz)::text FROM (SELECT %s::timestamp AS shown) v").format(
                reading
            )
            found = one(connection, statement, [value])
            assert (found is None) == (value is None)


def test_a_zone_that_the_server_does_not_know_is_named(database: Database) -> None:
    with pytest.raises(SchemaProblem, match='does not know the zone "Cat/Moon"'), database.transaction() as connection:
        TimeColumn.of(connection, "timestamp without time zone", "Cat/Moon")
    with database.transaction() as connection:
        assert TimeColumn.of(connection, "timestamp with time zone", "Cat/Moon") == TimeColumn()


Clean = Callable[..., JobReport]


@changes
@pytest.mark.parametrize("indexed", [False, True])
def test_a_clean_up_deletes_what_has_expired_by_each_reading_and_nothing_alive(
    admin: psycopg.Connection,
    clean: Clean,
    open_database: Callable[..., Database],
    change: Change,
    indexed: bool,
) -> None:
    """`keep_expired_for` puts the cutoff at a time around a change that is over."""
    database = open_database(naive_timestamps=change.zone)
    now = admin.execute("SELECT now()").fetchone()
    assert now is not None
    for past in (-change.by / 2, timedelta(0), change.by / 2, timedelta(hours=2), timedelta(hours=-2)):
        admin.execute('DROP TABLE IF EXISTS "Connections"')
        admin.execute('CREATE TABLE "Connections" (id bigint, expiration_date timestamp)')
        if indexed:
            admin.execute('CREATE INDEX ON "Connections" (expiration_date)')
        cutoff = change.at + past
        rows = [each for each in shown_around(change) if abs(readings(each, change.zone)[1] - cutoff) > STEP / 2]
        with admin.cursor() as cursor:
            cursor.executemany('INSERT INTO "Connections" VALUES (%s, %s)', list(enumerate(rows)))
        keep = now[0] - cutoff
        just_set_forward = change.at < cutoff < change.at + change.by
        expired = {n for n, shown in enumerate(rows) if readings(shown, change.zone)[1] < cutoff}
        if just_set_forward:
            expired -= {n for n in expired if readings(rows[n], change.zone) >= (change.at, change.at)}
        options = {"keep_expired_for": keep.total_seconds(), "batch_size": 7, "database": database}
        dry = clean(context={"dry_run": True}, **options)
        assert dry.counts == {"would_delete": len(expired)}, cutoff
        assert clean(**options).counts == {"deleted": len(expired), "remaining": 0}
        left = {row[0] for row in admin.execute('SELECT id FROM "Connections"')}
        assert left == set(range(len(rows))) - expired, cutoff


@pytest.mark.parametrize("indexed", [False, True])
def test_a_date_expires_as_its_day_begins_in_the_zone(
    admin: psycopg.Connection, clean: Clean, open_database: Callable[..., Database], indexed: bool
) -> None:
    """It is another day in one of these zones, 26 hours apart, at every moment."""
    for zone in ("Pacific/Kiritimati", "Etc/GMT+12"):
        admin.execute('DROP TABLE IF EXISTS "Connections"')
        admin.execute('CREATE TABLE "Connections" (id bigint, expiration_date date)')
        if indexed:
            admin.execute('CREATE INDEX ON "Connections" (expiration_date)')
        admin.execute(
            'INSERT INTO "Connections" SELECT n, (now() AT TIME ZONE %s)::date + n FROM generate_series(-3, 3) n',
            [zone],
        )
        assert clean(database=open_database(naive_timestamps=zone)).counts["deleted"] == 4


def test_a_column_with_a_zone_ignores_the_setting(
    admin: psycopg.Connection, clean: Clean, open_database: Callable[..., Database]
) -> None:
    admin.execute('CREATE TABLE "Connections" (id bigint, expiration_date timestamptz)')
    admin.execute("""INSERT INTO "Connections" VALUES (1, now() - interval '1 min'), (2, now() + interval '1 min')""")
    assert clean(database=open_database(naive_timestamps="Asia/Tokyo")).counts["deleted"] == 1


def test_an_index_serves_a_column_without_a_zone(
    admin: psycopg.Connection, clean: Clean, open_database: Callable[..., Database]
) -> None:
    """The bound is converted and not the column, in the clean-up's statements and in those of renewals."""
    admin.execute('CREATE TABLE "Connections" (id bigint, expiration_date timestamp)')
    admin.execute("""INSERT INTO "Connections"
        SELECT n, (now() AT TIME ZONE 'Europe/Paris') + n * interval '1 min' FROM generate_series(-1000, 99000) n""")
    admin.execute('CREATE INDEX ON "Connections" (expiration_date)')
    admin.execute('VACUUM ANALYZE "Connections"')
    database = open_database(naive_timestamps="Europe/Paris")

    assert clean(database=database).counts["deleted"] == 1001

    # Without the index nothing is fetched through it, and with the column converted, every row is. What a session has
    # fetched is known when it has ended.
    database.close()
    fetched = "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'Connections' AND n_tup_del > 0"
    (rows,) = eventually(lambda: admin.execute(fetched).fetchone())
    assert 1001 <= rows < 5000


def test_an_index_serves_the_rows_that_are_due(database: Database, admin: psycopg.Connection) -> None:
    for _ in (*schema.upgrade(database), *create_tables(database, DatabaseTables())):
        pass
    admin.execute('ALTER TABLE "ActiveOauths" ALTER token_expiration TYPE timestamp')
    admin.execute("""INSERT INTO "ActiveOauths" (token_expiration, token_lifespan, refresh_link)
        SELECT (now() AT TIME ZONE 'Europe/Paris') + n * interval '1 min', 3600, 'r'
        FROM generate_series(-50, 20000) n""")
    admin.execute('CREATE INDEX ON "ActiveOauths" (token_expiration)')
    admin.execute('ANALYZE "ActiveOauths"')
    links = Links(DatabaseTables(), TimeColumn("Europe/Paris"))
    window = Window(datetime.now(UTC), timedelta(minutes=5), datetime.now(UTC))
    explained = links.statement("EXPLAIN SELECT FROM {active} a WHERE {expires}")
    with database.transaction() as connection:
        plan = "\n".join(row[0] for row in connection.execute(explained, window.parameters()))
    assert "Index Cond: (token_expiration < GREATEST" in plan, plan


def test_a_run_that_needs_a_zone_that_the_server_does_not_know_fails_with_the_remedy(
    admin: psycopg.Connection, clean: Clean, open_database: Callable[..., Database]
) -> None:
    admin.execute('CREATE TABLE "Connections" (id bigint, expiration_date timestamp)')
    report = clean(database=open_database(naive_timestamps=named("Cat/Moon")))
    assert report.outcome == "failed"
    assert report.reason is not None
    assert report.reason.startswith('this PostgreSQL does not know the zone "Cat/Moon" of database.naive_timestamps; ')


def test_statements_of_a_session_stay_in_utc(open_database: Callable[..., Database]) -> None:
    with open_database(naive_timestamps="Asia/Tokyo").transaction() as connection:
        assert one(connection, sql.SQL("SELECT {}").format(sql.SQL("current_setting('timezone')"))) == "UTC"
