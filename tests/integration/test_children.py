"""Processes for an operator's callables: how long one is kept, and what ends it."""

import gc
import os
import resource
import signal
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from catfeeder_cron.children.pool import Call, Children
from catfeeder_cron.errors import CatfeederCronError, ChildDied
from catfeeder_cron.times import elapsed_seconds
from tests.support.processes import is_alive
from tests.support.waiting import eventually

CODE = """
import os, sys, time

def whoami():
    return str(os.getpid())

def last(file):
    with open(file + ".new", "w") as written:
        written.write(str(os.getpid()))
    os.rename(file + ".new", file)
    while True:
        time.sleep(1000)

def detach_stdout():
    import io
    sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding="utf-8")
    print("still here")
    return str(os.getpid())

def detach_and_forget():
    sys.stdout.detach()
    return str(os.getpid())

def die_by(number):
    os.kill(os.getpid(), number)
    time.sleep(1000)

def say_goodbye(file):
    import atexit
    atexit.register(lambda: open(file, "w").write("goodbye"))
    return str(os.getpid())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "called.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def is_gone(pid: int) -> bool:
    return not is_alive(pid)


def call(children: Children, function: str, *arguments: Any, key: str = "key") -> Call:
    return children.call(key, f"called:{function}", *arguments, on_line=lambda _line: None)


def pid_of(children: Children, key: str = "key") -> int:
    return int(call(children, "whoami", key=key).future.result(60).text or 0)


def lasting(children: Children, folder: Path, name: str = "pid") -> tuple[Call, int]:
    """Begin a call that lasts for ever; return it with its process."""
    begun = folder / name
    made = call(children, "last", str(begun))
    eventually(begun.exists)
    return made, int(begun.read_text())


def test_calls_of_one_key_share_a_process_and_those_of_another_do_not(folder: Path) -> None:
    with Children() as children:
        assert pid_of(children) == pid_of(children) != pid_of(children, "another")


def test_calls_at_the_same_time_have_a_process_each(folder: Path) -> None:
    with Children() as children:
        first, second = lasting(children, folder, "first"), lasting(children, folder, "second")
        assert first[1] != second[1]
        for made, pid in (first, second):
            made.kill()
            with pytest.raises(ChildDied):
                made.future.result(60)
            eventually(partial(is_gone, pid))


def test_one_that_has_idled_for_long_is_ended(folder: Path) -> None:
    with Children(idle=timedelta(seconds=0.05)) as children:
        idle = pid_of(children)
        eventually(lambda: is_gone(idle))
        assert pid_of(children) != idle


def test_of_many_that_idle_the_oldest_are_ended(folder: Path) -> None:
    with Children() as children:
        pids = [pid_of(children, str(key)) for key in range(18)]
        eventually(lambda: is_gone(pids[0]) and is_gone(pids[1]))
        assert not any(map(is_gone, pids[2:]))


def test_one_that_is_retired_ends_in_order(folder: Path) -> None:
    with Children() as children:
        file = folder / "goodbye"
        pid = int(call(children, "say_goodbye", str(file)).future.result(60).text or 0)
        children.retire()
        eventually(lambda: is_gone(pid) and file.read_text() == "goodbye")
        assert pid_of(children) != pid


def test_one_at_work_is_retired_when_its_call_is_over(folder: Path) -> None:
    with Children() as children:
        first = pid_of(children)
        made, pid = lasting(children, folder)
        assert pid == first
        children.retire()
        assert not is_gone(pid)
        made.kill()
        assert pid_of(children) != pid


def test_closing_kills_what_is_at_work_and_takes_no_further_call(folder: Path) -> None:
    children = Children()
    made, pid = lasting(children, folder)
    children.close()

    assert is_gone(pid)
    with pytest.raises(ChildDied):
        made.future.result(60)
    with pytest.raises(CatfeederCronError, match="ending"):
        call(children, "whoami")


def test_a_pool_that_is_dropped_ends_its_processes(folder: Path) -> None:
    children = Children()
    idle = pid_of(children)
    del children
    gc.collect()

    eventually(lambda: is_gone(idle))


def test_the_deadline_holds_though_the_process_that_called_is_frozen(folder: Path) -> None:
    begun = folder / "pid"
    program = f"""
