"""Clusters of Debian's PostgreSQL that a test may kill, copy, promote, fill up or give a wrong clock."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.waiting import eventually

DATABASE = "catfeeder"
ROLE = "cats"

# Sessions over TCP prove who they are, so that a password can be changed; the test's own come by the socket.
_HBA = f"""
local all,replication postgres trust
host all {ROLE} all scram-sha-256
host replication,all postgres 127.0.0.0/8 trust
"""
_SETTINGS = """
listen_addresses = '{address}'
port = {port}
unix_socket_directories = '{folder}'
fsync = off
full_page_writes = off
max_connections = 60
shared_buffers = 32MB
min_wal_size = 80MB
wal_level = replica
log_line_prefix = '%m [%p] %a '
{settings}
"""


def programs() -> Path | None:
    """Return the folder of the newest PostgreSQL that Debian has installed."""
    found = Path("/usr/lib/postgresql").glob("*/bin/pg_basebackup")
    return max((path.parent for path in found), key=lambda path: int(path.parent.name), default=None)


@dataclass
class Cluster:
    """One server. `prefix` and `variables` are those of its process: a namespace, a clock."""

    folder: Path
    port: int
    address: str = "127.0.0.1"
    prefix: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    hba: str = ""
    password: str = "meow"

    def create(self) -> None:
        """Initialise it, start it, and create the role of the daemons and their database."""
        self._own_folder()
        self._run("initdb", "-D", "data", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        self._configure()
        self.start()
        with self.admin("postgres") as connection:
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(ROLE), self.password))
        self.create_database()

    def create_database(self) -> None:
        with self.admin("postgres") as connection:
            connection.execute(f"CREATE DATABASE {DATABASE} OWNER {ROLE} TEMPLATE template0".encode())

    def follow(self, primary: "Cluster") -> None:
        """Become a standby of another cluster, asynchronous and caught up."""
        self._own_folder()
        source = ["-h", str(primary.folder), "-p", str(primary.port), "-U", "postgres"]
        self._run("pg_basebackup", "-D", "data", "-R", "-X", "stream", "-c", "fast", "--no-sync", *source)
        self._configure()
        self.start()
        self.catch_up(primary)

    def catch_up(self, primary: "Cluster") -> None:
        """Wait until what the primary has written by now was applied here."""
        with primary.admin() as connection:
            written = _single(connection, "SELECT pg_current_wal_lsn()::text")
        replayed = f"SELECT coalesce(pg_last_wal_replay_lsn() >= '{written}', false)"
        with self.admin() as connection:
            eventually(lambda: _single(connection, replayed), f"the standby at {written}: {self.log()}")

    def cut_replication(self) -> None:
        """Have this standby receive nothing more."""
        with self.admin() as connection:
            connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
            connection.execute("SELECT pg_reload_conf()")
            eventually(lambda: _single(connection, "SELECT count(*) FROM pg_stat_wal_receiver") == 0)

    def promote(self) -> None:
        self._run("pg_ctl", "promote", "-D", "data", "-w")

    def set(self, name: str, value: str) -> None:
        """Change a setting that takes no restart."""
        with self.admin() as connection:
            connection.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), value))
            connection.execute("SELECT pg_reload_conf()")

    def start(self) -> None:
        self._run("pg_ctl", "start", "-D", "data", "-l", "log", "-w", "-t", "120")

    def stop(self, mode: str = "immediate") -> None:
        if (self.folder / "data/postmaster.pid").exists():
            self._run("pg_ctl", "stop", "-D", "data", "-m", mode, "-w")

    def is_running(self) -> bool:
        return self._try("pg_ctl", "status", "-D", "data").returncode == 0

    def kill(self) -> None:
        """Kill all its processes at once, as the loss of its machine does."""
        postmaster = int((self.folder / "data/postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children")
        os.kill(postmaster, signal.SIGSTOP)  # so that it starts no further one
        for pid in [*map(int, children.read_text().split()), postmaster]:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{postmaster}").exists(), "the end of the server")
        (self.folder / "data/postmaster.pid").unlink()

    def end(self) -> None:
        """End it in whatever state it is."""
        if (self.folder / "data/postmaster.pid").exists():
            self._try("pg_ctl", "stop", "-D", "data", "-m", "immediate", "-w")

    @contextmanager
    def admin(self, database: str = DATABASE) -> Iterator[psycopg.Connection]:
        """A superuser's session, in which each statement commits by itself."""
        url = make_conninfo(host=str(self.folder), port=self.port, user="postgres", dbname=database)
        with psycopg.connect(url, autocommit=True) as connection:
            yield connection

    def url(self, *others: "Cluster", address: str | None = None) -> str:
        """What a daemon connects to: this server, or the one of several that takes writes."""
        servers = [self, *others]
        hosts = ",".join(address or each.address for each in servers)
        ports = ",".join(str(each.port) for each in servers)
        attributes = {"target_session_attrs": "read-write"} if others else {}
        return make_conninfo(
            host=hosts, port=ports, user=ROLE, password=self.password, dbname=DATABASE, connect_timeout=5, **attributes
        )

    @property
    def own_url(self) -> str:
        """The superuser's address, for those who look at the ledger."""
        return make_conninfo(host=str(self.folder), port=self.port, user="postgres", dbname=DATABASE)

    def run(self, program: str, *arguments: str) -> None:
        """Run a client program as the superuser: pg_dump, pg_restore."""
        self._run(program, "-h", str(self.folder), "-p", str(self.port), "-U", "postgres", *arguments)

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace")[-3000:] if path.exists() else "no log"

    def _own_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            subprocess.run(["chown", "postgres", self.folder], check=True)
        self.folder.chmod(0o755)

    def _configure(self) -> None:
        data = self.folder / "data"
        values = {"address": self.address, "port": self.port, "folder": self.folder, "settings": self.settings}
        with (data / "postgresql.conf").open("a") as file:
            file.write(_SETTINGS.format(**values))
        (data / "pg_hba.conf").write_text(_HBA + self.hba)

    def _run(self, program: str, *arguments: str) -> None:
        done = self._try(program, *arguments)
        assert done.returncode == 0, f"{program}: {done.stdout}{self.log()}"

    def _try(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        bin_folder = programs()
        assert bin_folder is not None
        owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.geteuid() == 0 else []
        variables = [f"{name}={value}" for name, value in {**self.variables, "HOME": str(self.folder)}.items()]
        words = [*self.prefix, *owner, "env", *variables, str(bin_folder / program), *arguments]
        # What pg_ctl starts keeps its output open, so that is a file and no pipe.
        with (self.folder / "said").open("w+") as said:
            done = subprocess.run(
                words,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                text=True,
                timeout=180,
                check=False,
            )
            said.seek(0)
            return subprocess.CompletedProcess(words, done.returncode, said.read())


def _single(connection: psycopg.Connection, query: str) -> object:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]
