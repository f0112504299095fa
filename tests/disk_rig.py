"""What the tests of the disk tier share: blocks, small tiers, and ways in which they end."""

from collections.abc import Sequence

from kvstore.api.tier import Block, BlockRef
from kvstore.files import PAGE_BYTES
from kvstore.tiers.disk import DiskTier
from tests.sim.blocks import chain_of, namespace_of, present
from tests.sim.files import SimulatedFiles
from tests.sim.rig import Rig

MINE, THEIRS = namespace_of("mine"), namespace_of("theirs")
SIZE = 6000
RECORD_BYTES = PAGE_BYTES + 2 * PAGE_BYTES
"""What a block of SIZE takes on disk, uncompressed."""
SMALL_SEGMENT = 1 << 16
SMALL_CAPACITY = 6 * SMALL_SEGMENT


def chain(word: str = "chain", count: int = 10, namespace: bytes = MINE) -> list[Block]:
    """A chain of blocks of SIZE."""
    return chain_of(word, count, namespace, SIZE)


def refs_of(blocks: Sequence[Block]) -> list[BlockRef]:
    return [block.ref for block in blocks]


async def small(
    rig: Rig, files: SimulatedFiles, *, capacity_bytes: int = SMALL_CAPACITY, codec: str = "raw"
) -> DiskTier:
    """A tier that has to drop segments soon."""
    return await rig.disk(
        files, capacity_bytes=capacity_bytes, segment_bytes=SMALL_SEGMENT, codec=codec
    )


def kill(rig: Rig, files: SimulatedFiles, tier: DiskTier) -> None:
    """Ends the process of a tier: nothing is sealed or closed, what was written is there."""
    rig.gone(tier)
    files.restart()


async def close(rig: Rig, files: SimulatedFiles, tier: DiskTier) -> None:
    """Ends a tier in order."""
    tier.check()
    rig.gone(tier)
    await tier.close()
    assert files.open_handles == 0


async def serves(tier: DiskTier, word: str, chains: int) -> None:
    """The tier takes what is new and gives it back."""
    for number in range(chains):
        blocks = chain(f"{word} {number}", 3)
        assert await tier.store(blocks) == [True] * 3
        assert await present(tier, blocks) == [True] * 3
        tier.check()
