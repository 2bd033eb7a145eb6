"""What a program that embeds the package sees of it: names, their documentation and their types."""

import sys

import pytest

import catfeeder_cron
from tests.support.program import Program

USES_EVERY_NAME = """
from datetime import timedelta
from pathlib import Path

from catfeeder_cron import Action, BackgroundTasks, Crons, HopelessAction, PostponedAction, __version__, stopping


def feed(action: Action) -> str:
    portions: int = action.payload["portions"]
    if portions < 0:
        raise HopelessAction(f"action {action.id} of the kind {action.kind} asks for {portions} portions")
    if stopping():
        raise PostponedAction("the daemon stops", after_seconds=5)
    return f"{portions} at {action.due_at:%H:%M}, attempt {action.attempt}"


def greet(name: str, *, loud: bool = False) -> None:
    print(name.upper() if loud else name, __version__)


with BackgroundTasks(success=0, error=84, debug=False, max_workers=2, timezone="Europe/Paris") as tasks:
    added = tasks.safe_add_task(greet, args=("Tom",), kwargs={"loud": True}, trigger="interval", seconds=300)
    tasks.add_task(greet, ["Tom"], trigger="cron", minute=15, id="greet")
    tasks.remove_task("greet")
    codes: list[int] = [tasks.safe_start(), tasks.safe_pause(), tasks.safe_resume(), tasks.safe_stop(wait=False)]
    running: bool = tasks.running
    if isinstance(added, int) and added == tasks.error and not tasks.debug:
        codes.append(tasks.success)

    crons = Crons(error=84, success=0, debug=False, config=Path("config.toml"), background_tasks=tasks)
    with crons:
        codes += [
            crons.inject_crons(),
            crons.check_actions(),
            crons.clean_expired_tokens(),
            crons.clean_expired_verification_nodes(),
            crons.renew_oaths(),
            crons.reset_food_counters(),
            crons.background_tasks.safe_pause(),
        ]
        assert crons.debug or codes == [crons.success] or crons.error in codes
        deleted: int | None = crons.run("clean-tokens", wait=timedelta(seconds=5)).counts.get("deleted")
"""

NOT_PUBLIC = "from catfeeder_cron import BackgroundTasks\nBackgroundTasks(success='yes')\n"


def test_a_type_checker_accepts_a_program_that_uses_every_public_name(
    program: Program, pytestconfig: pytest.Config
) -> None:
    """It reads the installed wheel, which has to say that it has types."""
    source = program.folder / "user.py"
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("mypy")  # what it has found out about the libraries takes it five seconds
    mypy = (sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(kept), str(source))

    source.write_text(USES_EVERY_NAME)
    accepted = program.run_command(*mypy, seconds=300)
    assert (accepted.status, accepted.stderr) == (0, ""), accepted.stdout
    assert all(f" {name}," in USES_EVERY_NAME or f"{name}\n" in USES_EVERY_NAME for name in catfeeder_cron.__all__)

    source.write_text(NOT_PUBLIC)
    refused = program.run_command(*mypy, seconds=300)
    assert 'expected "int"' in refused.stdout


def test_help_and_tab_completion_show_the_public_names(program: Program) -> None:
    shown = program.run_command(sys.executable, "-c", "import catfeeder_cron; help(catfeeder_cron)").stdout
    _, _, classes = shown.partition("\nCLASSES\n")
    for name in ("Action", "BackgroundTasks", "Crons", "HopelessAction", "PostponedAction"):
        assert f"class {name}(" in classes
    assert "\n    stopping() -> bool\n" in classes

    listed = "import catfeeder_cron; print(*dir(catfeeder_cron))"
    assert {*catfeeder_cron.__all__, "__name__"} <= {*program.run_command(sys.executable, "-c", listed).stdout.split()}
