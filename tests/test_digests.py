"""Blocks that were committed without a digest: nobody gets them before they have it."""

import asyncio

import pytest

from kvstore.api.digest import block_digest
from kvstore.api.tier import Load
from kvstore.reading import Reading
from kvstore.tiers.memory import Slot
from kvstore.tiers.tiered import Tiered
from tests.sim.blocks import chain_of, namespace_of, present
from tests.sim.clock import settle
from tests.sim.files import SimulatedFiles
from tests.sim.rig import Rig
from tests.sim.runner import GatedRunner

SIZE = 6000
SPACE = namespace_of("space")
BLOCKS = chain_of("chain", 3, SPACE, SIZE)


class Placed:
    """Tiers in which a writer has just put the chain himself, its digests still to come."""

    def __init__(self, rig: Rig, tiers: Tiered, runner: GatedRunner) -> None:
        self.tiers = tiers
        self.runner = runner
        self.rig = rig
        self.slots: list[Slot] = []

    async def place(self) -> None:
        """Fills slots and commits them."""
        self.runner.held = True
        for block in BLOCKS:
            slot = await self.tiers.reserve(block.ref, SIZE)
            assert slot is not None
            slot.view[:] = block.data
            kept = self.tiers.memory.commit(slot, block.parent, b"")
            assert kept is slot
            self.tiers.digests.begin(SPACE, [slot])
            self.slots.append(slot)
        await settle()

    async def compute(self) -> None:
        """Lets the threads come to it."""
        while self.runner.waiting:
            await self.runner.step()


@pytest.fixture
async def placed(rig: Rig) -> Placed:
    runner = GatedRunner()
    disk = await rig.disk(SimulatedFiles())
    placed = Placed(rig, Tiered(rig.memory(), disk, rig.metrics, runner), runner)
    await placed.place()
    return placed


def reading(tiers: Tiered) -> Reading:
    refs = [block.ref for block in BLOCKS]
    return Reading(tiers, None, refs, SIZE, lambda size: False, lambda: 0.01)


async def test_a_read_that_cannot_wait_for_a_digest_misses(placed: Placed) -> None:
    """Neither the stream nor the arena is given a block that nobody could check."""
    window = next(reading(placed.tiers).windows(1 << 20))
    assert await reading(placed.tiers).pin(window, 0.01) == [None] * 3
    assert [block.view async for block in reading(placed.tiers).blocks()] == [None] * 3
    await placed.compute()
    given = await reading(placed.tiers).pin(window, 10.0)
    for block, acquired in zip(BLOCKS, given, strict=True):
        assert acquired is not None
        assert acquired.slot.digest == block_digest(SPACE, block.ref.key, block.data)
    placed.tiers.release(block for block in given if block is not None)


async def test_a_block_goes_below_with_its_digest(placed: Placed) -> None:
    """Flushing waits for it."""
    flushing = asyncio.create_task(placed.tiers.flush())
    await settle()
    assert not flushing.done()
    await placed.compute()
    await flushing
    await placed.tiers.memory.discard([block.ref for block in BLOCKS])
    into = [bytearray(SIZE) for _ in BLOCKS]
    loads = [Load(b.ref, memoryview(buffer)) for b, buffer in zip(BLOCKS, into, strict=True)]
    answers = await placed.tiers.load(loads)
    for block, answer in zip(BLOCKS, answers, strict=True):
        assert answer is not None
        assert answer.digest == block_digest(SPACE, block.ref.key, block.data)


async def test_a_load_waits_for_the_digest(placed: Placed) -> None:
    """Tiers answer with it."""
    loading = asyncio.create_task(present(placed.tiers, BLOCKS))
    await settle()
    assert not loading.done()
    await placed.compute()
    assert await loading == [True] * 3


