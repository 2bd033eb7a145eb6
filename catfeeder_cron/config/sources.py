"""Find the configuration and read it. Refuse a file that others can write, because it can make us run their code."""

import grp
import os
import pwd
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli

from catfeeder_cron.errors import ConfigurationError

VARIABLE = "CATFEEDER_CRON_CONFIG"
PLACES = (Path("config.toml"), Path("/etc/catfeeder-cron/config.toml"))

# A password in a URL or in libpq's pairs, or a ping_url, on a line that is no comment.
_SECRET = re.compile(r"^[^#\n]*(://[^\s/?#:@]*:[^\s/]+@|password\s*=|ping_url\s*=)", re.MULTILINE)


def find(path: Path | None, environ: Mapping[str, str], places: Iterable[Path] = PLACES) -> Path:
    """Return the configuration's path: `path`, else the variable's, else the first of `places` that exists.

    The result is absolute. A path that was named need not exist. Raises ConfigurationError if no place has a file.
    """
    if path is not None:
        return path.absolute()
    if named := environ.get(VARIABLE):
        return Path(named).absolute()
    for place in places:
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            pass  # It exists; reading it will report the problem.
        return place.absolute()
    looked_at = ", ".join(str(place) for place in places)
    raise ConfigurationError(
        f"no configuration: --config and ${VARIABLE} name none, and there is none of {looked_at}; "
        f"write one after the example {_example()}, or name one with --config PATH"
    )


def _example() -> Path:
    """Return the path of the complete, commented configuration: in the installed package, else in the clone."""
    packaged = Path(__file__).parents[1] / "example.toml"
    return packaged if packaged.exists() else Path(__file__).parents[2] / "config.toml"


def parse(path: Path) -> dict[str, Any]:
    """Return the TOML document in the file. Raises ConfigurationError."""
    text = read_guarded(path)
    if not text.strip():
        raise ConfigurationError(f"{path}: the file is empty, expected tables such as [database]")
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        fault = f"line {error.lineno}, column {error.colno}: not TOML: {error.msg}"
    except RecursionError:
        fault = "not TOML that can be read: nested too deeply"
    except ValueError:
        fault = "not TOML that can be read: a number with too many digits"
    # `from None`, because the cause holds the whole text of the file.
    raise ConfigurationError(f"{path}: {fault}") from None


def holds_secret(path: Path) -> bool:
    """Return whether the file itself holds a password or the like. Raises ConfigurationError if it can't be read."""
    return _SECRET.search(read_guarded(path)) is not None


def read_guarded(path: Path) -> str:
    """Return the text of a file that only root and this user can have written. Raises ConfigurationError otherwise.

    The checks look at the opened file, so it can't be exchanged between check and reading.
    """
    try:
        # A FIFO would block in open() without O_NONBLOCK.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            _check(path, descriptor)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                content = file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = (error.strerror or "it can't be read").lower()
        raise ConfigurationError(f"{path}: {reason}, expected a file that {_user(os.geteuid())} may read") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    raise ConfigurationError(f"{path}: line {line}: not UTF-8, expected the file in that encoding")


def _check(path: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise ConfigurationError(f"{path}: got a directory, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(f"{path}: got a device, a pipe or a socket, expected a regular file")
    faults = []
    if status.st_uid not in (0, os.geteuid()):
        user = _user(os.geteuid())
        expected = "root" if user == "root" else f"root or {user}"
        faults.append(f"{path}: it belongs to {_user(status.st_uid)}, expected {expected}: chown {user} {path}")
    by_others = status.st_mode & stat.S_IWOTH
    by_group = status.st_mode & stat.S_IWGRP and (_has_acl(descriptor) or not _is_private_group(status))
    if by_others or by_group:
        mode = stat.S_IMODE(status.st_mode)
        faults.append(f"{path}: others may write it (mode {mode:04o}), expected only its owner to: chmod go-w {path}")
    if faults:
        raise ConfigurationError(faults)


def _is_private_group(status: os.stat_result) -> bool:
    """Return whether the file's owner is the only member of its group, as on systems with a group for every user.

    The rule is that of Debian's OpenSSH (user-group-modes.patch), and user and group must have the same name.
    """
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return (
        owner.pw_gid == group.gr_gid
        and owner.pw_name == group.gr_name
        and set(group.gr_mem) <= {owner.pw_name}
        and all(user.pw_uid == owner.pw_uid for user in pwd.getpwall() if user.pw_gid == group.gr_gid)
    )


def _has_acl(descriptor: int) -> bool:
    """Return whether the file has an ACL, which may name further users; the group's bits then limit all of them."""
    try:
        return "system.posix_acl_access" in os.listxattr(descriptor)
    except OSError:
        return False


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
