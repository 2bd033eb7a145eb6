"""Network namespaces: one for the database, one for each daemon, and links between them that a test breaks."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.proofs.outages import delaying_proxy

PORT = 5432
PROXY_PORT = 6432


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def works() -> bool:
    """Whether this machine lets one make namespaces, and drop packets in them."""
    name = f"cats-{os.getpid()}-try"
    drop = ["iptables", "-A", "INPUT", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP"]
    try:
        _run("ip", "netns", "add", name)
    except (AssertionError, FileNotFoundError):
        return False
    try:
        _run("ip", "netns", "exec", name, *drop)
    except AssertionError:
        return False
    finally:
        _run("ip", "netns", "delete", name)
    return True


class Network:
    """A star. Number `n` reaches the database at 10.213.n.1 from 10.213.n.2, and nothing else."""

    def __init__(self, number: int) -> None:
        self._prefix = f"cats-{os.getpid()}"
        self._links = range(1, number + 1)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = TemporaryDirectory()

    def __enter__(self) -> "Network":
        try:
            _run("ip", "netns", "add", self._database)
            _run(*self.at_database, "ip", "link", "set", "lo", "up")
            for number in self._links:
                self._add(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()
        for name in (self._database, *map(self._daemon, self._links)):
            if Path("/run/netns", name).exists():
                _run("ip", "netns", "delete", name)

    @property
    def at_database(self) -> Sequence[str]:
        """What a command of the database's begins with."""
        return ["ip", "netns", "exec", self._database]

    def at(self, number: int) -> Sequence[str]:
        """What a command of this daemon's begins with."""
        return ["ip", "netns", "exec", self._daemon(number)]

    def address(self, number: int) -> str:
        """Where this daemon finds the database."""
        return f"10.213.{number}.1"

    def cut(self, number: int, *, asking: bool = True, answers: bool = True) -> None:
        """Lose, without a word, what goes to the database, what comes from there, or both."""
        self._lose(number, [], asking=asking, answers=answers)

    def lose(self, number: int, share: float) -> None:
        """Lose this share of all packets, both ways."""
        self._lose(number, ["-m", "statistic", "--mode", "random", "--probability", str(share)])

    def _lose(self, number: int, match: Sequence[str], *, asking: bool = True, answers: bool = True) -> None:
        rule = [*match, "-j", "DROP"]
        if asking:
            _run(*self.at_database, "iptables", "-A", "INPUT", "-i", f"link{number}", *rule)
        if answers:
            _run(*self.at_database, "iptables", "-A", "OUTPUT", "-o", f"link{number}", *rule)

    def unplug(self, number: int) -> None:
        """Take the database's end of a link down; packets then have no way."""
        _run(*self.at_database, "ip", "link", "set", "dev", f"link{number}", "down")

    def heal(self) -> None:
        """Mend all links."""
        _run(*self.at_database, "iptables", "-F")
        for number in self._links:
            _run(*self.at_database, "ip", "link", "set", "dev", f"link{number}", "up")
        for proxy in Path(self._folder.name).iterdir():
            proxy.write_text("0")

    def add_proxy(self, number: int) -> tuple[str, int]:
        """Put a proxy on the daemon's side of a link, whose delay can be set; return where it listens."""
        file = self._delay_of(number)
        file.write_text("0")
        words = [sys.executable, delaying_proxy.__file__, str(PROXY_PORT), self.address(number), str(PORT), str(file)]
        process = subprocess.Popen([*self.at(number), *words], stdout=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout is not None
        with process.stdout as said:
            assert said.readline() == b"ready\n"
        return "127.0.0.1", PROXY_PORT

    def delay(self, number: int, seconds: float) -> None:
        """Have the proxy hold back what comes in for so long, either way."""
        self._delay_of(number).write_text(str(seconds))

    def _delay_of(self, number: int) -> Path:
        return Path(self._folder.name, f"delay-{number}")

    def _add(self, number: int) -> None:
        name, ours, its = self._daemon(number), f"link{number}", "uplink"
        _run("ip", "netns", "add", name)
        peer = ["peer", "name", its, "netns", name]
        _run("ip", "link", "add", ours, "netns", self._database, "type", "veth", *peer)
        for inside, link, last in ((self.at_database, ours, 1), (self.at(number), its, 2)):
            _run(*inside, "ip", "address", "add", f"10.213.{number}.{last}/30", "dev", link)
            _run(*inside, "ip", "link", "set", "dev", link, "up")
        _run(*self.at(number), "ip", "link", "set", "lo", "up")

    @property
    def _database(self) -> str:
        return f"{self._prefix}-database"

    def _daemon(self, number: int) -> str:
        return f"{self._prefix}-{number}"
