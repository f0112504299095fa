"""The digest that travels with a block from its writer to its reader.

XXH3-128 (Collet), seeded by nothing secret: it finds damage and mix-ups, not forgers. Space, key
and length are part of the digested bytes, so that a block under another's name fails as surely
as a flipped bit.
"""

import xxhash

DIGEST_BYTES = 16


def block_digest(space_id: bytes, key: bytes, data: memoryview | bytes) -> bytes:
    """16 bytes that bind `data` to its space, its key and its length."""
    digest = begin_digest(space_id, key, len(data))
    digest.update(data)
    return digest.digest()


def begin_digest(space_id: bytes, key: bytes, size: int) -> xxhash.xxh3_128:
    """The same in the making: `update` it with all `size` bytes of the block, in order."""
    return xxhash.xxh3_128(space_id + key + size.to_bytes(8, "little"))
