"""A connection to a node on the same host, over which both agree on who uses which slots."""

import asyncio
import contextlib
import socket
from typing import Self

import grpc

from kvstore.api.errors import KvstoreError, Unavailable, from_status
from kvstore.api.local import HELLO, LENGTH, WELCOME
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import MESSAGE_BYTES
from kvstore_client.arena import MappedArena
from kvstore_client.budgets import Deadline
from kvstore_client.caller import Caller

HELLO_S = 5.0
_STATUS = {status.value[0]: status for status in grpc.StatusCode}


class Attached:
    """The arena of a node, mapped, and calls about it. Its end gives everything back."""

    def __init__(
        self, arena: MappedArena, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.arena = arena
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[pb.LocalReply]] = {}
        self._last = 0
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, caller: Caller, deadline: Deadline) -> Self | None:
        """Attaches to the node that a caller calls; None if it shares nothing with this process.

        Raises KvstoreError, OSError, or as `Caller.unary`, where something goes wrong.
        """
        invitation = await caller.unary(caller.stub.Attach, pb.AttachRequest(), deadline)
        if not invitation.socket_path:
            return None
        connection, arena = await asyncio.to_thread(
            _hello, invitation.socket_path, invitation.ticket
        )
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MESSAGE_BYTES)
        return cls(arena, reader, writer)

    @property
    def closed(self) -> bool:
        """True once the connection has ended."""
        return self._listening.done()

    def check(self) -> None:
        """Raises Unavailable if the connection has ended: the node takes its slots back then."""
        if self.closed or self._writer.is_closing():
            raise Unavailable("the node has hung up")

    def number(self) -> int:
        """A number for a new read or write."""
        self._last += 1
        return self._last

    async def call(self, request: pb.LocalRequest, deadline: Deadline) -> pb.LocalReply:
        """The reply to one request. Raises TimeoutError, and KvstoreError as the node says."""
        left_s = deadline.left_s()
        request.budget_ms = max(1, round(left_s * 1000))
        answer: asyncio.Future[pb.LocalReply] = asyncio.get_running_loop().create_future()
        self._waiting[request.number] = answer
        try:
            self._send(request)
            async with asyncio.timeout(left_s):
                reply = await answer
        finally:
            self._waiting.pop(request.number, None)
        if reply.status:
            status = _STATUS.get(reply.status, grpc.StatusCode.UNKNOWN)
            raise from_status(status, reply.details)
        return reply

    def done(self, number: int) -> None:
        """Gives back what a read or write holds. From now on none of it may be touched."""
        with contextlib.suppress(Unavailable):
            self._send(pb.LocalRequest(number=number, done=pb.LocalDone()))

    async def close(self) -> None:
        """Hangs up: the node takes back what this client held."""
        self._writer.close()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    def _send(self, request: pb.LocalRequest) -> None:
        self.check()
        packed = request.SerializeToString()
        self._writer.write(LENGTH.pack(len(packed)) + packed)

    async def _listen(self) -> None:
        try:
            while True:
                [length] = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                if length > MESSAGE_BYTES:
                    raise KvstoreError(f"a message of {length} bytes from the node")
                reply = pb.LocalReply.FromString(await self._reader.readexactly(length))
                answer = self._waiting.get(reply.number)
                if answer is not None and not answer.done():
                    answer.set_result(reply)
        except Exception:  # noqa: BLE001  However it ends, it has ended.
            self._writer.close()
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(Unavailable("the node has hung up"))


def _hello(path: str, ticket: bytes) -> tuple[socket.socket, MappedArena]:
    """Shows the ticket and maps what comes back. Raises OSError or KvstoreError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(HELLO_S)
        connection.connect(path)
        connection.sendall(ticket)
        answer, files, _, _ = socket.recv_fds(connection, HELLO.size, 1)
        if len(answer) != HELLO.size or not files:
            raise KvstoreError(f"{path}: the node does not let this process in")
        verdict, size_bytes = HELLO.unpack(answer)
        arena = MappedArena(files[0], size_bytes)
        if verdict != WELCOME:
            raise KvstoreError(f"{path}: the node does not let this process in")
        connection.setblocking(False)
        return connection, arena
    except BaseException:
        connection.close()
        raise
