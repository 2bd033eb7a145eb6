"""Send a webhook's request and decide by the answer: it is done, must be tried again (and when), or is hopeless."""

from datetime import UTC, datetime

import httpx

from catfeeder_cron.errors import HopelessAction, PostponedAction
from catfeeder_cron.logs import one_line
from catfeeder_cron.times import retry_after_seconds, sender_now

_MOST_READ = 4096
_MOST_TOLD = 200
_TRY_AGAIN = {408, 429}
# Headers that hold nothing secret.
_TELLABLE = {"accept", "accept-encoding", "content-type", "content-length", "host", "user-agent"}
_LONGEST_WAIT_SECONDS = 86_400


async def receive(client: httpx.AsyncClient, request: httpx.Request) -> str:
    """Send a request and return the status of its 2xx answer. Raises HopelessAction or PostponedAction for others."""
    response = await client.send(request, stream=True, follow_redirects=False)
    try:
        if response.is_success:
            return f"HTTP {response.status_code}"
        described = _described(response.status_code, await _beginning(response), request)
    finally:
        await response.aclose()
    if response.status_code in _TRY_AGAIN or response.status_code >= 500:
        now = sender_now(response.headers.get("date"), datetime.now(UTC))
        asked = retry_after_seconds(response.headers.get("retry-after"), now, _LONGEST_WAIT_SECONDS)
        raise PostponedAction(described, asked or 0)
    if response.is_redirect:
        described += " (redirects are not followed)"
    raise HopelessAction(described)


async def _beginning(response: httpx.Response) -> bytes:
    """Read the first bytes of the body, without decoding a content coding; the rest is never fetched."""
    read = b""
    try:
        async for chunk in response.aiter_raw():
            read += chunk
            if len(read) >= _MOST_READ:
                break
    except httpx.TransportError:
        pass  # the status is enough
    return read[:_MOST_READ]


def _described(status: int, body: bytes, request: httpx.Request) -> str:
    """Return the status and the beginning of the body, without any part of the request: some servers echo it."""
    text = body.decode("utf-8", "replace")
    sent = [value for name, value in request.headers.items() if name not in _TELLABLE]
    path, _, query = request.url.raw_path.decode("ascii").partition("?")
    for secret in (*sent, *(value.rpartition(" ")[2] for value in sent), path, query):
        text = text.replace(secret, "[redacted]") if len(secret) > 3 else text
    return f"HTTP {status}: {one_line(text)[:_MOST_TOLD]}".rstrip(": ")
