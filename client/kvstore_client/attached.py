"""A connection to a node on the same host, over which both agree on who uses which slots."""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from typing import Self

import grpc

from kvstore.api.errors import KvstoreError, Unavailable, from_status
from kvstore.api.local import HELLO, WELCOME
from kvstore.api.messages import Messages
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.arena import MappedArena
from kvstore_client.budgets import Deadline
from kvstore_client.caller import Caller
from kvstore_client.losses import describe

_log = logging.getLogger("kvstore.client")

HELLO_S = 5.0
PROMPT_MS = 1
"""An answer that comes so soon is waited for in place, no longer than a slice of a copy takes."""
_STATUS = {status.value[0]: status for status in grpc.StatusCode}
Answer = asyncio.Future[pb.LocalReply | None]
"""What comes of a request; None: the connection has ended."""


class Attached:
    """The arena of a node, mapped, and calls about it. Its end gives everything back."""

    def __init__(self, arena: MappedArena, messages: Messages, slab_bytes: int = 0) -> None:
        self.arena = arena
        self.slab_bytes = slab_bytes
        """No slot lies across a multiple of it; 0: not known."""
        self._messages = messages
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, deque[Answer]] = {}
        """By number, in the order in which they come: that of the requests."""
        self._last = 0
        self._is_prompt = True
        """Whether the last answer that had to be waited for came within `PROMPT_MS`."""
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
        return cls(arena, Messages(connection), invitation.slab_bytes)

    @property
    def closed(self) -> bool:
        """True once the connection has ended."""
        return self._messages.closed

    def check(self) -> None:
        """Raises Unavailable if the connection has ended: the node takes its slots back then."""
        if self.closed:
            raise Unavailable("the node has hung up")

    def number(self) -> int:
        """A number for a new read or write."""
        self._last += 1
        return self._last

    async def call(self, request: pb.LocalRequest, deadline: Deadline) -> pb.LocalReply:
        """The reply to one request. Raises TimeoutError, and KvstoreError as the node says."""
        return await self.reply(self.ask(request, deadline), deadline)

    def ask(self, request: pb.LocalRequest, deadline: Deadline) -> Answer:
        """Sends a request, whose reply is waited for by `reply`, or not at all.

        Raises TimeoutError, and Unavailable.
        """
        request.budget_ms = max(1, round(deadline.left_s() * 1000))
        self._send(request)
        answer: Answer = self._loop.create_future()
        self._waiting.setdefault(request.number, deque()).append(answer)
        return answer

    async def reply(self, answer: Answer, deadline: Deadline) -> pb.LocalReply:
        """The reply to a request. Raises TimeoutError, and KvstoreError as the node says."""
        if not answer.done() and self._is_prompt:
            self._messages.wait(PROMPT_MS)
            self._is_prompt = answer.done()  # Else no other call waits in place for this node.
        if not answer.done():
            begun_s = self._loop.time()
            async with asyncio.timeout(deadline.left_s()):
                await answer
            self._is_prompt = self._loop.time() - begun_s < PROMPT_MS / 1000
        reply = answer.result()
        if reply is None:
            raise Unavailable("the node has hung up")
        if reply.status:
            status = _STATUS.get(reply.status, grpc.StatusCode.UNKNOWN)
            raise from_status(status, reply.details)
        return reply

    def done(self, number: int) -> None:
        """Gives back what a read or write holds. From now on none of it may be touched."""
        self._waiting.pop(number, None)
        with contextlib.suppress(Unavailable):
            self._send(pb.LocalRequest(number=number, done=pb.LocalDone()))

    async def close(self) -> None:
        """Hangs up: the node takes back what this client held."""
        self._messages.close()
        await asyncio.gather(self._listening, return_exceptions=True)

    def _send(self, request: pb.LocalRequest) -> None:
        self.check()
        self._messages.say(request.SerializeToString())

    async def _listen(self) -> None:
        try:
            await self._messages.listen(self._hear)
        except Exception as error:  # noqa: BLE001  However it ends, it has ended.
            _log.info("the node's shared memory is gone: %s", describe(error))
        finally:
            for answers in self._waiting.values():
                for answer in answers:
                    _settle(answer, None)

    def _hear(self, message: bytes) -> None:
        reply = pb.LocalReply.FromString(message)
        answers = self._waiting.get(reply.number)
        if answers is None:
            return  # Nobody waits for it any more.
        _settle(answers.popleft(), reply)
        if not answers:
            del self._waiting[reply.number]


def _settle(answer: Answer, reply: pb.LocalReply | None) -> None:
    if not answer.done():
        answer.set_result(reply)


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
