"""The twin of a Redis server and of redis-py's client: shared, forgetful, and often unwell.

`RedisClient` has the few calls that `RedisTier` makes. A command takes effect at the server at a
moment of its own: its caller may be gone by then, and its answer may be lost on the way back.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from redis import exceptions
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, RedisError

from tests.sim.world.loop import Process
from tests.sim.world.trace import Broken

Command = tuple[str, tuple[Any, ...]]

SCAN_STEP = 8
LONGEST_TTL_S = 60
"""What any node of a run is configured with, at most."""
WRITING = {"set", "expire", "unlink"}


class Mood(Enum):
    """How the server is."""

    WELL = "well"
    DOWN = "down"
    FROZEN = "frozen"
    SLOW = "slow"
    FULL = "full"
    READ_ONLY = "read-only"
    LOADING = "loading"


class RedisServer:
    """What all nodes share. `sets` remembers who wrote each key: when sent, when it took effect."""

    def __init__(self, rng: random.Random, tick: Callable[[], int]) -> None:
        self._rng = rng
        self._tick = tick
        self._loop = asyncio.get_running_loop()
        self._values: dict[bytes, tuple[bytes, float]] = {}
        self._frozen: list[Callable[[], None]] = []
        self.mood = Mood.WELL
        self.sets: dict[bytes, dict[str, tuple[int, int]]] = {}
        self.cut_off: set[str] = set()
        """Nodes that cannot reach the server."""
        self.lose = 0.0
        """The share of batches that are lost on their way, or their answers are."""
        self.commands = 0
        self.broken: list[Exception] = []
        """What nobody may ask of it."""

    # What the operator does.

    def change(self, mood: Mood) -> None:
        """The server is like this from now on; what a frozen one was sent, it does as it thaws."""
        self.mood = mood
        if mood is not Mood.FROZEN:
            waiting, self._frozen = self._frozen, []
            for serve in waiting:
                serve()

    def keys(self) -> list[bytes]:
        """The keys that are there now."""
        return [key for key in self._values if self.value(key) is not None]

    def value(self, key: bytes) -> bytes | None:
        """What a key holds now."""
        value, until_s = self._values.get(key, (b"", 0.0))
        return value if until_s > self._loop.time() else None

    def flush(self) -> None:
        """Forgets everything."""
        self._values.clear()

    def evict(self, key: bytes) -> None:
        """Forgets one key, as a full server does."""
        self._values.pop(key, None)

    def damage(self, key: bytes, change: Callable[[bytes], bytes]) -> None:
        """Changes what a key holds."""
        value, until_s = self._values[key]
        self._values[key] = (change(value), until_s)

    # What clients ask.

    def arrive(
        self, sender: str, sent: int, commands: list[Command], reply: "asyncio.Future[list[Any]]"
    ) -> None:
        """A batch of commands has come; the answers go into `reply` after their way back."""
        if self.mood is Mood.FROZEN:
            self._frozen.append(lambda: self.arrive(sender, sent, commands, reply))
            return
        answers = [self._do(sender, sent, *command) for command in commands]
        if self._rng.random() < self.lose:
            return
        self._loop.call_later(self.way_s(), _set, reply, answers)

    def way_s(self) -> float:
        """How long one message takes now."""
        return self._rng.random() * (1.0 if self.mood is Mood.SLOW else 0.002)

    def _do(self, sender: str, sent: int, name: str, arguments: tuple[Any, ...]) -> Any:
        self.commands += 1
        if self.mood is Mood.LOADING:
            return BusyLoadingError("Redis is loading the dataset in memory")
        if self.mood is Mood.READ_ONLY and name in WRITING:
            return ReadOnlyError("You can't write against a read only replica.")
        if self.mood is Mood.FULL and name == "set":
            return OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
        if name == "set":
            self.sets.setdefault(arguments[0], {})[sender] = (sent, self._tick())
        return getattr(self, f"_{name}")(*arguments)

    def _exists(self, key: bytes) -> int:
        return int(self.value(key) is not None)

    def _expire(self, key: bytes, ttl_s: int) -> bool:
        value = self.value(key)
        if value is not None:
            self._values[key] = (value, self._loop.time() + ttl_s)
        return value is not None

    def _get(self, key: bytes) -> bytes | None:
        return self.value(key)

    def _set(self, key: bytes, value: bytes, ttl_s: int) -> bool:
        if not 0 < ttl_s <= LONGEST_TTL_S:
            self.broken.append(Broken(f"a block that Redis shall keep for {ttl_s} s"))
        self._values[key] = (value, self._loop.time() + ttl_s)
        return True

    def _strlen(self, key: bytes) -> int:
        return len(self.value(key) or b"")

    def _getrange(self, key: bytes, first: int, last: int) -> bytes:
        return (self.value(key) or b"")[first : last + 1]

    def _unlink(self, key: bytes) -> int:
        there = self.value(key) is not None
        self._values.pop(key, None)
        return int(there)

    def _scan(self) -> list[bytes]:
        return self.keys()

    def _info(self) -> dict[str, int]:
        return {"used_memory": sum(len(value) for value, _ in self._values.values())}


def _set(reply: "asyncio.Future[list[Any]]", answers: list[Any]) -> None:
    if not reply.done():
        reply.set_result(answers)


class RedisClient:
    """What `redis.asyncio.Redis` is to one node."""

    def __init__(
        self, server: RedisServer, process: Process, rng: random.Random, timeout_s: float
    ) -> None:
        self._server = server
        self._process = process
        self._rng = rng
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self.closed = False

    def pipeline(self, transaction: bool = True) -> "RedisPipeline":
        """Commands that travel together."""
        assert not transaction, "a transaction would not work on a cluster"
        return RedisPipeline(self)

    async def info(self, section: str) -> dict[str, int]:
        """How much memory the server uses."""
        [answer] = await self.ask([("info", ())])
        return dict(answer)

    async def scan_iter(self, match: bytes, count: int) -> AsyncIterator[bytes]:
        """The keys that are there from beginning to end, and maybe others, in any order."""
        [keys] = await self.ask([("scan", ())])
        self._rng.shuffle(keys)
        for at, key in enumerate(keys):
            if at % SCAN_STEP == SCAN_STEP - 1:
                await self.ask([])
            if fnmatchcase(key.decode("latin1"), match.decode("latin1")):
                yield key

    async def aclose(self) -> None:
        """Ends the connections."""
        self.closed = True

    async def ask(self, commands: list[Command]) -> list[Any]:
        """Sends a batch and waits for its answers; the first error among them is raised."""
        assert not self.closed, "asked after aclose"
        server = self._server
        if not self._process.alive or server.mood is Mood.DOWN:
            raise exceptions.ConnectionError("connection refused")
        reply: asyncio.Future[list[Any]] = self._loop.create_future()
        name, sent = self._process.name, server._tick()
        lost = name in server.cut_off or self._rng.random() < server.lose
        if not lost:
            self._loop.call_later(server.way_s(), server.arrive, name, sent, commands, reply)
        elif self._rng.random() < 0.5:
            raise exceptions.ConnectionError("connection reset by peer")
        try:
            async with asyncio.timeout(self._timeout_s):
                answers = await reply
        except TimeoutError:
            raise exceptions.TimeoutError("timeout reading from socket") from None
        for answer in answers:
            if isinstance(answer, RedisError):
                raise answer
        return answers


class RedisPipeline:
    """What `Redis.pipeline(transaction=False)` gives."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._commands: list[Command] = []

    def exists(self, key: bytes) -> None:
        """Whether the key is there."""
        self._commands.append(("exists", (key,)))

    def expire(self, key: bytes, ttl_s: int) -> None:
        """Gives it another time to live."""
        self._commands.append(("expire", (key, ttl_s)))

    def get(self, key: bytes) -> None:
        """What it holds."""
        self._commands.append(("get", (key,)))

    def set(self, key: bytes, value: bytes, ex: int) -> None:
        """Makes it hold something for a time."""
        self._commands.append(("set", (key, bytes(value), ex)))

    def strlen(self, key: bytes) -> None:
        """How long it is."""
        self._commands.append(("strlen", (key,)))

    def getrange(self, key: bytes, first: int, last: int) -> None:
        """A part of it."""
        self._commands.append(("getrange", (key, first, last)))

    def unlink(self, key: bytes) -> None:
        """Deletes it."""
        self._commands.append(("unlink", (key,)))

    async def execute(self) -> list[Any]:
        """The answers to all commands, in order."""
        commands, self._commands = self._commands, []
        return await self._client.ask(commands) if commands else []
