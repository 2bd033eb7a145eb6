"""A clock that a test sets while the process that reads it runs, by Debian's libfaketime.

The clocks that only go on (monotonic, boot time) stay right, as they do where an operator or NTP sets the clock.
"""

from collections.abc import Mapping
from pathlib import Path

RIGHT = "+0"


def library() -> Path | None:
    """Return libfaketime, where it is installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Clock:
    """The clock of all processes that are started with its variables. It is right until it is set."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(RIGHT)

    def set(self, offset: str) -> None:
        """Set it off by so much from now on: "+1h", "-50m", "+3d"."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset}\n")
        new.chmod(0o644)
        new.replace(self._file)  # whoever reads meanwhile reads the one or the other

    @property
    def variables(self) -> Mapping[str, str]:
        return {
            "LD_PRELOAD": str(library()),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
