"""What the acceptance tests have in common: the program, and databases for it."""

from collections.abc import Iterator
from itertools import chain

import psycopg
import pytest

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.schema.application import create_tables
from tests.support.program import Program


@pytest.fixture
def admin(database_url: str) -> Iterator[psycopg.Connection]:
    """The superuser in the test's database, in autocommit mode."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def app_tables(program: Program, database_url: str) -> None:
    """A configuration for the test's database, and in there what `init-db --with-app-tables` creates."""
    program.configure(database_url)
    settings = DatabaseSettings.model_validate({"url": database_url})
    with Database(settings) as database:
        for _ in chain(schema.upgrade(database), create_tables(database, settings.tables)):
            pass
