"""Two slower tiers side by side: reads take the first that has a block, writes go to both."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage

T = TypeVar("T")


class Beside:
    """`first` and `second` as one tier. `first` is the one that is cheaper to read.

    A block that `first` turns out not to have, or to have damaged, is asked of `second`; but not
    if `first` was given up and may still write to its buffer, which would spoil what `second` read.
    """

    name = "beside"

    def __init__(self, first: Tier, second: Tier) -> None:
        self._first = first
        self._second = second

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        first, second = await asyncio.gather(self._first.locate(refs), self._second.locate(refs))
        return [a or b for a, b in zip(first, second, strict=True)]

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        first, second = await asyncio.gather(self._first.wants(refs), self._second.wants(refs))
        return [a or b for a, b in zip(first, second, strict=True)]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        return await load_in_turn(self._first, self._second, loads)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        first, second = await asyncio.gather(self._first.store(blocks), self._second.store(blocks))
        return [a or b for a, b in zip(first, second, strict=True)]

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await forgotten(self._first.discard(refs), self._second.discard(refs))

    async def clear(self, namespace: bytes) -> int:
        return await forgotten(self._first.clear(namespace), self._second.clear(namespace))

    def usage(self) -> list[Usage]:
        return [*self._first.usage(), *self._second.usage()]

    async def close(self) -> None:
        await _both(self._first.close(), self._second.close())


async def load_in_turn(first: Tier, second: Tier, loads: Sequence[Load]) -> list[Loaded | None]:
    """What `first` delivers, and of the rest what `second` does, but see `Beside`."""
    answers = await first.load(loads)
    missing = [
        index
        for index, (load, answer) in enumerate(zip(loads, answers, strict=True))
        if answer is None and not (load.keeper is not None and load.keeper.held)
    ]
    if missing:
        late = await second.load([loads[index] for index in missing])
        for index, answer in zip(missing, late, strict=True):
            answers[index] = answer
    return answers


async def forgotten(first: Awaitable[int], second: Awaitable[int]) -> int:
    """How many copies two tiers forget. Raises as soon as both have ended, if one failed."""
    return sum(await _both(first, second))


async def _both(first: Awaitable[T], second: Awaitable[T]) -> tuple[T, T]:
    """Both answers. An error of one is raised only when the other has ended as well.

    Otherwise it would go on behind the caller's back, outside of his locks and beyond his end.
    """
    one, other = await asyncio.gather(first, second, return_exceptions=True)
    if isinstance(one, BaseException):
        raise one
    if isinstance(other, BaseException):
        raise other
    return one, other
