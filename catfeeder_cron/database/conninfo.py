"""What libpq is told beside the address that the operator gave."""

import re
from datetime import timedelta

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from catfeeder_cron.errors import ConfigurationError

# A connection that was cut off without a word is given up after a minute instead of the kernel's quarter of an hour.
_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}


def with_defaults(conninfo: str, application_name: str, connect_timeout: timedelta) -> str:
    """Add what the address leaves open; its own words win.

    Raises ConfigurationError where libpq would not understand it, in words that don't quote it.
    """
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        # libpq's own message quotes the address, password and all.
        raise ConfigurationError(
            "the database address is not one that libpq understands; expected postgresql://USER@HOST:PORT/DATABASE"
        ) from None
    if "@" in str(given.get("host", "")) or not re.fullmatch("[0-9,]*", str(given.get("port", ""))):
        # What was taken for the host or the port is part of the password, and libpq's message would quote it.
        raise ConfigurationError(
            "the database address has no usable host and port; in a user or password write %40 for @ and %2F for /"
        )
    defaults: dict[str, int | str] = {
        **_KEEPALIVES,
        "client_encoding": "utf8",  # whatever the database's is
        "application_name": application_name,
        "connect_timeout": max(2, round(connect_timeout.total_seconds())),
    }
    return make_conninfo(conninfo, **{key: value for key, value in defaults.items() if key not in given})
