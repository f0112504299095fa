"""Memory over a slower tier: demotion, promotion, single flight, and callers that give up."""

import asyncio
import random
from collections.abc import Sequence

import pytest

from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Tier
from kvstore.files import PAGE_BYTES
from kvstore.names import block_name
from kvstore.policy.policy import Use
from kvstore.tiers.beside import Beside
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.memory import Memory
from kvstore.tiers.segment import file_name
from kvstore.tiers.tiered import Acquired, Tiered, Want
from tests.sim.blocks import chain_of, load_all, namespace_of, present
from tests.sim.clock import settle
from tests.sim.faulty import Faulty
from tests.sim.files import SimulatedFiles
from tests.sim.rig import Rig, quiet

MINE, THEIRS = namespace_of("mine"), namespace_of("theirs")
SIZE = 6000


def chain(word: str = "chain", count: int = 8, namespace: bytes = MINE) -> list[Block]:
    """A chain of blocks of SIZE."""
    return chain_of(word, count, namespace, SIZE)


def refs_of(blocks: Sequence[Block]) -> list[BlockRef]:
    return [block.ref for block in blocks]


def wants_of(blocks: Sequence[Block]) -> list[Want]:
    """What a match would ask for: each block with its parent."""
    return [Want(block.ref, block.parent, SIZE) for block in blocks]


def exact(blocks: Sequence[Block], acquired: Sequence[Acquired | None]) -> list[str | None]:
    """Where each block came from, None for a miss; every byte in the slots is checked."""
    for block, got in zip(blocks, acquired, strict=True):
        assert got is None or got.slot.ref == block.ref
        assert got is None or got.slot.view == block.data, "a wrong byte"
        assert got is None or got.slot.digest == block.digest
        assert got is None or got.slot.pins > 0
    return [got.tier if got is not None else None for got in acquired]


async def acquire(tiered: Tiered, blocks: Sequence[Block]) -> list[str | None]:
    """Acquires, checks and releases; where the blocks lay."""
    acquired = await tiered.acquire(wants_of(blocks))
    try:
        return exact(blocks, acquired)
    finally:
        tiered.release(got for got in acquired if got is not None)


