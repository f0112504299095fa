"""Calls that are cancelled in the middle, and clients that are killed there: nothing may be left.

Reads, writes and matches over real gRPC are cancelled at random chunks; then client processes are
ended by SIGKILL with calls of every kind under way. What is left is what the node itself counts
above what it counted before: calls, bytes and waiting callers of admission, leases and their
bytes, pins, reserved slots, watchers, tasks of the event loop, and the descriptors of its process.
Leases that were granted and never heard of may take their time to expire, which is a second.
"""

import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc

from benchmarks.proof import Claim, Finding, Proof, Setting, main
from benchmarks.service.unfinished import (
    BLOCK_BYTES,
    COLD,
    LEASE_MS,
    OPERATIONS,
    WARM,
    Unfinished,
)
from kvstore.api.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore.server import NodeServer
from tests.sim.nodes import Nodes, check_node, counter, descriptor_of, raw_channel, store

CALLS_PER_KILL = 50
CALLERS = 12
VICTIMS_AT_ONCE = 4
GRACE_S = 10.0
"""At most so long after the last lease is over everything must be as before."""
POLL_S = 0.005
SERVER = {"drain_timeout_s": 10}
MEMORY = {"capacity_bytes": 128 << 20, "slab_bytes": 1 << 20}
DISK = {"capacity_bytes": 256 << 20, "segment_bytes": 16 << 20}


def leftovers(server: NodeServer) -> Counter[str]:
    """What the node holds for callers now, and what its process has open."""
    node, admission = server.node, server.calls.admission
    memory = node.tiers.memory
    slots = memory.slots()
    return Counter(
        {
            "admitted calls": admission.calls,
            "bytes in flight": admission.inflight_bytes,
            "waiting calls": admission.waiting_calls,
            "leases": len(node.leases),
            "leased bytes": node.leases.leased_bytes,
            "pins": sum(slot.pins for slot in slots),
            "reserved slots": len(memory._unindexed),
            "watchers": len(node.events._queues),
            "tasks": len(asyncio.all_tasks()),
            "descriptors": _descriptors(),
        }
    )


