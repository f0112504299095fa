"""How much of a chain can be restored: the longest length that every space's rule allows."""

from collections.abc import Sequence
from itertools import compress, count

from kvstore.api.space import MatchRule, SpaceDescriptor


def needed(descriptor: SpaceDescriptor, length: int) -> range:
    """The blocks of a space that a restore of `length` blocks needs."""
    if descriptor.match_rule is MatchRule.TRAILING:
        return range(max(0, length - descriptor.trailing_blocks), length)
    if descriptor.match_rule is MatchRule.BOUNDARY:
        return range(max(0, length - 1), length)
    return range(length)


def longest_match(descriptors: Sequence[SpaceDescriptor], present: Sequence[Sequence[bool]]) -> int:
    """The longest length for which each space has the blocks that it needs.

    `present[space][block]` says what is there; all rows have the length of the chain.
    """
    allowed = [_allowed(d, row) for d, row in zip(descriptors, present, strict=True)]
    # In terms of iterators: rows are long.
    return max(compress(count(), map(all, zip(*allowed, strict=True))), default=0)


def _allowed(descriptor: SpaceDescriptor, present: Sequence[bool]) -> list[bool]:
    """For each length from 0 on, whether this space has what it needs."""
    window = len(needed(descriptor, len(present)))  # Of a shorter length it needs all, or as much.
    run = 0
    allowed = [True]
    for length, here in enumerate(present, start=1):
        run = run + 1 if here else 0
        allowed.append(run >= window or run == length)
    return allowed
