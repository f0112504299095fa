"""Lossless codecs: what comes back is what was stored, and no length is believed."""

import random
import sys
import threading
import time
from collections.abc import Callable

import pytest

from kvstore.api.tier import Block, BlockRef
from kvstore.codec import LEAST_BYTES, LOSSLESS, CodecId, decode, encode_as
from kvstore.frames import HEAD_BYTES, entropy_coded, frame_bytes

GAINING = [codec for codec in LOSSLESS.values() if codec is not CodecId.RAW]


def block_of_data(data: bytes) -> Block:
    """A block that is nothing but its data."""
    return Block(BlockRef(bytes(32), bytes(32)), None, bytes(16), memoryview(data))


def compressible(rng: random.Random, size: int, item_bytes: int) -> bytes:
    """Random in every byte of an item but its last, as floating-point values are."""
    data = bytearray(rng.randbytes(size))
    for at in range(item_bytes - 1, size, item_bytes):
        data[at] = rng.choice(b"\x3c\x3d\xbd\x3e")
    return bytes(data)


def decoded(codec: CodecId, payload: bytes | memoryview, size: int) -> bytes:
    """What a payload decodes to."""
    into = bytearray(b"\xee" * size)
    decode(codec, memoryview(payload), memoryview(into))
    return bytes(into)


@pytest.mark.parametrize("codec", GAINING)
@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
def test_every_size_and_content_comes_back(
    codec: CodecId, item_bytes: int, rng: random.Random
) -> None:
    """Odd lengths, constant, random and KV-like bytes; a payload is never longer than its block."""
    sizes = [1, LEAST_BYTES - 1, LEAST_BYTES, 4096, 300_001, *rng.sample(range(1, 70_000), 20)]
    for size in sizes:
        for data in (compressible(rng, size, item_bytes), bytes(size), rng.randbytes(size)):
            encoded = encode_as(codec, block_of_data(data), item_bytes)
            assert len(encoded.payload) <= size
            assert decoded(encoded.codec, encoded.payload, size) == data


@pytest.mark.parametrize("codec", GAINING)
def test_the_width_of_the_values_counts(codec: CodecId, rng: random.Random) -> None:
    """Taken for values of another width, the same bytes gain less."""
    block = block_of_data(compressible(rng, 1 << 16, 4))
    right, wrong = (len(encode_as(codec, block, items).payload) for items in (4, 1))
    assert right < 0.97 * wrong


def test_planes_apart_gain_more_than_one_frame(rng: random.Random) -> None:
    """The random half of bf16 values must not spoil the code of their other half."""
    data = compressible(rng, 1 << 16, 2)
    shuffled = data[::2] + data[1::2]
    apart = encode_as(CodecId.PLANES_ZSTD, block_of_data(data), 2)
    assert len(apart.payload) <= 1.02 * len(entropy_coded(memoryview(shuffled)))


@pytest.mark.parametrize("codec", GAINING)
def test_no_length_is_believed(codec: CodecId, rng: random.Random) -> None:
    """Cut, extended, or for a block of another length: an error before anything is decoded."""
    data = compressible(rng, 2000, 2)
    payload = bytes(encode_as(codec, block_of_data(data), 2).payload)
    into = memoryview(bytearray(len(data)))
    harmed = [payload[:size] for size in range(len(payload))]
    harmed += [payload + b"\0", payload + payload]
    for each in harmed:
        with pytest.raises(ValueError, match=r"frame|follow|decodes|items"):
            decode(codec, memoryview(each), into)
    for size in (0, 1, 1998, 1999, 2001, 2002, 4000):
        with pytest.raises(ValueError, match=r"frame|follow|decodes|items"):
            decode(codec, memoryview(payload), memoryview(bytearray(size)))


def test_items_of_no_width_are_refused(rng: random.Random) -> None:
    """The first byte of planes is one of four."""
    payload = bytearray(encode_as(CodecId.PLANES_ZSTD, block_of_data(bytes(2000)), 2).payload)
    for width in set(range(256)) - {2}:
        payload[0] = width
        with pytest.raises(ValueError, match=r"items|frame|decodes|follow"):
            decode(CodecId.PLANES_ZSTD, memoryview(payload), memoryview(bytearray(2000)))


def test_a_frame_that_claims_more_than_there_is_is_refused() -> None:
    """Its own length is the third of the numbers that it begins with."""
    frame = bytearray(entropy_coded(memoryview(bytes(1000))))
    assert frame_bytes(memoryview(frame)) == len(frame)
    for size in (0, HEAD_BYTES - 1, len(frame) + 1, 2**32 - 1):
        frame[12:16] = size.to_bytes(4, "little")
        with pytest.raises(ValueError, match=f"a frame of {size} bytes lies in"):
            frame_bytes(memoryview(frame))


def turns_beside(work: Callable[[], object]) -> int:
    """How often this thread gets its turn while another one is in the midst of some work."""
    begun, turns = threading.Event(), 0

    def other() -> None:
        begun.set()
        work()

    thread = threading.Thread(target=other)
    interval_s = sys.getswitchinterval()
    # Only a thread that lets go by itself lets this one run.
    sys.setswitchinterval(60)
    try:
        thread.start()
        begun.wait()
        while thread.is_alive():
            turns += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval_s)
    thread.join()
    return turns


@pytest.mark.parametrize("codec", GAINING)
def test_other_threads_run_while_a_codec_works(codec: CodecId, rng: random.Random) -> None:
    """The event loop must not stand still: neither encoding nor decoding keeps the GIL."""
    data = compressible(rng, 1 << 18, 2) * 64
    block = block_of_data(data)
    payload = memoryview(encode_as(codec, block, 2).payload)
    into = memoryview(bytearray(len(data)))

    def encode() -> None:
        for _ in range(5):
            encode_as(codec, block, 2)

    def decode_often() -> None:
        for _ in range(10):
            decode(codec, payload, into)

    assert turns_beside(encode) > 20
    assert turns_beside(decode_often) > 20
    assert turns_beside(lambda: data.translate(bytes(256))) <= 20, "that keeps it"


@pytest.mark.parametrize("codec", list(CodecId))
def test_bytes_that_no_codec_wrote_are_refused(codec: CodecId) -> None:
    """Where a header names another codec than the one that wrote the payload."""
    if codec is CodecId.RAW:
        return
    for payload in (b"", b"\0", b"\2", b"\0" * 40, b"\2" * 40, b"\xff" * 40):
        with pytest.raises(ValueError, match=r"frame|items|kind"):
            decode(codec, memoryview(payload), memoryview(bytearray(6000)))
