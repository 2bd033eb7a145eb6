"""A real PostgreSQL for the tests: one server for the session, and databases that are emptied after each test."""

import gc
import os
import secrets
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql
from psycopg.conninfo import make_conninfo

# What is tested is the installed program, in the processes that tests start as well, and not the tree: the tests find
# each other behind it.
sys.path.append(str(Path(__file__).parents[1]))
os.environ["PYTHONSAFEPATH"] = "1"

# A test creates and drops some hundred files of PostgreSQL's. On ext4, the search for an inode that was not deleted in
# the last seconds (recently_deleted) costs more than all else that PostgreSQL does then; in memory there is none.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir():
    found = os.statvfs(MEMORY)
    if found.f_bavail * found.f_frsize >= 4 << 30 and not found.f_flag & (os.ST_NOEXEC | os.ST_RDONLY):
        os.environ["TMPDIR"] = str(MEMORY)

from catfeeder_cron.database import embedded
from catfeeder_cron.database.embedded import EmbeddedServer
from tests.support import servers
from tests.support.databases import TestDatabase, contents_for
from tests.support.loaded import LoadedProgram
from tests.support.program import Program

# A busy machine is no fault of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

_QUICK = ("tests/unit", "tests/integration/test_")


def pytest_configure() -> None:
    # A script ignores SIGINT in what it starts in the background, nohup SIGHUP: so would whatever a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    servers.another()  # which says why it can't serve, before any test fails for that reason


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage in all that is loaded and collected: each time that takes longer than many a test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have every worker of pytest-xdist begin with its share of the slow tests.

    Each is given a stretch of the list, and takes over from the ends of the others' when it is done.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        slow = [item for item in items if not item.nodeid.startswith(_QUICK)]
        quick = [item for item in items if item.nodeid.startswith(_QUICK)]
        bounds = [len(quick) * worker // workers for worker in range(workers + 1)]
        parts = [list(part) for _, part in groupby(slow, _what_stays_together)]
        shares = [
            [*chain(*parts[worker::workers]), *quick[bounds[worker] : bounds[worker + 1]]] for worker in range(workers)
        ]
        # Stretches of one length: what one has too many moves to the next.
        items[:] = [item for share in shares for item in share]


def _what_stays_together(item: pytest.Item) -> str:
    """Return one value for tests that share a module's fixture, which each worker would set up for itself."""
    fixtures = chain(*item._fixtureinfo.name2fixturedefs.values()) if isinstance(item, pytest.Function) else ()
    return str(item.path) if any(fixture.scope == "module" for fixture in fixtures) else item.nodeid


def pytest_report_header() -> str:
    url = servers.another()
    if url is None:
        return "PostgreSQL: the embedded one"
    with psycopg.connect(url) as connection:
        return f"PostgreSQL: {servers.version_of(connection)}, which {servers.VARIABLE} names"


@pytest.fixture(scope="session")
def loaded() -> Iterator[LoadedProgram]:
    """The program, loaded, for commands that need not show how they start."""
    with LoadedProgram() as loaded:
        yield loaded


@pytest.fixture
def program(tmp_path: Path, loaded: LoadedProgram | None) -> Iterator[Program]:
    program = Program(tmp_path, loaded)
    yield program
    for running in program.started:
        running.kill()


@pytest.fixture(scope="session")
def embedded_alone() -> None:
    """Skip a test that is about the embedded server, or does to a server what nobody wants done to another."""
    if servers.another():
        pytest.skip(f"stops, starts or sets up a server of its own, and {servers.VARIABLE} names another")


@pytest.fixture(scope="session")
def server(embedded_alone: None) -> Iterator[EmbeddedServer]:
    """A throw-away server, of which only `database_url`'s database should be written to."""
    with embedded.temporary() as server:
        yield server


@pytest.fixture
def own_server(embedded_alone: None) -> Iterator[EmbeddedServer]:
    """A server of the test's own, to stop and start or to set up in its own way."""
    with embedded.temporary() as server:
        yield server


@pytest.fixture(scope="session")
def _open_database(request: pytest.FixtureRequest) -> Iterator[Callable[[str], TestDatabase]]:
    """Gives the session's database with these contents."""
    server = servers.another() or request.getfixturevalue("server").conninfo
    opened: list[TestDatabase] = []

    @cache
    def open_one(contents: str) -> TestDatabase:
        opened.append(TestDatabase(server, contents))
        return opened[-1]

    yield open_one
    for database in opened:
        database.drop()


@pytest.fixture
def database_url(request: pytest.FixtureRequest, _open_database: Callable[[str], TestDatabase]) -> Iterator[str]:
    """The address of a database, without tables unless the test asks for some. Its sessions end with the test."""
    database = _open_database(contents_for(request.fixturenames))
    database.prepare()
    yield database.url
    database.clear()


@pytest.fixture
def with_schema() -> None:
    """Have the test's database hold what `init-db` creates."""


@pytest.fixture
def with_schema_heard_of_for_long(with_schema: None, database_url: str) -> None:
    """Have it hold that, and know of no silence: soon after one, nobody is taken for dead."""
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute("UPDATE catfeeder_cron.lineage SET written_at = now(), heard_since = now() - interval '1 h'")


@pytest.fixture
def with_tables() -> None:
    """Have the test's database hold what `init-db --with-app-tables` creates."""


@pytest.fixture
def with_indexes() -> None:
    """Have the test's database hold what `init-db --with-app-tables --with-indexes` creates."""


@pytest.fixture
def role(database_url: str) -> Iterator[Callable[..., tuple[str, str]]]:
    """Creates a role that may log in; gives its name and the address with which it does."""
    names: list[sql.Identifier] = []

    def create(options: LiteralString = "") -> tuple[str, str]:
        name, password = f"somebody_{secrets.token_hex(4)}", secrets.token_hex(8)
        with psycopg.connect(database_url, autocommit=True) as admin:
            create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} {}")
            admin.execute(create.format(sql.Identifier(name), password, sql.SQL(options)))
        names.append(sql.Identifier(name))
        return name, make_conninfo(database_url, user=name, password=password)

    yield create
    with psycopg.connect(database_url, autocommit=True) as admin:
        for name in names:
            admin.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(name))
            admin.execute(sql.SQL("DROP ROLE {}").format(name))
