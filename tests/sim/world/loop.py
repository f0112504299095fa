"""An event loop on which time is a number: with nothing left to do it jumps to the next timer.

`asyncio.sleep`, `asyncio.timeout` and the clocks of the nodes all live on that time, so that an
hour costs nothing and a run is the same each time.
"""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, TypeVarTuple, Unpack

Ts = TypeVarTuple("Ts")

MANY_TASKS = 300
"""After so many it is time to forget those that ended."""


MOST_TURNS = 1_000_000
"""Of the loop in one run, which takes five thousand."""


class Stuck(Exception):
    """When nothing will ever happen again, though somebody still waits; or it never ends."""


class Process:
    """Whoever runs in one simulated process: its tasks, which end with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self._tasks: list[asyncio.Task[Any]] = []

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those that have not ended."""
        self._tasks = [task for task in self._tasks if not task.done()]
        return self._tasks

    def keep(self, task: asyncio.Task[Any]) -> None:
        """A task was started on its behalf."""
        self._tasks.append(task)
        if len(self._tasks) > MANY_TASKS:
            self._tasks = self.tasks

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts a task that belongs to the process, like all tasks that it starts in turn."""
        token = RUNNING.set(self)
        try:
            return asyncio.get_running_loop().create_task(work)
        finally:
            RUNNING.reset(token)


RUNNING: ContextVar[Process | None] = ContextVar("running", default=None)
"""The process on whose behalf something runs; tasks inherit it from who started them."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop without sockets, threads or real time.

    `failures` are the exceptions that nobody caught, `turns` how often it went round. Its queues
    are its own, leaner than those of the base class, because most of a run is spent in them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._soon: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        self.turns = 0
        self.failures: list[str] = []
        self.set_task_factory(_make_task)  # type: ignore[arg-type] # nobody passes it more
        self.set_exception_handler(self._note)

    def time(self) -> float:
        return self._now_s

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:  # fmt: skip
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:  # fmt: skip
        return self.call_soon(callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        return

    def _run_once(self) -> None:
        """One turn. Time moves only when nothing else is left to do."""
        soon, timers = self._soon, self._timers
        self.turns += 1
        if self.turns > MOST_TURNS:
            raise Stuck(f"this goes on for ever: {MOST_TURNS} turns, at {self._now_s} s")
        while timers and (timers[0][2].cancelled() or not soon):
            when_s, _, handle = heapq.heappop(timers)
            if not handle.cancelled():
                self._now_s = max(self._now_s, when_s)
                soon.append(handle)
        while timers and timers[0][0] <= self._now_s:
            soon.append(heapq.heappop(timers)[2])
        if not soon:
            raise Stuck("everybody waits, and no timer is set")
        for _ in range(len(soon)):
            due = soon.popleft()
            if not due.cancelled():
                due._run()

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")


def _make_task(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, Any],
    context: Context | None = None,
) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context)
    process = RUNNING.get() if context is None else context.get(RUNNING)
    if process is not None:
        process.keep(task)
    return task


class SimulatedClock:
    """A `Clock` on the loop's time. `shift_s` is by how much the wall clock is wrong."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.shift_s = 0.0

    def monotonic_s(self) -> float:
        return self._loop.time()

    def wall_s(self) -> float:
        return 1_700_000_000.0 + self._loop.time() + self.shift_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
