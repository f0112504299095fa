"""What lies on disk: names, their places, and who descends from whom. Plain bookkeeping.

Invariant: the index is prefix-closed. A block whose parent leaves takes its descendants along,
because without their beginning nobody can use them.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

from kvstore.files import PAGE_BYTES
from kvstore.record import Kind
from kvstore.tiers.lineage import Member, with_descendants
from kvstore.tiers.segment import pages
from kvstore.tiers.segment_log import Found

_NOWHERE = 0
"""The segment of an entry that has left the index."""


class Entry(Member):
    """One block on disk. Made for a million of them: what can be read back is not kept."""

    __slots__ = (
        "block_bytes", "expires_s", "name", "page", "segment_id", "stored_bytes", "tag", "used",
    )  # fmt: skip

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.name = found.name
        self.tag = found.tag
        self.block_bytes = found.block_bytes
        self.used = False
        """Read, or needed by a new child, since it was written: worth writing forward."""
        self.move(found)

    def move(self, found: Found) -> None:
        """The block has a newer record."""
        self.segment_id = found.segment_id
        self.page = found.offset // PAGE_BYTES
        self.stored_bytes = found.stored_bytes
        self.expires_s = found.expires_s
        self.used = False

    @property
    def offset(self) -> int:
        """Where its record begins in its segment."""
        return self.page * PAGE_BYTES

    @property
    def record_bytes(self) -> int:
        """What its record takes in a segment."""
        return PAGE_BYTES + pages(self.stored_bytes)


class DiskIndex:
    """The blocks of all segments by name."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._tags: dict[bytes, bytes] = {}
        """One object for each tag: many entries bear it."""
        self._segments: dict[int, list[Entry]] = {}
        """What was ever put into a segment; some of it has left since."""
        self._heads: dict[bytes, set[Entry]] = {}
        """Under each tag the entries whose parent is none of that tag; the others descend."""
        self.block_bytes = 0
        self.on_change: Callable[[bytes], None] | None = None
        """Hears the name of each block that has come or left."""

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: bytes) -> Entry | None:
        """The entry of a block that is here."""
        return self._entries.get(name)

    def insert(self, found: Found) -> None:
        """Adds a block, or gives it its newer place. Its parent must be here."""
        known = self._entries.get(found.name)
        if known is not None:
            known.move(found)
            self._segments.setdefault(found.segment_id, []).append(known)
            return
        entry = self._entries[found.name] = Entry(found)
        entry.tag = self._tags.setdefault(found.tag, found.tag)
        if found.parent is not None:
            self._entries[found.parent].adopt(entry)
        if entry.above is None or entry.above.tag != entry.tag:
            self._heads.setdefault(entry.tag, set()).add(entry)
        self._segments.setdefault(found.segment_id, []).append(entry)
        self.block_bytes += found.block_bytes
        if self.on_change is not None:
            self.on_change(found.name)

    def move_back(self, entry: Entry, segment_id: int, page: int) -> None:
        """Gives a block that was written forward, if it is still here, its former place again."""
        if entry.segment_id not in (_NOWHERE, segment_id):
            entry.segment_id, entry.page, entry.used = segment_id, page, True
            self._segments.setdefault(segment_id, []).append(entry)

    def remove(self, names: Iterable[bytes]) -> int:
        """Forgets blocks and all that descends from them; how many there were."""
        leaving = with_descendants(
            [entry for name in names if (entry := self._entries.get(name)) is not None]
        )
        for entry in reversed(leaving):
            self._forget(entry)
        return len(leaving)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.name]
        heads = self._heads.get(entry.tag)
        if heads is not None:
            heads.discard(entry)
            if not heads:
                del self._heads[entry.tag]
                self._tags.pop(entry.tag, None)
        entry.leave()
        entry.segment_id = _NOWHERE
        self.block_bytes -= entry.block_bytes
        if self.on_change is not None:
            self.on_change(entry.name)

    def names(self) -> list[bytes]:
        """The names of all blocks."""
        return list(self._entries)

    def of_namespace(self, tag: bytes) -> list[bytes]:
        """Names under one tag from which all others of it descend."""
        return [entry.name for entry in self._heads.get(tag, ())]

    def in_segment(self, segment_id: int) -> list[Entry]:
        """The live blocks of one segment."""
        ever = dict.fromkeys(self._segments.get(segment_id, ()))
        return [entry for entry in ever if entry.segment_id == segment_id]

    def by_segment(self) -> Iterator[Entry]:
        """What is here now, segment by segment; blocks may come and go meanwhile."""
        for segment_id in sorted(self._segments):
            for entry in self.in_segment(segment_id):
                if entry.segment_id == segment_id:
                    yield entry

    def drop_segment(self, segment_id: int) -> None:
        """Forgets what lies in a segment, and all that descends from it."""
        self.remove([entry.name for entry in self.in_segment(segment_id)])
        self._segments.pop(segment_id, None)

    def worth_forwarding(self, segment_id: int, budget_bytes: int) -> list[Entry]:
        """What should be written again before a segment goes, parents first, within a budget.

        That is what was used since it was written, what has descendants in other segments, and
        the ancestors of both inside the segment.
        """
        chosen: dict[Entry, None] = {}
        # What costs too much with its ancestors; so does all that descends from it.
        refused: set[Entry] = set()
        left_bytes = budget_bytes
        for entry in self.in_segment(segment_id):
            if not entry.used and not _has_child_elsewhere(entry):
                continue
            line = _line_in_segment(entry, chosen, refused)
            costs = list(itertools.accumulate(member.record_bytes for member in line))
            if not line or line[0].above in refused or costs[-1] > left_bytes:
                dear = (m for m, cost in zip(line, costs, strict=True) if cost > left_bytes)
                refused.update(line if line and line[0].above in refused else dear)
                continue
            left_bytes -= costs[-1]
            chosen.update(dict.fromkeys(line))
        return list(chosen)

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        segments = {segment_id: set(ever) for segment_id, ever in self._segments.items()}
        total = children = with_parent = 0
        for name, entry in self._entries.items():
            assert entry.name == name, "an entry under another name"
            total += entry.block_bytes
            above = entry.above
            with_parent += above is not None
            assert above is None or self._entries.get(above.name) is above, "a parent is gone"
            for child in entry.children():
                children += 1
                assert child.above is entry, "a child has another parent"
            is_head = above is None or above.tag != entry.tag
            assert is_head == (entry in self._heads.get(entry.tag, ())), "heads are wrong"
            assert entry in segments[entry.segment_id], "a segment does not know its block"
        assert children == with_parent, "a parent does not know its child"
        assert total == self.block_bytes, f"block bytes {total}, counted {self.block_bytes}"


