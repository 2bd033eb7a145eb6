"""Whether the OAuth providers can be asked for new tokens, as far as the tables and the configuration tell."""

from collections.abc import Iterator

from psycopg import sql

from catfeeder_cron.checks.finding import Finding
from catfeeder_cron.config import ProviderSettings, Settings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import DatabaseError
from catfeeder_cron.oauth.provider import put_together

_PROVIDERS = """
    SELECT provider_name, token_grabber_base_url, coalesce(client_id::text, '') <> '' FROM {table}
    ORDER BY provider_name"""


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
            continue
        given = settings.oauth.providers.get(name, ProviderSettings())
        fault = put_together(name, token_endpoint, "(not read)", None, given).fault
        if fault:
            yield Finding("error", subject, f"{fault}; it stands in {table.as_string()}")
        else:
            yield Finding("ok", subject, "its token endpoint can be asked")
    for name in settings.oauth.providers.keys() - {name for name, _, _ in rows}:
        yield Finding(
            "warning",
            f"provider {name}",
            f"[oauth.providers.{name}] is of no use: {table.as_string()} has no such provider_name; correct the name",
        )
