"""The bulk path to a node: a few connections beside the calls, opened and replaced as needed."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc

from kvstore.api.asking import Nonsense, host_of
from kvstore.api.bulk import BulkSocket, Hangup, undisturbed
from kvstore.api.clock import Clock
from kvstore.api.errors import KvstoreError
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client import bulk_transfers
from kvstore_client.arrivals import Arrivals
from kvstore_client.budgets import Deadline
from kvstore_client.bulk_connection import connect
from kvstore_client.caller import Caller
from kvstore_client.losses import describe
from kvstore_client.pieces import Outgoing

_log = logging.getLogger("kvstore.client")

MAX_CONNECTIONS = 4
"""Calls under way at a time that go this way; more of them go by the stream."""
CONNECT_S = 5.0
RETRY_S = 1.0
"""So long after a connection broke another is tried."""
REFUSED_RETRY_S = 30.0
"""And after it could not be had."""
_GONE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
"""The node itself: it may be back in a moment."""


class Bulk:
    """Moves blocks over connections of their own, as far as the node and the way to it allow.

    One call uses a connection at a time. Opening one never holds a call up: the stream serves
    meanwhile.
    """

    def __init__(
        self,
        caller: Caller,
        clock: Clock,
        endpoint: str,
        *,
        wanted: bool,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._caller = caller
        self._clock = clock
        self._host = host_of(endpoint)
        self._wanted = wanted and bool(self._host)
        self._tls = tls
        self._idle: list[BulkSocket] = []
        self._in_use: set[BulkSocket] = set()
        self._trying: asyncio.Task[None] | None = None
        self._next_try_s = 0.0
        self._threads: ThreadPoolExecutor | None = None

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._idle) + len(self._in_use)

    async def settle(self, timeout_s: float) -> None:
        """Returns when there is a connection, or the try to open one or the time is over."""
        if self._wanted and not self.connections:
            self._try()
            if self._trying is not None:
                await asyncio.wait([self._trying], timeout=timeout_s)

    async def fetch(
        self,
        request: pb.ReadRequest,
        arrivals: Arrivals,
        deadline: Deadline,
        *,
        prefix_only: bool,
    ) -> bool:
        """Reads all there is of the blocks; False if the stream has to go on with the rest.

        Raises KvstoreError as the node refuses. A caller who is cancelled, or whose time is over,
        leaves when nothing writes to his buffers any more.
        """
        arrivals.restart()
        read = pb.BulkRead(request=request, prefix_only=prefix_only)
        asking = pb.BulkRequest(read=read)
        loop = asyncio.get_running_loop()

        def here(place: int, loaded: Loaded) -> None:
            # Told in the event loop, and there ahead of the end of the thread's work.
            loop.call_soon_threadsafe(partial(arrivals.here, place, loaded))

        damaged = await self._call(
            asking, deadline, lambda wire: bulk_transfers.fetch(wire, asking, arrivals, here)
        )
        if damaged is None:
            return False
        arrivals.corrupt_blocks += damaged
        arrivals.broken = None in arrivals.loaded
        arrivals.settle()
        return True

    async def place(
        self, begin: pb.WriteBegin, run: Outgoing, held: list[bool], deadline: Deadline
    ) -> bool:
        """Writes what the node wants of a run; False, and as `fetch`, if that did not succeed."""
        held[:] = [False] * len(held)
        asking = pb.BulkRequest(write=begin)
        held_blocks = await self._call(
            asking, deadline, lambda wire: bulk_transfers.place(wire, asking, run, held)
        )
        return held_blocks is not None

    async def close(self) -> None:
        """Hangs up, also on the calls under way."""
        self._wanted = False
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        for wire in self._in_use:
            wire.shut()  # Their threads find out, and close them.
        for wire in self._idle:
            wire.close()
        self._idle.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False)

    async def _call(
        self, asking: pb.BulkRequest, deadline: Deadline, work: Callable[[BulkSocket], int]
    ) -> int | None:
        """What a thread makes of it on a connection; None where there is none, or it broke."""
        asking.budget_ms = max(1, round(deadline.left_s() * 1000))
        wire = self._take()
        if wire is None:
            return None
        in_order = False
        try:
            job = asyncio.get_running_loop().run_in_executor(self._pool(), partial(work, wire))
            done = await undisturbed(job, wire.shut)
            in_order = True
        except KvstoreError:
            in_order = True
            raise
        except (Hangup, Nonsense) as error:
            self._next_try_s = self._clock.monotonic_s() + RETRY_S
            _log.info("the bulk path broke: %s", describe(error))
            return None
        finally:
            self._give_back(wire, in_order)
        return done

    def _take(self) -> BulkSocket | None:
        while self._idle:
            wire = self._idle.pop()
            if wire.is_quiet:
                self._in_use.add(wire)
                return wire
            wire.close()  # The node has hung up, or is no node.
        if self.connections < MAX_CONNECTIONS:
            self._try()
        return None

    def _give_back(self, wire: BulkSocket, in_order: bool) -> None:
        self._in_use.discard(wire)
        if in_order and self._wanted and not wire.is_shut:
            self._idle.append(wire)
        else:
            wire.close()

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(
                MAX_CONNECTIONS, thread_name_prefix="kvstore-client-bulk"
            )
        return self._threads

    def _try(self) -> None:
        trying = self._trying is not None and not self._trying.done()
        if self._wanted and not trying and self._clock.monotonic_s() >= self._next_try_s:
            self._trying = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            deadline = Deadline(self._clock, CONNECT_S)
            async with asyncio.timeout(CONNECT_S):
                wire = await connect(self._caller, self._host, self._tls, deadline)
        except (KvstoreError, OSError, ValueError, grpc.RpcError, grpc.aio.BaseError) as error:
            # A firewall, an older node: the stream is always there.
            _log.info("no bulk path to the node: %s", describe(error))
            gone = isinstance(error, grpc.aio.AioRpcError) and error.code() in _GONE
            self._next_try_s = self._clock.monotonic_s() + (RETRY_S if gone else REFUSED_RETRY_S)
            return
        if wire is None:
            self._next_try_s = self._clock.monotonic_s() + REFUSED_RETRY_S
        else:
            self._idle.append(wire)
