"""Which links need a new login, and when: from what the provider said, what is known of it, and what happened."""

from collections.abc import Callable
from datetime import timedelta

from catfeeder_cron.config import DatabaseTables, OAuthSettings
from catfeeder_cron.renewal.forecast import LoginNeeded, logins_needed
from tests.integration.oauth.conftest import World
from tests.integration.oauth.provider import Provider, reply

Serve = Callable[..., Provider]


def forecast(world: World, days: int = 400) -> list[LoginNeeded]:
    settings = OAuthSettings.model_validate(world.settings)
    return logins_needed(world.database, DatabaseTables(), settings, timedelta(days=days))


def days_left(world: World, needed: LoginNeeded) -> float:
    row = world.connection.execute("SELECT now()").fetchone()
    assert row is not None
    return float((needed.needed_at - row[0]) / timedelta(days=1))


def test_a_link_that_was_called_dead_needs_a_login_now_until_there_was_one(world: World, provider: Provider) -> None:
    id = world.add_link("nobody knows this")
    assert forecast(world) == []
    world.renew()
    [needed] = forecast(world, days=0)
    assert (needed.oauth_id, needed.user_id, needed.provider, needed.needed_now) == (id, 7, "acme", True)
    world.connection.execute("UPDATE \"ActiveOauths\" SET refresh_link = 'after the login'")
    assert forecast(world) == []


def test_a_link_without_a_refresh_token_lasts_as_long_as_its_access_token(world: World, provider: Provider) -> None:
    ended = world.add_link("", left="-1 day")
    ending = world.add_link(None, left="3 days")
    world.add_link("", left="-1 day", span=0)
    assert [(needed.oauth_id, needed.needed_now) for needed in forecast(world)] == [(ended, True), (ending, False)]
    assert [needed.oauth_id for needed in forecast(world, days=2)] == [ended]


def test_the_end_that_the_provider_has_said_goes_before_what_is_known(world: World, serve: Serve) -> None:
    answer = {"access_token": "new", "expires_in": 3600, "refresh_token": "next", "refresh_token_expires_in": 86400}
    world.add_provider(serve(script=lambda _: reply(200, answer)), "github")
    world.add_link("r", "github")
    world.renew()
    [needed] = forecast(world)
    assert 0.99 < days_left(world, needed) <= 1


def test_a_known_lifetime_counts_from_the_last_renewal(world: World, provider: Provider) -> None:
    world.add_provider(provider, "google")
    world.add_provider(provider, "discord")
    world.add_link(provider.log_in("tom"), "google", left="-10 days")
    world.add_link(provider.log_in("tim"), "discord", left="-10 days")
    [needed] = forecast(world)
    assert 169 < days_left(world, needed) < 170
    world.renew()
    [needed] = forecast(world)
    assert 179 < days_left(world, needed) <= 180


def test_where_a_renewal_extends_nothing_it_counts_from_the_consent(world: World, provider: Provider) -> None:
    world.add_provider(provider, "spotify")
    id = world.add_link(provider.log_in("tom"), "spotify", left="-10 days")
    for _ in range(3):
        [needed] = forecast(world)
        assert 169 < days_left(world, needed) < 170
        assert world.renew().counts["renewed"] == 1
        world.connection.execute('UPDATE "ActiveOauths" SET token_expiration = now()')

    world.connection.execute(
        "UPDATE \"ActiveOauths\" SET refresh_link = 'consented again', token_expiration = now() + interval '1 h'"
    )
    [needed] = forecast(world)
    assert (needed.oauth_id, round(days_left(world, needed))) == (id, 180)


def test_the_configuration_says_what_nobody_else_knows(world: World, provider: Provider) -> None:
    world.add_link(provider.log_in("tom"), left="1 h")
    assert forecast(world) == []
    world.settings["providers"] = {"acme": {"refresh_lifetime": "30d"}}
    [needed] = forecast(world)
    assert 29.9 < days_left(world, needed) < 30
    assert needed.as_json()["needed_now"] is False
