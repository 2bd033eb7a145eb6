"""Run the real daemon on a temporary PostgreSQL with sample data, for `make run`."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from catfeeder_cron import logs
from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database, embedded, schema
from catfeeder_cron.database.schema.application import create_tables
from catfeeder_cron.database.schema.indexes import create_indexes
from catfeeder_cron.demo.provider import TOKEN_LIFESPAN, LocalProvider, local_provider
from catfeeder_cron.jobs import built_in, load_settings
from catfeeder_cron.logs import get_logger
from catfeeder_cron.service import daemon
from catfeeder_cron.service.signals import StopSignals

log = get_logger("catfeeder_cron.demo")

_CONFIG = """
[database]
url = "{conninfo}"

[logging]
format = "console"

[jobs.clean-tokens]
interval = "5s"

[jobs.clean-verification]
interval = "7s"

[jobs.renew-oauth]
interval = "10s"

[actions.webhook]
allowed = ["{webhooks}"]

[jobs.test-current-date]
enabled = true
interval = "15s"
"""

# Half of the rows have expired, and more of them do so while the demo runs.
_SAMPLES = """
    INSERT INTO "Users" (username) SELECT 'cat-' || n FROM generate_series(1, 200) AS n;
    INSERT INTO "Services" (name) VALUES ('local');
    INSERT INTO "Connections" (token, user_id, expiration_date)
        SELECT md5(random()::text) || n, 1 + n % 200, now() + (n - 3000) * interval '0.1 second'
        FROM generate_series(1, 6000) AS n;
    INSERT INTO "Verification" (term, definition, expiration)
        SELECT 'user' || n || '@example.org', left(md5(random()::text), 6), now() + (n - 1000) * interval '0.3 second'
        FROM generate_series(1, 2000) AS n;
"""

_PROVIDER = """
    INSERT INTO "UserOauthConnection" (provider_name, client_id, client_secret, token_grabber_base_url)
    VALUES ('local', 'catfeeder', 'demo', %s)"""

# The provider does not know some of the tokens: their users have to log in again.
_LINKS = """
    INSERT INTO "ActiveOauths" (token, token_expiration, token_lifespan, refresh_link, service_id, user_id)
    SELECT 'old', now() + n * interval '1 second', %s, refresh_link, (SELECT id FROM "Services"), n
    FROM unnest(%s::text[]) WITH ORDINALITY AS link(refresh_link, n)"""
_LINKS_IN_ALL = 100
_DEAD_LINKS = 3

_ACTION = """
    INSERT INTO "Actions" (user_id, name, kind, payload, due_at, repeat_every)
    VALUES (1, 'breakfast', 'webhook', jsonb_build_object('url', %s::text, 'body', '{"portions": 2}'::jsonb),
            now() + interval '3 seconds', interval '20 seconds')"""


class _Feeder(BaseHTTPRequestHandler):
    """A cat feeder, which logs the webhooks that it receives."""

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
        # The main thread runs the daemon, so the feeder answers in a thread of its own.
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/feeders/"
        server.shutdown()


def run() -> None:
    """Run until Ctrl-C or SIGTERM, then stop the server and delete its data."""
    logs.use_nonblocking_stderr()
    logs.configure("info", "console")
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))  # the terminal was closed
    with ExitStack() as opened:
        # A stop waits for the end of the set-up: processes of initdb would outlive us and go on writing.
        with StopSignals() as signals:
            settings = _set_up(opened)
        if not signals.requested.is_set():
            daemon.run(settings)


def _set_up(opened: ExitStack) -> Settings:
    folder = opened.enter_context(TemporaryDirectory(prefix="catfeeder-cron-demo-"))
    server = opened.enter_context(embedded.temporary())
    feeder = opened.enter_context(_feeder())
    provider = opened.enter_context(local_provider())
    os.environ["STATE_DIRECTORY"] = folder
    config = Path(folder, "config.toml")
    config.write_text(_CONFIG.format(conninfo=server.conninfo, webhooks=feeder))
    jobs = built_in()
    settings = load_settings(config, environ={})
    with Database(settings.database) as database:
        for _ in schema.upgrade(database):
            pass
        for _ in create_tables(database, settings.database.tables):
            pass
        with database.transaction() as connection:
            connection.execute(_SAMPLES)
            connection.execute(_ACTION, [f"{feeder}kitchen"])
            connection.execute(_PROVIDER, [provider.token_url])
            connection.execute(_LINKS, [TOKEN_LIFESPAN, _refresh_tokens(provider)])
        wanted = [index for job in jobs.values() for index in job.wanted_indexes]
        for _ in create_indexes(database, settings.database.tables, wanted):
            pass
    counts = {"connections": 6000, "verifications": 2000, "oauth_links": _LINKS_IN_ALL}
    log.info("demo_ready", **counts, server=server.conninfo, stop="press Ctrl-C")
    return settings


def _refresh_tokens(provider: LocalProvider) -> list[str]:
    good = [provider.hand_out() for _ in range(_LINKS_IN_ALL - _DEAD_LINKS)]
    return [*good[:20], *(f"consent-taken-back-{number}" for number in range(_DEAD_LINKS)), *good[20:]]
