"""SIGKILL at random moments under load, then a restart that is compared with what may be there.

`python -m benchmarks.kill_anywhere`
"""

import asyncio
import contextlib
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from benchmarks.crash.expected_state import ExpectedState
from benchmarks.crash.kill_load import KillLoad
from benchmarks.crash.nursery import NotStarted, Nursery
from benchmarks.crash.sealed import sealed_names
from benchmarks.harm.segment_image import SegmentImage
from benchmarks.proof import Claim, Finding, Proof, Setting, main, passed
from benchmarks.quiet import quiet
from benchmarks.tally import Tally
from kvstore.api.errors import KvstoreError
from kvstore.api.tier import BlockRef
from kvstore.codec import AUTO, LOSSLESS
from kvstore.names import block_name, namespace
from kvstore.tenants import LOCAL_TENANT, PRIVATE_SCOPE
from kvstore_client import AsyncClient, Space
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import keys_of
from tests.sim.nodes import PATIENT, SECRET, descriptor_of

BLOCK_BYTES = 3000
LIVES = 8
"""So many times one directory is killed before another begins."""
LOAD_S = (0.05, 0.6)
AMPLE_BYTES = 64 << 20
SEALED_GOAL = 0.999
SHUFFLE = (AUTO, *LOSSLESS)


def run(setting: Setting) -> Sequence[Finding]:
    """One kill for each trial."""
    return findings(kill(setting, Nursery()))


def findings(tally: Tally) -> Sequence[Finding]:
    """What follows for the claims from what was seen."""
    sealed, returned = tally.noted["sealed blocks"], tally.noted["sealed blocks returned by Match"]
    fraction = returned / sealed if sealed else 0.0
    details = {"sealed": sealed, "returned": returned}
    return [
        passed(tally.failures.total(), tally.trials.total(), **tally.details()),
        Finding(fraction, fraction >= SEALED_GOAL, sealed, sealed - returned, details=details),
    ]


def kill(setting: Setting, nursery: Nursery, home: Path | None = None) -> Tally:
    """What was seen of the nodes of a nursery. `home`: where the directories are made."""
    tally = Tally()
    with quiet(), RedisServer(policy="noeviction") as server:
        asyncio.run(_kill(setting, nursery, server, home, tally))
    return tally


async def _kill(
    setting: Setting, nursery: Nursery, server: RedisServer, home: Path | None, tally: Tally
) -> None:
    rng = random.Random(setting.seed)
    left, number = setting.trials, 0
    async with nursery:
        while left > 0:
            number += 1
            directory = Path(tempfile.mkdtemp(prefix="kvstore-kills-", dir=home))
            source = random.Random(rng.random())
            series = Series(number, source, nursery, server, directory, tally)
            try:
                for _ in range(min(LIVES, left)):
                    await series.live_and_die()
                    setting.tick(1)
                    left -= 1
                await series.judge_last_kill()
            finally:
                await series.close()


