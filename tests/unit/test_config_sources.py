"""Which file is read, which is refused, and where the database's URL comes from."""

import grp
import os
import pwd
import struct
from pathlib import Path

import pytest

from catfeeder_cron.config import Settings, load, sources, state_directory
from catfeeder_cron.database import Database
from catfeeder_cron.errors import ConfigurationError, DatabaseUnavailable

AS_ROOT = os.geteuid() == 0
SECRET = "postgresql://cat:hunter2@db/catfeeder"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("[scheduler]\nmax_workers = 7\n")
    path.chmod(0o644)
    return path


def conninfo(settings: Settings) -> str:
    return settings.database.conninfo.get_secret_value()


def only_fault(path: Path, **environ: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ=environ)
    [fault] = caught.value.faults
    assert "\n" not in fault
    assert "hunter2" not in fault
    assert caught.value.__cause__ is None
    return fault


# Where it is


def test_the_path_that_is_given_comes_first_then_the_variable_then_the_usual_places(tmp_path: Path) -> None:
    given, named, first, second = (tmp_path / name for name in ("given", "named", "first", "second"))
    second.touch()
    environ = {"CATFEEDER_CRON_CONFIG": str(named)}
    assert sources.find(given, environ, (first, second)) == given
    assert sources.find(None, environ, (first, second)) == named
    assert sources.find(None, {"CATFEEDER_CRON_CONFIG": ""}, (first, second)) == second
    first.touch()
    assert sources.find(None, {}, (first, second)) == first


def test_the_working_folder_comes_before_etc(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.chdir(file.parent)
    settings = load(environ={})
    assert settings.path == file
    assert settings.scheduler.max_workers == 7


def test_where_there_is_none_the_places_and_the_remedy_are_named(tmp_path: Path) -> None:
    places = (tmp_path / "here.toml", tmp_path / "there.toml")
    with pytest.raises(ConfigurationError) as caught:
        sources.find(None, {}, places)
    for part in ("$CATFEEDER_CRON_CONFIG", str(places[0]), str(places[1]), "--config PATH"):
        assert part in str(caught.value)


def test_a_usual_place_that_can_not_be_read_is_not_passed_over(tmp_path: Path, file: Path) -> None:
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    assert sources.find(None, {}, (loop, file)) == loop
    assert "too many levels of symbolic links" in only_fault(loop)


# What it is


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert only_fault(path).startswith(f"{path}: no such file or directory, expected ")


def test_a_folder_is_told(tmp_path: Path) -> None:
    assert only_fault(tmp_path) == f"{tmp_path}: got a directory, expected a file"


def test_a_pipe_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    assert "expected a regular file" in only_fault(pipe)


@pytest.mark.skipif(AS_ROOT, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(file: Path) -> None:
    file.chmod(0)
    assert "permission denied" in only_fault(file)


@pytest.mark.parametrize("text", ["", "\n  \n", "\ufeff"])
def test_an_empty_file_is_told(file: Path, text: str) -> None:
    file.write_text(text, "utf-8")
    assert "the file is empty" in only_fault(file)


def test_a_file_of_comments_is_all_defaults(file: Path) -> None:
    file.write_text("# nothing to say\n")
    assert load(file, environ={}).scheduler.max_workers == 4


def test_the_byte_order_mark_of_some_editors_is_no_fault(file: Path) -> None:
    file.write_text("\ufeff[scheduler]\nmax_workers = 2\n", "utf-8")
    assert load(file, environ={}).scheduler.max_workers == 2


def test_what_is_not_utf_8_is_told_with_its_line(file: Path) -> None:
    file.write_bytes(b'[database]\nurl = "caf\xe9"\n')
    assert "line 2: not UTF-8" in only_fault(file)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[database]\nurl = "hunter2\n', "line 2, column 15: not TOML: "),
        ("[logging]\nlevel = ?\n", "line 2, column 9: not TOML: "),
        ("[logging]\n[logging]\n", "line 2, column 9: not TOML: "),
        (f"x = {'[' * 2000}", "nested too deeply"),
        (f"x = {'1' * 5000}", "too many digits"),
    ],
)
def test_what_is_not_toml_is_told_with_line_and_column(file: Path, text: str, fault: str) -> None:
    file.write_text(text)
    assert fault in only_fault(file)


