"""Find the database's address: in the environment, else in the credential, else in url_file or url."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pydantic import SecretStr

from catfeeder_cron.config.faults import Faults
from catfeeder_cron.config.settings import DatabaseSettings
from catfeeder_cron.config.sources import read_guarded
from catfeeder_cron.config.values import check_conninfo
from catfeeder_cron.errors import ConfigurationError

VARIABLE = "CATFEEDER_CRON_DATABASE_URL"
CREDENTIAL = "database-url"


def resolve(
    database: DatabaseSettings, file: Path, environ: Mapping[str, str], faults: Faults, *, needs_address: bool
) -> DatabaseSettings:
    """Return the settings with the conninfo that is in force, and with paths relative to `file` made absolute.

    An empty conninfo means libpq's own variables, unless there is a url_file: then the file could not be read, because
    the service was started before it existed (Database reports that), or because the caller needs no address.
    A url_file that is overridden is not opened, because the service may not be allowed to read it.
    """
    url_file = None if database.url_file is None else file.parent / database.url_file
    read_again: Callable[[], str] | None = None
    try:
        conninfo = _from_variable(environ)
        if not conninfo and (conninfo := _from_credential(environ)):
            read_again = partial(_from_credential, environ)
    except ConfigurationError as error:
        faults.extend(error)
        return database
    may_be_absent = not needs_address or _has_empty_credential(environ)
    if not conninfo and url_file is not None and not (may_be_absent and not os.access(url_file, os.R_OK)):
        try:
            conninfo = _from_file(url_file)
            read_again = partial(_from_file, url_file)
        except ConfigurationError as error:
            for line in error.faults:
                faults.add(("database", "url_file"), line)
    conninfo = conninfo or database.conninfo.get_secret_value()
    if conninfo.startswith("embedded:"):
        conninfo = f"embedded:{file.parent / conninfo.removeprefix('embedded:').strip()}"
    found = {"conninfo": SecretStr(conninfo), "url_file": None if url_file is None else str(url_file)}
    return database.model_copy(update=found).reading_again(read_again)


def _from_variable(environ: Mapping[str, str]) -> str:
    return _checked(f"${VARIABLE}", environ.get(VARIABLE, "").strip())


def _from_credential(environ: Mapping[str, str]) -> str:
    """Return the text of the credential that systemd gives this process; its owner and mode are not checked."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return ""
    credential = Path(directory, CREDENTIAL)
    try:
        return _checked(str(credential), credential.read_text("utf-8").strip())
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"{credential}: it can't be read, expected the database's URL") from None


def _has_empty_credential(environ: Mapping[str, str]) -> bool:
    """Return whether systemd gave this process the credential; it is then an empty one, for a file that was missing."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    return bool(directory) and Path(directory or "", CREDENTIAL).exists()


def _from_file(url_file: Path) -> str:
    if not (conninfo := read_guarded(url_file).strip()):
        raise ConfigurationError(f"{url_file}: the file is empty, expected the database's URL")
    return _checked(str(url_file), conninfo)


def _checked(source: str, conninfo: str) -> str:
    try:
        return check_conninfo(conninfo)
    except ValueError as error:
        raise ConfigurationError(f"{source}: got text, expected {error}") from None
