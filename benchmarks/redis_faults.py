"""Every way in which a Redis can fail, under a node that uses it: no call fails, none is late.

A real Redis stands behind a TCP proxy of ours, and a node without a disk over it, with a memory
so small that most reads go to Redis and most writes push older blocks there. Each fault comes
before the node starts, in the middle of a read, or in the middle of a write, stays for a while,
and goes. Meanwhile a client matches, loads and stores over real gRPC. What is judged:

* failed calls: every entry in the client's own counters of what it lost, and every wrong byte;
* the p99 of a miss beyond its budget, measured at the client. The budget of a match is
  redis.lookup_timeout_s; of a load it is that and redis.timeout_s, because a load looks where its
  blocks lie and then reads them. While a breaker is open misses cost nothing: they are left out,
  or nearly all would be of that kind. So is the time for which the machine kept the event loop
  waiting, as a metronome in it sees;
* the breaker: open within 3 errors, or 1 s after the first; where every answer is wrong it opens;
* recovery: when the fault is gone a block of Redis is served again within 5 s.

A scenario in which the fault never fired is a broken one.
"""

import asyncio
import bisect
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from benchmarks.proof import Claim, Finding, Proof, Setting, Size, main
from benchmarks.service.redis_proxy import Kind, RedisProxy, Spoiling
from kvstore.api.tier import BlockRef
from kvstore.server import NodeServer
from kvstore.tiers.breaker import FAILURES_TO_OPEN
from kvstore_client import AsyncClient, Budgets, Space
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import keys_of
from tests.sim.faulty import Faulty
from tests.sim.nodes import Nodes, counter, descriptor_of, expected, store

BLOCK_BYTES = 16 << 10
COLD = keys_of("cold", 240)
LOOKUP_S, BATCH_S = 0.05, 0.2
BUDGET_S = {"match": LOOKUP_S, "load": LOOKUP_S + BATCH_S}
MARGIN_S = 0.02
WAITED_S = 0.01
OPEN_WITHIN_S, RECOVERED_WITHIN_S = 1.0, 5.0
PATIENT = Budgets(match_s=10, load_s=10, store_s=20)
MEMORY = {"capacity_bytes": 1 << 20, "slab_bytes": 1 << 18}
STAYS_S: dict[Size, float] = {"test": 0.5, "short": 1.5, "long": 3.0}
PAUSE_S = 0.004
POLL_S = 0.004
BEAT_S = 0.001
GIVE_UP_S = 15.0
FILLER = 40
"""Large values that make Redis look up from loading now and then."""


