"""The port of the bulk path, at which clients move the bytes of blocks over plain connections.

A ticket from `Connect`, which gRPC has authenticated, opens one connection. It says who the
client is: all that he asks there is asked in that name.
"""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from google.protobuf.message import DecodeError

from kvstore.api.bulk import (
    GREETING,
    REFUSED,
    WELCOME,
    BulkSocket,
    prepare,
    unblocked,
)
from kvstore.api.errors import ConfigError, KvstoreError, ResourceExhausted
from kvstore.api.local import TICKET_BYTES
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.bulk_calls import BulkCalls
from kvstore.bulk_line import Line
from kvstore.calls import CallerGone, Calls
from kvstore.node import Node
from kvstore.runner import ThreadRunner
from kvstore.tickets import Ticket, Tickets

_log = logging.getLogger("kvstore.bulk")

TICKET_S = 30.0
GREETING_S = 5.0
REQUEST_S = 5.0
"""So long a request may take from its first byte to its last."""
MAX_GREETINGS = 64
"""At a time; others wait at the door."""
MAX_OF_ONE = 16
"""Connections that one gRPC connection may have tickets for at a time."""
BACKLOG = 128
CLOSE_S = 1.0


class BulkListener:
    """Serves bulk connections. `await start()`, later `await close()`."""

    def __init__(
        self,
        listen: str,
        advertised_host: str,
        node: Node,
        calls: Calls,
        *,
        max_connections: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.port = 0
        self.peer_calls: Callable[[Line, Ticket], BulkCalls] | None = None
        """What serves the connections of other nodes, where they are served."""
        self._listen = listen
        self._advertised_host = advertised_host
        self._node = node
        self._calls = calls
        self._max_connections = max_connections
        self._tls = tls
        self._tickets = Tickets(node.clock, TICKET_S)
        # As many threads as connections: nobody waits for another one's.
        self._runner = ThreadRunner(max_connections)
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._greeting = asyncio.Semaphore(MAX_GREETINGS)
        self._connections: Counter[str] = Counter()
        """Those that were let in, by gRPC connection."""

    async def start(self) -> None:
        """Listens. Raises ConfigError, naming the setting, if it cannot."""
        self._listening = _listen(self._listen)
        self.port = self._listening.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listening))

    def invite(self, authorization: str | None, peer: str) -> pb.ConnectReply:
        """Invites somebody whom gRPC has authenticated by this header."""
        return self._invite(authorization, peer, is_peer=False)

    def invite_peer(self, authorization: str | None, peer: str) -> pb.ConnectReply:
        """Invites another node, likewise."""
        return self._invite(authorization, peer, is_peer=True)

    def _invite(self, authorization: str | None, peer: str, *, is_peer: bool) -> pb.ConnectReply:
        if self._is_full(peer):
            raise ResourceExhausted("bulk.max_connections: too many clients are connected")
        return pb.ConnectReply(
            host=self._advertised_host,
            port=self.port,
            ticket=self._tickets.give(authorization, peer, is_peer=is_peer),
            ticket_ms=round(TICKET_S * 1000),
            tls=self._tls is not None,
        )

    async def close(self) -> None:
        """Hangs up on everybody."""
        if self._listening is None:
            return
        assert self._accepting is not None
        for task in (self._accepting, *self._serving):
            task.cancel()
        await asyncio.gather(self._accepting, *self._serving, return_exceptions=True)
        self._listening.close()
        await self._runner.close(CLOSE_S)

    def _is_full(self, peer: str) -> bool:
        return (
            self._connections.total() >= self._max_connections
            or self._connections[peer] >= MAX_OF_ONE
        )

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._greeting.acquire()
            try:
                connection, _ = await loop.sock_accept(listening)
            except BaseException as error:
                self._greeting.release()
                if not isinstance(error, OSError):
                    raise
                # No descriptors left, say; those that wait keep waiting.
                _log.warning("bulk.listen: %s: %s", self._listen, error)
                await self._node.clock.sleep(1.0)
                continue
            serving = asyncio.create_task(self._serve(connection))
            self._serving.add(serving)
            serving.add_done_callback(self._serving.discard)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            try:
                async with asyncio.timeout(GREETING_S):
                    connection, ticket = await self._greet(connection)
            finally:
                self._greeting.release()
        except (OSError, TimeoutError):
            connection.close()
            return
        except BaseException:
            connection.close()
            raise
        if ticket is None or self._is_full(ticket.peer):
            with suppress(OSError):
                connection.send(REFUSED)
            connection.close()
            return
        wire = BulkSocket(connection)
        line = Line(wire, self._runner)
        self._connections[ticket.peer] += 1
        try:
            await line.run(lambda: wire.send_bytes(WELCOME))
            await _converse(line, self._calls_of(line, ticket))
        except CallerGone as error:
            _log.debug("a bulk connection has ended: %s", error)
        except (KvstoreError, DecodeError, TimeoutError) as error:
            _log.warning("a client of the bulk path was cut off: %s", error)
        finally:
            await line.close()
            self._connections[ticket.peer] -= 1
            if not self._connections[ticket.peer]:
                del self._connections[ticket.peer]

    def _calls_of(self, line: Line, ticket: Ticket) -> BulkCalls:
        if ticket.is_peer:
            assert self.peer_calls is not None, "nobody else gives such tickets"
            return self.peer_calls(line, ticket)
        return BulkCalls(self._node, self._calls, line, ticket)

    async def _greet(self, connection: socket.socket) -> tuple[socket.socket, Ticket | None]:
        """Lets the bearer of a ticket in; no ticket for anybody else."""
        prepare(connection)
        if self._tls is not None:
            connection = self._tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        try:
            if isinstance(connection, ssl.SSLSocket):
                await unblocked(connection, connection.do_handshake)
            shown = b""
            while len(shown) < len(GREETING) + TICKET_BYTES:
                left = len(GREETING) + TICKET_BYTES - len(shown)
                more = await unblocked(connection, partial(connection.recv, left))
                shown += more
                if not more or not shown.startswith(GREETING[: len(shown)]):
                    return connection, None
        except BaseException:
            connection.close()
            raise
        return connection, self._tickets.take(shown[len(GREETING) :])


async def _converse(line: Line, calls: BulkCalls) -> None:
    """Serves one request after the other until the client hangs up, which raises CallerGone."""
    while True:
        await line.wire.spoken_to()
        async with asyncio.timeout(REQUEST_S):
            packed = await line.run(line.wire.receive_message)
        await calls.serve(pb.BulkRequest.FromString(packed))


def _listen(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listening = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"bulk.listen: {listen}: {error.strerror}") from None
    listening.setblocking(False)
    return listening
