"""The files of the disk tier: one open segment that is appended to, and sealed ones.

Plain blocking code; `DiskTier` calls it through its runner. One change of the log happens at a
time, but the records of one change may be written by several threads at once, and reads may come
from any thread.
"""

import contextlib
import errno
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.files import PAGE_BYTES, Files
from kvstore.record import Damaged, Header, Kind
from kvstore.staging import Staging
from kvstore.tiers.segment import (
    SEQUENCE_BITS,
    Placed,
    check_first_page,
    file_name,
    footer_bytes,
    pack_first_page,
    pack_footer,
    read_footer,
    record_bytes,
    scan,
    segment_ids,
    write_pages,
)

_log = logging.getLogger("kvstore.disk")

LEAST_SEGMENTS = 4
UNOPENED = -1
"""The handle of a segment that cannot be opened, and still takes its room."""
SPARE = "spare"
"""The name of a file that was a segment, and will be one again."""


class Found(NamedTuple):
    """What is remembered of a record that an earlier run left."""

    kind: Kind
    sequence: int
    forgets: int
    name: bytes
    parent: bytes | None
    tag: bytes
    block_bytes: int
    stored_bytes: int
    expires_s: int
    segment_id: int
    offset: int

    @classmethod
    def of(cls, place: Placed, segment_id: int) -> "Found":
        """A record where it lies."""
        h = place.header
        return cls(
            h.kind, h.sequence, h.forgets, h.name, h.parent, h.tag, h.block_bytes, h.stored_bytes,
            h.expires_s, segment_id, place.offset,
        )  # fmt: skip


def _can_be_counted(header: Header, segment_id: int) -> bool:
    """Whether a record's count of forget records leaves any for what comes."""
    return header.forgets < 2 * ((segment_id + 1) << SEQUENCE_BITS)


