"""A client process: has one ring of blocks, and moves them as it is told.

`python -m benchmarks.dataplane.mover OWNER BLOCK_BYTES BLOCKS WHERE` (WHERE as JSON) answers each
line of JSON with one, and ends with its standard input. What goes wrong is an answer as well.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.dataplane.plan import MATCH
from benchmarks.dataplane.ring import Ring
from benchmarks.dataplane.sampler import take_sample
from benchmarks.dataplane.ways import Way, open_way

Words = dict[str, Any]

MATCH_CALLS = 200
"""At most, in one sample: a match uses nothing up, so that it may be repeated."""


class Mover:
    """Opens ways when they are first named, and keeps them."""

    def __init__(self, owner: int, ring: Ring, where: Mapping[str, Any]) -> None:
        self._owner = owner
        self._ring = ring
        self._where = where
        self.ways: dict[str, Way] = {}
        self._turned: dict[tuple[str, str, int], int] = {}
        """Where in the rotation the next sample begins."""

    async def obey(self, words: Words) -> Words:
        """What comes of one line: `do` names the method."""
        try:
            done: Words = await getattr(self, f"do_{words.pop('do')}")(**words)
        except Exception as error:  # noqa: BLE001 - the row says it, and other rows go on
            return {"error": f"{type(error).__name__}: {error}"}
        return done

    async def do_prepare(self, way: str, op: str, knob: int) -> Words:
        """Not on the clock: opens the way, and brings about what the calls need."""
        if way not in self.ways:
            self.ways[way] = await open_way(way, self._ring, self._owner, self._where)
        self.ways[way].knob = knob or self.ways[way].knob
        await self.ways[way].prepare(op)
        return {}

    async def do_sample(self, way: str, op: str, batch: int, tasks: int, most_s: float) -> Words:
        """On the clock."""
        calls = self._ring.calls(batch)
        if op == MATCH:
            calls *= -(-MATCH_CALLS // len(calls))
        key = (way, op, batch)
        start = self._turned.get(key, 0) % len(calls)
        sample = await take_sample(
            getattr(self.ways[way], op),
            calls[start:] + calls[:start],
            block_bytes=self._ring.block_bytes,
            tasks=tasks,
            most_s=most_s,
            tidy=getattr(self.ways[way], "tidy", None) if op == MATCH else None,
        )
        self._turned[key] = start + len(sample.call_s)
        return asdict(sample)

    async def do_check(self, way: str, batch: int) -> Words:
        """How many blocks of one call come back as other bytes than were put."""
        places = self._ring.calls(batch)[-1]
        for target in self._ring.targets(places):
            target[:] = bytes(len(target))
        opened: Any = self.ways[way]
        got = opened.get(places)
        if got is not None:
            await got
        pairs = zip(self._ring.sources(places), self._ring.targets(places), strict=True)
        return {"wrong_blocks": sum(source != target for source, target in pairs)}

    async def do_close(self, way: str) -> Words:
        """Lets go of a way."""
        if way in self.ways:
            await self.ways.pop(way).close()
        return {}

    async def close(self) -> None:
        """Lets go of all of them."""
        for way in list(self.ways):
            await self.do_close(way)


async def obey_lines(mover: Mover) -> None:
    """Until there are no more. Read in a thread: what ways do in the background goes on."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(json.dumps(await mover.obey(json.loads(line))) + "\n")
        sys.stdout.flush()
    await mover.close()


def main() -> None:
    """The command."""
    owner, block_bytes, blocks, where = sys.argv[1:]
    ring = Ring(int(block_bytes), int(blocks), int(owner))
    asyncio.run(obey_lines(Mover(int(owner), ring, json.loads(where))))


if __name__ == "__main__":
    main()
