"""Deadlines, bounds and breakers in front of a tier."""

import asyncio
from collections.abc import Sequence

import pytest

from kvstore.api.errors import TierError
from kvstore.api.tier import BlockRef
from kvstore.tiers.breaker import FAILURES_TO_OPEN, OPEN_S, Breaker
from kvstore.tiers.guarded import MAX_LOOKUPS, Guarded
from kvstore.tiers.window import LEAST_BYTES, START_BYTES, Window
from tests.sim.blocks import chain_of, load_all, namespace_of
from tests.sim.clock import settle
from tests.sim.faulty import Faulty
from tests.sim.rig import Rig

SIZE = 1000
CHAIN = chain_of("chain", 4, namespace_of("mine"), SIZE)
REFS = [block.ref for block in CHAIN]


class Gated:
    """A guarded tier whose answers wait until a test lets them go."""

    def __init__(self, rig: Rig, *, queue_bytes: int, timeout_s: float = 30.0) -> None:
        self.inner = Faulty(rig.memory())
        self.gate = asyncio.Event()
        self.waiting = 0
        self.tier = Guarded(
            self.inner, lookup_timeout_s=timeout_s, timeout_s=timeout_s,
            clock=rig.clock, metrics=rig.metrics, queue_bytes=queue_bytes,
            clear_timeout_s=2 * timeout_s,
        )  # fmt: skip
        self.inner.before = self._wait

    async def _wait(self, operation: str, refs: Sequence[BlockRef]) -> None:
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1


async def test_more_than_fits_under_way_is_a_miss_at_once(rig: Rig) -> None:
    """Reads and writes each have their own bound; what ends makes room."""
    gated = Gated(rig, queue_bytes=3 * SIZE)
    loads = [asyncio.create_task(load_all(gated.tier, [block])) for block in CHAIN[:3]]
    stores = [asyncio.create_task(gated.tier.store([block])) for block in CHAIN[:3]]
    await settle()
    assert gated.waiting == 6
    assert gated.tier.full(SIZE)
    assert await load_all(gated.tier, CHAIN[:1]) == [None]
    assert await gated.tier.store(CHAIN[:1]) == [False]
    assert rig.counted("tier_errors", tier="memory", cause="full") == 2
    assert gated.tier.serving, "a busy tier is not a broken one"
    gated.gate.set()
    await asyncio.gather(*loads, *stores)
    assert not gated.tier.full(SIZE)
    assert None not in await load_all(gated.tier, CHAIN[:3])


