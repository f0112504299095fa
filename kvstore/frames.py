"""Blosc frames: what compresses inside our codecs. Works outside the GIL, in the calling thread.

A frame begins with 16 bytes: at 4, 8 and 12 the lengths of its content, of the pieces that it is
cut into, and of itself, 32 bits each.
"""

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

blosc.use_threads = False

HEAD_BYTES = 16
PIECE_BYTES = 1 << 20
"""In larger ones KV gets half a percent smaller, and Blosc takes three times as much memory."""
Bytes = memoryview | NDArray[np.uint8]


def bitshuffled(data: Bytes, item_bytes: int) -> bytes:
    """A frame whose content had its bits of equal weight grouped, then LZ4."""
    packed: bytes = blosc.compress(data, b"lz4", 5, blosc.BITSHUFFLE, 0, item_bytes)
    return packed


def entropy_coded(data: Bytes) -> bytes:
    """A frame of zstd-1 in pieces larger than Blosc's own: each needs a code table of its own."""
    piece_bytes = min(len(data), PIECE_BYTES)
    packed: bytes = blosc.compress(data, b"zstd", 1, blosc.NOSHUFFLE, piece_bytes, 1)
    return packed


def frame_bytes(payload: memoryview) -> int:
    """How long the frame is with which a payload begins. ValueError if it does not fit in it."""
    if len(payload) < HEAD_BYTES:
        raise ValueError(f"a frame has {HEAD_BYTES} bytes or more, here are {len(payload)}")
    size = _number(payload, 12)
    if not HEAD_BYTES <= size <= len(payload):
        raise ValueError(f"a frame of {size} bytes lies in {len(payload)}")
    return size


def expand(frame: memoryview, into: Bytes) -> None:
    """Fills `into` from a frame. Blosc believes its lengths, so they are compared here first."""
    size, declared = frame_bytes(frame), _number(frame, 4)
    if size != len(frame):
        raise ValueError(f"a frame of {size} bytes came with {len(frame)}")
    if declared != len(into):
        raise ValueError(f"payload decodes to {declared} bytes, the block has {len(into)}")
    if declared:
        blosc.decompress(frame, into)


def _number(frame: memoryview, at: int) -> int:
    return int.from_bytes(frame[at : at + 4], "little")
