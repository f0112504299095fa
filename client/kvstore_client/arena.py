"""The node's arena as this process has it mapped, and copies from and to it."""

import ctypes
import mmap
import os
import time

PIECE_BYTES = 480 << 10
"""So much is copied at a time. glibc moves what is as large as the second cache or larger with
stores that first read what they overwrite, and less than that without (rep movsb): a tenth faster.
That cache has 512 KiB or more where there is such a difference."""
PIECE_S = 0.001
"""A piece that takes longer, many times what it should, waited for the interpreter's lock."""

_MADV_POPULATE_WRITE = 23
"""madvise(2); Python has no name for it yet."""


class MappedArena:
    """`size_bytes` of the node's memory. Which of them may be touched, the node says.

    Copies drop the interpreter's lock, so that other threads go on meanwhile.
    """

    def __init__(self, file: int, size_bytes: int) -> None:
        """Maps the file and lets go of it. Raises OSError, or ValueError if it is too short."""
        try:
            self._map = mmap.mmap(file, size_bytes, flags=mmap.MAP_SHARED)
        finally:
            os.close(file)
        self._size_bytes = size_bytes
        self._view = memoryview(self._map)
        self._address = _address_of(self._view)
        # All page tables now: each page's first touch costs as much as copying it. Not by mmap
        # itself, which would keep the interpreter's lock; where the kernel is too old, then later.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(self._address), ctypes.c_size_t(size_bytes), _MADV_POPULATE_WRITE
        )

    @property
    def memory(self) -> memoryview:
        """All of it, for who has to know where it lies: a GPU's driver, say."""
        return self._view

    def view(self, offset: int, size: int) -> memoryview:
        """A slot. Raises ValueError for a place outside the arena."""
        self._check(offset, size)
        return self._view[offset : offset + size]

    def write(self, offset: int, block: memoryview) -> None:
        """Copies a block into its slot. Raises ValueError for a place outside the arena."""
        self._check(offset, len(block))
        if block.readonly:  # Its address is not to be had; the lock is kept then.
            self._view[offset : offset + len(block)] = block
        else:
            _copy(_address_of(block), self._address + offset, len(block))

    def read(self, offset: int, into: memoryview) -> None:
        """Copies a slot into a buffer. Raises ValueError for a place outside the arena."""
        self._check(offset, len(into))
        _copy(self._address + offset, _address_of(into), len(into))

    def _check(self, offset: int, size: int) -> None:
        if offset + size > self._size_bytes:
            raise ValueError(f"{size} bytes at {offset} are not in the arena")


def _copy(source: int, target: int, size: int) -> None:
    """In pieces, as long as nobody else is after the lock, which is taken back after each."""
    done, piece = 0, PIECE_BYTES
    while done < size:
        begun_s = time.perf_counter()
        ctypes.memmove(target + done, source + done, min(piece, size - done))
        done += piece
        if time.perf_counter() - begun_s > PIECE_S:
            piece = size


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
