"""Find the links that will need a new login of their user, when and why, because no renewal can keep them alive."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from catfeeder_cron.config import DatabaseTables, OAuthSettings
from catfeeder_cron.database import Database
from catfeeder_cron.oauth.presets import preset
from catfeeder_cron.renewal.links import Links

# `lifetimes` holds the usual lifetimes of each provider's tokens, `links` adds them to each row, `needs` decides by the
# surest source: the provider called the token dead; there is no refresh token; the provider said when it ends; its
# usual lifetime is known, counted from the last renewal or from the user's consent. The row itself shows the last
# renewal, no matter which program made it. For a token that this program did not store (`held` differs), the row's own
# times count.
_FORECAST = """
    WITH lifetimes AS (
        SELECT * FROM unnest(%(names)s::text[], %(seconds)s::float8[], %(extends)s::boolean[])
            AS l(provider, seconds, extends)),
    links AS (
        SELECT a.id, a.user_id, s.name AS provider, {ends} AS expires_at,
               coalesce(a.refresh_link, '') = '' AS nothing_to_renew_with,
               t.dead IS NOT DISTINCT FROM {hash} AS is_dead, t.dead_since,
               CASE WHEN t.held = {hash} THEN t.refresh_expires_at END AS said,
               CASE WHEN l.extends OR t.held IS DISTINCT FROM {hash}
                    THEN {issued} ELSE t.consented_at END + l.seconds * interval '1 s' AS known
        FROM {active} a LEFT JOIN {services} s ON s.id = a.service_id
        LEFT JOIN catfeeder_cron.oauth_tokens t ON t.oauth_id = a.id
        LEFT JOIN lifetimes l ON l.provider = s.name
        WHERE coalesce(a.token_lifespan, 1) <> 0),
    needs AS (
        SELECT id, user_id, provider,
               CASE WHEN is_dead AND NOT nothing_to_renew_with THEN least(dead_since, now())
                    WHEN nothing_to_renew_with THEN expires_at ELSE coalesce(said, known) END AS needed_at,
               CASE WHEN is_dead AND NOT nothing_to_renew_with THEN 'the provider called its refresh token invalid'
                    WHEN nothing_to_renew_with THEN 'it has no refresh token, and its access token ends'
                    WHEN said IS NOT NULL THEN 'its refresh token ends, as the provider said'
                    ELSE 'its refresh token ends, by what is known of the provider' END AS reason
        FROM links)
    SELECT id, user_id, provider, greatest(needed_at, '0001-01-02'), needed_at <= now(), reason FROM needs
    WHERE needed_at <= now() + %(ahead)s ORDER BY needed_at, id"""

_NAMES = "SELECT name FROM {services}"


@dataclass(frozen=True)
class LoginNeeded:
    """A link whose user has to log in again."""

    oauth_id: int
    user_id: int | None
    provider: str | None
    needed_at: datetime
    needed_now: bool
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Return an object for `forecast --json`."""
        return {
            "oauth_id": self.oauth_id,
            "user_id": self.user_id,
            "provider": self.provider,
            "needed_at": self.needed_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "needed_now": self.needed_now,
            "reason": self.reason,
        }


def logins_needed(
    database: Database, tables: DatabaseTables, settings: OAuthSettings, ahead: timedelta
) -> list[LoginNeeded]:
    """Return the links whose user has to log in now or within `ahead`, the most urgent first."""
    links = Links.find(database, tables)
    with database.transaction() as connection:
        names = [name for (name,) in connection.execute(links.statement(_NAMES))]
        lifetimes = {name: lifetime for name in names if (lifetime := _refresh_lifetime(name, settings))}
        parameters = {
            "names": list(lifetimes),
            "seconds": [lifetime.total_seconds() for lifetime in lifetimes.values()],
            "extends": [preset(name).renewal_extends for name in lifetimes],
            "ahead": ahead,
        }
        return [LoginNeeded(*row) for row in connection.execute(links.statement(_FORECAST), parameters)]


def _refresh_lifetime(name: str, settings: OAuthSettings) -> timedelta | None:
    configured = settings.providers.get(name)
    return (configured.refresh_lifetime if configured else None) or preset(name).refresh_lifetime
