"""Whether the node is a neighbour, whose memory this process can map; tried beside the calls."""

import asyncio
import logging

import grpc

from kvstore.api.clock import Clock
from kvstore.api.errors import KvstoreError
from kvstore_client.attached import Attached
from kvstore_client.budgets import Deadline
from kvstore_client.caller import Caller
from kvstore_client.losses import describe

_log = logging.getLogger("kvstore.client")

ATTACH_S = 30.0
RETRY_S = 1.0
"""So long after an attachment was lost another is tried."""
REFUSED_RETRY_S = 30.0
"""And after it could not be had."""


class Neighbour:
    """The attachment to a node, tried anew when it was lost. The stream serves meanwhile."""

    def __init__(self, caller: Caller, clock: Clock, *, wanted: bool) -> None:
        self._caller = caller
        self._clock = clock
        self._wanted = wanted
        self._attached: Attached | None = None
        self._trying: asyncio.Task[None] | None = None
        self._next_try_s = 0.0

    @property
    def attached_now(self) -> Attached | None:
        """The attachment, if it holds now. In any thread."""
        attached = self._attached
        return attached if attached is not None and not attached.closed else None

    @property
    def attached(self) -> Attached | None:
        """The attachment, if it holds now; if not, and it is time, the next one is begun."""
        if (attached := self.attached_now) is not None:
            return attached
        if self._attached is not None:
            self._attached = None
            self._next_try_s = self._clock.monotonic_s() + RETRY_S
        self._try()
        return None

    async def settle(self, timeout_s: float) -> None:
        """Returns when the try that is under way is over, or the time is."""
        if self.attached is None and self._trying is not None:
            await asyncio.wait([self._trying], timeout=timeout_s)

    async def close(self) -> None:
        """Hangs up."""
        self._wanted = False
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        if self._attached is not None:
            await self._attached.close()

    def _try(self) -> None:
        trying = self._trying is not None and not self._trying.done()
        if self._wanted and not trying and self._clock.monotonic_s() >= self._next_try_s:
            self._trying = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        self._next_try_s = self._clock.monotonic_s() + REFUSED_RETRY_S
        try:
            deadline = Deadline(self._clock, ATTACH_S)
            self._attached = await Attached.connect(self._caller, deadline)
        except (KvstoreError, OSError, ValueError, grpc.RpcError, grpc.aio.BaseError) as error:
            # Another host, another user, an older node: the stream is always there.
            _log.info("no shared memory with the node: %s", describe(error))
