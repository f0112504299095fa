"""A relay in front of a server, in a thread, that holds its bytes back at a chosen place."""

import asyncio
import contextlib
import ssl
import threading
from types import TracebackType
from typing import Literal, Self

from kvstore_client.loop_thread import LoopThread

CHUNK_BYTES = 1 << 16

Way = Literal["asks", "answers"]


class Valve:
    """Listens on loopback and passes on to `target_port`; with `tls`, its clients speak TLS to it.

    After `hold(way, n)` so many more bytes pass that way, of all connections together. Then
    `is_held` is set, and what comes stays where it is until `release` or `cut`.
    """

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self._target_port = target_port
        self._tls = tls
        self._thread = LoopThread("valve")
        self._left: dict[Way, int | None] = {"asks": None, "answers": None}
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.is_held = threading.Event()
        self.has_hung_up = threading.Event()
        """Set when a client has ended its connection."""
        self.connections = 0
        """How many there were so far."""
        self.asked = bytearray()
        """All that passed on its way to the server."""

    def __enter__(self) -> Self:
        self._thread.run(self._open())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.run(self._close())
        self._thread.stop()

    def hold(self, way: Way, after_bytes: int) -> None:
        """Holds back what comes after so many more bytes."""
        self._thread.run(self._set({way: after_bytes}))

    def release(self) -> None:
        """Passes on what was held back, and whatever comes."""
        self._thread.run(self._set({"asks": None, "answers": None}))

    def cut(self) -> None:
        """Ends all connections behind the bytes that passed."""
        self._thread.run(self._cut())

    async def _open(self) -> None:
        self._changed = asyncio.Condition()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        await self._cut()

    async def _set(self, left: dict[Way, int | None]) -> None:
        async with self._changed:
            self.is_held.clear()
            self.has_hung_up.clear()
            self._left |= left
            self._changed.notify_all()

    async def _cut(self) -> None:
        for writer in list(self._writers):
            writer.close()
        await self._set({"asks": None, "answers": None})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, target = await asyncio.open_connection("127.0.0.1", self._target_port)
        both = {writer, target}
        self._writers |= both
        self.connections += 1
        pumps = [
            asyncio.create_task(self._pump("asks", reader, target)),
            asyncio.create_task(self._pump("answers", answers, writer)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        self._writers -= both
        for each in both:
            each.close()

    async def _pump(
        self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                while data:
                    part = data[: await self._room(way, len(data))]
                    data = data[len(part) :]
                    writer.write(part)
                    await writer.drain()
                    if way == "asks":
                        self.asked += part
        if way == "asks":
            self.has_hung_up.set()

    async def _room(self, way: Way, size: int) -> int:
        """How much of it may pass now; waits where nothing may."""
        async with self._changed:
            while (left := self._left[way]) == 0:
                self.is_held.set()
                await self._changed.wait()
            if left is None:
                return size
            self._left[way] = max(0, left - size)
            return min(size, left)
