"""Read how each provider is asked, and keep the pauses of providers where every daemon sees them, over restarts too."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from psycopg import sql

from catfeeder_cron.config import OAuthSettings, ProviderSettings
from catfeeder_cron.database import Connection, Database, single
from catfeeder_cron.oauth.presets import ClientAuth
from catfeeder_cron.oauth.provider import Provider, put_together
from catfeeder_cron.renewal.links import Links

_LOAD = """
    SELECT DISTINCT ON (provider_name) provider_name, token_grabber_base_url, client_id::text, client_secret
    FROM {providers} WHERE provider_name = ANY (%(names)s) ORDER BY provider_name, id"""

_STATES = """
    SELECT provider, fingerprint, greatest(extract(epoch FROM paused_until - now()), 0)::float8, refused, reason,
           client_auth
    FROM catfeeder_cron.oauth_providers WHERE provider = ANY (%(names)s)"""

# A pause that we choose doubles with each one that follows it; a pause that the provider asks for is as long as it
# says. When several processes pause a provider at the same time, one pause is stored, the longest.
_PAUSE = """
    INSERT INTO catfeeder_cron.oauth_providers AS o
        (provider, fingerprint, paused_until, refused, reason, failures)
    VALUES (%(provider)s, %(fingerprint)s,
            now() + coalesce(%(given)s, %(first)s * (0.9 + random() / 5)) * interval '1 s', %(refused)s, %(reason)s,
            (%(given)s IS NULL)::int)
    ON CONFLICT (provider) DO UPDATE SET
        fingerprint = excluded.fingerprint, refused = excluded.refused, reason = excluded.reason,
        client_auth = CASE WHEN o.fingerprint = excluded.fingerprint THEN o.client_auth END,
        failures = CASE WHEN o.fingerprint <> excluded.fingerprint THEN excluded.failures
                        WHEN o.paused_until > now() THEN o.failures ELSE o.failures + excluded.failures END,
        paused_until = CASE
            WHEN o.fingerprint <> excluded.fingerprint THEN excluded.paused_until
            ELSE greatest(o.paused_until,
                          CASE WHEN %(given)s IS NOT NULL THEN excluded.paused_until
                               ELSE now() + least(%(longest)s, %(first)s * 2 ^ least(o.failures, 12))
                                            * (0.9 + random() / 5) * interval '1 s' END) END
    RETURNING extract(epoch FROM paused_until - now())::float8"""

# `paused_until <= now()` keeps a pause that another process has stored meanwhile.
_RESUME = """
    UPDATE catfeeder_cron.oauth_providers
    SET paused_until = NULL, refused = false, reason = NULL, failures = 0
    WHERE provider = %(provider)s AND fingerprint = %(fingerprint)s AND paused_until <= now()"""

_LEARN = """
    INSERT INTO catfeeder_cron.oauth_providers AS o (provider, fingerprint, client_auth)
    VALUES (%(provider)s, %(fingerprint)s, %(client_auth)s)
    ON CONFLICT (provider) DO UPDATE SET
        client_auth = excluded.client_auth, fingerprint = excluded.fingerprint,
        paused_until = CASE WHEN o.fingerprint = excluded.fingerprint THEN o.paused_until END,
        refused = o.refused AND o.fingerprint = excluded.fingerprint,
        reason = CASE WHEN o.fingerprint = excluded.fingerprint THEN o.reason END,
        failures = CASE WHEN o.fingerprint = excluded.fingerprint THEN o.failures ELSE 0 END"""


@dataclass(frozen=True)
class ProviderPause:
    """Why nothing is sent to a provider, and for how long, in seconds.

    `first` is the length of the first pause, which doubles each time up to `longest`; `given` is the length that the
    provider asked for, if it did.
    """

    reason: str
    first: float
    longest: float
    refused: bool = False
    given: float | None = None


def refused(reason: str) -> ProviderPause:
    """Return the pause for a provider that refuses this client: the operator has to correct its settings."""
    return ProviderPause(reason, first=300, longest=4 * 3600, refused=True)


def throttled(reason: str, retry_after: float | None) -> ProviderPause:
    """Return the pause for a provider that asks for fewer requests; `retry_after` is in seconds."""
    return ProviderPause(reason, first=60, longest=3600, given=retry_after)


def out_of_order(reason: str) -> ProviderPause:
    """Return the pause for a provider that can't serve anyone at present."""
    return ProviderPause(reason, first=30, longest=1800)


@dataclass(frozen=True)
class ProviderState:
    """What earlier runs have stored about a provider. `paused_seconds` is the rest of its pause."""

    paused_seconds: float = 0
    refused: bool = False
    reason: str | None = None
    client_auth: ClientAuth | None = None


def load(
    connection: Connection, links: Links, settings: OAuthSettings, names: Sequence[str]
) -> dict[str, tuple[Provider, ProviderState]]:
    """Return the providers of these names that the database has, each with its stored state."""
    wanted = {"names": list(names)}
    providers = [
        put_together(name, url, client_id, client_secret, settings.providers.get(name, ProviderSettings()))
        for name, url, client_id, client_secret in connection.execute(links.statement(_LOAD), wanted)
    ]
    states = _states(connection, wanted)
    return {provider.name: _with_stored_method(provider, states.get(provider.name)) for provider in providers}


def pause(database: Database, provider: Provider, pause: ProviderPause) -> float:
    """Make every daemon stop sending to the provider; return for how many seconds."""
    parameters = {
        "provider": provider.name,
        "fingerprint": provider.fingerprint,
        "reason": pause.reason,
        "refused": pause.refused,
        "first": pause.first,
        "longest": pause.longest,
        "given": pause.given,
    }
    ((seconds,),) = database.query(_PAUSE, parameters)
    return float(seconds)


def resume(database: Database, provider: Provider) -> None:
    """Delete the provider's pause if it is over, because the provider answers again."""
    database.execute(_RESUME, {"provider": provider.name, "fingerprint": provider.fingerprint})


def learn(database: Database, provider: Provider, client_auth: ClientAuth) -> None:
    """Store the method by which the provider lets this client authenticate."""
    parameters = {"provider": provider.name, "fingerprint": provider.fingerprint, "client_auth": client_auth}
    database.execute(_LEARN, parameters)


def _states(connection: Connection, wanted: dict[str, Any]) -> dict[str, tuple[bytes, ProviderState]]:
    if not single(connection, "SELECT to_regclass('catfeeder_cron.oauth_providers') IS NOT NULL")[0]:
        return {}  # a dry run before the daemon's schema was created
    rows = connection.execute(sql.SQL(_STATES), wanted)
    return {
        name: (fingerprint, ProviderState(seconds or 0, refused, reason, client_auth))
        for name, fingerprint, seconds, refused, reason, client_auth in rows
    }


def _with_stored_method(
    provider: Provider, known: tuple[bytes, ProviderState] | None
) -> tuple[Provider, ProviderState]:
    if known is None or known[0] != provider.fingerprint:
        return provider, ProviderState()
    state = known[1]
    if state.client_auth and not provider.auth_is_configured:
        provider = replace(provider, client_auth=state.client_auth)
    return provider, state
