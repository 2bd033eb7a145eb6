"""The kind "webhook": send an HTTP request to a URL that the operator allows.

Rows may be written on behalf of users. So the URL must be on the operator's list (`allowed`), its host's address must
be a public one (`connection`), redirects are not followed, and only the beginning of an answer is read (`answer`).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from catfeeder_cron.actions.action import Action, Handler, Perform
from catfeeder_cron.actions.webhook import answer
from catfeeder_cron.actions.webhook.allowed import AllowList
from catfeeder_cron.actions.webhook.connection import CheckedTransport, Resolve, resolve
from catfeeder_cron.config import ActionsSettings
from catfeeder_cron.errors import HopelessAction, PostponedAction
from catfeeder_cron.imports import load
from catfeeder_cron.version import __version__

TIMEOUT_SECONDS = 20
"""For a whole request, from the look-up of the name to the last byte that is read of the answer."""

_METHODS = ("POST", "GET", "PUT", "PATCH", "DELETE", "HEAD")

# A payload may not set the headers that frame a request.
_NOT_FOR_PAYLOADS = {"host", "content-length", "transfer-encoding", "connection", "te", "trailer", "upgrade", "expect"}


@asynccontextmanager
async def open_webhooks(
    settings: ActionsSettings, resolve: Resolve = resolve, timeout_seconds: float = TIMEOUT_SECONDS
) -> AsyncIterator[Perform]:
    """Yield the function that sends an action's request."""
    # httpx imports these when it makes a transport, and httpcore when it makes a connection.
    load("httpcore", "certifi", "anyio._backends._asyncio")
    allowed = AllowList(settings.webhook.allowed)
    # trust_env=False: a proxy or a .netrc from the environment would get around the checks.
    async with httpx.AsyncClient(
        transport=CheckedTransport(allowed.addresses, resolve), timeout=timeout_seconds, trust_env=False
    ) as client:

        async def perform(action: Action) -> str:
            request = _request(client, action, allowed)
            try:
                async with asyncio.timeout(timeout_seconds):
                    return await answer.receive(client, request)
            except TimeoutError:
                raise PostponedAction(f"{_origin(request.url)}: no answer within {timeout_seconds:g} s") from None
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
                raise HopelessAction(f"a request that can't be sent: {type(error).__name__}") from None
            except httpx.TransportError as error:
                # Only its class: its text can hold parts of the request.
                raise PostponedAction(f"{_origin(request.url)}: {type(error).__name__}") from None

        yield perform


def _request(client: httpx.AsyncClient, action: Action, allowed: AllowList) -> httpx.Request:
    """Build an action's request. Raises HopelessAction if the payload is not valid."""
    payload = action.payload
    if not isinstance(payload, Mapping):
        raise HopelessAction('payload: expected an object with "url"')
    url = allowed.require(payload.get("url"))
    method = payload.get("method") or "POST"
    if not isinstance(method, str) or method.upper() not in _METHODS:
        raise HopelessAction(f"payload.method: expected one of {', '.join(_METHODS)}")
    body = payload.get("body")
    content = None if body is None else json.dumps(body).encode()
    headers = {
        "user-agent": f"catfeeder-cron/{__version__}",
        "accept": "*/*",
        "accept-encoding": "identity",
        "idempotency-key": action.key,
        **({} if content is None else {"content-type": "application/json"}),
        **_headers(payload.get("headers")),
    }
    return client.build_request(method.upper(), url, headers=headers, content=content)


def _headers(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(value, str | int | float) for value in given.values()):
        raise HopelessAction("payload.headers: expected an object of texts")
    headers = {str(name).lower(): str(value) for name, value in given.items()}
    if refused := sorted(_NOT_FOR_PAYLOADS & headers.keys()):
        raise HopelessAction(f"payload.headers: {', '.join(refused)} can't be set")
    if not all(f"{name}{value}".isascii() and f"{name}{value}".isprintable() for name, value in headers.items()):
        raise HopelessAction("payload.headers: expected printable ASCII")
    return headers


def _origin(url: httpx.URL) -> str:
    """Return a URL without its path and query, which may be secret."""
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"


HANDLER = Handler("webhook", open_webhooks)
