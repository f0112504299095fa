"""The digest that travels with a block from its writer to its reader.

XXH3-128 (Collet), seeded by nothing secret: it finds damage and mix-ups, not forgers. Space, key
and length are part of the digested bytes, so that a block under another's name fails as surely
as a flipped bit.
"""

import xxhash

DIGEST_BYTES = 16


def block_digest(space_id: bytes, key: bytes, data: memoryview | bytes) -> bytes:
    """16 bytes that bind `data` to its space, its key and its length."""
    digest = BlockDigest(space_id, key, len(data))
    digest.update(data)
    return digest.digest()


class BlockDigest:
    """The same for a block that comes in pieces, which are digested while they are in the cache."""

    def __init__(self, space_id: bytes, key: bytes, size: int) -> None:
        """For a block that will be `size` bytes long."""
        self._hash = xxhash.xxh3_128(space_id + key + size.to_bytes(8, "little"))

    def update(self, data: memoryview | bytes) -> None:
        """Takes the next bytes of the block."""
        self._hash.update(data)

    def digest(self) -> bytes:
        """The 16 bytes, once all of the block was taken."""
        return self._hash.digest()
