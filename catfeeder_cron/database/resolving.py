"""Resolves host names without waiting longer than asked: libpq and psycopg wait for a resolver that hangs."""

import socket
import threading
from concurrent.futures import Future
from ipaddress import ip_address

import psycopg


class Resolver:
    """Looks a name up anew for each connection, in a thread that ends with the look-up. Safe to use from any thread.

    While a look-up hangs, others of the same name wait for that one, so that threads don't pile up.
    """

    def __init__(self) -> None:
        self._under_way: dict[str, Future[list[str]]] = {}
        # Held while a look-up is joined, begun or over, never while waiting for one: of two threads that ask for one
        # name together, one begins the look-up.
        self._lock = threading.Lock()

    def addresses(self, host: str, within_seconds: float) -> list[str]:
        """Return the IP addresses of a host, the best first. Raises psycopg.OperationalError."""
        if _is_address(host):
            return [host]
        try:
            return self._look_up(host).result(max(0.0, within_seconds))
        except TimeoutError:
            why = f"no answer within {round(within_seconds, 1):g} s (timeout)"
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
        raise psycopg.OperationalError(f'could not translate host name "{host}" to address: {why}')

    def _look_up(self, host: str) -> Future[list[str]]:
        with self._lock:
            found = self._under_way.get(host)
            if found is None:
                self._under_way[host] = found = Future()
                try:
                    threading.Thread(target=self._work, args=(host, found), name=f"resolve-{host}", daemon=True).start()
                except RuntimeError as error:  # no further thread: the next connection tries again
                    del self._under_way[host]
                    raise psycopg.OperationalError(f'could not look up host name "{host}": {error}') from None
            return found

    def _work(self, host: str, found: Future[list[str]]) -> None:
        try:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            found.set_result(list(dict.fromkeys(str(info[4][0]) for info in infos)))
        except Exception as error:  # noqa: BLE001 - told to who asked
            found.set_exception(error)
        finally:
            with self._lock:
                del self._under_way[host]


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
