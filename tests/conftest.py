"""A real PostgreSQL for the tests: one server and one database for the session, emptied after each test."""

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg.conninfo import make_conninfo

from catfeeder_cron import embedded
from catfeeder_cron.embedded import EmbeddedServer

# A busy machine is no fault of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A new database for each test would cost 70 to 200 ms, this a tenth. DROP waits for the sessions that are closing.
_EMPTY = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid();
    DO $$
    DECLARE schema text;
    BEGIN
        FOR schema IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
            EXECUTE format('DROP SCHEMA %I CASCADE', schema);
        END LOOP;
        EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
    END $$;
    CREATE SCHEMA public AUTHORIZATION pg_database_owner;
    GRANT USAGE ON SCHEMA public TO PUBLIC"""


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """A throw-away server, of which only `database_url`'s database should be written to."""
    with embedded.temporary() as server:
        yield server


@pytest.fixture(scope="session")
def _url(server: EmbeddedServer) -> str:
    with psycopg.connect(server.conninfo, autocommit=True) as connection:
        connection.execute("CREATE DATABASE test TEMPLATE template0")
    return make_conninfo(server.conninfo, dbname="test")


@pytest.fixture
def database_url(_url: str) -> Iterator[str]:
    """The address of a database without tables; afterwards all its sessions are ended and all its schemas dropped."""
    yield _url
    with psycopg.connect(_url, autocommit=True) as connection:
        connection.execute(_EMPTY)
