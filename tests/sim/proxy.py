"""A way between a client and a node that breaks, stalls and withholds as a test says."""

import asyncio
from collections.abc import Callable


class Proxy:
    """Passes on what comes, in both directions, until it is told otherwise.

    `await start(port)`; `limit_bytes` of what the node sends pass each connection, then `then`
    is called and nothing more comes until `release`.
    """

    def __init__(self) -> None:
        self.port = 0
        self.limit_bytes: int | None = None
        self.up_limit_bytes: int | None = None
        self.stalled = asyncio.Event()
        """Set when a limit was met."""
        self.then: Callable[[], None] = lambda: None
        self.connections = 0
        self._released = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, port: int) -> None:
        """Listens, in front of a port of this host."""

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            self._writers |= {writer, far_writer}
            self._tasks |= {
                asyncio.create_task(self._pass(reader, far_writer, writer, up=True)),
                asyncio.create_task(self._pass(far_reader, writer, far_writer, up=False)),
            }

        self._server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def release(self) -> None:
        """Lets go of what was held up, and of all that comes."""
        self.limit_bytes = self.up_limit_bytes = None
        self._released.set()

    def cut(self) -> None:
        """Breaks every connection, as a firewall does that has forgotten them."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        """Hangs up."""
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            self._server.close()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamWriter,
        *,
        up: bool,
    ) -> None:
        passed = 0
        try:
            while data := await reader.read(1 << 16):
                limit = self.up_limit_bytes if up else self.limit_bytes
                if limit is not None and passed + len(data) > limit:
                    writer.write(data[: limit - passed])
                    data = data[limit - passed :]
                    self.stalled.set()
                    self.then()
                    await self._released.wait()
                writer.write(data)
                await writer.drain()
                passed += len(data)
            writer.write_eof()
        except OSError:  # Who sends to somebody that is gone shall hear of it.
            writer.transport.abort()
            back.transport.abort()
