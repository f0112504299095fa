"""The format of one disk segment: a first page, records, and once sealed a footer.

```
page 0            magic, version, segment id, digest                     (4096 bytes)
record …          header (256 bytes, rest of its page zero), payload     (whole pages)
footer            64-bit offset + 256-byte header of every record        (whole pages)
last page         magic, count and length of the footer, its digest      (4096 bytes)
```

Everything begins on a page, so that files can be read and written past the page cache. Without
a footer the records are found by walking from page to page.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from kvstore.files import Files
from kvstore.record import HEADER_BYTES, Damaged, Header

PAGE_BYTES = 4096

_FIRST = struct.Struct("<8sIQ")
_FIRST_MAGIC = b"KVSTSEG1"
_LAST = struct.Struct("<8sQQ16s")
_LAST_MAGIC = b"KVSTEND1"
_ENTRY = struct.Struct(f"<Q{HEADER_BYTES}s")
_VERSION = 1
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
    return sorted(int(match[1], 16) for name in names if (match := _NAME.fullmatch(name)))


def pages(size: int) -> int:
    """`size` rounded up to whole pages, in bytes."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def record_bytes(header: Header) -> int:
    """What a record takes in a segment."""
    return PAGE_BYTES + pages(header.stored_bytes)


def footer_bytes(records: int) -> int:
    """What footer and last page take for so many records."""
    return pages(records * _ENTRY.size) + PAGE_BYTES


def pack_first_page(segment_id: int) -> bytes:
    """The page that begins a segment."""
    body = _FIRST.pack(_FIRST_MAGIC, _VERSION, segment_id)
    return (body + xxhash.xxh3_128_digest(body)).ljust(PAGE_BYTES, b"\0")


def check_first_page(page: bytes, segment_id: int) -> None:
    """Raises Damaged unless the page begins this segment."""
    if page != pack_first_page(segment_id):
        raise Damaged("segment: its first page is not as written")


def pack_record(header: Header, payload: memoryview | bytes) -> list[bytes | memoryview]:
    """The pages of a record, as buffers to be written one behind the other."""
    padding = bytes(pages(len(payload)) - len(payload))
    return [header.pack().ljust(PAGE_BYTES, b"\0"), payload, padding]


def pack_footer(records: list[Placed]) -> bytes:
    """Footer and last page of a segment that is complete."""
    entries = b"".join(_ENTRY.pack(place.offset, place.header.pack()) for place in records)
    digest = xxhash.xxh3_128_digest(entries)
    last = _LAST.pack(_LAST_MAGIC, len(records), len(entries), digest)
    return entries.ljust(pages(len(entries)), b"\0") + last.ljust(PAGE_BYTES, b"\0")


def read_footer(files: Files, handle: int) -> list[Placed] | None:
    """The records that the footer names; None where there is no intact footer."""
    size = files.size_bytes(handle)
    if size < 2 * PAGE_BYTES or size % PAGE_BYTES:
        return None
    last = files.read(handle, _LAST.size, size - PAGE_BYTES)
    magic, count, length, digest = _LAST.unpack(last)
    if magic != _LAST_MAGIC or length != count * _ENTRY.size or footer_bytes(count) > size:
        return None
    entries = files.read(handle, length, size - footer_bytes(count))
    if len(entries) != length or xxhash.xxh3_128_digest(entries) != digest:
        return None
    try:
        return [Placed(at, Header.unpack(packed)) for at, packed in _ENTRY.iter_unpack(entries)]
    except Damaged:
        return None


def scan(files: Files, handle: int) -> Iterator[Placed]:
    """The intact records of a segment without footer, in order; damaged stretches are passed over.

    A record counts only if its payload has its digest: the tail of a crash may be torn anywhere.
    """
    size = files.size_bytes(handle)
    offset = PAGE_BYTES
    while offset + PAGE_BYTES <= size:
        try:
            header = Header.unpack(files.read(handle, HEADER_BYTES, offset))
            payload = files.read(handle, header.stored_bytes, offset + PAGE_BYTES)
            if xxhash.xxh3_128_digest(payload) != header.payload_digest:
                raise Damaged("record: torn")
        except Damaged:
            offset += PAGE_BYTES
            continue
        yield Placed(offset, header)
        offset += record_bytes(header)
