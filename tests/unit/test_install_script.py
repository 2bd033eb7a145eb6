"""systemd/install.sh with a DESTDIR, however that is written. `make test-systemd` has the real thing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "systemd" / "install.sh"

# Says it makes a virtual environment, with the paths that a real one has in its files; whatever else it is asked, this
# test's own interpreter answers. pip begins scripts in two ways. What the program says of itself is asked for once.
INTERPRETER = """#!/bin/sh
case "$*" in
  "-m venv --clear "*)
    mkdir -p "$4/bin" "$4/lib"
    cp "$0" "$4/bin/python"
    ln -s python "$4/bin/python3"
    echo "command = $0 -m venv --clear $4" > "$4/pyvenv.cfg"
    printf 'VIRTUAL_ENV="%s"\\n' "$4" > "$4/bin/activate"
    ;;
  *"-m pip install "*catfeeder_cron.whl)
    bin=$(dirname "$0")
    case "$bin" in
      *" "*) printf "#!/bin/sh\\n'''exec' \\"%s\\" \\"\\$0\\" \\"\\$@\\"\\n' '''\\nimport sys\\n" "$bin/python" ;;
      *) printf "#!%s\\nimport sys\\n" "$bin/python" ;;
    esac > "$bin/catfeeder-cron"
    ;;
  *"-m pip install "*) ;;
  -) ;;  # is asked whether it will do
  "-P -m catfeeder_cron"*)
    answer="{answers}/$*$_CATFEEDER_CRON_COMPLETE"
    [ -e "$answer" ] || {python} "$@" > "$answer" || exit
    cat "$answer"
    ;;
  *) exec {python} "$@" ;;
esac
"""
VENV = "/opt/catfeeder-cron/venv"
DOCUMENTATION = {
    "usr/local/share/man/man1/catfeeder-cron.1": ".TH CATFEEDER-CRON 1 ",
    "usr/local/share/bash-completion/completions/catfeeder-cron": "_catfeeder_cron_completion() {",
    "usr/local/share/zsh/site-functions/_catfeeder-cron": "#compdef catfeeder-cron\n",
    "usr/local/share/fish/vendor_completions.d/catfeeder-cron.fish": "complete --command catfeeder-cron ",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def python(tmp_path: Path, answers: Path) -> Path:
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(INTERPRETER.format(python=sys.executable, answers=answers))
    interpreter.chmod(0o755)
    return interpreter


def run(python: object, action: str, destdir: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [SCRIPT, action, "requirements", "catfeeder_cron.whl"],
        cwd=folder,
        env={**os.environ, "DESTDIR": destdir, "PYTHON": str(python), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def install(python: Path, destdir: str, folder: Path) -> str:
    done = run(python, "install", destdir, folder)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def files_below(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    "written", ["{}", "{}/", "{}//", "dest", "./dest/", "../{name}/dest", "link", "link/", "with a blank/", "a|b&c"]
)
def test_nothing_that_is_installed_knows_of_destdir(tmp_path: Path, python: Path, written: str) -> None:
    destdir = written.format(tmp_path / "dest", name=tmp_path.name)
    (tmp_path / "behind").mkdir()
    (tmp_path / "link").symlink_to("behind")

    install(python, destdir, tmp_path)

    installed = (tmp_path / destdir).resolve()
    files = files_below(installed)
    assert files[f"{VENV[1:]}/bin/catfeeder-cron"].read_text() == f"#!{VENV}/bin/python\nimport sys\n"
    assert files[f"{VENV[1:]}/bin/activate"].read_text() == f'VIRTUAL_ENV="{VENV}"\n'
    assert files[f"{VENV[1:]}/pyvenv.cfg"].read_text().endswith(f" {VENV}\n")
    assert files["usr/local/bin/catfeeder-cron"].readlink() == Path(f"{VENV}/bin/catfeeder-cron")
    for name, beginning in DOCUMENTATION.items():
        assert files[name].read_text().lstrip("\n").startswith(beginning)
    assert not [name for name, path in files.items() if not path.is_symlink() and str(installed) in path.read_text()]


def test_what_is_removed_was_installed_and_others_files_stay(tmp_path: Path, python: Path) -> None:
    install(python, "dest/", tmp_path)
    first = {name: path.is_symlink() or path.read_bytes() for name, path in files_below(tmp_path / "dest").items()}
    install(python, "dest", tmp_path)
    again = {name: path.is_symlink() or path.read_bytes() for name, path in files_below(tmp_path / "dest").items()}
    assert again == first
    theirs = tmp_path / "dest/usr/local/share/zsh/site-functions/_cat"
    theirs.touch()
    (tmp_path / "dest/etc/catfeeder-cron/config.toml").write_text("# mine\n")

    assert run("", "uninstall", "dest/", tmp_path).returncode == 0
    left = files_below(tmp_path / "dest")
    assert set(left) == {"etc/catfeeder-cron/config.toml", str(theirs.relative_to(tmp_path / "dest"))}
    assert left["etc/catfeeder-cron/config.toml"].read_text() == "# mine\n"

    assert run("", "purge", str(tmp_path / "dest"), tmp_path).returncode == 0
    assert set(files_below(tmp_path / "dest")) == {str(theirs.relative_to(tmp_path / "dest"))}


@pytest.mark.parametrize("action", ["uninstall", "purge"])
def test_a_destdir_that_is_not_there_is_an_error_that_names_it(tmp_path: Path, action: str) -> None:
    refused = run("", action, "nowhere/", tmp_path)
    assert (refused.returncode, refused.stderr) == (1, "catfeeder-cron: DESTDIR is no folder: nowhere/\n")


def test_a_named_interpreter_that_cannot_be_used_is_an_error_that_names_it(tmp_path: Path, python: Path) -> None:
    refused = run("/nowhere/python3", "install", "dest", tmp_path)
    assert refused.returncode == 1
    assert "PYTHON names /nowhere/python3, which won't do" in refused.stderr
    assert not (tmp_path / f"dest{VENV}").exists()

    install(python, "dest", tmp_path)
    refused = run("/nowhere/python3", "install", "dest", tmp_path)
    assert refused.returncode == 1
    assert "PYTHON names /nowhere/python3, which won't do" in refused.stderr


def test_an_installation_keeps_the_interpreter_and_the_packages_that_it_has(tmp_path: Path, python: Path) -> None:
    install(python, "dest", tmp_path)
    (package := tmp_path / f"dest{VENV}/lib/package.py").touch()
    other = tmp_path / "other"
    other.write_text(python.read_text().replace('case "$*" in', 'case "$*" in\n  *base_prefix*) echo another ;;', 1))
    other.chmod(0o755)

    refused = run(other, "install", "dest", tmp_path)

    assert refused.returncode == 1
    assert f"runs on another Python than {other}, which PYTHON names" in refused.stderr
    assert f"rm -r {tmp_path}/dest{VENV}" in refused.stderr
    assert package.exists()
