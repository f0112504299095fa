"""SIGKILL at every I/O call of a scripted run of the disk tier, then a restart.

`python -m benchmarks.kill_every_call`
"""

import asyncio
import mmap
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.crash.disk_script import (
    PLAYS,
    Judge,
    Stage,
    State,
    Step,
    rehearse,
    served,
    take_new,
)
from benchmarks.crash.system_calls import SECTOR_BYTES, WRITES, Call, SystemCalls, standing_in
from benchmarks.harm.disk import fast_directory
from benchmarks.proof import Claim, Finding, Proof, Setting, main, passed
from benchmarks.quiet import quiet
from benchmarks.tally import Tally
from tests.sim.rig import Rig

SURVIVED, BROKEN = 0, 1
"""Exit statuses of a child that was not killed."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where the child kills itself: before a call, or when a part of a write is done."""

    play: str
    call: int
    torn: bool = False


def run(setting: Setting) -> Sequence[Finding]:
    """All points, or a sample of them if there are more than trials."""
    tally = Tally()
    home = fast_directory("kvstore-kills-")
    try:
        with quiet():
            covered, points = _run(setting, home, tally)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    details = {"points": points, "covered": covered, "all_points": covered == points}
    return [passed(tally.failures.total(), covered, **details, **tally.details())]


def _run(setting: Setting, home: Path, tally: Tally) -> tuple[int, int]:
    judges: dict[str, Judge] = {}
    points: list[Point] = []
    for play, (steps, capacity_bytes) in PLAYS.items():
        names, states = _rehearse(home / f"{play}-rehearsal", steps, capacity_bytes)
        judges[play] = Judge(steps, states, strict=play == "ample")
        for number, name in enumerate(names, start=1):
            points.append(Point(play, number))
            if name in WRITES:
                points.append(Point(play, number, torn=True))
    rng = random.Random(setting.seed)
    chosen = points if len(points) <= setting.trials else rng.sample(points, k=setting.trials)
    for number, point in enumerate(chosen):
        root = home / str(number)
        _try(point, root, rng.random(), judges[point.play], tally)
        shutil.rmtree(root)
        setting.tick(1)
    return len(chosen), len(points)


def _rehearse(
    root: Path, steps: Sequence[Step], capacity_bytes: int
) -> tuple[list[str], list[State]]:
    """The names of the I/O calls of an undisturbed run, and what was there after each step."""
    names: list[str] = []

    def noted(call: Call) -> object:
        names.append(call.name)
        return call.complete()

    with standing_in(SystemCalls(noted)):
        asyncio.run(_play(root, steps, capacity_bytes, lambda done: None))
    shutil.rmtree(root)
    states = asyncio.run(rehearse(root, steps, capacity_bytes))
    shutil.rmtree(root)
    return names, states


async def _play(
    root: Path, steps: Sequence[Step], capacity_bytes: int, done: Callable[[int], None]
) -> None:
    stage = Stage(root, capacity_bytes)
    for number, step in enumerate(steps, start=1):
        await stage.do(step)
        done(number)


class Progress:
    """How many steps a child has done, in memory that outlives it."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)

    def __call__(self, done: int) -> None:
        self._shared[0] = done

    @property
    def done(self) -> int:
        """As the child last said."""
        return self._shared[0]

    def close(self) -> None:
        """Lets go of the memory."""
        self._shared.close()


def _try(point: Point, root: Path, cut_at: float, judge: Judge, tally: Tally) -> None:
    capacity_bytes = PLAYS[point.play][1]
    progress = Progress()
    child = os.fork()
    if not child:
        _be_killed(point, root, cut_at, judge.steps, progress)
    _, status = os.waitpid(child, 0)
    tally.tried("torn write" if point.torn else "before a call", point.play)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        tally.failed(point.play, "the run was not killed where it should be", str(point))
    for fault in asyncio.run(_faults(root, capacity_bytes, judge, progress.done)):
        tally.failed(point.play, fault, f"{point}, {progress.done} steps done")
    progress.close()


def _be_killed(
    point: Point, root: Path, cut_at: float, steps: Sequence[Step], progress: Progress
) -> None:
    """What the child does; never returns."""

    def through(call: Call) -> object:
        if call.number == point.call:
            if point.torn:
                _tear(call, cut_at)
            os.kill(os.getpid(), signal.SIGKILL)
        return call.complete()

    try:
        with standing_in(SystemCalls(through)):
            asyncio.run(_play(root, steps, PLAYS[point.play][1], progress))
        os._exit(SURVIVED)
    except BaseException:  # noqa: BLE001 - the child must not go on as its parent
        os._exit(BROKEN)


def _tear(call: Call, cut_at: float) -> None:
    """Makes a part of a write."""
    size = int(call.size_bytes * cut_at)
    try:
        call.partly(size)
    except OSError:  # Past the page cache only whole sectors can be written.
        call.partly(size // SECTOR_BYTES * SECTOR_BYTES)


async def _faults(root: Path, capacity_bytes: int, judge: Judge, done: int) -> list[str]:
    """What is wrong when the tier starts again over what the child left."""
    stage = Stage(root, capacity_bytes, Rig())
    try:
        tier = await stage.open()
        found, faults = await served(tier, judge.steps)
        faults += judge.faults(done, found)
        tier.check()
        faults += await take_new(tier)
        tier.check()
        await stage.close()
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
        return [f"the restart raised {type(error).__name__}: {error}"]
    return faults


PROOF = Proof(
    module="kill_every_call",
    about="Kills a scripted run of the disk tier at each of its I/O calls, and inside each write.",
    claims=[Claim("SIGKILL at every I/O call of a scripted run", "failures", "0, every point")],
    trials={"test": 25, "short": 2_000, "long": 10_000},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