class Gate:
    """A fault that holds one kind of operation until it is opened, or fails it."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == self.operation:
            self.reached.set()
            await self.opened.wait()
            if self.error is not None:
                raise self.error


async def over_disk(rig: Rig, slots: int = 8) -> tuple[Tiered, Faulty, DiskTier]:
    """A small memory over a disk, with a place for faults in between."""
    disk = await rig.disk()
    slow = Faulty(disk)
    return Tiered(rig.memory(slots), slow, rig.metrics), slow, disk


# Demotion.


async def test_eviction_writes_below_what_leaves(rig: Rig) -> None:
    """Storing more than memory holds loses nothing: the rest is on disk, and counted so."""
    tiered, _, disk = await over_disk(rig)
    blocks = chain(count=30)
    assert await tiered.store(blocks) == [True] * 30
    assert await present(tiered, blocks) == [True] * 30
    on_disk = [place is not None for place in await disk.locate(refs_of(blocks))]
    in_memory = [slot.ref for slot in tiered.memory.slots()]
    assert sum(on_disk) + len(in_memory) >= 30
    assert rig.counted("evicted_blocks", fate="demoted") == 30 - len(in_memory)
    assert rig.counted("evicted_blocks", fate="dropped") == 0


async def test_demotion_writes_ancestors_first(rig: Rig) -> None:
    """The disk is prefix-closed, though memory evicts tails: no block is refused as an orphan."""
    tiered, slow, disk = await over_disk(rig)
    chains = [chain(word, 8) for word in "abcdef"]
    for blocks in chains:
        for start in range(0, 8, 2):
            await tiered.store(blocks[start : start + 2])
        disk.check()
    assert rig.counted("disk_orphans") == 0
    for blocks in chains:
        here = [place is not None for place in await disk.locate(refs_of(blocks))]
        assert here == sorted(here, reverse=True), "a hole in the chain on disk"
        assert await present(tiered, blocks) == [True] * 8
    assert rig.counted("evicted_blocks", fate="demoted") > 0
    assert slow.asked["store", chains[0][0].ref] == 1, "an ancestor was written twice"


async def test_an_evicted_tail_can_be_matched_from_its_start(rig: Rig) -> None:
    """What memory keeps of a chain, the hot head, is on disk too once its tail is."""
    tiered, _, disk = await over_disk(rig)
    hot = chain("hot", 6)
    await tiered.store(hot)
    for number in range(4):
        tiered.memory.use(Use(refs_of(hot[:3]), 0.0))
        await tiered.store(chain(f"filler {number}", 4))
    below = await disk.locate(refs_of(hot))
    assert below[-1] is not None, "the tail was not demoted"
    assert all(below)


async def test_what_descends_from_a_block_below_goes_with_it(rig: Rig) -> None:
    """A block in memory whose grandparent is discarded below could never be matched again."""
    tiered, _, disk = await over_disk(rig)
    blocks = chain(count=3)
    await disk.store(blocks)
    [grandchild] = await tiered.acquire(wants_of(blocks[2:]))
    assert grandchild is not None
    tiered.release([grandchild])
    assert await tiered.locate(refs_of(blocks)) == ["disk", "disk", "memory"]
    await tiered.discard([blocks[0].ref])
    assert await tiered.locate(refs_of(blocks)) == [None] * 3


@pytest.mark.parametrize("lost", range(3))
async def test_what_lost_its_parent_on_the_way_up_is_not_kept(rig: Rig, lost: int) -> None:
    """A damaged block takes its descendants along: promoted without it they were of no use."""
    files = SimulatedFiles()
    disk = await rig.disk(files)
    tiered = Tiered(rig.memory(8), disk, rig.metrics)
    blocks = chain(count=3)
    await disk.store(blocks)
    entry = disk._index.find(block_name(blocks[lost].ref))
    assert entry is not None
    files.flip(file_name(entry.segment_id), 8 * (entry.offset + PAGE_BYTES))
    expected = ["disk" if at < lost else None for at in range(3)]
    assert await acquire(tiered, blocks) == expected
    assert [bool(place) for place in await tiered.locate(refs_of(blocks))] == [
        at < lost for at in range(3)
    ]


async def test_children_may_be_asked_for_before_their_parents(rig: Rig) -> None:
    """The order of a batch does not decide who has a parent."""
    tiered, _, disk = await over_disk(rig)
    blocks = chain(count=4)
    await disk.store(blocks)
    assert await acquire(tiered, blocks[::-1]) == ["disk"] * 4
    assert await tiered.locate(refs_of(blocks)) == ["memory"] * 4


async def test_a_slow_tier_that_forgets_does_not_hold_up_others(rig: Rig) -> None:
    """While a namespace is cleared below, others find room, and nothing of it is demoted."""
    tiered, slow, disk = await over_disk(rig)
    mine, theirs = chain("mine", 6), chain("theirs", 12, THEIRS)
    await tiered.store(mine)
    slow.before = gate = Gate("clear")
    clearing = asyncio.create_task(tiered.clear(MINE))
    await gate.reached.wait()
    await tiered.store(mine)
    assert await tiered.store(theirs) == [True] * 12
    assert await disk.locate(refs_of(mine)) == [None] * 6
    gate.opened.set()
    await clearing
    assert await tiered.locate(refs_of(mine)) == [None] * 6
    assert await present(tiered, theirs) == [True] * 12


async def test_without_a_slower_tier_eviction_forgets(rig: Rig) -> None:
    """The coldest are gone and counted as dropped; the youngest are here."""
    tiered = Tiered(rig.memory(8), None, rig.metrics)
    old, young = chain("old", 8), chain("young", 4)
    await tiered.store(old)
    assert await tiered.store(young) == [True] * 4
    assert await present(tiered, young) == [True] * 4
    assert rig.counted("evicted_blocks", fate="dropped") >= 4
    assert rig.counted("evicted_blocks", fate="demoted") == 0
    assert await acquire(tiered, chain("absent", 2)) == [None] * 2


async def test_a_broken_slower_tier_costs_only_what_leaves(rig: Rig) -> None:
    """While everything below fails, memory goes on as if it were alone."""
    disk = await rig.disk()
    slow = Faulty(disk)

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        raise TierError("planted")

    tiered = Tiered(rig.memory(8), rig.guarded(slow), rig.metrics)
    slow.before = fail
    for number in range(6):
        blocks = chain(str(number), 4)
        assert await tiered.store(blocks) == [True] * 4
        assert await present(tiered, blocks) == [True] * 4
    assert rig.counted("tier_errors", tier="disk", cause="error") > 0
    assert rig.counted("evicted_blocks", fate="dropped") >= 16
    assert rig.counted("evicted_blocks", fate="demoted") == 0, "what is lost was called demoted"


async def test_what_is_pinned_while_it_is_demoted_stays(rig: Rig) -> None:
    """A victim that somebody acquires during its demotion keeps its slot."""
    tiered, slow, _ = await over_disk(rig)
    blocks, more = chain("first", 8), chain("second", 4)
    await tiered.store(blocks)
    slow.before = gate = Gate("store")
    storing = asyncio.create_task(tiered.store(more))
    await gate.reached.wait()
    acquired = await tiered.acquire(wants_of(blocks))
    gate.opened.set()
    assert await storing == [False] * 4
    assert exact(blocks, acquired) == ["memory"] * 8
    assert await tiered.memory.locate(refs_of(blocks)) == ["memory"] * 8
    tiered.release(got for got in acquired if got is not None)
    assert await tiered.store(more) == [True] * 4


async def test_when_all_is_pinned_nothing_breaks(rig: Rig) -> None:
    """No slot is to be had, stores are refused, promotions miss; afterwards all goes on."""
    tiered, _, disk = await over_disk(rig)
    pinned, below = chain("pinned", 8), chain("below", 4)
    await disk.store(below)
    await tiered.store(pinned)
    acquired = await tiered.acquire(wants_of(pinned))
    assert await tiered.reserve(below[0].ref, SIZE) is None
    assert await tiered.store(chain("new", 2)) == [False] * 2
    assert await acquire(tiered, below) == [None] * 4
    assert await present(tiered, below) == [True] * 4, "a load needs no slot"
    assert exact(pinned, acquired) == ["memory"] * 8
    tiered.release(got for got in acquired if got is not None)
    assert await acquire(tiered, below) == ["disk"] * 4


async def test_a_block_of_another_size_finds_room(rig: Rig) -> None:
    """A slab changes its class when blocks of another size come, and nothing is lost."""
    tiered, _, _ = await over_disk(rig)
    small, large = chain("small", 8), chain_of("large", 4, MINE, 30_000)
    assert await tiered.store(small) == [True] * 8
    assert await tiered.store(large) == [True] * 4
    assert await tiered.store(chain("again", 4)) == [True] * 4
    assert await present(tiered, [*small, *large]) == [True] * 12


# Promotion.


async def test_promotion_lands_in_memory_and_leaves_the_copy_below(rig: Rig) -> None:
    """Blocks of the disk are in memory afterwards, exact and with their parents, and on disk."""
    tiered, slow, disk = await over_disk(rig)
    blocks = chain()
    await disk.store(blocks)
    assert await acquire(tiered, blocks) == ["disk"] * 8
    assert await acquire(tiered, blocks) == ["memory"] * 8
    assert all(slow.asked["load", ref] == 1 for ref in refs_of(blocks))
    assert [place is not None for place in await disk.locate(refs_of(blocks))] == [True] * 8
    assert {slot.ref: slot.parent for slot in tiered.memory.slots()} == {
        block.ref: block.parent for block in blocks
    }
    assert rig.counted("promoted_blocks", tier="disk") == 8


async def test_what_is_nowhere_is_a_miss_among_others(rig: Rig) -> None:
    """Holes keep their places in the answer."""
    tiered, _, disk = await over_disk(rig)
    blocks, others = chain(), chain("others", 2)
    await disk.store(blocks[:5])
    await tiered.store(others)
    question = [blocks[6], *others, blocks[2], blocks[7], blocks[0]]
    places = [None, "memory", "memory", "disk", None, "disk"]
    assert await acquire(tiered, question) == places


async def test_a_block_of_another_length_is_a_miss(rig: Rig) -> None:
    """Neither in memory nor below does a wrong size deliver anything."""
    tiered, _, disk = await over_disk(rig)
    here, below = chain("here", 2), chain("below", 2)
    await tiered.store(here)
    await disk.store(below)
    wrong = [want._replace(size=SIZE + 1) for want in wants_of([*here, *below])]
    assert await tiered.acquire(wrong) == [None] * 4
    # A name says the length: what has another one below is not what it claims to be.
    assert await acquire(tiered, [*here, *below]) == ["memory"] * 2 + [None] * 2


async def test_one_flight_per_block(rig: Rig) -> None:
    """However many ask for a block that lies below, it is loaded once, and all of them get it."""
    tiered, slow, disk = await over_disk(rig)
    blocks = chain()
    await disk.store(blocks)
    slow.before = gate = Gate("load")
    callers = [
        asyncio.create_task(acquire(tiered, part))
        for part in (blocks, blocks[:4], blocks[2:], blocks[::-1], blocks[5:6])
    ]
    await gate.reached.wait()
    await settle()
    gate.opened.set()
    answers = await asyncio.gather(*callers)
    assert answers[0] == ["disk"] * 8
    assert all(all(answer) for answer in answers)
    assert [slow.asked["load", ref] for ref in refs_of(blocks)] == [1] * 8


async def test_a_flight_that_fails_is_a_miss_for_all_and_tried_again(rig: Rig) -> None:
    """Everybody who waited gets nothing; the next one loads it."""
    disk = await rig.disk()
    slow = Faulty(disk)
    tiered = Tiered(rig.memory(8), rig.guarded(slow), rig.metrics)
    blocks = chain()
    await disk.store(blocks)
    slow.before = gate = Gate("load")
    gate.error = TierError("planted")
    callers = [asyncio.create_task(acquire(tiered, blocks)) for _ in range(3)]
    await gate.reached.wait()
    await settle()
    gate.opened.set()
    assert await asyncio.gather(*callers) == [[None] * 8] * 3
    gate.error = None
    assert await acquire(tiered, blocks) == ["disk"] * 8


async def test_an_unguarded_error_reaches_the_caller_and_leaks_nothing(rig: Rig) -> None:
    """A raw tier's error is raised to who asked; slots and flights are given back."""
    tiered, slow, disk = await over_disk(rig)
    blocks = chain()
    await disk.store(blocks)
    slow.before = gate = Gate("load")
    gate.error = TierError("planted")
    gate.opened.set()
    with pytest.raises(TierError, match="planted"):
        await tiered.acquire(wants_of(blocks))
    gate.error = None
    assert await acquire(tiered, blocks) == ["disk"] * 8