class Bench:
    """A real Redis with blocks in it, the proxy before it, and what can be done to both."""

    def __init__(self, server: RedisServer, proxy: RedisProxy) -> None:
        self.server, self.proxy = server, proxy
        self.golden: dict[bytes, bytes] = {}
        self._password = urlsplit(server.url).password or ""
        self.deleted = 0
        """How many keys were evicted."""

    @property
    def url(self) -> str:
        """Where a node finds the proxy."""
        return f"redis://:{self._password}@127.0.0.1:{self.proxy.port}/0"

    def admin(self) -> Any:
        """A connection that does not pass the proxy."""
        return redis.from_url(self.server.url, socket_timeout=10)

    def fill(self) -> None:
        """Nothing but the cold blocks, as at the beginning."""
        with self.admin() as admin:
            admin.flushall()
            admin.config_resetstat()
        self.restore()
        self.proxy.fired = self.deleted = 0

    def restore(self) -> None:
        """The cold blocks are there again."""
        with self.admin() as admin:
            for key, value in self.golden.items():
                admin.set(key, value)

    def replied(self, error: str) -> int:
        """How often Redis itself has answered with this error."""
        with self.admin() as admin:
            counted = admin.info("errorstats").get(f"errorstat_{error}", {})
        return int(counted.get("count", 0))

    def evict(self) -> None:
        """Parts of half of the blocks are gone."""
        with self.admin() as admin:
            for key in list(self.golden)[::2]:
                self.deleted += admin.delete(key)

    def deny(self) -> None:
        """Another password, and everybody has to log in again."""
        with self.admin() as admin:
            admin.config_set("requirepass", "another")
            admin.client_kill_filter(_type="normal", skipme=True)
        self.proxy.hang_up()

    def allow(self) -> None:
        """The old password."""
        port = urlsplit(self.server.url).port
        with redis.Redis(port=port or 0, password="another") as admin:
            admin.config_set("requirepass", self._password)

    def reload(self) -> None:
        """Redis reads all that it has from a file, slowly; it answers LOADING meanwhile."""
        with self.admin() as admin:
            admin.config_set("key-load-delay", 500)
            admin.config_set("rdbcompression", "no")
            for number in range(FILLER):
                admin.set(f"filler:{number}", bytes(2 << 20))
        self._reloading = threading.Thread(target=self._reload)
        self._reloading.start()
        # It says so itself before anybody else is asked; until then it only writes the file.
        while self._reloading.is_alive():
            with self.admin() as admin:
                try:
                    admin.get("filler:0")
                except redis.exceptions.BusyLoadingError:
                    return

    def reloaded(self) -> None:
        """It has read everything."""
        self._reloading.join()

    def _reload(self) -> None:
        with self.admin() as admin:
            admin.execute_command("DEBUG", "RELOAD")
            admin.config_set("key-load-delay", 0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to fail: how it begins and ends, and how often it was felt."""

    name: str
    begin: Callable[[Bench], None]
    end: Callable[[Bench], None]
    fired: Callable[[Bench, NodeServer], float]
    opens: bool = True
    """Whether everybody who asks feels it, so that the breaker has to open."""
    spares_reads: bool = False
    """Reads go on as ever, and say nothing about the breaker of writes."""


def _set(**settings: str) -> Callable[[Bench], None]:
    def apply(bench: Bench) -> None:
        with bench.admin() as admin:
            for name, value in settings.items():
                admin.config_set(name, value)

    return apply


def _replicate(*master: str) -> Callable[[Bench], None]:
    def apply(bench: Bench) -> None:
        with bench.admin() as admin:
            admin.execute_command("REPLICAOF", *master)

    return apply


def _proxied(name: str, kind: Kind, delay_s: float = 0.0, *, opens: bool = True) -> Fault:
    return Fault(
        name,
        lambda bench: bench.proxy.spoil(Spoiling(kind, delay_s)),
        lambda bench: bench.proxy.heal(),
        lambda bench, server: bench.proxy.fired,
        opens,
    )


def _felt_by(server: NodeServer) -> float:
    """How many batches failed so far, by what the node counts."""
    return sum(counter(server, "tier_errors", tier="redis", cause=c) for c in ("error", "late"))


def _felt(bench: Bench, server: NodeServer) -> float:
    return _felt_by(server)


FAULTS = (
    Fault("frozen", lambda b: b.server.freeze(), lambda b: b.server.thaw(), _felt),
    Fault(
        "out of memory", _set(maxmemory="1mb"), _set(maxmemory="0"),
        lambda bench, server: bench.replied("OOM"), spares_reads=True,
    ),
    _proxied("cut mid-reply", "cut"),
    Fault("down", lambda b: b.server.kill(), lambda b: _start_again(b), _felt),
    _proxied("black hole", "swallow"),
    _proxied("slow: 10 ms", "delay", 0.01, opens=False),
    Fault(
        "read-only", _replicate("127.0.0.1", "1"), _replicate("NO", "ONE"),
        lambda bench, server: bench.replied("READONLY"), spares_reads=True,
    ),
    _proxied("slow: 100 ms", "delay", 0.1),
    _proxied("reset", "reset"),
    _proxied("loading, said by the proxy", "loading"),
    _proxied("slow: 1 s", "delay", 1.0),
    Fault("no access", lambda b: b.deny(), lambda b: b.allow(), _felt),
    _proxied("slow: 30 s", "delay", 30.0),
    Fault(
        "evicted underneath", lambda b: b.evict(), lambda b: b.restore(),
        lambda bench, server: bench.deleted, opens=False,
    ),
    # That it said so is made sure of at its beginning; the node may find it just slow.
    Fault("loading", lambda b: b.reload(), lambda b: b.reloaded(), _felt),
)  # fmt: skip
MOMENTS = ("mid-get", "mid-put", "at start")


def _start_again(bench: Bench) -> None:
    bench.server.start()
    bench.restore()


@dataclass
class Seen:
    """What one scenario saw."""

    name: str
    opens: bool
    fired: float = 0
    calls: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    misses_s: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {"match": [], "load": []}
    )
    """From when to when each miss took."""
    errors_to_open: float | None = None
    seconds_to_open: float | None = None
    errors: float = 0
    recovered_s: float = 0.0
    late_s: list[tuple[float, float]] = field(default_factory=list)
    """When the event loop was kept waiting by the machine, and for how long."""

    @property
    def failed(self) -> int:
        """Calls that failed."""
        return self.lost.total()

    @property
    def beyond_s(self) -> list[float]:
        """How long each miss took beyond its budget."""
        return self._beyond_s(0.0)

    @property
    def waited_s(self) -> list[float]:
        """The same of those that did not come at once, from an open breaker."""
        return self._beyond_s(WAITED_S)

    def _beyond_s(self, least_s: float, *, own: bool = False) -> list[float]:
        return [
            end_s - start_s - BUDGET_S[operation] - (0.0 if own else self._kept_s(start_s, end_s))
            for operation, misses in self.misses_s.items()
            for start_s, end_s in misses
            if end_s - start_s >= least_s
        ]

    def _kept_s(self, start_s: float, end_s: float) -> float:
        """For how long the machine kept this process waiting between two moments."""
        first = bisect.bisect_left(self.late_s, (start_s, 0.0))
        last = bisect.bisect_left(self.late_s, (end_s + BEAT_S, 0.0))
        return sum(late_s for _, late_s in self.late_s[first:last])

    @property
    def raw_s(self) -> list[float]:
        """As `waited_s`, with what the machine added."""
        return self._beyond_s(WAITED_S, own=True)

    @property
    def opened(self) -> bool:
        """Whether the breaker did what it has to; it may stay closed where many do not feel it."""
        if self.seconds_to_open is None or self.errors_to_open is None:
            return not self.opens and self.errors < FAILURES_TO_OPEN
        quick = self.seconds_to_open <= OPEN_WITHIN_S
        return quick or self.errors_to_open <= FAILURES_TO_OPEN


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else -MARGIN_S


def run(setting: Setting) -> Sequence[Finding]:
    """One scenario after the other, each with a fault and a moment."""
    return _findings([asyncio.run(_scenario(setting, number)) for number in _numbers(setting)])


def _numbers(setting: Setting) -> Sequence[int]:
    def ticking() -> Any:
        for number in range(setting.trials):
            yield number
            setting.tick(1)

    return ticking()  # type: ignore[no-any-return]


async def _scenario(setting: Setting, number: int) -> Seen:
    fault = FAULTS[number % len(FAULTS)]
    moment = MOMENTS[(number + number // len(FAULTS)) % len(MOMENTS)]
    rng = random.Random(f"{setting.seed} {number}")
    seen = Seen(f"{fault.name}, {moment}", fault.opens)
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-redis-faults-") as home,
        RedisServer(policy="noeviction", tcp=True) as redis_server,
        RedisProxy(urlsplit(redis_server.url).port or 0) as proxy,
    ):
        bench = Bench(redis_server, proxy)
        nodes = Nodes(Path(home))
        try:
            await _fill(nodes, bench)
            await _play(nodes, bench, fault, moment, STAYS_S[setting.size], rng, seen)
        finally:
            await nodes.finish()
    return seen


def _options(url: str) -> dict[str, Any]:
    return {
        "server": {"drain_timeout_s": 5},
        "memory": MEMORY,
        "disk": {"enabled": False},
        "redis": {
            "blocks_url": url, "lookup_timeout_s": LOOKUP_S, "timeout_s": BATCH_S,
            "codec": "raw", "part_bytes": 4096,
        },
    }  # fmt: skip


async def _fill(nodes: Nodes, bench: Bench) -> None:
    """The cold blocks, written by a node that is in no hurry."""
    options = _options(bench.url)
    options["redis"] |= {"lookup_timeout_s": 30, "timeout_s": 30}
    server = await nodes.start(**options)
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of(BLOCK_BYTES))
    for key in COLD:
        await store(client, space, [key])
    await nodes.stop(server)
    with bench.admin() as admin:
        for key in admin.scan_iter(count=1000):
            bench.golden[key] = admin.get(key)
    bench.fill()


async def _play(
    nodes: Nodes,
    bench: Bench,
    fault: Fault,
    moment: str,
    stays_s: float,
    rng: random.Random,
    seen: Seen,
) -> None:
    if moment == "at start":
        await asyncio.to_thread(fault.begin, bench)
    answered: Counter[str] = Counter()

    async def note(operation: str, refs: Sequence[BlockRef]) -> None:
        answered[operation] += 1

    server = await nodes.start(wrap=lambda tier: Faulty(tier, after=note), **_options(bench.url))
    async with AsyncClient(server.endpoint, budgets=PATIENT) as client:
        load = Load(client, await client.open_space(descriptor_of(BLOCK_BYTES)), rng, seen)
        watching = asyncio.create_task(_watch_breaker(server, fault, seen, answered))
        if moment != "at start":
            await load.warm_up()
            working = load.work()
            await load.in_the_middle("load" if moment == "mid-get" else "store")
            await asyncio.to_thread(fault.begin, bench)
        else:
            working = load.work()
        await asyncio.sleep(stays_s)
        watching.cancel()
        await asyncio.to_thread(fault.end, bench)
        load.judging = False
        seen.fired = await asyncio.to_thread(fault.fired, bench, server)
        seen.recovered_s = await load.recovery()
        load.over = True
        await asyncio.gather(*working)
        seen.lost += client.counters


async def _watch_breaker(
    server: NodeServer, fault: Fault, seen: Seen, answered: Counter[str]
) -> None:
    """Notes after what series of errors, without a success in between, it opens.

    `answered`: how often the tier answered, which of look-ups no metric says.
    """
    began_s, before, successes = 0.0, 0.0, -1.0
    reads = [] if fault.spares_reads else [("load", "hit"), ("load", "miss")]
    while True:
        errors, now_s = _felt_by(server), time.monotonic()
        worked = sum(
            counter(server, "tier_operations", tier="redis", op=op, result=result)
            for op, result in (*reads, ("store", "held"))
        )
        if not fault.spares_reads:
            worked += answered["locate"] + answered["wants"]
        if not server.node.tiers.usage()[-1].serving:
            seen.errors_to_open = errors - before
            seen.seconds_to_open = now_s - began_s if began_s else 0.0
            return
        if worked != successes:
            began_s, before, successes = 0.0, errors, worked
        elif errors > before and not began_s:
            began_s = now_s
        seen.errors = max(seen.errors, errors - before)
        await asyncio.sleep(POLL_S)


class Load:
    """What the client does all the time, and how long its misses take."""

    def __init__(self, client: AsyncClient, space: Space, rng: random.Random, seen: Seen) -> None:
        self._client, self._space, self._rng, self._seen = client, space, rng, seen
        self.over = False
        self.judging = True
        self.begun = {"load": asyncio.Event(), "store": asyncio.Event()}
        self._runs = 0

    def work(self) -> list[asyncio.Task[None]]:
        """Begins to do what it does all the time."""
        return [asyncio.create_task(each()) for each in (self.reads, self.writes, self.beats)]

    async def warm_up(self) -> None:
        """Everything works: Redis serves, and memory is full of what it does not have."""
        for _ in range(4):
            await self._write()
        assert await self.recovery() < GIVE_UP_S

    async def in_the_middle(self, operation: str) -> None:
        """Returns just after such a call has begun."""
        async with asyncio.timeout(GIVE_UP_S):
            self.begun[operation].clear()
            await self.begun[operation].wait()

    async def reads(self) -> None:
        """Matches and loads by turns."""
        while not self.over:
            started_s = time.monotonic()
            found = await self._match()
            self._judge("match", not found, started_s)
            started_s = time.monotonic()
            tiers = await self._load(3)
            self._judge("load", None in tiers, started_s)
            await asyncio.sleep(PAUSE_S)

    async def beats(self) -> None:
        """A metronome: whatever it is late, everything else in this process is as well."""
        while not self.over:
            started_s = time.monotonic()
            await asyncio.sleep(BEAT_S)
            now_s = time.monotonic()
            if now_s - started_s > 2 * BEAT_S:
                self._seen.late_s.append((now_s, now_s - started_s - BEAT_S))

    async def writes(self) -> None:
        """Chains that nobody has seen before."""
        while not self.over:
            await self._write()
            await asyncio.sleep(2 * PAUSE_S)

    async def recovery(self) -> float:
        """Seconds until Redis serves again."""
        started_s = time.monotonic()
        while "redis" not in await self._load(4):
            if time.monotonic() - started_s > GIVE_UP_S:
                break
            await asyncio.sleep(PAUSE_S)
        return time.monotonic() - started_s

    def _judge(self, operation: str, missed: bool, started_s: float) -> None:
        self._seen.calls[operation] += 1
        if missed and self.judging:
            self._seen.misses_s[operation].append((started_s, time.monotonic()))

    async def _match(self) -> bool:
        key = self._rng.choice(COLD)
        return bool((await self._client.match([self._space], [key], lease_ms=0)).blocks)

    async def _load(self, count: int) -> list[str | None]:
        keys = self._rng.sample(COLD, count)
        buffers = [bytearray(BLOCK_BYTES) for _ in keys]
        self.begun["load"].set()
        answers = await self._client.load_any(self._space, keys, buffers)
        for key, buffer, answer in zip(keys, buffers, answers, strict=True):
            if answer is not None and buffer != expected(self._space, key):
                self._seen.lost["wrong bytes"] += 1
        return [answer.tier if answer else None for answer in answers]

    async def _write(self) -> None:
        self._runs += 1
        self.begun["store"].set()
        self._seen.calls["store"] += 1
        await store(self._client, self._space, keys_of(f"run {self._runs}", 8))


def _findings(scenarios: Sequence[Seen]) -> list[Finding]:
    seen = list(scenarios)
    unfired = [each.name for each in seen if not each.fired]
    reason = f"never fired: {', '.join(unfired)}" if unfired else ""
    calls = sum(each.calls.total() for each in seen)
    failed = sum(each.failed for each in seen)
    beyond = [seconds for each in seen for seconds in each.beyond_s]
    waited = [seconds for each in seen for seconds in each.waited_s]
    p99_s = _p99(waited)
    shut = [each.name for each in seen if not each.opened]
    worst = max(seen, key=lambda each: _p99(each.waited_s))
    slowest = max(seen, key=lambda each: each.recovered_s)
    lost = {each.name: dict(each.lost) for each in seen if each.lost}
    fired = {each.name: each.fired for each in seen}
    details = {
        each.name: {"p99 beyond its budget, ms": round(_p99(each.beyond_s) * 1000, 1),
                    "misses": len(each.beyond_s),
                    "errors until open": each.errors_to_open,
                    "seconds until open": each.seconds_to_open,
                    "recovered, s": round(each.recovered_s, 2)}
        for each in seen
    }  # fmt: skip
    return [
        Finding(
            float(failed), not failed and not unfired, calls, failed, reason,
            {"lost": lost, "fired": fired},
        ),
        Finding(
            round(p99_s * 1000, 1), p99_s <= MARGIN_S and bool(waited), len(waited),
            details={
                "budget, s": BUDGET_S, "misses, also those that cost nothing": len(beyond),
                "p99 beyond of all of them, ms": round(_p99(beyond) * 1000, 1),
                "worst scenario": worst.name,
                "its p99 beyond, ms": round(_p99(worst.waited_s) * 1000, 1),
                "slowest beyond, ms": round(max(beyond, default=0.0) * 1000, 1),
                "p99 with what the machine added, ms": round(
                    _p99([seconds for each in seen for seconds in each.raw_s]) * 1000, 1
                ),
            },
        ),
        Finding(
            float(len(shut)), not shut, len(seen), len(shut), details={"shut": shut, **details}
        ),
        Finding(
            round(slowest.recovered_s, 2), slowest.recovered_s <= RECOVERED_WITHIN_S, len(seen),
            details={"worst": slowest.name},
        ),
    ]  # fmt: skip


PROOF = Proof(
    module="redis_faults",
    about=__doc__ or "",
    claims=[
        Claim("Redis faults: client calls", "failed calls", "0"),
        Claim("Redis faults: p99 of a miss that waited, beyond its budget", "ms", "<= 20"),
        Claim("Redis faults: breaker not open after 3 errors or 1 s", "scenarios", "0"),
        Claim("Redis faults: recovery", "s", "<= 5"),
    ],
    trials={"test": 2, "short": len(FAULTS), "long": 6 * len(FAULTS)},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
