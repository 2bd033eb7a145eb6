"""Makes one connection to the first host of an address that answers in time.

libpq's own `connect_timeout` holds for each host anew and not for the resolver, and psycopg tells the failures of
several hosts twice. Here all hosts together have one time, in equal shares, and their failures are one line.
"""

import os
import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq.abc import PGconn

from catfeeder_cron.database.resolving import Resolver

T = TypeVar("T")

_Parameters = dict[str, str]


def connect(conninfo: str, within_seconds: float, resolver: Resolver, accept: Callable[[PGconn, float], T]) -> T:
    """Return what `accept` makes of the first connection that it takes; it is given the time that is left, in seconds.

    Hosts are tried in turn. Each, and each address of its name, has an equal share of the time that is left, so that
    the last one is reached even when the first ones say nothing. Raises psycopg.OperationalError with a line that names
    every failure; `accept` may raise it too, to refuse a connection, and closes it then.
    """
    until = time.monotonic() + within_seconds
    failures: list[str] = []
    hosts = _hosts({key: str(value) for key, value in conninfo_to_dict(conninfo).items() if value is not None})
    for left, host in _counted_down(hosts):
        host_until = _share(until, left)
        try:
            for left_of_host, parameters in _counted_down(_addresses(host, resolver, host_until)):
                attempt_until = _share(host_until, left_of_host)
                try:
                    pgconn = _start(parameters, attempt_until)
                    return accept(pgconn, attempt_until - time.monotonic())
                except psycopg.OperationalError as error:
                    failures.append(str(error).strip())
        except psycopg.OperationalError as error:
            failures.append(str(error).strip())
    if len(failures) > 1:  # the first line says who and why, and further ones give advice
        failures = [failure.partition("\n")[0] for failure in dict.fromkeys(failures)]
    raise psycopg.OperationalError("; ".join(failures))


def _hosts(parameters: _Parameters) -> list[_Parameters]:
    """Return the parameters for each host of the address by itself."""
    names = ("host", "hostaddr", "port")
    lists = {name: value.split(",") for name in names if (value := _parameter(parameters, name))}
    count = max(len(lists.get("host", [])), len(lists.get("hostaddr", [])), 1)
    if any(len(each) not in {1, count} for each in lists.values()) or count == 1:
        return [parameters]  # libpq says what is wrong with it
    hosts = [
        parameters | {name: each[index if len(each) > 1 else 0] for name, each in lists.items()}
        for index in range(count)
    ]
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(hosts)
    return hosts


def _addresses(parameters: _Parameters, resolver: Resolver, until: float) -> list[_Parameters]:
    """Return the parameters for each IP address of a host."""
    host = _parameter(parameters, "host")
    if not host or "," in host or host.startswith(("/", "@")) or _parameter(parameters, "hostaddr"):
        return [parameters]
    return [parameters | {"hostaddr": each} for each in resolver.addresses(host, until - time.monotonic())]


def _parameter(parameters: _Parameters, name: str) -> str:
    """Return a parameter of the address or of libpq's environment; what a service file says is left to libpq."""
    if parameters.get("service") or "PGSERVICE" in os.environ:
        return parameters.get(name, "")
    return parameters.get(name) or os.environ.get(f"PG{name.upper()}", "")


def _start(parameters: _Parameters, until: float) -> PGconn:
    """Connect by libpq's asynchronous functions. Raises psycopg.OperationalError."""
    pgconn = pq.PGconn.connect_start(make_conninfo("", **parameters).encode())
    try:
        while True:
            status = pgconn.connect_poll() if pgconn.status != pq.ConnStatus.BAD else pq.PollingStatus.FAILED
            if status == pq.PollingStatus.OK:
                pgconn.nonblocking = 1
                return pgconn
            if status == pq.PollingStatus.FAILED:
                raise psycopg.OperationalError(pgconn.error_message.decode("utf-8", "replace"))
            if not wait_for(pgconn.socket, status == pq.PollingStatus.READING, until):
                raise psycopg.errors.ConnectionTimeout(f"{_named(pgconn)} failed: timeout expired")
    except BaseException:
        pgconn.finish()
        raise


def wait_for(descriptor: int, to_read: bool, until: float) -> bool:
    """Wait until a descriptor can be read from or written to, at most until that time of the monotonic clock."""
    poll = select.poll()  # `select` takes no descriptor from 1024 on
    poll.register(descriptor, select.POLLIN if to_read else select.POLLOUT)
    return bool(poll.poll(max(0.0, 1000 * (until - time.monotonic()))))


def _named(pgconn: PGconn) -> str:
    host, address, port = ("", "", "")
    with suppress(psycopg.Error):
        host, address, port = (each.decode(errors="replace") for each in (pgconn.host, pgconn.hostaddr, pgconn.port))
    if host.startswith(("/", "@")):
        return f'connection to server on socket "{host}/.s.PGSQL.{port}"'
    also = f" ({address})" if address and address != host else ""
    return f'connection to server at "{host or address}"{also}, port {port}'


def _counted_down(things: list[_Parameters]) -> Iterator[tuple[int, _Parameters]]:
    return ((len(things) - index, each) for index, each in enumerate(things))


def _share(until: float, left: int) -> float:
    now = time.monotonic()
    return now + max(0.0, until - now) / left