async def test_the_same_block_twice_in_a_question(rig: Rig) -> None:
    """Each place gets its own pin, whether the block lies below, in memory, or nowhere."""
    tiered, slow, disk = await over_disk(rig)
    blocks, absent = chain(count=3), chain("absent", 1)
    await disk.store(blocks)
    question = [blocks[0], blocks[1], blocks[0], absent[0], blocks[1], absent[0]]
    for _ in range(2):
        places = await acquire(tiered, question)
        assert [place is not None for place in places] == [True, True, True, False, True, False]
    assert slow.asked["load", blocks[0].ref] == 1


@pytest.mark.parametrize("where", ["own flight", "another's flight", "own and another's"])
async def test_a_caller_that_gives_up_leaks_no_pin(rig: Rig, where: str) -> None:
    """Whatever it was waiting for; the promotion itself goes on and serves the next one."""
    tiered, slow, disk = await over_disk(rig)
    one, two = chain("one", 3), chain("two", 3)
    await disk.store([*one, *two])
    slow.before = gate = Gate("load")
    first = asyncio.create_task(acquire(tiered, one)) if where != "own flight" else None
    await settle()
    asked = {"own flight": one, "another's flight": one, "own and another's": [*two, *one]}[where]
    quitter = asyncio.create_task(tiered.acquire(wants_of(asked)))
    await gate.reached.wait()
    await settle()
    quitter.cancel()
    await asyncio.wait([quitter])
    assert quitter.cancelled()
    gate.opened.set()
    await settle()
    assert first is None or await first == ["disk"] * 3
    assert not [slot.ref for slot in tiered.memory.slots() if slot.pins]
    assert await acquire(tiered, asked) == ["memory"] * len(asked)


