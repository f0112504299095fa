"""The files of a data directory as bytes, and harm to them (docs/format.md has the layout).

Written from the document alone: it finds records by their pages and shares no code with the disk
tier, so that both cannot be wrong in the same way.
"""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import xxhash

from benchmarks.harm.mutants import (
    HEADER_BYTES,
    HOSTILE_LENGTHS,
    PAGE_BYTES,
    STORED_BYTES_AT,
    RecordMutations,
    cut,
    flipped,
    scribbled,
    zeroed,
)

SUFFIX = ".segment"
SEQUENCE_BITS = 32
BLOCK_KIND, FORGET_BLOCK, FORGET_NAMESPACE = 1, 2, 3
_RECORD_MAGIC = b"KVSR"
_LAST_MAGIC = b"KVSTEND1"
_LAST = struct.Struct("<8sQQ16s")
_ENTRY_BYTES = 8 + HEADER_BYTES


class Place(NamedTuple):
    """Where a record lies. `size` counts its pages, in bytes."""

    file: str
    offset: int
    size: int
    kind: int
    tag: bytes
    name: bytes
    parent: bytes | None
    sequence: int
    stored_bytes: int


class SegmentImage:
    """The segments of a directory, by file name."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    @classmethod
    def of(cls, directory: Path) -> "SegmentImage":
        """What lies in a directory now."""
        paths = sorted(directory.glob(f"*{SUFFIX}"))
        return cls({path.name: path.read_bytes() for path in paths})

    def write(self, directory: Path) -> None:
        """Makes a directory hold these segments and no others."""
        directory.mkdir(exist_ok=True)
        for path in directory.glob(f"*{SUFFIX}"):
            path.unlink()
        for name, data in self.files.items():
            (directory / name).write_bytes(data)

    def copy(self) -> "SegmentImage":
        """Another image with the same bytes."""
        return SegmentImage(dict(self.files))

    def places(self, file: str) -> list[Place]:
        """The records of one segment in their order, headers checked, payloads not."""
        data, offset, found = self.files[file], PAGE_BYTES, []
        while offset + PAGE_BYTES <= len(data):
            place = place_of(file, data[offset : offset + HEADER_BYTES], offset)
            if place is not None and place.sequence >> SEQUENCE_BITS != int(file[:16], 16):
                place = None  # Of the segment that the file was before.
            if place is not None:
                found.append(place)
            offset += place.size if place is not None else PAGE_BYTES
        return found

    def record(self, place: Place) -> bytes:
        """Header and payload of a record, without the padding."""
        data = self.files[place.file]
        start = place.offset + PAGE_BYTES
        header = data[place.offset : place.offset + HEADER_BYTES]
        return header + data[start : start + place.stored_bytes]

    def replace(self, place: Place, record: bytes) -> None:
        """Puts other header and payload bytes into the pages of a record."""
        header = record[:HEADER_BYTES].ljust(PAGE_BYTES, b"\0")
        pages = (header + record[HEADER_BYTES:])[: place.size].ljust(place.size, b"\0")
        self.patch(place.file, place.offset, pages)

    def pages(self, place: Place) -> bytes:
        """All pages of a record."""
        return self.files[place.file][place.offset : place.offset + place.size]

    def patch(self, file: str, offset: int, data: bytes) -> None:
        """Overwrites a stretch of a segment."""
        old = self.files[file]
        self.files[file] = old[:offset] + data + old[offset + len(data) :]

    def footer(self, file: str) -> tuple[int, int]:
        """Where the footer of a segment begins and how many entries it has; (0, 0): it has none."""
        data = self.files[file]
        magic, count, length, _ = _LAST.unpack(data[-PAGE_BYTES:][: _LAST.size])
        if magic != _LAST_MAGIC:
            return 0, 0
        return len(data) - PAGE_BYTES - -(-length // PAGE_BYTES) * PAGE_BYTES, count


def place_of(file: str, header: bytes, offset: int) -> Place | None:
    """What a header says; None if it is none."""
    if header[:4] != _RECORD_MAGIC or xxhash.xxh3_128_digest(header[:240]) != header[240:]:
        return None
    flags = header[9]
    sequence, (stored_bytes,) = sequence_of(header), struct.unpack_from("<Q", header, 28)
    size = PAGE_BYTES + -(-stored_bytes // PAGE_BYTES) * PAGE_BYTES
    parent = header[100:132] if flags & 1 else None
    tag, name = header[52:68], header[68:100]
    return Place(file, offset, size, header[6], tag, name, parent, sequence, stored_bytes)


def sequence_of(header: bytes) -> int:
    """The number of a record."""
    return int.from_bytes(header[12:20], "little")


# Harm to records in their segments. Each says which names it touched.


def harm_record(
    rng: random.Random, image: SegmentImage, places: list[Place], mutations: RecordMutations
) -> tuple[str, set[bytes]]:
    """Harms the record of one of the places, or two of them, in place."""
    one, two = rng.sample(places, k=2)
    kind = rng.choice(("mutated", "mutated", "mutated", "swapped", "doubled", "footer"))
    if kind == "swapped" and one.size == two.size:
        pages = image.pages(one), image.pages(two)
        image.patch(one.file, one.offset, pages[1])
        image.patch(two.file, two.offset, pages[0])
        return "records swapped", {one.name, two.name}
    if kind == "doubled" and one.size == two.size:
        image.patch(two.file, two.offset, image.pages(one))
        return "record doubled over another", {two.name}
    kind, mutant = mutations.mutate(image.record(one), image.record(two))
    touched = {one.name, two.name} if kind.startswith("another") else {one.name}
    if image.footer(one.file)[1] and rng.random() < 0.5 and len(mutant) >= HEADER_BYTES:
        _into_footer(image, one, mutant[:HEADER_BYTES], one.offset)
        kind = f"{kind}, as its footer says"
    image.replace(one, mutant)
    return kind, touched


def hostile_offset(rng: random.Random, image: SegmentImage, place: Place) -> str:
    """A footer, its digest right, that looks for a record where it is not."""
    end = len(image.files[place.file])
    offset = rng.choice((*HOSTILE_LENGTHS, end, end - PAGE_BYTES, end + PAGE_BYTES, 0))
    header = image.files[place.file][place.offset : place.offset + HEADER_BYTES]
    _into_footer(image, place, header, offset)
    return "footer with another offset"


def _into_footer(image: SegmentImage, place: Place, header: bytes, offset: int) -> None:
    """Makes the footer say this of the record that lies there, and its digest agree."""
    start, count = image.footer(place.file)
    data = bytearray(image.files[place.file])
    for at in range(start, start + count * _ENTRY_BYTES, _ENTRY_BYTES):
        if struct.unpack_from("<Q", data, at)[0] == place.offset:
            data[at : at + _ENTRY_BYTES] = struct.pack("<Q", offset) + header
    entries = bytes(data[start : start + count * _ENTRY_BYTES])
    last = _LAST.pack(_LAST_MAGIC, count, len(entries), xxhash.xxh3_128_digest(entries))
    data[-PAGE_BYTES:][: _LAST.size] = last
    data[len(data) - PAGE_BYTES : len(data) - PAGE_BYTES + _LAST.size] = last
    image.files[place.file] = bytes(data)


# Harm to whole segments.


def _first_page(rng: random.Random, image: SegmentImage, file: str) -> None:
    data = image.files[file]
    image.files[file] = flipped(data, rng.randrange(8 * 36))


def _last_page(rng: random.Random, image: SegmentImage, file: str) -> None:
    data = image.files[file]
    bit = 8 * (len(data) - PAGE_BYTES) + rng.randrange(8 * _LAST.size)
    image.files[file] = flipped(data, bit)


def _footer_bit(rng: random.Random, image: SegmentImage, file: str) -> None:
    data = image.files[file]
    start = image.footer(file)[0] or PAGE_BYTES
    image.files[file] = flipped(data, 8 * rng.randrange(start, len(data)) + rng.randrange(8))


def _hostile_last_page(rng: random.Random, image: SegmentImage, file: str) -> None:
    count, length = rng.choice(HOSTILE_LENGTHS), rng.choice(HOSTILE_LENGTHS)
    if rng.random() < 0.5:
        length = count * _ENTRY_BYTES % 2**64
    page = _LAST.pack(_LAST_MAGIC, count, length, xxhash.xxh3_128_digest(b""))
    image.patch(file, len(image.files[file]) - PAGE_BYTES, page)


def _cut(rng: random.Random, image: SegmentImage, file: str) -> None:
    image.files[file] = cut(rng, image.files[file])


def _cut_at_page(rng: random.Random, image: SegmentImage, file: str) -> None:
    data = image.files[file]
    image.files[file] = data[: rng.randrange(0, len(data), PAGE_BYTES)]


def _longer(rng: random.Random, image: SegmentImage, file: str) -> None:
    image.files[file] += rng.randbytes(rng.choice((1, 100, PAGE_BYTES, 3 * PAGE_BYTES)))


def _files_swapped(rng: random.Random, image: SegmentImage, file: str) -> None:
    other = rng.choice(list(image.files))
    image.files[file], image.files[other] = image.files[other], image.files[file]


def _file_doubled(rng: random.Random, image: SegmentImage, file: str) -> None:
    image.files[file] = image.files[rng.choice(list(image.files))]


def _zeroed(rng: random.Random, image: SegmentImage, file: str) -> None:
    image.files[file] = zeroed(rng, image.files[file])


def _scribbled(rng: random.Random, image: SegmentImage, file: str) -> None:
    image.files[file] = scribbled(rng, image.files[file])


def _far_record(rng: random.Random, image: SegmentImage, file: str) -> None:
    """A last record that says it is longer than the file, its header's digest being right."""
    place = image.places(file)[-1]
    header = bytearray(image.files[file][place.offset : place.offset + 240])
    struct.pack_into("<Q", header, STORED_BYTES_AT, rng.choice(HOSTILE_LENGTHS[2:]))
    image.patch(file, place.offset, bytes(header) + xxhash.xxh3_128_digest(bytes(header)))


SEGMENT_MUTATIONS: dict[str, Callable[[random.Random, SegmentImage, str], None]] = {
    "first page": _first_page,
    "last page": _last_page,
    "bit of the footer": _footer_bit,
    "hostile last page": _hostile_last_page,
    "file cut": _cut,
    "file cut at a page": _cut_at_page,
    "file longer": _longer,
    "files swapped": _files_swapped,
    "file doubled over another": _file_doubled,
    "zeroed page": _zeroed,
    "byte run": _scribbled,
    "last record too long": _far_record,
}