def _has_child_elsewhere(entry: Entry) -> bool:
    return any(child.segment_id != entry.segment_id for child in entry.children())


def _line_in_segment(entry: Entry, chosen: dict[Entry, None], refused: set[Entry]) -> list[Entry]:
    line: list[Entry] = []
    member: Entry | None = entry
    while (
        member is not None
        and member.segment_id == entry.segment_id
        and not (member in chosen or member in refused)
    ):
        line.append(member)
        member = member.above
    return line[::-1]


def survivors(records: Iterable[Found]) -> list[Found]:
    """The blocks that hold after a restart, parents first.

    Of several records of a block the latest counts; what was forgotten afterwards is gone, and so
    is what has lost its parent. Where a forget record is missing, whatever is older may have been
    what it forgot.
    """
    latest: dict[bytes, Found] = {}
    forgotten: dict[bytes, int] = {}
    cleared: dict[bytes, int] = {}
    known: set[int] = set()
    most = 0
    for found in records:
        most = max(most, found.forgets)
        if found.kind is Kind.BLOCK:
            earlier = latest.get(found.name)
            if earlier is None or earlier.sequence <= found.sequence:
                latest[found.name] = found
            continue
        known.add(found.forgets)
        if found.kind is Kind.FORGET_BLOCK:
            forgotten[found.name] = max(found.sequence, forgotten.get(found.name, 0))
        else:
            cleared[found.tag] = max(found.sequence, cleared.get(found.tag, 0))
    while most in known:
        most -= 1
    # That one is missing. Where it went with an old segment, nothing older than it is left.
    live = {
        found.name: found
        for found in latest.values()
        if found.forgets >= most
        and found.sequence >= forgotten.get(found.name, 0)
        and found.sequence >= cleared.get(found.tag, 0)
    }
    rooted: dict[bytes, Found] = {}
    lost: set[bytes] = set()
    for found in live.values():
        line = _line_to_known(found, live, rooted, lost)
        above = line[-1].parent if line else None
        if line and (above is None or above in rooted):
            rooted.update((member.name, member) for member in reversed(line))
        else:
            lost.update(member.name for member in line)
    return list(rooted.values())


def _line_to_known(
    found: Found, live: dict[bytes, Found], rooted: dict[bytes, Found], lost: set[bytes]
) -> list[Found]:
    """The block and those of its ancestors of which it is not known whether they are rooted."""
    line: dict[bytes, Found] = {}
    member: Found | None = found
    while member is not None and not (
        member.name in rooted or member.name in lost or member.name in line
    ):
        line[member.name] = member
        member = live.get(member.parent) if member.parent is not None else None
    return list(line.values())
