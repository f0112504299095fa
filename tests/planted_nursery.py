"""A nursery whose nodes have a bug on purpose: `python -m tests.planted_nursery`, see the flag.

The environment variable KVSTORE_PLANTED names the bug.
"""

import os
from typing import Any

from benchmarks.crash.nursery import fork_for_each_line
from kvstore.tiers.disk_writer import DiskWriter
from kvstore.tiers.segment_log import SegmentLog


def forget_in_memory_only() -> None:
    """Discard and ClearSpace write no forget record."""

    async def forget(self: Any, headers: object) -> None:
        return

    target: Any = DiskWriter
    target._forget = forget


def lose_what_was_not_sealed() -> None:
    """A start serves nothing of a segment without footer."""
    target: Any = SegmentLog
    recover = target._recover_segment

    def forgetful(self: Any, segment_id: int, handle: int) -> Any:
        records = recover(self, segment_id, handle)
        return records[: len(records) // 2]

    target._recover_segment = forgetful


BUGS = {bug.__name__: bug for bug in (forget_in_memory_only, lose_what_was_not_sealed)}

if __name__ == "__main__":
    BUGS[os.environ["KVSTORE_PLANTED"]]()
    fork_for_each_line()
