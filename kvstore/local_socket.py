"""The unix socket at which clients on this host get the arena, and then read and write in it.

A ticket from `Attach`, which gRPC has authenticated, opens it once; beside that the kernel says
who the other process belongs to. The connection is the client's life: its end, however it comes,
gives back what the client held.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import struct
from pathlib import Path

from google.protobuf.message import DecodeError

from kvstore.api.errors import ConfigError, ResourceExhausted
from kvstore.api.local import HELLO, REFUSED, TICKET_BYTES, WELCOME
from kvstore.api.messages import Messages
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.attachment import Attachment, Room
from kvstore.calls import Calls
from kvstore.local_calls import LocalCalls
from kvstore.node import Node
from kvstore.tickets import Ticket, Tickets

_log = logging.getLogger("kvstore.local")

TICKET_S = 10.0
HELLO_S = 5.0
MAX_CLIENTS = 1024
BACKLOG = 128
PATIENCE_BYTES = 1 << 20
"""Who leaves more than this of what he is answered has nothing more heard."""
_PEER = struct.Struct("<iII")
"""Process, user and group of the other side, as the kernel tells them."""
LONGEST_PATH_BYTES = 107
"""What fits the address of a unix socket."""


class LocalSocket:
    """Hands the arena to clients of this host. `await start()`, later `await close()`."""

    def __init__(
        self, directory: Path, endpoint: str, node: Node, calls: Calls, room: Room
    ) -> None:
        # Short, and no other node's: ids are unique, and so is where one listens on its host.
        name = hashlib.sha256(f"{node.node_id} {endpoint}".encode()).hexdigest()[:16]
        self.path = directory / f"{name}.sock"
        self._node = node
        self._calls = calls
        self._room = room
        self._tickets = Tickets(node.clock, TICKET_S)
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens. Raises ConfigError, naming the setting, if it cannot."""
        self._listening = _listen(self.path)
        self._accepting = asyncio.create_task(self._accept(self._listening))

    def ticket(self, authorization: str | None) -> pb.AttachReply:
        """Invites somebody whom gRPC has authenticated by this header."""
        if len(self._serving) >= MAX_CLIENTS:
            raise ResourceExhausted(f"attach: {MAX_CLIENTS} clients are attached")
        return pb.AttachReply(
            socket_path=str(self.path),
            ticket=self._tickets.give(authorization, "attached"),
            ticket_ms=round(TICKET_S * 1000),
            slab_bytes=self._node.tiers.memory.largest_block_bytes,
        )

    async def close(self) -> None:
        """Hangs up on everybody. What they have mapped stays theirs until they let go of it."""
        if self._listening is None:
            return
        assert self._accepting is not None
        for task in (self._accepting, *self._serving):
            task.cancel()
        await asyncio.gather(self._accepting, *self._serving, return_exceptions=True)
        self._listening.close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:  # No descriptors left, say; those that wait keep waiting.
                _log.warning("%s: %s", self.path, error)
                await self._node.clock.sleep(1.0)
                continue
            serving = asyncio.create_task(self._serve(connection))
            self._serving.add(serving)
            serving.add_done_callback(self._serving.discard)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                ticket = await self._hello(connection)
        except (OSError, TimeoutError):
            ticket = None
        except BaseException:
            connection.close()
            raise
        if ticket is None:
            connection.close()
            return
        messages = Messages(connection, PATIENCE_BYTES)
        attachment = Attachment(self._node.tiers, self._room)
        calls = LocalCalls(self._node, self._calls, attachment, ticket.authorization, messages)
        try:
            await messages.listen(calls.take)
        except (OSError, ValueError, DecodeError) as error:
            _log.warning("a client on this host was cut off: %s", error)
        finally:
            try:
                await calls.end()
            finally:
                attachment.end()

    async def _hello(self, connection: socket.socket) -> Ticket | None:
        """Lets the bearer of a ticket in; None for anybody else."""
        loop = asyncio.get_running_loop()
        shown = b""
        while len(shown) < TICKET_BYTES:
            more = await loop.sock_recv(connection, TICKET_BYTES - len(shown))
            if not more:
                return None
            shown += more
        ticket = self._tickets.take(shown)
        if ticket is None or not _is_ours(connection):
            await loop.sock_sendall(connection, HELLO.pack(REFUSED, 0))
            return None
        arena = self._node.tiers.memory.arena
        socket.send_fds(connection, [HELLO.pack(WELCOME, arena.capacity_bytes)], [arena.file])
        return ticket


def _is_ours(connection: socket.socket) -> bool:
    """Whether the other process may read the arena anyway: it is this user's, or root's."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, user, _ = _PEER.unpack(packed)
    return user in (0, os.geteuid())


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > LONGEST_PATH_BYTES:
        raise ConfigError(
            f"shared_memory.directory: {path} is too long for a socket, which has at most "
            f"{LONGEST_PATH_BYTES} bytes; choose a shorter one"
        )
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_taken(path):
            raise ConfigError(
                f"shared_memory.directory: another node listens at {path}; give one of them "
                "another cluster.node_id, or another directory"
            )
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"shared_memory.directory: {path}: {error.strerror}") from None
    except ConfigError:
        listening.close()
        raise
    return listening


def _is_taken(path: Path) -> bool:
    """Whether somebody answers there; what a killed node left behind is nobody's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
