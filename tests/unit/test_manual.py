"""The manual page: complete, and nothing that roff stumbles over."""

import re
import shutil
import subprocess

import pytest

from catfeeder_cron.console.manual import page


def test_it_has_every_command_with_its_options() -> None:
    text = page().replace("\\-", "-")

    for command in ("start", "list", "run-once JOB...", "status", "pause [JOB]...", "resume", "check", "init-db"):
        assert f".SS {command}" in text, command
    assert "\\fB--because\\fR \\fITEXT\\fR" in text
    assert ".SH EXIT STATUS" in text


def test_it_has_the_environment_and_the_files() -> None:
    text = page().replace("\\-", "-")

    for name in (
        *("CATFEEDER_CRON_CONFIG", "CATFEEDER_CRON_DATABASE_URL", "CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "PGHOST"),
        *("/etc/catfeeder-cron/config.toml", "/etc/catfeeder-cron/database-url", "/var/lib/catfeeder-cron"),
    ):
        assert re.search(rf"^\.TP\n\\fB.*{re.escape(name)}.*\n[A-Zl]", text, re.MULTILINE), name
    assert text.index(".SH ENVIRONMENT") < text.index(".SH FILES") < text.index(".SH SEE ALSO")


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
def test_it_is_typeset_without_a_warning() -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z"], input=page(), capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stderr == ""
