"""The process's OAuth client. It imports the HTTP libraries when there is a request to send: 0.2 s and 20 MB."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from catfeeder_cron.config.settings import OAuthSettings
from catfeeder_cron.imports import load

if TYPE_CHECKING:
    import ssl

    import httpx

    from catfeeder_cron.oauth.session import Session


class OAuthClient:
    """Opens sessions that ask providers for new access tokens. A given `transport` replaces the real one."""

    def __init__(self, settings: OAuthSettings, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
        self.settings = settings
        self._transport = transport
        self._certificates: ssl.SSLContext | None = None

    @asynccontextmanager
    async def session(self, request_timeout: timedelta) -> AsyncIterator["Session"]:
        """Yield a session for the running event loop, and close its connections at the end.

        A request as a whole may take `request_timeout`.
        """
        load("catfeeder_cron.oauth.session")
        from catfeeder_cron.oauth.session import Session, real_transport

        timeout = request_timeout.total_seconds()
        if self._transport is not None:
            yield Session(self._transport, timeout)
            return
        async with real_transport(self._ssl_context()) as transport:
            yield Session(transport, timeout)

    def _ssl_context(self) -> "ssl.SSLContext":
        load("httpx", "certifi")  # httpx imports certifi when it reads the certificates
        import httpx

        if self._certificates is None:  # reading them takes 20 ms
            self._certificates = httpx.create_ssl_context()
        return self._certificates
