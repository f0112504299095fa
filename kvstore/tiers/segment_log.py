"""The files of the disk tier: one open segment that is appended to, and sealed ones.

Plain blocking code; `DiskTier` calls it through its runner, one writer at a time. Reads may come
from any thread.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

from kvstore.files import Files
from kvstore.record import Damaged, Header
from kvstore.tiers.segment import (
    PAGE_BYTES,
    Placed,
    check_first_page,
    file_name,
    footer_bytes,
    pack_first_page,
    pack_footer,
    pack_record,
    read_footer,
    record_bytes,
    scan,
    segment_ids,
)

_log = logging.getLogger("kvstore.disk")

LEAST_SEGMENTS = 4


class Found(NamedTuple):
    """A record that an earlier run left."""

    header: Header
    segment_id: int
    offset: int


class SegmentLog:
    """Segments of at most `segment_bytes`, together at most `capacity_bytes`, at any moment.

    Invariant: all segments but the open one are sealed and never change. `capacity_bytes` holds
    at least four segments; one of them is the room in which hot blocks are written forward.
    """

    def __init__(
        self,
        files: Files,
        capacity_bytes: int,
        segment_bytes: int,
        on_sealed: Callable[[int, int, int], None],
    ) -> None:
        assert capacity_bytes >= LEAST_SEGMENTS * segment_bytes
        self._files = files
        self.capacity_bytes = capacity_bytes
        self.segment_bytes = segment_bytes
        self._on_sealed = on_sealed
        self._handles: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._records: list[Placed] = []
        self._open_id = 0

    @property
    def count(self) -> int:
        """How many segments there are."""
        return len(self._handles)

    @property
    def used_bytes(self) -> int:
        """What the segments take on disk."""
        return sum(self._sizes.values())

    @property
    def open_id(self) -> int:
        """The segment that is appended to; 0: none yet."""
        return self._open_id

    def fits(self, header: Header) -> bool:
        """Whether an empty segment could take the record."""
        return PAGE_BYTES + record_bytes(header) + footer_bytes(1) <= self.segment_bytes

    def has_room(self, header: Header) -> bool:
        """Whether the open segment can take the record, and its footer afterwards."""
        if not self._open_id:
            return False
        size = self._sizes[self._open_id] + record_bytes(header)
        return size + footer_bytes(len(self._records) + 1) <= self.segment_bytes

    def place(self, header: Header) -> Placed:
        """Takes the next stretch of the open segment for a record."""
        place = Placed(self._sizes[self._open_id], header)
        self._sizes[self._open_id] += record_bytes(header)
        return place

    def write(self, place: Placed, payload: memoryview | bytes) -> None:
        """Writes a record where `place` says."""
        handle = self._handles[self._open_id]
        self._files.write(handle, pack_record(place.header, payload), place.offset)
        self._records.append(place)

    def read(self, segment_id: int, size: int, offset: int) -> bytes:
        """Bytes of a segment. KeyError if it was dropped."""
        return self._files.read(self._handles[segment_id], size, offset)

    def roll(self) -> None:
        """Seals the open segment and begins the next."""
        self.seal_if_written()
        if self._open_id:
            return  # Nothing was written to it: it serves on.
        segment_id = max(self._handles, default=0) + 1
        handle = self._files.open(file_name(segment_id), create=True)
        self._files.write(handle, [pack_first_page(segment_id)], 0)
        self._handles[segment_id] = handle
        self._sizes[segment_id] = PAGE_BYTES
        self._open_id = segment_id

    def seal_if_written(self) -> None:
        """Completes the open segment, if it has records, and waits until it is on the device."""
        if not self._open_id or not self._records:
            return
        segment_id, records = self._open_id, self._records
        self._seal(segment_id, records)
        self._open_id, self._records = 0, []

    def surplus(self) -> int | None:
        """The oldest segment, if it must go so that the next one will have room."""
        if (len(self._handles) + 1) * self.segment_bytes <= self.capacity_bytes:
            return None
        return min(self._handles)

    def drop(self, segment_id: int) -> None:
        """Deletes a sealed segment."""
        assert segment_id != self._open_id
        handle = self._handles.pop(segment_id)
        del self._sizes[segment_id]
        self._files.remove(file_name(segment_id))
        self._files.close(handle)

    def recover(self) -> list[Found]:
        """The intact records of all segments; unsealed ones are cut behind the last and sealed.

        Files of another version or of strangers are left alone, and refused: TierError.
        """
        found: list[Found] = []
        for segment_id in segment_ids(self._files.names()):
            handle = self._files.open(file_name(segment_id), create=False)
            try:
                records = self._recover_segment(segment_id, handle)
            except Damaged as error:
                _log.warning("segment %d is dropped: %s", segment_id, error)
                self._files.close(handle)
                self._files.remove(file_name(segment_id))
                continue
            found += [Found(record.header, segment_id, record.offset) for record in records]
        self._drop_surplus_at_start()
        return [record for record in found if record.segment_id in self._handles]

    def _recover_segment(self, segment_id: int, handle: int) -> list[Placed]:
        check_first_page(self._files.read(handle, PAGE_BYTES, 0), segment_id)
        self._handles[segment_id] = handle
        records = read_footer(self._files, handle)
        if records is None:
            records = list(scan(self._files, handle))
            end = max((r.offset + record_bytes(r.header) for r in records), default=PAGE_BYTES)
            self._files.truncate(handle, end)
            self._sizes[segment_id] = end
            self._seal(segment_id, records)
        self._sizes[segment_id] = self._files.size_bytes(handle)
        return records

    def _drop_surplus_at_start(self) -> None:
        """The limits may be smaller than those of the run before."""
        while self._handles and self.used_bytes + self.segment_bytes > self.capacity_bytes:
            self.drop(min(self._handles))

    def _seal(self, segment_id: int, records: list[Placed]) -> None:
        footer = pack_footer(records)
        handle = self._handles[segment_id]
        self._files.write(handle, [footer], self._sizes[segment_id])
        self._sizes[segment_id] += len(footer)
        self._files.sync(handle)
        size = sum(place.header.block_bytes for place in records)
        self._on_sealed(segment_id, len(records), size)

    def close(self) -> None:
        """Seals what is open and lets go of the files."""
        try:
            self.seal_if_written()
        finally:
            for handle in self._handles.values():
                self._files.close(handle)
            self._handles.clear()

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        assert self.used_bytes <= self.capacity_bytes, "more bytes than capacity"
        for segment_id, handle in self._handles.items():
            size = self._files.size_bytes(handle)
            assert size <= self._sizes[segment_id], f"segment {segment_id} is longer than counted"
