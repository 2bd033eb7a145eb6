"""The command line before any database is asked: help, usage, and all that can be wrong with the configuration."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.program import Program, command

NO_DATABASE = "postgresql:///nowhere?host=/nowhere"

OPTIONS = {
    "start": (),
    "list": ("--json",),
    "run-once": ("JOB", "--dry-run", "--wait", "--json"),
    "history": ("JOB", "--limit", "--json"),
    "init-db": ("--with-app-tables", "--with-indexes", "--dry-run"),
    "demo": (),
    "forecast": ("--days", "--json"),
}


def test_help_names_every_command_and_the_exit_statuses(program: Program) -> None:
    shown = program.run_installed("--help")
    assert (shown.status, shown.stderr) == (0, "")
    assert program.run_installed() == shown
    for word in (*OPTIONS, "--config", "--version", "84", "75"):
        assert word in shown.stdout


@pytest.mark.parametrize(("name", "options"), OPTIONS.items())
def test_help_of_a_command_names_its_options(program: Program, name: str, options: tuple[str, ...]) -> None:
    shown = program.run(name, "--help")
    assert (shown.status, shown.stderr) == (0, "")
    for option in options:
        assert option in shown.stdout


def test_version_is_one_line_and_the_same_as_a_module(program: Program) -> None:
    version = program.run_installed("--version")
    assert (version.status, version.stderr) == (0, "")
    assert re.fullmatch(r"catfeeder-cron \d+\.\d+\.\d+\n", version.stdout)
    assert program.run_command(sys.executable, "-m", "catfeeder_cron", "--version") == version


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lits"], "list"),
        (["list", "--jsno"], "--jsno"),
        (["run-once"], "JOB"),
        (["run-once", "clean-tokens", "--wait", "soon"], "soon"),
        (["history", "--limit", "0"], "--limit"),
        (["history", "--limit", "many"], "--limit"),
        (["--config"], "--config"),
    ],
)
def test_wrong_usage_is_told_in_one_line_with_status_2(program: Program, arguments: list[str], told: str) -> None:
    program.configure(NO_DATABASE)
    failed = program.run(*arguments)
    assert (failed.status, failed.stdout) == (2, "")
    assert told in failed.error


@pytest.mark.usefixtures("app_tables")
def test_the_installed_command_does_what_the_copies_do_that_other_tests_run(program: Program) -> None:
    for words in (["init-db"], ["forecast", "--json"], ["history", "--json"], ["run-once", "nonsense"], ["resume"]):
        assert program.run_installed(*words) == program.run(*words)
    for words in (["list"], ["status"], ["check"], ["pause", "clean-tokens"], ["run-once", "clean-tokens"]):
        assert (program.run_installed(*words).status, program.run(*words).status) == (0, 0)


@pytest.mark.parametrize("job", ["clean-tokns", "CLEAN-TOKENS"])
@pytest.mark.parametrize("name", ["run-once", "history"])
def test_an_unknown_job_is_wrong_usage_and_the_nearest_is_named(program: Program, name: str, job: str) -> None:
    program.configure(NO_DATABASE)
    failed = program.run(name, job)
    assert (failed.status, failed.stdout) == (2, "")
    assert f'"{job}"' in failed.error
    assert '"clean-tokens"' in failed.error


def test_an_unknown_job_among_others_keeps_all_from_running(program: Program) -> None:
    program.configure(NO_DATABASE)
    failed = program.run("run-once", "test-hello-world", "nonsense")
    assert (failed.status, failed.stdout) == (2, "")
    assert "nonsense" in failed.error


def test_the_configuration_is_looked_for_in_the_documented_order(program: Program) -> None:
    def named(hours: int, path: str) -> str:
        return str(program.configure(NO_DATABASE, f'[jobs.clean-tokens]\ninterval = "{hours}h"\n', path))

    def trigger(*arguments: str, **variables: str) -> str:
        jobs = program.run(*arguments, "list", "--json", variables=variables).document
        return str(next(job["trigger"] for job in jobs if job["job"] == "clean-tokens"))

    option, variable = named(11, "option.toml"), named(12, "variable.toml")
    named(13, "config.toml")
    assert trigger("--config", option, CATFEEDER_CRON_CONFIG=variable) == "every 11h"
    assert trigger(CATFEEDER_CRON_CONFIG=variable) == "every 12h"
    assert trigger() == "every 13h"


def test_the_database_need_not_stand_in_the_configuration(program: Program, database_url: str) -> None:
    program.configure(NO_DATABASE)
    address = program.folder / "database-url"
    address.write_text(database_url + "\n")
    address.chmod(0o600)
    by_name = program.configure(NO_DATABASE, path="by-name.toml")
    by_name.write_text('[database]\nurl_file = "database-url"\n')
    for arguments, variables in (
        ([], {"CATFEEDER_CRON_DATABASE_URL": database_url}),
        ([], {"CREDENTIALS_DIRECTORY": str(program.folder)}),
        (["--config", str(by_name)], {}),
    ):
        assert program.run(*arguments, "init-db", variables=variables).status == 0, variables
    assert program.run("init-db").status == 84


def test_list_works_before_the_file_with_the_address_is_there(program: Program) -> None:
    config = program.configure(NO_DATABASE)
    config.write_text('[database]\nurl_file = "database-url"\n')
    listed = program.run("list", "--json")
    assert listed.status == 0
    assert {job["last_run"] for job in listed.document} == {None}
    assert str(program.folder / "database-url") in listed.stderr
    refused = program.run("run-once", "clean-tokens")
    assert (refused.status, "no such file" in refused.error) == (84, True)
    (program.folder / "database-url").write_text("mysql://cat@db")
    assert program.run("list").status == 84


def test_without_a_configuration_the_places_are_named(program: Program) -> None:
    failed = program.run("list")
    assert failed.status == 84
    for place in ("--config", "CATFEEDER_CRON_CONFIG", "config.toml", "/etc/catfeeder-cron/config.toml"):
        assert place in failed.error
    example = re.search(r"after the example (/.+?\.toml),", failed.error)
    assert example
    assert Path(example[1]).read_text() == (Path(__file__).parents[2] / "config.toml").read_text()


def test_a_named_configuration_that_is_not_there_is_not_replaced_by_another(program: Program) -> None:
    program.configure(NO_DATABASE)
    failed = program.run("--config", "elsewhere.toml", "list")
    assert failed.status == 84
    assert "elsewhere.toml" in failed.error


def test_a_configuration_that_is_not_toml_is_told_with_its_line(program: Program) -> None:
    program.configure(NO_DATABASE).write_text("[database]\nurl = = 1\n")
    failed = program.run("list")
    assert failed.status == 84
    assert "config.toml" in failed.error
    assert "line 2" in failed.error


def test_a_configuration_that_is_not_utf8_is_told(program: Program) -> None:
    program.configure(NO_DATABASE).write_bytes(b'[database]\nurl = "caf\xe9"\n')
    failed = program.run("start")
    assert failed.status == 84
    assert "UTF-8" in failed.error


def test_a_directory_is_no_configuration(program: Program) -> None:
    failed = program.run("--config", ".", "list")
    assert failed.status == 84
    assert "directory" in failed.error


@pytest.mark.parametrize("arguments", [["list"], ["start"], ["run-once", "clean-tokens"]])
def test_a_configuration_that_others_may_write_is_refused(program: Program, arguments: list[str]) -> None:
    program.configure(NO_DATABASE).chmod(0o666)
    failed = program.run(*arguments)
    assert (failed.status, failed.stdout) == (84, "")
    assert "config.toml" in failed.error
    assert "chmod" in failed.error


def test_all_faults_of_a_configuration_are_told_at_once_each_in_one_line(program: Program) -> None:
    program.configure(
        NO_DATABASE,
        """
        pool_max_sise = 8
        [scheduler]
        timezone = "Europe/Pariss"
        max_workers = "four"
        [jobs.clean-tokens]
        interval = 0.5
        batch_sise = 10
        [jobs.clean-verification]
        cron = "61 * * * *"
        [jobs.test-hello-world]
        interval = "5m"
        cron = "@hourly"
        [jobs.clean-tokns]
        interval = "5m"
        [loging]
        """,
    )
    for arguments in (["start"], ["run-once", "clean-tokens"]):
        failed = program.run(*arguments)
        assert (failed.status, failed.stdout) == (84, "")
        lines = failed.stderr.splitlines()
        for key, told in {
            "database.pool_max_sise": "did you mean `pool_max_size`",
            "scheduler.timezone": "did you mean `Europe/Paris`",
            "scheduler.max_workers": "whole number",
            "jobs.clean-tokens.interval": "at least 1s",
            "jobs.clean-tokens.batch_sise": "did you mean `batch_size`",
            "jobs.clean-verification.cron": "crontab(5)",
            "jobs.test-hello-world": "expected one trigger",
            "jobs.clean-tokns": "did you mean `clean-tokens`",
            "loging": "did you mean `logging`",
        }.items():
            found = [line for line in lines if f"config.toml: {key}:" in line and told in line]
            assert len(found) == 1, (key, lines)
        assert len(lines) == 9


def test_the_web_servers_own_configuration_serves_as_it_is(program: Program) -> None:
    program.configure(
        NO_DATABASE,
        """
        [Crons]
        clean_tokens = true
        clean_tokens_interval = 1200
        clean_verification = false
        enable_test_crons = true
        test_cron_interval = 90
        reset_food_counters_interval = 86400
        [Server]
        anything = "goes"
        """,
    )
    listed = program.run("list", "--json")
    assert listed.status == 0
    told = {job["job"]: (job["enabled"], job["trigger"]) for job in listed.document}
    assert told["clean-tokens"] == (True, "every 20m")
    assert told["clean-verification"][0] is False
    assert told["test-hello-world"] == (True, "every 90s")
    assert told["reset-food-counters"] == (True, "every 1d")


def test_list_works_without_a_database_and_tells_what_it_can(program: Program) -> None:
    program.configure(
        NO_DATABASE,
        """
        [jobs.clean-verification]
        cron = "*/15 * * * *"
        timezone = "Europe/Paris"
        [jobs.test-hello-world]
        enabled = true
        date = 2001-01-01T00:00:00Z
        """,
    )
    listed = program.run("list", "--json")
    assert listed.status == 0
    assert listed.stderr.count("\n") == 1, listed.stderr
    assert "last_runs_unknown" in listed.stderr
    jobs = {job["job"]: job for job in listed.document}
    assert {"clean-tokens", "clean-verification", "test-hello-world", "test-current-date"} <= jobs.keys()
    for job in jobs.values():
        assert job.keys() == {"job", "enabled", "trigger", "next_run", "last_run", "last_outcome", "paused"}
        assert (job["last_run"], job["last_outcome"], job["paused"]) == (None, None, False)
    assert jobs["clean-verification"]["trigger"] == "cron */15 * * * * (Europe/Paris)"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:(00|15|30|45):00Z", jobs["clean-verification"]["next_run"])
    assert jobs["test-hello-world"]["next_run"] is None
    assert jobs["test-current-date"]["next_run"] is None


def test_plain_text_in_a_pipe_has_no_escape_codes_and_ends_quietly_with_its_reader(program: Program) -> None:
    program.configure(NO_DATABASE)
    listed = program.run("list")
    assert listed.status == 0
    assert "\x1b" not in listed.stdout
    assert [line.split()[0] for line in listed.stdout.splitlines()][:3] == ["JOB", "check-actions", "clean-tokens"]

    program.configure(NO_DATABASE, "".join(f'[jobs.j{n}]\ncall = "a:b"\ninterval = 60\n' for n in range(3000)))
    call = shlex.join(command())
    piped = program.run_command("bash", "-c", f"set -o pipefail; {call} list | head -1; {call} list --json | head -1")
    assert piped.stdout.split()[0] == "JOB"
    assert piped.status == 0
    assert "roken" not in piped.stderr


@pytest.mark.parametrize("width", [160, 80, 40])
def test_a_terminal_gets_a_table_that_breaks_no_word_and_cuts_nothing_off(program: Program, width: int) -> None:
    program.configure(NO_DATABASE)
    status, shown = program.run_on_terminal("list", width=width)
    assert status == 0
    assert ("│" in shown) == (width > 40)
    for word in ("clean-verification", "every", "15m", "test-current-date"):
        assert word in shown
    assert re.search(r"\d{4}-\d\d-\d\d", shown)
    assert "…" not in shown


def test_output_that_can_not_be_written_is_one_line(program: Program) -> None:
    program.configure(NO_DATABASE)
    full = program.run_command("bash", "-c", f"{shlex.join(command())} list >/dev/full")
    assert full.status == 84
    assert "No space left" in full.stderr


def test_no_secret_is_ever_told(program: Program) -> None:
    secrets = ("hunter2", "sesame", "pingpong")
    program.configure(
        "postgresql://cat:hunter2@127.0.0.1:1/nowhere?password=sesame&connect_timeout=2",
        """
        connect_timeout = 2
        [logging]
        level = "debug"
        [jobs.clean-tokens]
        ping_url = "https://hc.example.org/pingpong"
        """,
    )
    commands = (["list"], ["run-once", "clean-tokens"], ["history"], ["init-db"])
    said = [program.run(*arguments) for arguments in commands]
    daemon = program.daemon()
    daemon.wait_for("database_unreachable")
    said.append(daemon.stop())

    program.configure("postgresql://cat:hunter2@[nonsense:sesame/", '[jobs.clean-tokens]\nping_url = "pingpong"\n')
    said += [program.run(*arguments) for arguments in commands]
    said.append(program.run("list", variables={"CATFEEDER_CRON_DATABASE_URL": "hunter2"}))
    for told in said:
        assert not [secret for secret in secrets if secret in told.stdout + told.stderr], json.dumps(told.stderr)
    assert [told.status for told in said[:5]] == [0, 84, 84, 84, 0]
