"""What all calls have in common: who calls, until when, how it ends, and what is counted."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from kvstore.admission import Admission
from kvstore.api.clock import Clock
from kvstore.api.errors import (
    STATUS,
    KvstoreError,
    ResourceExhausted,
    Shed,
    TierError,
    Unavailable,
)
from kvstore.metrics import Metrics
from kvstore.tenants import Tenant, Tenants

_log = logging.getLogger("kvstore.calls")

Context = grpc.aio.ServicerContext[Any, Any]

ANSWER_MARGIN_S = 0.02
"""So long before its deadline a call answers what it has; a tenth of it, where that is less."""
WATCHERS_PER_CLIENT = 8
LAST_WRITE_S = 1.0
"""Who does not take a reply for so long hears of nothing more."""


class CallerGone(Exception):
    """When the caller has hung up in the middle of a call: there is nobody to answer."""


def authorization(context: Context) -> str | None:
    """What the caller shows of himself."""
    metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
    shown = metadata.get("authorization")
    return None if shown is None else str(shown)


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, from which connection, and when the answer is due."""

    tenant: Tenant
    client: str
    due_s: float
    """On the event loop's clock."""
    context: Context

    def left_s(self) -> float:
        """What is left for the work, if its answer shall be of use."""
        return self.due_s - asyncio.get_running_loop().time()

    async def write(self, reply: object) -> None:
        """Sends one reply of several.

        When a write is cancelled gRPC goes on with it, and sends no status meanwhile: the caller
        would never hear how his call has ended. So its end is waited for.
        """
        writing = asyncio.ensure_future(self.context.write(reply))
        # Where nobody waits any more, nobody asks for the error either.
        writing.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing], timeout=LAST_WRITE_S)
            raise


class Calls:
    """The calls that a node serves. From `drain` on it takes none, and `end` ends what is left."""

    def __init__(
        self,
        tenants: Tenants,
        admission: Admission,
        *,
        max_deadline_s: float,
        max_watchers: int,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.admission = admission
        self._tenants = tenants
        self._max_deadline_s = max_deadline_s
        self._max_watchers = max_watchers
        self._watchers: Counter[str] = Counter()
        """Calls without an end, by client."""
        self._clock = clock
        self._metrics = metrics
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._ended = False

    def drain(self) -> None:
        """New calls get UNAVAILABLE from now on."""
        self._draining = True

    def end(self) -> None:
        """Ends what still runs with UNAVAILABLE."""
        self._ended = True
        for timeout in self._running:
            if not timeout.expired():  # Otherwise its call is on its way out already.
                timeout.reschedule(asyncio.get_running_loop().time())

    async def finished(self, timeout_s: float) -> bool:
        """True as soon as no call runs, False if that takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    @asynccontextmanager
    async def call(
        self,
        op: str,
        context: Context,
        *,
        endless: bool = False,
        authenticate: Callable[[str | None], Tenant] | None = None,
    ) -> AsyncIterator[Call]:
        """Authenticates the caller, keeps to the deadline, maps errors to statuses, counts.

        `authenticate` is for callers that are no tenants. An `endless` call has no deadline; of
        those there are few, so that they leave room.
        """
        started_s = self._clock.monotonic_s()
        status = grpc.StatusCode.CANCELLED
        try:
            async with self._timed(context, endless, authenticate) as call:
                if endless:
                    with self._watching(call.client):
                        yield call
                else:
                    yield call
            status = grpc.StatusCode.OK
        except Shed as error:
            status = STATUS[ResourceExhausted]
            self._metrics.shed_calls.labels(error.reason).inc()
            self._metrics.shed_seconds.observe(self._clock.monotonic_s() - started_s)
            pushback = ("grpc-retry-pushback-ms", str(round(error.retry_s * 1000)))
            await context.abort(status, str(error), (pushback,))
        except TierError as error:
            status = grpc.StatusCode.UNAVAILABLE
            await context.abort(status, str(error))
        except KvstoreError as error:
            status = STATUS[type(error)]
            await context.abort(status, str(error))
        except TimeoutError:
            status = grpc.StatusCode.DEADLINE_EXCEEDED
            await context.abort(status, f"server.max_deadline_s: {self._max_deadline_s:g} s")
        except Exception as error:
            # What comes from gRPC itself says that the caller is gone, too.
            gone = isinstance(error, CallerGone) or type(error).__module__.startswith("grpc.")
            if not gone:
                status = grpc.StatusCode.UNKNOWN
                _log.exception("%s failed", op)
            raise
        finally:
            self._metrics.requests.labels(op, status.name.lower()).inc()
            seconds = self._clock.monotonic_s() - started_s
            self._metrics.request_seconds.labels(op).observe(seconds)

    @contextmanager
    def _watching(self, client: str) -> Iterator[None]:
        if self._watchers.total() >= self._max_watchers:
            raise ResourceExhausted(f"server.max_watchers: {self._max_watchers} calls watch")
        if self._watchers[client] >= WATCHERS_PER_CLIENT:
            raise ResourceExhausted(f"{WATCHERS_PER_CLIENT} calls of this connection watch")
        self._watchers[client] += 1
        try:
            yield
        finally:
            self._watchers[client] -= 1
            if not self._watchers[client]:
                del self._watchers[client]

    def admitted(self, call: Call, cost_bytes: int) -> AbstractAsyncContextManager[None]:
        """Holds so many bytes for the call. Raises Shed."""
        return self.admission.admitted(call.client, cost_bytes, call.left_s())

    @asynccontextmanager
    async def _timed(
        self,
        context: Context,
        endless: bool,
        authenticate: Callable[[str | None], Tenant] | None,
    ) -> AsyncIterator[Call]:
        if self._draining:
            raise Unavailable("this node is draining")
        tenant = (authenticate or self._tenants.authenticate)(authorization(context))
        asked_s = context.time_remaining()
        budget_s = min(
            asked_s if asked_s is not None else self._max_deadline_s, self._max_deadline_s
        )
        due_s = asyncio.get_running_loop().time() + budget_s - min(ANSWER_MARGIN_S, budget_s / 10)
        timeout = asyncio.timeout(None if endless else budget_s)
        self._running.add(timeout)
        self._idle.clear()
        try:
            async with timeout:
                yield Call(tenant, f"{tenant.name} {context.peer()}", due_s, context)
        except TimeoutError:
            if self._ended and timeout.expired():
                raise Unavailable("this node has stopped") from None
            raise
        finally:
            self._running.discard(timeout)
            if not self._running:
                self._idle.set()