async def test_giving_up_at_any_step_leaks_nothing(rig: Rig, rng: random.Random) -> None:
    """Callers of every kind are cancelled at random moments; in the end nothing is pinned."""
    tiered, slow, _ = await over_disk(rig)
    chains = [chain(str(number), 4) for number in range(8)]

    async def pause(operation: str, refs: Sequence[BlockRef]) -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)

    slow.before = slow.after = pause
    for blocks in chains:
        await tiered.store(blocks)
    cancelled = 0
    for _ in range(150):
        callers = [asyncio.create_task(_acquire_or_store(tiered, rng, chains)) for _ in range(3)]
        for _ in range(rng.randrange(25)):
            await asyncio.sleep(0)
        callers[0].cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        cancelled += isinstance(outcomes[0], asyncio.CancelledError)
        assert not any(isinstance(outcome, Exception) for outcome in outcomes), outcomes
        await quiet(tiered)
        rig.check_all()
    assert cancelled > 20
    slow.before = slow.after = Faulty(tiered).before
    for blocks in chains:
        await load_all(tiered, blocks)


async def _acquire_or_store(
    tiered: Tiered, rng: random.Random, chains: Sequence[list[Block]]
) -> None:
    blocks = rng.choice(chains)
    if rng.random() < 0.5:
        await acquire(tiered, blocks)
    else:
        await tiered.store(blocks)


