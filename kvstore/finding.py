"""Where the blocks of a chain lie: looked up in slices, between which other tasks run."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress, count, repeat
from operator import attrgetter, not_
from typing import TypeVar, overload

from kvstore.api.tier import BlockRef
from kvstore.reading import within
from kvstore.tiers.memory import Slot
from kvstore.tiers.tiered import Tiered

SLICE_BLOCKS = 4096
"""So many blocks are looked up, or told to the policy, before other tasks have their turn: that
takes a millisecond where memory has them, ten to thirty where nobody has ever heard of them."""

T = TypeVar("T")

_as_ref = partial(tuple.__new__, BlockRef)
_ref_of = attrgetter("ref")


@dataclass(slots=True)
class Row:
    """What was found of a chain in one space, block by block from its start."""

    refs: list[BlockRef] = field(default_factory=list)
    """As in the first scope that has the block; what no scope has as in the first of all, where
    its owner would write it."""
    tiers: list[str | None] = field(default_factory=list)
    """The tier in which each lies; None: nowhere."""
    slots: list[Slot | None] = field(default_factory=list)
    """Where each lay in memory, of the leading ones of each slice that it had; else None."""

    def present(self, held_blocks: int, length: int) -> list[bool]:
        """Which of the first `length` blocks are here, or held by the caller."""
        here = [tier is not None for tier in self.tiers[:length]]
        here[:held_blocks] = [True] * min(held_blocks, length)
        return here

    def gap(self, held_blocks: int) -> int:
        """How many blocks stand before the first one that is neither here nor held."""
        return held_blocks + leading(self.tiers[held_blocks:])


class Finding:
    """Lookups for one call, whose caller has `left_s` of time.

    When nothing is left of it, what memory has is the answer. What was found may have changed by
    the time that the last lookup is over.
    """

    def __init__(self, tiers: Tiered, left_s: Callable[[], float]) -> None:
        self._tiers = tiers
        self._left_s = left_s

    async def row(
        self, names: Sequence[bytes], keys: Sequence[bytes], whole_from: int | None = None
    ) -> Row:
        """For each key the first of the namespaces that has it, and in which tier.

        With `whole_from` a gap from there on makes the blocks behind it useless: about those
        nobody is asked, and the row may end there.
        """
        row = Row()
        for part in slices(keys):
            if row.refs:
                if whole_from is not None and row.gap(whole_from) < len(row.tiers):
                    break
                await asyncio.sleep(0)
            await self._extend(row, names, part)
        return row

    async def _extend(self, row: Row, names: Sequence[bytes], keys: Sequence[bytes]) -> None:
        # In terms of iterators where memory has them: that is most of all matches.
        slots = self._tiers.memory.find_all(names[0], keys)
        hot = leading(slots)
        row.refs += map(_ref_of, slots[:hot])
        row.tiers += repeat(self._tiers.memory.name, hot)
        row.slots += slots[:hot]
        if hot < len(keys):
            await self._extend_slowly(row, names, keys[hot:])

    async def _extend_slowly(self, row: Row, names: Sequence[bytes], keys: Sequence[bytes]) -> None:
        refs = refs_of(names[0], keys)
        tiers = await self._locate(refs)
        for name in names[1:]:
            absent = [at for at, tier in enumerate(tiers) if tier is None]
            if not absent:
                break
            await asyncio.sleep(0)
            others = refs_of(name, [keys[at] for at in absent])
            for at, ref, tier in zip(absent, others, await self._locate(others), strict=True):
                if tier is not None:
                    refs[at], tiers[at] = ref, tier
        row.refs += refs
        row.tiers += tiers
        row.slots += repeat(None, len(refs))

    async def _locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        """Where blocks lie, as far as that can be said in the time that is left."""
        left_s = self._left_s()
        if left_s > 0:
            try:
                async with within(left_s):
                    return await self._tiers.locate(refs)
            except TimeoutError:
                pass
        return await self._tiers.memory.locate(refs)  # Which does not wait.


def leading(found: Sequence[object]) -> int:
    """How many stand before the first that is None, or otherwise false."""
    # Most of the time there is none, which `all` knows in a tenth of the time.
    return len(found) if all(found) else next(compress(count(), map(not_, found)))


def refs_of(name: bytes, keys: Sequence[bytes]) -> list[BlockRef]:
    """What blocks are called in a namespace."""
    # `BlockRef(name, key)`, in half the time: there are many of them.
    return list(map(_as_ref, zip(repeat(name), keys, strict=False)))


@overload
def slices(chain: range) -> Iterator[range]: ...


@overload
def slices(chain: Sequence[T]) -> Iterator[Sequence[T]]: ...


def slices(chain: Sequence[T]) -> Iterator[Sequence[T]]:
    """A chain in pieces of at most `SLICE_BLOCKS`; none of no blocks."""
    for start in range(0, len(chain), SLICE_BLOCKS):
        yield chain[start : start + SLICE_BLOCKS]
