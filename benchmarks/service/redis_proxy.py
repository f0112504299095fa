"""A TCP proxy in front of a Redis, in a thread of its own, that spoils what passes through it."""

import asyncio
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from kvstore_client.loop_thread import LoopThread

CHUNK_BYTES = 1 << 16
LOADING = b"-LOADING Redis is loading the dataset in memory\r\n"

Kind = Literal["swallow", "delay", "reset", "cut", "loading"]


@dataclass(frozen=True, slots=True)
class Spoiling:
    """What the proxy does to each connection; `delay_s` is for each piece of a reply."""

    kind: Kind
    delay_s: float = 0.0


class Commands:
    """Counts the whole commands of a connection, so that each can be answered."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> int:
        """How many commands ended with these bytes."""
        self._rest += data
        count = 0
        while (end := self._end()) is not None:
            self._rest = self._rest[end:]
            count += 1
        return count

    def _end(self) -> int | None:
        """Where the first command ends, if it is whole: `*2`, then `$3`, three bytes, and so on."""
        line = self._rest.find(b"\r\n")
        if line < 0:
            return None
        at = line + 2
        for _ in range(int(self._rest[1:line])):
            line = self._rest.find(b"\r\n", at)
            if line < 0:
                return None
            at = line + 2 + int(self._rest[at + 1 : line]) + 2
        return at if at <= len(self._rest) else None


class RedisProxy:
    """Listens on loopback and passes on to `target_port`, until it is told to spoil that.

    `fired` counts what was spoiled: pieces swallowed or delayed, connections reset or cut,
    commands refused.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._thread = LoopThread("redis-proxy")
        self._spoiling: Spoiling | None = None
        self._lock = threading.Lock()
        self._writers: set[asyncio.StreamWriter] = set()
        self.fired = 0
        self.port = 0

    def __enter__(self) -> Self:
        self._server = self._thread.run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.run(self._close())
        self._thread.stop()

    def spoil(self, spoiling: Spoiling) -> None:
        """From now on, on old connections as on new ones."""
        self._spoiling = spoiling

    def heal(self) -> None:
        """No more; the connections, from which bytes may be missing, are hung up."""
        self._spoiling = None
        self._thread.run(self._hang_up())

    def hang_up(self) -> None:
        """Ends all connections."""
        self._thread.run(self._hang_up())

    async def _close(self) -> None:
        self._server.close()
        await self._hang_up()

    async def _hang_up(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream, target = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, target}
        self._writers |= both
        pumps = [
            asyncio.create_task(self._asks(reader, target, writer)),
            asyncio.create_task(self._answers(upstream, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _asks(
        self,
        reader: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        back: asyncio.StreamWriter,
    ) -> None:
        commands = Commands()
        while data := await reader.read(CHUNK_BYTES):
            count = commands.feed(data)
            kind = self._spoiling.kind if self._spoiling else None
            if kind == "swallow":
                self._fire()
            elif kind == "reset":
                self._fire()
                _reset(back)
                return
            elif kind == "loading":
                self._fire(count)
                back.write(LOADING * count)
            else:
                target.write(data)
                await target.drain()

    async def _answers(self, upstream: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await upstream.read(CHUNK_BYTES):
            spoiling = self._spoiling
            kind = spoiling.kind if spoiling else None
            if spoiling is not None and kind == "delay":
                self._fire()
                await asyncio.sleep(spoiling.delay_s)
            if kind == "swallow":
                self._fire()
                continue
            if kind == "cut":
                self._fire()
                back.write(data[: len(data) // 2])
                await back.drain()
                back.close()
                await back.wait_closed()
                return
            back.write(data)
            await back.drain()

    def _fire(self, times: int = 1) -> None:
        with self._lock:
            self.fired += times


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST instead of FIN."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
