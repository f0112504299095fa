"""What becomes of a match: blocks are leased as far as leases go, and the rest is on its way up."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import BlockRef
from kvstore.finding import Row, slices
from kvstore.leases import Lease, LeaseTable, Share
from kvstore.matching import needed
from kvstore.reading import READ_WINDOW_BYTES
from kvstore.tiers.memory import Slot
from kvstore.tiers.tiered import Tiered, Want

MOST_PROMOTED_BYTES = 64 << 20
"""At a time for one lease, so that the deadline of a slower tier can hold."""

Keep = Callable[[Coroutine[None, None, None]], None]
"""Starts a task of the node, which ends with it."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive matched blocks that lay in one tier; `leased`: they stay until read."""

    blocks: int
    tier: str
    leased: bool


@dataclass(frozen=True, slots=True)
class Need:
    """Which blocks of a chain a restore needs in one space, beside what the caller holds."""

    descriptor: SpaceDescriptor
    row: Row
    blocks: range

    @classmethod
    def of(cls, descriptor: SpaceDescriptor, row: Row, held_blocks: int, length: int) -> "Need":
        """What a restore from `held_blocks` to `length` needs."""
        blocks = needed(descriptor, length)
        return cls(descriptor, row, range(max(held_blocks, blocks.start), blocks.stop))

    def refs(self, blocks: range) -> list[BlockRef]:
        """What some of the blocks are called."""
        return self.row.refs[blocks.start : blocks.stop]

    def tiers(self, blocks: range) -> list[str]:
        """Where they lay."""
        tiers = self.row.tiers[blocks.start : blocks.stop]
        return cast("list[str]", tiers) if all(tiers) else [tier or "" for tier in tiers]

    def slots(self, blocks: range) -> list[Slot | None]:
        """Where they lay in memory."""
        return self.row.slots[blocks.start : blocks.stop]

    def share(self) -> Share:
        """What a lease has of them at first: nothing, yet."""
        is_chain, start = self.descriptor.needs_parents, self.blocks.start
        above = self.row.refs[start - 1] if is_chain and start else None
        return Share(self.descriptor.block_bytes, above, is_chain, self.beyond(0))

    def beyond(self, count: int) -> tuple[int, str]:
        """How many there are beside the first `count`, and where the first of those lay."""
        rest = self.blocks[count:]
        return len(rest), "".join(self.tiers(rest[:1]))


