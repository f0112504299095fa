"""The two calls that move blocks, over a connection of the bulk path: for a thread, they block.

Bytes go straight from and to the caller's buffers.
"""

from collections.abc import Callable, Sequence

import grpc
from google.protobuf.message import DecodeError

from kvstore.api.bulk import BulkSocket, Hangup, Parcel
from kvstore.api.errors import KvstoreError, from_status
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.arrivals import Arrivals
from kvstore_client.pieces import Outgoing, check_indexes

_STATUS = {status.value[0]: status for status in grpc.StatusCode}


class Nonsense(Exception):
    """When the node said on a connection what no honest node says there."""


def fetch(
    wire: BulkSocket,
    request: pb.BulkRequest,
    arrivals: Arrivals,
    here: Callable[[int, Loaded], None],
) -> int:
    """Receives the blocks of a read into their buffers; how many came damaged.

    `here` hears of each that is complete and good, also when this raises in the end: Hangup or
    Nonsense where the connection is of no further use, and KvstoreError as the node refuses, after
    which it is.
    """
    wire.send_message(request.SerializeToString())
    space_id, keys = request.read.request.space_id, arrivals.keys
    index, is_last, damaged = 0, False, 0
    while not is_last:
        window = _hear(wire, "window").window
        places = range(index, index + len(window.blocks))
        if places.stop > len(keys):
            raise Nonsense(f"window: {places.stop} blocks for {len(keys)} keys")
        coming = [
            (place, block.tier) for place, block in zip(places, window.blocks, strict=True)
            if block.here
        ]  # fmt: skip
        parcels = [Parcel(space_id, keys[place], arrivals.buffers[place]) for place, _ in coming]
        for (place, tier), digest in zip(coming, wire.receive_blocks(parcels), strict=True):
            if digest:
                here(place, Loaded(tier, digest))
            else:
                damaged += 1
        index, is_last = places.stop, window.last
        if not places and not is_last:
            raise Nonsense("window: it is empty, and not the last one")
    return damaged


def place(wire: BulkSocket, request: pb.BulkRequest, run: Outgoing, held: list[bool]) -> int:
    """Offers a run, sends what the node wants of it; how many of its blocks the node holds then.

    `held` is brought up to date at the offer and at the end, so that it is right also when this
    raises, as `fetch` does.
    """
    wire.send_message(request.SerializeToString())
    wanted = _hear(wire, "offer").offer.wanted
    _take_held(held, sorted(set(range(len(held))) - set(_checked(wanted, held, "offer.wanted"))))
    wire.send_blocks(
        Parcel(
            run.space.space_id, run.keys[index], run.blocks[index],
            run.digests[index] if run.digests is not None else b"",
        )
        for index in wanted
    )  # fmt: skip
    _take_held(held, _checked(_hear(wire, "done").done.held, held, "done.held"))
    return sum(held)


def _checked(indexes: Sequence[int], held: list[bool], field: str) -> Sequence[int]:
    try:
        check_indexes(indexes, len(held), field)
    except KvstoreError as error:
        raise Nonsense(str(error)) from None
    return indexes


def _take_held(held: list[bool], indexes: Sequence[int]) -> None:
    held[:] = [False] * len(held)
    for index in indexes:
        held[index] = True


def _hear(wire: BulkSocket, field: str) -> pb.BulkReply:
    try:
        reply = pb.BulkReply.FromString(wire.receive_message())
    except DecodeError:
        raise Nonsense("a message that cannot be read") from None
    except KvstoreError as error:
        raise Nonsense(str(error)) from None
    if reply.status:
        status = _STATUS.get(reply.status, grpc.StatusCode.UNKNOWN)
        raise from_status(status, reply.details)
    if not reply.HasField(field):  # type: ignore[arg-type]
        raise Nonsense(f"the {field} that was due has not come")
    return reply


__all__ = ["Hangup", "Nonsense", "fetch", "place"]
