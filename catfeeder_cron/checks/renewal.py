"""Whether OAuth links can be kept alive: a place for the answers, providers that can be asked, runs often enough."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from catfeeder_cron.checks.finding import Finding
from catfeeder_cron.config import JobSettings, ProviderSettings, Settings, format_duration, state_directory
from catfeeder_cron.database import Database
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, RenewalError
from catfeeder_cron.oauth.presets import preset
from catfeeder_cron.oauth.provider import put_together
from catfeeder_cron.renewal.journal import require_writable
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.schedule import longest_gap, schedule_for

_PROVIDERS = """
    SELECT provider_name, token_grabber_base_url, coalesce(client_id::text, '') <> '' FROM {providers}
    ORDER BY provider_name"""

_LIFESPANS = """
    SELECT s.name, count(*), count(*) FILTER (WHERE a.token_lifespan BETWEEN 1 AND %(apart)s),
           count(*) FILTER (WHERE a.token_lifespan IS NULL),
           min(a.token_lifespan) FILTER (WHERE a.token_lifespan > 0)::float8
    FROM {active} a JOIN {services} s ON s.id = a.service_id WHERE {renewable} GROUP BY s.name ORDER BY s.name"""


@dataclass(frozen=True)
class Lifespans:
    """How long the access tokens of a service live: those that end between two runs are `short`."""

    links: int
    short: int
    unknown: int
    shortest_seconds: float | None


def check_state_directory() -> Finding:
    """Return whether the answers of providers could be kept, without which none is asked."""
    folder = state_directory()
    try:
        require_writable(folder)
    except RenewalError as error:
        return Finding("error", "renew-oauth", str(error))
    return Finding("ok", "renew-oauth", f"answers can be kept in {folder}")


def check_providers(database: Database, settings: Settings, job: JobSettings) -> Iterator[Finding]:
    """Yield what stands in the way of asking each provider, often enough. Nothing is sent, and no secret is read.

    Raises DatabaseUnavailable.
    """
    links, apart = Links(settings.database.tables), _time_between_runs(settings, job)
    try:
        with database.transaction() as connection:
            providers = connection.execute(links.statement(_PROVIDERS)).fetchall()
            seconds = apart.total_seconds() if apart else None
            rows = connection.execute(links.statement(_LIFESPANS), {"apart": seconds})
            lifespans = {name: Lifespans(*row) for name, *row in rows}
    except DatabaseUnavailable:
        raise
    except DatabaseError as error:
        yield Finding("error", "providers", str(error))
        return
    table = f'"{settings.database.tables.user_oauth_connection}"'
    for name, token_endpoint, has_client in providers:
        subject = f"provider {name}"
        given = settings.oauth.providers.get(name, ProviderSettings())
        fault = put_together(name, token_endpoint, "(not read)", None, given).fault
        if not has_client:
            yield Finding("warning", subject, f"it has no client_id; fill it in in {table}")
        elif fault:
            yield Finding("error", subject, f"{fault}; it stands in {table}")
        else:
            yield Finding("ok", subject, "its token endpoint can be asked")
        if apart and (too_short := _too_short(name, lifespans.get(name), apart, settings, job)):
            yield Finding("warning", subject, too_short)
    known = {name for name, _, _ in providers}
    for name in lifespans.keys() - known:
        yield Finding(
            "warning",
            f"provider {name}",
            f"{lifespans[name].links} links can't be renewed: their service has no row in {table}; "
            "its provider_name must be the service's name",
        )
    for name in settings.oauth.providers.keys() - known:
        yield Finding(
            "warning",
            f"provider {name}",
            f"[oauth.providers.{name}] is of no use: {table} has no such provider_name; correct the name",
        )


def _time_between_runs(settings: Settings, job: JobSettings) -> timedelta | None:
    """Return how long a token may have to last from one run to the next."""
    schedule = schedule_for("renew-oauth", job, settings.scheduler.timezone)
    gap = longest_gap(schedule, datetime.now(UTC))
    return gap + job.jitter if gap else None


def _too_short(
    name: str, lifespans: Lifespans | None, apart: timedelta, settings: Settings, job: JobSettings
) -> str | None:
    """Say what helps where tokens end between two runs, so that their links are dead until the next one."""
    if lifespans is None:
        return None
    short, known = lifespans.short, lifespans.shortest_seconds
    shortest = apart if known is None else timedelta(seconds=known)
    if lifespans.unknown and (usual := preset(name).access_lifetime) <= apart:
        short, shortest = short + lifespans.unknown, min(shortest, usual)
    if not short:
        return None
    enough = shortest - min(settings.oauth.renew_before, shortest / 4) - job.jitter
    return (
        f"its tokens live {format_duration(shortest)} ({short} of its {lifespans.links} links), and up to "
        f"{format_duration(apart)} pass between two runs of renew-oauth, so those links are dead in between; "
        f'set jobs.renew-oauth.interval = "{max(1, int(enough.total_seconds()))}s" or less'
    )
