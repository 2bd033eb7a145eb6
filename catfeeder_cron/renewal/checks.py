"""Check that OAuth links can be renewed: answers can be kept, providers can be asked, and runs are frequent enough."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from catfeeder_cron.config import JobSettings, Settings, state_directory
from catfeeder_cron.database import Database
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, RenewalError
from catfeeder_cron.oauth.presets import preset
from catfeeder_cron.oauth.provider import Provider
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.journal import require_writable
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.report import Finding, Level
from catfeeder_cron.schedule import longest_gap
from catfeeder_cron.times import format_duration

_NAMES = "SELECT provider_name FROM {providers} ORDER BY provider_name"

# This reads all links, unlike a run, which reads the due ones.
_LIFESPANS = """
    SELECT s.name, count(*), count(*) FILTER (WHERE a.token_lifespan BETWEEN 1 AND %(apart)s),
           count(*) FILTER (WHERE a.token_lifespan IS NULL),
           min(a.token_lifespan) FILTER (WHERE a.token_lifespan > 0)::float8
    FROM {active} a LEFT JOIN {services} s ON s.id = a.service_id WHERE {renewable} GROUP BY s.name ORDER BY s.name"""


@dataclass(frozen=True)
class Lifespans:
    """The lifespans of a service's access tokens. `short` counts those that end between two runs."""

    links: int
    short: int
    unknown: int
    shortest_seconds: float | None


def check_links(job_id: str, database: Database, settings: Settings, tables_are_right: bool) -> Iterator[Finding]:
    """Yield the findings about the job that renews tokens, apart from its tables. Raises DatabaseUnavailable."""
    yield _place_for_answers(job_id)
    # Without the right tables the providers can't be read.
    if tables_are_right:
        yield from _providers(job_id, database, settings)


def _place_for_answers(job_id: str) -> Finding:
    """Return whether the journals can be written; without a journal no provider is asked."""
    folder = state_directory()
    try:
        require_writable(folder)
    except RenewalError as error:
        return Finding("error", job_id, str(error))
    return Finding("ok", job_id, f"answers can be kept in {folder}")


def _providers(job_id: str, database: Database, settings: Settings) -> Iterator[Finding]:
    """Yield a finding for each provider: whether it can be asked, and often enough. Sends nothing, shows no secret."""
    job = settings.require_job(job_id)
    apart = _time_between_runs(settings, job_id)
    try:
        links = Links.find(database, settings.database.tables)
        with database.transaction() as connection:
            names = [name for (name,) in connection.execute(links.statement(_NAMES))]
            known = providers.load(connection, links, settings.oauth, names)
            seconds = apart.total_seconds() if apart else None
            rows = connection.execute(links.statement(_LIFESPANS), {"apart": seconds})
            lifespans: dict[str | None, Lifespans] = {name: Lifespans(*row) for name, *row in rows}
    except DatabaseUnavailable:
        raise
    except DatabaseError as error:
        yield Finding("error", "providers", str(error))
        return
    table = f'"{settings.database.tables.user_oauth_connection}"'
    for name, (provider, state) in known.items():
        subject = f"provider {name}"
        yield _asked(subject, provider, state, table)
        if apart and (too_short := _too_short(name, lifespans.get(name), apart, settings, job)):
            yield Finding("warning", subject, too_short)
    if nowhere := lifespans.pop(None, None):
        yield Finding(
            "warning",
            job_id,
            f"{nowhere.links} links can't be renewed: their service_id is none of "
            f'"{settings.database.tables.services}"; correct it',
        )
    for service in lifespans.keys() - known.keys():
        yield Finding(
            "warning",
            f"provider {service}",
            f"{lifespans[service].links} links can't be renewed: their service has no row in {table}; "
            "its provider_name must be the service's name",
        )
    for name in settings.oauth.providers.keys() - known.keys():
        yield Finding(
            "warning",
            f"provider {name}",
            f"[oauth.providers.{name}] is of no use: {table} has no such provider_name; correct the name",
        )


def _asked(subject: str, provider: Provider, state: providers.ProviderState, table: str) -> Finding:
    """Return whether a run would ask a provider for tokens, by the provider's settings and its pause."""
    if not provider.client_id:
        return Finding("warning", subject, f"it has no client_id; fill it in in {table}")
    if provider.fault:
        return Finding("error", subject, f"{provider.fault}; it stands in {table}")
    if state.paused_seconds > 0:
        remedy = f"; correct its row in {table}, or its client_auth" if state.refused else ""
        level: Level = "error" if state.refused else "warning"
        pause = format_duration(timedelta(seconds=round(state.paused_seconds)))
        return Finding(level, subject, f"it is paused for {pause} more: {state.reason}{remedy}")
    return Finding("ok", subject, "its URL and client_id are filled in")


def _time_between_runs(settings: Settings, job_id: str) -> timedelta | None:
    """Return the longest time between two runs, which a token has to last."""
    gap = longest_gap(settings.schedule(job_id), datetime.now(UTC))
    return gap + settings.require_job(job_id).jitter if gap else None


def _too_short(
    name: str, lifespans: Lifespans | None, apart: timedelta, settings: Settings, job: JobSettings
) -> str | None:
    """Return the warning, with its remedy, if tokens end between two runs, so that their links are dead meanwhile."""
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
