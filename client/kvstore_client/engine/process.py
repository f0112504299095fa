"""When this process began."""

import os
import time
from pathlib import Path

_START_FIELD = 19
"""Of `/proc/self/stat`, behind the name in brackets: clock ticks from boot to start."""


def started_ns() -> int:
    """On the clock of file times, at the end of the tick in which it was; now, where the system
    does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.time_ns()
    # Files that were written just before it began would seem younger by the tick's beginning.
    ticks = int(fields[_START_FIELD]) + 1
    start_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.time_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - start_ns)
