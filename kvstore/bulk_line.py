"""A connection of the bulk path as coroutines use it: its blocking calls run in a thread."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from kvstore.api.bulk import BulkSocket, Hangup, undisturbed
from kvstore.calls import CallerGone
from kvstore.runner import Runner

Answer = TypeVar("Answer")


class Line:
    """One client's connection."""

    def __init__(self, wire: BulkSocket, runner: Runner) -> None:
        self.wire = wire
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        """Guards what follows, between the loop and the thread."""
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._is_running = False

    def begin(self, work: Callable[[], Answer]) -> asyncio.Future[Answer]:
        """What `work` will answer. It follows what was begun before without a pause.

        The answer is to be awaited with `ended`. Work that fails ends the connection.
        """
        answer: asyncio.Future[Answer] = self._loop.create_future()
        # Where nobody waits any more, nobody asks for the error either.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        with self._lock:
            self._waiting.append((work, answer))
            if self._is_running:
                return answer
            self._is_running = True
        asyncio.ensure_future(self._runner.run(self._work_off)).add_done_callback(self._stopped)
        return answer

    async def ended(self, answer: asyncio.Future[Answer]) -> Answer:
        """What some work answers. Raises CallerGone when the connection has ended.

        If this is cancelled the connection is shut down, which ends the work, and this returns
        only then: what it was filling or sending nobody touches any more.
        """
        try:
            return await undisturbed(answer, self.wire.shut)
        except Hangup as error:
            raise CallerGone(str(error)) from None

    async def run(self, work: Callable[[], Answer]) -> Answer:
        """Both."""
        return await self.ended(self.begin(work))

    async def close(self) -> None:
        """Hangs up, and lets go of the connection when its thread has."""
        self.wire.shut()
        with suppress(CallerGone, asyncio.CancelledError):
            await self.run(lambda: None)
        self.wire.close()

    def _work_off(self) -> None:
        """In a thread: one work after the other, as long as there are any."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                work, answer = self._waiting.popleft()
            try:
                settle: Callable[[], None] = partial(answer.set_result, work())
            except Exception as error:  # noqa: BLE001  It is the waiting coroutine's.
                self.wire.shut()
                settle = partial(answer.set_exception, error)
            self._loop.call_soon_threadsafe(settle)

    def _stopped(self, job: asyncio.Future[None]) -> None:
        """Where no thread was to be had, what waits for one has ended."""
        if job.cancelled() or job.exception() is not None:
            with self._lock:
                waiting, self._is_running = list(self._waiting), False
                self._waiting.clear()
            for _, answer in waiting:
                answer.set_exception(Hangup("no thread serves the connection"))
