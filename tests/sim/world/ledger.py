"""What must be on a machine's disk after its node has started again.

* After a clean end or SIGKILL: everything that the index held, since it was handed to the
  operating system.
* After a power cut: what lay at a place that was announced as sealed or synced, like all its
  ancestors, and has not left the index since.
* What the index says to be there is there, intact.

Nothing is owed of what the operator damaged, and nothing where the node could not read its disk
at the start, or has to live with less of it.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest

from kvstore.api.tier import BlockRef
from kvstore.files import PAGE_BYTES
from kvstore.record import HEADER_BYTES, Header
from kvstore.tiers.disk_index import Entry
from kvstore.tiers.segment import file_name
from tests.sim.files import SimulatedFiles
from tests.sim.world.trace import Broken
from tests.sim.world.universe import Name, names_by_stored_name, short, stored_name

if TYPE_CHECKING:
    from tests.sim.world.machine import Running


class Ledger:
    """Keeps the books of one machine's disk."""

    def __init__(self, files: SimulatedFiles) -> None:
        self._files = files
        self._safe_bytes: dict[int, int] = {}
        """How much of each segment is on the device, as far as the node said."""
        self._safe: set[Entry] = set()
        """Blocks that were at such a place once. What is written forward must stay safe."""
        self._sealed_at_start: set[int] = set()
        self._leaving: int | None = None
        """The segment that had to go when the process ended."""
        self._owed: set[bytes] = set()
        self._doubtful: Counter[bytes] = Counter()
        """What somebody asked to discard since the last start: it may be gone, or half gone."""
        self.below: set[BlockRef] = set()
        """Every block that this disk ever said to hold."""
        self._damaged = False
        """Whether the files are, since some time or other, not as they were written."""
        self.excused = False
        """Something was done since the last start after which nothing is owed."""
        self.kept = 0
        """How many blocks were owed, and there."""

    def sealed(self, running: "Running | None", segment_id: int) -> None:
        """The node says that what it has written to a segment is on the device."""
        if running is None:
            self._sealed_at_start.add(segment_id)
        else:
            log = running.disk._segments
            is_open = segment_id == log.open_id  # Its file may be longer than what was written.
            self._safe_bytes[segment_id] = log._end if is_open else log._sizes[segment_id]
            self._safe.update(filter(self._lies_safely, running.disk._index._entries.values()))

    def damage(self) -> None:
        """Something in the files is no longer as it was written."""
        self._damaged = self.excused = True

    def forgetting(self, names: Iterable[Name]) -> None:
        """Blocks are about to be discarded."""
        self._doubtful.update(map(stored_name, names))

    def ended(self, running: "Running", *, power: bool, cleanly: bool = False) -> None:
        """The process is gone; with the power, or only itself."""
        index = running.disk._index
        # It was making room: the next start goes on with that, without writing forward.
        self._leaving = None if cleanly else running.disk._segments.surplus()
        if self._leaving is not None:
            self._safe = set(filter(self._lies_safely, index._entries.values()))
        entries = [
            entry for name in names_by_stored_name() if (entry := index.find(name)) is not None
        ]
        self._owed = {
            entry.name
            for entry in entries
            if self._is_certain(entry) and (not power or self._is_safe(entry))
        }

    def forgotten(self, names: Iterable[Name]) -> None:
        """They were, and that is on the device."""
        self._doubtful.subtract(map(stored_name, names))

    def _is_certain(self, entry: Entry | None) -> bool:
        """Whether a block and its ancestors stay: nobody discards them, and they need not go."""
        while (
            entry is not None
            and not self._doubtful[entry.name]
            and entry.segment_id != self._leaving
        ):
            entry = entry.above
        return entry is None

    def _is_safe(self, entry: Entry | None) -> bool:
        """Whether a block and its ancestors are on the device."""
        while entry is not None and entry in self._safe:
            entry = entry.above
        return entry is None

    def _lies_safely(self, entry: Entry) -> bool:
        return entry.offset < self._safe_bytes.get(entry.segment_id, 0)

    def opened(self, running: "Running", *, less_room: bool) -> None:
        """It runs again. Raises Broken if something is missing."""
        index, log = running.disk._index, running.disk._segments
        missing = [name for name in self._owed if index.find(name) is None]
        if missing and not less_room and not self.excused:
            names = ", ".join(sorted(short(names_by_stored_name()[name]) for name in missing))
            raise Broken(
                f"{running.process.name}: of {len(self._owed)} blocks that must be on disk "
                f"{len(missing)} are gone: {names}"
            )
        if not self._damaged:
            self._check_records(running)
        self.kept += len(self._owed) - len(missing)
        self._safe_bytes = {
            segment_id: size if segment_id in self._sealed_at_start else safe
            for segment_id, size in log._sizes.items()
            if (safe := self._safe_bytes.get(segment_id, 0)) or segment_id in self._sealed_at_start
        }
        self._safe = set(filter(self._lies_safely, index._entries.values()))
        self._owed, self._sealed_at_start, self._doubtful = set(), set(), Counter()
        self.excused = False

    def _check_records(self, running: "Running") -> None:
        """Raises Broken unless each block of the index lies where it says, intact."""
        for entry in running.disk._index._entries.values():
            content = self._files.content(file_name(entry.segment_id))
            header = Header.unpack(bytes(content[entry.offset : entry.offset + HEADER_BYTES]))
            start = entry.offset + PAGE_BYTES
            payload = bytes(content[start : start + header.stored_bytes])
            if header.name != entry.name or xxh3_128_digest(payload) != header.payload_digest:
                name = short(names_by_stored_name()[entry.name])
                raise Broken(f"{running.process.name}: {name} in the index is not on disk")
