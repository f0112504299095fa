"""One stretch of shared memory of fixed size."""

import mmap
import os


class Arena:
    """`capacity_bytes` of anonymous shared memory (memfd), faulted in before the first request.

    First touch of fresh pages costs eight times a copy, so it is paid at start. The owner of the
    arena decides who uses which bytes. The memory goes back when the arena is closed and the last
    view is gone.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._file = os.memfd_create("kvstore-arena", os.MFD_CLOEXEC)
        os.ftruncate(self._file, capacity_bytes)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._map = mmap.mmap(self._file, capacity_bytes, flags=flags)
        self._view = memoryview(self._map)

    def view(self, offset: int, size: int) -> memoryview:
        """The writable bytes from `offset` on."""
        return self._view[offset : offset + size]

    def close(self) -> None:
        """Lets go of the memory; a view that is still in use keeps it mapped."""
        os.close(self._file)
        del self._view, self._map
