"""The sending end of a write: which bytes travel in which message."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.api.digest import block_digest
from kvstore.api.errors import KvstoreError
from kvstore.api.parts import Part, WriteParts
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.space import Space

MAX_PIECES = 4096
"""In one message, so that the headers of tiny blocks cannot outgrow it."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One run of a chain on its way to the node. The blocks stay the caller's."""

    space: Space
    keys: Sequence[bytes]
    blocks: Sequence[memoryview]
    digests: Sequence[bytes] | None
    """None: computed when a block's turn comes, so never for those that the node has."""

    def requests(self, wanted: Sequence[int]) -> Iterator[WriteParts]:
        """The messages that carry the wanted blocks, small ones together, large ones in parts.

        Each carries at most `space.piece_bytes` of block data.
        """
        parts: list[Part] = []
        room_bytes = self.space.piece_bytes
        for index in wanted:
            block = self.blocks[index]
            header: pb.BlockHeader | None = self._header(index)
            start = 0
            while start < len(block):
                if room_bytes == 0 or len(parts) == MAX_PIECES:
                    yield WriteParts(None, parts)
                    parts, room_bytes = [], self.space.piece_bytes
                data = block[start : start + room_bytes]
                parts.append(Part(index, header, data))
                header = None
                start += len(data)
                room_bytes -= len(data)
        if parts:
            yield WriteParts(None, parts)

    def _header(self, index: int) -> pb.BlockHeader:
        block = self.blocks[index]
        if self.digests is not None:
            digest = self.digests[index]
        else:
            digest = block_digest(self.space.space_id, self.keys[index], block)
        return pb.BlockHeader(bytes=len(block), digest=digest)


def check_indexes(indexes: Sequence[int], blocks: int, field: str) -> None:
    """Raises `KvstoreError` unless they ascend and lie within the run."""
    previous = -1
    for index in indexes:
        if not previous < index < blocks:
            raise KvstoreError(f"{field}: {index} after {previous} in a run of {blocks} blocks")
        previous = index
