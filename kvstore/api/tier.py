"""What keeps blocks: the `Tier` protocol and the few types that cross it.

A block is immutable and named by its content; a tier may forget, it may never lie. Every method
takes a batch (one block is a batch of one). Bytes move into and out of buffers that the caller
owns.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class BlockRef(NamedTuple):
    """What a block is called: whose it is, and which prefix it ends.

    Inside a node `namespace` is the 32-byte HMAC over tenant, scope and space
    (`kvstore.names`); on the client's side of the wire it is the space's id, because the rest is
    the node's secret. `key` is the 32-byte chained key (`kvstore.api.keys`).
    """

    namespace: bytes
    key: bytes


class Keeper(Protocol):
    """Lets a tier use a buffer longer than the call to which it was passed.

    A thread at a device cannot be stopped when its caller gives up. Without a keeper its bytes
    are copied; with one it reads or writes the buffer itself, and whose it is waits until nobody
    holds it. All calls come from the event loop; every `hold` is followed by one `release`.
    """

    @property
    def held(self) -> bool:
        """Whether anybody still holds the buffer, and may yet read or write it."""

    def hold(self) -> None:
        """From now on the buffer stays what and where it is. Its call is still under way."""

    def release(self) -> None:
        """Ends one `hold`."""


class Block(NamedTuple):
    """A block on its way into a tier.

    `data` is read before `store` returns and never kept; with a keeper, as long as it is held.
    """

    ref: BlockRef
    parent: BlockRef | None
    """The block before it in the chain; None at the chain's start."""
    digest: bytes
    """As its writer computed it (`kvstore.api.digest`); travels with the bytes unchanged."""
    data: memoryview
    keeper: Keeper | None = None


class Load(NamedTuple):
    """A wish for a block. `into` is writable and exactly as long as the block.

    The caller owns `into`. After `load` returned, or was cancelled, nothing writes to it any more
    unless its keeper is still held; where the answer is None its content is undefined.
    """

    ref: BlockRef
    into: memoryview
    keeper: Keeper | None = None


class Loaded(NamedTuple):
    """A block that was delivered: from which tier, and with which digest it was written.

    That is its writer's, or that of a tier which the operator allowed to be lossy.
    """

    tier: str
    digest: bytes


class Usage(NamedTuple):
    """How full one tier is. `capacity_bytes` 0: not known here."""

    tier: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    serving: bool = True


class Tier(Protocol):
    """A place that keeps blocks. It may forget, it may never lie.

    Answers come in the order of the question. A missing block is None or False, never an
    exception; a tier that is broken raises `TierError`, which `Guarded` turns into a miss.
    """

    @property
    def name(self) -> str:
        """What the tier is called in answers, metrics and logs."""

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        """The name of the cheapest tier that holds each block. Renews nothing."""

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        """True for each block that `store` would have to move."""

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        """Fills the buffers of the blocks that are here, intact and of the asked length."""

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        """True for each block that the tier holds afterwards. Parents come before children."""

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        """Forgets blocks for good and says how many copies there were."""

    async def clear(self, namespace: bytes) -> int:
        """Forgets everything of one namespace for good and says how many copies there were."""

    def usage(self) -> list[Usage]:
        """How full the tier is; one entry for each tier of a composition."""

    async def close(self) -> None:
        """Finishes what is under way and lets go of files, sockets and memory."""
