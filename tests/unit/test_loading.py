"""`load`: one thread imports for all, and nobody waits for it who may be waited for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import catfeeder_cron

# Another thread, without which `load` would import where it is called.
BEGIN = """
import os, sys, threading
from catfeeder_cron.imports import load
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""

NOTES_ITS_THREAD = "import threading\nthread = threading.current_thread().name\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cat.py").write_text(NOTES_ITS_THREAD)
    (tmp_path / "dog.py").write_text(NOTES_ITS_THREAD)
    return tmp_path


def run(folder: Path, source: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that finds modules in the folder, and ours where this test found them."""
    path = os.pathsep.join([str(folder), str(Path(catfeeder_cron.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def said(folder: Path, source: str) -> str:
    ended = run(folder, source)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.strip()


def test_a_program_of_one_thread_stays_one(folder: Path) -> None:
    source = """
import threading
from catfeeder_cron.imports import load
load("cat", "dog")
import cat
print(cat.thread, threading.active_count())
"""
    assert said(folder, source) == "MainThread 1"


def test_beside_other_threads_one_thread_imports_for_all(folder: Path) -> None:
    source = """
def work(name):
    load(name)
threads = [threading.Thread(target=work, args=[name]) for name in ("cat", "dog", "cat", "dog")]
for thread in threads: thread.start()
for thread in threads: thread.join()
import cat, dog
print(cat.thread, dog.thread, [thread.name for thread in threading.enumerate()].count("imports"))
"""
    assert said(folder, BEGIN + source) == "imports imports 1"


def test_what_an_import_raises_reaches_the_caller_with_its_traceback_each_time(folder: Path) -> None:
    (folder / "broken.py").write_text("import no_such_library\n")
    source = """
import traceback
for _ in range(2):
    try:
        load("broken")
    except ModuleNotFoundError as error:
        print(error.name, "broken.py" in traceback.format_exc(), end=" ")
"""
    assert said(folder, BEGIN + source) == "no_such_library True no_such_library True"


def test_a_thread_in_the_middle_of_an_import_does_not_wait_for_the_one_that_waits_for_it(folder: Path) -> None:
    """As in a finalizer that logs, which may be called while structlog is imported."""
    (folder / "outer.py").write_text("from catfeeder_cron.imports import load\nload('inner')\n")
    (folder / "inner.py").write_text("import outer\n" + NOTES_ITS_THREAD)
    assert said(folder, BEGIN + "import outer, inner\nprint(inner.thread)") == "MainThread"
    assert said(folder, BEGIN + "load('outer')\nimport inner\nprint(inner.thread)") == "imports"


def test_a_forked_child_imports_too(folder: Path) -> None:
    source = """
load("cat")
if pid := os.fork():
    print(os.waitpid(pid, 0)[1])
else:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    load("dog")
    import dog
    os._exit(0 if dog.thread == "imports" else 1)
"""
    assert (
        said(folder, BEGIN.replace("import os", "import warnings; warnings.simplefilter('ignore')\nimport os") + source)
        == "0"
    )


@pytest.mark.parametrize("before", ["", "load('dog')"], ids=["without a thread", "with one"])
def test_at_the_end_of_the_interpreter_it_imports_still(folder: Path, before: str) -> None:
    source = f"""
import atexit
{before}
def at_exit():
    load("cat")
    import cat
    print(cat.thread in ("imports", "MainThread"))
atexit.register(at_exit)
"""
    assert said(folder, BEGIN + source) == "True"
