"""renew-oauth where `token_expiration` has no zone: nothing is renewed too late, also while the clocks are set back."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from zoneinfo import ZoneInfo

import pytest

from catfeeder_cron.config import DatabaseSettings, DatabaseTables, OAuthSettings
from catfeeder_cron.database import Database
from catfeeder_cron.renewal.forecast import logins_needed
from tests.integration.oauth.conftest import World
from tests.integration.oauth.provider import Provider
from tests.integration.zones import set_back, set_forward

MINUTE = timedelta(minutes=1)


@pytest.fixture
def in_zone(world: World) -> Iterator[Callable[[ZoneInfo], None]]:
    """Gives the column another type, and the zone to the database that the job uses."""

    def change(zone: ZoneInfo) -> None:
        world.connection.execute('ALTER TABLE "ActiveOauths" ALTER token_expiration TYPE timestamp')
        settings = {"url": world.url, "naive_timestamps": zone}
        world.database = opened.enter_context(Database(DatabaseSettings.model_validate(settings)))

    with ExitStack() as opened:
        yield change


def add_link(world: World, provider: Provider, zone: ZoneInfo, minutes: float, span: int = 3600) -> int:
    """Insert a link whose token ends in so many minutes, as the clocks of the zone will show it."""
    row = world.connection.execute(
        'INSERT INTO "ActiveOauths" (token, token_expiration, token_lifespan, refresh_link, service_id)'
        " SELECT 'old', (now() + %s) AT TIME ZONE %s, %s, %s, id FROM \"Services\" RETURNING id",
        [minutes * MINUTE, zone.key, span, provider.log_in(f"in {minutes}")],
    ).fetchone()
    assert row is not None
    return int(row[0])


def renewed(world: World) -> set[int]:
    return {id for (id,) in world.connection.execute("SELECT id FROM \"ActiveOauths\" WHERE token <> 'old'")}


@pytest.mark.parametrize("zone", ["Europe/Paris", "America/New_York", "Australia/Lord_Howe"])
def test_a_token_is_renewed_and_stored_by_the_clock_of_the_zone(
    world: World, provider: Provider, in_zone: Callable[[ZoneInfo], None], zone: str
) -> None:
    in_zone(ZoneInfo(zone))
    due = add_link(world, provider, ZoneInfo(zone), 1)
    add_link(world, provider, ZoneInfo(zone), 180)

    assert world.renew(dry_run=True).counts["would_renew"] == 1
    assert world.renew().counts["renewed"] == 1

    assert renewed(world) == {due}
    row = world.connection.execute(
        'SELECT token_expiration - now() AT TIME ZONE %s FROM "ActiveOauths" WHERE id = %s', [zone, due]
    ).fetchone()
    assert row is not None
    assert 50 * MINUTE < row[0] <= 60 * MINUTE
    assert world.renew().counts["due"] == 0


@pytest.mark.parametrize("change", range(-110, 111, 20))
@pytest.mark.parametrize("set_clocks", [set_back, set_forward])
def test_whatever_the_clocks_do_no_token_ends_before_it_is_renewed(
    world: World,
    provider: Provider,
    in_zone: Callable[[ZoneInfo], None],
    set_clocks: Callable[[timedelta], ZoneInfo],
    change: int,
) -> None:
    """The clocks change `change` minutes from now. The next run is within 30 minutes, the margin is 5."""
    zone = set_clocks(change * MINUTE)
    in_zone(zone)
    links = {add_link(world, provider, zone, minutes): minutes for minutes in range(-120, 181, 5)}

    report = world.renew()

    assert report.counts["renewed"] == report.counts["due"]
    found = {links[id] for id in renewed(world)}
    assert found >= set(range(-120, 1, 5))
    assert max(found) <= 36 + 60, "an hour too early at most"
    back = set_clocks is set_back
    between = {minutes for minutes in links.values() if minutes > 36 and minutes in found}
    assert all(back and change <= minutes < change + 60 for minutes in between), "only where the clock shows it twice"
    stored = world.connection.execute(
        'SELECT (token_expiration AT TIME ZONE %s) - now() FROM "ActiveOauths" WHERE id = ANY (%s)',
        [zone.key, list(renewed(world))],
    ).fetchall()
    # PostgreSQL takes the later reading; the job the earlier one.
    twice = MINUTE * 60 if back and change - 61 < 60 < change + 1 else timedelta(0)
    assert all(each[0] <= 60 * MINUTE + twice for each in stored)


def test_a_forecast_reads_the_clock_of_the_zone(
    world: World, provider: Provider, in_zone: Callable[[ZoneInfo], None]
) -> None:
    in_zone(ZoneInfo("America/New_York"))
    id = add_link(world, provider, ZoneInfo("America/New_York"), 60)
    world.connection.execute("UPDATE \"ActiveOauths\" SET refresh_link = ''")
    [needed] = logins_needed(world.database, DatabaseTables(), OAuthSettings(), timedelta(days=1))
    assert needed.oauth_id == id
    assert not needed.needed_now
    assert 50 * MINUTE < needed.needed_at - world.now() <= 60 * MINUTE
