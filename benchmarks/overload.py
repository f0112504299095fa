"""Overload: ten times as many reads as the tier below can serve. Goodput must hold.

The node is a process of its own over a tier that delivers a fixed number of bytes a second and
has every block, so that every read is a read of that tier. First as many callers as keep it busy
take turns: what they get is the peak. Then reads arrive ten times as fast as it can serve them,
at random moments, whatever becomes of the earlier ones (an open loop), each with a deadline of
two seconds. What is judged:

* goodput: bytes of blocks that arrived whole before their deadline, against the peak;
* rejects: the time from a call's arrival to its refusal inside the node, by its own histogram
  (kvstore_shed_seconds): the least bucket that holds 99 % of them;
* memory: what the process has resident at most, against what it had after its start, arena
  included, and server.inflight_bytes.

The first seconds of the flood count for memory and rejects, and not for goodput: the node finds
out what the tier can do. The health service and Status are asked all the time, and must answer.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import sys
import tempfile
import time
import urllib.request
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.proof import Claim, Finding, Proof, Setting, Size, main
from benchmarks.service.throttled_node import BLOCK_BYTES, SPACE, content
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore.api.wire import descriptor_to_wire
from kvstore_client import AsyncClient
from tests.sim.nodes import PATIENT

NODE = "benchmarks.service.throttled_node"
BYTES_PER_S = 8 << 20
TIMES = 10
DEADLINE_S = 2.0
CONNECTIONS = 4
CALLERS = 16
PEAK_S: dict[Size, float] = {"test": 0.7, "short": 5.0, "long": 10.0}
RAMP_S: dict[Size, float] = {"test": 0.5, "short": 3.0, "long": 5.0}
MOST_CALLS = 4000
"""Under way at once; a generator that cannot keep up must not take the machine down."""
SAMPLE_S = 0.05
GOODPUT, REJECT_S, MEMORY = 0.9, 0.005, 1.1
SETTINGS: dict[str, Any] = {
    "server": {
        "listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "drain_timeout_s": 1,
        "inflight_bytes": 64 << 20, "inflight_bytes_per_client": 32 << 20,
    },
    "memory": {"capacity_bytes": 64 << 20, "slab_bytes": 1 << 20},
    "disk": {"capacity_bytes": 16 << 20, "segment_bytes": 1 << 20},
}  # fmt: skip


@dataclass
class Outcomes:
    """How reads ended."""

    delivered: list[float] = field(default_factory=list)
    """When whole blocks arrived, within their deadlines."""
    ended: Counter[str] = field(default_factory=Counter)
    wrong: int = 0


class Node:
    """The process, and what can be seen of it from outside."""

    def __init__(self, ready: dict[str, Any]) -> None:
        self.endpoint = str(ready["endpoint"])
        self._metrics = str(ready["metrics"])
        self._statm = Path(f"/proc/{ready['pid']}/statm")
        self.start_bytes = self.resident_bytes()
        self.most_bytes = self.start_bytes
        self.unanswered = 0

    def resident_bytes(self) -> int:
        """What the process has in RAM now."""
        return int(self._statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def watch(self) -> None:
        """Follows its memory, and asks how it is."""
        async with AsyncClient(self.endpoint, budgets=PATIENT) as client:
            while True:
                self.most_bytes = max(self.most_bytes, self.resident_bytes())
                try:
                    await client.status()
                    self.unanswered += not await client.health()
                except Exception:  # noqa: BLE001 - whatever it is, it was no answer
                    self.unanswered += 1
                await asyncio.sleep(SAMPLE_S)

    def samples(self) -> dict[str, float]:
        """All its metrics."""
        url = f"http://{self._metrics}/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs if name}


def run(setting: Setting) -> Sequence[Finding]:
    """The peak, then the flood. A trial is a second of it."""
    return asyncio.run(_run(setting))


async def _run(setting: Setting) -> list[Finding]:
    rng = random.Random(setting.seed)
    async with _node() as node, _stubs(node) as stubs:
        keys = (f"{setting.seed} {number}".encode().rjust(32, b".") for number in itertools.count())
        watching = asyncio.create_task(node.watch())
        peak = await _closed_loop(stubs, keys, PEAK_S[setting.size])
        outcomes, goodput = await _flood(setting, rng, stubs, keys)
        watching.cancel()
        samples = await asyncio.to_thread(node.samples)
    return _findings(node, peak, goodput, outcomes, samples, setting.trials)


@contextlib.asynccontextmanager
async def _node() -> AsyncIterator[Node]:
    with tempfile.TemporaryDirectory(prefix="kvstore-overload-") as home:
        secret = Path(home) / "secret"
        secret.write_bytes(bytes(32))
        settings = SETTINGS | {
            "bytes_per_s": BYTES_PER_S,
            "cluster": {"secret_file": str(secret), "node_id": "throttled"},
            "disk": SETTINGS["disk"] | {"path": str(Path(home) / "blocks")},
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", NODE, json.dumps(settings), stdin=PIPE, stdout=PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(60):
                ready = json.loads(await process.stdout.readline())
            yield Node(ready)
        finally:
            process.stdin.close()
            try:
                async with asyncio.timeout(20):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def _stubs(node: Node) -> AsyncIterator[list[Any]]:
    async with contextlib.AsyncExitStack() as exits:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await exits.enter_async_context(grpc.aio.insecure_channel(node.endpoint, options))
            for _ in range(CONNECTIONS)
        ]
        stubs = [KVStoreStub(channel) for channel in channels]
        descriptor = descriptor_to_wire(SPACE.descriptor)
        await stubs[0].OpenSpace(pb.OpenSpaceRequest(descriptor=descriptor))
        yield stubs


async def _closed_loop(stubs: Sequence[Any], keys: Any, seconds: float) -> float:
    """Bytes per second that callers get who wait for each other."""
    outcomes = Outcomes()
    end_s = time.monotonic() + seconds

    async def caller(number: int) -> None:
        while time.monotonic() < end_s:
            await _read(stubs[number % len(stubs)], next(keys), outcomes)

    started_s = time.monotonic()
    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return len(outcomes.delivered) * BLOCK_BYTES / (time.monotonic() - started_s)


async def _flood(
    setting: Setting, rng: random.Random, stubs: Sequence[Any], keys: Any
) -> tuple[Outcomes, float]:
    """How reads ended that came too fast, and the bytes per second that were of use."""
    outcomes = Outcomes()
    calls: set[asyncio.Task[None]] = set()
    ramp_s = RAMP_S[setting.size]
    started_s = due_s = time.monotonic()
    counted = 0
    while due_s < started_s + ramp_s + setting.trials:
        due_s += rng.expovariate(TIMES * BYTES_PER_S / BLOCK_BYTES)
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        if len(calls) >= MOST_CALLS:
            outcomes.ended["not sent"] += 1
            continue
        call = asyncio.create_task(_read(rng.choice(stubs), next(keys), outcomes))
        calls.add(call)
        call.add_done_callback(calls.discard)
        done = min(setting.trials, max(0, int(due_s - started_s - ramp_s)))
        setting.tick(done - counted)
        counted = done
    from_s, to_s = started_s + ramp_s, time.monotonic()
    await asyncio.gather(*calls)
    setting.tick(setting.trials - counted)
    useful = sum(from_s <= moment < to_s for moment in outcomes.delivered)
    return outcomes, useful * BLOCK_BYTES / (to_s - from_s)


async def _read(stub: Any, key: bytes, outcomes: Outcomes) -> None:
    """One read of one block."""
    request = pb.ReadRequest(space_id=SPACE.space_id, keys=key)
    data = bytearray()
    try:
        async for reply in stub.Read(request, timeout=DEADLINE_S):
            for piece in reply.pieces:
                data += piece.data
    except grpc.aio.AioRpcError as error:
        outcomes.ended[error.code().name] += 1
        return
    if not data:
        outcomes.ended["miss"] += 1
        return
    outcomes.ended["delivered"] += 1
    outcomes.delivered.append(time.monotonic())
    outcomes.wrong += data != content(key, BLOCK_BYTES)


def _findings(
    node: Node,
    peak: float,
    goodput: float,
    outcomes: Outcomes,
    samples: dict[str, float],
    seconds: int,
) -> list[Finding]:
    shed = {n.split('"')[1]: v for n, v in samples.items() if n.startswith("kvstore_shed_calls_t")}
    details = {
        "peak, MB/s": round(peak / 1e6, 2), "goodput, MB/s": round(goodput / 1e6, 2),
        "capacity, MB/s": BYTES_PER_S / 1e6, "offered": TIMES,
        "reads": dict(outcomes.ended), "shed by": shed, "wrong": outcomes.wrong,
        "status or health unanswered": node.unanswered,
    }  # fmt: skip
    share = goodput / peak if peak else 0.0
    healthy = not outcomes.wrong and not node.unanswered
    reject_s, rejects = _p99(samples)
    cap = node.start_bytes + SETTINGS["server"]["inflight_bytes"]
    return [
        Finding(round(share, 3), share >= GOODPUT and healthy, seconds, details=details),
        Finding(reject_s * 1000, reject_s <= REJECT_S and rejects > 0, rejects),
        Finding(
            round(node.most_bytes / cap, 3), node.most_bytes <= MEMORY * cap, seconds,
            details={"most": node.most_bytes, "at start": node.start_bytes, "cap": cap},
        ),
    ]  # fmt: skip


def _p99(samples: dict[str, float]) -> tuple[float, int]:
    """The least bucket that holds 99 % of the rejects, in seconds, and how many there were."""
    prefix = 'kvstore_shed_seconds_bucket{le="'
    buckets = sorted(
        (float(name.removeprefix(prefix).rstrip('"}')), count)
        for name, count in samples.items()
        if name.startswith(prefix)
    )
    total = buckets[-1][1]
    return next(bound for bound, count in buckets if count >= 0.99 * total), int(total)


PROOF = Proof(
    module="overload",
    about=__doc__ or "",
    claims=[
        Claim("overload at 10 x of the capacity: goodput", "of the peak", ">= 0.9"),
        Claim("overload: p99 of a reject inside the server", "ms", "<= 5"),
        Claim("overload: resident memory", "of the cap", "<= 1.1"),
    ],
    trials={"test": 2, "short": 15, "long": 60},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
