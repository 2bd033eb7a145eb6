"""Reads the lines that a callable prints, and passes them on to the call that is under way."""

import asyncio

from catfeeder_cron.children.messages import Request

_READ = 65_536
_LONGEST_LINE = 8192
# The callable's output comes in another pipe than the verdict. It is waited for this long, unless it comes at once.
_OUTPUT_SECONDS = 2.0


class PrintedOutput:
    """Read a process's standard error until its end. All methods are for the event loop that it was created in."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._request: Request | None = None
        self._marked = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    def begin(self, request: Request) -> None:
        """Pass on the lines to this call from now on."""
        self._request = request
        self._marked.clear()

    async def wait_for_mark(self) -> None:
        """Wait until all lines that the call printed are passed on, for two seconds at most.

        The worker writes the call's mark behind the last line.
        """
        marked = asyncio.ensure_future(self._marked.wait())
        await asyncio.wait([marked, self._reading], timeout=_OUTPUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        marked.cancel()

    async def finish(self) -> None:
        """Wait until the process has closed its end of the pipe, for two seconds at most, and stop reading."""
        await asyncio.wait([self._reading], timeout=_OUTPUT_SECONDS)
        self._reading.cancel()

    async def _read(self) -> None:
        """Pass on the output line by line; a line without end in pieces."""
        begun = b""
        while read := await self._stream.read(_READ):
            *lines, begun = (begun + read).split(b"\n")
            if len(begun) > _LONGEST_LINE:
                lines, begun = [*lines, begun], b""
            self._pass_on(lines)
        self._pass_on([begun])

    def _pass_on(self, lines: list[bytes]) -> None:
        request = self._request
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            if request is not None and text == request.mark:
                self._marked.set()
            elif request is not None and text:
                request.tell_line(text)
