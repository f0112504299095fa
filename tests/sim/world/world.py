"""A whole small cluster in one process: nodes, clients, Redis, disks, cables, and a seed.

`run(seed)` lives through one history of it, step by step, and checks every promise after each.
"""

import asyncio
import contextlib
import random
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.sim.world.calls import Calls
from tests.sim.world.client import Client
from tests.sim.world.epilogue import Epilogue
from tests.sim.world.loop import SimulatedLoop
from tests.sim.world.machine import Machine, Running
from tests.sim.world.neighbours import Neighbours
from tests.sim.world.network import Network
from tests.sim.world.operator import Operator, draw_limits
from tests.sim.world.oracle import Oracle
from tests.sim.world.promises import check_machine
from tests.sim.world.redis import RedisServer
from tests.sim.world.trace import Broken, Trace
from tests.sim.world.universe import TENANTS

STEPS = 105
MOST_CALLS = 12


@dataclass(slots=True)
class Outcome:
    """How a run ended. `broken` is empty where every promise was kept."""

    seed: str
    steps: int = 0
    digest: str = ""
    broken: str = ""
    log: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    refused: int = 0
    longest_s: dict[str, float] = field(default_factory=dict)


class World:
    """One cluster. All of it is drawn from one source of randomness."""

    def __init__(self, seed: str, trace: Trace) -> None:
        self.rng = rng = random.Random(seed)
        self.trace = trace
        self.oracle = Oracle()
        self.redis = self.oracle.redis = RedisServer(rng, self.oracle.tick)
        self.network = Network(rng, trace)
        self.machines = [
            Machine(f"m{number}", rng, self.redis, trace, draw_limits(rng))
            for number in range(rng.choice([1, 1, 2, 2, 3]))
        ]
        for machine in self.machines:
            machine.when_ended = self._ended
        self._served = served = [
            (machine, Calls(machine, self.oracle, rng, trace)) for machine in self.machines
        ]
        near = {
            machine.name: Neighbours(machine, self.oracle, rng, trace) for machine in self.machines
        }
        self.clients = [
            Client(f"c{number}", TENANTS[number % len(TENANTS)], served, near, self.network, rng)
            for number in range(rng.choice([2, 3, 4]))
        ]
        self.operator = Operator(
            self.machines, [client.name for client in self.clients], self.redis, self.network,
            rng, trace,
        )  # fmt: skip
        self.steps = 0
        self._acting: set[asyncio.Task[None]] = set()
        self._pause_s = rng.choice([0.002, 0.02, 0.1])
        self._fault_share = rng.choice([0.0, 0.03, 0.1, 0.2])

    def _ended(self, running: Running) -> None:
        self.oracle.end_process(running.process.name)

    async def run(self, steps: int) -> None:
        """So many steps, then everything is well again, and ends."""
        for machine in self.machines:
            await machine.start()
        for _ in range(steps):
            await self._step()
        self.operator.end_all()
        await Epilogue(self._served, self.redis, self._acting).run()
        self.check()

    async def _step(self) -> None:
        self.steps += 1
        if self.rng.random() < self._fault_share:
            await self.operator.act()
        elif len(self._acting) < MOST_CALLS:
            client = self.rng.choice(self.clients)
            task = asyncio.get_running_loop().create_task(client.act())
            self._acting.add(task)
            task.add_done_callback(self._acting.discard)
        await asyncio.sleep(self.rng.random() * self._pause_s)
        self.check()

    def check(self) -> None:
        """Every promise, now."""
        for broken in [*self.network.broken, *self.redis.broken]:
            raise broken
        for machine in self.machines:
            check_machine(machine, self.oracle)


def run(seed: str, steps: int = STEPS) -> Outcome:
    """One history. It is the same for the same seed, steps and code."""
    trace, outcome = Trace(), Outcome(seed)
    loop = SimulatedLoop()
    world: World | None = None

    async def live() -> None:
        nonlocal world
        world = World(seed, trace)
        await world.run(steps)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            raise Broken(f"{len(left)} tasks are left: {left}")

    try:
        loop.run_until_complete(live())
        if loop.failures:
            raise Broken(f"nobody caught this: {loop.failures[0]}")
    except Exception as error:  # noqa: BLE001 - whatever it is, the seed has found it
        outcome.broken = _described(error)
        outcome.log = list(trace.lines)
    finally:
        _end(loop)
    if world is not None:
        trace.say(f"{world.rng.random()}")
        outcome.steps = world.steps
        outcome.faults = world.operator.faults
        outcome.answered = sum(client.answered for client in world.clients)
        outcome.refused = sum(client.refused for client in world.clients)
        outcome.longest_s = world.network.longest_s
    outcome.digest = trace.digest
    return outcome


def _described(error: Exception) -> str:
    """The error, and where it came from if it does not say what it is."""
    if isinstance(error, Broken):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno} {last.line}"
    return f"{type(error).__name__}: {error} ({place})"


def _end(loop: SimulatedLoop) -> None:
    """Lets go of the loop, whatever is still under way on it."""
    tasks = asyncio.all_tasks(loop)
    loop.turns = 0
    for task in tasks:
        task.cancel()
    with contextlib.suppress(Exception):
        loop.run_until_complete(asyncio.wait(tasks, timeout=1.0) if tasks else asyncio.sleep(0))
    loop.close()