# Whose it is


def test_a_file_that_everybody_may_write_is_refused(file: Path) -> None:
    file.chmod(0o646)
    assert f"others may write it (mode 0646), expected only its owner to: chmod go-w {file}" in only_fault(file)


@pytest.mark.skipif(not AS_ROOT, reason="only root can give a file to another group")
def test_a_file_that_a_group_may_write_is_refused(file: Path) -> None:
    os.chown(file, -1, 54_321)
    file.chmod(0o664)
    assert "others may write it (mode 0664)" in only_fault(file)
    file.chmod(0o644)
    load(file, environ={})


def test_the_group_that_a_user_has_to_himself_may_write(file: Path) -> None:
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(os.getegid())
    except KeyError:
        pytest.skip("this user has no account")
    others = [other for other in pwd.getpwall() if other.pw_gid == group.gr_gid and other.pw_uid != user.pw_uid]
    if user.pw_gid != group.gr_gid or user.pw_name != group.gr_name or group.gr_mem or others:
        pytest.skip("this user has no group to himself")
    os.chown(file, -1, group.gr_gid)
    file.chmod(0o664)
    load(file, environ={})


def test_where_an_acl_lets_another_user_write_the_owners_group_is_no_excuse(file: Path) -> None:
    anybody = 0xFFFFFFFF
    entries = [(0x01, 6, anybody), (0x02, 6, 54_321), (0x04, 4, anybody), (0x10, 6, anybody), (0x20, 4, anybody)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(file, "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    assert "others may write it (mode 0664)" in only_fault(file)


@pytest.mark.skipif(not AS_ROOT, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused_and_all_that_is_wrong_with_it_told(file: Path) -> None:
    os.chown(file, 54_321, -1)
    assert "belongs to user 54321, expected root: chown root" in only_fault(file)
    file.chmod(0o666)
    with pytest.raises(ConfigurationError) as caught:
        load(file, environ={})
    assert len(caught.value.faults) == 2


# Where the database is


def test_without_any_url_libpq_decides(file: Path) -> None:
    assert conninfo(load(file, environ={})) == ""


def test_a_private_postgresql_lies_beside_the_file(file: Path) -> None:
    file.write_text('[database]\nurl = "embedded:.data/postgres"\n')
    assert conninfo(load(file, environ={})) == f"embedded:{file.parent}/.data/postgres"
    environ = {"CATFEEDER_CRON_DATABASE_URL": "embedded:/srv/pg"}
    assert conninfo(load(file, environ=environ)) == "embedded:/srv/pg"


def test_the_variable_overrides_the_credential_which_overrides_the_file(tmp_path: Path, file: Path) -> None:
    file.write_text('[database]\nurl = "dbname=file"\n')
    credential = tmp_path / "database-url"
    credential.write_text("dbname=credential\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "CATFEEDER_CRON_DATABASE_URL": "dbname=variable"}
    assert conninfo(load(file, environ=environ)) == "dbname=variable"
    environ["CATFEEDER_CRON_DATABASE_URL"] = ""
    assert conninfo(load(file, environ=environ)) == "dbname=credential"
    credential.write_text("")
    assert conninfo(load(file, environ=environ)) == "dbname=file"
    credential.unlink()
    assert conninfo(load(file, environ=environ)) == "dbname=file"


def test_a_url_file_holds_the_url(tmp_path: Path, file: Path) -> None:
    file.write_text('[database]\nurl_file = "database-url"\n')
    (tmp_path / "database-url").write_text(f"{SECRET}\n")
    settings = load(file, environ={})
    assert conninfo(settings) == SECRET
    assert settings.database.url_file == str(tmp_path / "database-url")
    assert "hunter2" not in repr(settings)


def test_a_url_file_that_is_overridden_is_not_opened(file: Path) -> None:
    file.write_text('[database]\nurl_file = "/nowhere/database-url"\n')
    assert conninfo(load(file, environ={"CATFEEDER_CRON_DATABASE_URL": "dbname=x"})) == "dbname=x"
    assert "/nowhere/database-url: no such file" in only_fault(file)


def test_a_url_file_is_held_to_the_rules_of_the_configuration(tmp_path: Path, file: Path) -> None:
    file.write_text('[database]\nurl_file = "database-url"\n')
    url_file = tmp_path / "database-url"
    url_file.write_text(SECRET)
    url_file.chmod(0o602)
    assert f"{url_file}: others may write it" in only_fault(file)
    url_file.chmod(0o600)
    url_file.write_text("\n")
    assert f"{url_file}: the file is empty" in only_fault(file)
    url_file.write_text("mysql://cat:hunter2@db")
    assert f'{url_file}: got text, expected "postgresql://..."' in only_fault(file)


def test_a_url_of_another_database_is_told_that_there_is_postgresql_alone(file: Path) -> None:
    """The web server that uses the tables may run on MySQL."""
    only = "; no other database than PostgreSQL is supported"
    assert only_fault(file, CATFEEDER_CRON_DATABASE_URL="MySQL://cat:hunter2@db/cats").endswith(only)
    assert only not in only_fault(file, CATFEEDER_CRON_DATABASE_URL="db/cats")


def test_a_credential_that_can_not_be_read_is_told(tmp_path: Path, file: Path) -> None:
    (tmp_path / "database-url").mkdir()
    assert f"{tmp_path}/database-url: it can't be read" in only_fault(file, CREDENTIALS_DIRECTORY=str(tmp_path))


@pytest.mark.parametrize("url", ["mysql://cat:hunter2@db", "hunter2", "embedded:", "postgresql://h/\u007fhunter2"])
def test_a_url_for_nothing_that_is_known_is_told_and_not_shown(file: Path, url: str) -> None:
    fault = only_fault(file, CATFEEDER_CRON_DATABASE_URL=url)
    assert fault.startswith('$CATFEEDER_CRON_DATABASE_URL: got text, expected "postgresql://..."')


# What is kept on disk


def test_the_state_lies_where_systemd_says_else_where_it_is_installed_else_in_the_home(tmp_path: Path) -> None:
    installed, home = tmp_path / "lib", {"HOME": str(tmp_path)}
    in_home = tmp_path / ".local/state/catfeeder-cron"
    assert state_directory(home, installed) == in_home
    installed.touch()
    assert state_directory(home, installed) == in_home
    installed.unlink()
    installed.mkdir()
    assert state_directory(home, installed) == installed
    assert state_directory({"STATE_DIRECTORY": "/run/a:/run/b"}, installed) == Path("/run/a")


def test_a_service_that_was_started_before_its_url_file_was_there_starts_and_the_database_says_what_is_missing(
    tmp_path: Path,
) -> None:
    """Its unit puts an empty credential where the file is missing, so that the service does not fail without a word."""
    (credentials := tmp_path / "credentials").mkdir()
    (credentials / "database-url").write_text("\n")
    (path := tmp_path / "config.toml").write_text('[database]\nurl_file = "database-url"\n')

    settings = load(path, environ={"CREDENTIALS_DIRECTORY": str(credentials)})
    with Database(settings.database) as database, pytest.raises(DatabaseUnavailable) as caught, database.session():
        pass
    assert str(caught.value).startswith(f"{tmp_path}/database-url was missing or empty when the service was started")
    with pytest.raises(ConfigurationError, match="no such file"):
        load(path, environ={})
