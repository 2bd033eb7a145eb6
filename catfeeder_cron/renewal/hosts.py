"""Wait after a failover or a restored backup until every host has put back the answers that only it has.

Each state folder has a row in catfeeder_cron.oauth_hosts, which tells the others whether it was looked through since.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

from catfeeder_cron.database import Connection, Database, single
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.renewal.journal import can_not_keep, give_to_owner_of, make_folder

log = get_logger("catfeeder_cron.oauth")

# Each living process has had three heartbeats by then, to notice that history went back and to be listed.
_LEAST = timedelta(seconds=30)
# A host that is gone, or whose folder was deleted, holds the others no longer than this.
_MOST = timedelta(minutes=5)
# The row of a folder that nothing was sent from for so long is deleted.
_FORGET = timedelta(days=30)

_RENEWS = """
    WITH forgotten AS (
        DELETE FROM catfeeder_cron.oauth_hosts WHERE renewed_at < now() - %(forget)s AND folder <> %(folder)s)
    INSERT INTO catfeeder_cron.oauth_hosts (folder, host, renewed_at, lineage, looked_at)
    VALUES (%(folder)s, %(host)s, now(), %(lineage)s, now())
    ON CONFLICT (folder) DO UPDATE SET host = excluded.host, renewed_at = excluded.renewed_at"""

# Before anything is put back, so that a death in between leaves the folder as one that is still to be looked through.
_PUTS_BACK = """
    INSERT INTO catfeeder_cron.oauth_hosts (folder, host) VALUES (%(folder)s, %(host)s)
    ON CONFLICT (folder) DO UPDATE SET host = excluded.host, lineage = NULL"""

# The other hosts look again after this one has put something back; where it died doing so, it may have.
_LOOKED = """
    INSERT INTO catfeeder_cron.oauth_hosts AS h (folder, host, lineage, looked_at)
    VALUES (%(folder)s, %(host)s, %(lineage)s, %(looked_at)s)
    ON CONFLICT (folder) DO UPDATE SET host = excluded.host, lineage = excluded.lineage,
        looked_at = excluded.looked_at,
        put_back_at = CASE WHEN h.lineage IS NULL THEN clock_timestamp() ELSE h.put_back_at END"""

# The hosts that have renewed shortly before the change, as far as the database still knows: by a restored backup the
# last renewal of all was long ago. A host looks again when another one has put something back: that answer's refresh
# token may be one that the host has spent itself.
_STATE = """
    SELECT l.id, l.reason IS NOT NULL AND now() < l.since + %(most)s AS is_new,
           l.server = catfeeder_cron.server() AND l.counter >= %(counter)s,
           now() < l.since + %(least)s, extract(epoch FROM l.since + %(most)s - now())::float8,
           array(SELECT h.host FROM catfeeder_cron.oauth_hosts h
                 WHERE (h.folder = %(folder)s OR h.renewed_at
                        > least(l.since, (SELECT max(renewed_at) FROM catfeeder_cron.oauth_hosts)) - %(keep)s)
                   AND (h.lineage IS DISTINCT FROM l.id OR h.looked_at < (
                        SELECT max(o.put_back_at) FROM catfeeder_cron.oauth_hosts o
                        WHERE o.folder <> h.folder AND o.put_back_at <= clock_timestamp()))
                 ORDER BY h.host)
    FROM catfeeder_cron.lineage l"""


_HAS_LOOKED = "SELECT FROM catfeeder_cron.oauth_hosts WHERE folder = %(folder)s AND lineage = %(lineage)s"


@dataclass(frozen=True)
class Host:
    """This host's state folder, by the id that is kept in it."""

    folder: UUID
    name: str

    def renews(self, database: Database, lineage: Lineage | None) -> None:
        """Note that tokens are being sent from here, on a history that was waited for. Raises DatabaseError."""
        id = lineage.id if lineage else None
        database.execute(_RENEWS, {"folder": self.folder, "host": self.name, "lineage": id, "forget": _FORGET})

    def puts_back(self, database: Database) -> None:
        """Note that answers are about to be put back from here. Raises DatabaseError."""
        database.execute(_PUTS_BACK, {"folder": self.folder, "host": self.name})

    def looked(self, database: Database, lineage: Lineage, looked_at: datetime) -> None:
        """Note that this folder was looked through from `looked_at` on. Raises DatabaseError."""
        parameters = {"folder": self.folder, "host": self.name, "lineage": lineage.id, "looked_at": looked_at}
        database.execute(_LOOKED, parameters)


@dataclass(frozen=True)
class Wait:
    """Why no token may be sent yet."""

    reason: str
    hosts: tuple[str, ...]
    most_seconds: float


def this_host(state_directory: Path) -> Host | None:
    """Return this host if its folder has an id: without one, no token was ever sent from it."""
    with suppress(OSError, ValueError):
        return Host(_read(_path(state_directory)), socket.gethostname())
    return None


def require_host(state_directory: Path) -> Host:
    """Return this host, and give its folder an id if it has none. Raises RenewalError where that can't be kept."""
    path = _path(state_directory)
    try:
        make_folder(path.parent)
        with suppress(FileNotFoundError, ValueError):
            return Host(_read(path), socket.gethostname())
        _write(path)
        return Host(_read(path), socket.gethostname())
    except (OSError, ValueError) as error:
        raise can_not_keep(path.parent, getattr(error, "strerror", None) or f"{path} holds no id") from error


def why_wait(context: JobContext, host: Host | None) -> Wait | None:
    """Return why no token may be sent yet, because of a history that went back; None if it may be.

    Raises DatabaseError. A dry run has had no heartbeat, and goes by what others have noticed.
    """
    lineage = context.database.lineage
    if lineage is None and not context.dry_run:
        return None
    with context.transaction() as connection:
        if context.dry_run and not _exists(connection):
            return None
        parameters = {
            "folder": host.folder if host else None,
            "counter": lineage.counter if lineage else 0,
            "keep": context.resources.oauth.settings.keep_answers,
            "least": _LEAST,
            "most": _MOST,
        }
        id, is_new, is_here, is_early, most_seconds, names = single(connection, _STATE, parameters)
    if not is_here or (lineage and lineage.id != id):
        return Wait(
            "the database may have lost its last seconds, and the next heartbeat will tell", (), _MOST.total_seconds()
        )
    if not is_new or not (is_early or names):
        return None
    missing = f"they have not put back yet: {', '.join(names)}" if names else "each has half a minute to be heard of"
    return Wait(
        "the database has lost its last seconds, and hosts may have answers that it has lost; " + missing,
        tuple(names),
        most_seconds,
    )


def has_looked(context: JobContext) -> bool:
    """Tell whether this folder was looked through since the database's history went back last. Raises DatabaseError."""
    lineage = context.database.lineage
    host = this_host(context.resources.state_directory)
    if lineage is None or lineage.reason is None or host is None:
        return True
    return bool(context.database.query(_HAS_LOOKED, {"folder": host.folder, "lineage": lineage.id}))


def _exists(connection: Connection) -> bool:
    return bool(single(connection, "SELECT to_regclass('catfeeder_cron.oauth_hosts') IS NOT NULL")[0])


def _path(state_directory: Path) -> Path:
    return state_directory / "oauth" / "host-id"


def _read(path: Path) -> UUID:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, encoding="ascii") as file:
        return UUID(file.read(100).strip())


def _write(path: Path) -> None:
    """Write a new id, or leave the one that another process has written meanwhile."""
    id = uuid4()
    new = path.with_name(f".{path.name}.{id}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{id}\n")
            file.flush()
            os.fsync(file.fileno())
        give_to_owner_of(path.parent, new)
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)
