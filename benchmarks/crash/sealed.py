"""Which blocks a data directory promises to keep, read from its files as docs/format.md has them.

`Watch` says of how many blocks of which segment it is certain that they are on the device. They
are the first ones of that segment, so its file says which.
"""

import struct
from collections.abc import Mapping

import xxhash

from benchmarks.harm.mutants import PAGE_BYTES
from benchmarks.harm.segment_image import (
    BLOCK_KIND,
    FORGET_BLOCK,
    FORGET_NAMESPACE,
    SEQUENCE_BITS,
    Place,
    SegmentImage,
    sequence_of,
)


def sealed_names(image: SegmentImage, announced: Mapping[int, int]) -> set[bytes]:
    """The names of the blocks that have to be there after a restart.

    `announced` counts the announced blocks of each segment; a segment with an intact footer is
    sealed as a whole. What was forgotten later is taken out, and what has lost its parent.
    """
    latest: dict[bytes, tuple[Place, bool]] = {}
    for place, sealed in sorted(_records(image, announced), key=lambda each: each[0].sequence):
        if place.kind == BLOCK_KIND:
            known = latest.get(place.name)
            latest[place.name] = place, sealed or (known is not None and known[1])
        elif place.kind == FORGET_BLOCK:
            latest.pop(place.name, None)
        elif place.kind == FORGET_NAMESPACE:
            latest = {name: at for name, at in latest.items() if at[0].tag != place.tag}
    return {name for name, (_, sealed) in latest.items() if sealed and _rooted(name, latest)}


def _records(image: SegmentImage, announced: Mapping[int, int]) -> list[tuple[Place, bool]]:
    """All intact records, and whether each is certain to be on the device."""
    found: list[tuple[Place, bool]] = []
    for file in image.files:
        certain = announced.get(int(file.partition(".")[0], 16), 0)
        whole, blocks = has_footer(image, file), 0
        for place in image.places(file):
            blocks += place.kind == BLOCK_KIND
            found.append((place, whole or blocks <= certain))
    return found


def has_footer(image: SegmentImage, file: str) -> bool:
    """Whether a segment ends with an intact footer."""
    data = image.files[file]
    if len(data) < 2 * PAGE_BYTES or len(data) % PAGE_BYTES:
        return False
    start, count = image.footer(file)
    if not count:
        return False
    entries = data[start : start + count * struct.calcsize("<Q256s")]
    digest = data[-PAGE_BYTES:][24:40]
    # Else it is what was left of the segment that the file was before.
    own = sequence_of(entries[8:]) >> SEQUENCE_BITS == int(file.partition(".")[0], 16)
    return start > 0 and own and xxhash.xxh3_128_digest(entries) == digest


def _rooted(name: bytes, latest: Mapping[bytes, tuple[Place, bool]]) -> bool:
    """Whether a block has all its ancestors."""
    seen: set[bytes] = set()
    place = latest[name][0]
    while place.parent is not None:
        if place.parent in seen or place.parent not in latest:
            return False
        seen.add(place.parent)
        place = latest[place.parent][0]
    return True
