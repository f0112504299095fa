"""The seam of blocking work: files and codecs run through a `Runner`, never on the event loop."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Runner(Protocol):
    """Runs blocking calls for coroutines."""

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Cancelling the caller does not stop `work`."""

    async def close(self, timeout_s: float) -> bool:
        """Takes nothing more. True once nothing runs, False if that takes longer."""


class ThreadRunner:
    """Runs each call in one of a fixed number of threads."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-io")

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def close(self, timeout_s: float) -> bool:
        # A thread at a device that hangs cannot be ended, and must not hold up who waits for it.
        ending = threading.Thread(target=self._pool.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, timeout_s)
        return not ending.is_alive()


async def run_each(
    runner: Runner, work: Callable[[S], T], items: Sequence[S], *, at_once: int
) -> list[T]:
    """What `work` returns of each item, in order. At most `at_once` threads take turns at them.

    A call in a thread of its own costs more than much of this work does. Where `work` raises, or
    the caller is cancelled, no item is begun any more.
    """
    done: dict[int, T] = {}
    waiting = iter(range(len(items)))  # Threads take turns at it, one `next` at a time.
    is_over = False

    def take_turns() -> None:
        for number in waiting:
            if is_over:
                return
            done[number] = work(items[number])

    try:
        await asyncio.gather(*(runner.run(take_turns) for _ in range(min(at_once, len(items)))))
    finally:
        is_over = True
    return [done[number] for number in range(len(items))]
