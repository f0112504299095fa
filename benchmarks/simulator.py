"""The simulator: many short histories of a small cluster, with every promise checked at each step.

Nodes, tiers, leases and policies are the real ones; time, files, Redis, network and the order of
events are drawn from a seed. `--seed X` is the series of histories X:0, X:1 and so on; one of them
is repeated by `--seed X:7 --trials 1`.
"""

import logging
import sys
from collections import Counter
from typing import Any

from benchmarks.proof import Claim, Finding, Proof, Setting, Size, main, not_run, passed
from tests.sim.world.planted import BUGS, Bug, planted
from tests.sim.world.world import Outcome, run

LOG_LINES = 40
BUG_SEEDS: dict[Size, int] = {"test": 0, "short": 25, "long": 2000}
"""In so many histories a planted bug must show; only the long form has time for all of them."""
REPORTED = 3


def seed_of(series: str, number: int) -> str:
    """The seed of one history of a series; a series that names one history begins with it."""
    base, colon, first = series.rpartition(":")
    if colon and first.isdigit():
        return f"{base}:{int(first) + number}"
    return f"{series}:{number}"


def live(setting: Setting) -> list[Finding]:
    """Lives through the histories, then plants the bugs."""
    logging.disable(logging.CRITICAL)  # The store says much while everything breaks.
    try:
        broken: list[Outcome] = []
        steps, faults = 0, Counter[str]()
        for number in range(setting.trials):
            outcome = run(seed_of(setting.seed, number))
            steps += outcome.steps
            faults += outcome.faults
            if outcome.broken:
                broken.append(outcome)
                if len(broken) <= REPORTED:
                    tell(outcome)
            setting.tick(1)
        details: dict[str, Any] = {
            "broken": {outcome.seed: outcome.broken for outcome in broken},
            "faults": dict(faults),
        }
        return [
            passed(len(broken), setting.trials, **details),
            passed(len(broken), steps),
            _plant_all(setting),
        ]
    finally:
        logging.disable(logging.NOTSET)


def tell(outcome: Outcome) -> None:
    """Says what broke, and how to see it again."""
    lines = [*outcome.log[-LOG_LINES:], f"BROKEN after {outcome.steps} steps: {outcome.broken}"]
    again = f"python -m benchmarks.simulator --trials 1 --seed {outcome.seed}"
    sys.stderr.write("\n".join([*lines, again, ""]))


def find(bug: Bug, series: str, most: int) -> Outcome | None:
    """The first history of a series that breaks with the bug, and does not without it."""
    for number in range(most):
        seed = seed_of(series, number)
        with planted(bug):
            outcome = run(seed)
        if outcome.broken and not run(seed).broken:
            return outcome
    return None


def _plant_all(setting: Setting) -> Finding:
    most = BUG_SEEDS[setting.size]
    if not most:
        return not_run("the short and the long form plant bugs")
    bugs = [bug for bug in BUGS if bug.quick or setting.size == "long"]
    found: dict[str, Outcome | None] = {}
    for bug in bugs:
        found[bug.name] = find(bug, f"bug {setting.seed}", most)
    missed = [name for name, outcome in found.items() if outcome is None]
    table = {
        name: f"seed {outcome.seed}, step {outcome.steps}: {outcome.broken}"
        if outcome
        else "missed"
        for name, outcome in found.items()
    }
    return Finding(len(bugs) - len(missed), not missed, len(bugs), len(missed), "", {"bugs": table})


PROOF = Proof(
    module="simulator",
    about=__doc__ or "",
    claims=[
        Claim("simulator: seeds with a broken promise", "seeds", "0 in 10,000", trials_goal=10_000),
        Claim("simulator: the same, in steps", "seeds", "0 in 1,000,000", trials_goal=1_000_000),
        Claim("simulator: planted bugs caught", "bugs", f"all of {len(BUGS)}, in the long form"),
    ],
    trials={"test": 30, "short": 120, "long": 10_000},
    run=live,
    beside=(),
)

if __name__ == "__main__":
    main(PROOF)
