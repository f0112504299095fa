"""The half of the client that stands beside an engine's hot path: its methods raise."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from kvstore.api.channel import open_channel
from kvstore.api.clock import Clock, SystemClock
from kvstore.api.errors import KvstoreError
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tls import Trust
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import check_space_id, pack_keys
from kvstore_client.arguments import check_keys
from kvstore_client.budgets import Budgets, Deadline
from kvstore_client.bulk import Bulk
from kvstore_client.caller import Caller
from kvstore_client.neighbour import Neighbour
from kvstore_client.space import Space
from kvstore_client.watch import Watch

BULK_SETTLE_S = 1.0
_HEALTH_METHOD = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"
"""A HealthCheckResponse whose status is SERVING: two bytes are not worth a dependency."""


class ControlClient:
    """Opens and clears spaces, and asks a node what it is. Its methods raise `KvstoreError`.

    With `shared_memory` blocks of a node on this host, where it allows that, are copied straight
    from and to its memory, from the first `open_space` on. With `bulk` those of other nodes come
    over connections of their own, where they can be had, and otherwise over the channel.

    `endpoint` is host:port or unix:/path. With `tls_ca_file` all goes over TLS, to a node that
    shows a certificate for its host that one of those in the file has signed. A `channel` that is
    handed in stays the caller's, who closes it; its own credentials do not cover the bulk path.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        token: str | None = None,
        budgets: Budgets | None = None,
        clock: Clock | None = None,
        channel: grpc.aio.Channel | None = None,
        shared_memory: bool = True,
        bulk: bool = True,
        tls_ca_file: Path | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.budgets = budgets or Budgets()
        self.clock = clock or SystemClock()
        self._owned = channel is None
        trust = Trust.read(tls_ca_file) if tls_ca_file is not None else None
        self._caller = Caller(
            channel or open_channel(endpoint, trust), token, self.clock, is_plaintext=trust is None
        )
        self._neighbour = Neighbour(self._caller, self.clock, wanted=shared_memory)
        tls = trust.context if trust is not None else None
        self._bulk = Bulk(self._caller, self.clock, endpoint, wanted=bulk, tls=tls)

    def __repr__(self) -> str:
        state = "closed" if self._caller.closed else "open"
        return f"{type(self).__name__}({self.endpoint!r}, {state})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def counters(self) -> Counter[str]:
        """What was lost without an exception, by the names of `losses.MEANINGS`."""
        return self._caller.losses.counters

    @property
    def closed(self) -> bool:
        """True from the moment that `close` was called."""
        return self._caller.closed

    @property
    def bulk_connections(self) -> int:
        """How many connections of the bulk path there are now."""
        return self._bulk.connections

    @property
    def connected(self) -> bool:
        """False while the node cannot be reached, and after `close`. Asks nobody."""
        if self._caller.closed:
            return False
        state = self._caller.channel.get_state()
        return state not in (
            grpc.ChannelConnectivity.TRANSIENT_FAILURE,
            grpc.ChannelConnectivity.SHUTDOWN,
        )

    async def open_space(self, descriptor: SpaceDescriptor) -> Space:
        """The space to name in other calls; the node knows it from now on. Idempotent."""
        deadline = self._deadline(None, self.budgets.open_s)
        space = Space.of(descriptor)
        opened = await self._caller.strictly(lambda: self._caller.open(space, deadline), deadline)
        await self._neighbour.settle(max(deadline.rest_s(), 0.0))
        if self._neighbour.attached is None:
            # Where a firewall swallows what is sent to it, the stream need not wait for that.
            await self._bulk.settle(min(BULK_SETTLE_S, max(deadline.rest_s(), 0.0)))
        return opened

    async def locate(
        self,
        space: Space,
        keys: Sequence[bytes],
        *,
        scope: str = "",
        budget_s: float | None = None,
    ) -> list[str | None]:
        """The tier in which each block lies, or None. Leases, promotes and renews nothing."""
        check_keys(keys)
        deadline = self._deadline(budget_s, self.budgets.control_s)
        request = pb.LocateRequest(space_id=space.space_id, scope=scope, keys=pack_keys(keys))

        async def attempt() -> list[str | None]:
            reply = await self._caller.unary(self._caller.stub.Locate, request, deadline)
            if len(reply.tiers) != len(keys):
                raise KvstoreError(f"tiers: {len(reply.tiers)} answered for {len(keys)} keys")
            return [tier or None for tier in reply.tiers]

        return await self._caller.strictly(attempt, deadline, [space])

    async def discard(self, space: Space, keys: Sequence[bytes], *, scope: str = "") -> int:
        """Forgets single blocks in every tier; the number of copies that there were."""
        check_keys(keys)
        deadline = self._deadline(None, self.budgets.control_s)
        request = pb.DiscardRequest(space_id=space.space_id, scope=scope, keys=pack_keys(keys))
        reply = await self._caller.strictly(
            lambda: self._caller.unary(self._caller.stub.Discard, request, deadline),
            deadline,
            [space],
        )
        return reply.discarded_blocks

    async def clear_space(self, space: Space | bytes, scope: str = "") -> int:
        """Forgets all that the tenant stored in one space and scope, in every tier.

        Answers the number of copies that there were. A bare space id serves as well, but then a
        node that does not know it answers `UnknownSpace`.
        """
        spaces = [space] if isinstance(space, Space) else []
        space_id = space.space_id if isinstance(space, Space) else check_space_id(space)
        deadline = self._deadline(None, self.budgets.control_s)
        request = pb.ClearSpaceRequest(space_id=space_id, scope=scope)
        reply = await self._caller.strictly(
            lambda: self._caller.unary(self._caller.stub.ClearSpace, request, deadline),
            deadline,
            spaces,
        )
        return reply.cleared_blocks

    async def status(self) -> pb.StatusReply:
        """What the node is, how full its tiers are and what it has counted."""
        deadline = self._deadline(None, self.budgets.control_s)
        request = pb.StatusRequest()
        return await self._caller.strictly(
            lambda: self._caller.unary(self._caller.stub.Status, request, deadline), deadline
        )

    async def watch(self) -> Watch:
        """The node's events from now on: none that happens after this returned is missed.

        The stream itself has no deadline. End it with `aclose`, or by closing the client.
        """
        deadline = self._deadline(None, self.budgets.control_s)

        async def attempt() -> Watch:
            call = self._caller.stub.Watch(pb.WatchRequest(), metadata=self._caller.metadata)
            try:
                # The node sends its headers when it has begun to listen for us.
                await call.initial_metadata()
                deadline.left_s()
            except BaseException:
                call.cancel()
                raise
            return Watch(call, self._caller)

        return await self._caller.strictly(attempt, deadline)

    async def health(self) -> bool:
        """True if the node says that it serves. Never raises: silence is not health."""
        deadline = self._deadline(None, self.budgets.control_s)
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._caller.channel.unary_unary(
            _HEALTH_METHOD
        )
        try:
            reply = await self._caller.strictly(
                lambda: self._caller.unary(check, b"", deadline), deadline
            )
        except KvstoreError:
            return False
        return reply == _SERVING

    async def close(self) -> None:
        """Ends the calls under way and lets go of the connection. Idempotent."""
        if self._caller.closed:
            return
        self._caller.closed = True
        await self._neighbour.close()
        await self._bulk.close()
        if self._owned:
            await self._caller.channel.close()

    def _deadline(self, budget_s: float | None, usual_s: float) -> Deadline:
        return Deadline(self.clock, usual_s if budget_s is None else budget_s)
