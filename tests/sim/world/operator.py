"""The operator, and whatever else happens to machines, disks, Redis, clocks and cables.

`faults` counts what was really done: a run without faults proves nothing.
"""

import asyncio
import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence

from kvstore.policy.policies import POLICIES
from kvstore.record import HEADER_BYTES, Damaged, Header, Kind
from tests.sim.world.machine import Limits, Machine
from tests.sim.world.network import Network
from tests.sim.world.redis import Mood, RedisServer
from tests.sim.world.trace import Trace

HOUR_S = 3600.0
YEAR_S = 365 * 24 * HOUR_S
PAGE_BYTES = 4096
SEGMENT_BYTES = 1 << 16
RECORD_PAGES = 2


def draw_limits(rng: random.Random) -> Limits:
    """Limits under which everything happens within a few seconds."""
    return Limits(
        memory_bytes=rng.choice([2, 3, 4, 6]) * 4 * 8192,
        disk_bytes=rng.choice([4, 6, 10]) * SEGMENT_BYTES,
        segment_bytes=SEGMENT_BYTES,
        sync_after_s=rng.choice([0.2, 1.0, 5.0]),
        redis=rng.random() < 0.7,
        ttl_s=rng.choice([2, 5, 60]),
        part_bytes=rng.choice([1024, 4096, 1 << 20]),
        redis_bytes=rng.choice([0, 0, 200_000]),
        policy=rng.choice(list(POLICIES)),
        codec=rng.choice(["raw", "raw", "bitshuffle-lz4"]),
    )


