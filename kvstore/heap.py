"""How this process keeps the memory of messages: for the next one, instead of giving it back.

gRPC receives and sends in buffers of a message's size. By default the C library takes large ones
from the system and gives them back at once, and each comes with hundreds of page faults, which
cost as much as moving the bytes (measured: 130,000 to 450,000 faults for 10^9 bytes, and none so).
"""

import ctypes

TRIM_THRESHOLD_BYTES = 256 << 20
"""So much free memory at the end of the heap is kept; what is more goes back to the system."""
TOP_PAD_BYTES = 64 << 20
"""The heap grows by so much more than was asked for. It costs nothing until it is touched."""
MMAP_THRESHOLD_BYTES = 32 << 20
"""What is smaller comes out of the heap; the library takes no higher limit."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""The numbers of mallopt(3)."""


def keep_freed_memory() -> bool:
    """Sets that for the whole process; False, and nothing, where the C library is not glibc.

    For processes that are nodes and nothing else. Beside the arena they keep resident what their
    messages took at most at one time, and up to `TRIM_THRESHOLD_BYTES` of it when idle.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    wishes = (
        (_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
        (_M_TOP_PAD, TOP_PAD_BYTES),
    )
    return all(library.mallopt(number, size) for number, size in wishes)
