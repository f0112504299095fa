"""An event loop of its own in a daemon thread, for callers that have none."""

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, TypeVar

from kvstore.api.errors import Unavailable

Answer = TypeVar("Answer")
Item = TypeVar("Item")

GRACE_S = 1.0
"""How long `stop` lets coroutines come to their own end before it cancels them."""
SLICE_S = 0.2
"""How long an interrupt may go unnoticed at worst."""


class LoopThread:
    """Runs coroutines for threads that wait for them.

    Invariant: after `stop` nothing runs any more and nothing new is accepted.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.RLock()
        """Guards `_stopping`, so that no coroutine is handed over after the last one. Reentrant:
        a forgotten iterator that is collected anywhere submits its end."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
        """What the coroutine answers. Raises `Unavailable` after `stop`.

        When the waiting thread is interrupted (Ctrl-C) the coroutine is cancelled, and this
        raises only after it has ended: nothing goes on behind the caller's back.
        """
        outcome = self.submit(coroutine)
        with self._ended(outcome):
            # In slices: a signal that comes just before the wait begins does not end it, and
            # Ctrl-C would then only be noticed when the answer is there.
            while not outcome.done():
                concurrent.futures.wait([outcome], SLICE_S)
            return outcome.result()

    def stream(
        self, begin: Callable[[Callable[[Item], None]], Coroutine[Any, Any, object]]
    ) -> Generator[list[Item], None, None]:
        """What a coroutine tells the function that `begin` is given: all that is new, each time.

        Raises like `run`. An iterator that is closed early, or interrupted, cancels the coroutine
        and waits for its end, as `run` does.
        """
        told: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        outcome = self.submit(begin(told.put))
        outcome.add_done_callback(lambda _: told.put(None))
        with self._ended(outcome):
            over = False
            while not over:
                items, over = _take_all(told)
                if items:
                    yield items
            outcome.result()

    @property
    def is_inside(self) -> bool:
        """Whether the caller is the loop's own thread, which must not wait for itself.

        An iterator that was forgotten may be collected, and so closed, anywhere.
        """
        return threading.current_thread() is self._thread

    @contextlib.contextmanager
    def _ended(self, outcome: "Outcome[Answer]") -> Iterator[None]:
        """However the block is left, the coroutine has ended then."""
        try:
            yield
        except concurrent.futures.CancelledError:
            raise Unavailable("the client was closed") from None
        except BaseException:
            outcome.cancel()
            if not self.is_inside:
                concurrent.futures.wait([outcome])
            raise

    def submit(self, coroutine: Coroutine[Any, Any, Answer]) -> "Outcome[Answer]":
        """Starts the coroutine without waiting. Raises `Unavailable` after `stop`."""
        with self._lock:
            if self._stopping:
                coroutine.close()
                raise Unavailable("the client is closed")
            outcome: Outcome[Answer] = Outcome(self._loop)
            self._loop.call_soon_threadsafe(outcome.begin, coroutine)
        return outcome

    def stop(self) -> None:
        """Waits `GRACE_S` for what still runs, cancels the rest, ends the thread. Idempotent."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            ending = asyncio.run_coroutine_threadsafe(_end_others(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


class Outcome(concurrent.futures.Future[Answer]):
    """The answer of a coroutine in another thread; settled only when the coroutine has ended.

    `asyncio.run_coroutine_threadsafe` will not do: its future is settled the moment that it is
    cancelled, while the coroutine may still be writing to the caller's buffers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._task: asyncio.Task[Answer] | None = None

    def begin(self, coroutine: Coroutine[Any, Any, Answer]) -> None:
        """Starts the coroutine. Called in the loop's thread."""
        self._task = self._loop.create_task(coroutine)
        self._task.add_done_callback(self._settle)

    def cancel(self) -> bool:
        """Asks the coroutine to end. False if it has ended already."""
        if self.done():
            return False
        self._loop.call_soon_threadsafe(self._cancel_task)
        return True

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _settle(self, task: asyncio.Task[Answer]) -> None:
        if task.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif (error := task.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(task.result())


def _take_all(told: "queue.SimpleQueue[Item | None]") -> tuple[list[Item], bool]:
    """What lies in the queue, after waiting a slice for the first; and whether None ended it."""
    items: list[Item] = []
    with contextlib.suppress(queue.Empty):
        item = told.get(timeout=SLICE_S)
        while item is not None:
            items.append(item)
            item = told.get_nowait()
        return items, True
    return items, False


async def _end_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if not others:
        return
    _, late = await asyncio.wait(others, timeout=GRACE_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