def _descriptors() -> int:
    """What this process has open, but for the segments of the disk: those are no caller's."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(str(Path(f"/proc/self/fd/{name}").readlink()))
    return sum(not link.endswith(".segment") for link in links)


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(setting: Setting) -> Sequence[Finding]:
    """First the cancelled calls, then the killed clients."""
    return asyncio.run(_run(setting))


async def _run(setting: Setting) -> list[Finding]:
    with tempfile.TemporaryDirectory(prefix="kvstore-cancelled-") as home:
        nodes = Nodes(Path(home))
        try:
            server = await _cold_node(nodes)
            async with raw_channel(server) as channel:
                unfinished = Unfinished(KVStoreStub(channel), random.Random(setting.seed))
                await _cancel_calls(unfinished, CALLERS * len(OPERATIONS))
                baseline = await _settled(server, Counter())
                findings = [await _cancelled(setting, server, unfinished, baseline)]
                findings.append(await _killed(setting, server, baseline))
        finally:
            await nodes.finish()
    return findings


async def _cold_node(nodes: Nodes) -> NodeServer:
    """A node with one chain in memory and a longer one on disk."""
    for chain in (COLD, WARM):
        server = await nodes.start(server=SERVER, memory=MEMORY, disk=DISK)
        client = nodes.connect(server)
        space = await client.open_space(descriptor_of(BLOCK_BYTES))
        assert all(await store(client, space, chain))
        if chain is COLD:
            await nodes.stop(server)
    return server


async def _cancelled(
    setting: Setting, server: NodeServer, unfinished: Unfinished, baseline: Counter[str]
) -> Finding:
    before, resident = _statuses(server), resident_bytes()
    done = 0
    while done < setting.trials:
        count = min(CALLERS * 4, setting.trials - done)
        await _cancel_calls(unfinished, count)
        done += count
        setting.tick(count)
    cut = {op: number - before[op] for op, number in _statuses(server).items()}
    growth = round((resident_bytes() - resident) / done)
    details = {"cut short in the node": cut, "resident growth, bytes per call": growth}
    finding = await _left(server, baseline, done, details)
    # A fault that never fired proves nothing. A match rarely waits, and is mostly over by then.
    if cut["read"] < done // 9 or cut["write"] < done // 9:
        return Finding(None, False, done, reason=f"too few were cut short: {cut}")
    return finding


async def _cancel_calls(unfinished: Unfinished, count: int) -> None:
    async def one(operation: str) -> None:
        with contextlib.suppress(grpc.aio.BaseError, asyncio.CancelledError):
            call = await unfinished.begin(operation)
            call.cancel()

    for start in range(0, count, CALLERS):
        numbers = range(start, min(start + CALLERS, count))
        await asyncio.gather(*(one(OPERATIONS[number % len(OPERATIONS)]) for number in numbers))


async def _killed(setting: Setting, server: NodeServer, baseline: Counter[str]) -> Finding:
    kills = max(VICTIMS_AT_ONCE, setting.trials // CALLS_PER_KILL)
    rng = random.Random(f"{setting.seed} kills")
    before = _statuses(server)
    async with _parent() as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for start in range(0, kills, VICTIMS_AT_ONCE):
            victims = min(VICTIMS_AT_ONCE, kills - start)
            for _ in range(victims):
                parent.stdin.write(f"{server.endpoint} {rng.random()}\n".encode())
            for _ in range(victims):
                async with asyncio.timeout(60):
                    pid = int(await parent.stdout.readline())
                await asyncio.sleep(rng.random() * 0.02)
                os.kill(pid, signal.SIGKILL)
    cut = {op: number - before[op] for op, number in _statuses(server).items()}
    return await _left(server, baseline, kills, {"cut short in the node": cut})


@contextlib.asynccontextmanager
async def _parent() -> AsyncIterator[Process]:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.service.doomed", stdin=PIPE, stdout=PIPE
    )
    try:
        yield parent
    finally:
        assert parent.stdin is not None
        parent.stdin.close()
        await parent.wait()


async def _left(
    server: NodeServer, baseline: Counter[str], trials: int, details: dict[str, object]
) -> Finding:
    """What is above the baseline once everything has had the time to end."""
    started_s = time.monotonic()
    left = await _settled(server, baseline) - baseline
    details |= {"left": dict(left), "seconds to the baseline": time.monotonic() - started_s}
    check_node(server)
    server.calls.admission.check()
    return Finding(float(left.total()), not left, trials, left.total(), "", details)


async def _settled(server: NodeServer, baseline: Counter[str]) -> Counter[str]:
    """What is held once that is no more than the baseline, or once the time for it is over.

    Without a baseline: once no lease is left, and nothing has changed for a while.
    """
    end_s = time.monotonic() + LEASE_MS / 1000 + GRACE_S
    seen, since_s = leftovers(server), time.monotonic()
    while time.monotonic() < end_s:
        await asyncio.sleep(POLL_S)
        now = leftovers(server)
        if baseline and not now - baseline:
            return now
        if now != seen:
            seen, since_s = now, time.monotonic()
        if not baseline and not now["leases"] and time.monotonic() - since_s > 0.3:
            return now
    return leftovers(server)


def _statuses(server: NodeServer) -> dict[str, int]:
    """How many calls of each kind the node saw end before their time."""
    return {op: int(counter(server, "requests", op=op, status="cancelled")) for op in OPERATIONS}


PROOF = Proof(
    module="cancelled",
    about=__doc__ or "",
    claims=[
        Claim("calls cancelled mid-stream", "things left behind", "0", 10_000),
        Claim("clients killed", "things left behind", "0", 200),
    ],
    trials={"test": 150, "short": 2000, "long": 10_000},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