class SegmentLog:
    """Segments of at most `segment_bytes`, together at most `capacity_bytes`, at any moment.

    Invariant: all segments but the open one are sealed and never change. `capacity_bytes` holds
    at least four segments; one of them is the room in which hot blocks are written forward.

    The file of a dropped segment becomes the next one: to write over what is on the device already
    is half as fast again as to extend a file. Its old records are none of the new segment's, by
    their numbers, which begin with the segment's id: ids only grow while a process runs, and
    a file that waits is deleted when the process ends or the next one begins.
    """

    def __init__(
        self,
        files: Files,
        capacity_bytes: int,
        segment_bytes: int,
        on_sealed: Callable[[int, int, int], None],
        staging: Staging,
    ) -> None:
        assert capacity_bytes >= LEAST_SEGMENTS * segment_bytes
        self._files = files
        self._staging = staging
        self.capacity_bytes = capacity_bytes
        self.segment_bytes = segment_bytes
        self._on_sealed = on_sealed
        self._handles: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._records: list[Placed] = []
        self._safe_records = 0
        """How many of the records were announced, or never will be."""
        self._end = 0
        """Where the open segment's next record will lie; its file may be longer."""
        self._spare_bytes = 0
        """The length of the file that can be used again; 0: there is none."""
        self._spare_is_ours = True
        """Whether it was dropped by this process, and not left by an earlier one."""
        self._placed = 0
        """How many records have a place in the open segment and are being written."""
        self._open_id = 0
        self.last_id = 0
        """The newest segment that there ever was, as far as is known."""
        self.unread_id = 0
        """The newest that could not be read at the start; 0: none."""
        self._doubtful = False
        """A sync of the open segment has failed."""
        self._dropped: list[int] = []

    @property
    def count(self) -> int:
        """How many segments there are."""
        return len(self._handles)

    @property
    def used_bytes(self) -> int:
        """What the segments take on disk, and the file that waits to be one."""
        return sum(self._sizes.values()) + self._spare_bytes

    @property
    def has_spare(self) -> bool:
        """Whether a file waits to be used again."""
        return self._spare_bytes > 0

    @property
    def open_id(self) -> int:
        """The segment that is appended to; 0: none yet."""
        return self._open_id

    @property
    def doubtful(self) -> bool:
        """Whether what was written to the open segment may never come to the device."""
        return self._doubtful

    def fits(self, header: Header) -> bool:
        """Whether an empty segment could take the record."""
        return PAGE_BYTES + record_bytes(header) + footer_bytes(1) <= self.segment_bytes

    def has_room(self, *headers: Header) -> bool:
        """Whether the open segment can take these records, and its footer afterwards."""
        if not self._open_id:
            return False
        size = self._end + sum(map(record_bytes, headers))
        records = len(self._records) + self._placed + len(headers)
        return size + footer_bytes(records) <= self.segment_bytes

    def place(self, header: Header) -> Placed:
        """Takes the next stretch of the open segment for a record, to be written, then kept."""
        place = Placed(self._end, header)
        self._end += record_bytes(header)
        self._sizes[self._open_id] = max(self._sizes[self._open_id], self._end)
        self._placed += 1
        return place

    def write(self, place: Placed, buffers: Sequence[memoryview], behind: int = 0) -> None:
        """Writes a record where `place` says, or so far behind; may run beside other writes."""
        self._files.write(self._handles[self._open_id], buffers, place.offset + behind)

    def keep(self, written: Sequence[Placed]) -> None:
        """What was placed is over: `written`, in order, are the records that lie there now.

        Behind the last of them the stretch is free again; a gap before it stays empty.
        """
        self._placed = 0
        self._records += written
        last = self._records[-1] if self._records else None
        end = last.offset + record_bytes(last.header) if last is not None else PAGE_BYTES
        if end < self._end:
            self._cut_open(end)

    def _cut_open(self, end: int) -> None:
        """Gives back what lies behind `end`; where that fails it still counts."""
        with contextlib.suppress(OSError):
            self._cut(self._open_id, end)
            self._end = end

    def _cut(self, segment_id: int, end: int) -> None:
        self._files.truncate(self._handles[segment_id], end)
        self._sizes[segment_id] = end

    def read_into(self, segment_id: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes of a segment; how many came. KeyError if it was dropped."""
        return self._files.read_into(self._handles[segment_id], buffers, offset)

    def roll(self) -> None:
        """Seals the open segment and begins the next."""
        self._seal_if_written()
        if self._open_id:
            # Nothing was written to it: it serves on, once what failed to be is cut off.
            if self._end > PAGE_BYTES:
                self._cut_open(PAGE_BYTES)
            if self._end > PAGE_BYTES:
                raise OSError(errno.EIO, "what could not be written cannot be cut off either")
            return
        self._drop_what_is_too_much()  # What was surplus earlier and could not be deleted.
        if self._spare_bytes and not self._spare_is_ours:
            self.remove_spare()
        segment_id = self.last_id = self.last_id + 1
        begin = self._begin_again if self._spare_bytes else self._begin_new
        handle = begin(segment_id)
        try:
            write_pages(self._files, handle, pack_first_page(segment_id), 0, self._staging)
        except OSError:
            with contextlib.suppress(OSError):
                self._remove(segment_id)
            raise
        self._open_id, self._end, self._doubtful = segment_id, PAGE_BYTES, False

    def _begin_new(self, segment_id: int) -> int:
        """A new file for a segment."""
        handle = self._files.open(file_name(segment_id), create=True)
        self._handles[segment_id] = handle
        self._sizes[segment_id] = PAGE_BYTES
        return handle

    def _begin_again(self, segment_id: int) -> int:
        """The spare file for a segment; its new name is on the device before it is written to.

        Else a power cut could bring the old segment back, with some of the new one's bytes in it.
        """
        name = file_name(segment_id)
        try:
            self._files.rename(SPARE, name)
        except OSError:
            self.remove_spare()
            raise
        self._handles[segment_id] = UNOPENED
        self._sizes[segment_id], self._spare_bytes = self._spare_bytes, 0
        try:
            handle = self._handles[segment_id] = self._files.open(name, create=False)
            self._files.sync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                self._remove(segment_id)
            raise
        return handle

    def sync(self) -> None:
        """Returns when all records are on the device; the open segment stays open.

        It has no footer then and is scanned at the next start. Sealing it instead would fill the
        room with nearly empty segments wherever little is written.
        """
        if len(self._records) > self._safe_records:
            self._sync(self._open_id)
            self._announce(self._open_id, self._records[self._safe_records :])
            self._safe_records = len(self._records)

    def _sync(self, segment_id: int) -> None:
        """After a failure nobody is told that these records are safe, whatever a later one says.

        The kernel may have given up the pages, and then has nothing to fail with again.
        """
        try:
            self._files.sync(self._handles[segment_id])
        except OSError:
            if segment_id == self._open_id:
                self._safe_records = len(self._records)
                self._doubtful = True
            raise

    def _seal_if_written(self) -> None:
        if not self._open_id or not self._records:
            return
        # First the records: a power cut may keep a footer and lose what it speaks of.
        self.sync()
        if self._doubtful:
            # Or records that it speaks of: the next start looks for them, and adds the footer.
            most = max(self._sizes[self._open_id], self._end + footer_bytes(len(self._records)))
            self._sizes[self._open_id] = most
        else:
            self._seal(self._open_id, self._records, self._end)
        self._open_id, self._records, self._safe_records = 0, [], 0
        self._doubtful = False

    def surplus(self) -> int | None:
        """The oldest segment, if it must go so that the open and the next one have their room."""
        sealed = self._handles.keys() - {self._open_id}
        sealed_bytes = sum(self._sizes[segment_id] for segment_id in sealed)
        few = len(sealed) <= 2 * self.capacity_bytes // self.segment_bytes  # Each is an open file.
        if few and sealed_bytes + 2 * self.segment_bytes <= self.capacity_bytes:
            return None
        return self.oldest_sealed()

    def oldest_sealed(self) -> int | None:
        """The segment that goes first. Never a newer one: it says what is forgotten in this."""
        return min(self._handles.keys() - {self._open_id}, default=None)

    def drop(self, segment_id: int, *, reuse: bool = False) -> None:
        """Ends a sealed segment, once what was written forward from it is on the device.

        Its file is deleted; or with `reuse`, if no other one waits already, used again.
        """
        assert segment_id != self._open_id
        self.sync()
        if self._doubtful:
            raise OSError(errno.EIO, "what was written forward may not be on the device")
        if not reuse or self._spare_bytes or not self._keep_as_spare(segment_id):
            self._remove(segment_id)

    def _keep_as_spare(self, segment_id: int) -> bool:
        try:
            self._files.rename(file_name(segment_id), SPARE)
        except OSError:
            return False
        self._spare_bytes, self._spare_is_ours = self._sizes[segment_id], True
        self._forget(segment_id)
        return True

    def remove_spare(self) -> None:
        """Gives the room of the file that waits back to the device."""
        with contextlib.suppress(FileNotFoundError):
            self._files.remove(SPARE)
        self._spare_bytes = 0

    def _remove(self, segment_id: int) -> None:
        self._files.remove(file_name(segment_id))
        self._forget(segment_id)

    def _forget(self, segment_id: int) -> None:
        self._dropped.append(segment_id)
        del self._sizes[segment_id]
        self._close(self._handles.pop(segment_id))

    def take_dropped(self) -> list[int]:
        """The segments that are gone since the last call: nothing may point into them."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _close(self, handle: int) -> None:
        """A handle is gone whatever its closing says."""
        if handle != UNOPENED:
            with contextlib.suppress(OSError):
                self._files.close(handle)

    def recover(self) -> list[Found]:
        """The intact records of all segments; unsealed ones are cut behind the last and sealed.

        A segment without a single record, or of another version, is deleted; files with other
        names are left alone. A damaged first page costs nothing: what was forgotten in a segment
        must not come back with it.
        """
        found: list[Found] = []
        try:
            names = self._files.names()
            self._remove_old_spare(names)
            for segment_id in segment_ids(names):
                self.last_id = segment_id
                self._admit(segment_id)
            self._drop_what_is_too_much()  # First: sealing what is left takes room as well.
            for segment_id in sorted(self._handles):
                found += self._recover_or_keep(segment_id)
            self._drop_what_is_too_much()
        except BaseException:
            self._close_all()
            raise
        return [record for record in found if record.segment_id in self._handles]

    def _remove_old_spare(self, names: Sequence[str]) -> None:
        """Where that fails it counts as a full segment, and is tried again before the next begins.

        Used again it could become a segment with the id of one that it was before.
        """
        if SPARE in names:
            self._spare_bytes, self._spare_is_ours = self.segment_bytes, False
            with contextlib.suppress(OSError):
                self.remove_spare()

    def _admit(self, segment_id: int) -> None:
        """Opens a segment and counts it; as a full one where that cannot be done."""
        self._handles[segment_id] = UNOPENED
        self._sizes[segment_id] = self.segment_bytes
        with contextlib.suppress(OSError):
            handle = self._handles[segment_id] = self._files.open(
                file_name(segment_id), create=False
            )
            self._sizes[segment_id] = self._files.size_bytes(handle)

    def _recover_or_keep(self, segment_id: int) -> list[Found]:
        """The records of a segment. Without any it is deleted, if it can be."""
        for attempt in (1, 2):
            try:
                if self._handles[segment_id] == UNOPENED:
                    name = file_name(segment_id)
                    self._handles[segment_id] = self._files.open(name, create=False)
                records = self._recover_segment(segment_id, self._handles[segment_id])
                return [Found.of(record, segment_id) for record in records]
            except Damaged as error:
                _log.warning("segment %d is dropped: %s", segment_id, error)
                with contextlib.suppress(OSError):
                    self._remove(segment_id)
                break
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise  # Nothing is wrong with the file; without it others would rise again.
                # It is dropped in its turn; the other segments are served meanwhile.
                _log.warning("segment %d cannot be read: %s", segment_id, error)
                if attempt == 2:
                    self.unread_id = segment_id
        return []

    def _recover_segment(self, segment_id: int, handle: int) -> list[Placed]:
        intact, numbers = check_first_page(self._files, handle, segment_id, self._staging)
        if not intact:
            _log.warning("segment %d: its first page is not as written", segment_id)
        records = read_footer(self._files, handle, numbers, self._staging)
        if records is None:
            records = list(scan(self._files, handle, numbers, self._staging))
            if not records and not intact:
                raise Damaged("segment: nothing in it is as written")
            end = max((r.offset + record_bytes(r.header) for r in records), default=PAGE_BYTES)
            self._sizes[segment_id] = end
            try:
                self._files.truncate(handle, end)
                self._sync(segment_id)
                self._seal(segment_id, records, end)
                self._announce(segment_id, records)
            except OSError as error:  # A full device, say; the next start scans it again.
                _log.warning("segment %d could not be sealed: %s", segment_id, error)
        self._sizes[segment_id] = self._files.size_bytes(handle)
        return [place for place in records if _can_be_counted(place.header, segment_id)]

    def _drop_what_is_too_much(self) -> None:
        """Makes room for one more segment; the limits may be smaller than in the run before."""
        # A file that waits will be that segment.
        while sum(self._sizes.values()) + self.segment_bytes > self.capacity_bytes:
            self.drop(min(self._handles))

    def _seal(self, segment_id: int, records: list[Placed], end: int) -> None:
        """Writes the footer at `end`, where the file then ends."""
        footer, handle = pack_footer(records), self._handles[segment_id]
        sealed_bytes = end + len(footer)
        self._sizes[segment_id] = max(self._sizes[segment_id], sealed_bytes)
        try:
            write_pages(self._files, handle, footer, end, self._staging)
            if self._sizes[segment_id] > sealed_bytes:
                self._cut(segment_id, sealed_bytes)
            self._sync(segment_id)
        except OSError:
            with contextlib.suppress(OSError):
                self._cut(segment_id, end)
            raise

    def _announce(self, segment_id: int, records: Sequence[Placed]) -> None:
        blocks = [place.header for place in records if place.header.kind is Kind.BLOCK]
        if blocks:
            self._on_sealed(segment_id, len(blocks), sum(h.block_bytes for h in blocks))

    def close(self) -> None:
        """Seals what is open and lets go of the files."""
        try:
            self._seal_if_written()
        finally:
            if self._spare_bytes:
                with contextlib.suppress(OSError):
                    self.remove_spare()
            self._close_all()

    def _close_all(self) -> None:
        for handle in self._handles.values():
            self._close(handle)
        self._handles.clear()

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        assert self.used_bytes <= self.capacity_bytes, "more bytes than capacity"
        for segment_id, handle in self._handles.items():
            size = self._files.size_bytes(handle) if handle != UNOPENED else 0
            assert size <= self._sizes[segment_id], f"segment {segment_id} is longer than counted"
