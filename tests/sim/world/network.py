"""The network between clients and nodes: it loses, delays, repeats and reorders what it carries.

A call is answered by a task of the node's process. What is lost on the way there has no effect;
what is lost on the way back has had it. A caller who gives up may or may not be noticed.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvstore.api.errors import KvstoreError, Unavailable
from tests.sim.world.machine import Machine, Running
from tests.sim.world.trace import Broken, Trace

T = TypeVar("T")
Handler = Callable[[Running, float], Coroutine[Any, Any, T]]
"""Answers a call on a running node; the number is when its caller stops waiting."""

DEADLINE_S = 3.0
CANCEL_S = 0.01
"""So long after it was cancelled a call must be over."""


class Network:
    """Carries calls. `broken` is what went wrong in a way that no fault explains."""

    def __init__(self, rng: random.Random, trace: Trace) -> None:
        self.lose = 0.0
        self.repeat = 0.02
        self.slow_s = 0.002
        self.cut_off: set[tuple[str, str]] = set()
        """Pairs of client and machine that cannot hear each other."""
        self.broken: list[Exception] = []
        self.longest_s: dict[str, float] = {}
        self._rng = rng
        self._trace = trace
        self._loop = asyncio.get_running_loop()

    async def ask(
        self,
        client: str,
        machine: Machine,
        what: str,
        handler: Handler[T],
        deadline_s: float = DEADLINE_S,
    ) -> T:
        """What the node answers. Raises its error, or Unavailable if no answer comes in time."""
        ends_s = self._loop.time() + deadline_s
        await asyncio.sleep(self._rng.random() * self.slow_s)
        if (client, machine.name) in self.cut_off or self._rng.random() < self.lose:
            await self._give_up(ends_s, what)
        call = self._deliver(machine, what, handler, ends_s)
        if self._rng.random() < self.repeat:
            delay_s = self._rng.random() * 0.2
            self._loop.call_later(delay_s, self._deliver_again, machine, what, handler, ends_s)
        try:
            await asyncio.wait({call}, timeout=max(0.0, ends_s - self._loop.time()))
        except asyncio.CancelledError:
            self._hang_up(call, what)
            raise
        if not call.done():
            self._hang_up(call, what)
            raise Unavailable(f"{what}: deadline")
        if (client, machine.name) in self.cut_off or self._rng.random() < self.lose:
            await self._give_up(ends_s, what)
        if call.cancelled():
            raise Unavailable(f"{what}: the process died")
        answer = call.result()
        if isinstance(answer, KvstoreError):
            raise answer
        return answer

    def _deliver(
        self, machine: Machine, what: str, handler: Handler[T], ends_s: float
    ) -> "asyncio.Task[T | KvstoreError]":
        running = machine.running
        if running is None or running.node.draining:
            raise Unavailable(f"{what}: nobody listens")
        call = running.process.spawn(self._answer(running, what, handler, ends_s))
        running.calls.add(call)
        call.add_done_callback(running.calls.discard)
        return call

    def _deliver_again(
        self, machine: Machine, what: str, handler: Handler[Any], ends_s: float
    ) -> None:
        if machine.running is not None and not machine.running.node.draining:
            self._deliver(machine, f"{what} again", handler, ends_s)

    async def _answer(
        self, running: Running, what: str, handler: Handler[T], ends_s: float
    ) -> T | KvstoreError:
        """What the server's shell does around a handler: errors of ours become statuses."""
        started_s = self._loop.time()
        answer: T | KvstoreError
        try:
            answer = await handler(running, ends_s)
        except Broken as broken:
            self.broken.append(broken)
            raise
        except KvstoreError as error:
            answer = error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.broken.append(error)
            raise
        took_s = self._loop.time() - started_s
        self._trace.say(f"{started_s:.6f}+{took_s:.6f} {running.process.name} {what}")
        word = what.split()[0]
        self.longest_s[word] = max(self.longest_s.get(word, 0.0), took_s)
        return answer

    def _hang_up(self, call: "asyncio.Task[Any]", what: str) -> None:
        """The caller is gone; mostly the node learns of it."""
        if self._rng.random() < 0.8 and not call.done():
            call.cancel()
            self._loop.call_later(CANCEL_S, self._check_over, call, what)

    def _check_over(self, call: "asyncio.Task[Any]", what: str) -> None:
        if not call.done():
            self.broken.append(Broken(f"{what} goes on though it was cancelled"))

    async def _give_up(self, ends_s: float, what: str) -> None:
        await asyncio.sleep(max(0.0, ends_s - self._loop.time()))
        raise Unavailable(f"{what}: lost")
