"""Codecs between memory and the slower tiers.

A codec sees one block's bytes. What it wrote is decoded only after the digest of the stored bytes
was verified: the decoder itself is not trusted with damaged input.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Literal, NamedTuple, Protocol

from kvstore.api.tier import Block

ITEM_BYTES = 2
"""How wide the values of a block are taken to be where nobody says it: bf16 and fp16, which nearly
all KV is kept in."""

LEAST_BYTES = 64
"""Nothing is gained on less."""

Direction = Literal["put", "get"]


class CodecId(IntEnum):
    """How the payload of a record is encoded; stored in its header."""

    RAW = 0
    BITSHUFFLE_LZ4 = 1
    PLANES_ZSTD = 2
    FP8 = 3
    INT8 = 4


class Encoded(NamedTuple):
    """What to store of a block, and how it is decoded."""

    codec: CodecId
    payload: memoryview | bytes
    """The block's data itself where nothing is gained."""
    digest: bytes
    """Of what decoding gives: the writer's own, unless the codec is lossy."""


class Codec(Protocol):
    """Encodes blocks for a slower tier. Called by several threads at once."""

    def encode(self, block: Block) -> Encoded:
        """What to store of a block."""

    def works_on(self, namespace: bytes) -> bool:
        """Whether blocks of a namespace are likely to be stored otherwise than as they are."""

    def moved(self, direction: Direction, size_bytes: int, seconds: float) -> None:
        """Stored bytes went to the tier or came from it in so many seconds: its link's speed."""


class Lossless:
    """The codec of this id, always. A block that does not get smaller is stored as it is."""

    def __init__(self, codec: CodecId, item_bytes: int = ITEM_BYTES) -> None:
        self._codec = codec
        self._item_bytes = item_bytes

    def encode(self, block: Block) -> Encoded:
        return encode_as(self._codec, block, self._item_bytes)

    def works_on(self, namespace: bytes) -> bool:
        return self._codec is not CodecId.RAW

    def moved(self, direction: Direction, size_bytes: int, seconds: float) -> None:
        return


class Raw(Lossless):
    """Stores blocks as they are."""

    def __init__(self) -> None:
        super().__init__(CodecId.RAW)


LOSSLESS = {
    "raw": CodecId.RAW,
    "bitshuffle-lz4": CodecId.BITSHUFFLE_LZ4,
    "planes-zstd": CodecId.PLANES_ZSTD,
}
LOSSY = {"fp8": CodecId.FP8, "int8": CodecId.INT8}
AUTO, NO_LOSS = "auto", "none"
"""In settings: measure which one, and no lossy one."""
NAMES = {codec: name for name, codec in (LOSSLESS | LOSSY).items()}
"""What each codec is called in settings and metrics."""

CODECS: dict[str, Callable[[], Codec]] = {
    name: partial(Lossless, codec) for name, codec in LOSSLESS.items()
}


def encode_as(codec: CodecId, block: Block, item_bytes: int) -> Encoded:
    """A block by one of the lossless codecs, or as it is where that makes it no smaller."""
    if codec is not CodecId.RAW and len(block.data) >= LEAST_BYTES:
        # Loaded late: who only names codecs, as a settings file does, needs none of the libraries.
        from kvstore import lossless

        packed = lossless.PACK[codec](block.data, item_bytes)
        if len(packed) < len(block.data):
            return Encoded(codec, packed, block.digest)
    return Encoded(CodecId.RAW, block.data, block.digest)


def decode(codec: CodecId, payload: memoryview, into: memoryview) -> None:
    """Fills `into` exactly from a payload whose digest was verified; ValueError if it cannot."""
    if codec is CodecId.RAW:
        into[:] = payload
    elif codec in LOSSLESS.values():
        from kvstore import lossless

        lossless.UNPACK[codec](payload, into)
    else:
        from kvstore import lossy

        lossy.unpack(codec, payload, into)
