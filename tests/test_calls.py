"""What all calls have in common, without a server around it."""

import asyncio
from typing import Any, cast

import pytest

from kvstore.admission import Admission, Limits
from kvstore.api.clock import SystemClock
from kvstore.calls import Calls, Context
from kvstore.metrics import Metrics
from kvstore.tenants import Tenants

LIMITS = Limits(calls=4, waiting_calls=4, wait_s=1, inflight_bytes=1 << 20, client_bytes=1 << 20)


class Aborted(Exception):
    """When a call ends with a status."""


class OneCall:
    """What gRPC tells of a call that has `left_s`."""

    def __init__(self, left_s: float) -> None:
        self._left_s = left_s
        self.writing = self.writing_at_its_end = False

    def invocation_metadata(self) -> tuple[()]:
        """Nothing: there is one tenant."""
        return ()

    def time_remaining(self) -> float:
        """Until its deadline."""
        return self._left_s

    def peer(self) -> str:
        """From where it comes."""
        return "here"

    async def write(self, taken: asyncio.Event) -> None:
        """Sends a reply, which the caller takes in his time; gRPC goes on when it is cancelled."""
        self.writing = True
        await taken.wait()
        self.writing = False

    async def abort(self, *status: Any) -> None:
        """Ends it."""
        self.writing_at_its_end = self.writing
        raise Aborted(*status)


def calls(metrics: Metrics) -> Calls:
    """Those of a node that waits for nobody else."""
    clock = SystemClock()
    return Calls(
        Tenants(), Admission(LIMITS, clock), max_deadline_s=60, max_watchers=1,
        clock=clock, metrics=metrics,
    )  # fmt: skip


async def test_the_end_leaves_alone_who_is_leaving_already() -> None:
    """A call that is late, and still cleans up, neither breaks the end of the others nor is it."""
    served = calls(Metrics())
    late, cleaned_up = asyncio.Event(), asyncio.Event()

    async def discard() -> None:
        async with served.call("discard", cast(Context, OneCall(0.01))):
            try:
                await asyncio.Event().wait()
            finally:
                late.set()
                await cleaned_up.wait()

    async def match() -> None:
        async with served.call("match", cast(Context, OneCall(60))):
            await asyncio.Event().wait()

    running = [asyncio.create_task(discard()), asyncio.create_task(match())]
    await late.wait()
    served.drain()
    served.end()
    with pytest.raises(Aborted, match="has stopped"):
        await running[1]
    cleaned_up.set()
    with pytest.raises(Aborted):
        await running[0]
    assert await served.finished(1)


async def test_a_call_that_is_late_ends_behind_the_reply_that_is_on_its_way() -> None:
    """gRPC sends no status beside a reply: the caller would wait for it for ever."""
    served, context, taken = calls(Metrics()), OneCall(0.01), asyncio.Event()

    asyncio.get_running_loop().call_later(0.05, taken.set)
    with pytest.raises(Aborted, match="max_deadline_s"):
        async with served.call("read", cast(Context, context)) as call:
            await call.write(taken)
            await asyncio.Event().wait()
    assert not context.writing_at_its_end


async def test_a_mistake_of_ours_is_counted_as_one() -> None:
    """Not as a call that its caller gave up."""
    metrics = Metrics()
    served = calls(metrics)
    with pytest.raises(ZeroDivisionError):
        async with served.call("match", cast(Context, OneCall(60))):
            _ = 1 / 0
    counted = metrics.registry.get_sample_value(
        "kvstore_requests_total", {"op": "match", "status": "unknown"}
    )
    assert counted == 1