class Operator:
    """Does what breaks things, and ends it again: nothing lasts longer than a few seconds."""

    def __init__(
        self,
        machines: Sequence[Machine],
        clients: Sequence[str],
        redis: RedisServer,
        network: Network,
        rng: random.Random,
        trace: Trace,
    ) -> None:
        self.faults: Counter[str] = Counter()
        self._machines = machines
        self._clients = clients
        self._redis = redis
        self._network = network
        self._rng = rng
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._pending: list[asyncio.TimerHandle] = []
        self._actions = (
            [self.restart] * 2 + [self.kill] * 3 + [self.cut_power] * 2 + [self.freeze_time] * 1
            + [self.fail_files] * 3 + [self.fill_disk] * 2 + [self.slow_disk] * 2
            + [self.damage_disk] * 2 + [self.sicken_redis] * 5 + [self.cut_redis] * 2
            + [self.damage_redis] * 2 + [self.evict_redis] * 2 + [self.cut_cable] * 2
            + [self.lose_messages] * 2 + [self.shift_clock] * 2
        )  # fmt: skip

    async def act(self) -> None:
        """One thing of all that can go wrong."""
        action = self._rng.choice(self._actions)
        machine = self._rng.choice(self._machines)
        self._trace.say(f"{self._loop.time():.6f} {action.__name__} {machine.name}")
        if machine.running is None:
            await machine.start()
            return
        self.faults[action.__name__] += 1
        await action(machine)

    def end_all(self) -> None:
        """Everything is well from now on."""
        for handle in self._pending:
            handle.cancel()
        self._pending.clear()
        for machine in self._machines:
            machine.files.fault, machine.files.room_bytes = None, None
            machine.clock.shift_s = 0.0
            if machine.running is not None:
                machine.running.runner.slow_s = 0.0
        self._redis.lose = self._network.lose = 0.0
        self._redis.cut_off.clear()
        self._network.cut_off.clear()
        self._redis.change(Mood.WELL)

    def _for_a_while(self, end: Callable[[], object], most_s: float = 3.0) -> None:
        delay_s = self._rng.random() * most_s
        self._pending.append(self._loop.call_later(delay_s, end))

    # Processes and machines.

    async def restart(self, machine: Machine) -> None:
        """A clean end and a new beginning, maybe with other limits."""
        await machine.stop()
        await self._begin(machine)

    async def kill(self, machine: Machine) -> None:
        """SIGKILL, and a new beginning."""
        await machine.kill()
        await self._begin(machine)

    async def cut_power(self, machine: Machine) -> None:
        """The worst that is allowed, or something random."""
        await machine.cut_power(self._rng if self._rng.random() < 0.7 else None)
        await self._begin(machine)

    async def _begin(self, machine: Machine) -> None:
        if self._rng.random() < 0.2:
            return  # Somebody starts it later.
        if self._rng.random() < 0.3:
            changed = draw_limits(self._rng)
            await machine.start(
                memory_bytes=changed.memory_bytes, disk_bytes=changed.disk_bytes,
                redis=changed.redis, policy=changed.policy, codec=changed.codec,
                part_bytes=changed.part_bytes,
            )  # fmt: skip
        else:
            await machine.start()

    async def freeze_time(self, machine: Machine) -> None:
        """Much time passes."""
        await asyncio.sleep(self._rng.choice([1.0, 10.0, 70.0]))

    # Disks.

    async def fail_files(self, machine: Machine) -> None:
        """Some operations fail with EIO, once, now and then, or always."""
        operations = self._rng.choice(
            [["write"], ["read"], ["sync"], ["open"], ["remove"], ["truncate"], ["rename"],
             ["read", "write", "sync", "open", "rename", "remove", "truncate", "names", "size"]]
        )  # fmt: skip
        chance = self._rng.choice([0.1, 0.5, 1.0])
        left = self._rng.choice([1, 1000])
        self._trace.say(f"  {operations} fail {left} times, with chance {chance}")

        def fault(operation: str, name: str) -> None:
            nonlocal left
            if left and operation in operations and self._rng.random() < chance:
                left -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO), name)

        machine.files.fault = fault
        self._for_a_while(lambda: setattr(machine.files, "fault", None))

    async def fill_disk(self, machine: Machine) -> None:
        """The device has hardly any room left."""
        machine.files.room_bytes = machine.files.total_bytes + self._rng.randrange(30_000)
        self._for_a_while(lambda: setattr(machine.files, "room_bytes", None))

    async def slow_disk(self, machine: Machine) -> None:
        """Every piece of blocking work takes long."""
        assert machine.running is not None
        runner = machine.running.runner
        runner.slow_s = self._rng.choice([0.05, 0.3, 2.0])
        self._for_a_while(lambda: setattr(runner, "slow_s", 0.0))

    async def damage_disk(self, machine: Machine) -> None:
        """Some bits of a file, or of all, change, or one record lies in place of another, too."""
        names = sorted(machine.files._names)
        if not names:
            return
        name = self._rng.choice(names)
        machine.ledger.damage()
        if self._rng.random() < 0.3:
            self._misplace(machine, name)
            return
        flips = self._rng.choice([1, 20, 20])
        for damaged in [name] if flips == 1 else names:
            self._flip(machine, damaged, flips)

    def _flip(self, machine: Machine, name: str, flips: int) -> None:
        content = machine.files.content(name)
        for _ in range(flips if content else 0):
            at = self._rng.randrange(len(content))
            if not _forgets(content, at):
                machine.files.flip(name, 8 * at + self._rng.randrange(8))
        self._trace.say(f"  {name} is damaged")

    def _misplace(self, machine: Machine, name: str) -> None:
        """Writes a page of one record where another's is, as a disk does that errs in a place."""
        content = machine.files.content(name)
        pages = [at for at in range(0, len(content), PAGE_BYTES) if _is_header(content, at)]
        if len(pages) < 2:
            return
        source, target = self._rng.sample(pages, 2)
        record = content[source : source + RECORD_PAGES * PAGE_BYTES]
        del record[len(content) - target :]
        content[target : target + len(record)] = record
        machine.files.put(name, bytes(content))
        self._trace.say(f"  {name}: what was at {source} is at {target}, too")

    # Redis.

    async def sicken_redis(self, machine: Machine) -> None:
        """The server is in a bad mood, loses messages, or forgets everything."""
        mood = self._rng.choice([*Mood, None])
        if mood is None:
            self._redis.flush()
        elif mood is Mood.WELL:
            self._redis.lose = 0.3
            self._for_a_while(lambda: setattr(self._redis, "lose", 0.0))
        else:
            self._redis.change(mood)
            self._for_a_while(lambda: self._redis.change(Mood.WELL))

    async def cut_redis(self, machine: Machine) -> None:
        """One node cannot reach it."""
        assert machine.running is not None
        name = machine.running.process.name
        self._redis.cut_off.add(name)
        self._for_a_while(lambda: self._redis.cut_off.discard(name))

    async def damage_redis(self, machine: Machine) -> None:
        """Bits flip, values are cut, or swapped."""
        for _ in range(self._rng.choice([1, 10])):
            self._damage_value()

    def _damage_value(self) -> None:
        keys = self._redis.keys()
        if len(keys) < 2:
            return
        key, other = self._rng.sample(keys, 2)
        alike = [k for k in keys if k != key and k.endswith(key[-2:])]
        other = self._rng.choice(alike or [other])
        values = [self._redis.value(key) or b"", self._redis.value(other) or b""]
        match self._rng.randrange(3):
            case 0:
                self._redis.damage(key, lambda value: _flipped(value, self._rng))
            case 1:
                self._redis.damage(key, lambda value: value[: self._rng.randrange(len(value) + 1)])
            case _:
                self._redis.damage(key, lambda _: values[1])
                self._redis.damage(other, lambda _: values[0])

    async def evict_redis(self, machine: Machine) -> None:
        """The server needs room."""
        keys = self._redis.keys()
        for key in keys:
            if self._rng.random() < 0.3:
                self._redis.evict(key)

    # Cables and clocks.

    async def cut_cable(self, machine: Machine) -> None:
        """One client and one machine cannot hear each other."""
        pair = (self._rng.choice(self._clients), machine.name)
        self._network.cut_off.add(pair)
        self._for_a_while(lambda: self._network.cut_off.discard(pair))

    async def lose_messages(self, machine: Machine) -> None:
        """The network loses messages, and takes its time."""
        self._network.lose, self._network.slow_s = 0.2, 0.3

        def end() -> None:
            self._network.lose, self._network.slow_s = 0.0, 0.002

        self._for_a_while(end)

    async def shift_clock(self, machine: Machine) -> None:
        """The wall clock jumps."""
        shift_s = self._rng.choice([HOUR_S, 10 * YEAR_S])
        machine.clock.shift_s += self._rng.choice([-1, 1]) * shift_s


def _flipped(value: bytes, rng: random.Random) -> bytes:
    changed = bytearray(value or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _is_header(content: bytearray, page: int) -> bool:
    """Whether a block's record begins there."""
    try:
        return Header.unpack(bytes(content[page : page + HEADER_BYTES])).kind is Kind.BLOCK
    except Damaged:
        return False


def _forgets(content: bytearray, at: int) -> bool:
    """Whether a byte lies in a record that says what is forgotten: who damages it, un-discards."""
    page = at // PAGE_BYTES * PAGE_BYTES
    try:
        return Header.unpack(bytes(content[page : page + HEADER_BYTES])).kind is not Kind.BLOCK
    except Damaged:
        return False
