"""How calls reach a node: with a deadline, a token, and one attempt to open what it forgot."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from kvstore.api.clock import Clock
from kvstore.api.errors import Unavailable, UnknownSpace, from_status
from kvstore.api.parts import Part, WriteParts, pack_request, parse_reply
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1 import kvstore_pb2_grpc as pb_grpc
from kvstore.api.wire import descriptor_to_wire
from kvstore_client.budgets import Deadline
from kvstore_client.losses import Losses, describe
from kvstore_client.space import Space

Answer = TypeVar("Answer")
Request = TypeVar("Request")
Reply = TypeVar("Reply")
Attempt = Callable[[], Awaitable[Answer]]


class Caller:
    """Runs attempts against one node, either strictly (errors are raised) or quietly (counted).

    An attempt that fails because the node does not know a space is repeated once, after the
    spaces were opened again, within the same deadline.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        token: str | None,
        clock: Clock,
        *,
        is_plaintext: bool = False,
    ) -> None:
        self.channel = channel
        self._is_plaintext = is_plaintext
        self.stub = pb_grpc.KVStoreStub(channel)
        # These two carry blocks, in messages of our own making.
        service = pb.DESCRIPTOR.services_by_name["KVStore"].full_name
        self.read: grpc.aio.UnaryStreamMultiCallable[pb.ReadRequest, list[Part]] = (
            channel.unary_stream(f"/{service}/Read", pb.ReadRequest.SerializeToString, parse_reply)
        )
        self.write: grpc.aio.StreamStreamMultiCallable[WriteParts, pb.WriteReply] = (
            channel.stream_stream(f"/{service}/Write", pack_request, pb.WriteReply.FromString)
        )
        self.metadata = _metadata(token)
        self.losses = Losses(clock, logging.getLogger("kvstore.client"))
        self.closed = False
        self._ending: set[grpc.aio.Call] = set()

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Reply],
        request: Request,
        deadline: Deadline,
    ) -> Reply:
        """The reply to one request. Raises `grpc.aio.AioRpcError` or TimeoutError."""
        return await method(request, timeout=deadline.left_s(), metadata=self.metadata)

    def let_end(self, call: grpc.aio.Call) -> None:
        """Leaves a call alone that has all it wanted: its status is on its way.

        Given up, or collected, it would count at the node as one that its caller broke off.
        """
        self._ending.add(call)
        call.add_done_callback(self._ending.discard)

    async def open(self, space: Space, deadline: Deadline) -> Space:
        """The space as the node opened it. Raises like `unary`, and `KvstoreError`."""
        request = pb.OpenSpaceRequest(descriptor=descriptor_to_wire(space.descriptor))
        reply = await self.unary(self.stub.OpenSpace, request, deadline)
        return Space.from_wire(space.descriptor, reply)

    async def strictly(
        self, attempt: Attempt[Answer], deadline: Deadline, spaces: Sequence[Space] = ()
    ) -> Answer:
        """What the attempt answers. Raises `KvstoreError` for everything that goes wrong."""
        try:
            return await self._within(attempt, deadline, spaces)
        except grpc.aio.AioRpcError as error:
            details = error.details() or "no details"
            if self._is_plaintext and "Socket closed" in details:
                details += "; so a node with TLS answers who names no tls_ca_file"
            raise from_status(error.code(), details) from error
        except (grpc.aio.BaseError, TimeoutError, OSError) as error:
            raise Unavailable(describe(error)) from error

    async def quietly(
        self,
        operation: str,
        attempt: Attempt[Answer],
        deadline: Deadline,
        spaces: Sequence[Space] = (),
    ) -> Answer | None:
        """What the attempt answers, or None after counting why not. Raises nothing."""
        try:
            return await self._within(attempt, deadline, spaces)
        except Exception as error:  # noqa: BLE001
            # The edge to the engine: whatever goes wrong in here must not stop it.
            self.losses.count_error(operation, error)
            return None

    async def _within(
        self, attempt: Attempt[Answer], deadline: Deadline, spaces: Sequence[Space]
    ) -> Answer:
        if self.closed:
            raise Unavailable("the client is closed")
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        try:
            # gRPC ends a call at its deadline; this also ends what is not a call.
            async with asyncio.timeout(deadline.left_s()):
                return await self._with_spaces(attempt, deadline, spaces)
        except asyncio.CancelledError:
            if task.cancelling():
                raise
            # gRPC cancels the calls of a channel that is closed; nobody cancelled the caller.
            raise Unavailable("the client was closed") from None
        finally:
            # gRPC swallows a cancellation that comes while it sets up a stream: the call then ends
            # in some other way, and whoever cancelled it would wait for its caller for ever.
            if task.cancelling() > cancelled_before:
                raise asyncio.CancelledError

    async def _with_spaces(
        self, attempt: Attempt[Answer], deadline: Deadline, spaces: Sequence[Space]
    ) -> Answer:
        try:
            return await attempt()
        except (grpc.aio.AioRpcError, UnknownSpace) as error:
            known = isinstance(error, grpc.aio.AioRpcError) and (
                error.code() != grpc.StatusCode.FAILED_PRECONDITION
            )
            if known or not spaces:
                raise
            reason = describe(error)
        await self._open_all(spaces, deadline)
        self.losses.count("space_reopened", reason, len(spaces))
        return await attempt()

    async def _open_all(self, spaces: Sequence[Space], deadline: Deadline) -> None:
        openings = (self.open(space, deadline) for space in spaces)
        for outcome in await asyncio.gather(*openings, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    if token is None:
        return ()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("token: must be printable ASCII without spaces or line ends")
    return (("authorization", f"Bearer {token}"),)
