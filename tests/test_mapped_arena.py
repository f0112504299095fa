"""Copies from and to the arena, which run in pieces."""

import os
import random
import threading

import pytest

from kvstore_client.arena import MappedArena

ARENA_BYTES = 24 << 20
EDGE = 64


def arena() -> MappedArena:
    """One of its own, full of zeros."""
    file = os.memfd_create("test")
    os.ftruncate(file, ARENA_BYTES)
    return MappedArena(file, ARENA_BYTES)


@pytest.mark.parametrize(
    "size", [1, 4095, 4096, 4097, (384 << 10) + 1, 1 << 20, (2 << 20) + 4096, (16 << 20) - 1]
)
def test_every_byte_is_copied_and_no_other_one_touched(size: int, rng: random.Random) -> None:
    """Both ways, whatever the size is in pages or pieces."""
    mapped, block = arena(), bytearray(rng.randbytes(size))
    mapped.write(EDGE, memoryview(block))
    assert mapped.memory[:EDGE] == bytes(EDGE)
    assert mapped.memory[EDGE : EDGE + size] == block
    assert mapped.memory[EDGE + size : 2 * EDGE + size] == bytes(EDGE)
    into = bytearray(b"\xff") * (size + 2 * EDGE)
    mapped.read(EDGE, memoryview(into)[EDGE:-EDGE])
    assert into[EDGE:-EDGE] == block
    assert into[:EDGE] == into[-EDGE:] == b"\xff" * EDGE


def test_a_copy_is_whole_beside_a_thread_that_never_sleeps(rng: random.Random) -> None:
    """It waits for the interpreter's lock then, and goes on in one piece."""
    mapped, block = arena(), bytearray(rng.randbytes(8 << 20))
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            pass

    spinning = threading.Thread(target=spin)
    spinning.start()
    try:
        mapped.write(0, memoryview(block))
        into = bytearray(len(block))
        mapped.read(0, memoryview(into))
    finally:
        over.set()
        spinning.join()
    assert into == block


def test_a_copy_past_the_end_is_refused() -> None:
    """Nothing of it is done."""
    mapped = arena()
    with pytest.raises(ValueError, match="not in the arena"):
        mapped.write(ARENA_BYTES - 1, memoryview(bytearray(2)))
    with pytest.raises(ValueError, match="not in the arena"):
        mapped.read(ARENA_BYTES, memoryview(bytearray(1)))
