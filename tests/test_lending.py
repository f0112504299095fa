"""Blocks without their chain: one read however many ask, and nothing kept that was forgotten."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Load
from kvstore.tiers.lending import Lending
from tests.sim.blocks import chain_of, namespace_of
from tests.sim.clock import settle
from tests.sim.faulty import Faulty
from tests.sim.rig import Rig

MINE = namespace_of("mine")
SIZE = 1000
KEPT_BLOCKS = 3


class Library:
    """A tier that lends the blocks of another one, and counts how often that is asked."""

    def __init__(self, rig: Rig) -> None:
        self.below = Faulty(rig.memory())
        self.tier = rig.check(
            Lending(self.below, rig.metrics, keep_bytes=KEPT_BLOCKS * SIZE + SIZE // 2)
        )
        self.reached = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.below.before = self._wait

    async def _wait(self, operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == "load":
            self.reached.set()
            await self.gate.wait()

    def reads(self, block: Block) -> int:
        """How often the tier below was asked for a block."""
        return self.below.asked["load", block.ref]

    async def lend(self, blocks: Sequence[Block]) -> list[bool]:
        """Which blocks were lent; their bytes are checked."""
        lent = await self.tier.lend({block.ref: SIZE for block in blocks})
        for block in blocks:
            assert block.ref not in lent or lent[block.ref].view == block.data
            assert block.ref not in lent or lent[block.ref].digest == block.digest
        return [block.ref in lent for block in blocks]

    async def load(self, block: Block) -> bool:
        """Whether a block came into a buffer of the caller's."""
        buffer = bytearray(SIZE)
        [loaded] = await self.tier.load([Load(block.ref, memoryview(buffer))])
        assert loaded is None or buffer == block.data
        return loaded is not None


def chain(count: int = 5) -> list[Block]:
    return chain_of("chain", count, MINE, SIZE)


@pytest.fixture
async def library(rig: Rig) -> AsyncIterator[Library]:
    """With a chain of five blocks below."""
    library = Library(rig)
    await library.below.store(chain())
    yield library
    library.gate.set()
    await settle()


async def test_many_who_ask_at_once_cause_one_read(library: Library) -> None:
    """A thousand, some of them with a place of their own for it."""
    [block] = chain(1)
    library.gate.clear()
    callers = [asyncio.create_task(library.lend([block])) for _ in range(900)]
    await library.reached.wait()
    owners = [asyncio.create_task(library.load(block)) for _ in range(100)]
    await settle()
    library.gate.set()
    assert await asyncio.gather(*callers) == [[True]] * 900
    assert await asyncio.gather(*owners) == [True] * 100
    assert library.reads(block) == 1


async def test_a_late_caller_gets_what_was_just_read(library: Library) -> None:
    """What is kept is not read again, until others have pushed it out."""
    blocks = chain()
    assert await library.lend(blocks[:KEPT_BLOCKS]) == [True] * KEPT_BLOCKS
    assert await library.lend(blocks[:KEPT_BLOCKS]) == [True] * KEPT_BLOCKS
    assert [library.reads(block) for block in blocks] == [1, 1, 1, 0, 0]
    assert await library.lend(blocks[KEPT_BLOCKS:]) == [True] * 2
    library.tier.check()
    assert await library.lend(blocks) == [True] * 5
    assert [library.reads(block) for block in blocks] == [2, 2, 1, 1, 1]
    library.tier.check()


async def test_what_found_its_place_is_not_kept_twice(library: Library) -> None:
    """A load takes what was lent over, without a read."""
    [block] = chain(1)
    await library.lend([block])
    assert await library.load(block)
    assert library.reads(block) == 1
    assert library.tier.kept_bytes == 0


async def test_a_caller_that_vanishes_takes_nothing_along(library: Library) -> None:
    """The first one's read goes on for the others, also when all of them are gone."""
    [block] = chain(1)
    library.gate.clear()
    first = asyncio.create_task(library.lend([block]))
    await library.reached.wait()
    second = asyncio.create_task(library.lend([block]))
    await settle()
    first.cancel()
    await settle()
    library.gate.set()
    assert await second == [True]
    assert library.reads(block) == 1


@pytest.mark.parametrize("how", ["discard", "clear"])
@pytest.mark.parametrize("when", ["kept", "on its way"])
async def test_what_is_forgotten_is_not_lent(library: Library, how: str, when: str) -> None:
    """Neither what is kept nor what was on its way when it was forgotten."""
    [block] = chain(1)
    reading = None
    if when == "kept":
        await library.lend([block])
    else:
        library.gate.clear()
        reading = asyncio.create_task(library.lend([block]))
        await library.reached.wait()
    forget = library.tier.discard([block.ref]) if how == "discard" else library.tier.clear(MINE)
    forgetting = asyncio.create_task(forget)
    await settle()
    library.gate.set()
    await forgetting
    if reading is not None:
        await reading
    assert await library.lend([block]) == [False]
    assert not await library.load(block)


async def test_oblivion_that_fails_below_still_empties_what_is_kept(library: Library) -> None:
    """The error is the caller's; the copy is gone."""
    [block] = chain(1)
    await library.lend([block])

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == "discard":
            raise TierError("planted")

    library.below.before = fail
    with pytest.raises(TierError):
        await library.tier.discard([block.ref])
    assert library.tier.kept_bytes == 0


async def test_what_is_nowhere_or_of_another_size_is_not_lent(library: Library) -> None:
    """And costs no buffer below."""
    [block] = chain(1)
    [absent] = chain_of("absent", 1, MINE, SIZE)
    assert await library.lend([absent]) == [False]
    assert library.reads(absent) == 0
    assert await library.tier.lend({block.ref: SIZE + 1}) == {}
    assert await library.lend([block]) == [True]


async def test_an_error_below_reaches_all_who_wait(library: Library) -> None:
    """And the next one tries again."""
    [block] = chain(1)

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == "load":
            raise TierError("planted")

    library.below.before = fail
    answers = await asyncio.gather(
        *(library.lend([block]) for _ in range(3)), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [TierError] * 3
    library.below.before = library._wait
    assert await library.lend([block]) == [True]
