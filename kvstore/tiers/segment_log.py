"""The files of the disk tier: one open segment that is appended to, and sealed ones.

Plain blocking code; `DiskTier` calls it through its runner, one writer at a time. Reads may come
from any thread.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.files import Files
from kvstore.record import Damaged, Header, Kind
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
        self._safe_records = 0
        self._open_id = 0
        self._last_id = 0

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

    def has_room(self, *headers: Header) -> bool:
        """Whether the open segment can take these records, and its footer afterwards."""
        if not self._open_id:
            return False
        size = self._sizes[self._open_id] + sum(map(record_bytes, headers))
        return size + footer_bytes(len(self._records) + len(headers)) <= self.segment_bytes

    def place(self, header: Header) -> Placed:
        """Takes the next stretch of the open segment for a record."""
        place = Placed(self._sizes[self._open_id], header)
        self._sizes[self._open_id] += record_bytes(header)
        return place

    def write(self, place: Placed, payload: memoryview | bytes) -> None:
        """Writes a record where `place` says. If that fails, the stretch is free again."""
        try:
            self._write(self._open_id, pack_record(place.header, payload), place.offset)
        except OSError:
            self._sizes[self._open_id] = place.offset
            raise
        self._records.append(place)

    def _write(self, segment_id: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Writes at the end of a segment, or leaves it as it was."""
        handle = self._handles[segment_id]
        try:
            self._files.write(handle, buffers, offset)
        except OSError:
            with contextlib.suppress(OSError):
                self._files.truncate(handle, offset)
            raise

    def read(self, segment_id: int, size: int, offset: int) -> bytes:
        """Bytes of a segment. KeyError if it was dropped."""
        return self._files.read(self._handles[segment_id], size, offset)

    def roll(self) -> None:
        """Seals the open segment and begins the next."""
        self._seal_if_written()
        if self._open_id:
            return  # Nothing was written to it: it serves on.
        self._drop_what_is_too_much()  # What was surplus earlier and could not be deleted.
        segment_id = self._last_id = self._last_id + 1
        handle = self._files.open(file_name(segment_id), create=True)
        try:
            self._files.write(handle, [pack_first_page(segment_id)], 0)
        except OSError:
            self._files.close(handle)
            self._files.remove(file_name(segment_id))
            raise
        self._handles[segment_id] = handle
        self._sizes[segment_id] = PAGE_BYTES
        self._open_id = segment_id

    def sync(self) -> None:
        """Returns when all records are on the device; the open segment stays open.

        It has no footer then and is scanned at the next start. Sealing it instead would fill the
        room with nearly empty segments wherever little is written.
        """
        if len(self._records) > self._safe_records:
            self._files.sync(self._handles[self._open_id])
            self._announce(self._open_id, self._records[self._safe_records :])
            self._safe_records = len(self._records)

    def _seal_if_written(self) -> None:
        if not self._open_id or not self._records:
            return
        segment_id, records = self._open_id, self._records
        self._seal(segment_id, records)
        self._announce(segment_id, records[self._safe_records :])
        self._open_id, self._records, self._safe_records = 0, [], 0

    def surplus(self) -> int | None:
        """The oldest segment, if it must go so that the open and the next one have their room."""
        sealed = self._handles.keys() - {self._open_id}
        sealed_bytes = sum(self._sizes[segment_id] for segment_id in sealed)
        few = len(sealed) <= 2 * self.capacity_bytes // self.segment_bytes  # Each is an open file.
        if few and sealed_bytes + 2 * self.segment_bytes <= self.capacity_bytes:
            return None
        return min(sealed)

    def drop(self, segment_id: int) -> None:
        """Deletes a sealed segment, once what was written forward from it is on the device."""
        assert segment_id != self._open_id
        self.sync()
        self._files.remove(file_name(segment_id))
        self._files.close(self._handles.pop(segment_id))
        del self._sizes[segment_id]

    def recover(self) -> list[Found]:
        """The intact records of all segments; unsealed ones are cut behind the last and sealed.

        A segment that does not begin as it was written, or was written by another version, is
        deleted; files with other names are left alone.
        """
        found: list[Found] = []
        for segment_id in segment_ids(self._files.names()):
            self._last_id = segment_id
            handle = self._files.open(file_name(segment_id), create=False)
            try:
                records = self._recover_segment(segment_id, handle)
            except Damaged as error:
                _log.warning("segment %d is dropped: %s", segment_id, error)
                self._files.close(handle)
                self._files.remove(file_name(segment_id))
                continue
            except OSError as error:
                # It counts and is dropped in its turn; the other segments are served meanwhile.
                _log.warning("segment %d cannot be read: %s", segment_id, error)
                self._handles[segment_id] = handle
                self._sizes[segment_id] = self.segment_bytes
                continue
            found += [Found(record.header, segment_id, record.offset) for record in records]
        self._drop_what_is_too_much()
        return [record for record in found if record.segment_id in self._handles]

    def _recover_segment(self, segment_id: int, handle: int) -> list[Placed]:
        check_first_page(self._files.read(handle, PAGE_BYTES, 0), segment_id)
        self._handles[segment_id] = handle
        records = read_footer(self._files, handle)
        if records is None:
            records = list(scan(self._files, handle))
            end = max((r.offset + record_bytes(r.header) for r in records), default=PAGE_BYTES)
            self._sizes[segment_id] = end
            try:
                self._files.truncate(handle, end)
                self._seal(segment_id, records)
                self._announce(segment_id, records)
            except OSError as error:  # A full device, say; the next start scans it again.
                _log.warning("segment %d could not be sealed: %s", segment_id, error)
        self._sizes[segment_id] = self._files.size_bytes(handle)
        return records

    def _drop_what_is_too_much(self) -> None:
        """Makes room for one more segment; the limits may be smaller than in the run before."""
        while self._handles and self.used_bytes + self.segment_bytes > self.capacity_bytes:
            self.drop(min(self._handles))

    def _seal(self, segment_id: int, records: list[Placed]) -> None:
        footer, end = pack_footer(records), self._sizes[segment_id]
        self._write(segment_id, [footer], end)
        try:
            self._files.sync(self._handles[segment_id])
        except OSError:
            with contextlib.suppress(OSError):
                self._files.truncate(self._handles[segment_id], end)
            raise
        self._sizes[segment_id] = end + len(footer)

    def _announce(self, segment_id: int, records: Sequence[Placed]) -> None:
        blocks = [place.header for place in records if place.header.kind is Kind.BLOCK]
        if blocks:
            self._on_sealed(segment_id, len(blocks), sum(h.block_bytes for h in blocks))

    def close(self) -> None:
        """Seals what is open and lets go of the files."""
        try:
            self._seal_if_written()
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
