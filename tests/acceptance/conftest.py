"""What the acceptance tests have in common: the program, and databases for it."""

from collections.abc import Iterator

import psycopg
import pytest

from tests.support.program import Program


@pytest.fixture
def admin(database_url: str) -> Iterator[psycopg.Connection]:
    """The superuser in the test's database, in autocommit mode."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def app_tables(program: Program, with_tables: None, database_url: str) -> None:
    """A configuration for the test's database, and in there what `init-db --with-app-tables` creates."""
    program.configure(database_url)
