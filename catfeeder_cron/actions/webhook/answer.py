"""What an answer to a webhook means: done, try again (and when), or hopeless."""

from datetime import UTC, datetime

import httpx

from catfeeder_cron.errors import HopelessAction, PostponedAction
from catfeeder_cron.logs import one_line
from catfeeder_cron.times import retry_after_seconds

_MOST_READ = 4096
_MOST_TOLD = 200
_TRY_AGAIN = {408, 429}
# Headers that hold nothing secret.
_TELLABLE = {"accept", "accept-encoding", "content-type", "content-length", "host", "user-agent"}
_LONGEST_WAIT_SECONDS = 86_400


async def receive(client: httpx.AsyncClient, request: httpx.Request) -> str:
    """Send a request and return what to tell of its 2xx answer. Raises HopelessAction or PostponedAction for others."""
    response = await client.send(request, stream=True, follow_redirects=False)
    try:
        if response.is_success:
            return f"HTTP {response.status_code}"
        told = _told(response.status_code, await _beginning(response), request)
    finally:
        await response.aclose()
    if response.status_code in _TRY_AGAIN or response.status_code >= 500:
        asked = retry_after_seconds(response.headers.get("retry-after"), datetime.now(UTC), _LONGEST_WAIT_SECONDS)
        raise PostponedAction(told, asked or 0)
    if response.is_redirect:
        told += " (redirects are not followed)"
    raise HopelessAction(told)


async def _beginning(response: httpx.Response) -> bytes:
    """Read the first bytes of the body as they came, undecoded; the rest is never fetched."""
    read = b""
    try:
        async for chunk in response.aiter_raw():
            read += chunk
            if len(read) >= _MOST_READ:
                break
    except httpx.TransportError:
        pass  # the status says enough
    return read[:_MOST_READ]


def _told(status: int, body: bytes, request: httpx.Request) -> str:
    """The status and the beginning of the body, without anything that was sent: some servers answer with an echo."""
    text = body.decode("utf-8", "replace")
    sent = [value for name, value in request.headers.items() if name not in _TELLABLE]
    path, _, query = request.url.raw_path.decode("ascii").partition("?")
    for secret in (*sent, *(value.rpartition(" ")[2] for value in sent), path, query):
        text = text.replace(secret, "[redacted]") if len(secret) > 3 else text
    return f"HTTP {status}: {one_line(text)[:_MOST_TOLD]}".rstrip(": ")
