"""The server that the tests run on: one of their own, or the one that CATFEEDER_CRON_TEST_URL names."""

import os
import socket
from functools import cache

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

VARIABLE = "CATFEEDER_CRON_TEST_URL"
OLDEST = 140000


@cache
def another() -> str | None:
    """Return the address of the server that was named, complete: the programs that tests start know no ~/.pgpass.

    Raises UsageError when the tests can't run there.
    """
    url = os.environ.get(VARIABLE)
    if not url:
        return None
    try:
        with psycopg.connect(url) as connection:
            info = connection.info
            row = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
            if row != (True,):
                raise pytest.UsageError(
                    f"{VARIABLE}: the tests create databases and roles and end sessions, so they need a superuser,"
                    f" and {info.user} is none"
                )
            if info.server_version < OLDEST:
                raise pytest.UsageError(f"{VARIABLE}: PostgreSQL {version_of(connection)} is older than 14")
            return make_conninfo(url, user=info.user, password=info.password or None)
    except psycopg.Error as error:
        raise pytest.UsageError(f"{VARIABLE}: {error}") from None


def version_of(connection: psycopg.Connection) -> str:
    return connection.info.parameter_status("server_version") or "of an unknown version"


def port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