@pytest.mark.parametrize("order", [1, -1])
async def test_what_arrives_without_its_parent_is_not_kept(rig: Rig, order: int) -> None:
    """Neither a child of what did not arrive, nor its children, in whatever order they came."""
    below = rig.memory()
    tiered = Tiered(rig.memory(8), below, rig.metrics)
    blocks, others = chain(count=6), chain("others", 2)
    await below.store([*blocks, *others])
    lost = below.find(blocks[3].ref)
    assert lost is not None
    below.evict(lost)
    found = ["memory"] * 3 + [None] * 3
    assert (
        await acquire(tiered, [*blocks, *others][::order]) == [*found, "memory", "memory"][::order]
    )
    assert await tiered.memory.locate(refs_of(blocks)) == found
    assert rig.counted("promoted_blocks", tier="memory") == 5


@pytest.mark.parametrize("parents", ["here", "below", "nowhere", "elsewhere"])
async def test_what_arrives_alone_needs_its_parent_somewhere(rig: Rig, parents: str) -> None:
    """In memory or below, also in another namespace; a block without a parent needs none."""
    below = rig.memory()
    tiered = Tiered(rig.memory(8), below, rig.metrics)
    above, child, free = chain("above", 1)[0], chain(count=1)[0], chain("free", 1)[0]
    if parents == "elsewhere":
        above = chain("above", 1, THEIRS)[0]
    child = child._replace(parent=above.ref)
    await below.store([child, free])
    if parents == "here":
        await tiered.store([above])
    elif parents != "nowhere":
        await below.store([above])
    place = None if parents == "nowhere" else "memory"
    assert await acquire(tiered, [child, free]) == [place, "memory"]
    assert await tiered.memory.locate([child.ref, free.ref]) == [place, "memory"]


async def test_what_arrives_while_its_parent_is_discarded_is_not_kept(rig: Rig) -> None:
    """Though the parent still lies below: it will not for long."""
    below = rig.memory()
    slow = Faulty(below)
    tiered = Tiered(rig.memory(8), slow, rig.metrics)
    above, child = chain(count=2)
    await below.store([above, child])
    slow.after, slow.before = loading, forgetting = Gate("load"), Gate("discard")
    acquiring = asyncio.create_task(acquire(tiered, [child]))
    await loading.reached.wait()
    discarding = asyncio.create_task(tiered.discard([above.ref]))
    await forgetting.reached.wait()
    loading.opened.set()
    assert await acquiring == [None]
    forgetting.opened.set()
    assert await discarding == 2
    assert await tiered.locate([above.ref, child.ref]) == [None] * 2


# Forgetting while something is under way.


async def test_what_is_discarded_during_its_demotion_is_gone(rig: Rig) -> None:
    """A block that is just being written below does not survive there.

    1. Room is needed, and a victim is about to be written below.
    2. Somebody discards it: below it is not found yet, in memory it is.
    3. The write of step 1 arrives.
    """
    tiered, slow, disk = await over_disk(rig)
    blocks = chain()
    await tiered.store(blocks)
    slow.before = gate = Gate("store")
    storing = asyncio.create_task(tiered.store(chain("more", 4)))
    await gate.reached.wait()
    discarding = asyncio.create_task(tiered.discard(refs_of(blocks)))
    await settle()
    gate.opened.set()
    await asyncio.gather(storing, discarding)
    assert await present(tiered, blocks) == [False] * 8
    assert await disk.locate(refs_of(blocks)) == [None] * 8


async def test_what_lies_below_is_discarded_with_its_children_in_memory(rig: Rig) -> None:
    """Without it nobody could match them, and they would take room for nothing."""
    tiered, _, disk = await over_disk(rig)
    blocks = chain(count=3)
    await disk.store(blocks[:1])
    await tiered.store(blocks[1:])
    assert await tiered.discard(refs_of(blocks[:1])) == 3
    assert await tiered.locate(refs_of(blocks)) == [None] * 3


