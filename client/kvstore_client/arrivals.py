"""The receiving end of a read: plain synchronous code that trusts nothing it is told."""

from collections.abc import Callable, Sequence

from kvstore.api.digest import DIGEST_BYTES, BlockDigest
from kvstore.api.errors import KvstoreError
from kvstore.api.parts import Part
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb

OnHere = Callable[[int, Loaded], None]
"""Hears of a block that is here: its place in the read, and what came."""


class Arrivals:
    """Puts the pieces of one read into the caller's buffers and judges each block.

    Nothing is allocated by a declared size: a header only says whether the block is the one that
    the buffer was made for.

    Invariant: only the buffer of the block under way is written to, and never past its end; that
    of a block that is here is not written to again.
    """

    def __init__(
        self,
        space_id: bytes,
        keys: Sequence[bytes],
        buffers: Sequence[memoryview],
        on_here: OnHere | None = None,
    ) -> None:
        self._space_id = space_id
        self.keys = keys
        self.buffers = buffers
        self._on_here = on_here
        self.loaded: list[Loaded | None] = [None] * len(keys)
        self.restart()

    def restart(self) -> None:
        """The same read is sent from its start. What is here stays, and is passed over."""
        self.corrupt_blocks = 0
        self.broken = False
        """True from the first block that is settled without being here: a chain ends there."""
        self._block = -1
        self._header: pb.BlockHeader | None = None
        self._seen: BlockDigest | None = None
        """Of what came of the block under way; it has a header exactly as long."""
        self._filled_bytes = 0
        self._skipping = False

    @property
    def complete(self) -> bool:
        """True when the last block is settled: it is here, damaged or missing."""
        return self._block == len(self.keys) - 1 and self._header is None

    def here(self, block: int, loaded: Loaded) -> None:
        """The block is complete and judged good: from now on its buffer is the caller's."""
        self.loaded[block] = loaded
        if self._on_here is not None:
            self._on_here(block, loaded)

    def rest(self) -> "tuple[list[int], Arrivals]":
        """What is still missing, as places in this read and as a read of its own.

        What comes of it is here at once; `take` adds how it ended.
        """
        places = [place for place, answer in enumerate(self.loaded) if answer is None]
        keys = [self.keys[place] for place in places]
        buffers = [self.buffers[place] for place in places]

        def came(block: int, loaded: Loaded) -> None:
            self.here(places[block], loaded)

        return places, Arrivals(self._space_id, keys, buffers, came)

    def take(self, rest: "Arrivals") -> None:
        """Adds how the rest ended."""
        self.corrupt_blocks += rest.corrupt_blocks
        self.broken = rest.broken
        if rest.complete:
            self.settle()

    def settle(self) -> None:
        """Says that no more will come."""
        self._block, self._header, self._seen = len(self.keys) - 1, None, None

    def leading(self) -> list[Loaded]:
        """The blocks before the first one that did not arrive."""
        leading = []
        for answer in self.loaded:
            if answer is None:
                break
            leading.append(answer)
        return leading

    def add(self, piece: Part) -> None:
        """Takes the next piece. Raises `KvstoreError` where no honest stream could have it."""
        if piece.header is not None:
            self._begin(piece.block, piece.header)
        elif piece.block != self._block:
            raise KvstoreError(f"a piece of block {piece.block} inside block {self._block}")
        data = piece.data
        if len(data) and not self._skipping:
            self._append(data)

    def _begin(self, block: int, header: pb.BlockHeader) -> None:
        if self._header is not None:
            raise KvstoreError(f"block {self._block} ended after {self._filled_bytes} bytes")
        if not self._block < block < len(self.keys):
            raise KvstoreError(f"block {block} came after block {self._block}")
        self.broken = self.broken or block > self._block + 1 or header.bytes == 0
        self._block = block
        self._filled_bytes = 0
        self._skipping = False
        if header.bytes == 0:
            return
        if self.loaded[block] is not None:
            self._skipping = True
            return
        if header.bytes != len(self.buffers[block]) or len(header.digest) != DIGEST_BYTES:
            self._skipping = True
            self._refuse()
            return
        self._header = header
        self._seen = BlockDigest(self._space_id, self.keys[block], header.bytes)

    def _append(self, data: bytes | memoryview) -> None:
        if self._header is None or self._seen is None:
            raise KvstoreError(f"data of block {self._block} without a header that announced it")
        buffer = self.buffers[self._block]
        end = self._filled_bytes + len(data)
        if end > len(buffer):
            raise KvstoreError(f"block {self._block} is longer than its header said")
        place = buffer[self._filled_bytes : end]
        place[:] = data
        # What was copied, not what came: the buffer is what the caller will read.
        self._seen.update(place)
        self._filled_bytes = end
        if end == len(buffer):
            self._judge(self._header, self._seen.digest())

    def _judge(self, header: pb.BlockHeader, digest: bytes) -> None:
        if digest == header.digest:
            self.here(self._block, Loaded(header.tier, digest))
        else:
            self._refuse()
        self._header = self._seen = None

    def _refuse(self) -> None:
        self.corrupt_blocks += 1
        self.broken = True
