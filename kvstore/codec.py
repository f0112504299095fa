"""Codecs between memory and the slower tiers.

A codec sees one block's bytes. What it wrote is decoded only after the digest of the stored bytes
was verified: the decoder itself is not trusted with damaged input.
"""

from enum import IntEnum
from typing import Protocol

ITEM_BYTES = 2
"""Shuffling works on items of this size: bf16 and fp16, which nearly all KV is kept in."""


class CodecId(IntEnum):
    """How the payload of a record is encoded; stored in its header."""

    RAW = 0
    BITSHUFFLE_LZ4 = 1


class Codec(Protocol):
    """Encodes blocks for a slower tier."""

    def encode(self, data: memoryview) -> tuple[CodecId, memoryview | bytes]:
        """The payload to store, and how to decode it. `data` itself where nothing is gained."""


class Raw:
    """Stores blocks as they are."""

    def encode(self, data: memoryview) -> tuple[CodecId, memoryview | bytes]:
        return CodecId.RAW, data


class BitshuffleLz4:
    """Groups the bits of equal weight, then LZ4 (Blosc's framing; works outside the GIL).

    bf16 KV is nearly incompressible byte by byte; its exponent bits are not.
    """

    def __init__(self) -> None:
        from numcodecs import blosc

        blosc.use_threads = False
        self._blosc = blosc

    def encode(self, data: memoryview) -> tuple[CodecId, memoryview | bytes]:
        packed: bytes = self._blosc.compress(data, b"lz4", 5, self._blosc.BITSHUFFLE, 0, ITEM_BYTES)
        if len(packed) >= len(data):
            return CodecId.RAW, data
        return CodecId.BITSHUFFLE_LZ4, packed


CODECS: dict[str, type[Raw] | type[BitshuffleLz4]] = {
    "raw": Raw,
    "bitshuffle-lz4": BitshuffleLz4,
}


def decode(codec: CodecId, payload: memoryview, into: memoryview) -> None:
    """Fills `into` exactly from a payload whose digest was verified; ValueError if it cannot."""
    if codec is CodecId.RAW:
        into[:] = payload
        return
    from numcodecs import blosc

    declared = int.from_bytes(payload[4:8], "little")
    if declared != len(into):
        raise ValueError(f"payload decodes to {declared} bytes, the block has {len(into)}")
    blosc.decompress(payload, into)
