"""What is left when the program is removed. The last module: nothing is installed after it."""

import pytest

from tests.acceptance.systemd.conftest import Installed, files_on
from tests.acceptance.systemd.machine import CONFIG, UNIT, URL_FILE

pytestmark = pytest.mark.systemd

KEPT = ("/etc/catfeeder-cron", "/var/lib/catfeeder-cron", "/var/lib/private")


def test_configuration_and_state_outlive_the_program_and_a_purge_removes_them_too(installed: Installed) -> None:
    machine, before = installed.machine, installed.before
    machine.write(URL_FILE, "postgresql://cat@127.0.0.1:9/x", "600")
    machine.systemctl("enable", "--now", UNIT)

    said = machine.make("uninstall")

    assert "Kept: the configuration in /etc/catfeeder-cron, the state in /var/lib/catfeeder-cron" in said
    left = files_on(machine) - before
    assert {path for path in left if not path.startswith((*KEPT, "/etc/hog"))} == set()
    assert {CONFIG, URL_FILE, "/var/lib/private/catfeeder-cron"} <= left
    assert machine.attempt("systemctl", "cat", UNIT).returncode != 0

    machine.make("purge")
    left = files_on(machine) - before
    assert {path for path in left if not path.startswith("/etc/hog")} <= {"/var/lib/private"}
