"""Who has the machine's cores: two tests at once, but nobody beside two ranks.

Ranks that wait for each other spin, and beside another engine on two cores each waits for most of
the time. The locks lie in the environment, and end with the process that has them.
"""

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

HOME = Path(sys.prefix)


@contextlib.contextmanager
def cores(*, alone: bool = False) -> Iterator[None]:
    """Waits for them. Who wants to be alone has others wait behind it, so that its turn comes."""
    with (HOME / ".cores").open("a") as held:
        with (HOME / ".turn").open("a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            fcntl.flock(held, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
