"""Do the README's two commands in the folder of a clone, and print what became of them as one line of JSON.

It runs on a fresh machine, with the Python that the machine has and nothing else: `roots.py` starts it.
"""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

READY = "demo_ready"
AT_WORK = "job_finished"
# Downloads included; a machine that needs longer is taken for one on which it hangs.
RUN_SECONDS = 900
TEST_SECONDS = 3600


def processes() -> set[str]:
    return {entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()}


def run_the_demo() -> tuple[bool, str]:
    """Have `make run` show the daemon at work on a terminal, then press Ctrl-C."""
    before, files = processes(), set(Path(tempfile.gettempdir()).iterdir())
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execvp("make", ["make", "run"])
    said, status = "", None
    deadline = time.monotonic() + RUN_SECONDS
    pressed = False
    while status is None and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                said += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # how Linux tells the end of a terminal
                status = os.waitpid(child, 0)[1]
        plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
        if not pressed and READY in plain and AT_WORK in plain.split(READY, 1)[1]:
            os.write(terminal, b"\x03")
            pressed = True
    Path("make-run.log").write_text(said, "utf-8")
    if status is None:
        os.kill(child, signal.SIGKILL)
        return False, f"no {READY} and {AT_WORK}" if not pressed else "it did not end after Ctrl-C"
    if not pressed:
        return False, f"it ended by itself (status {status})"
    time.sleep(2)
    left = {f"process {number}" for number in processes() - before}
    left |= {str(path) for path in set(Path(tempfile.gettempdir()).iterdir()) - files}
    return not left, f"left behind: {', '.join(sorted(left))}" if left else "at work, ended by Ctrl-C, nothing left"


def run_the_tests() -> tuple[bool, str]:
    with Path("make-test.log").open("wb") as log:
        try:
            done = subprocess.run(["make", "test"], stdout=log, stderr=log, timeout=TEST_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return False, "it did not end"
    last = Path("make-test.log").read_text("utf-8", errors="replace").strip().splitlines()[-6:]
    counts = [line.strip("= ") for line in last if re.search(r"\d+ (passed|failed|error)", line)]
    return done.returncode == 0, "; ".join(counts) or " / ".join(last)


def main() -> None:
    outcome = {"python": sys.version.split()[0]}
    for name, command in (("make run", run_the_demo), ("make test", run_the_tests)):
        begun = time.monotonic()
        passed, told = command()
        outcome[name] = f"{'passed' if passed else 'FAILED'} after {time.monotonic() - begun:.0f} s: {told}"
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
