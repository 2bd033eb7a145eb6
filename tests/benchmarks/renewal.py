"""What a run of renew-oauth costs beside the requests alone: rate, and memory by what is due.

Against a loopback endpoint, in a process of its own, that answers after 50 ms; 128 requests in flight.
"""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen
from uuid import uuid4

import psycopg

from tests.benchmarks.report import Figure
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions

_DUE = 10_000
_IN_FLIGHT = 128
_PROVIDERS = 4
_ONE_BY_ONE = 40

_LEAST_OF_BARE = 0.5
_LEAST_OF_SEQUENTIAL = 20
_MOST_GROWTH_MEGABYTES = 20

_FORM = b"grant_type=refresh_token&refresh_token=refresh-0123456789abcdef&client_id=cats&client_secret=secret"

_ENDPOINT = """
import asyncio, itertools
numbers = itertools.count()
BODY = b'{"access_token": "access-%d", "token_type": "Bearer", "expires_in": 3600, "refresh_token": "refresh-%d"}'

async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\\r\\n")[0]))
            await asyncio.sleep(0.05)
            body = BODY % ((next(numbers),) * 2)
            head = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n"
            writer.write(head % len(body) + body)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

_RUN = """
import json, resource, sys, time
from catfeeder_cron.scheduler.crons import Crons
with Crons(config=sys.argv[1]) as crons:
    crons.run("renew-oauth", dry_run=True)
    begun = time.perf_counter()
    report = crons.run("renew-oauth")
    seconds = time.perf_counter() - begun
assert report.counts["renewed"] == int(sys.argv[2]), report
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def measure(sessions: Sessions, scale: Scale) -> Iterator[Figure]:
    with sessions.copy(scale.small, indexed=True) as url, tempfile.TemporaryDirectory() as folder, _endpoint() as port:
        _set_up(url, port)
        bare = max(asyncio.run(_bare(port)) for _ in range(2))
        (rate, large), (again, _) = (_renewed(url, Path(folder), _DUE) for _ in range(2))
        _, small = _renewed(url, Path(folder), _DUE // 10)
        rate = max(rate, again)
        sequential = _sequential(url, port)
    yield Figure(
        f"renew-oauth, {_DUE:,} due tokens of {_PROVIDERS} providers, {_IN_FLIGHT} in flight",
        f"a bare asyncio client that stores nothing: {bare:,.0f} requests/s",
        f"{rate:,.0f}/s, {rate / bare:.2f} of it",
        f"at least {_LEAST_OF_BARE}",
        rate / bare >= _LEAST_OF_BARE,
    )
    yield Figure(
        "the same beside one token after the other",
        f"a request on a new connection, then one UPDATE: {sequential:.1f}/s",
        f"{rate / sequential:.0f} times",
        f"at least {_LEAST_OF_SEQUENTIAL} times",
        rate / sequential >= _LEAST_OF_SEQUENTIAL,
    )
    yield Figure(
        f"peak memory with {_DUE:,} due tokens",
        f"with {_DUE // 10:,}: {small:.0f} MB",
        f"{large:.0f} MB",
        f"at most {_MOST_GROWTH_MEGABYTES} MB more",
        large - small <= _MOST_GROWTH_MEGABYTES,
    )


@contextmanager
def _endpoint() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", _ENDPOINT], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def _set_up(url: str, port: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for number in range(_PROVIDERS):
            connection.execute('INSERT INTO "Services" (name) VALUES (%s)', [f"provider-{number}"])
            connection.execute(
                'INSERT INTO "UserOauthConnection" (provider_name, client_id, client_secret, token_grabber_base_url)'
                " VALUES (%s, 'cats', 'secret', %s)",
                [f"provider-{number}", f"http://127.0.0.1:{port}/token"],
            )
        connection.execute('CREATE INDEX ON "ActiveOauths" (token_expiration)')


def _renewed(url: str, folder: Path, due: int) -> tuple[float, float]:
    """Make so many tokens due, renew them in a process of its own, and return its rate and its peak memory."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute('TRUNCATE "ActiveOauths" RESTART IDENTITY')
        connection.execute(
            'INSERT INTO "ActiveOauths" (token, token_expiration, token_lifespan, refresh_link, service_id)'
            " SELECT 'old', now() + n * interval '1 ms', 3600, %s || n, s.id"
            " FROM generate_series(1, %s) n"
            ' JOIN (SELECT id, row_number() OVER (ORDER BY id) AS place FROM "Services") s'
            " ON s.place = 1 + n %% %s",
            [f"{uuid4()}-", due, _PROVIDERS],  # the answers to those of the run before are kept
        )
        connection.execute('VACUUM ANALYZE "ActiveOauths"')
    config = folder / "config.toml"
    tables = "".join(
        f'[oauth.providers.provider-{number}]\nclient_auth = "body"\nconcurrency = {_IN_FLIGHT // _PROVIDERS}\n'
        for number in range(_PROVIDERS)
    )
    config.write_text(
        f'[database]\nurl = "{url}"\n[logging]\nlevel = "warning"\n[oauth]\nconcurrency = {_IN_FLIGHT}\n{tables}'
    )
    config.chmod(0o600)
    command = [sys.executable, "-c", _RUN, str(config), str(due)]
    environment = os.environ | {"STATE_DIRECTORY": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = re.findall(r"[\d.]+", done.stdout)
    return due / float(seconds), float(megabytes)


async def _bare(port: int) -> float:
    """Send the same requests over plain streams and read the answers, no more."""
    left = iter(range(_DUE))
    request = b"POST /token HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(_FORM) + _FORM

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(_IN_FLIGHT)))
    return _DUE / (time.perf_counter() - begun)


def _sequential(url: str, port: int) -> float:
    """Do as `requests.post` for each token does: a connection, a request, an UPDATE."""
    begun = time.perf_counter()
    with psycopg.connect(url, autocommit=True) as connection:
        for number in range(_ONE_BY_ONE):
            with urlopen(Request(f"http://127.0.0.1:{port}/token", _FORM)) as answer:
                token = answer.read().decode()
            connection.execute('UPDATE "ActiveOauths" SET token = %s WHERE id = %s', [token, number + 1])
    return _ONE_BY_ONE / (time.perf_counter() - begun)
