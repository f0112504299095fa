"""The Redis tier: shared between nodes, bounded by the server's own limits, gone when it likes.

A block is one record (`kvstore.record`), cut into parts of bounded size, because large values
collapse Redis's throughput. The first part begins with the header, which says how many follow.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar, cast

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from kvstore.api.clock import Clock
from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.codec import Codec
from kvstore.gate import Gate
from kvstore.metrics import Metrics
from kvstore.names import namespace_tag
from kvstore.record import HEADER_BYTES, Damaged, Header, encode_block
from kvstore.runner import Runner
from kvstore.staging import Staging
from kvstore.tiers.redis_parts import (
    PREFIX,
    Miss,
    Part,
    Reading,
    cut,
    fetch,
    part_key,
    parts_of,
    put,
)
from kvstore.tiers.redis_wire import Wire
from kvstore.tiers.redis_wires import NoSocket, Wires

T = TypeVar("T")

_log = logging.getLogger("kvstore.redis")

_SCAN_COUNT = 1000
SIDE_BY_SIDE = 2
"""Wires that one batch uses where blocks are encoded and decoded on the way. Raw bytes take one:
Redis has a single thread, and keeps up with just one of ours."""
WIRE_BYTES = 4 << 20
"""What a wire has to get of a batch, at least, to be worth while."""
SCRATCH_BYTES = 64 << 20
"""Of buffers for payloads that are decoded, kept to be used again."""


class _Room:
    """How much may still be stored. Any thread may take of it."""

    def __init__(self, left_bytes: float) -> None:
        self._left_bytes = left_bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            self._left_bytes -= size
            return self._left_bytes >= 0


class _Writing:
    """The parts of some blocks, made one block after the other when they are asked for."""

    def __init__(
        self,
        blocks: Sequence[Block],
        room: _Room,
        parts_of: Callable[[Block, _Room], list[Part]],
        now: Callable[[], float],
    ) -> None:
        self._blocks = blocks
        self._room = room
        self._parts_of = parts_of
        self._now = now
        self.taken: list[bool] = []
        """For each block whether there was room."""
        self.stored_bytes = 0
        self.made_s = 0.0
        """How long it took to make them."""

    def parts(self) -> list[Part]:
        """All of them at once."""
        return list(self)

    def __iter__(self) -> Iterator[Part]:
        self.taken, self.stored_bytes, self.made_s = [], 0, 0.0
        for block in self._blocks:
            started_s = self._now()
            parts = self._parts_of(block, self._room)
            self.made_s += self._now() - started_s
            self.taken.append(bool(parts))
            self.stored_bytes += sum(len(view) for _, views in parts for view in views)
            yield from parts


class RedisTier:
    """Blocks in Redis, each expiring `ttl_s` after its last store.

    `capacity_bytes` bounds what the server may hold before this node stops adding to it (0: only
    the server's own limit). All errors of Redis are raised as TierError. The bytes of blocks go
    over `wires`, which lead to the same server and are closed with the tier; without them, or
    where redis-py does not let them be, through pipelines of `redis`.
    """

    name = "redis"

    def __init__(
        self,
        redis: "Redis | RedisCluster",
        codec: Codec,
        runner: Runner,
        clock: Clock,
        metrics: Metrics,
        *,
        capacity_bytes: int,
        part_bytes: int,
        ttl_s: int,
        wires: Wires | None = None,
    ) -> None:
        self._redis = redis
        self._codec = codec
        self._runner = runner
        self._clock = clock
        self._metrics = metrics
        self._capacity_bytes = capacity_bytes
        self._part_bytes = part_bytes
        self._ttl_s = ttl_s
        self._wires = wires
        self._is_wired = wires is not None
        self._staging = Staging(SCRATCH_BYTES)
        self._used_bytes = 0

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        pipeline = self._redis.pipeline(transaction=False)
        for ref in refs:
            pipeline.exists(part_key(ref, 0))
        found = await _ask(pipeline.execute()) if refs else []
        return [self.name if exists else None for exists in found]

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        """Also gives what is here its full time to live again: it is about to be needed.

        All its parts, that is, or the first would outlive the others; who misses one is wanted.
        """
        parts = await self._parts_of(refs)
        pipeline = self._redis.pipeline(transaction=False)
        for ref, count in zip(refs, parts, strict=True):
            for part in range(count):
                pipeline.expire(part_key(ref, part), self._ttl_s)
        renewed = await _ask(pipeline.execute()) if any(parts) else []
        ends = list(accumulate(parts))
        return [
            not count or not all(renewed[end - count : end])
            for count, end in zip(parts, ends, strict=True)
        ]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        now = self._clock.monotonic_s
        readings = [Reading(load, self._part_bytes, self._staging, now) for load in loads]
        refs, sizes = [load.ref for load in loads], [len(load.into) for load in loads]
        try:
            await self._move(
                [partial(self._get_all, group) for group in self._groups(readings, refs, sizes)],
                lambda: self._fetch(readings),
            )
        finally:
            for reading in readings:
                reading.close()
        await self._repair([load.ref for load in loads], readings)
        return [None if reading.miss else Loaded(self.name, reading.digest) for reading in readings]

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        room = _Room(await self._room_bytes())
        refs, sizes = [block.ref for block in blocks], [len(block.data) for block in blocks]
        writings = [
            _Writing(group, room, self._cut, self._clock.monotonic_s)
            for group in self._groups(blocks, refs, sizes)
        ]
        await self._move(
            [partial(self._put_all, writing) for writing in writings],
            lambda: self._put(writings),
        )
        return [taken for writing in writings for taken in writing.taken]

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        parts = await self._parts_of(refs)
        keys = [
            part_key(ref, part)
            for ref, count in zip(refs, parts, strict=True)
            for part in range(max(count, 1))
        ]
        return await self._unlink(keys)

    async def clear(self, namespace: bytes) -> int:
        pattern = PREFIX + namespace_tag(namespace).hex().encode() + b":*"
        cleared = 0
        batch: list[bytes] = []
        try:
            async for key in self._redis.scan_iter(match=pattern, count=_SCAN_COUNT):
                batch.append(key)
                if len(batch) == _SCAN_COUNT:
                    cleared += await self._unlink(batch)
                    batch = []
        except RedisError as error:
            raise TierError(f"redis: {error}") from error
        return cleared + await self._unlink(batch)

    def usage(self) -> list[Usage]:
        return [Usage(self.name, self._capacity_bytes, self._used_bytes, 0)]

    async def close(self) -> None:
        if self._wires is not None:
            await self._wires.close()
        await self._redis.aclose()

    async def _parts_of(self, refs: Sequence[BlockRef]) -> list[int]:
        """How many parts each block has; 0 where it is not here, or not as it was written.

        What a header says is believed only where the last part lies where it then has to: a
        length that nobody wrote must not make this go through millions of keys.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for ref in refs:
            pipeline.strlen(part_key(ref, 0))
            pipeline.getrange(part_key(ref, 0), 0, HEADER_BYTES - 1)
        found = await _ask(pipeline.execute()) if refs else []
        headers = [self._header(first) for first in found[1::2]]
        parts = [parts_of(h, size) if h else 0 for h, size in zip(headers, found[::2], strict=True)]
        pipeline = self._redis.pipeline(transaction=False)
        for ref, count in zip(refs, parts, strict=True):
            if count > 1:
                pipeline.exists(part_key(ref, count - 1))
        ends = iter(await _ask(pipeline.execute()) if any(count > 1 for count in parts) else [])
        return [count if count < 2 or next(ends) else 0 for count in parts]

    async def _unlink(self, keys: list[bytes]) -> int:
        """Deletes keys and counts the blocks among them (each has one part 0)."""
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.unlink(key)
        gone = await _ask(pipeline.execute()) if keys else []
        return sum(
            bool(there) and key.endswith(b":0") for key, there in zip(keys, gone, strict=True)
        )

    async def _get(self, keys: list[bytes]) -> list[bytes | None]:
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.get(key)
        started = self._clock.monotonic_s()
        values = cast("list[bytes | None]", await _ask(pipeline.execute()) if keys else [])
        size = sum(len(value) for value in values if value is not None)
        self._codec.moved("get", size, self._clock.monotonic_s() - started)
        return values

    def _header(self, first: bytes | None) -> Header | None:
        try:
            return Header.unpack(first[:HEADER_BYTES]) if first is not None else None
        except Damaged:
            return None

    def _put_all(self, writing: _Writing, wire: Wire) -> None:
        started_s = self._clock.monotonic_s()
        put(wire, writing, self._ttl_s)
        self._note_put(writing, started_s)

    def _get_all(self, readings: Sequence[Reading], wire: Wire) -> None:
        started_s = self._clock.monotonic_s()
        fetch(wire, readings)
        judged_s = sum(reading.judged_s for reading in readings)
        size = sum(reading.received_bytes for reading in readings)
        self._codec.moved("get", size, self._clock.monotonic_s() - started_s - judged_s)

    def _note_put(self, writing: _Writing, started_s: float) -> None:
        """Tells the codec how fast it went, without what was its own work."""
        seconds = self._clock.monotonic_s() - started_s - writing.made_s
        self._codec.moved("put", writing.stored_bytes, seconds)

    def _groups(
        self, things: Sequence[T], refs: Sequence[BlockRef], sizes: Sequence[int]
    ) -> list[list[T]]:
        """The things in their order, a group for each wire that is worth while, equal in bytes."""
        worked_on = any(map(self._codec.works_on, {ref.namespace for ref in refs}))
        most = SIDE_BY_SIDE if worked_on else 1
        count = max(1, min(most, sum(sizes) // WIRE_BYTES, len(things)))
        share = max(1, sum(sizes)) / count
        groups: list[list[T]] = [[] for _ in range(count)]
        before = 0
        for thing, size in zip(things, sizes, strict=True):
            groups[min(count - 1, int((before + size / 2) / share))].append(thing)
            before += size
        return [group for group in groups if group]

    async def _move(
        self, work: Sequence[Callable[[Wire], None]], otherwise: Callable[[], Awaitable[None]]
    ) -> None:
        """Does the work side by side, each on a wire of its own; `otherwise` where there is none.

        All of it has ended when this returns or raises.
        """
        if self._wires is not None and self._is_wired:
            running = [self._wires.run(each) for each in work]
            errors = [e for e in await asyncio.gather(*running, return_exceptions=True) if e]
            if not any(isinstance(error, NoSocket) for error in errors):
                if errors:
                    raise errors[0]
                return
            _log.warning("redis-py shows no sockets (%s): blocks go through its pipelines", errors)
            self._is_wired = False
        await otherwise()

    async def _fetch(self, readings: Sequence[Reading]) -> None:
        waiting = [(reading, 0) for reading in readings]
        gate = Gate()
        try:
            while waiting:
                values = await self._get([reading.key(part) for reading, part in waiting])
                more: list[tuple[Reading, int]] = []
                for (reading, part), value in zip(waiting, values, strict=True):
                    accept = partial(reading.accept, part, value)
                    others = await self._runner.run(partial(gate.through, accept))
                    more += [(reading, other) for other in others]
                waiting = more
        finally:
            gate.close()  # From here on nothing writes to a caller's buffer.

    async def _put(self, writings: Sequence[_Writing]) -> None:
        for writing in writings:
            pipeline = self._redis.pipeline(transaction=False)
            started_s = self._clock.monotonic_s()
            for key, views in await self._runner.run(writing.parts):
                pipeline.set(key, b"".join(views), ex=self._ttl_s)
            if any(writing.taken):
                await _ask(pipeline.execute())
                self._note_put(writing, started_s)

    def _cut(self, block: Block, room: _Room) -> list[Part]:
        """The parts of a block; none if there is no room for it. Runs in a thread."""
        header, payload = encode_block(
            block, self._codec, now_s=self._clock.wall_s(), ttl_s=self._ttl_s
        )
        if not room.take(HEADER_BYTES + len(payload)):
            return []
        return list(cut(block.ref, header, payload, self._part_bytes))

    async def _repair(self, refs: Sequence[BlockRef], readings: Sequence[Reading]) -> None:
        """Drops what is damaged, and what lacks a part: Redis evicts each part for itself.

        Without its first part a block is stored anew. Where Redis refuses, the others are here all
        the same.
        """
        broken: list[BlockRef] = []
        for ref, reading in zip(refs, readings, strict=True):
            if reading.miss is Miss.DAMAGED:
                _log.warning("a damaged block was dropped from Redis")
                self._metrics.corrupt.labels(self.name).inc()
            if reading.miss in (Miss.DAMAGED, Miss.INCOMPLETE):
                broken.append(ref)
        if broken:
            with suppress(TierError):
                await self.discard(broken)

    async def _room_bytes(self) -> float:
        if not self._capacity_bytes:
            return float("inf")
        info = await _ask(self._redis.info("memory"))
        self._used_bytes = int(info.get("used_memory", 0))
        return self._capacity_bytes - self._used_bytes


async def _ask(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except (RedisError, OSError) as error:
        raise TierError(f"redis: {error}") from error
