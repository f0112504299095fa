"""One other node of the cluster, and this node's connections to it."""

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import grpc

from kvstore.api.asking import Nonsense, Received, enter, host_of, receive_windows
from kvstore.api.bulk import BulkSocket, Hangup, Parcel, undisturbed
from kvstore.api.channel import open_channel
from kvstore.api.clock import Clock
from kvstore.api.errors import KvstoreError, ResourceExhausted, Unavailable, from_status
from kvstore.api.tier import Loaded
from kvstore.api.tls import Trust
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1 import kvstore_pb2_grpc as pb_grpc
from kvstore.directory import Neighbour
from kvstore.peers.credentials import MOST_NONCE_BYTES, Credentials
from kvstore.runner import Runner

Reply = TypeVar("Reply")

_log = logging.getLogger("kvstore.peers")

ALONE_S = 5.0
"""So long a node that failed is not asked. What is dead leaves the directory meanwhile."""
GRPC_ERRORS = (grpc.RpcError, grpc.aio.BaseError)
IDLE_WIRES = 4
"""Connections to one node that are kept open."""


class Fetched(NamedTuple):
    """What became of some blocks that a node was asked for: by their places in the question."""

    loaded: dict[int, Loaded]
    damaged: Sequence[int] = ()
    """Came, and was not what was written."""
    answered: int = 0
    """Of so many, the first ones, the node says that they are gone if they have not come."""
    cause: str = "late"
    """Why the others have not: it is "late", "unreachable", "busy", or has "refused" to answer."""


