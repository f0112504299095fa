"""Work in threads that take turns at it."""

import asyncio
import threading

import pytest

from kvstore.runner import ThreadRunner, run_each
from tests.sim.runner import GatedRunner

WAIT_S = 30.0


async def test_answers_come_in_order_from_so_many_threads() -> None:
    """Each item is worked on once; the threads are there at one time, and no other one."""
    runner = ThreadRunner(8)
    together = threading.Barrier(3, timeout=WAIT_S)
    seen: set[int] = set()

    def work(number: int) -> int:
        together.wait()
        seen.add(threading.get_ident())
        return number * number

    assert await run_each(runner, work, range(12), at_once=3) == [n * n for n in range(12)]
    assert len(seen) == 3
    assert await run_each(runner, work, [], at_once=3) == []
    assert await runner.close(WAIT_S)


async def test_few_items_take_few_threads() -> None:
    """None is handed a call with nothing to do."""
    runner = GatedRunner()
    runner.held = True
    running = asyncio.create_task(run_each(runner, str, [1, 2], at_once=8))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert runner.waiting == 2
    await runner.release()
    assert await running == ["1", "2"]


async def test_nothing_is_begun_for_who_is_gone() -> None:
    """A thread that works ends its item, and takes no other."""
    runner = ThreadRunner(1)
    entered, go = threading.Event(), threading.Event()
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        entered.set()
        assert go.wait(WAIT_S)

    running = asyncio.create_task(run_each(runner, work, range(5), at_once=1))
    assert await asyncio.to_thread(entered.wait, WAIT_S)
    running.cancel()
    await asyncio.wait([running])
    go.set()
    assert await runner.close(WAIT_S)
    assert begun == [0]


async def test_what_is_raised_ends_the_rest() -> None:
    """The caller gets it, and no further item is begun."""
    runner = ThreadRunner(1)
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise ValueError(number)

    with pytest.raises(ValueError, match="2"):
        await run_each(runner, work, range(9), at_once=1)
    assert await runner.close(WAIT_S)
    assert begun == [0, 1, 2]