import sys, threading
sys.path.insert(0, {str(folder)!r})
from catfeeder_cron.children.pool import Children
from catfeeder_cron.times import elapsed_seconds
children = Children()
call = children.call("key", "called:last", {str(begun)!r}, on_line=print)
call.set_deadline(elapsed_seconds() + 1000)
sys.stdin.readline()
call.set_deadline(elapsed_seconds() + 0.5)
passed_on = threading.Event()
call._soon(passed_on.set)
passed_on.wait()
print("set", flush=True)
call.future.result()
"""
    caller = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert caller.stdin is not None
    assert caller.stdout is not None
    try:
        eventually(begun.exists)
        pid = int(begun.read_text())
        caller.stdin.write("\n")
        caller.stdin.flush()
        assert caller.stdout.readline() == "set\n"
        os.kill(caller.pid, signal.SIGSTOP)
        eventually(lambda: is_gone(pid))
    finally:
        caller.kill()
        caller.communicate()


def test_a_second_request_to_stop_may_leave_less_time_but_not_more(folder: Path) -> None:
    with Children() as children:
        patient, _ = lasting(children, folder, "patient")
        patient.ask_to_stop(1000)
        killed, pid = lasting(children, folder, "killed")
        killed.ask_to_stop(1000)
        killed.ask_to_stop(0.1)
        killed.ask_to_stop(1000)
        with pytest.raises(ChildDied):
            killed.future.result(60)
        assert killed.was_killed
        assert is_gone(pid)
        assert not patient.future.done()


def test_a_call_whose_deadline_has_passed_is_not_begun(folder: Path) -> None:
    """As when this process was frozen between the claim of an action and its call."""
    file = folder / "goodbye"
    with Children() as children:
        late = children.call(
            "key", "called:say_goodbye", str(file), deadline=elapsed_seconds() - 1, on_line=lambda _line: None
        )
        with pytest.raises(ChildDied, match="its deadline was over before it began"):
            late.future.result(60)
    assert not file.exists()


def test_a_deadline_that_is_taken_back_or_moved_kills_nobody(folder: Path) -> None:
    with Children() as children:
        made, pid = lasting(children, folder)
        made.set_deadline(elapsed_seconds() + 3)
        made.set_deadline(elapsed_seconds() + 1000)
        served = pid_of(children, "another")
        other = call(children, "whoami", key="another")
        other.set_deadline(elapsed_seconds() + 3)
        assert int(other.future.result(60).text or 0) == served
        expired, expiring = lasting(children, folder, "expiring")
        expired.set_deadline(elapsed_seconds() + 4)  # by its end the others' would have come
        with pytest.raises(ChildDied, match="at its deadline"):
            expired.future.result(60)
        assert is_gone(expiring)
        assert not is_gone(pid)
        assert not is_gone(served)


def test_without_room_for_another_process_a_call_fails_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "python-that-is-not-there"))
    with Children() as children, pytest.raises(ChildDied, match="could not be started: No such file"):
        call(children, "whoami").future.result(60)


def test_a_server_that_embeds_python_is_no_interpreter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/sbin/a-web-server")
    with Children() as children:
        assert pid_of(children)


def test_a_log_handler_that_raises_holds_up_no_callable(folder: Path) -> None:
    (folder / "talking.py").write_text(
        "def talk():\n    for n in range(20_000):\n        print(n)\n    return 'done'\n"
    )

    def fail(_line: str) -> None:
        raise RuntimeError("a handler of the program")

    with Children() as children:
        assert children.call("key", "talking:talk", on_line=fail).future.result(60).text == "done"


def test_what_is_printed_and_logged_is_told_before_the_call_is_over(folder: Path) -> None:
    (folder / "talking.py").write_text("def talk():\n    for n in range(2000):\n        print(n)\n")
    lines: list[str] = []
    with Children() as children:
        children.call("key", "talking:talk", on_line=lines.append).future.result(60)

    assert lines == [str(n) for n in range(2000)]


@pytest.mark.parametrize("function", ["detach_stdout", "detach_and_forget"])
def test_a_call_finds_its_streams_as_they_should_be_whatever_the_one_before_did(folder: Path, function: str) -> None:
    with Children() as children:
        first = call(children, function).future.result(60).text
        lines: list[str] = []
        again = children.call("key", "called:detach_stdout", on_line=lines.append).future.result(60).text
        assert first == again
        assert lines == ["still here"]


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGRTMIN + 6, f"was killed by signal {signal.SIGRTMIN + 6}"),
        (signal.SIGALRM, "was killed by SIGALRM"),
        (signal.SIGKILL, "was killed by SIGKILL, as the system does when memory runs out"),
    ],
)
def test_the_signal_of_which_a_callable_died_is_named(folder: Path, number: int, told: str) -> None:
    with Children() as children, pytest.raises(ChildDied, match=f"^its process {told}$"):
        call(children, "die_by", int(number)).future.result(60)


FORKS_MEANWHILE = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
from catfeeder_cron.children.pool import Children
children = Children()
made = children.call("key", "called:last", {begun!r}, on_line=print)
while not os.path.exists({begun!r}):
    time.sleep(0.01)
forked = os.fork()
if forked == 0:
    signal.pause()
children.close()
print(made.future.exception(), flush=True)
os.kill(forked, signal.SIGKILL)
"""


def test_a_process_that_was_forked_meanwhile_keeps_none_from_being_killed(folder: Path) -> None:
    """It holds all pipes to the children open."""
    begun = folder / "pid"
    program = FORKS_MEANWHILE.format(folder=str(folder), begun=str(begun))
    options = ["-W", "ignore:This process:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == ("its process was killed by SIGTERM\n", 0), done.stderr
    assert is_gone(int(begun.read_text()))


def test_a_program_with_many_open_files_has_children_too(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2000, limits[0]), limits[1]))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with Children() as children:
            assert pid_of(children)
    finally:
        for each in opened:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
