"""What a node promises beside its tiers: matches, leases, scopes, tenants and hints."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from kvstore.api.digest import block_digest
from kvstore.api.errors import InvalidArgument, Shed, UnknownSpace
from kvstore.api.hint import MAX_RETURN_MS, Reuse, ReuseHint
from kvstore.api.space import MatchRule, SpaceDescriptor
from kvstore.api.tier import Block, BlockRef
from kvstore.events import QUEUE_LENGTH, Draining, Events, SegmentSealed
from kvstore.leases import Lease, LeaseTable, Share
from kvstore.matching import longest_match, needed
from kvstore.node import EXPIRY_PERIOD_S, MAX_SPACES, Matched, Node
from kvstore.policy.policy import Use
from kvstore.spaces import NAMESPACES
from kvstore.tenants import Tenant
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.guarded import Guarded
from kvstore.tiers.slabs import PAGE_BYTES
from kvstore.tiers.tiered import Tiered, Want
from kvstore.writing import Incoming
from tests.sim.blocks import data_of, keys_of
from tests.sim.clock import settle
from tests.sim.faulty import Faulty
from tests.sim.nodes import BLOCK_BYTES, descriptor_of
from tests.sim.rig import Rig, assert_idle, quiet
from tests.sim.runner import GatedRunner

ACME, RIVAL = Tenant("acme"), Tenant("rival")
SLOTS = 16
SLOT_BYTES = 2 * PAGE_BYTES
"""What a block takes in memory."""
MAX_LEASE_S = 30.0


class Store:
    """A node over a small memory and a disk, and what a test does with it."""

    def __init__(self, rig: Rig, disk: DiskTier, leased_blocks: int, slots: int) -> None:
        self.slow = Faulty(disk)
        self.tiers = Tiered(rig.memory(slots), self.slow, rig.metrics)
        self.leases = rig.check(LeaseTable(leased_blocks * SLOT_BYTES))
        self.node = Node(
            node_id="node",
            secret=bytes(32),
            tiers=self.tiers,
            leases=self.leases,
            max_lease_s=MAX_LEASE_S,
            events=Events(),
            clock=rig.clock,
            metrics=rig.metrics,
        )
        self.space_id = self.node.open_space(descriptor_of())

    async def store(
        self, keys: Sequence[bytes], *, tenant: Tenant = ACME, scope: str = "",
        space_id: bytes = b"", **options: Any,
    ) -> list[int]:  # fmt: skip
        """Writes a run; the blocks that are held."""
        space_id = space_id or self.space_id
        size = self.node.space(space_id).block_bytes
        incoming = await self.incoming(keys, tenant, scope, space_id, **options)
        try:
            for index in incoming.wanted:
                data = data_of(BlockRef(space_id, keys[index]), size)
                digest = block_digest(space_id, keys[index], data)
                await incoming.begin_block(index, size, digest)
                incoming.add(index, data)
            incoming.finish()
        finally:
            incoming.close()
        return incoming.held

    async def incoming(
        self, keys: Sequence[bytes], tenant: Tenant = ACME, scope: str = "",
        space_id: bytes = b"", **options: Any,
    ) -> Incoming:  # fmt: skip
        """The receiving end of a write."""
        space_id = space_id or self.space_id
        offer = await self.node.offer(tenant, scope, space_id, keys, **options)
        return Incoming(offer, self.node.metrics)

    async def match(
        self, keys: Sequence[bytes], *, tenant: Tenant = ACME, scopes: Sequence[str] = (),
        spaces: Sequence[bytes] = (), lease_s: float = 10.0, quietly: bool = True, **options: Any,
    ) -> Matched:  # fmt: skip
        """A match, with its promotion over."""
        matched = await self.node.match(
            tenant, spaces or [self.space_id], keys, scopes, lease_s=lease_s, **options
        )
        if quietly:
            await quiet(self.tiers)
        return matched

    async def read(
        self, keys: Sequence[bytes], *, tenant: Tenant = ACME, scopes: Sequence[str] = (),
        matched: Matched | None = None,
    ) -> list[str | None]:  # fmt: skip
        """Where each block came from, None for a miss; all bytes are checked."""
        lease_id = matched.lease.lease_id if matched and matched.lease else b""
        tiers: list[str | None] = []
        blocks = self.node.read(tenant, scopes, self.space_id, keys, lease_id)
        async with aclosing(blocks):
            async for block in blocks:
                key = keys[block.index]
                assert block.index == len(tiers)
                if block.view is None:
                    tiers.append(None)
                    continue
                assert block.view == data_of(BlockRef(self.space_id, key), BLOCK_BYTES)
                assert block.digest == block_digest(self.space_id, key, bytes(block.view))
                tiers.append(block.tier)
        return tiers

    async def press(self, word: str = "filler", blocks: int = 2 * SLOTS) -> None:
        """Writes more than memory holds."""
        await self.store(keys_of(word, blocks))

    def in_memory(self, keys: Sequence[bytes], tenant: Tenant = ACME) -> list[bool]:
        """Which blocks lie in memory now."""
        refs = self.node.refs(tenant, "", self.space_id, keys)
        return [self.tiers.memory.find(ref) is not None for ref in refs]


@pytest.fixture
async def store(rig: Rig) -> AsyncIterator[Store]:
    """A node whose leases may keep half of its memory."""
    store = Store(rig, await rig.disk(), SLOTS // 2, SLOTS)
    yield store
    store.tiers.memory.unpin_all(store.leases.end_all())
    await quiet(store.tiers)


@pytest.mark.parametrize("place", ["memory", "disk"])
async def test_a_block_whose_parent_is_discarded_while_it_comes_is_not_kept(
    store: Store, place: str
) -> None:
    """Nobody could match it. What follows it in the run passes by as well."""
    keys = keys_of("chain", 3)
    await store.store(keys[:1])
    if place == "disk":
        await store.press()
    assert store.in_memory(keys[:1]) == [place == "memory"]
    incoming = await store.incoming(keys)
    for index in incoming.wanted:
        data = data_of(BlockRef(store.space_id, keys[index]), BLOCK_BYTES)
        digest = block_digest(store.space_id, keys[index], data)
        await incoming.begin_block(index, BLOCK_BYTES, digest)
        incoming.add(index, data[:100])
        await store.tiers.discard(store.node.refs(ACME, "", store.space_id, keys[:1]))
        incoming.add(index, data[100:])
    incoming.finish()
    incoming.close()
    assert incoming.held == [0]
    assert store.in_memory(keys) == [False] * 3


async def test_a_caller_who_makes_a_block_its_own_ancestor_is_refused(store: Store) -> None:
    """He holds nothing of what he wrote, and memory goes on making room."""
    first, second, third = keys_of("chain", 3)
    await store.store([first, second])
    [slot] = [s for s in store.tiers.memory.slots() if s.ref.key == first]
    store.tiers.memory.evict(slot)
    assert await store.store([first], parent_key=second) == []
    assert await store.store([third], parent_key=first) == []
    await store.press()
    assert await store.store([first]) == [0]


# The rules of a match.


@pytest.mark.parametrize(
    ("rule", "present", "length"),
    [
        (MatchRule.ALL, "1111", 4),
        (MatchRule.ALL, "1101", 2),
        (MatchRule.ALL, "0111", 0),
        (MatchRule.TRAILING, "0011", 4),
        (MatchRule.TRAILING, "1101", 2),
        (MatchRule.TRAILING, "0110", 3),
        (MatchRule.TRAILING, "1000", 1),
        (MatchRule.TRAILING, "0100", 0),
        (MatchRule.BOUNDARY, "0001", 4),
        (MatchRule.BOUNDARY, "0100", 2),
        (MatchRule.BOUNDARY, "0000", 0),
    ],
)
def test_each_rule_by_example(rule: MatchRule, present: str, length: int) -> None:
    """All blocks, the last two before the length, or the one that ends at it."""
    descriptor = rules(rule)
    assert longest_match([descriptor], [[letter == "1" for letter in present]]) == length


def rules(rule: MatchRule, trailing: int = 2) -> SpaceDescriptor:
    """A space with a match rule."""
    blocks = trailing if rule is MatchRule.TRAILING else 0
    return descriptor_of(match_rule=rule, trailing_blocks=blocks)


def restorable(descriptor: SpaceDescriptor, present: Sequence[bool], length: int) -> bool:
    """Whether a prefix can be restored, in the words of the contract."""
    if descriptor.match_rule is MatchRule.ALL:
        window = range(length)
    elif descriptor.match_rule is MatchRule.TRAILING:
        window = range(length - min(length, descriptor.trailing_blocks), length)
    else:
        window = range(length - 1, length) if length else range(0)
    return all(present[block] for block in window)


def test_the_longest_match_is_the_brute_force_one(rng: random.Random) -> None:
    """For several spaces with any rules at once, against trying every length."""
    for _ in range(3000):
        spaces = [
            rules(rng.choice(list(MatchRule)), rng.randint(1, 6)) for _ in range(rng.randint(1, 4))
        ]
        blocks = rng.randint(0, 12)
        likely = rng.random()
        present = [[rng.random() < likely for _ in range(blocks)] for _ in spaces]
        lengths = [
            length
            for length in range(blocks + 1)
            if all(restorable(s, row, length) for s, row in zip(spaces, present, strict=True))
        ]
        longest = longest_match(spaces, present)
        assert longest == max(lengths)
        for space, row in zip(spaces, present, strict=True):
            assert all(row[block] for block in needed(space, longest))


async def test_a_match_over_spaces_of_all_rules(store: Store) -> None:
    """The runs of each space say what it needs of the matched length, and where that lies."""
    keys = keys_of("chain", 8)
    full, window, state = (
        store.node.open_space(rules(rule)) for rule in (MatchRule.ALL, *list(MatchRule)[1:])
    )
    await store.store(keys, space_id=full)
    await store.store(keys[3:6], space_id=window, parent_key=keys[2])
    await store.store(keys[4:5], space_id=state, parent_key=keys[3])
    matched = await store.match(keys, spaces=[full, window, state], lease_s=0)
    assert matched.blocks == 5
    shapes = [[(run.blocks, run.tier) for run in runs] for runs in matched.runs]
    assert shapes == [
        [(5, "memory")], [(3, ""), (2, "memory")], [(4, ""), (1, "memory")],
    ]  # fmt: skip


@pytest.mark.parametrize("rule", [MatchRule.TRAILING, MatchRule.BOUNDARY])
async def test_a_block_that_needs_no_parent_goes_below_again_without_it(
    store: Store, rule: MatchRule
) -> None:
    """Also after a match has promoted it: the blocks before it may be nowhere."""
    keys = keys_of("chain", 6)
    space = store.node.open_space(rules(rule))
    refs = store.node.refs(ACME, "", space, keys)
    assert await store.store(keys[3:], space_id=space, parent_key=keys[2]) == [0, 1, 2]
    await store.press()
    last = await store.tiers.locate(refs[-1:])
    assert (await store.match(keys, spaces=[space])).blocks == 6
    assert await store.tiers.locate(refs[-1:]) == ["memory"]
    await store.slow.discard(refs)
    await store.tiers.flush()
    assert await store.slow.locate(refs[-1:]) == last == ["disk"]


async def test_a_match_of_nothing(store: Store) -> None:
    """No keys, or none that is here: length 0, no runs, no lease."""
    for keys in ([], keys_of("absent", 5)):
        matched = await store.match(keys)
        assert (matched.blocks, matched.lease) == (0, None)
        assert [list(runs) for runs in matched.runs] == [[]]


async def test_blocks_that_the_caller_holds_count_and_are_not_leased(store: Store) -> None:
    """Held blocks need not be here; the match goes on behind them and leases only that."""
    keys = keys_of("chain", 10)
    await store.store(keys)
    [gone] = store.node.refs(ACME, "", store.space_id, keys[2:3])
    slot = store.tiers.memory.find(gone)
    assert slot is not None
    store.tiers.memory.evict(slot)
    assert (await store.match(keys, lease_s=0)).blocks == 2
    matched = await store.match(keys, held_blocks=4)
    assert matched.blocks == 10
    assert matched.lease is not None
    assert len(matched.lease.held) == 6
    assert [(run.blocks, run.tier) for run in matched.runs[0]] == [(4, ""), (6, "memory")]
    assert (await store.match(keys, held_blocks=10)).lease is None
    assert (await store.match(keys_of("absent", 5), held_blocks=3, lease_s=0)).blocks == 3


async def test_blocks_that_the_caller_holds_are_not_counted_as_found(
    rig: Rig, store: Store
) -> None:
    """A hit rate is what the store contributed; what it was not asked for is no part of it."""
    keys = keys_of("chain", 10)
    await store.store(keys[:6])
    await store.match(keys, held_blocks=4)
    assert (rig.counted("asked_blocks"), rig.counted("matched_blocks")) == (6, 2)
    await store.match(keys_of("absent", 5), held_blocks=5)
    assert (rig.counted("asked_blocks"), rig.counted("matched_blocks")) == (6, 2)


# Leases.


async def test_held_blocks_survive_memory_pressure(store: Store) -> None:
    """What a match found in memory stays there until it is released, whatever is written."""
    keys = keys_of("chain", 6)
    await store.store(keys)
    matched = await store.match(keys)
    assert [run.leased for run in matched.runs[0]] == [True]
    for number in range(3):
        await store.press(str(number))
        assert store.in_memory(keys) == [True] * 6
    assert await store.read(keys, matched=matched) == ["memory"] * 6
    assert matched.lease is not None
    store.node.release(ACME, matched.lease.lease_id)
    await store.press("at last")
    assert store.in_memory(keys) == [False] * 6


async def test_a_lease_promotes_what_lies_below(store: Store) -> None:
    """Blocks of the disk are likely, not leased; soon they are in memory, and stay."""
    keys = keys_of("chain", 6)
    await store.store(keys)
    await store.press()
    assert store.in_memory(keys) == [False] * 6
    matched = await store.match(keys)
    assert [(run.blocks, run.tier, run.leased) for run in matched.runs[0]] == [(6, "disk", False)]
    assert store.in_memory(keys) == [True] * 6
    await store.press("more")
    assert store.in_memory(keys) == [True] * 6
    assert await store.read(keys, matched=matched) == ["disk"] * 6, "where it lay when matched"


class Cold:
    """A node whose slower tier alone has a chain, larger than what a tier takes at first."""

    SIZE, COUNT = 4 << 20, 8

    def __init__(self, rig: Rig) -> None:
        self.below = Faulty(rig.memory(self.COUNT, slot_bytes=self.SIZE))
        guard = Guarded(
            self.below, lookup_timeout_s=30.0, timeout_s=30.0, clock=rig.clock, metrics=rig.metrics
        )
        self.tiers = Tiered(rig.memory(self.COUNT, slot_bytes=self.SIZE), guard, rig.metrics)
        self.node = Node(
            node_id="node", secret=bytes(32), tiers=self.tiers,
            leases=LeaseTable(2 * self.COUNT * self.SIZE), max_lease_s=MAX_LEASE_S,
            events=Events(), clock=rig.clock, metrics=rig.metrics,
            slow_is_full=guard.full, slow_room_bytes=lambda: guard.room_bytes,
        )  # fmt: skip
        self.space_id = self.node.open_space(descriptor_of(self.SIZE))
        self.keys = keys_of("cold", self.COUNT)
        self.refs = self.node.refs(ACME, "", self.space_id, self.keys)
        self.gate = asyncio.Event()

    async def fill(self) -> None:
        """From now on the slower tier answers when the gate is open."""
        for ref, parent in zip(self.refs, [None, *self.refs], strict=False):
            data = memoryview(bytes([ref.key[0]]) * self.SIZE)
            block = Block(ref, parent, block_digest(self.space_id, ref.key, data), data)
            assert await self.below.store([block]) == [True]

        async def wait(operation: str, refs: Sequence[BlockRef]) -> None:
            if operation == "load":
                await self.gate.wait()

        self.below.before = wait

    async def match(self) -> Lease:
        """The lease on all of it."""
        matched = await self.node.match(ACME, [self.space_id], self.keys, (), lease_s=10.0)
        assert matched.lease is not None
        return matched.lease

    async def read(self, lease: Lease) -> list[int | None]:
        """The last byte of each block, None for a miss."""
        reading = await self.node.reading(ACME, (), self.space_id, self.keys, lease.lease_id)
        [window] = reading.windows(self.COUNT * self.SIZE)
        blocks = await reading.pin(window, 10.0)
        self.tiers.release([block for block in blocks if block is not None])
        return [block.slot.view[-1] if block is not None else None for block in blocks]


@pytest.fixture
async def cold(rig: Rig) -> Cold:
    """A node that was started again, say."""
    cold = Cold(rig)
    await cold.fill()
    return cold


async def test_a_cold_prefix_arrives_whole_however_little_its_tier_takes_at_a_time(
    rig: Rig, cold: Cold
) -> None:
    """Who reads under a lease waits for its promotion, and asks the tier for nothing twice."""
    lease = await cold.match()
    await settle()
    reading = asyncio.create_task(cold.read(lease))
    await settle()
    cold.gate.set()
    assert await reading == [key[0] for key in cold.keys]
    assert [cold.below.asked["load", ref] for ref in cold.refs] == [1] * cold.COUNT
    assert rig.counted("tier_errors", tier="memory", cause="full") == 0
    cold.node.release(ACME, lease.lease_id)
    assert_idle(cold.tiers.memory)


async def test_who_waits_for_a_promotion_that_ends_early_looks_for_himself(cold: Cold) -> None:
    """The lease was released: what it would still have fetched, its reader fetches."""
    lease = await cold.match()
    await settle()
    reading = asyncio.create_task(cold.read(lease))
    await settle()
    cold.node.release(ACME, lease.lease_id)
    cold.gate.set()
    assert await reading == [key[0] for key in cold.keys]
    await quiet(cold.tiers)
    assert_idle(cold.tiers.memory)


async def test_a_lease_expires_by_the_clock(rig: Rig, store: Store) -> None:
    """Not before its time; soon afterwards its blocks may go, and its bytes are free."""
    keys = keys_of("chain", 6)
    await store.store(keys)
    matched = await store.match(keys, lease_s=10.0)
    assert matched.lease is not None
    await rig.clock.advance(10.0 - EXPIRY_PERIOD_S)
    assert len(store.leases) == 1
    await rig.clock.advance(2 * EXPIRY_PERIOD_S)
    assert (len(store.leases), store.leases.leased_bytes) == (0, 0)
    assert_idle(store.tiers.memory)
    await store.press()
    assert store.in_memory(keys) == [False] * 6
    assert await store.read(keys, matched=matched) == ["disk"] * 6


async def test_a_long_wish_is_shortened(rig: Rig, store: Store) -> None:
    """No lease lasts longer than the node allows."""
    keys = keys_of("chain", 2)
    await store.store(keys)
    matched = await store.match(keys, lease_s=1e9)
    assert matched.lease is not None
    assert matched.lease.expires_s == rig.clock.monotonic_s() + MAX_LEASE_S


async def test_a_wish_for_no_lease_gets_none(store: Store) -> None:
    """The length is answered, and nothing is pinned or promoted."""
    keys = keys_of("chain", 4)
    await store.store(keys)
    await store.press()
    matched = await store.match(keys, lease_s=0)
    assert (matched.blocks, matched.lease) == (4, None)
    assert store.in_memory(keys) == [False] * 4
    assert_idle(store.tiers.memory)


async def test_leased_bytes_are_capped(store: Store) -> None:
    """Beyond the limit blocks are matched but not leased; what is released is free again."""
    one, two = keys_of("one", 6), keys_of("two", 6)
    await store.store(one)
    await store.store(two)
    first = await store.match(one)
    second = await store.match(two)
    assert store.leases.leased_bytes == 8 * SLOT_BYTES == store.leases.capacity_bytes
    assert [(run.blocks, run.leased) for run in second.runs[0]] == [(2, True), (4, False)]
    third = await store.match(two)
    assert [(run.blocks, run.leased) for run in third.runs[0]] == [(6, False)]
    assert third.lease is None
    assert await store.read(two, matched=second) == ["memory"] * 6
    assert first.lease is not None
    store.node.release(ACME, first.lease.lease_id)
    assert store.leases.leased_bytes == 2 * SLOT_BYTES
    await store.press()
    assert store.in_memory(two[:2]) == [True] * 2


@pytest.mark.parametrize(("block_bytes", "leased"), [(100, 16), (4097, 8), (20_000, 2)])
async def test_a_leased_block_is_charged_what_it_takes_of_memory(
    store: Store, block_bytes: int, leased: int
) -> None:
    """Its slot, and its part of what the slots leave unused of a slab: others have the rest."""
    space_id = store.node.open_space(descriptor_of(block_bytes))
    keys = keys_of("chain", 20)
    assert len(await store.store(keys, space_id=space_id)) == 20
    matched = await store.match(keys, spaces=[space_id])
    assert matched.lease is not None
    assert len(matched.lease.held) == leased
    assert store.leases.leased_bytes == store.leases.capacity_bytes
    assert len(await store.store(keys_of("others", SLOTS))) == SLOTS


async def test_the_same_request_gets_its_lease_again(rig: Rig, store: Store) -> None:
    """A repeated match costs no second lease; another question ends the first one's."""
    keys = keys_of("chain", 6)
    await store.store(keys)
    first = await store.match(keys, request_id=b"request")
    again = await store.match(keys, request_id=b"request")
    assert first.lease is not None
    assert again.lease is first.lease
    assert again.blocks == first.blocks
    assert again.runs == first.runs
    assert len(store.leases) == 1
    other = await store.match(keys[:3], request_id=b"request")
    assert other.lease is not None
    assert other.lease.lease_id != first.lease.lease_id
    assert (len(store.leases), store.leases.leased_bytes) == (1, 3 * SLOT_BYTES)
    assert len({(await store.match(keys, request_id=b"")).lease for _ in range(2)}) == 2


