"""What the acceptance tests have in common: the program, and databases for it."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import psycopg
import pytest

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.schema.application import create_tables
from tests.acceptance.program import Program
from tests.support.loaded import LoadedProgram


@pytest.fixture
def program(tmp_path: Path, loaded: LoadedProgram | None) -> Iterator[Program]:
    program = Program(tmp_path, loaded)
    yield program
    for running in program.started:
        running.kill()


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
