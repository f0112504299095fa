"""`kvstore` on a device that hangs: no write to the disk ever comes back.

With `drain` in the environment variable KVSTORE_PLANTED the end of the calls fails as well.
"""

import os
import threading
from typing import Any

from kvstore.calls import Calls
from kvstore.cli import main
from kvstore.files import DirectoryFiles


def hang(self: DirectoryFiles, handle: int, buffers: object, offset: int) -> None:
    """As a thread hangs in the kernel: nothing wakes it."""
    threading.Event().wait()


def fail(self: Calls) -> None:
    """A mistake of ours."""
    raise ZeroDivisionError


if __name__ == "__main__":
    device: Any = DirectoryFiles
    device.write = hang
    if os.environ.get("KVSTORE_PLANTED") == "drain":
        calls: Any = Calls
        calls.drain = fail
    main()
