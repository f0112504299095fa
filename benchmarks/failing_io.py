"""The n-th I/O call of a scripted run fails, once or from then on; for every n.

`python -m benchmarks.failing_io`
"""

import asyncio
import contextlib
import errno
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.crash.disk_script import (
    BLOCK_BYTES,
    PLAYS,
    SEGMENT_BYTES,
    Step,
    blocks_of,
    ref_of,
)
from benchmarks.crash.durability import Durability
from benchmarks.crash.system_calls import (
    READS,
    SECTOR_BYTES,
    WRITES,
    Call,
    SystemCalls,
    standing_in,
)
from benchmarks.harm.disk import fast_directory
from benchmarks.harm.segment_image import BLOCK_KIND, SegmentImage
from benchmarks.proof import Claim, Finding, Proof, Setting, main, passed
from benchmarks.quiet import quiet
from benchmarks.tally import Tally
from kvstore.api.errors import ConfigError, TierError
from kvstore.api.tier import Block, BlockRef, Load, Tier
from kvstore.files import DirectoryFiles
from kvstore.tiers.segment import file_name
from tests.sim.blocks import data_of
from tests.sim.rig import SYNC_AFTER_S, Rig

BACK_WITHIN_S = 5.0
STEP_S = 0.5
PRESSURE = tuple(
    Step(act, f"pressure {number}", 0, 2) for number in range(4) for act in ("store", "load")
)
"""Asked at the end, so that where a fault lasts the tier's breakers are open when it ends."""
SHORT = "short"
"""Not an error: a read or write that does less than it was asked to."""

ERRORS: Mapping[str, Sequence[int]] = {
    "open": (errno.EMFILE, errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "pwrite": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR),
    "pwritev": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR),
    "pread": (errno.EIO, errno.EINTR),
    "preadv": (errno.EIO, errno.EINTR),
    "fdatasync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC),
    "ftruncate": (errno.EIO, errno.ENOSPC),
    "posix_fallocate": (errno.ENOSPC, errno.EIO),
    "listdir": (errno.EIO, errno.EMFILE),
}
OTHERS = (errno.EIO,)


@dataclass(frozen=True, slots=True)
class Point:
    """Which call goes wrong, how, and whether those of its kind that follow do so too."""

    play: str
    call: int
    name: str
    fault: int | str
    lasting: bool

    @property
    def kind(self) -> str:
        """For the tally."""
        what = self.fault if isinstance(self.fault, str) else errno.errorcode[self.fault]
        return f"{self.name} {what} {'from then on' if self.lasting else 'once'}"


