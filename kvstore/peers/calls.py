"""The calls that come over the bulk connection of a peer: reads, of what this node has itself."""

from typing import Any

from kvstore.api.errors import InvalidArgument, PermissionDenied
from kvstore.api.space import MAX_BLOCK_BYTES
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.bulk_calls import BulkCalls, Sending, leading
from kvstore.bulk_line import Line
from kvstore.calls import Call, Calls
from kvstore.filling import WINDOW_BYTES, WINDOWS
from kvstore.local_calls import LocalContext
from kvstore.metrics import Metrics
from kvstore.names import NAME_BYTES
from kvstore.node import Node
from kvstore.peers.credentials import Credentials
from kvstore.peers.found import Finder, Sought, windows
from kvstore.peers.tier import MAX_NAMES
from kvstore.requests import KEY_COST_BYTES, check_count
from kvstore.tickets import Ticket


class PeerCalls(BulkCalls):
    """Runs the calls of one connection, one after the other. A tenant's are none of them."""

    def __init__(
        self,
        node: Node,
        calls: Calls,
        line: Line,
        ticket: Ticket,
        credentials: Credentials,
        finder: Finder,
    ) -> None:
        super().__init__(node, calls, line, ticket)
        self._credentials = credentials
        self._finder = finder
        self._metrics: Metrics = node.metrics

    async def _run(self, request: pb.BulkRequest) -> None:
        ticket = self._ticket
        context: Any = LocalContext(ticket.authorization, ticket.peer, request.budget_ms)
        authenticate = self._credentials.authenticate
        async with self._calls.call("peer_read", context, authenticate=authenticate) as call:
            if request.WhichOneof("call") != "peer_read":
                raise PermissionDenied("call: a peer reads by names, and nothing else")
            await self._read_named(call, _sought(request.peer_read))

    async def _read_named(self, call: Call, sought: list[Sought]) -> None:
        largest = max(each.size for each in sought)
        held = min(sum(each.size for each in sought), WINDOWS * max(largest, WINDOW_BYTES))
        async with self._calls.admitted(call, held + KEY_COST_BYTES * len(sought)):
            sending = Sending(self._line)
            try:
                parts = list(windows(sought, WINDOW_BYTES))
                for number, part in enumerate(parts, start=1):
                    await sending.settle(WINDOWS - 1)
                    found = await self._finder.find(part, call.left_s())
                    self._has_answered = True
                    # Where there was no time to look, nothing is said.
                    blocks = found.blocks if found.in_time else leading(found.blocks)
                    sending.send(found, blocks, number == len(parts) or not found.in_time)
                    lent = sum(block.view is not None for block in blocks)
                    self._metrics.peer_lent_blocks.inc(lent)
                    if not found.in_time:
                        break
                await sending.settle(0)
            finally:
                await sending.close()


def _sought(asked: pb.PeerRead) -> list[Sought]:
    """What a read asks for. Raises InvalidArgument, naming the field."""
    count, rest = divmod(len(asked.names), NAME_BYTES)
    if rest:
        raise InvalidArgument(f"names: {NAME_BYTES} bytes each, got {len(asked.names)}")
    check_count("names", count, 1, MAX_NAMES)
    check_count("block_bytes", len(asked.block_bytes), count, count)
    for size in asked.block_bytes:
        check_count("block_bytes", size, 1, MAX_BLOCK_BYTES)
    starts = range(0, len(asked.names), NAME_BYTES)
    names = [asked.names[start : start + NAME_BYTES] for start in starts]
    return [Sought(*each) for each in zip(names, asked.block_bytes, strict=True)]
