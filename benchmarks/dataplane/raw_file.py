"""The floor of the disk: one preallocated file, direct I/O, several requests in flight.

A put is over once the bytes are on the device. The file was written before, so that the file
system has nothing to allocate: that is what the device can do, and what a log that used its files
again could do. (Writing into fresh files is slower on ext4, whatever the depth.)
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.dataplane.ring import Ring

MOST_DEPTH = 8
REQUEST_BYTES = 4 << 20
"""A larger block is cut into requests of this size; of those tried it is the best."""


class RawFile:
    """Reads and writes the blocks of a ring at their place in the file. The depth is the knob.

    Where the file system has no direct I/O, the page cache is measured.
    """

    knob = 1

    def __init__(self, ring: Ring, home: Path) -> None:
        self._ring = ring
        self._pools = {depth: ThreadPoolExecutor(depth) for depth in range(2, MOST_DEPTH + 1)}
        path = home / "floor"
        flags = os.O_RDWR | os.O_CREAT
        try:
            self._file = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError:
            self._file = os.open(path, flags, 0o600)
        path.unlink()  # It lives as long as this process.
        self._is_filled = False

    async def prepare(self, op: str) -> None:
        """Writes the whole file once."""
        if not self._is_filled:
            self.put(range(self._ring.blocks))
            self._is_filled = True

    def put(self, places: range) -> None:
        """Out of the ring."""
        self._each(self._ring.sources(places), places, self._write)
        os.fdatasync(self._file)

    def get(self, places: range) -> None:
        """Into the ring."""
        self._each(self._ring.targets(places), places, self._read)

    async def close(self) -> None:
        """Lets the file go."""
        for pool in self._pools.values():
            pool.shutdown()
        os.close(self._file)

    def _each(
        self, blocks: list[memoryview], places: range, work: Callable[[memoryview, int], None]
    ) -> None:
        size = self._ring.block_bytes
        requests = [
            (block[at : at + REQUEST_BYTES], place * size + at)
            for block, place in zip(blocks, places, strict=True)
            for at in range(0, size, REQUEST_BYTES)
        ]
        pool = self._pools.get(self.knob)
        if pool is None or len(requests) == 1:
            for data, offset in requests:
                work(data, offset)
        else:
            list(pool.map(work, *zip(*requests, strict=True)))

    def _write(self, data: memoryview, offset: int) -> None:
        if os.pwrite(self._file, data, offset) != len(data):
            raise OSError("a short write")

    def _read(self, into: memoryview, offset: int) -> None:
        if os.preadv(self._file, [into], offset) != len(into):
            raise OSError("a short read")
