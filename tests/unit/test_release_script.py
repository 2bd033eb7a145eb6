"""tools/release.sh refuses what would become a wrong release, and leaves the checkout as it was."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = Path("catfeeder_cron/version.py")


class Checkout:
    """A repository with what the script works on, and a hatchling that builds nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tools/bin").mkdir(parents=True)
        shutil.copy(ROOT / "tools/release.sh", folder / "tools/release.sh")
        hatchling = folder / "tools/bin/hatchling"
        hatchling.write_text("#!/bin/sh\nmkdir -p dist\n")
        hatchling.chmod(0o755)
        (folder / "catfeeder_cron").mkdir()
        (folder / VERSION).write_text('__version__ = "0.1.0"\n')
        (folder / ".gitignore").write_text("dist\n")
        self.write_changes("- Cats are fed.\n")
        self.git("init", "--quiet")
        self.commit()

    def write_changes(self, unreleased: str) -> None:
        (self.folder / "CHANGELOG.md").write_text(
            f"# Changelog\n\n## [Unreleased]\n\n{unreleased}\n## [0.1.0]\n\n- Cats.\n"
        )

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
        return subprocess.run(
            ["git", *identity, *words], cwd=self.folder, capture_output=True, text=True, check=True
        ).stdout

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "State")

    def release(self, version: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["tools/release.sh", version, "tools"], cwd=self.folder, capture_output=True, text=True, check=False
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("version", ["", "v1.0", "1.0-beta", ".1", "1.", "1..2"])
def test_what_is_no_version_is_refused(checkout: Checkout, version: str) -> None:
    refused = checkout.release(version)
    assert refused.returncode == 1
    assert "such as 1.2.0" in refused.stderr or "make release VERSION=1.2.0" in refused.stderr


def test_a_checkout_that_is_not_clean_is_refused(checkout: Checkout) -> None:
    (checkout.folder / "new").touch()
    assert "uncommitted changes" in checkout.release("1.0.0").stderr


def test_a_version_that_has_its_tag_is_refused(checkout: Checkout) -> None:
    checkout.git("tag", "v1.0.0")
    assert "there is a tag v1.0.0 already" in checkout.release("1.0.0").stderr


def test_a_release_without_changes_is_refused(checkout: Checkout) -> None:
    checkout.write_changes("")
    checkout.commit()
    assert "nothing under [Unreleased]" in checkout.release("1.0.0").stderr


def test_a_build_that_makes_something_else_leaves_no_trace(checkout: Checkout) -> None:
    refused = checkout.release("1.0.0")

    assert (refused.returncode, "hatchling built something else" in refused.stderr) == (1, True)
    assert checkout.git("status", "--porcelain") == ""
    assert (checkout.folder / VERSION).read_text() == '__version__ = "0.1.0"\n'
    assert checkout.git("tag") == ""