async def test_the_same_request_at_the_same_time_gets_one_lease(store: Store) -> None:
    """A caller that repeats itself while the first answer is on its way leaves no second lease."""
    keys = keys_of("chain", 4)
    await store.store(keys)
    await store.press()
    gate = asyncio.Event()

    async def wait(operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == "locate":
            await gate.wait()

    store.slow.before = wait
    matches = [asyncio.create_task(store.match(keys, request_id=b"request")) for _ in range(3)]
    await settle()
    gate.set()
    leases = {matched.lease for matched in await asyncio.gather(*matches)}
    assert len(leases) == 1
    assert len(store.leases) == 1
    assert store.leases.leased_bytes == 4 * SLOT_BYTES


async def test_an_expired_lease_is_not_given_again(rig: Rig, store: Store) -> None:
    """A repeated request finds its old lease over, and gets a new one."""
    keys = keys_of("chain", 4)
    await store.store(keys)
    first = await store.match(keys, request_id=b"request", lease_s=1.1)
    await rig.clock.advance(1.2)
    again = await store.match(keys, request_id=b"request", lease_s=1.1)
    assert first.lease is not None
    assert again.lease is not None
    assert again.lease.lease_id != first.lease.lease_id
    assert again.lease.expires_s > rig.clock.monotonic_s()


async def test_a_lease_belongs_to_its_tenant(store: Store) -> None:
    """Another one can neither release it, read by it, nor get it by the same request id."""
    keys = keys_of("chain", 4)
    await store.store(keys)
    matched = await store.match(keys, request_id=b"request")
    assert matched.lease is not None
    store.node.release(RIVAL, matched.lease.lease_id)
    assert len(store.leases) == 1
    assert await store.read(keys, tenant=RIVAL, matched=matched) == [None] * 4
    theirs = await store.match(keys, tenant=RIVAL, request_id=b"request")
    assert (theirs.blocks, theirs.lease) == (0, None)
    await store.store(keys, tenant=RIVAL)
    theirs = await store.match(keys, tenant=RIVAL, request_id=b"request")
    assert theirs.lease is not None
    assert theirs.lease is not matched.lease
    store.node.release(ACME, matched.lease.lease_id)
    assert len(store.leases) == 1


async def test_releasing_what_is_unknown_or_over_does_nothing(store: Store) -> None:
    """Twice, or with an id that never was."""
    keys = keys_of("chain", 4)
    await store.store(keys)
    matched = await store.match(keys)
    assert matched.lease is not None
    for lease_id in (b"", b"never", matched.lease.lease_id, matched.lease.lease_id):
        store.node.release(ACME, lease_id)
    assert (len(store.leases), store.leases.leased_bytes) == (0, 0)
    assert_idle(store.tiers.memory)


async def test_a_lease_that_ends_during_its_promotion_leaves_no_pin(store: Store) -> None:
    """Released or expired while blocks are on their way up: they arrive, unpinned."""
    keys = keys_of("chain", 4)
    await store.store(keys)
    await store.press()
    reached, gate = asyncio.Event(), asyncio.Event()

    async def wait(operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == "load":
            reached.set()
            await gate.wait()

    store.slow.before = wait
    matched = await store.match(keys, quietly=False)
    assert matched.lease is not None
    await reached.wait()
    store.node.release(ACME, matched.lease.lease_id)
    gate.set()
    await quiet(store.tiers)
    assert_idle(store.tiers.memory)
    assert store.in_memory(keys) == [True] * 4


async def test_a_lease_names_no_more_than_it_has_room_for(store: Store) -> None:
    """So its own size is bounded too. A repetition gets the same answer, and all is delivered."""
    keys = keys_of("chain", 12)
    await store.store(keys)
    await store.press()
    first = await store.match([*keys, *keys_of("absent", 1000)], request_id=b"request")
    lease = first.lease
    assert lease is not None
    assert (first.blocks, len(lease.wants[0]), len(lease.tiers)) == (12, 8, 8)
    assert len(lease.asked) == 32
    again = await store.match([*keys, *keys_of("absent", 1000)], request_id=b"request")
    assert again.lease is lease
    assert [(run.blocks, run.tier, run.leased) for run in again.runs[0]] == [
        (8, "disk", True), (4, "disk", False),
    ]  # fmt: skip
    assert await store.read(keys, matched=first) == ["disk"] * 12


async def test_too_many_leases_of_one_tenant_are_not_granted(store: Store) -> None:
    """The answer comes without one; other tenants get theirs, until the node has too many."""
    store.leases._max_leases, store.leases._max_leases_per_tenant = 3, 2
    keys = keys_of("chain", 1)
    for tenant in (ACME, RIVAL):
        await store.store(keys, tenant=tenant)
    mine = [await store.match(keys) for _ in range(3)]
    assert [(each.blocks, each.lease is not None) for each in mine] == [
        (1, True), (1, True), (1, False),
    ]  # fmt: skip
    theirs = [await store.match(keys, tenant=RIVAL) for _ in range(2)]
    assert [each.lease is not None for each in theirs] == [True, False]
    assert mine[0].lease is not None
    store.node.release(ACME, mine[0].lease.lease_id)
    assert (await store.match(keys, tenant=RIVAL)).lease is not None
    assert (await store.match(keys)).lease is None


# Long matches.


@pytest.fixture
def short_slices(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chains of a few blocks are long ones."""
    monkeypatch.setattr("kvstore.finding.SLICE_BLOCKS", 4)
    return 4


async def test_others_run_between_the_parts_of_a_long_match(
    store: Store, short_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between lookups, between spaces, and while the policy is told: of the tail first."""
    other = store.node.open_space(descriptor_of(numerics="other"))
    keys = keys_of("chain", 10)
    await store.store(keys, scope="shared")
    await store.store(keys[:7], space_id=other)
    steps: list[int] = []
    told: list[list[BlockRef]] = []

    def step(refs: Sequence[BlockRef]) -> None:
        steps[-1] += len(refs)

    async def look(refs: Sequence[BlockRef]) -> list[str | None]:
        step(refs)
        return await locate(refs)

    def use(use: Use[BlockRef]) -> None:
        step(use.chain)
        told.append(list(use.chain))

    async def others() -> None:
        while True:
            steps.append(0)
            await asyncio.sleep(0)

    locate = store.tiers.memory.locate
    monkeypatch.setattr(store.tiers.memory, "locate", look)
    monkeypatch.setattr(store.tiers.memory, "use", use)
    running = asyncio.create_task(others())
    await settle()
    matched = await store.match(keys, spaces=[store.space_id, other], scopes=("", "shared"))
    running.cancel()
    assert matched.blocks == 7
    assert max(steps) == short_slices
    shared, private = (
        store.node.refs(ACME, scope, store.space_id, keys) for scope in ("shared", "")
    )
    assert told[:3] == [shared[8:], shared[4:8], shared[:4]]
    assert not set(private) & {ref for chain in told for ref in chain}
    assert sum(map(len, told[3:])) == 10


@pytest.mark.parametrize("rule", list(MatchRule))
async def test_a_long_match_finds_what_a_short_one_does(
    store: Store, rule: MatchRule, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the slices: with gaps, scopes, held blocks, and over several spaces."""
    one, two = (store.node.open_space(rules(each, 3)) for each in (rule, MatchRule.ALL))
    keys = keys_of("chain", 14)
    for space_id in (one, two):
        await store.store(keys, space_id=space_id)
        await store.store(keys[:5], space_id=space_id, scope="shared")
    for _ in range(20):
        gone = store.node.refs(ACME, "", rng.choice([one, two]), [rng.choice(keys)])
        await store.tiers.discard(gone)
        await store.store(keys[: rng.randint(1, 14)], space_id=two)
        question: dict[str, Any] = {
            "spaces": rng.sample([one, two], rng.randint(1, 2)),
            "held_blocks": rng.choice([0, 0, rng.randrange(14)]),
            "scopes": rng.choice([(), ("shared", ""), ("", "shared")]),
        }
        lengths = set()
        for size in (1000, 1, 3, 14):
            monkeypatch.setattr("kvstore.finding.SLICE_BLOCKS", size)
            matched = await store.match(keys, **question)
            lengths.add(matched.blocks)
            assert all(sum(run.blocks for run in runs) in lengths for runs in matched.runs)
            if matched.lease is not None:
                store.node.release(ACME, matched.lease.lease_id)
        assert len(lengths) == 1
        assert_idle(store.tiers.memory)


async def test_when_time_is_up_a_long_match_answers_what_memory_has(
    store: Store, short_slices: int
) -> None:
    """It looks at the clock before each slice; slower tiers are then asked no more."""
    cold = keys_of("cold", 12)
    await store.store(cold)
    await store.press()
    store.slow.asked.clear()
    times = iter([1.0])
    matched = await store.match(cold, lease_s=0, left_s=lambda: next(times, -1.0))
    assert matched.blocks == short_slices
    refs = store.node.refs(ACME, "", store.space_id, cold)
    assert [store.slow.asked["locate", ref] > 0 for ref in refs] == [True] * 4 + [False] * 8


@pytest.mark.parametrize("released", [True, False])
async def test_a_match_that_ends_while_its_lease_is_granted_leaves_no_pin(
    store: Store, short_slices: int, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller has gone, or somebody released the lease, between two slices of its pins."""
    keys = keys_of("chain", 8)
    await store.store(keys)
    granted, grant = asyncio.Event(), store.leases.grant

    def note(lease: Lease) -> bool:
        granted.set()
        return grant(lease)

    monkeypatch.setattr(store.leases, "grant", note)
    match = asyncio.create_task(store.match(keys, request_id=b"request"))
    await granted.wait()
    lease = store.leases.of_request(ACME.name, b"request")
    assert lease is not None
    assert len(lease.held) == short_slices
    if released:
        again = await store.node.match(
            ACME, [store.space_id], keys, (), lease_s=10.0, request_id=b"request"
        )
        assert (again.blocks, again.lease) == (8, lease)
        store.node.release(ACME, lease.lease_id)
        matched = await match
        assert (matched.blocks, matched.lease) == (8, None)
        assert not any(run.leased for run in matched.runs[0])
    else:
        match.cancel()
        await asyncio.wait([match])
    assert (len(store.leases), store.leases.leased_bytes) == (0, 0)
    assert_idle(store.tiers.memory)


def test_a_lease_that_grows_under_a_read_is_known_to_the_next_one() -> None:
    """What reads ask for is kept, and made anew when there is more."""
    refs = [BlockRef(bytes(32), key) for key in keys_of("chain", 5)]
    lease = Lease(b"lease", "acme", b"", 1.0, b"", 5)
    lease.shares = [Share(size=7, above=refs[0], is_chain=True, beyond=(4, "disk"))]
    lease.add(0, refs[1:3], ["memory", "disk"])
    assert lease.known == {
        refs[1]: Want(refs[1], refs[0], 7), refs[2]: Want(refs[2], refs[1], 7),
    }  # fmt: skip
    lease.add(0, refs[3:], ["disk", "redis"])
    assert lease.known is lease.known
    assert list(lease.known) == refs[1:]
    assert lease.tiers == dict(zip(refs[1:], ["memory", "disk", "disk", "redis"], strict=True))
    assert lease.shares[0].wants(2) == [Want(refs[3], refs[2], 7), Want(refs[4], refs[3], 7)]


async def test_leases_follow_their_model(rng: random.Random) -> None:
    """Random grants, reservations and ends, against plain sums."""
    table = LeaseTable(1000)
    live: list[Lease] = []
    names = itertools.count()
    for _ in range(2000):
        if live and rng.random() < 0.4:
            lease = live.pop(rng.randrange(len(live)))
            assert table.end(lease) == []
            assert table.end(lease) == []
        else:
            name = str(next(names)).encode()
            lease = Lease(name, "acme", name, rng.random(), b"", 0)
            table.grant(lease)
            live.append(lease)
            size, count = rng.randrange(1, 300), rng.randrange(4)
            left = 1000 - sum(each.reserved_bytes for each in live)
            assert table.reserve(lease, size, count) == min(count, left // size)
        assert len(table) == len(live)
        assert table.leased_bytes == sum(lease.reserved_bytes for lease in live)
        table.check()
    assert {lease.lease_id for lease in live} == {
        lease.lease_id for lease in live if table.find("acme", lease.lease_id) is lease
    }
    table.end_expired(0.5)
    assert len(table) == sum(lease.expires_s > 0.5 for lease in live)
    table.end_all()
    assert (len(table), table.leased_bytes) == (0, 0)


async def test_what_leaves_memory_between_look_up_and_lease_is_fetched_again(
    store: Store, short_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A match keeps in hand what it has seen; the slot of a block that went is not the block."""
    keys = keys_of("chain", 8)
    await store.store(keys)
    await store.tiers.flush()
    refs = store.node.refs(ACME, "", store.space_id, keys)
    grant = store.leases.grant

    def lose(lease: Lease) -> bool:
        for ref in reversed(refs[2:]):
            slot = store.tiers.memory.find(ref)
            assert slot is not None
            store.tiers.memory.evict(slot)
        return grant(lease)

    monkeypatch.setattr(store.leases, "grant", lose)
    matched = await store.match(keys)
    assert matched.lease is not None
    assert [(run.blocks, run.tier, run.leased) for run in matched.runs[0]] == [
        (2, "memory", True), (6, "memory", False),
    ]  # fmt: skip
    assert [slot.ref for slot in matched.lease.held] == refs
    assert all(slot.indexed and slot.pins == 1 for slot in matched.lease.held)
    assert await store.read(keys, matched=matched) == ["memory"] * 8


async def test_the_policy_hears_of_a_match_behind_its_answer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon, without being asked; and who evicts meets a policy that has heard of it."""
    keys = keys_of("chain", 3)
    await store.store(keys)
    policy, settle = store.tiers.memory._policy, store.tiers.memory.settle
    heard = asyncio.Event()

    def hear() -> bool:
        more = settle()
        if not more:
            heard.set()
        return more

    monkeypatch.setattr(store.tiers.memory, "settle", hear)
    monkeypatch.setattr("kvstore.policy.deferred._STEP_COST", 1)
    for _ in range(3):
        await store.match(keys, lease_s=0, quietly=False)
    assert policy.waiting == 3 * (1 + 3)
    await heard.wait()
    assert policy.waiting == 0
    await store.match(keys, lease_s=0, quietly=False)
    assert policy.waiting == 1 + 3
    assert store.tiers.memory.slots()
    assert policy.waiting == 0


async def test_a_write_has_the_policy_hear_of_matches_in_steps(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few at a time, and others run in between; what comes meanwhile does not hold it up."""
    # Ahead of the first request, whose timer would have the policy hear of a step in between.
    monkeypatch.setattr("kvstore.node.SETTLE_PERIOD_S", 1000.0)
    keys = keys_of("chain", 3)
    await store.store(keys)
    monkeypatch.setattr("kvstore.policy.deferred._STEP_COST", 4)
    policy = store.tiers.memory._policy
    for _ in range(5):
        await store.match(keys, lease_s=0, quietly=False)
    waiting: list[int] = []

    async def others() -> None:
        while True:
            waiting.append(policy.waiting)
            store.tiers.memory.use(Use([], 0.0))
            await asyncio.sleep(0)

    running = asyncio.create_task(others())
    assert len(await store.store(keys_of("new", 2))) == 2
    running.cancel()
    assert waiting[:3] == [20 - 4, 20 - 8 + 1, 20 - 12 + 2]


async def test_a_match_over_several_places_says_where_each_run_lies(store: Store) -> None:
    """Runs are as long as they can be, in memory and below, leased or beyond the leases' limit."""
    keys = keys_of("chain", 12)
    await store.store(keys)
    await store.tiers.flush()
    refs = store.node.refs(ACME, "", store.space_id, keys)
    for ref in reversed(refs[3:6]):
        slot = store.tiers.memory.find(ref)
        assert slot is not None
        store.tiers.memory.evict(slot)
    first = await store.match(keys, request_id=b"request")
    runs = [(run.blocks, run.tier, run.leased) for run in first.runs[0]]
    assert runs == [
        (3, "memory", True), (3, "disk", False), (2, "memory", True), (4, "memory", False),
    ]  # fmt: skip
    again = await store.match(keys, request_id=b"request")
    assert again.lease is first.lease is not None
    assert [(run.blocks, run.tier, run.leased) for run in again.runs[0]] == [
        (3, "memory", True), (3, "disk", True), (2, "memory", True), (4, "memory", False),
    ]  # fmt: skip
    assert sorted(first.lease.known) == sorted(first.lease.tiers) == sorted(refs[:8])
    assert [want.parent for want in first.lease.wants[0]] == [None, *refs[:7]]


# Reads.


async def test_a_read_pins_a_window_at_a_time(store: Store) -> None:
    """A block's view holds until the next one is asked for; then it may go."""
    keys = keys_of("chain", 6)
    await store.store(keys)
    blocks = store.node.read(ACME, (), store.space_id, keys)
    first = await anext(blocks)
    assert any(slot.pins for slot in store.tiers.memory.slots())
    await store.press()
    assert first.view is not None
    assert bytes(first.view) == data_of(BlockRef(store.space_id, keys[0]), BLOCK_BYTES)
    await blocks.aclose()
    assert_idle(store.tiers.memory)


async def test_a_read_of_a_block_twice(store: Store) -> None:
    """Each place is answered, and nothing stays pinned, with a lease or without."""
    keys = keys_of("chain", 3)
    await store.store(keys)
    matched = await store.match(keys)
    question = [keys[0], keys[1], keys[0], keys[2], keys[0]]
    assert await store.read(question) == ["memory"] * 5
    assert await store.read(question, matched=matched) == ["memory"] * 5
    assert matched.lease is not None
    store.node.release(ACME, matched.lease.lease_id)
    assert_idle(store.tiers.memory)
    await store.press()
    assert await store.read(question) == ["disk"] * 5
    matched = await store.match(keys, spaces=[store.space_id] * 2)
    assert await store.read(question, matched=matched) == ["disk"] * 5
    assert matched.lease is not None
    store.node.release(ACME, matched.lease.lease_id)
    assert_idle(store.tiers.memory)


@pytest.mark.parametrize("leased_first", [True, False])
async def test_a_herd_causes_one_read(store: Store, leased_first: bool) -> None:
    """Of callers with a lease and without, at once and a little later, whoever comes first."""
    keys = keys_of("chain", 1)
    await store.store(keys)
    await store.press()
    reached, gate = asyncio.Event(), asyncio.Event()

    async def wait(operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == "load":
            reached.set()
            await gate.wait()

    store.slow.before = wait

    async def leased() -> list[str | None]:
        return await store.read(keys, matched=await store.match(keys, quietly=False))

    async def loose() -> list[str | None]:
        return await store.read(keys)

    callers = []
    for caller in (leased, loose) if leased_first else (loose, leased):
        callers += [asyncio.create_task(caller()) for _ in range(50)]
        await reached.wait()
        await settle()
    gate.set()
    for tiers in await asyncio.gather(*callers):
        assert None not in tiers
    assert None not in await store.read(keys)
    [ref] = store.node.refs(ACME, "", store.space_id, keys)
    assert store.slow.asked["load", ref] == 1


async def test_when_time_is_up_a_read_ends_with_misses(store: Store) -> None:
    """What memory has is delivered; what would have to be waited for is not."""
    cold, warm = keys_of("cold", 4), keys_of("warm", 4)
    await store.store(cold)
    await store.press()
    await store.store(warm)
    gate = asyncio.Event()

    async def wait(operation: str, refs: Sequence[BlockRef]) -> None:
        await gate.wait()

    store.slow.before = wait
    for times, expected in (([0.01], [None] * 4 + ["memory"] * 4), ([-1.0], [None] * 8)):
        blocks = store.node.read(ACME, (), store.space_id, [*cold, *warm], left_s=times.pop)
        assert [block.tier or None async for block in blocks] == expected
    matched = await store.node.match(
        ACME, [store.space_id], [*warm, *cold], (), left_s=lambda: 0.01
    )
    assert matched.blocks == 4
    assert_idle(store.tiers.memory)
    gate.set()
    await quiet(store.tiers)


async def test_what_only_a_busy_tier_has_is_refused_at_once(store: Store) -> None:
    """Before the first block; what is at hand is served as ever."""
    cold, warm = keys_of("cold", 4), keys_of("warm", 4)
    await store.store(cold)
    await store.press()
    await store.store(warm)
    store.node._slow_is_full = lambda size: size >= BLOCK_BYTES
    with pytest.raises(Shed) as shed:
        await store.read(cold)
    assert (shed.value.reason, shed.value.retry_s > 0) == ("tier", True)
    assert await store.read(warm) == ["memory"] * 4
    assert await store.read([*cold, *warm]) == ["disk"] * 4 + ["memory"] * 4


async def test_scopes_are_searched_in_order(store: Store) -> None:
    """The first scope that has a block delivers it; a chain may go on in another scope."""
    keys = keys_of("chain", 6)
    await store.store(keys[:4], scope="shared")
    await store.store(keys[3:], parent_key=keys[2], parent_scope="shared")
    for scopes, blocks in (
        ((), 0), (("shared",), 4), (("shared", ""), 6), (("", "shared"), 6), (("nobody",), 0),
    ):  # fmt: skip
        assert (await store.match(keys, scopes=scopes, lease_s=0)).blocks == blocks
    assert await store.read(keys, scopes=("shared", "")) == ["memory"] * 6
    shared, private = (
        store.node.refs(ACME, scope, store.space_id, keys) for scope in ("shared", "")
    )
    for scopes, wanted in (
        (("shared", ""), [*shared[:4], *private[4:]]),
        (("", "shared"), [*shared[:3], *private[3:]]),
    ):
        matched = await store.match(keys, scopes=scopes)
        assert matched.lease is not None
        assert [want.ref for want in matched.lease.wants[0]] == wanted
        store.node.release(ACME, matched.lease.lease_id)


async def test_scopes_of_tenants_are_their_own(store: Store) -> None:
    """The same scope name of another tenant is another scope."""
    keys = keys_of("chain", 4)
    await store.store(keys, scope="shared")
    assert (await store.match(keys, tenant=RIVAL, scopes=("shared", ""))).blocks == 0
    for scope in ("a b", "-a", "a" * 64, "ä", ".."):
        with pytest.raises(InvalidArgument, match="scope"):
            await store.match(keys, scopes=(scope,))


# Hints.


async def test_hints_are_counted_and_reach_the_policy(
    rig: Rig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By match, by write and alone, with the owner's session; they change no answer."""
    told: list[tuple[str, Use[BlockRef]]] = []
    memory = store.tiers.memory
    monkeypatch.setattr(memory, "use", lambda use: told.append(("use", use)))
    monkeypatch.setattr(memory, "advise", lambda use: told.append(("advise", use)))
    keys = keys_of("chain", 4)
    tool = ReuseHint(b"session", Reuse.AUTOMATIC, 1500)
    human = ReuseHint(b"session", Reuse.INTERACTIVE, 60_000)
    await store.store(keys, hint=tool)
    assert (await store.match(keys, hint=human, lease_s=0)).blocks == 4
    assert (await store.match(keys, lease_s=0)).blocks == 4
    store.node.hint(ACME, "", store.space_id, keys, ReuseHint(reuse=Reuse.FINAL))
    store.node.hint(RIVAL, "", store.space_id, keys, tool)
    assert [(what, use.hint) for what, use in told] == [
        ("advise", tool),
        ("use", human),
        ("use", None),
        ("advise", ReuseHint(reuse=Reuse.FINAL)),
        ("advise", tool),
    ]
    sessions = [use.session for _, use in told]
    assert sessions[0] == sessions[1] is not None
    assert sessions[2] is sessions[3] is None
    assert sessions[4] != sessions[0], "sessions of two tenants met"
    chains = [list(use.chain) for _, use in told]
    assert chains[0] == chains[1] == store.node.refs(ACME, "", store.space_id, keys)
    assert not set(chains[4]) & set(chains[0])
    for reuse, count in (("automatic", 2), ("interactive", 1), ("final", 1)):
        assert rig.counted("hints", reuse=reuse) == count


async def test_a_run_without_its_parent_is_not_wanted(store: Store) -> None:
    """Nobody could ever match it; once the parent is here, it is."""
    keys = keys_of("chain", 4)
    assert await store.store(keys[2:], parent_key=keys[1]) == []
    assert await store.store(keys[:2]) == [0, 1]
    assert await store.store(keys[2:], parent_key=keys[1]) == [0, 1]
    assert (await store.match(keys, lease_s=0)).blocks == 4


def test_a_hint_out_of_range_is_named_or_clamped() -> None:
    """A session id that is too long is a mistake; a return in years is a day."""
    with pytest.raises(InvalidArgument, match=r"hint\.session_id"):
        ReuseHint(b"s" * 33)
    with pytest.raises(InvalidArgument, match=r"hint\.expected_return_ms"):
        ReuseHint(expected_return_ms=-1)
    assert ReuseHint(expected_return_ms=2**40).expected_return_ms == MAX_RETURN_MS


# Events, spaces, ends.


async def test_a_watcher_that_does_not_keep_up_loses_the_oldest() -> None:
    """Everybody gets what happens from when he begins to watch, and the node never waits."""
    events = Events()
    events.publish(SegmentSealed(0, 0, 0))
    await settle()
    with events.watch() as fast, events.watch() as slow:
        for number in range(1, QUEUE_LENGTH + 11):
            await asyncio.to_thread(events.publish, SegmentSealed(number, 0, 0))
            await settle()
            assert fast.get_nowait() == SegmentSealed(number, 0, 0)
        left = [slow.get_nowait() for _ in range(slow.qsize())]
        assert left == [SegmentSealed(number, 0, 0) for number in range(11, QUEUE_LENGTH + 11)]
    events.publish(Draining())
    await settle()
    assert slow.empty()


async def test_spaces_are_opened_within_limits(store: Store) -> None:
    """Idempotently, and not larger than memory can take."""
    descriptor = descriptor_of(numerics="other")
    assert store.node.open_space(descriptor) == store.node.open_space(descriptor)
    assert len(store.node.spaces) == 2
    with pytest.raises(InvalidArgument, match=r"descriptor\.block_bytes.*memory\.slab_bytes"):
        store.node.open_space(descriptor_of(block_bytes=1 << 20))
    with pytest.raises(UnknownSpace, match="OpenSpace"):
        store.node.space(bytes(32))


async def test_who_opens_many_spaces_locks_nobody_out(store: Store) -> None:
    """The space that was used the longest ago gives way; opened again, it has its blocks.

    A lease outlives that, and what is in use is not the one to go.
    """
    keys = keys_of("chain", 4)
    await store.store(keys)
    matched = await store.match(keys)
    busy = store.node.open_space(descriptor_of(numerics="busy"))
    for number in range(MAX_SPACES + 10):
        store.node.open_space(descriptor_of(numerics=str(number)))
        store.node.refs(RIVAL, "", busy, ())
    assert len(store.node.spaces) == MAX_SPACES
    with pytest.raises(UnknownSpace, match="OpenSpace"):
        await store.read(keys, matched=matched)
    store.node.open_space(descriptor_of())
    await store.press()
    assert await store.read(keys, matched=matched) == ["memory"] * 4


async def test_names_of_scopes_that_callers_invent_are_not_kept_for_ever(store: Store) -> None:
    """What a scope is called in here is computed again, and is the same."""
    keys = keys_of("chain", 2)
    await store.store(keys, scope="first")
    for number in range(NAMESPACES + 10):
        store.node.refs(ACME, f"scope-{number}", store.space_id, ())
    assert store.node._namespace.cache_info().currsize == NAMESPACES
    assert (await store.match(keys, scopes=["first"], lease_s=0)).blocks == 2


async def test_closing_flushes_memory_and_ends_leases(rig: Rig) -> None:
    """What only memory had lies on disk; leases and background work are over."""
    disk = await rig.disk()
    store = Store(rig, disk, SLOTS, SLOTS)
    keys = keys_of("chain", 6)
    await store.store(keys)
    await store.match(keys)
    rig.gone(store.tiers.memory)
    rig.gone(disk)
    await store.node.close(flush_timeout_s=60, close_timeout_s=60)
    assert (len(store.leases), store.leases.leased_bytes) == (0, 0)
    assert len(disk._index) == 6
    assert rig.sealed == [(1, 6, 6 * BLOCK_BYTES)]


async def test_closing_may_take_what_the_flush_leaves_over(rig: Rig) -> None:
    """A device that is slow to seal is not given up while there is time."""
    runner = GatedRunner()
    disk = await rig.disk(runner=runner)
    store = Store(rig, disk, SLOTS, SLOTS)
    await store.store(keys_of("chain", 6))
    await store.tiers.flush()
    rig.gone(store.tiers.memory)
    rig.gone(disk)
    runner.held = True
    closing = asyncio.create_task(store.node.close(flush_timeout_s=60, close_timeout_s=0))
    await settle()
    assert not closing.done()
    await runner.release()
    await closing
    assert rig.sealed == [(1, 6, 6 * BLOCK_BYTES)]


async def test_closing_closes_the_tiers_also_when_the_flush_fails(rig: Rig) -> None:
    """What lies on disk already is sealed, whatever became of the rest."""
    disk = await rig.disk()
    store = Store(rig, disk, SLOTS, SLOTS)
    await store.store(keys_of("chain", 6))
    await store.tiers.flush()

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        raise ZeroDivisionError(operation)

    store.slow.before = fail
    rig.gone(store.tiers.memory)
    rig.gone(disk)
    with pytest.raises(ZeroDivisionError):
        await store.node.close(flush_timeout_s=60, close_timeout_s=60)
    assert rig.sealed == [(1, 6, 6 * BLOCK_BYTES)]
