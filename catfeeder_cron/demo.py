"""A throw-away PostgreSQL with sample data, and the real daemon on top: what `make run` shows."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from catfeeder_cron import daemon, embedded, logs, schema
from catfeeder_cron.config import Settings, load
from catfeeder_cron.database import Database
from catfeeder_cron.jobs import built_in
from catfeeder_cron.logs import get_logger
from catfeeder_cron.schema.application import create_tables
from catfeeder_cron.schema.indexes import create_indexes
from catfeeder_cron.service import StopSignals

log = get_logger(__name__)

_CONFIG = """
[database]
url = "{conninfo}"

[logging]
format = "console"

[jobs.clean-tokens]
interval = "5s"

[jobs.clean-verification]
interval = "7s"

[actions.webhook]
allowed = ["{webhooks}"]

[jobs.test-current-date]
enabled = true
interval = "15s"
"""

# Half of the rows have expired, and more of them do so while the demo runs.
_SAMPLES = """
    INSERT INTO "Users" (username) SELECT 'cat-' || n FROM generate_series(1, 200) AS n;
    INSERT INTO "Connections" (token, user_id, expiration_date)
        SELECT md5(random()::text) || n, 1 + n % 200, now() + (n - 3000) * interval '0.1 second'
        FROM generate_series(1, 6000) AS n;
    INSERT INTO "Verification" (term, definition, expiration)
        SELECT 'user' || n || '@example.org', left(md5(random()::text), 6), now() + (n - 1000) * interval '0.3 second'
        FROM generate_series(1, 2000) AS n;
"""


_ACTION = """
    INSERT INTO "Actions" (user_id, name, kind, payload, due_at, repeat_every)
    VALUES (1, 'breakfast', 'webhook', jsonb_build_object('url', %s::text, 'body', '{"portions": 2}'::jsonb),
            now() + interval '3 seconds', interval '20 seconds')"""


class _Feeder(BaseHTTPRequestHandler):
    """A cat feeder that is told to serve."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        log.info("feeder_was_told", path=self.path, body=body, idempotency=self.headers["Idempotency-Key"])
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _feeder() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Feeder) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/feeders/"
        server.shutdown()


def run() -> None:
    """Run until Ctrl-C or SIGTERM, and leave nothing behind."""
    logs.configure("info", "console")
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))  # the terminal was closed
    with ExitStack() as opened:
        # A stop waits for the end of the set-up: what initdb has started would outlive it, and write on.
        with StopSignals() as signals:
            settings = _set_up(opened)
        if not signals.requested.is_set():
            daemon.run(settings)


def _set_up(opened: ExitStack) -> Settings:
    folder = opened.enter_context(TemporaryDirectory(prefix="catfeeder-cron-demo-"))
    server = opened.enter_context(embedded.temporary())
    feeder = opened.enter_context(_feeder())
    config = Path(folder, "config.toml")
    config.write_text(_CONFIG.format(conninfo=server.conninfo, webhooks=feeder))
    jobs = built_in()
    settings = load(config, jobs={job.id: job.settings for job in jobs.values()}, environ={})
    with Database(settings.database) as database:
        for _ in schema.upgrade(database):
            pass
        for _ in create_tables(database, settings.database.tables):
            pass
        with database.transaction() as connection:
            connection.execute(_SAMPLES)
            connection.execute(_ACTION, [f"{feeder}kitchen"])
        for _ in create_indexes(database, settings.database.tables, jobs["clean-tokens"].wanted_indexes):
            pass
    log.info("demo_ready", connections=6000, verifications=2000, server=server.conninfo, stop="press Ctrl-C")
    return settings