@pytest.mark.parametrize("whole_namespace", [False, True])
async def test_what_is_discarded_during_its_promotion_is_gone(
    rig: Rig, whole_namespace: bool
) -> None:
    """A block that was read below but has not arrived yet does not survive in memory."""
    tiered, slow, disk = await over_disk(rig)
    blocks, others = chain(), chain("others", 2, THEIRS)
    await disk.store([*blocks, *others])
    slow.after = gate = Gate("load")
    acquiring = asyncio.create_task(acquire(tiered, [*blocks, *others]))
    await gate.reached.wait()
    forget = tiered.clear(MINE) if whole_namespace else tiered.discard(refs_of(blocks))
    forgetting = asyncio.create_task(forget)
    await settle()
    gate.opened.set()
    await asyncio.gather(acquiring, forgetting)
    assert await tiered.locate(refs_of(blocks)) == [None] * 8
    assert await present(tiered, blocks) == [False] * 8
    assert await present(tiered, others) == [True] * 2


async def test_what_comes_and_goes_while_it_is_discarded_is_gone(rig: Rig) -> None:
    """However often it passes between the tiers meanwhile.

    1. A block is on its way up when somebody discards it.
    2. It arrives, and is written below again.
    3. It leaves memory, and is on its way up once more.
    """
    tiered, slow, disk = await over_disk(rig)
    [block], fillers = chain(count=1), chain("fillers", 8)
    await disk.store([block])
    slow.after = first = Gate("load")
    acquiring = asyncio.create_task(acquire(tiered, [block]))
    await first.reached.wait()
    discarding = asyncio.create_task(tiered.discard([block.ref]))
    await settle()
    # Somebody is making room all the while.
    await tiered.store(fillers[:7])
    slow.before = room = Gate("wants")
    storing = asyncio.create_task(tiered.store(fillers[7:]))
    await room.reached.wait()
    slow.before = Gate("none")
    first.opened.set()
    await acquiring
    await tiered.flush()
    if (slot := tiered.memory.find(block.ref)) is not None:
        tiered.memory.evict(slot)
    slow.after = second = Gate("load")
    again = asyncio.create_task(acquire(tiered, [block]))
    await settle()
    room.opened.set()
    await asyncio.gather(storing, discarding)
    second.opened.set()
    await again
    assert await tiered.locate([block.ref]) == [None]


async def test_nobody_waits_while_others_clear(rig: Rig) -> None:
    """Room is made, and blocks go below and come up, however long a clear takes."""
    tiered, slow, disk = await over_disk(rig)
    below, more = chain("below", 2, THEIRS), chain("more", 20, THEIRS)
    await disk.store(below)
    await tiered.store(chain())
    slow.before = gate = Gate("clear")
    clearing = asyncio.create_task(tiered.clear(MINE))
    await gate.reached.wait()
    async with asyncio.timeout(10):
        assert await tiered.store(more) == [True] * 20
        assert await acquire(tiered, below) == ["disk"] * 2
    assert await present(tiered, more) == [True] * 20
    assert not clearing.done()
    gate.opened.set()
    assert await clearing >= 8


async def test_what_is_being_forgotten_stays_where_it_is(rig: Rig) -> None:
    """It neither comes up nor goes below, also if it is written again meanwhile."""
    tiered, slow, disk = await over_disk(rig)
    below, again = chain("below", 2), chain("again", 2)
    await disk.store(below)
    slow.before = gate = Gate("clear")
    clearing = asyncio.create_task(tiered.clear(MINE))
    await gate.reached.wait()
    assert await acquire(tiered, below) == [None] * 2
    await tiered.store(again)
    await tiered.store(chain("others", 8, THEIRS))
    assert await tiered.locate(refs_of([*below, *again])) == ["disk"] * 2 + [None] * 2
    gate.opened.set()
    assert await clearing == 2
    assert await tiered.locate(refs_of([*below, *again])) == [None] * 4


@pytest.mark.parametrize("fails", [False, True])
async def test_after_a_clear_blocks_come_and_go_again(rig: Rig, fails: bool) -> None:
    """Whether it succeeded, or its caller was told that it did not."""
    tiered, slow, disk = await over_disk(rig)
    blocks = chain(count=2)
    slow.before = gate = Gate("clear")
    gate.error = TierError("planted") if fails else None
    gate.opened.set()
    if fails:
        with pytest.raises(TierError):
            await tiered.clear(MINE)
    else:
        await tiered.clear(MINE)
    await tiered.store(blocks)
    await tiered.store(chain("others", 8, THEIRS))
    assert await disk.locate(refs_of(blocks)) == ["disk"] * 2
    assert await acquire(tiered, blocks) == ["disk"] * 2


