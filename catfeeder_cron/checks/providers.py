"""Whether the OAuth providers can be asked for new tokens, as far as the tables and the configuration tell."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from psycopg import sql

from catfeeder_cron.checks.finding import Finding
from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import DatabaseError

_PROVIDERS = """
    SELECT provider_name, token_grabber_base_url, coalesce(client_id::text, '') <> '' FROM {table}
    ORDER BY provider_name"""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check_providers(database: Database, settings: Settings) -> Iterator[Finding]:
    """Yield a finding for every provider. Nothing is sent anywhere, and no secret is read."""
    tables = settings.database.tables
    table = sql.Identifier(tables.schema_, tables.user_oauth_connection)
    try:
        with database.transaction() as connection:
            rows = connection.execute(sql.SQL(_PROVIDERS).format(table=table)).fetchall()
    except DatabaseError as error:
        yield Finding("error", "providers", f"{table.as_string()} can't be read: {error}")
        return
    for name, token_endpoint, has_client in rows:
        subject = f"provider {name}"
        if not has_client:
            yield Finding("warning", subject, f"it has no client_id; fill it in in {table.as_string()}")
        else:
            given = settings.oauth.providers.get(name)
            yield _endpoint(subject, token_endpoint or "", allow_http=bool(given and given.allow_http))
    for name in settings.oauth.providers.keys() - {name for name, _, _ in rows}:
        yield Finding(
            "warning",
            f"provider {name}",
            f"[oauth.providers.{name}] is of no use: {table.as_string()} has no such provider_name; correct the name",
        )


def _endpoint(subject: str, url: str, *, allow_http: bool) -> Finding:
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    except ValueError:
        scheme, host = "", None
    if scheme == "https" and host:
        return Finding("ok", subject, "its token endpoint is https")
    if scheme == "http" and (host in _LOOPBACK or (host and allow_http)):
        return Finding("ok", subject, "its token endpoint is plain http, as allowed")
    if scheme == "http":
        return Finding(
            "error",
            subject,
            "its token endpoint is plain http; correct token_grabber_base_url, or set allow_http = true",
        )
    return Finding("error", subject, "its token_grabber_base_url is no URL; correct it")
