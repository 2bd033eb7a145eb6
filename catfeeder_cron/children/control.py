"""The daemon's side of the guard's own pipe: the deadline of a call, and the order to kill."""

import os
from contextlib import suppress


class ControlPipe:
    """The daemon's end of the pipe from which the guard reads orders, open until `kill`. It belongs to one thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def set_deadline(self, at: float) -> None:
        """Have the guard kill everything at this time of times.elapsed_seconds; infinity takes that back."""
        self._order(f"{at}")

    def kill(self) -> None:
        """Tell the guard to kill the others and then itself: in words, and by the end of its pipe."""
        if self._descriptor is not None:
            self._order("kill")
            os.close(self._descriptor)
            self._descriptor = None

    def _order(self, line: str) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # the guard has ended
                os.write(self._descriptor, f"{line}\n".encode())
