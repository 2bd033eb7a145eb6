"""A console that is not UTF-8: every command shows what it has to say, with escapes for what can't be shown."""

import os
from pathlib import Path

import pytest

from tests.support.program import Program, command

REASON = "Tübingen – 猫 \U0001f408"
SHOWN = r"T\xfcbingen \u2013 \u732b \U0001f408"
ASCII = {"PYTHONIOENCODING": "ascii"}


@pytest.fixture
def paused(program: Program, app_tables: None) -> None:
    assert program.run("pause", "clean-tokens", "--because", REASON).status == 0


@pytest.mark.usefixtures("paused")
def test_what_a_console_cannot_show_is_escaped(program: Program) -> None:
    status = program.run("status", variables=ASCII)
    assert (status.status, status.stderr) == (0, "")
    assert SHOWN in status.stdout
    assert REASON in program.run("status", variables={"PYTHONIOENCODING": "utf-8"}).stdout


@pytest.mark.usefixtures("paused")
def test_on_a_terminal_too(program: Program) -> None:
    status, shown = program.run_command_on_terminal("env", "PYTHONIOENCODING=ascii", *command(), "status", width=200)
    assert status == 0
    assert SHOWN.split()[0] in shown
    assert "Traceback" not in shown


@pytest.mark.usefixtures("paused")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "utf-8"])
def test_json_is_json_in_every_encoding(program: Program, encoding: str) -> None:
    source = f"import subprocess, sys; print(subprocess.check_output(sys.argv[1:]).decode({encoding!r}))"
    words = ("env", f"PYTHONIOENCODING={encoding}", *command(), "status", "--json")
    jobs = program.run_command("python3", "-X", "utf8", "-c", source, *words).document["jobs"]
    assert {job["paused_because"] for job in jobs if job["job"] == "clean-tokens"} == {REASON}


@pytest.mark.usefixtures("app_tables")
def test_the_path_of_the_configuration_may_be_anything(program: Program) -> None:
    for name in (b"f\xc3\xbc\xc3\x9fe \xe7\x8c\xab", b"no UTF-8 \xff"):
        folder = Path(os.fsdecode(os.fsencode(program.folder) + b"/" + name))
        folder.mkdir()
        (folder / "config.toml").write_bytes((program.folder / "config.toml").read_bytes())
        (folder / "config.toml").chmod(0o600)
        for variables in (ASCII, {}):
            checked = program.run("--config", str(folder / "config.toml"), "check", variables=variables)
            assert "configuration: " in checked.stdout
            missing = program.run("--config", str(folder / "nothing.toml"), "list", variables=variables)
            assert missing.status == 84
            assert "nothing.toml" in missing.error
