"""What lies on disk: names, their places, and who descends from whom. Plain bookkeeping.

Invariant: the index is prefix-closed. A block whose parent leaves takes its descendants along,
because without their beginning nobody can use them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.record import Header, Kind
from kvstore.tiers.segment import record_bytes
from kvstore.tiers.segment_log import Found


@dataclass(slots=True, eq=False)
class Entry:
    """One block on disk."""

    header: Header
    segment_id: int
    offset: int
    used: bool = False
    """Read, or needed by a new child, since it was written: worth writing forward."""
    children: set[bytes] = field(default_factory=set)


class DiskIndex:
    """The blocks of all segments by name."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self.block_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: bytes) -> Entry | None:
        """The entry of a block that is here."""
        return self._entries.get(name)

    def insert(self, header: Header, segment_id: int, offset: int) -> None:
        """Adds a block, or gives it its newer place. Its parent must be here."""
        known = self._entries.get(header.name)
        if known is not None:
            known.header, known.segment_id, known.offset = header, segment_id, offset
            known.used = False
            return
        if header.parent is not None:
            self._entries[header.parent].children.add(header.name)
        self._entries[header.name] = Entry(header, segment_id, offset)
        self.block_bytes += header.block_bytes

    def remove(self, names: Iterable[bytes]) -> int:
        """Forgets blocks and all that descends from them; how many there were."""
        pending = [name for name in names if name in self._entries]
        count = 0
        while pending:
            name = pending.pop()
            entry = self._entries.pop(name, None)
            if entry is None:
                continue
            count += 1
            self.block_bytes -= entry.header.block_bytes
            parent = self._entries.get(entry.header.parent) if entry.header.parent else None
            if parent is not None:
                parent.children.discard(name)
            pending += entry.children
        return count

    def of_namespace(self, tag: bytes) -> list[bytes]:
        """The names of all blocks under one tag."""
        return [name for name, entry in self._entries.items() if entry.header.tag == tag]

    def in_segment(self, segment_id: int) -> list[Entry]:
        """The live blocks of one segment."""
        return [entry for entry in self._entries.values() if entry.segment_id == segment_id]

    def worth_forwarding(self, segment_id: int, budget_bytes: int) -> list[Entry]:
        """What should be written again before a segment goes, parents first, within a budget.

        That is what was used since it was written, what has descendants in other segments, and
        the ancestors of both inside the segment.
        """
        chosen: dict[bytes, Entry] = {}
        left_bytes = budget_bytes
        for entry in self.in_segment(segment_id):
            if not entry.used and not self._has_child_elsewhere(entry):
                continue
            line = self._line_in_segment(entry, chosen)
            cost = sum(record_bytes(member.header) for member in line)
            if cost <= left_bytes:
                left_bytes -= cost
                chosen.update((member.header.name, member) for member in line)
        return list(chosen.values())

    def _has_child_elsewhere(self, entry: Entry) -> bool:
        children = (self._entries[name] for name in entry.children)
        return any(child.segment_id != entry.segment_id for child in children)

    def _line_in_segment(self, entry: Entry, chosen: dict[bytes, Entry]) -> list[Entry]:
        line: list[Entry] = []
        member: Entry | None = entry
        while (
            member is not None
            and member.segment_id == entry.segment_id
            and member.header.name not in chosen
        ):
            line.append(member)
            parent = member.header.parent
            member = self._entries[parent] if parent is not None else None
        return line[::-1]

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        total = 0
        for name, entry in self._entries.items():
            total += entry.header.block_bytes
            parent = entry.header.parent
            if parent is not None:
                assert parent in self._entries, "a block lies on disk without its parent"
                assert name in self._entries[parent].children, "a parent does not know its child"
            assert all(child in self._entries for child in entry.children), "a child is gone"
        assert total == self.block_bytes, f"block bytes {total}, counted {self.block_bytes}"


def survivors(records: Iterable[Found]) -> list[Found]:
    """The blocks that hold after a restart, parents first.

    Of several records of a block the latest counts; what was forgotten afterwards is gone, and so
    is what has lost its parent.
    """
    latest: dict[bytes, Found] = {}
    for found in sorted(records, key=lambda found: found.header.sequence):
        header = found.header
        if header.kind is Kind.BLOCK:
            latest[header.name] = found
        elif header.kind is Kind.FORGET_BLOCK:
            latest.pop(header.name, None)
        else:
            for name in [n for n, f in latest.items() if f.header.tag == header.tag]:
                del latest[name]
    rooted: dict[bytes, Found] = {}
    for found in latest.values():
        rooted.update(_line_to_root(found, latest, rooted))
    return list(rooted.values())


def _line_to_root(
    found: Found, latest: dict[bytes, Found], rooted: dict[bytes, Found]
) -> dict[bytes, Found]:
    """The block and its ancestors down to a rooted one, parents first; empty for an orphan."""
    line: list[Found] = []
    seen: set[bytes] = set()
    member: Found | None = found
    while member is not None and member.header.name not in rooted:
        if member.header.name in seen:
            return {}
        seen.add(member.header.name)
        line.append(member)
        parent = member.header.parent
        if parent is None:
            break
        member = latest.get(parent)
        if member is None:
            return {}
    return {member.header.name: member for member in reversed(line)}
