"""Adds the settings for libpq that the operator's address leaves open."""

import re
from datetime import timedelta

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from catfeeder_cron.errors import ConfigurationError

# A connection that was cut off silently is given up after 20 seconds; the kernel would wait a quarter of an hour.
_KEEPALIVES = {"keepalives_idle": 5, "keepalives_interval": 3, "keepalives_count": 5, "tcp_user_timeout": 20_000}


def with_defaults(conninfo: str, application_name: str, connect_timeout: timedelta) -> str:
    """Add our defaults to the address; where it sets a value itself, that value stays.

    Raises ConfigurationError, which does not quote the address, where libpq would not understand it.
    """
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        # libpq's own message quotes the address, password and all.
        raise ConfigurationError(
            "the database address is not one that libpq understands; expected postgresql://USER@HOST:PORT/DATABASE"
        ) from None
    if "@" in str(given.get("host", "")) or not re.fullmatch("[0-9,]*", str(given.get("port", ""))):
        # libpq took a part of the password for the host or the port, and its message would quote that.
        raise ConfigurationError(
            "the database address has no usable host and port; in a user or password write %40 for @ and %2F for /"
        )
    defaults: dict[str, int | str] = {
        **_KEEPALIVES,
        "client_encoding": "utf8",  # even if the database has another encoding
        "application_name": application_name,
        "connect_timeout": max(2, round(connect_timeout.total_seconds())),
    }
    return make_conninfo(conninfo, **{key: value for key, value in defaults.items() if key not in given})


def connect_seconds(conninfo: str) -> float:
    """Return the connect_timeout of an address that `with_defaults` has completed; no limit is a day."""
    seconds = float(conninfo_to_dict(conninfo).get("connect_timeout") or 0)
    return seconds if seconds > 0 else 86_400.0


def password_replaced(conninfo: str, by: str) -> str:
    """Return an address with the password of another, which must be the same otherwise; else the address as it is.

    A process stays with the database that it was started for, whatever a file says later.
    """
    return by if differ_in_password_at_most(conninfo, by) else conninfo


def differ_in_password_at_most(one: str, other: str) -> bool:
    """Tell whether two addresses are those of the same database and user."""
    try:
        given, new = conninfo_to_dict(one), conninfo_to_dict(other)
    except psycopg.ProgrammingError:
        return False
    given.pop("password", None)
    new.pop("password", None)
    return given == new
