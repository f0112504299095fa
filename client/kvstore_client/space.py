"""A space as the client holds it."""

from dataclasses import dataclass
from typing import Self

from kvstore.api.errors import KvstoreError
from kvstore.api.space import SpaceDescriptor
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import MESSAGE_BYTES, PIECE_BYTES

_SPARE_BYTES = 512 << 10
"""What a message may hold beside block data: the headers of its pieces."""


@dataclass(frozen=True, slots=True)
class Space:
    """A space that calls can name. It stays usable when the node restarts and forgets it."""

    descriptor: SpaceDescriptor
    space_id: bytes
    piece_bytes: int = PIECE_BYTES
    """Bytes of block data that the node takes in one message."""

    @classmethod
    def of(cls, descriptor: SpaceDescriptor, max_message_bytes: int = MESSAGE_BYTES) -> Self:
        """The space of a descriptor, whether or not a node has opened it yet."""
        piece_bytes = max(1, min(PIECE_BYTES, max_message_bytes - _SPARE_BYTES))
        return cls(descriptor, descriptor.space_id, piece_bytes)

    @classmethod
    def from_wire(cls, descriptor: SpaceDescriptor, reply: pb.OpenSpaceReply) -> Self:
        """The space that a node opened. Raises `KvstoreError` if it calls it by another id."""
        space = cls.of(descriptor, reply.max_message_bytes or MESSAGE_BYTES)
        if reply.space_id != space.space_id:
            raise KvstoreError(
                "descriptor: node and client derive different ids from it; "
                "run the same version of kvstore-llm on both sides"
            )
        return space

    @property
    def block_bytes(self) -> int:
        """Bytes of every block of this space."""
        return self.descriptor.block_bytes
