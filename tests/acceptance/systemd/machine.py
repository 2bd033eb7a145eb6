"""A machine that runs systemd: a throw-away one that a script boots, or this one ("host")."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
UNIT = "catfeeder-cron"
CONFIG = "/etc/catfeeder-cron/config.toml"
URL_FILE = "/etc/catfeeder-cron/database-url"
DROP_IN = f"/etc/systemd/system/{UNIT}.service.d/test.conf"

# What pip may need to find packages: the machine's commands are started with an empty environment.
_HANDED_DOWN = ("PIP_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


class Machine:
    """Commands run as root on it."""

    def __init__(self, boot: str) -> None:
        self._boot = None if boot == "host" else boot
        self._environment = {**os.environ, "CFSD_NAME": f"catfeeder-cron-{os.getpid()}"}

    def start(self) -> None:
        if self._boot:
            subprocess.run([self._boot, "start"], env=self._environment, check=True, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._boot:
            subprocess.run([self._boot, "stop"], env=self._environment, check=True, stdout=subprocess.DEVNULL)

    def attempt(self, *command: str, text: str | None = None) -> "subprocess.CompletedProcess[str]":
        prefix = (self._boot, "run") if self._boot else ()
        return subprocess.run(
            [*prefix, *command], env=self._environment, input=text, capture_output=True, text=True, check=False
        )

    def run(self, *command: str, text: str | None = None) -> str:
        """Return what the command said on standard output; fail with all that it said if it failed."""
        done = self.attempt(*command, text=text)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def make(self, target: str) -> str:
        handed_down = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(_HANDED_DOWN)]
        return self.run("env", *handed_down, "make", "-C", str(ROOT), target)

    def systemctl(self, *arguments: str) -> str:
        return self.run("systemctl", *arguments).strip()

    def show(self, name: str) -> str:
        """Return a property of the service."""
        return self.systemctl("show", "--value", "--property", name, UNIT)

    def write(self, path: str, text: str, mode: str = "644") -> None:
        self.run("install", "-D", "-m", mode, "/dev/stdin", path, text=text)

    def drop_in(self, *lines: str) -> None:
        """Change the unit for the test."""
        self.write(DROP_IN, "\n".join(["[Service]", *lines, ""]))
        self.systemctl("daemon-reload")

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Return the entries of the service since it was last cleaned up for a test."""
        lines = self.run("journalctl", "-u", UNIT, "-o", "json", "--all", "--no-pager", *matches).splitlines()
        return [json.loads(line) for line in lines]

    def messages(self, *matches: str) -> str:
        """Return their messages only."""
        return self.run("journalctl", "-u", UNIT, "-o", "cat", "--no-pager", *matches)
