"""Send refresh requests over httpx, many at a time, and read their answers, with bounded time and size.

The transport is httpx-aiohttp's: httpx's own pool scans all its connections on every request and becomes slow beyond
some 30 requests at a time (with 128: 110 requests a second, against 1,740). It is used without httpx's AsyncClient,
which keeps cookies: a cookie of one user must not be sent with another user's token.
"""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import lru_cache

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from catfeeder_cron.oauth.answers import Ambiguous, Answer, Refused, Transient
from catfeeder_cron.oauth.presets import ClientAuth
from catfeeder_cron.oauth.provider import Provider
from catfeeder_cron.oauth.reading import MOST_BYTES, read
from catfeeder_cron.oauth.request import TokenRequest, build

_CONNECT_SECONDS = 10.0

# Shorter than any server's, so that a server seldom closes a connection at the moment in which it is used again.
_KEEPALIVE_SECONDS = 4.0

# When a process was frozen, its deadline has passed but the answer may be in its socket: this is the time to read it.
_GRACE_SECONDS = 1.0


class Session:
    """Sends requests in one event loop. `timeout_seconds` is for a whole request."""

    def __init__(self, transport: httpx.AsyncBaseTransport, timeout_seconds: float) -> None:
        self._transport = transport
        self._timeout = timeout_seconds

    async def refresh(self, provider: Provider, refresh_token: str, client_auth: ClientAuth) -> Answer:
        """Send one request and return its answer. A failure of the network or the provider is an answer, too."""
        request = build(provider, refresh_token, client_auth)
        exchange = asyncio.ensure_future(self._exchange(request))
        try:
            for seconds in (self._timeout, _GRACE_SECONDS):
                if (await asyncio.wait((exchange,), timeout=seconds))[0]:
                    break
            else:
                return Ambiguous(f"no answer within {self._timeout:g} s")
            return self._read(exchange, request.secrets)
        finally:
            if not exchange.done():
                exchange.cancel()
                await asyncio.wait((exchange,), timeout=_GRACE_SECONDS)

    def _read(self, exchange: "asyncio.Future[tuple[int, httpx.Headers, bytes]]", secrets: tuple[str, ...]) -> Answer:
        try:
            status, headers, body = exchange.result()
        except httpx.InvalidURL:
            return Refused("its token_grabber_base_url is no URL")
        except (httpx.HTTPError, aiohttp.ClientError, OSError, ValueError) as error:
            if _was_never_sent(error):
                return Transient(f"no connection: {_reason(error)}")
            return Ambiguous(f"the connection broke: {_reason(error)}")
        return read(status, headers, body, secrets, datetime.now(UTC))

    async def _exchange(self, request: TokenRequest) -> tuple[int, httpx.Headers, bytes]:
        connect = min(_CONNECT_SECONDS, self._timeout / 2)
        # httpx-aiohttp uses `pool` as the limit for name look-up and connecting together.
        timeouts = {"connect": connect, "pool": connect, "read": None, "write": None}
        response = await self._transport.handle_async_request(
            httpx.Request(
                "POST",
                _parsed(request.url),
                headers=request.headers,
                content=request.content,
                extensions={"timeout": timeouts},
            )
        )
        body = bytearray()
        try:
            assert isinstance(response.stream, httpx.AsyncByteStream)
            async for chunk in response.stream:
                body += chunk
                if len(body) > MOST_BYTES:
                    break
        finally:
            await response.aclose()
        return response.status_code, response.headers, bytes(body)


@lru_cache(maxsize=256)
def _parsed(url: str) -> httpx.URL:
    """Return the parsed URL from a cache: parsing takes a quarter of the time in which a request is built."""
    return httpx.URL(url)


@asynccontextmanager
async def real_transport(certificates: ssl.SSLContext) -> AsyncIterator[httpx.AsyncBaseTransport]:
    """Yield a transport for the running event loop, without a limit of connections: callers limit their requests."""
    connector = aiohttp.TCPConnector(limit=0, ssl=certificates, keepalive_timeout=_KEEPALIVE_SECONDS)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield AiohttpTransport(verify=certificates, client=session)


def _reason(error: Exception) -> str:
    """Return a reason in our own words: the error's text may quote parts of the request."""
    match error.__cause__ or error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as wrong):
            return f"its certificate was not accepted ({wrong.verify_message})"
        case aiohttp.ClientConnectorSSLError():
            return "it speaks no TLS that we do"
        case aiohttp.ClientConnectorDNSError():
            return "its name could not be looked up"
        case aiohttp.ClientConnectorError(os_error=OSError(errno=int(number))):
            return os.strerror(number).lower()
        case aiohttp.ServerDisconnectedError():
            return "it hung up without an answer"
        case aiohttp.ConnectionTimeoutError():
            return "it did not answer in time"
        case other:
            return type(other).__name__


def _was_never_sent(error: Exception) -> bool:
    """Return whether the request can't have reached the provider.

    The cause decides, because httpx-aiohttp raises ConnectTimeout also for a connection that broke after the sending.
    """
    cause = error.__cause__
    if isinstance(cause, aiohttp.ClientConnectionError):
        return isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol)
