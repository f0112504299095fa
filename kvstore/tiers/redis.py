"""The Redis tier: shared between nodes, bounded by the server's own limits, gone when it likes.

A block is one record (`kvstore.record`), cut into parts of bounded size, because large values
collapse Redis's throughput. The first part begins with the header, which says how many follow.
"""

import logging
from collections.abc import Awaitable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from kvstore.api.clock import Clock
from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.codec import Codec
from kvstore.metrics import Metrics
from kvstore.names import block_name, namespace_tag
from kvstore.record import HEADER_BYTES, Damaged, Header, decode_block, encode_block
from kvstore.runner import Runner

_log = logging.getLogger("kvstore.redis")

_PREFIX = b"kvstore:b1:"
_SCAN_COUNT = 1000


class RedisTier:
    """Blocks in Redis, each expiring `ttl_s` after its last store.

    `capacity_bytes` bounds what the server may hold before this node stops adding to it (0: only
    the server's own limit). All errors of Redis are raised as TierError.
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
    ) -> None:
        self._redis = redis
        self._codec = codec
        self._runner = runner
        self._clock = clock
        self._metrics = metrics
        self._capacity_bytes = capacity_bytes
        self._part_bytes = part_bytes
        self._ttl_s = ttl_s
        self._used_bytes = 0

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        pipeline = self._redis.pipeline(transaction=False)
        for ref in refs:
            pipeline.exists(_key(ref, 0))
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
                pipeline.expire(_key(ref, part), self._ttl_s)
        renewed = await _ask(pipeline.execute()) if any(parts) else []
        ends = list(accumulate(parts))
        return [
            not count or not all(renewed[end - count : end])
            for count, end in zip(parts, ends, strict=True)
        ]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        firsts = await self._get([_key(load.ref, 0) for load in loads])
        headers = [self._header(first) for first in firsts]
        rest_keys: list[bytes] = []
        for load, first, header in zip(loads, firsts, headers, strict=True):
            if first and header and header.stored_bytes <= len(load.into):
                rest_keys += [_key(load.ref, part) for part in range(1, _parts(header, len(first)))]
        rests = iter(await self._get(rest_keys))
        answers: list[Loaded | None] = []
        for load, first, header in zip(loads, firsts, headers, strict=True):
            if first is None:
                answers.append(None)
                continue
            if header is None or header.stored_bytes > len(load.into):
                await self._damaged(load.ref)
                answers.append(None)
                continue
            rest = [next(rests) for _ in range(1, _parts(header, len(first)))]
            parts = [first[HEADER_BYTES:], *rest]
            answers.append(await self._decode(load, header, parts))
        return answers

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        room = await self._room_bytes()
        pipeline = self._redis.pipeline(transaction=False)
        taken: list[bool] = []
        stored_bytes = 0
        for block in blocks:
            now_s = self._clock.wall_s()
            header, payload = await self._runner.run(
                partial(encode_block, block, self._codec, now_s=now_s, ttl_s=self._ttl_s)
            )
            room -= HEADER_BYTES + len(payload)
            taken.append(room >= 0)
            if room >= 0:
                stored_bytes += HEADER_BYTES + len(payload)
                # The first part last: who finds it shall find the others as well.
                for part, value in reversed(list(enumerate(self._cut(header, payload)))):
                    pipeline.set(_key(block.ref, part), value, ex=self._ttl_s)
        if any(taken):
            started = self._clock.monotonic_s()
            await _ask(pipeline.execute())
            self._codec.moved("put", stored_bytes, self._clock.monotonic_s() - started)
        return taken

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        parts = await self._parts_of(refs)
        keys = [
            _key(ref, part)
            for ref, count in zip(refs, parts, strict=True)
            for part in range(max(count, 1))
        ]
        return await self._unlink(keys)

    async def clear(self, namespace: bytes) -> int:
        pattern = _PREFIX + namespace_tag(namespace).hex().encode() + b":*"
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
        await self._redis.aclose()

    async def _parts_of(self, refs: Sequence[BlockRef]) -> list[int]:
        """How many parts each block has; 0 where it is not here, or not as it was written.

        What a header says is believed only where the last part lies where it then has to: a
        length that nobody wrote must not make this go through millions of keys.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for ref in refs:
            pipeline.strlen(_key(ref, 0))
            pipeline.getrange(_key(ref, 0), 0, HEADER_BYTES - 1)
        found = await _ask(pipeline.execute()) if refs else []
        headers = [self._header(first) for first in found[1::2]]
        parts = [_parts(h, size) if h else 0 for h, size in zip(headers, found[::2], strict=True)]
        pipeline = self._redis.pipeline(transaction=False)
        for ref, count in zip(refs, parts, strict=True):
            if count > 1:
                pipeline.exists(_key(ref, count - 1))
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

    def _cut(self, header: Header, payload: memoryview | bytes) -> list[bytes]:
        record = header.pack() + bytes(payload)
        step = self._part_bytes
        return [record[start : start + step] for start in range(0, len(record), step)]

    async def _decode(self, load: Load, header: Header, parts: list[bytes | None]) -> Loaded | None:
        if any(part is None for part in parts):
            # Redis evicts each part for itself; without the first, the next store repairs it.
            await self.discard([load.ref])
            return None
        payload = b"".join(cast("list[bytes]", parts))
        scratch = bytearray(len(load.into))
        try:
            digest = await self._runner.run(
                lambda: decode_block(
                    header, block_name(load.ref), memoryview(payload), memoryview(scratch)
                )
            )
        except Damaged:
            await self._damaged(load.ref)
            return None
        # Copied here and not by the thread: after a cancelled load nothing may write to `into`.
        load.into[:] = scratch
        return Loaded(self.name, digest)

    async def _damaged(self, ref: BlockRef) -> None:
        _log.warning("a damaged block was dropped from Redis")
        self._metrics.corrupt.labels(self.name).inc()
        await self.discard([ref])

    async def _room_bytes(self) -> float:
        if not self._capacity_bytes:
            return float("inf")
        info = await _ask(self._redis.info("memory"))
        self._used_bytes = int(info.get("used_memory", 0))
        return self._capacity_bytes - self._used_bytes


def _parts(header: Header, part_bytes: int) -> int:
    """How many parts the record has; its writer's part size is the length of the first."""
    return -(-(HEADER_BYTES + header.stored_bytes) // max(part_bytes, HEADER_BYTES))


def _key(ref: BlockRef, part: int) -> bytes:
    tag = namespace_tag(ref.namespace).hex().encode()
    return b"%s%s:%s:%d" % (_PREFIX, tag, block_name(ref).hex().encode(), part)


async def _ask(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except (RedisError, OSError) as error:
        raise TierError(f"redis: {error}") from error
