"""The two calls that move blocks. What to make of their failures is left to the client."""

import asyncio
from collections.abc import Iterator
from typing import Literal

import grpc

from kvstore.api.errors import KvstoreError
from kvstore.api.parts import WriteParts
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.arrivals import Arrivals
from kvstore_client.budgets import Deadline
from kvstore_client.caller import Caller
from kvstore_client.pieces import Outgoing, check_indexes

WriteCall = grpc.aio.StreamStreamCall[WriteParts, pb.WriteReply]


async def receive(
    caller: Caller,
    request: pb.ReadRequest,
    arrivals: Arrivals,
    deadline: Deadline,
    *,
    prefix_only: bool,
) -> None:
    """Reads until every block is settled, or until the first hole if only a prefix is of use.

    Whatever arrived stays in `arrivals`, also when this raises. Nothing is written afterwards.
    """
    arrivals.restart()
    call = caller.read(request, timeout=deadline.left_s(), metadata=caller.metadata)
    try:
        async for parts in call:
            for part in parts:
                arrivals.add(part)
                if prefix_only and arrivals.broken:
                    return
            if arrivals.complete:
                caller.let_end(call)
                return
            deadline.left_s()
    finally:
        if not arrivals.complete:
            call.cancel()


async def send(
    caller: Caller, begin: pb.WriteBegin, run: Outgoing, held: list[bool], deadline: Deadline
) -> None:
    """Offers a run, sends what the node wants of it, and learns what the node holds then.

    `held` is brought up to date at the offer and at the end, so that it is right also when this
    raises in between.
    """
    held[:] = [False] * len(held)
    call = caller.write(timeout=deadline.left_s(), metadata=caller.metadata)
    try:
        await call.write(WriteParts(begin, ()))
        wanted = (await _reply(call, "offer")).offer.wanted
        check_indexes(wanted, len(held), "offer.wanted")
        held[:] = [True] * len(held)
        for index in wanted:
            held[index] = False
        await _write_all(call, run.requests(wanted), deadline)
        done = (await _reply(call, "done")).done.held
        check_indexes(done, len(held), "done.held")
        held[:] = [False] * len(held)
        for index in done:
            held[index] = True
        caller.let_end(call)
    except BaseException:
        call.cancel()
        raise


async def _write_all(call: WriteCall, requests: Iterator[WriteParts], deadline: Deadline) -> None:
    try:
        for request in requests:
            deadline.left_s()
            await call.write(request)
        await call.done_writing()
    except (asyncio.InvalidStateError, grpc.aio.BaseError):
        # The node ended the call before all was sent; its status or last reply says why. (While a
        # message is on its way gRPC hides that status behind INTERNAL: counted as failed.)
        return


async def _reply(call: WriteCall, field: Literal["offer", "done"]) -> pb.WriteReply:
    reply = await call.read()
    if not isinstance(reply, pb.WriteReply):
        raise KvstoreError(f"the node ended the write before its {field}")
    if not reply.HasField(field):
        raise KvstoreError(f"the node answered a write without the {field} that was due")
    return reply
