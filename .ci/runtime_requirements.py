"""Print the entries of requirements.lock that the program itself needs: no extras, no development packages.

So one lock, with its hashes, serves the checkout and the installed machine. Run it where the whole lock is installed:
the installed packages know what needs what.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# "name==1.2 ; marker \" and its hashes, one a line, each but the last continued.
_ENTRY = re.compile(r"^([\w.-]+)==(?:.*\\\n)*.*\n", re.MULTILINE)


def needed(program: str) -> set[str]:
    """Return the names of all that the program needs on any platform; pip leaves out what its own has no use for."""
    seen: set[tuple[str, str]] = set()
    todo = [(program, "")]
    while todo:
        name, extra = package = todo.pop()
        if package not in seen:
            seen.add(package)
            todo += [found for requirement in _requirements(name) for found in _asked_for(requirement, extra)]
    return {name for name, _ in seen}


def _requirements(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:  # for another platform
        return []


def _asked_for(requirement: Requirement, extra: str) -> list[tuple[str, str]]:
    marker = requirement.marker
    if marker and "extra" in str(marker) and not marker.evaluate({"extra": extra}):
        return []
    return [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]


def main(program: str, lock: Path) -> None:
    names = needed(program)
    sys.stdout.writelines(entry[0] for entry in _ENTRY.finditer(lock.read_text("utf-8")) if entry[1] in names)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
