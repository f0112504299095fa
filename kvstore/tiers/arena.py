"""One stretch of shared memory of fixed size."""

import fcntl
import mmap
import os

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """`capacity_bytes` of anonymous shared memory (memfd), faulted in before the first request.

    First touch of fresh pages costs eight times a copy, so it is paid at start. The owner of the
    arena decides who uses which bytes. The memory goes back when the arena is closed and the last
    view is gone.

    `file` may be handed to other processes: its size is sealed, so that nobody who has mapped it
    can find a page missing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.file = os.memfd_create("kvstore-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, capacity_bytes)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, _SEALS)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._map = mmap.mmap(self.file, capacity_bytes, flags=flags)
        self._view = memoryview(self._map)

    def view(self, offset: int, size: int) -> memoryview:
        """The writable bytes from `offset` on."""
        return self._view[offset : offset + size]

    def close(self) -> None:
        """Lets go of the memory; a view that is still in use keeps it mapped."""
        os.close(self.file)
        del self._view, self._map