async def test_a_slot_is_not_reused_before_its_digest_is_known(placed: Placed) -> None:
    """What is discarded meanwhile is still being read by a thread."""
    settling = asyncio.create_task(placed.tiers.digests.settle(placed.slots))
    await settle()
    assert placed.runner.waiting
    await placed.tiers.memory.discard([block.ref for block in BLOCKS])
    assert placed.tiers.memory.usage()[0].used_bytes > 0
    await placed.compute()
    await settling
    assert placed.tiers.memory.usage()[0].used_bytes == 0


async def until_all_have_digests(placed: Placed) -> None:
    """Without asking for them, which would hurry."""
    async with asyncio.timeout(10):
        while not all(slot.digest for slot in placed.slots):
            await asyncio.wait(placed.tiers.digests._coming.values())


async def test_digests_wait_while_somebody_writes_unless_they_are_asked_for(rig: Rig) -> None:
    """A writer has memory to himself; a reader need not wait for him."""
    runner, writer = GatedRunner(), object()
    tiers = Tiered(rig.memory(), await rig.disk(SimulatedFiles()), rig.metrics, runner)
    tiers.digests.give_way(writer)
    placed = Placed(rig, tiers, runner)
    await placed.place()
    assert runner.waiting == 0
    settling = asyncio.create_task(tiers.digests.settle(placed.slots[1:2]))
    await settle()
    await placed.compute()
    await settling
    assert [bool(slot.digest) for slot in placed.slots] == [False, True, False]
    runner.held = False
    tiers.digests.go_on(writer)
    await until_all_have_digests(placed)


async def test_a_writer_who_never_ends_holds_digests_up_for_a_moment_only(rig: Rig) -> None:
    """He may have been stopped in the middle of a copy."""
    runner = GatedRunner()
    tiers = Tiered(rig.memory(), await rig.disk(SimulatedFiles()), rig.metrics, runner)
    tiers.digests.give_way(object())
    placed = Placed(rig, tiers, runner)
    await placed.place()
    runner.held = False
    await until_all_have_digests(placed)


async def test_room_is_made_of_blocks_that_lack_their_digests(rig: Rig) -> None:
    """They are pinned until then; a writer who needs a slot has them digested at once."""
    runner = GatedRunner()
    tiers = Tiered(rig.memory(slots=4), await rig.disk(SimulatedFiles()), rig.metrics, runner)
    tiers.digests.give_way(object())
    placed = Placed(rig, tiers, runner)
    await placed.place()
    filler, other = chain_of("other", 2, SPACE, SIZE)
    last = await tiers.reserve(filler.ref, SIZE)
    assert last is not None
    reserving = asyncio.create_task(tiers.reserve(other.ref, SIZE))
    await settle()
    assert not reserving.done()
    await placed.compute()
    slot = await reserving
    assert slot is not None
    tiers.memory.abort(slot)
    tiers.memory.abort(last)


@pytest.mark.parametrize("whole", [False, True], ids=["discard", "clear"])
async def test_what_is_forgotten_while_its_digest_is_computed_does_not_go_below(
    rig: Rig, whole: bool
) -> None:
    """It was about to: the store below only waited for the digest."""
    runner, disk = GatedRunner(), await rig.disk(SimulatedFiles())
    tiers = Tiered(rig.memory(), disk, rig.metrics, runner)
    space = namespace_of("space")
    blocks = chain_of("chain", 3, space, SIZE)
    refs = [block.ref for block in blocks]
    runner.held = True
    for block in blocks:
        slot = await tiers.reserve(block.ref, SIZE)
        assert slot is not None
        slot.view[:] = block.data
        tiers.memory.commit(slot, block.parent, b"")
        tiers.digests.begin(space, [slot])
    flushing = asyncio.create_task(tiers.flush())
    await settle()
    assert await (tiers.clear(space) if whole else tiers.discard(refs)) == 3
    while runner.waiting:
        await runner.step()
    runner.held = False
    await flushing
    assert await disk.locate(refs) == [None] * 3
    await tiers.digests.close()
