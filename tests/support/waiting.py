"""Waits for a condition. The time that is allowed is a way to fail, and never what a test is about."""

import time
from collections.abc import Callable
from typing import Any

# What is waited for comes within a second on a machine that has nothing else to do.
SOON = 60.0


def eventually(condition: Callable[[], Any], what: str = "what was waited for", seconds: float = SOON) -> Any:
    """Return what `condition` gives as soon as that is true; what takes long is looked at less often."""
    began = time.monotonic()
    while not (found := condition()):
        waited = time.monotonic() - began
        assert waited < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(min(0.005 + waited / 10, 0.1))
    return found
