"""Harm to the values in a real Redis, judged by the tier that reads them."""

import random
from collections.abc import Sequence
from typing import Any

import redis

from benchmarks.harm.mutants import RecordMutations, cut
from benchmarks.tally import Tally
from kvstore.api.tier import Block
from kvstore.codec import LOSSLESS
from kvstore.tiers.redis import RedisTier
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import buffers_for, chain_of, namespace_of
from tests.sim.rig import Rig

SURFACE = "redis"
NAMESPACE = namespace_of("mutated")
PART_BYTES = 4096
SIZES = (100, 1000, 3000, 9000)
BLOCKS = 64
CONTROLS = 8
REPAIR_ONE_IN = 3

Value = dict[bytes, bytes]
"""The parts of one block by their keys."""


class RedisHarm:
    """Stores blocks, mutates most of their values, loads all, and stores some again."""

    def __init__(self) -> None:
        self._server = RedisServer(policy="noeviction").start()
        self._redis: Any = redis.from_url(self._server.url)
        self._blocks = [
            chain_of(f"redis {number}", 1, NAMESPACE, SIZES[number % len(SIZES)])[0]
            for number in range(BLOCKS)
        ]
        self._rig = Rig()
        self._golden: list[list[Value]] = []

    async def trials(self, rng: random.Random, note: str, tally: Tally) -> None:
        """One batch of blocks with harm to all but a few."""
        if not self._golden:
            self._golden = [await self._values(codec) for codec in LOSSLESS]
        golden = rng.choice(self._golden)
        values = [dict(value) for value in golden]
        kinds: dict[int, str] = {}
        mutations = RecordMutations(rng)
        for at in rng.sample(range(BLOCKS), k=BLOCKS - CONTROLS):
            kinds[at], values[at] = _harm(rng, golden[at], rng.choice(golden), mutations)
        self._put(values)
        for kind in kinds.values():
            tally.tried(SURFACE, kind)
        try:
            await self._judge(rng, kinds, note, tally)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
            tally.failed(SURFACE, f"raised {type(error).__name__}", f"{note}: {error}")

    async def _values(self, codec: str) -> list[Value]:
        """What each block's store writes."""
        tier = self._rig.redis(self._server.url, codec=codec, part_bytes=PART_BYTES)
        values = []
        for block in self._blocks:
            self._redis.flushall()
            assert await tier.store([block]) == [True]
            values.append({key: self._redis.get(key) for key in sorted(self._redis.keys())})
        return values

    def _put(self, values: Sequence[Value]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.flushall()
        for value in values:
            for key, data in value.items():
                pipeline.set(key, data)
        pipeline.execute()

    async def _judge(
        self, rng: random.Random, kinds: dict[int, str], note: str, tally: Tally
    ) -> None:
        tier = self._rig.redis(self._server.url, part_bytes=PART_BYTES)
        try:
            if rng.random() < 0.1:
                await tier.wants([block.ref for block in self._blocks])
            delivered = await _read(tier, self._blocks, kinds, note, tally)
            for at, got in enumerate(delivered):
                if at not in kinds:
                    tally.control(SURFACE, got, note)
            if rng.random() < 1 / REPAIR_ONE_IN:
                await self._repair(tier, rng, kinds, note, tally)
        finally:
            self._rig.gone(tier)
            await tier.close()

    async def _repair(
        self, tier: RedisTier, rng: random.Random, kinds: dict[int, str], note: str, tally: Tally
    ) -> None:
        """What was harmed and found out is wanted again, and whole after the next store."""
        wanted = await tier.wants([block.ref for block in self._blocks])
        again = [block for block, wants in zip(self._blocks, wanted, strict=True) if wants]
        assert await tier.store(again) == [True] * len(again)
        delivered = await _read(tier, self._blocks, kinds, note, tally)
        tally.note("redis: batches repaired")
        for at, got in enumerate(delivered):
            if not got:
                what = f"{kinds.get(at, 'nothing')}: not repaired by the next store"
                tally.failed(SURFACE, what, note)

    async def close(self) -> None:
        """Ends the server."""
        await self._rig.finish()
        self._redis.close()
        self._server.stop()


async def _read(
    tier: RedisTier, blocks: Sequence[Block], kinds: dict[int, str], note: str, tally: Tally
) -> list[bool]:
    loads = buffers_for(list(blocks))
    answers = await tier.load(loads)
    for at, (block, load, loaded) in enumerate(zip(blocks, loads, answers, strict=True)):
        if loaded is not None and load.into != block.data:
            tally.failed(SURFACE, f"{kinds.get(at, 'nothing')} gave wrong bytes", note)
    return [loaded is not None for loaded in answers]


def _harm(
    rng: random.Random, value: Value, foreign: Value, mutations: RecordMutations
) -> tuple[str, Value]:
    """The parts of a block after harm to them, perhaps with those of another, and which harm."""
    kind = rng.choice(("mutated", "mutated", "mutated", "part", "order", "lost", "cut"))
    key = rng.choice(list(value))
    if kind == "part":
        return "another's part", value | {key: rng.choice(list(foreign.values()))}
    if kind == "order" and len(value) > 1:
        parts = rng.sample(list(value.values()), k=len(value))
        return "parts in another order", dict(zip(value, parts, strict=True))
    if kind == "lost":
        return "part lost", {each: data for each, data in value.items() if each != key}
    if kind == "cut":
        return "part cut", value | {key: cut(rng, value[key])}
    kind, mutant = mutations.mutate(_whole(value), _whole(foreign))
    return kind, _cut_like(value, mutant)


def _whole(value: Value) -> bytes:
    return b"".join(value[key] for key in sorted(value))


def _cut_like(value: Value, record: bytes) -> Value:
    """A record under the keys of a block, in as many parts as it needs."""
    stem = min(value).rpartition(b":")[0]
    starts = range(0, max(len(record), 1), PART_BYTES)
    return {
        b"%s:%d" % (stem, number): record[start : start + PART_BYTES]
        for number, start in enumerate(starts)
    }
