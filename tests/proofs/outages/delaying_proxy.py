"""Forwards TCP connections, and holds back what goes through for as many seconds as a file says.

python delaying_proxy.py PORT ADDRESS ITS_PORT FILE
"""

import asyncio
import sys
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, file: Path) -> None:
    """Copy one direction. Pieces keep their order, and each is as late as the file said when it came in."""
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    now = asyncio.get_running_loop().time

    async def read() -> None:
        data = b"begun"
        while data:
            data = await source.read(65536)
            await pieces.put((now() + float(file.read_text() or 0), data))

    async def write() -> None:
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(max(0.0, due - now()))
            if not data:
                return
            sink.write(data)
            await sink.drain()

    reading = asyncio.create_task(read())
    try:
        await write()
    finally:
        reading.cancel()
        sink.close()


async def _serve(
    target: tuple[str, int], file: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        its_reader, its_writer = await asyncio.open_connection(*target)
    except OSError:
        writer.close()
        return
    with suppress(OSError):
        async with asyncio.TaskGroup() as both:
            both.create_task(_swallow(_pump(reader, its_writer, file)))
            both.create_task(_swallow(_pump(its_reader, writer, file)))


async def _swallow(pump: Coroutine[None, None, None]) -> None:
    with suppress(OSError):
        await pump


async def main(port: str, address: str, its_port: str, file: str) -> None:
    serve = partial(_serve, (address, int(its_port)), Path(file))
    server = await asyncio.start_server(serve, "127.0.0.1", int(port))
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
