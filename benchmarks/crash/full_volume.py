"""Mounts a small volume and fills it: `python -m benchmarks.crash.full_volume KIND ROUNDS SEED`.

Runs in a process of its own, so that nobody else sees the mount, and prints one line of JSON.
"""

import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.crash.own_mounts import (
    VOLUME_BYTES,
    Forbidden,
    enter_own_mounts,
    mount_ext4,
    mount_tmpfs,
    unmount,
)


def main(kind: str, rounds: int, seed: str) -> dict[str, object]:
    """The result of one kind of volume, or why it could not be tried."""
    home = Path(tempfile.mkdtemp(prefix="kvstore-full-"))
    volume = home / "volume"
    try:
        enter_own_mounts()
        # Not earlier: a process may enter a user namespace only while it has no threads, and the
        # libraries of the node begin some when they are imported.
        from benchmarks.crash.full_ordeal import ordeal
        from benchmarks.quiet import quiet

        {"tmpfs": mount_tmpfs, "ext4": mount_ext4}[kind](volume, VOLUME_BYTES)
        try:
            with quiet():
                return asyncio.run(ordeal(volume, home, rounds, seed))
        finally:
            unmount(volume)
    except Forbidden as error:
        return {"forbidden": str(error)}
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3])) + "\n")
