"""Decide whether the operator allows a URL: compare its parsed origin, and its path by whole segments."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import httpx

from catfeeder_cron.errors import HopelessAction

Address = IPv4Address | IPv6Address

_DEFAULT_PORTS = {"http": 80, "https": 443}

# Servers and clients read these in different ways: a segment of dots, in any spelling, and an encoded separator.
_AMBIGUOUS = re.compile(r"(?:^|[/\\])(?:\.|%2e){1,2}(?:[/\\;?#]|$)|\\|%2f|%5c|%00", re.IGNORECASE)


@dataclass(frozen=True)
class _Prefix:
    origin: tuple[str, str, int | None]
    path: str

    def covers(self, url: httpx.URL) -> bool:
        path = _path(url)
        whole = self.path if self.path.endswith("/") else f"{self.path}/"
        return _origin(url) == self.origin and (path == self.path or path.startswith(whole))


class AllowList:
    """The URL prefixes of `allowed` in [actions.webhook]."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        urls = [httpx.URL(prefix) for prefix in prefixes]
        self._prefixes = [_Prefix(_origin(url), _path(url)) for url in urls]
        self.addresses = frozenset(address for url in urls if (address := literal(url.host)))
        """The IP addresses that the list names itself; they need not be public."""

    def require(self, given: Any) -> httpx.URL:
        """Return the parsed URL. Raises HopelessAction if it is not allowed; the message does not quote it.

        The request must use this result: another parser could read the text in another way.
        """
        if not isinstance(given, str):
            raise HopelessAction("payload.url: expected a text")
        try:
            url = httpx.URL(given)
        except httpx.InvalidURL:
            raise HopelessAction("payload.url: this is no URL") from None
        if url.userinfo or "@" in given.split("?")[0].split("#")[0]:
            raise HopelessAction("payload.url: a user in a URL is not allowed")
        if _AMBIGUOUS.search(given.partition("?")[0]):
            raise HopelessAction("payload.url: dot segments and encoded separators are not allowed")
        if not any(prefix.covers(url) for prefix in self._prefixes):
            raise HopelessAction("payload.url: not allowed; the operator lists what is in [actions.webhook] allowed")
        return url


def literal(host: str) -> Address | None:
    """Return a URL's host as an IP address, or None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.raw_host.decode("ascii"), url.port or _DEFAULT_PORTS.get(url.scheme)


def _path(url: httpx.URL) -> str:
    return url.raw_path.partition(b"?")[0].decode("ascii")
