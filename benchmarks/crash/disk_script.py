"""A fixed run of the disk tier that comes by everything it does with files, and how to judge it.

Two plays: `AMPLE`, where nothing has to leave, so that whatever was stored must be there after a
kill; and `TIGHT`, where segments are dropped and hot blocks written forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.api.errors import KvstoreError
from kvstore.api.tier import Block, BlockRef, Load
from kvstore.files import DirectoryFiles
from kvstore.tiers.disk import DiskTier
from tests.sim.blocks import block_of, data_of, keys_of, namespace_of
from tests.sim.rig import SYNC_AFTER_S, Rig

MINE, THEIRS = namespace_of("mine"), namespace_of("theirs")
BLOCK_BYTES = 6000
SEGMENT_BYTES = 1 << 16
AMPLE_BYTES = 32 * SEGMENT_BYTES
TIGHT_BYTES = 6 * SEGMENT_BYTES


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that the script does."""

    act: str
    """store, load, discard, clear, sync, open or close."""
    chain: str = ""
    first: int = 0
    last: int = 0
    """Blocks `first` … `last - 1` of the chain."""
    variant: int = 0
    """Which content the blocks have: a block that was discarded may come back with another."""


AMPLE: Sequence[Step] = (
    Step("open"),
    Step("store", "a", 0, 4),
    Step("sync"),
    Step("store", "a", 4, 8),
    Step("store", "b", 0, 3),
    Step("load", "a", 0, 8),
    Step("discard", "b", 2, 3),
    Step("store", "theirs", 0, 4),
    Step("sync"),
    Step("clear", "theirs"),
    Step("store", "b", 2, 6, variant=1),
    Step("close"),
    Step("open"),
    Step("store", "c", 0, 5),
    Step("discard", "a", 6, 8),
    Step("store", "theirs", 0, 2, variant=1),
    Step("close"),
    Step("open"),
    Step("load", "c", 0, 5),
    Step("store", "a", 6, 8, variant=1),
    Step("sync"),
)
TIGHT: Sequence[Step] = (
    Step("open"),
    Step("store", "a", 0, 6),
    Step("store", "b", 0, 4),
    Step("discard", "b", 3, 4),
    Step("store", "c", 0, 6),
    Step("load", "a", 0, 6),
    Step("store", "d", 0, 6),
    Step("sync"),
    Step("load", "a", 0, 6),
    Step("store", "theirs", 0, 4),
    Step("clear", "theirs"),
    Step("store", "e", 0, 6),
    Step("close"),
    Step("open"),
    Step("load", "d", 0, 6),
    Step("store", "f", 0, 6),
    Step("store", "g", 0, 6),
)
PLAYS: Mapping[str, tuple[Sequence[Step], int]] = {
    "ample": (AMPLE, AMPLE_BYTES),
    "tight": (TIGHT, TIGHT_BYTES),
}
"""The steps of each play, and its capacity in bytes."""


def ref_of(chain: str, place: int) -> BlockRef:
    """What a block of the script is called."""
    namespace = THEIRS if chain == "theirs" else MINE
    return BlockRef(namespace, keys_of(f"script {chain}", place + 1)[place])


def blocks_of(step: Step) -> list[Block]:
    """The blocks that a step stores or loads."""
    return [
        block_of(
            ref_of(step.chain, at),
            ref_of(step.chain, at - 1) if at else None,
            BLOCK_BYTES,
            step.variant,
        )
        for at in range(step.first, step.last)
    ]


@dataclass(slots=True)
class Stage:
    """Where a play is given: one directory, and the tier over it while it is open."""

    root: Path
    capacity_bytes: int
    rig: Rig = field(default_factory=Rig)
    tier: DiskTier | None = None
    files: DirectoryFiles | None = None

    async def open(self) -> DiskTier:
        """Starts the tier over what lies in the directory."""
        self.files = DirectoryFiles(self.root)
        try:
            self.tier = await self.rig.disk(
                self.files, capacity_bytes=self.capacity_bytes, segment_bytes=SEGMENT_BYTES
            )
        except BaseException:
            self.files.shut()
            self.files = None
            raise
        return self.tier

    async def close(self) -> None:
        """Ends the tier in order."""
        tier, files, self.tier, self.files = self.tier, self.files, None, None
        if tier is not None:
            self.rig.gone(tier)
            await tier.close()
        if files is not None:
            files.shut()

    async def do(self, step: Step) -> None:
        """Does one step. Raises what the tier raises."""
        if step.act == "open":
            await self.open()
        elif step.act == "close":
            await self.close()
        elif step.act == "sync":
            await self.rig.clock.advance(SYNC_AFTER_S + 1)
        elif self.tier is not None:
            await self._ask(self.tier, step)

    async def _ask(self, tier: DiskTier, step: Step) -> None:
        if step.act == "store":
            await tier.store(blocks_of(step))
        elif step.act == "load":
            await tier.load(
                [Load(b.ref, memoryview(bytearray(BLOCK_BYTES))) for b in blocks_of(step)]
            )
        elif step.act == "discard":
            await tier.discard([ref_of(step.chain, at) for at in range(step.first, step.last)])
        else:
            await tier.clear(ref_of(step.chain, 0).namespace)


