"""The format of one disk segment: a first page, records, and once sealed a footer.

```
page 0            magic, version, segment id, digest                     (4096 bytes)
record …          header (256 bytes, rest of its page zero), payload     (whole pages)
footer            64-bit offset + 256-byte header of every record        (whole pages)
last page         magic, count and length of the footer, its digest      (4096 bytes)
```

Everything begins on a page, so that files can be read and written past the page cache. Without
a footer the records are found by walking from page to page.

A file may have been an older segment before. What is left of that is told by its numbers: those
of a segment's own records begin with its id.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from kvstore.files import PAGE_BYTES, Files
from kvstore.record import HEADER_BYTES, MAGIC, Damaged, Header
from kvstore.staging import Staging

_FIRST = struct.Struct("<8sIQ")
_FIRST_MAGIC = b"KVSTSEG1"
_LAST = struct.Struct("<8sQQ16s")
_LAST_MAGIC = b"KVSTEND1"
_ENTRY = struct.Struct(f"<Q{HEADER_BYTES}s")
_VERSION = 2
_UNNUMBERED_VERSION = 1
"""Earlier nodes numbered records from the newest id at their start, and used no file again."""
MAX_ID = 2**32 - 1
SEQUENCE_BITS = 32
"""Records are numbered from their segment's id, shifted by so much."""
SCAN_BYTES = 1 << 20
"""Segments without footer are looked through in such steps."""
_NAME = re.compile(r"([0-9a-f]{16})\.segment")


class Placed(NamedTuple):
    """A record's header and where it begins in its segment."""

    offset: int
    header: Header


def file_name(segment_id: int) -> str:
    """What the file of a segment is called."""
    return f"{segment_id:016x}.segment"


def segment_ids(names: list[str]) -> list[int]:
    """The ids of the segments among the files of a directory, oldest first."""
    ids = (int(match[1], 16) for name in names if (match := _NAME.fullmatch(name)))
    return sorted(segment_id for segment_id in ids if 0 < segment_id < MAX_ID)


