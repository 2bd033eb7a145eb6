"""tools/venv.sh: which interpreter a virtual environment gets. The interpreters are scripts that say what they are."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "venv.sh"

# Answers what venv.sh asks. A venv made with it has it as its interpreter.
INTERPRETER = """#!/bin/sh
case "$*" in
  *base_prefix*) echo "{name}" ;;
  *_base_executable*) echo "{path}" ;;
  *version_info*) {is_new} ;;
  *ensurepip*) {has_venv} ;;
  "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "{path}" "$4/bin/python" ;;
  "-m pip "*) echo "{name}: $*" >> "{folder}/installed" ;;
  --version) echo "Python {name}" ;;
esac
"""


@dataclass
class Machine:
    """A folder with interpreters on its PATH, a lock and a place for a virtual environment."""

    folder: Path

    def add(self, name: str, *, is_new: bool = True, has_venv: bool = True) -> Path:
        (self.folder / "bin").mkdir(exist_ok=True)
        path = self.folder / "bin" / name
        answers = {"is_new": str(is_new).lower(), "has_venv": str(has_venv).lower()}
        path.write_text(INTERPRETER.format(name=name, path=path, folder=self.folder, **answers))
        path.chmod(0o755)
        return path

    def make(self, python: object = "") -> "subprocess.CompletedProcess[str]":
        path = f"{self.folder / 'bin'}:/bin:/usr/bin" if python else str(self.folder / "bin") + ":" + str(self.tools)
        return subprocess.run(
            [SCRIPT, "venv", "lock"],
            cwd=self.folder,
            env={"PATH": path, "PYTHON": str(python)},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def tools(self) -> Path:
        """What the script needs, without the machine's own interpreters."""
        folder = self.folder / "tools"
        if not folder.exists():
            folder.mkdir()
            for name in ("sh", "tail", "touch", "rm", "mkdir", "cp"):
                (folder / name).symlink_to(Path("/bin") / name if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
        return folder

    @property
    def installed(self) -> list[str]:
        """The interpreters that pip was run with."""
        file = self.folder / "installed"
        return [line.partition(":")[0] for line in file.read_text().splitlines()] if file.exists() else []

    def change_lock(self) -> None:
        packages = self.folder / "venv" / "packages"
        os.utime(packages, (1, 1))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "lock").write_text("")
    return Machine(tmp_path)


def test_the_first_that_will_do_is_taken_and_nothing_is_done_twice(machine: Machine) -> None:
    machine.add("python3", is_new=False)
    machine.add("python3.14", has_venv=False)
    machine.add("python3.12")
    for _ in range(2):
        assert machine.make().returncode == 0
    assert machine.installed == ["python3.12"]


def test_without_a_name_it_keeps_its_interpreter_when_the_lock_changes(machine: Machine) -> None:
    machine.add("python3")
    assert machine.make(machine.add("python3.13")).returncode == 0
    machine.change_lock()
    assert machine.make().returncode == 0
    assert machine.installed == ["python3.13", "python3.13"]


def test_another_interpreter_that_is_named_has_it_made_anew(machine: Machine) -> None:
    machine.add("python3")
    other = machine.add("python3.13")
    for python in ("", other, other, ""):
        assert machine.make(python).returncode == 0
    assert machine.installed == ["python3", "python3.13"]


def test_an_interpreter_that_is_gone_is_replaced(machine: Machine) -> None:
    first = machine.add("python3.13")
    assert machine.make().returncode == 0
    first.unlink()
    (machine.folder / "venv" / "bin" / "python").unlink()
    machine.add("python3.12")
    assert machine.make().returncode == 0
    assert machine.installed == ["python3.13", "python3.12"]


@pytest.mark.parametrize("venv_is_there", [False, True])
def test_a_named_interpreter_that_cannot_be_used_is_an_error_that_names_it(
    machine: Machine, venv_is_there: bool
) -> None:
    machine.add("python3")
    if venv_is_there:
        assert machine.make().returncode == 0
    missing = machine.folder / "no such" / "python3"
    old, bare = machine.add("python3.9", is_new=False), machine.add("python3.11", has_venv=False)
    for python, reason in (
        (missing, f"PYTHON names {missing}, which is no Python 3.11 or newer"),
        (old, f"PYTHON names {old}, which is no Python 3.11 or newer (Python python3.9)"),
        (bare, f"{bare} has no venv module. On Debian and Ubuntu: apt install python3-venv"),
    ):
        refused = machine.make(python)
        assert (refused.returncode, refused.stdout, reason in refused.stderr) == (1, "", True), refused.stderr
    assert machine.installed == ["python3"] * venv_is_there


def test_without_any_that_will_do_it_says_what_it_found(machine: Machine) -> None:
    machine.add("python3", is_new=False)
    refused = machine.make()
    assert refused.returncode == 1
    assert "needs Python 3.11 or newer; found: Python python3." in refused.stderr
