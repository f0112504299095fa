"""The two calls that move blocks, over a connection of the bulk path: for a thread, they block.

Bytes go straight from and to the caller's buffers.
"""

from collections.abc import Callable, Sequence

from kvstore.api.asking import Nonsense, hear, receive_windows
from kvstore.api.bulk import BulkSocket, Parcel
from kvstore.api.errors import KvstoreError
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.arrivals import Arrivals
from kvstore_client.pieces import Outgoing, check_indexes


def fetch(
    wire: BulkSocket,
    request: pb.BulkRequest,
    arrivals: Arrivals,
    here: Callable[[int, Loaded], None],
) -> int:
    """Receives the blocks of a read into their buffers; how many came damaged.

    As `receive_windows` in all else.
    """
    space_id = request.read.request.space_id
    parcels = [
        Parcel(space_id, key, buffer)
        for key, buffer in zip(arrivals.keys, arrivals.buffers, strict=True)
    ]
    return len(receive_windows(wire, request, parcels, here).damaged)


def place(wire: BulkSocket, request: pb.BulkRequest, run: Outgoing, held: list[bool]) -> int:
    """Offers a run, sends what the node wants of it; how many of its blocks the node holds then.

    `held` is brought up to date at the offer and at the end, so that it is right also when this
    raises, as `fetch` does.
    """
    wire.send_message(request.SerializeToString())
    wanted = hear(wire, "offer").offer.wanted
    _take_held(held, sorted(set(range(len(held))) - set(_checked(wanted, held, "offer.wanted"))))
    wire.send_blocks(
        Parcel(
            run.space.space_id, run.keys[index], run.blocks[index],
            run.digests[index] if run.digests is not None else b"",
        )
        for index in wanted
    )  # fmt: skip
    _take_held(held, _checked(hear(wire, "done").done.held, held, "done.held"))
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
