"""Logs: one stream of entries on standard error, whoever wrote them, and no secret in any."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catfeeder_cron import logs
from catfeeder_cron.logs import configure, get_logger, one_line

QUIETED = ("apscheduler", "httpx", "httpcore", "psycopg.pool")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raise_exceptions = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raise_exceptions
    for name in QUIETED:
        logging.getLogger(name).setLevel(logging.NOTSET)


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def logged(**fields: object) -> dict[str, Any]:
    stream = io.StringIO()
    configure("info", "json", stream)
    get_logger("tests").info("something_happened", **fields)
    (entry,) = entries(stream)
    return entry


def test_a_json_entry_begins_with_time_level_event_and_logger_then_has_its_fields() -> None:
    entry = logged(job="clean-tokens", deleted=12)

    assert list(entry) == ["timestamp", "level", "event", "logger", "job", "deleted"]
    assert entry["timestamp"].endswith("+00:00")
    assert entry | {"timestamp": ""} == {
        "timestamp": "",
        "level": "info",
        "event": "something_happened",
        "logger": "tests",
        "job": "clean-tokens",
        "deleted": 12,
    }


def test_a_record_of_another_library_becomes_the_same_kind_of_entry() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)

    logging.getLogger("apscheduler.executors.default").error('Job "%s" raised', "x")

    (entry,) = entries(stream)
    assert list(entry) == ["timestamp", "level", "event", "logger"]
    assert entry["event"] == 'Job "x" raised'
    assert entry["logger"] == "apscheduler.executors.default"


def test_a_field_cannot_take_the_place_of_level_time_or_logger() -> None:
    assert logged(level="critical", logger="other", timestamp="never")["level"] == "info"


def test_values_that_json_does_not_know_become_text() -> None:
    entry = logged(path=ValueError("no"), names={"one"}, nested={1: (None, True, 1.5)})

    assert (entry["path"], entry["names"], entry["nested"]) == ("no", ["one"], {"1": [None, True, 1.5]})


def test_a_traceback_is_text_in_its_own_entry_and_shows_no_local_variables() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    local = "".join(["hunt", "er2"])

    try:
        raise RuntimeError("it " + "failed" * bool(local))
    except RuntimeError:
        get_logger("tests").exception("job_failed", job="x")

    (entry,) = entries(stream)
    assert entry["exception"].startswith("Traceback (most recent call last):\n")
    assert entry["exception"].endswith("RuntimeError: it failed")
    assert local not in stream.getvalue()


def test_a_console_traceback_shows_no_local_variables_either() -> None:
    stream = Terminal()
    configure("info", "console", stream)
    local = "".join(["hunt", "er2"])

    try:
        raise RuntimeError("it " + "failed" * bool(local))
    except RuntimeError:
        get_logger("tests").exception("job_failed")

    assert "RuntimeError: it failed" in stream.getvalue()
    assert local not in stream.getvalue()


def test_auto_is_console_on_a_terminal_and_json_elsewhere() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        configure("info", "auto", stream)
        get_logger("tests").info("hello")

    assert entries(pipe)[0]["event"] == "hello"
    assert "hello" in terminal.getvalue()
    assert "{" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {}, False),
    ],
)
def test_only_a_terminal_that_wants_colours_gets_them(
    stream: type[io.StringIO],
    environment: dict[str, str],
    coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    output = stream()
    configure("info", "console", output)
    get_logger("tests").info("hello")

    assert ("\x1b[" in output.getvalue()) is coloured


def test_entries_below_the_level_are_left_out_and_configuring_again_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    log = get_logger("tests")

    configure("warning", "json", first)
    log.info("left_out")
    configure("debug", "json", second)
    log.debug("told")

    assert first.getvalue() == ""
    assert [entry["event"] for entry in entries(second)] == ["told"]


@pytest.mark.parametrize(("level", "told"), [("info", []), ("debug", ["apscheduler", "httpx", "psycopg.pool"])])
def test_other_libraries_chatter_is_left_for_debugging(level: str, told: list[str]) -> None:
    stream = io.StringIO()
    configure(level, "json", stream)

    for name in ("apscheduler", "httpx"):
        logging.getLogger(name).info("chatter")
    logging.getLogger("psycopg.pool").warning("error connecting, again")
    logging.getLogger("httpcore").info("receive_response_headers.complete")

    assert [entry["logger"] for entry in entries(stream)] == told


def test_a_closed_or_broken_stream_raises_nothing() -> None:
    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    for stream in (closed, Broken()):
        configure("info", "json", stream)
        get_logger("tests").info("hello")


def test_context_is_in_every_entry_of_the_block_those_of_other_libraries_too() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)

    with logs.context(job="clean-tokens"):
        get_logger("tests").info("inside", deleted=1)
        logging.getLogger("other").warning("inside")
    get_logger("tests").info("outside")

    assert [entry.get("job") for entry in entries(stream)] == ["clean-tokens", "clean-tokens", None]


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "access_token",
        "client_secret",
        "password",
        "Authorization",
        "refresh_link",
        "api_key",
        "tokens",
    ],
)
def test_a_text_under_a_secret_key_is_not_told_and_a_number_is(key: str) -> None:
    entry = logged(**{key: "hunter2"}, headers={key: ["hunter2", b"hunter2"]}, counts={key: 12})

    assert "hunter2" not in json.dumps(entry)
    assert entry[key] == "[redacted]"
    assert entry["counts"] == {key: 12}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("to postgresql://cat:hunter2@db/x", "to postgresql://cat:[redacted]@db/x"),
        ("postgresql://cat:hunter2@2@db:5432/x", "postgresql://cat:[redacted]@db:5432/x"),
        ("host=db password=hunter2 user=cat", "host=db password=[redacted] user=cat"),
        ("password='hunter2 hunter2' user=cat", "password=[redacted] user=cat"),
        ("GET /token?client_secret=hunter2&a=1", "GET /token?client_secret=[redacted]&a=1"),
        ("Authorization: Bearer hunter2.x", "Authorization: Bearer [redacted]"),
        ("duplicate key\nDETAIL:  Key (token)=(hun\n\nter2) exists.", "duplicate key\nDETAIL: [redacted]"),
        ("https://hooks.example.org:8080/cats", "https://hooks.example.org:8080/cats"),
        ("deleted tokens: 12", "deleted tokens: 12"),
    ],
)
def test_secrets_inside_a_text_are_not_told(text: str, shown: str) -> None:
    stream = io.StringIO()
    configure("info", "json", stream)

    get_logger("tests").info("failed", detail=text)
    logging.getLogger("other").warning(text)
    try:
        raise RuntimeError(text)
    except RuntimeError:
        get_logger("tests").exception("failed")

    field, event, exception = entries(stream)
    assert field["detail"] == shown
    assert event["event"] == shown
    assert exception["exception"].endswith(shown)


def test_a_traceback_goes_on_after_the_row_that_postgresql_quoted() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)

    try:
        try:
            raise ValueError("duplicate key\nDETAIL:  Key (token)=(hunter2) already exists.")
        except ValueError as error:
            raise RuntimeError("storing failed") from error
    except RuntimeError:
        get_logger("tests").exception("failed")

    (entry,) = entries(stream)
    assert "hunter2) already" not in entry["exception"].partition("ValueError: ")[2]
    assert entry["exception"].endswith("RuntimeError: storing failed")


@given(password=st.text(st.characters(exclude_characters="/", exclude_categories=("Cs", "Z", "Cc")), min_size=1))
def test_no_password_of_a_url_is_told(password: str) -> None:
    assert logged(url=f"postgresql://cat:{password}@db/x")["url"] == "postgresql://cat:[redacted]@db/x"


@given(st.text(st.characters(exclude_categories=())))
def test_foreign_text_becomes_one_printable_line(text: str) -> None:
    line = one_line(f"a\0\ud800\x1b[2J\u2028{text}")

    assert line.startswith("a [2J")
    assert line.isprintable()


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_unconfigured_events_go_to_the_host_programs_logging_and_not_to_standard_output() -> None:
    host = (
        "import logging; logging.basicConfig(format='%(name)s %(levelname)s %(message)s')\n"
        "from catfeeder_cron.logs import get_logger\n"
        "log = get_logger('catfeeder_cron.x')\n"
        "log.info('below_the_level')\n"
        "log.warning('slot_missed', job='x', name='taken', password='hunter2', tokens=12)\n"
    )
    done = run_python(host)

    assert done.stdout == ""
    assert done.stderr == ("catfeeder_cron.x WARNING slot_missed job=x name=taken password=[redacted] tokens=12\n")


DEBUG = """
from catfeeder_cron.logs import get_logger, show_debug_records
root = logging.getLogger()
before = root.level, list(root.handlers), logging.getLogger('other').level
show_debug_records()
show_debug_records()
assert (root.level, root.handlers, logging.getLogger('other').level) == before
logging.getLogger('other').debug('chatter')
get_logger('catfeeder_cron.x').debug('told', portions=3)
"""


def test_debug_records_go_to_standard_error_where_a_program_has_no_handler() -> None:
    done = run_python(f"import logging\n{DEBUG}get_logger('catfeeder_cron.x').error('told_too')\n")

    first, second = done.stderr.splitlines()
    assert first.endswith("DEBUG catfeeder_cron.x: told portions=3")
    assert second.endswith("ERROR catfeeder_cron.x: told_too")
    assert done.stdout == ""


@pytest.mark.parametrize("configured", ["before", "after"])
def test_debug_records_go_once_to_the_handlers_that_a_program_has(configured: str) -> None:
    setup = "import logging\nlogging.basicConfig(level='INFO', format='HOST %(message)s')\n"
    again = "get_logger('catfeeder_cron.x').debug('told', portions=3)\nlogging.getLogger('other').info('theirs')\n"
    program = setup + DEBUG + again if configured == "before" else f"import logging\n{DEBUG}{setup}{again}"
    told = [line for line in run_python(program).stderr.splitlines() if line.startswith("HOST")]

    assert told[-2:] == ["HOST told portions=3", "HOST theirs"]
    assert len(told) == (3 if configured == "before" else 2)


def test_debug_records_of_a_logger_that_a_program_has_given_a_handler_go_there_alone() -> None:
    setup = """
import logging, sys
logging.getLogger('catfeeder_cron').addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger('catfeeder_cron').propagate = False
"""
    done = run_python(setup + DEBUG)
    assert (done.stdout, done.stderr) == ("told portions=3\n", "")


def test_importing_logs_loads_neither_structlog_nor_rich() -> None:
    run_python("import sys, catfeeder_cron.logs; assert not {'structlog', 'rich'} & sys.modules.keys(), sys.modules")


def test_a_traceback_that_comes_as_text_is_part_of_the_entry() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    record = logging.makeLogRecord({"name": "far.away", "levelno": logging.ERROR, "msg": "it failed"})
    setattr(record, logs.TRACEBACK, "Traceback (most recent call last):\nValueError: secret=hush")
    logging.getLogger("far.away").handle(record)

    (entry,) = entries(stream)
    assert (entry["event"], entry["logger"]) == ("it failed", "far.away")
    assert entry["exception"] == "Traceback (most recent call last):\nValueError: secret=[redacted]"
