"""A connection of the bulk path as coroutines use it: its blocking calls run in threads."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from kvstore.api.bulk import BulkSocket, Hangup, undisturbed
from kvstore.calls import CallerGone
from kvstore.runner import Runner

Answer = TypeVar("Answer")


class Line:
    """One client's connection."""

    def __init__(self, wire: BulkSocket, runner: Runner) -> None:
        self.wire = wire
        self._runner = runner

    async def run(self, work: Callable[[], Answer]) -> Answer:
        """What `work` answers. Raises CallerGone when the connection has ended.

        If this is cancelled the connection is shut down, which ends `work`, and this returns
        only then: what `work` was filling or sending nobody touches any more.
        """
        job = asyncio.ensure_future(self._runner.run(work))
        try:
            return await undisturbed(job, self.wire.shut)
        except Hangup as error:
            raise CallerGone(str(error)) from None