class Granting:
    """Fills leases for matches, and ends them."""

    def __init__(
        self, tiers: Tiered, leases: LeaseTable, keep: Keep, slow_room_bytes: Callable[[], float]
    ) -> None:
        """`slow_room_bytes` says how much the slower tiers can begin to read now."""
        self._tiers = tiers
        self._leases = leases
        self._keep = keep
        self._slow_room_bytes = slow_room_bytes

    async def grant(self, lease: Lease, needs: Sequence[Need]) -> bool:
        """Pins what is in memory and begins to promote the rest, both up to the leases' limit.

        False if nothing could be leased.
        """
        if not self._leases.grant(lease):
            return False
        lease.shares = [need.share() for need in needs]
        try:
            below = await self._hold(lease, needs)
        except BaseException:  # Cancelled: nobody will ever release it.
            self.release(lease)
            raise
        if not any(share.refs for share in lease.shares):
            self.release(lease)
        if below and not lease.ended:
            lease.coming.begin(want.ref for want in below)
            self._keep(self._promote(lease, below))
        return not lease.ended

    async def _hold(self, lease: Lease, needs: Sequence[Need]) -> list[Want]:
        """Reserves and pins for a lease; what it has to wait for.

        What it found may be gone by now, and is then promoted again. The lease may end meanwhile.
        """
        below: list[Want] = []
        for space, need in enumerate(needs):
            for part in slices(need.blocks):
                if space or part.start > need.blocks.start:
                    await asyncio.sleep(0)
                if lease.ended:
                    return []
                reserved = self._reserve(lease, space, need, part)
                below += self._pin(lease, space, need, reserved)
                if len(reserved) < len(part):
                    break
        return below

    def _pin(self, lease: Lease, space: int, need: Need, part: range) -> list[Want]:
        """Pins for a lease the last blocks of its share, which are those; what is not here."""
        slots = need.slots(part)
        pinned = self._tiers.memory.pin_leading(slots, need.descriptor.block_bytes)
        lease.held += cast("list[Slot]", slots[:pinned])
        if pinned == len(part):
            return []
        share = lease.shares[space]
        acquired = [
            (want, self._tiers.pin(want))
            for want in share.wants(len(share.refs) - len(part) + pinned)
        ]
        lease.held += [block.slot for _, block in acquired if block is not None]
        return [want for want, block in acquired if block is None]

    def _reserve(self, lease: Lease, space: int, need: Need, part: range) -> range:
        """The first of some blocks of a space, as far as a lease has room for them."""
        share_bytes = self._tiers.memory.share_bytes(need.descriptor.block_bytes)
        part = part[: self._leases.reserve(lease, share_bytes, len(part))]
        lease.add(space, need.refs(part), need.tiers(part))
        share = lease.shares[space]
        share.beyond = need.beyond(len(share.refs))
        return part

    async def _promote(self, lease: Lease, wants: list[Want]) -> None:
        """Fetches in order what a lease waits for, as long as it lives.

        A step at a time, each as large as the tiers can do well by now; what readers of the lease
        ask for meanwhile is not asked of a tier a second time, which might refuse it as too much.
        """
        largest, start = max(want.size for want in wants), 0
        try:
            while start < len(wants) and not lease.ended:
                step = wants[start : start + max(self._step_bytes() // largest, 1)]
                acquired = [block for block in await self._tiers.acquire(step) if block]
                if lease.ended:
                    self._tiers.release(acquired)
                else:
                    lease.held += [block.slot for block in acquired]
                lease.coming.tried(want.ref for want in step)
                start += len(step)
        finally:
            lease.coming.end()

    def _step_bytes(self) -> int:
        half = int(min(self._slow_room_bytes() / 2, MOST_PROMOTED_BYTES))
        return max(half, READ_WINDOW_BYTES)

    def release(self, lease: Lease) -> None:
        """Ends a lease."""
        self._tiers.memory.unpin_all(self._leases.end(lease))


def runs_of(lease: Lease, needs: Sequence[Need]) -> list[list[Run]]:
    """Where the matched blocks lie, space by space; blocks that no rule needs lie nowhere."""
    tiers = [need.tiers(need.blocks) for need in needs]
    if not lease.held:
        return [_run_lengths(lease.blocks, _same(each, leased=False)) for each in tiers]
    return [
        _run_lengths(lease.blocks, [*leased, *_same(each[len(share.refs) :], leased=False)])
        for each, share, leased in zip(tiers, lease.shares, _leased(lease), strict=True)
    ]


def runs_again(lease: Lease) -> list[list[Run]]:
    """The same from what a lease remembers: of what is not leased only where it begins."""
    return [
        _run_lengths(lease.blocks, [*leased, Run(*share.beyond, leased=False)])
        for share, leased in zip(lease.shares, _leased(lease), strict=True)
    ]


def _leased(lease: Lease) -> list[list[Run]]:
    """The runs of what a lease names: it may still wait for some of that."""
    if len(lease.held) == sum(len(share.refs) for share in lease.shares):
        return [_same(share.tiers, leased=True) for share in lease.shares]
    held = {slot.ref for slot in lease.held}
    return [
        [
            Run(len(list(group)), *place)
            for place, group in groupby(
                zip(share.tiers, map(held.__contains__, share.refs), strict=True)
            )
        ]
        for share in lease.shares
    ]


def _same(tiers: list[str], *, leased: bool) -> list[Run]:
    """The runs of blocks of which all or none are leased."""
    if tiers and tiers.count(tiers[0]) == len(tiers):  # Faster, and hardly ever otherwise.
        return [Run(len(tiers), tiers[0], leased)]
    return [Run(len(list(group)), tier, leased) for tier, group in groupby(tiers)]


def _run_lengths(blocks: int, last: list[Run]) -> list[Run]:
    """Runs of so many blocks, of which the last ones lie so; neighbours of a kind as one."""
    first = Run(blocks - sum(run.blocks for run in last), "", leased=False)
    runs: list[Run] = []
    for run in [first, *last]:
        if runs and (runs[-1].tier, runs[-1].leased) == (run.tier, run.leased):
            runs[-1] = replace(runs[-1], blocks=runs[-1].blocks + run.blocks)
        elif run.blocks:
            runs.append(run)
    return runs