class Series:
    """One directory through many lives of its node, each with other settings.

    Every other series has so much room that nothing may ever leave the disk: there, all that was
    announced to be on the device must be found again. In the others segments are dropped.
    """

    def __init__(
        self,
        number: int,
        rng: random.Random,
        nursery: Nursery,
        server: RedisServer,
        home: Path,
        tally: Tally,
    ) -> None:
        self._rng = rng
        self._nursery = nursery
        self._server = server
        self._tally = tally
        self._ample = bool(number % 2)
        self._home = home
        (self._home / "secret").write_bytes(SECRET)
        self._expected = ExpectedState(self._home / "expected.jsonl")
        spaces = {
            scratch: Space.of(descriptor_of(BLOCK_BYTES, model="scratch" if scratch else "kept"))
            for scratch in (False, True)
        }
        self._spaces = spaces
        self._load = KillLoad(self._expected, spaces, tally)
        self._sealed: set[bytes] = set()
        self._failures_before = tally.failures.total()

    async def live_and_die(self) -> None:
        """Starts a node, judges what it has from its last life, loads it and kills it."""
        flags = self._flags()
        self._expected.happened(" ".join(flags))
        pid = await self._nursery.fork(flags)
        try:
            if self._rng.random() < 0.1:
                # Killed before it is ready: the next start finds what this one left undone.
                await asyncio.sleep(self._rng.uniform(0, 0.1))
                self._tally.tried("killed while starting", "random")
                return
            ready = await self._nursery.ready(pid)
            async with AsyncClient(str(ready["endpoint"]), budgets=PATIENT) as client:
                for space in self._spaces.values():
                    await client.open_space(space.descriptor)
                await self._judge(client)
                await self._load_and_kill(client, pid)
        except NotStarted as error:
            self._tally.failed("start", "the node did not start", f"{error}, {self._home}")
        finally:
            await self._nursery.kill(pid)
            self._expected.happened("killed")
            self._remember_sealed()

    async def judge_last_kill(self) -> None:
        """Starts a node once more for what the last kill left."""
        pid = await self._nursery.fork(self._flags())
        try:
            ready = await self._nursery.ready(pid)
            async with AsyncClient(str(ready["endpoint"]), budgets=PATIENT) as client:
                await self._judge(client)
        except NotStarted as error:
            self._tally.failed("start", "the node did not start", f"{error}, {self._home}")
        finally:
            await self._nursery.kill(pid)

    async def _load_and_kill(self, client: AsyncClient, pid: int) -> None:
        load = asyncio.create_task(self._load.until_killed(client, self._rng, "under load"))
        await asyncio.sleep(self._rng.uniform(*LOAD_S))
        await self._nursery.kill(pid)
        self._tally.tried("killed under load", "ample" if self._ample else "tight")
        load.cancel()
        with contextlib.suppress(asyncio.CancelledError, KvstoreError):
            await load

    async def _judge(self, client: AsyncClient) -> None:
        """Every chain: nothing wrong, nothing that must not be there, and all that was sealed."""
        for chain in self._expected.chains:
            matched = await self._load.check(client, chain, "after a restart")
            space_id = self._load.space_of(chain).space_id
            owner = namespace(SECRET, LOCAL_TENANT, PRIVATE_SCOPE, space_id)
            keys = keys_of(chain, self._expected.length(chain))
            names = [block_name(BlockRef(owner, key)) for key in keys]
            sealed = [at for at, name in enumerate(names) if name in self._sealed]
            self._tally.note("sealed blocks", len(sealed))
            self._tally.note("sealed blocks returned by Match", sum(at < matched for at in sealed))

    def _remember_sealed(self) -> None:
        """What the files promise to keep, now that the node is dead; Redis is emptied."""
        image = SegmentImage.of(self._home / "blocks")
        announced = self._load.announced  # Holds until another life of the node is loaded.
        if self._ample:
            missing = [n for n in announced if f"{n:016x}.segment" not in image.files]
            if missing:
                self._tally.failed("disk", "an announced segment is gone", str(self._home))
            self._sealed = sealed_names(image, announced)
        with redis.from_url(self._server.url) as connection:
            connection.flushall()

    def _flags(self) -> list[str]:
        """Settings as an operator might change them between two starts."""
        rng = self._rng
        segment_bytes = rng.choice((64, 128, 256)) << 10
        capacity_bytes = AMPLE_BYTES if self._ample else rng.randrange(4, 12) * segment_bytes
        options: dict[str, Any] = {
            "server-listen": "127.0.0.1:0",
            "server-metrics-listen": "",
            "cluster-secret-file": self._home / "secret",
            "memory-capacity-bytes": rng.choice((64, 128, 256)) << 10,
            "memory-slab-bytes": 16 << 10,
            "disk-path": self._home / "blocks",
            "disk-capacity-bytes": capacity_bytes,
            "disk-segment-bytes": segment_bytes,
            "disk-sync-after-s": rng.choice((0.02, 0.1, 0.3)),
            "disk-threads": rng.randrange(1, 5),
            "disk-codec": rng.choice(SHUFFLE),
            "disk-lookup-timeout-s": 30,
            "disk-timeout-s": 30,
        }
        if rng.random() < 0.5:
            options |= {
                "redis-blocks-url": self._server.url,
                "redis-codec": rng.choice(SHUFFLE),
                "redis-lookup-timeout-s": 30,
                "redis-timeout-s": 30,
            }
        return ["--log-level=error", *(f"--{name}={value}" for name, value in options.items())]

    async def close(self) -> None:
        """Deletes the directory, unless something in it is worth looking at."""
        self._expected.close()
        if self._tally.failures.total() == self._failures_before:
            shutil.rmtree(self._home, ignore_errors=True)


PROOF = Proof(
    module="kill_anywhere",
    about="Kills nodes under load at random moments, and judges what they have when they restart.",
    claims=[
        Claim(
            "SIGKILL at random points under load: wrong bytes, phantoms",
            "blocks",
            "0 in 500 rounds under load, and others at a start",
            600,
        ),
        Claim("SIGKILL under load: sealed blocks returned by Match", "fraction", "≥ 0.999"),
    ],
    trials={"test": 3, "short": 32, "long": 600},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
