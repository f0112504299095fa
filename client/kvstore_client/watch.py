"""Events of a node, as a client follows them."""

import asyncio
from typing import Self

import grpc

from kvstore.api.errors import from_status
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.caller import Caller

Event = pb.SegmentSealed | pb.Draining
WatchCall = grpc.aio.UnaryStreamCall[pb.WatchRequest, pb.WatchReply]


class Watch:
    """An iterator over a node's events. It ends when the client is closed or the node ends it.

    A node that vanishes ends it with `Unavailable`. A wait that is cancelled ends it for good.
    """

    def __init__(self, call: WatchCall, caller: Caller) -> None:
        self._call = call
        self._caller = caller

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            while isinstance(reply := await self._call.read(), pb.WatchReply):
                if reply.HasField("segment_sealed"):
                    return reply.segment_sealed
                if reply.HasField("draining"):
                    return reply.draining
        except grpc.aio.AioRpcError as error:
            raise from_status(error.code(), error.details() or "no details") from error
        except asyncio.CancelledError:
            # Closing the channel cancels its calls, which is no cancellation of the caller.
            if not self._caller.closed:
                raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Ends the events. Idempotent."""
        self._call.cancel()
