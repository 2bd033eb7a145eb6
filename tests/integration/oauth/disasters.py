"""Processes that can be killed, a database that goes away, and what has to be left of it all."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.integration.oauth.conftest import World
from tests.integration.oauth.provider import Provider, Raw, Request, Script
from tests.support.loaded import Copy
from tests.support.waiting import eventually


@contextmanager
def processes(world: World, longest_file: int | None = None, *, logs: bool = True) -> Iterator[Callable[[], Copy]]:
    """Yield what starts a `run-once renew-oauth` in a process of its own; all are killed at the end.

    None can write a file of more than `longest_file` bytes, as on a disk that is full. Without `logs` they have no log.
    """
    folder = world.state_directory.parent
    config = folder / "config.toml"
    config.write_text(f'[database]\nurl = "{world.url}"\n[logging]\nlevel = "debug"\n')
    config.chmod(0o600)
    environment = {**os.environ, "STATE_DIRECTORY": str(world.state_directory)}
    started: list[Copy] = []

    def start() -> Copy:
        path = folder / "log" if logs and not longest_file else Path(os.devnull)
        with path.open("ab") as log:
            started.append(
                world.loaded.start(
                    *("--config", str(config), "run-once", "renew-oauth"),
                    folder=folder,
                    environment=environment,
                    stdout=log.fileno(),
                    stderr=log.fileno(),
                    longest_file=longest_file,
                )
            )
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()


wait_until = eventually


def break_disk(process: Copy) -> None:
    """Have a process write nothing to files from now on, not even where it has reserved space."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))


def stored(world: World, provider: Provider) -> set[str]:
    """Return the users whose row holds what the provider handed out last."""
    rows = world.connection.execute('SELECT token, refresh_link FROM "ActiveOauths"').fetchall()
    tokens = {user: token for token, user in provider.live.items()}
    return {user for user, access in provider.access_tokens.items() if (access, tokens.get(user)) in rows}


class Block:
    """Keeps all but the superuser's open sessions out of a database."""

    def __init__(self, admin: psycopg.Connection, name: str) -> None:
        self._admin, self._name, self.begun = admin, name, False

    def __call__(self) -> None:
        if not self.begun:
            self.begun = True
            self._admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(self._name)))
            self._admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND application_name LIKE 'catfeeder-cron%%'",
                [self._name],
            )

    def end(self) -> None:
        self._admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(sql.Identifier(self._name)))


@contextmanager
def blocked(world: World) -> Iterator[Block]:
    """Yield what cuts everybody off from the database but the test itself; it ends with the block of `with`."""
    name = str(conninfo_to_dict(world.url)["dbname"])
    with psycopg.connect(world.url, dbname="postgres", autocommit=True) as admin:
        block = Block(admin, name)
        try:
            yield block
        finally:
            block.end()


def cutting_off(block: Block, provider: Provider, after: int = 0) -> Script:
    """Return what has the database go away before the provider answers, when it has renewed so many tokens."""

    def cut_off_then_answer(request: Request) -> Raw:
        if sum(provider.renewals.values()) >= after:
            block()
        return provider.renew(request)

    return cut_off_then_answer
