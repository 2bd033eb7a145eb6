"""The daemon's side of the messages: the call that goes to a worker, and the answers that come back."""

import json
import logging
import pickle
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from catfeeder_cron.errors import (
    CallableRaised,
    CatfeederCronError,
    ConfigurationError,
    HopelessAction,
    JobSkipped,
    PostponedAction,
)
from catfeeder_cron.logs import TRACEBACK, one_line


@dataclass(frozen=True)
class Request:
    """A call of "package.module:function"; without `arguments` it is only imported."""

    reference: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
    on_line: Callable[[str], None]
    """Called with each line that the callable prints."""
    on_record: Callable[[logging.LogRecord], None]
    """Called with each record that the callable logs."""
    mark: str = field(default_factory=lambda: f"-- {uuid4().hex} --")

    def tell_line(self, line: str) -> None:
        """Pass on a line, and ignore errors of a log handler: the rest of the output has to be read all the same."""
        with suppress(Exception):
            self.on_line(line)

    def tell_record(self, record: logging.LogRecord) -> None:
        """Pass on a log record, and ignore errors of a log handler."""
        with suppress(Exception):
            self.on_record(record)

    def as_line(self) -> bytes:
        """Return the call as the line that the worker reads."""
        message: dict[str, Any] = {"reference": self.reference, "mark": self.mark}
        message["log_level"] = logging.getLogger().getEffectiveLevel()
        if self.arguments is not None:
            # Not JSON: a TOML file has dates and times.
            message["arguments"] = b64encode(pickle.dumps(self.arguments)).decode()
        return json.dumps(message).encode() + b"\n"


@dataclass(frozen=True)
class Returned:
    """The result of a call that raised nothing."""

    text: str | None
    """The callable's return value, if that is a text."""
    stop_was_seen: bool
    """Whether the callable learned from `stopping()` or by a cancellation that it should stop."""


@dataclass
class Answer:
    """The worker's messages about a call, up to now."""

    request: Request
    begun: bool = False
    verdict: dict[str, Any] | None = None
    _stop_was_seen: bool = False

    def take(self, line: bytes) -> None:
        """Read the next message; ignore a line that is none: the callable can write to the same pipe."""
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            message = json.loads(line)
            self.begun = self.begun or message.get("begun") == self.request.mark
            if "log" in message:
                self.request.tell_record(_record(message["log"]))
            elif "verdict" in message and self.begun:
                self._stop_was_seen = bool(message["stop_was_seen"])
                self.verdict = dict(message["verdict"])

    def result(self) -> Returned:
        """Return the result in the verdict, or raise the error in it."""
        assert self.verdict is not None
        kind, text = self.verdict["kind"], self.verdict["text"]
        if kind == "returned":
            return Returned(None if text is None else one_line(text), self._stop_was_seen)
        reason = one_line(text)
        if kind == "raised":
            raise CallableRaised(one_line(self.verdict["class"]), reason, self.verdict["traceback"])
        if kind == "postponed":
            raise PostponedAction(reason, self.verdict["after_seconds"])
        errors: dict[str, type[CatfeederCronError]] = {
            "hopeless": HopelessAction,
            "skipped": JobSkipped,
            "not_found": ConfigurationError,
        }
        raise errors.get(kind, CatfeederCronError)(reason)


def _record(fields: dict[str, Any]) -> logging.LogRecord:
    """Return a record as if it had been logged here."""
    record = logging.makeLogRecord(
        {
            "name": str(fields["name"]),
            "levelno": int(fields["level"]),
            "levelname": logging.getLevelName(int(fields["level"])),
            "msg": str(fields["text"]),
            "created": float(fields["created"]),
        }
    )
    if fields["traceback"]:
        record.exc_text = str(fields["traceback"])  # for the handlers of a program that embeds us
        setattr(record, TRACEBACK, record.exc_text)
    record.msecs = int(record.created * 1000) % 1000
    return record
