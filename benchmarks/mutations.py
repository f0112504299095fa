"""Mutations of everything that stores or carries blocks: never a wrong byte, never a crash.

`python -m benchmarks.mutations`
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from benchmarks.harm.disk import DiskHarm
from benchmarks.harm.memory_limit import spare_memory
from benchmarks.harm.reads import ReadHarm
from benchmarks.harm.records import RecordHarm
from benchmarks.harm.redis import RedisHarm
from benchmarks.harm.wire import WireHarm
from benchmarks.proof import Claim, Finding, Proof, Setting, main, passed
from benchmarks.quiet import quiet
from benchmarks.tally import Tally

SPARE_BYTES = 768 << 20
"""What may be allocated at once while harm is done: far less than a length that was believed."""


class Harm(Protocol):
    """Something that can be mutated: its surface."""

    async def trials(self, rng: random.Random, note: str, tally: Tally) -> None:
        """Makes and judges one batch of mutations, with controls among them."""

    async def close(self) -> None:
        """Lets go of what it holds."""


SHARES: Mapping[Callable[[], Harm], float] = {
    RecordHarm: 0.30,
    ReadHarm: 0.25,
    DiskHarm: 0.20,
    RedisHarm: 0.15,
    WireHarm: 0.10,
}
"""Which part of the trials each surface gets, by what they cost and what they find."""


def run(setting: Setting) -> Sequence[Finding]:
    """Mutates every surface in turn."""
    with quiet():
        tally = asyncio.run(mutate(setting, SHARES))
    trials, failures = tally.trials.total(), tally.failures.total()
    controls, lost = tally.controls.total(), tally.lost_controls.total()
    return [
        passed(failures, trials, seed=setting.seed, **tally.details()),
        passed(lost, controls, by_surface=dict(tally.controls)),
    ]


async def mutate(setting: Setting, shares: Mapping[Callable[[], Harm], float]) -> Tally:
    """Every surface with its share of the trials."""
    tally = Tally()
    for make, share in shares.items():
        harm = make()
        try:
            with spare_memory(SPARE_BYTES):
                await mutate_one(harm, setting, tally, round(setting.trials * share))
        finally:
            await harm.close()
    return tally


async def mutate_one(harm: Harm, setting: Setting, tally: Tally, trials: int) -> None:
    """So many trials of one surface, or a few more."""
    name, batch = type(harm).__name__, 0
    start = done = tally.trials.total()
    while done < start + trials:
        note = f"seed {setting.seed}, {name} batch {batch}"
        await harm.trials(random.Random(note), note, tally)
        batch += 1
        setting.tick(tally.trials.total() - done)
        done = tally.trials.total()


PROOF = Proof(
    module="mutations",
    about="Mutates segments, Redis values, records and wire frames, and reads what came of them.",
    claims=[
        Claim(
            "mutations: undetected wrong bytes, undeclared errors, oversized allocations",
            "failures",
            "0 in 1,000,000",
            1_000_000,
        ),
        Claim("mutations: unmutated controls that were not served", "controls", "0", 50_000),
    ],
    trials={"test": 2_000, "short": 40_000, "long": 1_100_000},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
