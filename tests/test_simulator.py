"""The simulator in its shortest form: a few histories, that they repeat, and that it bites."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulator import LOG_LINES, find, seed_of
from tests.sim.world.loop import SimulatedLoop, Stuck
from tests.sim.world.planted import BUGS, Bug, Edit, planted
from tests.sim.world.world import run

ROOT = Path(__file__).resolve().parent.parent
HISTORIES = 25
BUG_HISTORIES = 12
FEW_BUGS = (
    "write: a block's digest is not checked",
    "eviction ignores leases",
    "discard forgets in memory alone",
    "a breaker never closes",
)


def test_no_promise_breaks(seed: int) -> None:
    """In a few dozen histories, each from a seed of its own, which is printed if one breaks."""
    faults = 0
    for number in range(HISTORIES):
        outcome = run(seed_of(f"{seed}", number))
        log = "\n".join(outcome.log[-LOG_LINES:])
        assert not outcome.broken, f"{log}\nseed {outcome.seed}: {outcome.broken}"
        faults += sum(outcome.faults.values())
    assert faults, "nothing went wrong, so nothing was tried"


def test_a_history_repeats() -> None:
    """The same seed is the same history, in another process and with other hashes, too."""
    digests = {run("again").digest, run("again").digest}
    code = "from tests.sim.world.world import run; print(run('again').digest)"
    for hashes in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hashes}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        digests.add(ran.stdout.strip())
    assert len(digests) == 1
    assert digests != {run("another").digest}


@pytest.mark.parametrize("name", FEW_BUGS)
def test_a_planted_bug_is_found(name: str) -> None:
    """Within a few histories, none of which breaks without it."""
    [bug] = [bug for bug in BUGS if bug.name == name]
    assert find(bug, "bug", BUG_HISTORIES) is not None


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_can_be_planted(bug: Bug) -> None:
    """The code has the lines that the bug changes, and has them again afterwards."""
    with planted(bug):
        pass
    with planted(bug):
        pass


def test_a_bug_that_no_longer_fits_is_noticed() -> None:
    """Rather than that its absence passes for a bug that was caught, or missed."""
    edit = Edit("kvstore.leases:LeaseTable.reserve", "what nobody would write", "")
    with pytest.raises(LookupError, match="0 times"), planted(Bug("moved on", (edit,))):
        pass


def test_all_planted_bugs_are_listed() -> None:
    """Where the reader is told what the simulator is known to find."""
    told = (ROOT / "docs" / "trust.md").read_text()
    assert [bug.name for bug in BUGS if bug.name not in told] == []


def test_what_goes_on_for_ever_is_noticed() -> None:
    """Also where something always is left to do, so that time never moves."""

    loop = SimulatedLoop()

    def again() -> None:
        loop.call_soon(again)

    again()
    with pytest.raises(Stuck, match="for ever"):
        loop.run_forever()
    loop.close()


def test_the_loop_of_simulated_time_costs_no_time() -> None:
    """It jumps to the next timer, in order, and says so if nobody will ever wake up."""
    loop = SimulatedLoop()
    woken: list[float] = []

    async def sleeper(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append(loop.time())

    async def all_of_them() -> None:
        async with asyncio.timeout(5000):
            await asyncio.gather(*(sleeper(seconds) for seconds in (3600, 1, 0, 60)))

    loop.run_until_complete(all_of_them())
    assert woken == [0, 1, 60, 3600]
    waiting = loop.create_task(asyncio.Event().wait())
    with pytest.raises(Stuck):
        loop.run_until_complete(waiting)
    waiting.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