async def test_one_batch_is_admitted_however_large(rig: Rig) -> None:
    """Or a block that is larger than the bound could never be had."""
    gated = Gated(rig, queue_bytes=SIZE // 2)
    gated.gate.set()
    assert await gated.tier.store(CHAIN) == [True] * 4
    assert None not in await load_all(gated.tier, CHAIN)


async def test_lookups_are_bounded(rig: Rig) -> None:
    """By their number, for they have no bytes."""
    gated = Gated(rig, queue_bytes=SIZE)
    asking = [asyncio.create_task(gated.tier.locate(REFS)) for _ in range(MAX_LOOKUPS)]
    await settle()
    assert await gated.tier.locate(REFS) == [None] * 4
    assert await gated.tier.wants(REFS) == [True] * 4
    gated.gate.set()
    await asyncio.gather(*asking)
    assert rig.counted("tier_errors", tier="memory", cause="full") == 2


async def test_what_cannot_be_written_is_still_read(rig: Rig) -> None:
    """A full or read-only server refuses at once after three refusals, and serves what it has."""
    inner = Faulty(rig.memory())
    tier = rig.guarded(inner)
    await tier.store(CHAIN)

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == "store":
            raise TierError("planted: OOM")

    inner.before = fail
    for _ in range(FAILURES_TO_OPEN + 2):
        await tier.wants(REFS)
        assert await tier.store(CHAIN) == [False] * 4
        assert None not in await load_all(tier, CHAIN)
    assert inner.asked["store", REFS[0]] == 1 + FAILURES_TO_OPEN
    assert not tier.serving
    await rig.clock.advance(OPEN_S)
    for _ in range(2):
        await tier.wants(REFS)
        await tier.store(CHAIN)
    assert inner.asked["store", REFS[0]] == 2 + FAILURES_TO_OPEN, "one a second tries again"
    inner.before = lambda operation, refs: settle()
    await rig.clock.advance(OPEN_S)
    assert await tier.store(CHAIN) == [True] * 4
    assert tier.serving


async def test_what_cannot_be_read_is_not_written_to(rig: Rig) -> None:
    """And when it is back, both are tried again at once."""
    inner = Faulty(rig.memory())
    tier = rig.guarded(inner)

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        raise TierError("planted")

    inner.before = fail
    for _ in range(FAILURES_TO_OPEN):
        await tier.locate(REFS)
    assert await tier.store(CHAIN) == [False] * 4
    assert inner.asked["store", REFS[0]] == 0
    inner.before = lambda operation, refs: settle()
    await rig.clock.advance(OPEN_S)
    assert await tier.locate(REFS) == [None] * 4
    assert tier.serving
    assert await tier.store(CHAIN) == [True] * 4


async def test_a_probe_that_is_cancelled_lets_another_try(rig: Rig) -> None:
    """A second later: whoever went away took no verdict along."""
    gated = Gated(rig, queue_bytes=10 * SIZE)

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        raise TierError("planted")

    gated.inner.before = fail
    for _ in range(FAILURES_TO_OPEN):
        await gated.tier.locate(REFS)
    gated.inner.before = gated._wait
    await rig.clock.advance(OPEN_S)
    probe = asyncio.create_task(gated.tier.locate(REFS))
    await settle()
    probe.cancel()
    await settle()
    gated.gate.set()
    assert await gated.tier.locate(REFS) == [None] * 4
    assert not gated.tier.serving
    await rig.clock.advance(OPEN_S)
    await gated.tier.locate(REFS)
    assert gated.tier.serving


async def test_oblivion_has_a_deadline_too(rig: Rig) -> None:
    """Who discards is told that it could not be done in time."""
    gated = Gated(rig, queue_bytes=SIZE, timeout_s=0.01)
    with pytest.raises(TierError, match=r"within 0[.]01 s"):
        await gated.tier.discard(REFS)


async def test_to_clear_has_a_longer_deadline(rig: Rig) -> None:
    """It looks through all that the tier holds; who clears is told that it took too long."""
    gated = Gated(rig, queue_bytes=SIZE, timeout_s=0.01)
    async with asyncio.timeout(10):
        with pytest.raises(TierError, match=r"within 0[.]02 s"):
            await gated.tier.clear(REFS[0].namespace)


def test_a_breaker_lets_one_a_second_try() -> None:
    """However many ask, and however long the one takes."""
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.admits(0.0)
        breaker.begin(0.0)
        breaker.failed(0.0)
    assert not breaker.admits(OPEN_S - 0.01)
    assert breaker.admits(OPEN_S)
    breaker.begin(OPEN_S)
    assert not breaker.admits(100.0), "the first one has not come back"
    breaker.failed(100.0)
    assert not breaker.admits(100.0 + OPEN_S - 0.01)
    breaker.begin(100.0 + OPEN_S)
    breaker.succeeded()
    assert breaker.admits(101.0)
    assert breaker.closed


def _drive(window: Window, bytes_per_s: float, batch: int, seconds: float) -> list[float]:
    """Always as much under way as is admitted, at a tier with one queue; how long answers took."""
    now_s = free_at_s = 0.0
    under_way: list[tuple[float, float]] = []
    took_s = []
    while now_s < seconds:
        while window.admits(batch):
            window.begin(batch, now_s)
            free_at_s = max(free_at_s, now_s) + batch / bytes_per_s
            under_way.append((now_s, free_at_s))
        began_s, now_s = under_way.pop(0)
        window.end(batch, now_s, delivered=True)
        took_s.append(now_s - began_s)
    return took_s


@pytest.mark.parametrize("bytes_per_s", [2e6, 8e6, 5e7, 2e9])
def test_a_window_finds_what_a_tier_answers_in_time(bytes_per_s: float) -> None:
    """Slow or fast: answers take the time that was aimed at, or the bound is reached."""
    batch = 256 << 10
    window = Window(256 << 20, target_s=1.0)
    took_s = _drive(window, bytes_per_s, batch, 20)
    at_first = int(START_BYTES / batch)
    assert max(took_s[2 * at_first :]) < 1.1
    wanted = min(bytes_per_s, 256 << 20)
    assert 0.9 * wanted <= window.limit_bytes <= max(1.1 * wanted, LEAST_BYTES)


def test_a_window_follows_a_tier_that_gets_slower_and_faster() -> None:
    """Within seconds, in both directions."""
    window = Window(256 << 20, target_s=1.0)
    for bytes_per_s in (5e7, 5e6, 5e7):
        took_s = _drive_on(window, bytes_per_s, 20)
        assert max(took_s[-5:]) < 1.1
        assert window.limit_bytes > 0.9 * bytes_per_s


def _drive_on(window: Window, bytes_per_s: float, seconds: float) -> list[float]:
    assert window.used_bytes == 0 or window.used_bytes <= window.limit_bytes
    window.used_bytes = 0
    window._marked_s = 0.0
    return _drive(window, bytes_per_s, 256 << 10, seconds)


def test_what_fails_counts_as_nothing_delivered() -> None:
    """A tier that is always late gets a short queue."""
    window = Window(256 << 20, target_s=1.0)
    _drive_on(window, 5e7, 10)
    window.used_bytes = 0
    for second in range(20):
        window.begin(1000, 10.0 + second)
        window.end(1000, 11.0 + second, delivered=False)
    assert window.limit_bytes == LEAST_BYTES
