"""Memory over a slower tier, as one tier.

What memory evicts is demoted; what a match finds below is promoted. Demotion writes a block's
ancestors before the block, so that whatever lies below can be matched from its start. Children
leave memory before their parents, so that whatever lies here or below can be matched as well.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage
from kvstore.held import HeldSlot
from kvstore.metrics import Metrics
from kvstore.policy.policy import Use
from kvstore.runner import Runner
from kvstore.tiers.beyond import Beyond
from kvstore.tiers.digests import Digests
from kvstore.tiers.lending import Lending, Lent
from kvstore.tiers.memory import Memory, Slot
from kvstore.tiers.oblivion import Concerns, Oblivion, Watch

BATCH_BYTES = 64 << 20
"""At most about this much goes to the slower tier at once, so that its deadline can hold."""


class Want(NamedTuple):
    """A block that shall be in memory. Its parent is what demotion will need to know."""

    ref: BlockRef
    parent: BlockRef | None
    size: int


class Acquired(NamedTuple):
    """A block in memory, pinned for the caller, and the tier in which it lay before."""

    slot: Slot
    tier: str


class Tiered:
    """`memory` over `slow`; without `slow`, what memory evicts is gone.

    What `peers` hold is found, read and promoted like what lies in `slow`. But nothing is written
    to them; what they have is wanted here all the same, and nothing is taken from a writer whose
    parent only they have: they may forget it, and this node's own tiers would have a gap.

    One promotion per block however many ask: later callers wait for the first one's.

    What is being forgotten is neither demoted nor promoted until it is, so that it cannot turn up
    again behind the answer; nobody else waits for it.
    """

    name = "tiered"

    def __init__(
        self,
        memory: Memory,
        slow: Tier | None,
        metrics: Metrics,
        runner: Runner | None = None,
        peers: Tier | None = None,
    ) -> None:
        self.memory = memory
        self.digests = Digests(memory, runner)
        keep_bytes = min(memory.capacity_bytes // 16, BATCH_BYTES)
        self._own = slow
        """What is written to, and closed under ancestors."""
        below = Beyond(slow, peers) if slow is not None and peers is not None else slow or peers
        self._slow = Lending(below, metrics, keep_bytes=keep_bytes) if below is not None else None
        """What is read from."""
        self._metrics = metrics
        self._promoting: dict[BlockRef, asyncio.Task[dict[BlockRef, Acquired]]] = {}
        self._going_below: dict[asyncio.Future[None], list[BlockRef]] = {}
        """What is being written to the slower tier, by what will be done when it is over."""
        self.oblivion = Oblivion()
        self._making_room = asyncio.Lock()
        self._demote_bytes = min(max(1, memory.capacity_bytes // 16), BATCH_BYTES)

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return await self._locate(refs, self._slow)

    async def locate_own(self, refs: Sequence[BlockRef]) -> list[str | None]:
        """As `locate`, without what only peers hold: nobody may build on that."""
        return await self._locate(refs, self._own)

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return [place is None for place in await self.locate_own(refs)]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        """Fills the buffers without promoting: that needs the chain, see `acquire`."""
        here = (self.memory.find(load.ref) for load in loads)
        await self.digests.settle(slot for slot in here if slot is not None)
        answers = await self.memory.load(loads)
        missing = [index for index, answer in enumerate(answers) if answer is None]
        if missing and self._slow is not None:
            below = await self._slow.load([loads[index] for index in missing])
            for index, answer in zip(missing, below, strict=True):
                answers[index] = answer
        return answers

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        self.memory.expect(Use([block.ref for block in blocks], self.memory.clock.monotonic_s()))
        held = []
        for block in blocks:
            slot = await self.reserve(block.ref, len(block.data))
            if slot is not None:
                slot.view[:] = block.data
                slot = self.memory.commit(slot, block.parent, block.digest)
            held.append(slot is not None)
        return held

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        gone, namespaces = set(refs), {ref.namespace for ref in refs}
        return await self._forget(
            lambda tier: tier.discard(refs), lambda ref: ref in gone, namespaces
        )

    async def clear(self, namespace: bytes) -> int:
        return await self._forget(
            lambda tier: tier.clear(namespace),
            lambda ref: ref.namespace == namespace,
            {namespace},
        )

    def usage(self) -> list[Usage]:
        return self.memory.usage() + (self._slow.usage() if self._slow is not None else [])

    async def close(self) -> None:
        if self._promoting:
            await asyncio.wait(set(self._promoting.values()))
        await self.digests.close()
        if self._slow is not None:
            await self._slow.close()
        await self.memory.close()

    # What the node builds on beside the tier's methods.

    async def reserve(self, ref: BlockRef, size: int) -> Slot | None:
        """An empty slot to fill and commit, demoting what is coldest; None if all is pinned."""
        slot = self.memory.reserve(ref, size)
        if slot is not None:
            return slot
        async with self._making_room:
            while (slot := self.memory.reserve(ref, size)) is None:
                victims = self.memory.coldest(
                    size, self._demote_bytes, parents=self._own is not None
                )
                if not victims and await self.digests.catch_up():
                    continue  # They were pinned for their digests.
                if not victims or not await self._demote(victims):
                    return None
        return slot

    async def acquire(self, wants: Sequence[Want]) -> list[Acquired | None]:
        """The blocks in memory, promoted where needed and pinned; None for what is nowhere.

        The caller unpins each slot that it got.
        """
        mine = {
            want.ref: want
            for want in wants
            if self.memory.find(want.ref) is None
            and want.ref not in self._promoting
            and not self.oblivion.concerns(want.ref)
        }
        begin = bool(mine) and self._slow is not None
        promotion = self._start_promotion(list(mine.values())) if begin else None
        others = {self._promoting[w.ref] for w in wants if w.ref in self._promoting} - {promotion}
        try:
            if others:
                await asyncio.wait(others)
            promoted = dict(await asyncio.shield(promotion)) if promotion is not None else {}
        except asyncio.CancelledError:
            if promotion is not None:
                promotion.add_done_callback(self._unpin_all)
            raise
        # A promoted block carries one pin: a second place that asks for it needs its own.
        return [promoted.pop(want.ref, None) or self.pin(want) for want in wants]

    def promoting(self, ref: BlockRef) -> bool:
        """Whether the block is on its way into memory: `acquire` then begins nothing for it."""
        return ref in self._promoting

    def at_hand(self, ref: BlockRef) -> bool:
        """Whether the block can be had without another read of a slower tier."""
        here = self.memory.find(ref) is not None or self.promoting(ref)
        return here or (self._slow is not None and self._slow.lends(ref))

    async def lend(self, sizes: Mapping[BlockRef, int]) -> dict[BlockRef, Lent]:
        """Blocks from below, of these sizes, for who does not know their chain."""
        return await self._slow.lend(sizes) if self._slow is not None else {}

    def pin(self, want: Want) -> Acquired | None:
        """The block, pinned, if it is in memory now."""
        slot = self.memory.find(want.ref)
        if slot is None or slot.size != want.size:
            return None
        return Acquired(self.memory.pin(slot), self.memory.name)

    def pin_all(self, wants: Sequence[Want]) -> list[Acquired]:
        """The blocks, pinned, if all are in memory now with their digests; otherwise none."""
        slots = [self.memory.find(want.ref) for want in wants]
        for slot, want in zip(slots, wants, strict=True):
            if slot is None or slot.size != want.size or not slot.digest:
                return []
        return [Acquired(self.memory.pin(slot), self.memory.name) for slot in slots if slot]

    def release(self, acquired: Iterable[Acquired]) -> None:
        """Unpins what `acquire` pinned."""
        for block in acquired:
            self.memory.unpin(block.slot)

    async def forget_here(
        self, find: Callable[[], Sequence[BlockRef]], below: Callable[[], Awaitable[int]],
        concerns: Concerns,
    ) -> int:  # fmt: skip
        """Forgets blocks for a peer, who has others asked for himself; how many copies there were.

        `find` says which of them lie in memory, `below` forgets them on disk.
        """
        return await self._forget_both(
            lambda: self.memory.discard(find()),
            lambda: self._slow.forget(below(), concerns) if self._slow is not None else below(),
            concerns,
            lambda ref: True,
        )

    async def flush(self) -> None:
        """Writes everything that only memory has to the slower tier; memory keeps its copies."""
        if self._own is not None:
            await self._write_below([slot for slot in self.memory.slots() if slot.indexed])

    async def _forget(
        self,
        forget: Callable[[Tier], Awaitable[int]],
        concerns: Concerns,
        namespaces: set[bytes],
    ) -> int:
        slow = self._slow
        return await self._forget_both(
            lambda: forget(self.memory),
            (lambda: forget(slow)) if slow is not None else None,
            concerns,
            lambda ref: ref.namespace in namespaces,
        )

    async def _forget_both(
        self,
        above: Callable[[], Awaitable[int]],
        below: Callable[[], Awaitable[int]] | None,
        concerns: Concerns,
        is_near: Concerns,
    ) -> int:
        """Forgets above and below, also what is between the two at that moment."""
        with self.oblivion.forgetting(concerns):
            copies = await above()
            if below is None:
                return copies
            try:
                await self._wait_below(concerns)
                copies += await below()
            finally:
                copies += await above()  # What has been written meanwhile.
            return copies + await self._forget_stranded(is_near)

    async def _forget_stranded(self, is_near: Concerns) -> int:
        """Forgets what waits in memory for a parent that was below, and went with its own.

        `is_near` says of which blocks that may be so: of those of the same namespace.
        """
        awaited = [ref for ref in self.memory.awaited() if is_near(ref)]
        if not awaited or self._slow is None:
            return 0
        places = await self._slow.locate(awaited)
        return self.memory.forget_waiting(
            ref for ref, place in zip(awaited, places, strict=True) if place is None
        )

    async def _locate(self, refs: Sequence[BlockRef], below: Tier | None) -> list[str | None]:
        """The tier in which each block lies: memory, or what is below of it."""
        places: list[str | None] = await self.memory.locate(refs)
        missing = [index for index, place in enumerate(places) if place is None]
        if missing and below is not None:
            found = await below.locate([refs[index] for index in missing])
            for index, place in zip(missing, found, strict=True):
                places[index] = place
        return places

    async def _wait_below(self, concerns: Concerns) -> None:
        """Returns when nothing of this is on its way below, where it would arrive too late."""
        writes = [over for over, refs in self._going_below.items() if any(map(concerns, refs))]
        if writes:
            await asyncio.wait(writes)

    def _start_promotion(self, wants: list[Want]) -> "asyncio.Task[dict[BlockRef, Acquired]]":
        promotion = asyncio.create_task(self._promote(wants))
        for want in wants:
            self._promoting[want.ref] = promotion
        return promotion

    async def _promote(self, wants: list[Want]) -> dict[BlockRef, Acquired]:
        watch = self.oblivion.watch(ref for want in wants for ref in want[:2] if ref is not None)
        reserved: dict[Want, Slot] = {}
        try:
            for want in wants:
                slot = await self.reserve(want.ref, want.size)
                if slot is None:
                    break
                # A thread that fills it may be late: then the slot goes back when that has ended.
                reserved[want] = self.memory.pin(slot)
            assert self._slow is not None
            loads = [
                Load(want.ref, slot.view, HeldSlot(self.memory, slot))
                for want, slot in reserved.items()
            ]
            answers = await self._slow.load(loads)
            arrived = dict(zip(reserved, answers, strict=True))
            below = await self._parents_below(arrived)
            return self._commit_promoted(reserved, arrived, below - watch.lost, watch)
        finally:
            for slot in reserved.values():
                self.memory.unpin(slot)
            for want in wants:
                del self._promoting[want.ref]

    async def _parents_below(self, arrived: Mapping[Want, Loaded | None]) -> set[BlockRef]:
        """The parents of what has arrived that lie below, where they neither came nor are here."""
        asked = {want.ref for want in arrived}
        parents = dict.fromkeys(want.parent for want, loaded in arrived.items() if loaded)
        absent = [
            ref
            for ref in parents
            if ref is not None and ref not in asked and self.memory.find(ref) is None
        ]
        if not absent:
            return set()
        assert self._slow is not None
        places = await self._slow.locate(absent)
        return {ref for ref, place in zip(absent, places, strict=True) if place is not None}

    def _commit_promoted(
        self,
        reserved: dict[Want, Slot],
        arrived: Mapping[Want, Loaded | None],
        below: set[BlockRef],
        watch: Watch,
    ) -> dict[BlockRef, Acquired]:
        """Takes the slots of what can be matched: it has arrived, and its parent is somewhere."""
        promoted: dict[BlockRef, Acquired] = {}
        for want in _parents_first(arrived):
            loaded, parent = arrived[want], want.parent
            if loaded is None or want.ref in watch.lost:
                continue
            here = parent is None or self.memory.find(parent) is not None
            if not here and parent not in below:
                continue
            slot = reserved.pop(want)
            kept = self.memory.commit(slot, parent, loaded.digest)
            if kept is not None:
                promoted[want.ref] = Acquired(self.memory.pin(kept), loaded.tier)
                self._metrics.promoted_blocks.labels(loaded.tier).inc()
            self.memory.unpin(slot)
        return promoted

    def _unpin_all(self, promotion: "asyncio.Task[dict[BlockRef, Acquired]]") -> None:
        if not promotion.cancelled() and promotion.exception() is None:
            self.release(promotion.result().values())

    async def _demote(self, victims: list[Slot]) -> bool:
        """Writes the victims below and forgets them; False if none could go after all."""
        for slot in victims:
            self.memory.pin(slot)
        held: set[BlockRef] = set()
        try:
            if self._own is not None:
                held = await self._write_below(victims)
        finally:
            for slot in victims:
                self.memory.unpin(slot)
        # Somebody may have pinned a victim while it was being written: that one stays. So does
        # one whose children stay and which does not lie below: they would be of no use.
        for slot in victims:
            if slot.indexed and not slot.pins and (slot.first is None or slot.ref in held):
                fate = "demoted" if slot.ref in held else "dropped"
                self._metrics.evicted_blocks.labels(fate).inc()
                self.memory.evict(slot)
        return any(not slot.indexed for slot in victims)

    async def _write_below(self, slots: Sequence[Slot]) -> set[BlockRef]:
        """Stores slots and the ancestors that are missing below; the refs that lie there now."""
        assert self._own is not None
        family = [self.memory.pin(slot) for slot in self._with_ancestors(slots)]
        try:
            wanted = await self._own.wants([slot.ref for slot in family])
            held = {slot.ref for slot, want in zip(family, wanted, strict=True) if not want}
            missing = [slot for slot, want in zip(family, wanted, strict=True) if want]
            for batch in _batches(missing):
                held |= await self._store_below(batch)
            return held
        finally:
            for slot in family:
                self.memory.unpin(slot)

    async def _store_below(self, slots: Sequence[Slot]) -> set[BlockRef]:
        """Stores what nobody has forgotten, or is forgetting; the refs that were taken."""
        assert self._own is not None
        kept = [slot for slot in slots if slot.indexed and not self.oblivion.concerns(slot.ref)]
        if not kept:
            return set()
        await self.digests.settle(kept)
        # Who was discarded meanwhile did not see them on their way below.
        kept = [slot for slot in kept if slot.indexed and not self.oblivion.concerns(slot.ref)]
        if not kept:
            return set()
        refs = [slot.ref for slot in kept]
        blocks = [
            Block(slot.ref, slot.parent, slot.digest, slot.view, HeldSlot(self.memory, slot))
            for slot in kept
        ]
        over = asyncio.get_running_loop().create_future()
        self._going_below[over] = refs
        try:
            taken = await self._own.store(blocks)
        finally:
            del self._going_below[over]
            over.set_result(None)
        return {ref for ref, took in zip(refs, taken, strict=True) if took}

    def _with_ancestors(self, slots: Sequence[Slot]) -> list[Slot]:
        """The slots and all their ancestors in memory, parents before children, each once."""
        family: dict[BlockRef, Slot] = {}
        for slot in slots:
            line: dict[BlockRef, Slot] = {}
            above: Slot | None = slot
            while above is not None and above.ref not in family and above.ref not in line:
                line[above.ref] = above
                above = above.above
            family.update(reversed(line.items()))
        return list(family.values())


def _parents_first(wants: Iterable[Want]) -> list[Want]:
    """Sorted so that nobody stands before its parent, without those who are in a circle."""
    known = {want.ref: want for want in wants}
    children: dict[BlockRef | None, list[Want]] = {}
    for want in known.values():
        parent = want.parent if want.parent in known else None
        children.setdefault(parent, []).append(want)
    placed = children.get(None, [])
    for want in placed:
        placed += children.get(want.ref, [])
    return placed


def _batches(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    batch: list[Slot] = []
    size = 0
    for slot in slots:
        batch.append(slot)
        size += slot.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