# What may and what must be there.

State = dict[BlockRef, int]
"""Which blocks are there, and with which content."""


async def served(tier: DiskTier, steps: Sequence[Step]) -> tuple[State, list[str]]:
    """What the tier delivers of all that the script ever stores, and what is wrong with it."""
    variants: dict[BlockRef, set[int]] = {}
    for step in steps:
        if step.act == "store":
            for block in blocks_of(step):
                variants.setdefault(block.ref, set()).add(step.variant)
    loads = [Load(ref, memoryview(bytearray(BLOCK_BYTES))) for ref in variants]
    answers = await tier.load(loads)
    state: State = {}
    wrong: list[str] = []
    for load, loaded in zip(loads, answers, strict=True):
        if loaded is None:
            continue
        known = {data_of(load.ref, BLOCK_BYTES, v): v for v in variants[load.ref]}
        variant = known.get(bytes(load.into))
        if variant is None:
            wrong.append("wrong bytes")
        else:
            state[load.ref] = variant
    return state, wrong


def forgotten_after(steps: Sequence[Step]) -> list[set[BlockRef]]:
    """For each number of steps done, what was forgotten by name and not stored again since."""
    forgotten: set[BlockRef] = set()
    after: list[set[BlockRef]] = [set()]
    stored: set[BlockRef] = set()
    for step in steps:
        named = {ref_of(step.chain, at) for at in range(step.first, step.last)}
        if step.act == "store":
            stored |= named
            forgotten = forgotten - named
        elif step.act == "discard":
            forgotten = forgotten | named
        elif step.act == "clear":
            namespace = ref_of(step.chain, 0).namespace
            forgotten = forgotten | {ref for ref in stored if ref.namespace == namespace}
        after.append(forgotten)
    return after


async def rehearse(root: Path, steps: Sequence[Step], capacity_bytes: int) -> list[State]:
    """Does all steps in peace and says what was there after each number of them."""
    stage = Stage(root, capacity_bytes)
    states: list[State] = [{}]
    for step in steps:
        await stage.do(step)
        if stage.tier is None:
            states.append(states[-1])
        else:
            state, wrong = await served(stage.tier, steps)
            assert not wrong
            states.append(state)
    await stage.close()
    return states


@dataclass(frozen=True, slots=True)
class Judge:
    """Knows what may be there after a play was broken off."""

    steps: Sequence[Step]
    states: Sequence[State]
    strict: bool
    """Whether everything that was stored must be there."""

    def faults(self, done: int, found: State) -> list[str]:
        """What is wrong with `found` when `done` steps were over and the next had perhaps begun."""
        before = self.states[done]
        after = self.states[min(done + 1, len(self.steps))]
        forgotten = forgotten_after(self.steps)
        may_be_back = forgotten[min(done + 1, len(self.steps))]
        faults = []
        for ref, variant in found.items():
            if ref in forgotten[done] and ref in may_be_back:
                faults.append("a block that was forgotten is back")
            elif not _was_stored(self.steps[: done + 1], ref, variant):
                faults.append("a block is there that was not stored yet")
            elif ref in before and ref in after and variant not in (before[ref], after[ref]):
                faults.append("a block is back with an older content")
        if self.strict:
            for ref, variant in before.items():
                if after.get(ref) == variant and found.get(ref) != variant:
                    faults.append("a block that was stored is gone")
        return faults


def _was_stored(steps: Sequence[Step], ref: BlockRef, variant: int) -> bool:
    return any(
        step.act == "store"
        and step.variant == variant
        and any(ref_of(step.chain, at) == ref for at in range(step.first, step.last))
        for step in steps
    )


async def take_new(tier: DiskTier) -> list[str]:
    """Whether the tier takes and gives a chain of its own."""
    blocks = blocks_of(Step("store", "new", 0, 3))
    try:
        stored = await tier.store(blocks)
        loads = [Load(block.ref, memoryview(bytearray(BLOCK_BYTES))) for block in blocks]
        answers = await tier.load(loads)
    except KvstoreError as error:
        return [f"the tier takes nothing new: {error}"]
    whole = all(load.into == block.data for load, block in zip(loads, blocks, strict=True))
    if not all(stored) or None in answers or not whole:
        return ["the tier takes nothing new"]
    return []
