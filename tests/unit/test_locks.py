"""The lock files: all that `make` needs, and two parts of it. The installed packages know what needs what."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

# "name==1.2 ; marker \" and its hashes, one a line, each but the last continued.
ENTRY = re.compile(r"^([\w.-]+)==(?:.*\\\n)*.*\n", re.MULTILINE)
# What an entry consists of: neither the address of a file nor of a registry.
LINE = re.compile(r"[\w.-]+==[\w.!+]+( ; [\w.()<>=!' ]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?")

# The locks are for all of these at once.
ENVIRONMENTS = [
    {"python_version": version, "python_full_version": f"{version}.0", **platform}
    for version in ("3.11", "3.12", "3.13", "3.14", "3.15")
    for platform in (
        {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
        {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"},
        {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
    )
]


def entries(name: str) -> list[tuple[str, str]]:
    """Return each entry with its name; there may be one for some versions of Python and one for others."""
    text = (ROOT / name).read_text("utf-8")
    found = [(entry[1], entry[0]) for entry in ENTRY.finditer(text)]
    assert "".join(entry for _, entry in found) == text
    return found


def needed(direct: list[str]) -> set[str]:
    """Return the names of all that these need, on whatever platform."""
    todo = [package for text in direct for package in asked_for(Requirement(text), "")]
    seen: set[tuple[str, str]] = set()
    while todo:
        name, extra = package = todo.pop()
        if package not in seen:
            seen.add(package)
            todo += [found for requirement in requirements_of(name) for found in asked_for(requirement, extra)]
    return {name for name, _ in seen}


def requirements_of(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:  # for another platform
        return []


def asked_for(requirement: Requirement, extra: str) -> list[tuple[str, str]]:
    marker = requirement.marker
    if marker and not any(marker.evaluate({**environment, "extra": extra}) for environment in ENVIRONMENTS):
        return []
    return [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]


@pytest.mark.parametrize(
    ("part", "direct"),
    [
        ("requirements.runtime.lock", PROJECT["project"]["dependencies"]),
        ("requirements.build.lock", PROJECT["build-system"]["requires"]),
    ],
)
def test_a_part_has_what_is_needed_with_the_versions_and_hashes_of_the_whole(part: str, direct: list[str]) -> None:
    names = needed(direct)
    assert entries(part) == [(name, entry) for name, entry in entries("requirements.lock") if name in names]


@pytest.mark.parametrize("lock", sorted(path.name for path in ROOT.glob("*.lock")))
def test_a_lock_has_versions_and_hashes_and_nothing_else(lock: str) -> None:
    assert [line for line in (ROOT / lock).read_text("utf-8").splitlines() if not LINE.fullmatch(line)] == []
