"""Connect to checked addresses only.

A name is looked up once for each request, its addresses are checked, and the connection is made to a checked address.
There is no second look-up, which could lead to another address (DNS rebinding).
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, Iterator

import httpx

from catfeeder_cron.actions.webhook.allowed import Address, literal
from catfeeder_cron.errors import HopelessAction

Resolve = Callable[[str, int], Awaitable[list[str]]]

# An address of these networks holds an IPv4 address in its last 32 bits: NAT64 (RFC 6052, RFC 8215), and the old
# "compatible" ones.
_HOLDING_IPV4 = tuple(ipaddress.IPv6Network(each) for each in ("64:ff9b::/96", "64:ff9b:1::/96", "::/96"))
_MOST_TRIED = 4


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name in the system's order of preference. Raises httpx.ConnectError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(f"the name can't be looked up: {type(error).__name__}") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class CheckedTransport(httpx.AsyncBaseTransport):
    """Sends each request over a new connection to a checked address.

    `listed` are the addresses that a URL may name although they are not public.
    """

    def __init__(self, listed: Collection[Address], resolve: Resolve = resolve) -> None:
        self._listed = listed
        self._resolve = resolve
        # No connection is kept: httpx would find it by its address alone and use it for another name than the one that
        # its certificate was checked for.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Try the checked addresses in their order until one can be connected to."""
        error: httpx.TransportError = httpx.ConnectError("no address")
        for address in (await self._addresses(request.url))[:_MOST_TRIED]:
            # The Host header was set from the name, and the certificate is checked against it.
            to_address = httpx.Request(
                request.method,
                request.url.copy_with(host=str(address)),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": request.url.raw_host.decode("ascii")},
            )
            try:
                return await self._transport.handle_async_request(to_address)
            except (httpx.ConnectError, httpx.ConnectTimeout) as refused:
                error = refused
        raise error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def _addresses(self, url: httpx.URL) -> list[Address]:
        own = literal(url.host)
        if own is not None:
            addresses = [own] if is_public(own) or own in self._listed else []
        else:
            port = url.port or (443 if url.scheme == "https" else 80)
            # Only addresses that are refused have a scope ("fe80::1%eth0").
            found = [ipaddress.ip_address(each.partition("%")[0]) for each in await self._resolve(url.host, port)]
            addresses = [address for address in found if is_public(address)]
        if not addresses:
            raise HopelessAction("payload.url: leads to an address that is not public and not listed literally")
        return addresses


def is_public(address: Address) -> bool:
    """Return whether an address, and every IPv4 address inside it, belongs to the public Internet."""
    return all(each.is_global and not each.is_multicast for each in (address, *_inside(address)))


def _inside(address: Address) -> Iterator[ipaddress.IPv4Address]:
    if isinstance(address, ipaddress.IPv6Address):
        for held in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())):
            if held is not None:
                yield held
        if any(address in network for network in _HOLDING_IPV4):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