def pages(size: int) -> int:
    """`size` rounded up to whole pages, in bytes."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def record_bytes(header: Header) -> int:
    """What a record takes in a segment."""
    return PAGE_BYTES + pages(header.stored_bytes)


def footer_bytes(records: int) -> int:
    """What footer and last page take for so many records."""
    return pages(records * _ENTRY.size) + PAGE_BYTES


def pack_first_page(segment_id: int, version: int = _VERSION) -> bytes:
    """The page that begins a segment."""
    body = _FIRST.pack(_FIRST_MAGIC, version, segment_id)
    return (body + xxhash.xxh3_128_digest(body)).ljust(PAGE_BYTES, b"\0")


def pack_header_page(header: Header) -> bytes:
    """The page that begins a record."""
    return header.pack().ljust(PAGE_BYTES, b"\0")


def pack_footer(records: list[Placed]) -> bytes:
    """Footer and last page of a segment that is complete."""
    entries = b"".join(_ENTRY.pack(place.offset, place.header.pack()) for place in records)
    digest = xxhash.xxh3_128_digest(entries)
    last = _LAST.pack(_LAST_MAGIC, len(records), len(entries), digest)
    return entries.ljust(pages(len(entries)), b"\0") + last.ljust(PAGE_BYTES, b"\0")


def write_pages(files: Files, handle: int, packed: bytes, offset: int, staging: Staging) -> None:
    """Writes whole pages that lie anywhere in memory."""
    with staging.lent(len(packed)) as buffer:
        buffer[:] = packed
        files.write(handle, [buffer], offset)


class Beginning(NamedTuple):
    """What the first page of a segment says."""

    intact: bool
    numbers: range
    """Sequence numbers that its own records can have; others are of an earlier use of its file."""


def check_first_page(files: Files, handle: int, segment_id: int, staging: Staging) -> Beginning:
    """Whether the file begins as this segment. Raises Damaged if another version wrote it.

    Where it does not, its records still speak for themselves.
    """
    with staging.lent(PAGE_BYTES) as page:
        count = files.read_into(handle, [page], 0)
        first = bytes(page[:count])
    numbers = range(segment_id << SEQUENCE_BITS, (segment_id + 1) << SEQUENCE_BITS)
    if first == pack_first_page(segment_id):
        return Beginning(True, numbers)
    if first == pack_first_page(segment_id, _UNNUMBERED_VERSION):
        return Beginning(True, range(numbers.stop))
    if count == PAGE_BYTES:
        body, digest = first[: _FIRST.size], first[_FIRST.size : _FIRST.size + 16]
        magic, version, _ = _FIRST.unpack(body)
        known = magic == _FIRST_MAGIC and version in (_VERSION, _UNNUMBERED_VERSION)
        if digest == xxhash.xxh3_128_digest(body) and not known:
            raise Damaged(f"segment: written by another version ({version})")
    return Beginning(False, numbers)


def read_footer(files: Files, handle: int, numbers: range, staging: Staging) -> list[Placed] | None:
    """The records that the footer names; None where there is no intact footer of this segment.

    The first of them must lie where it says: a block may end in what looks like a footer, but its
    writer cannot know what else lies in the segment, nor what his own blocks are called there.
    """
    size = files.size_bytes(handle)
    if size < 2 * PAGE_BYTES or size % PAGE_BYTES:
        return None
    with staging.lent(PAGE_BYTES) as page:
        if files.read_into(handle, [page], size - PAGE_BYTES) != PAGE_BYTES:
            return None
        magic, count, length, digest = _LAST.unpack(page[: _LAST.size])
    if magic != _LAST_MAGIC or length != count * _ENTRY.size or footer_bytes(count) > size:
        return None
    with staging.lent(pages(length)) as footer:
        there = files.read_into(handle, [footer], size - footer_bytes(count))
        entries = footer[:length]
        if there < length or xxhash.xxh3_128_digest(entries) != digest:
            return None
        try:
            records = [
                Placed(at, Header.unpack(packed)) for at, packed in _ENTRY.iter_unpack(entries)
            ]
        except Damaged:
            return None
    end = size - footer_bytes(count)
    if not records or not all(_lies_before(end, place) for place in records):
        return None
    if not all(place.header.sequence in numbers for place in records):
        return None  # Of an earlier use of the file.
    with staging.lent(PAGE_BYTES) as page:
        there = files.read_into(handle, [page], records[0].offset)
        first = records[0].header.pack()
        return records if there == PAGE_BYTES and page[:HEADER_BYTES] == first else None


def _lies_before(end: int, place: Placed) -> bool:
    """Whether a record can lie where a footer says."""
    at = place.offset
    return at >= PAGE_BYTES and at % PAGE_BYTES == 0 and at + record_bytes(place.header) <= end


def scan(files: Files, handle: int, numbers: range, staging: Staging) -> Iterator[Placed]:
    """The intact records of a segment without footer, in order; damaged stretches are passed over.

    A record counts only if its payload has its digest: the tail of a crash may be torn anywhere.
    And only if it is one of the segment's own, by its number.
    """
    size = files.size_bytes(handle)
    offset = PAGE_BYTES
    with staging.lent(SCAN_BYTES) as window:
        begins = ends = 0  # What of the file is in the window.
        while offset + PAGE_BYTES <= size:
            if not begins <= offset <= ends - PAGE_BYTES:
                begins, ends = offset, offset + files.read_into(handle, [window], offset)
                if ends < offset + PAGE_BYTES:
                    return
            try:
                header = Header.unpack(window[offset - begins : offset - begins + HEADER_BYTES])
            except Damaged:
                offset += PAGE_BYTES
                continue
            place = Placed(offset, header)
            if header.sequence in numbers and is_intact(files, handle, place, size, staging):
                yield place
                offset += record_bytes(header)
            else:
                offset += PAGE_BYTES


def imitates_records(payload: memoryview) -> bool:
    """Whether a page of it begins as a record does.

    Were it stored and the header before it torn, `scan` would believe what its writer put there.
    """
    firsts = bytes(payload[::PAGE_BYTES])
    page = firsts.find(MAGIC[:1])
    while page >= 0:
        start = page * PAGE_BYTES
        if payload[start : start + len(MAGIC)] == MAGIC:
            return True
        page = firsts.find(MAGIC[:1], page + 1)
    return False


def is_intact(files: Files, handle: int, place: Placed, size: int, staging: Staging) -> bool:
    """Whether the payload behind a header is there and has its digest; `size`: of the file."""
    start, length = place.offset + PAGE_BYTES, place.header.stored_bytes
    if start + length > size:
        return False
    with staging.lent(pages(length)) as payload:
        there = files.read_into(handle, [payload[: pages(length)]], start)
        digest = xxhash.xxh3_128_digest(payload[:length])
        return there >= length and digest == place.header.payload_digest
