"""The KV groups of a model, each with its space, and what vLLM calls a chunk in one of them."""

from dataclasses import dataclass

from kvstore_client.space import Space

DIGEST_BYTES = 32
_INDEX_BYTES = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that keep their KV alike. A chunk of a group is one row of the primary tier."""

    index: int
    space: Space
    chunk_tokens: int

    @property
    def needs_parents(self) -> bool:
        """Whether a chunk is useless without those before it."""
        return self.space.descriptor.needs_parents


def digest_of(key: bytes) -> bytes:
    """vLLM's chain hash in an `OffloadKey`. It names the prefix that ends with the chunk."""
    return key[:-_INDEX_BYTES]


def index_of(key: bytes) -> int:
    """The KV group in an `OffloadKey`."""
    return int.from_bytes(key[-_INDEX_BYTES:], "big")


def is_sound(key: bytes) -> bool:
    """Whether the hash in a key is one to rely on: vLLM's others are short and seeded anew."""
    return len(key) == DIGEST_BYTES + _INDEX_BYTES