class Peer:
    """Asks one node for blocks, over connections that it keeps. After a failure it rests a while.

    `room` bounds the connections in use to all nodes; `runner` has a thread for each of them.
    """

    def __init__(
        self,
        node: Neighbour,
        credentials: Credentials,
        trust: Trust | None,
        clock: Clock,
        runner: Runner,
        room: asyncio.Semaphore,
    ) -> None:
        self.node = node
        self._credentials = credentials
        self._trust = trust
        self._clock = clock
        self._runner = runner
        self._room = room
        self._channel: grpc.aio.Channel | None = None
        """Once something was asked."""
        self._idle: list[BulkSocket] = []
        self._in_use: set[BulkSocket] = set()
        self._rests_until_s = 0.0
        self._closed = False

    @property
    def rests(self) -> bool:
        """Whether it failed a moment ago, and is not to be asked."""
        return self._clock.monotonic_s() < self._rests_until_s

    async def fetch(
        self, names: Sequence[bytes], parcels: Sequence[Parcel], timeout_s: float
    ) -> Fetched:
        """Fills the parcels with the blocks of these names.

        Nothing writes to them any more when this has returned, or was cancelled.
        """
        loaded: dict[int, Loaded] = {}
        now_s = asyncio.get_running_loop().time
        asked_s, end_s = math.inf, now_s() + timeout_s
        try:
            async with asyncio.timeout(timeout_s), self._room:
                asked_s = now_s()
                received = await self._read(names, parcels, loaded, end_s - asked_s)
        except (Hangup, Nonsense, KvstoreError, OSError, ValueError, *GRPC_ERRORS) as error:
            had_time = now_s() - asked_s >= timeout_s / 2
            return Fetched(loaded, cause=self._failed(error, had_time and not loaded))
        return Fetched(loaded, received.damaged, received.answered)

    async def forget(self, names: Sequence[bytes], tag: bytes, timeout_s: float) -> int:
        """Has the node forget blocks; how many copies there were. Raises KvstoreError."""
        request = pb.PeerForgetRequest(names=b"".join(names), tag=tag)
        try:
            call = self._stub().Forget(request, timeout=timeout_s, metadata=self._metadata())
            reply = await self._called(call)
        except grpc.aio.AioRpcError as error:
            raise from_status(error.code(), error.details() or "") from None
        except (Hangup, *GRPC_ERRORS) as error:
            raise Unavailable(str(error)) from None
        return reply.forgotten_blocks

    async def close(self) -> None:
        """Hangs up, also on the calls under way."""
        self._closed = True
        for wire in self._in_use:
            wire.shut()  # Their threads find out, and close them.
        for wire in self._idle:
            wire.close()
        self._idle.clear()
        if self._channel is not None:
            await self._channel.close()

    async def _read(
        self,
        names: Sequence[bytes],
        parcels: Sequence[Parcel],
        loaded: dict[int, Loaded],
        timeout_s: float,
    ) -> Received:
        asked = pb.PeerRead(
            names=b"".join(names), block_bytes=[len(parcel.view) for parcel in parcels]
        )
        request = pb.BulkRequest(budget_ms=max(1, round(timeout_s * 1000)), peer_read=asked)
        wire = await self._take()
        in_order = False
        try:
            work = partial(receive_windows, wire, request, parcels, loaded.__setitem__)
            job = asyncio.ensure_future(self._runner.run(work))
            received = await undisturbed(job, wire.shut)
            in_order = True
        except KvstoreError:
            in_order = True
            raise
        finally:
            self._give_back(wire, in_order)
        return received

    async def _take(self) -> BulkSocket:
        while self._idle:
            wire = self._idle.pop()
            if wire.is_quiet:
                self._in_use.add(wire)
                return wire
            wire.close()  # The node has hung up.
        wire = await self._connect()
        self._in_use.add(wire)
        return wire

    async def _connect(self) -> BulkSocket:
        nonce = secrets.token_bytes(MOST_NONCE_BYTES)
        request = pb.PeerConnectRequest(nonce=nonce)
        reply = await self._called(self._stub().Connect(request, metadata=self._metadata()))
        invitation = reply.invitation
        if not self._credentials.proves(reply.proof, nonce, invitation.ticket):
            raise KvstoreError("it does not have the cluster's secret")
        tls = self._trust.context if self._trust is not None else None
        wire = await enter(invitation, host_of(self.node.endpoint), tls)
        if wire is None:
            raise KvstoreError("it has no bulk path")
        return wire

    def _stub(self) -> "pb_grpc.PeerAsyncStub":
        if self._closed:
            raise Hangup("the node has left the directory")
        if self._channel is None:
            self._channel = open_channel(self.node.endpoint, self._trust)
        return pb_grpc.PeerStub(self._channel)

    async def _called(self, call: Awaitable[Reply]) -> Reply:
        """What a call answers. Raises Hangup where this end was closed meanwhile."""
        task = asyncio.current_task()
        assert task is not None
        try:
            return await call
        except asyncio.CancelledError:
            if self._closed and not task.cancelling():  # gRPC ended it, nobody cancelled us.
                raise Hangup("the node has left the directory") from None
            raise

    def _give_back(self, wire: BulkSocket, in_order: bool) -> None:
        self._in_use.discard(wire)
        if in_order and not self._closed and not wire.is_shut and len(self._idle) < IDLE_WIRES:
            self._idle.append(wire)
        else:
            wire.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        shown = self._credentials.shown_to(self.node.node_id, self.node.endpoint)
        return (("authorization", shown),)

    def _failed(self, error: Exception, is_slow: bool) -> str:
        """Notes a failure; its name. Who is late and not slow was only asked for too much."""
        if isinstance(error, grpc.aio.AioRpcError):
            code = error.code()
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                error = TimeoutError()
            elif code is not grpc.StatusCode.UNAVAILABLE:
                error = from_status(code, error.details() or "")
        if isinstance(error, ResourceExhausted):
            return "busy"
        if isinstance(error, TimeoutError) and not is_slow:
            return "late"
        self._rests_until_s = self._clock.monotonic_s() + ALONE_S
        _log.info("node %s is left alone for a while: %s", self.node.node_id, error or "late")
        if isinstance(error, TimeoutError):
            return "late"
        return "refused" if isinstance(error, KvstoreError) else "unreachable"