@dataclass(slots=True)
class Fault:
    """Makes the calls of one trial, and one or more of them go wrong."""

    point: Point
    cut_at: float
    durability: Durability
    over: bool = False
    fired: int = 0

    def __call__(self, call: Call) -> object:
        """What happens instead of a call."""
        if self.over or not self._strikes(call):
            answer = call.complete()
        else:
            self.fired += 1
            answer = self._go_wrong(call)
        self.durability.done(call, answer)
        return answer

    def _strikes(self, call: Call) -> bool:
        if call.number == self.point.call:
            return True
        same = call.name == self.point.name
        return self.point.lasting and call.number > self.point.call and same

    def _part_of(self, size_bytes: int) -> int:
        """Something less, but not nothing; whole sectors where there are several."""
        sector = SECTOR_BYTES if size_bytes > SECTOR_BYTES else 1
        return max(sector, int(size_bytes * self.cut_at) // sector * sector)

    def _go_wrong(self, call: Call) -> object:
        if isinstance(self.point.fault, str):
            return call.partly(self._part_of(call.size_bytes))
        if call.name == "close":
            call.complete()  # The handle is gone, whatever the system says of it.
        self.durability.failed(call)
        raise OSError(self.point.fault, os.strerror(self.point.fault))


@dataclass(slots=True)
class Ordeal:
    """One play with one fault, and what has to hold during and after it."""

    root: Path
    capacity_bytes: int
    fault: Fault
    wrong: list[str] = field(default_factory=list)
    rig: Rig = field(default_factory=Rig)
    tier: Tier | None = None
    files: DirectoryFiles | None = None
    contents: defaultdict[BlockRef, set[int]] = field(default_factory=lambda: defaultdict(set))
    """What each block may contain: what was offered since it was last forgotten for certain."""
    announced: Counter[int] = field(default_factory=Counter)
    """How many blocks of each segment this life of the tier said to be on the device."""

    async def open(self) -> bool:
        """Starts the tier, guarded as in a node; False if the start was refused."""
        self.fault.durability.forget()
        self.announced.clear()
        self.rig.when_sealed = self._judge_announcement
        try:
            self.files = DirectoryFiles(self.root)
        except (OSError, ConfigError):
            return False
        try:
            disk = await self.rig.disk(
                self.files, capacity_bytes=self.capacity_bytes, segment_bytes=SEGMENT_BYTES
            )
        except (OSError, TierError):
            self._shut()
            return False
        self.tier = self.rig.guarded(disk)
        return True

    async def close(self) -> None:
        """Ends the tier in order."""
        tier, self.tier = self.tier, None
        if tier is not None:
            await tier.close()
            self.rig.checked.clear()
        self._shut()

    def _shut(self) -> None:
        files, self.files = self.files, None
        if files is not None:
            with contextlib.suppress(OSError):
                files.shut()

    async def do(self, step: Step) -> None:
        """Does one step. What it asks has to be answered, whatever the device does."""
        if step.act == "open":
            await self.open()
        elif step.act == "close":
            await self.close()
        elif step.act == "sync":
            await self.rig.clock.advance(SYNC_AFTER_S + 1)
        elif self.tier is not None:
            await self._ask(self.tier, step)

    async def _ask(self, tier: Tier, step: Step) -> None:
        if step.act == "store":
            for ref in (ref_of(step.chain, at) for at in range(step.first, step.last)):
                self.contents[ref].add(step.variant)
            await tier.store(blocks_of(step))
        elif step.act == "load":
            await self.read(tier, [ref_of(step.chain, at) for at in range(step.first, step.last)])
        else:
            # Who asks for oblivion has to know, so this alone may raise; then either is right.
            with contextlib.suppress(TierError):
                await self._forget(tier, step)

    async def _forget(self, tier: Tier, step: Step) -> None:
        if step.act == "discard":
            refs = [ref_of(step.chain, at) for at in range(step.first, step.last)]
            await tier.discard(refs)
        else:
            namespace = ref_of(step.chain, 0).namespace
            refs = [ref for ref in self.contents if ref.namespace == namespace]
            await tier.clear(namespace)
        for ref in refs:
            self.contents[ref].clear()

    async def read(self, tier: Tier, refs: Sequence[BlockRef]) -> int:
        """How many blocks the tier delivers; each is judged."""
        loads = [Load(ref, memoryview(bytearray(BLOCK_BYTES))) for ref in refs]
        delivered = 0
        for load, loaded in zip(loads, await tier.load(loads), strict=True):
            if loaded is None:
                continue
            delivered += 1
            known = [v for v in (0, 1) if data_of(load.ref, BLOCK_BYTES, v) == bytes(load.into)]
            if not known:
                self.wrong.append("wrong bytes")
            elif known[0] not in self.contents[load.ref]:
                self.wrong.append("a block that was forgotten is back")
        return delivered

    async def back_after_s(self) -> float | None:
        """Simulated time until the tier stores and serves again; None: not in time."""
        waited_s = 0.0
        while waited_s <= BACK_WITHIN_S:
            if self.tier is not None or await self.open():
                assert self.tier is not None
                blocks = blocks_of(Step("store", f"new {waited_s}", 0, 3))
                if await self._serves(self.tier, blocks):
                    return waited_s
            await self.rig.clock.advance(STEP_S)
            waited_s += STEP_S
        return None

    async def _serves(self, tier: Tier, blocks: list[Block]) -> bool:
        for block in blocks:
            self.contents[block.ref].add(0)
        stored = await tier.store(blocks)
        return all(stored) and await self.read(tier, [b.ref for b in blocks]) == len(blocks)

    def _judge_announcement(self) -> None:
        """No more blocks of a segment may be announced than are on the device for certain."""
        segment_id, blocks, _ = self.rig.sealed[-1]
        self.announced[segment_id] += blocks
        file = file_name(segment_id)
        places = SegmentImage.of(self.root).places(file)
        safe = sum(
            place.kind == BLOCK_KIND and self.fault.durability.safe(file, place.offset, place.size)
            for place in places
        )
        if self.announced[segment_id] > safe:
            self.wrong.append("announced to be on the device, and is not for certain")


def run(setting: Setting) -> Sequence[Finding]:
    """All points, or a sample of them if there are more than trials."""
    tally = Tally()
    home = fast_directory("kvstore-failing-")
    try:
        with quiet():
            points = asyncio.run(_run(setting, home, tally))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    trials = tally.trials.total()  # One for each point.
    late = tally.noted["not back in time"]
    details = {"points": points, "all_points": trials == points, **tally.details()}
    return [
        passed(tally.failures.total(), trials, **details),
        passed(late, trials, slowest_s=max((float(s) for s in _waits(tally)), default=0.0)),
    ]


def _waits(tally: Tally) -> list[str]:
    return [note.removeprefix("back after s: ") for note in tally.noted if "back after" in note]


async def _run(setting: Setting, home: Path, tally: Tally) -> int:
    rng = random.Random(setting.seed)
    points = [point for play in PLAYS for point in await _points(play, home)]
    if setting.size != "long":
        points = _one_error_each(rng, points)
    chosen = points if len(points) <= setting.trials else rng.sample(points, k=setting.trials)
    for number, point in enumerate(chosen):
        root = home / str(number)
        await _try(point, root, rng.random(), tally)
        shutil.rmtree(root, ignore_errors=True)
        setting.tick(1)
    return len(points)


def _one_error_each(rng: random.Random, points: list[Point]) -> list[Point]:
    """Every call, once and from then on, with one of the errors that it can meet."""
    groups: defaultdict[tuple[str, int, bool], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.play, point.call, point.lasting].append(point)
    return [rng.choice(group) for group in groups.values()]


async def _points(play: str, home: Path) -> list[Point]:
    """Every call of an undisturbed run, with everything that can happen to it."""
    names: list[str] = []

    def noted(call: Call) -> object:
        names.append(call.name)
        return call.complete()

    steps, capacity_bytes = PLAYS[play]
    idle = Fault(Point(play, 0, "", 0, lasting=False), 0.0, Durability(), over=True)
    ordeal = Ordeal(home / "rehearsal", capacity_bytes, idle)
    with standing_in(SystemCalls(noted)):
        for step in steps:
            await ordeal.do(step)
    await ordeal.close()
    shutil.rmtree(home / "rehearsal")
    return [
        Point(play, number, name, fault, lasting)
        for number, name in enumerate(names, start=1)
        for fault in (*ERRORS.get(name, OTHERS), *((SHORT,) if name in READS | WRITES else ()))
        for lasting in (False, True)
    ]


async def _try(point: Point, root: Path, cut_at: float, tally: Tally) -> None:
    steps, capacity_bytes = PLAYS[point.play]
    fault = Fault(point, cut_at, Durability())
    ordeal = Ordeal(root, capacity_bytes, fault)
    handles = _open_handles()
    try:
        with standing_in(SystemCalls(fault)):
            for step in (*steps, *PRESSURE):
                await ordeal.do(step)
            fault.over = True
            await _judge(ordeal, tally)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
        ordeal.wrong.append(f"{type(error).__name__} instead of an answer: {error}")
        with contextlib.suppress(Exception):
            await ordeal.close()
    tally.tried(point.play, point.kind)
    tally.note("faults that fired", fault.fired)
    if not fault.fired:
        ordeal.wrong.append("the fault did not fire")
    if _open_handles() > handles:
        ordeal.wrong.append("a file was left open")
    for what in dict.fromkeys(ordeal.wrong):
        tally.failed(point.play, what, f"call {point.call} ({point.kind})")


async def _judge(ordeal: Ordeal, tally: Tally) -> None:
    """After the fault is over: serving soon, and all right before and after a restart."""
    waited_s = await ordeal.back_after_s()
    if waited_s is None:
        tally.note("not back in time")
        ordeal.wrong.append("the tier does not come back")
    else:
        tally.note(f"back after s: {waited_s}")
    for _ in range(2):
        if ordeal.tier is not None:
            await ordeal.read(ordeal.tier, list(ordeal.contents))
        for checked in ordeal.rig.checked:
            checked.check()
        await ordeal.close()
        if not await ordeal.open():
            ordeal.wrong.append("the next start is refused")
    await ordeal.close()


def _open_handles() -> int:
    return len(os.listdir("/proc/self/fd"))


PROOF = Proof(
    module="failing_io",
    about="Lets each I/O call of a scripted run of the disk tier fail, once and from then on.",
    claims=[
        Claim("the n-th I/O call fails: unanswered requests, wrong bytes, false promises",
              "failures", "0, every point"),
        Claim("the n-th I/O call fails: tier back within 5 s after the fault ends",
              "trials late", "0, every point"),
    ],
    trials={"test": 40, "short": 1_500, "long": 20_000},
    run=run,
)  # fmt: skip

if __name__ == "__main__":
    main(PROOF)