# Restarts.


async def test_flush_makes_the_next_start_warm(rig: Rig) -> None:
    """What only memory had is below afterwards, chain by chain, and memory keeps its copies."""
    files = SimulatedFiles()
    disk = await rig.disk(files)
    tiered = Tiered(rig.memory(64), disk, rig.metrics)
    chains = [chain(word, 6) for word in "abc"]
    for blocks in chains:
        await tiered.store(blocks)
    assert await disk.locate(refs_of(chains[0])) == [None] * 6
    await tiered.flush()
    assert await acquire(tiered, chains[0]) == ["memory"] * 6
    rig.gone(disk)
    await disk.close()
    disk = await rig.disk(files)
    fresh = Tiered(rig.memory(64), disk, rig.metrics)
    for blocks in chains:
        assert await acquire(fresh, blocks) == ["disk"] * 6
    assert rig.counted("disk_orphans") == 0


async def test_flush_writes_nothing_twice(rig: Rig) -> None:
    """What lies below already is left alone."""
    tiered, slow, _ = await over_disk(rig, 64)
    blocks = chain()
    await tiered.store(blocks[:4])
    await tiered.flush()
    await tiered.store(blocks[4:])
    await tiered.flush()
    await tiered.flush()
    assert [slow.asked["store", ref] for ref in refs_of(blocks)] == [1] * 8


async def test_closing_during_a_promotion_ends_in_peace(rig: Rig) -> None:
    """A node that stops while a caller waits answers him something, and raises nothing."""
    tiered, slow, disk = await over_disk(rig)
    blocks = chain()
    await disk.store(blocks)
    slow.before = gate = Gate("load")
    acquiring = asyncio.create_task(tiered.acquire(wants_of(blocks)))
    await gate.reached.wait()
    rig.gone(disk)
    rig.gone(tiered.memory)
    closing = asyncio.create_task(tiered.close())
    await settle()
    gate.opened.set()
    outcomes = await asyncio.gather(acquiring, closing, return_exceptions=True)
    assert outcomes[1] is None
    assert not isinstance(outcomes[0], Exception)


# Compositions.


async def test_of_two_tiers_side_by_side_the_cheaper_is_read(rig: Rig) -> None:
    """Both get what is demoted; if the first loses it, the second has it."""
    cheap, dear = rig.memory(64), await rig.disk()
    first, second = Faulty(cheap), Faulty(dear)
    tiered = Tiered(rig.memory(8), Beside(first, second), rig.metrics)
    blocks, more = chain(), chain("more", 8)
    await tiered.store(blocks)
    await tiered.store(more)
    assert await acquire(tiered, blocks) == ["memory"] * 8
    assert sum(second.asked["load", ref] for ref in refs_of(blocks)) == 0
    assert all(first.asked["load", ref] == 1 for ref in refs_of(blocks))
    await cheap.discard(refs_of(more))
    assert await acquire(tiered, more) == ["disk"] * 8


async def test_of_two_tiers_side_by_side_none_is_left_behind(rig: Rig) -> None:
    """One cannot forget: the other has done so by the time that the caller learns of it."""
    first, second = Faulty(rig.memory(64)), Faulty(rig.memory(64))
    beside = Beside(first, second)
    blocks = chain()
    await beside.store(blocks)

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        raise TierError("planted")

    first.before, second.before = fail, Gate("discard")
    forgetting = asyncio.create_task(beside.discard(refs_of(blocks)))
    await second.before.reached.wait()
    await settle()
    assert not forgetting.done()
    second.before.opened.set()
    with pytest.raises(TierError):
        await forgetting
    assert await second.locate(refs_of(blocks)) == [None] * 8


def test_all_parts_are_tiers(rig: Rig) -> None:
    """Types agree: memory and every composition of it is a `Tier`."""
    memory: Tier = rig.memory()
    assert isinstance(memory, Memory)
    parts: list[Tier] = [memory, Tiered(memory, None, rig.metrics), Beside(memory, memory)]
    assert [part.name for part in parts] == ["memory", "tiered", "beside"]
