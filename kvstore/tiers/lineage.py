"""Who descends from whom, among the blocks that one tier has: an intrusive tree without lists.

A block without its parents is useless, so that parents leave after their children, or take them
along. Four references for each block are all it costs.
"""

from collections.abc import Iterable, Iterator
from typing import Self, TypeVar


class Member:
    """One block among its relatives; a tier's entries derive from it."""

    __slots__ = ("above", "first", "following", "preceding")

    def __init__(self) -> None:
        self.above: Self | None = None
        """The parent, where the tier has it."""
        self.first: Self | None = None
        """One of the children; the others follow it."""
        self.following: Self | None = None
        self.preceding: Self | None = None

    def adopt(self, child: Self) -> None:
        """`child`, which has no parent so far, becomes the first child."""
        assert child.above is None, "a block has one parent"
        child.above = self
        child.following = self.first
        if self.first is not None:
            self.first.preceding = child
        self.first = child

    def leave(self) -> None:
        """Parts from the parent; the children stay."""
        if self.above is None:
            return
        if self.preceding is not None:
            self.preceding.following = self.following
        else:
            self.above.first = self.following
        if self.following is not None:
            self.following.preceding = self.preceding
        self.above = self.following = self.preceding = None

    def children(self) -> Iterator[Self]:
        """All children; none of them may leave meanwhile."""
        child = self.first
        while child is not None:
            yield child
            child = child.following


M = TypeVar("M", bound=Member)


def with_descendants(members: Iterable[M]) -> list[M]:
    """The members and all who descend from them, each once, parents before children."""
    found: dict[M, None] = {}
    pending = list(members)
    while pending:
        member = pending.pop()
        if member in found:
            continue
        found[member] = None
        pending.extend(member.children())
    return _parents_first(found)


def _parents_first(members: dict[M, None]) -> list[M]:
    """Sorted so that nobody stands before an ancestor that is in the list as well."""
    placed: dict[M, None] = {}
    for member in members:
        line: dict[M, None] = {}
        above: M | None = member
        while above is not None and above in members and above not in placed and above not in line:
            line[above] = None
            above = above.above
        placed.update(dict.fromkeys(reversed(line)))
    return list(placed)
