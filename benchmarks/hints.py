"""What reuse hints are worth, and that false ones do no harm."""

from collections.abc import Mapping, Sequence

from benchmarks.eviction import CAPACITIES, STAND_IN, TRACE_SEED, blocks_of
from benchmarks.proof import Claim, Finding, Proof, Setting, Size, main, not_run
from benchmarks.traces import generate, misled
from kvstore.policy.policies import DEFAULT, make_policy
from kvstore.replay.replay import replay
from kvstore.replay.runs import Source
from kvstore.replay.trace import Trace

GOALS = {0.01: 20.0, 0.05: 33.0, 0.1: 35.0}
"""Token hit rate in % with true hints, by share of the trace's blocks."""
FALSE_SHARE = 0.3
HARM_POINTS = 0.5
SHARES: Mapping[Size, Sequence[float]] = {
    "test": (0.05,),
    "short": tuple(GOALS),
    "long": CAPACITIES["long"],
}


def rate(trace: Trace, share: float) -> float:
    """The token hit rate of the default policy in %."""
    blocks = blocks_of(trace, share)
    return 100 * replay(trace, make_policy(DEFAULT, blocks), blocks)


def hinted_trace(setting: Setting) -> tuple[Trace, str]:
    """A trace with its hints, and what to say where none was given."""
    if setting.trace is not None and setting.hints is not None:
        return Source(setting.trace, setting.hints).read(), ""
    requests = {"test": 1500, "short": 3000, "long": 8000}[setting.size]
    trace = generate(STAND_IN, requests, TRACE_SEED)
    return trace, (
        f"no trace with hints was given: a generated one of {requests:,} requests, on which "
        "hints must gain, however much"
    )


def run(setting: Setting) -> list[Finding]:
    """Without hints, with true ones, and with false ones for each of the trials."""
    trace, reason = hinted_trace(setting)
    shares = SHARES[setting.size]
    truth = [request.hint for request in trace.requests]
    bare = {share: rate(trace.hinted([None] * len(truth)), share) for share in shares}
    true = {share: rate(trace, share) for share in shares}
    table = {
        f"{share:.0%}": {"without": round(bare[share], 2), "with": round(true[share], 2)}
        for share in shares
    }
    worst = float("inf")
    for trial in range(setting.trials):
        lies = trace.hinted(misled(trace, FALSE_SHARE, f"{setting.seed} {trial}"))
        for share in shares:
            found = rate(lies, share)
            worst = min(worst, found - bare[share])
            table[f"{share:.0%}"][f"false {trial}"] = round(found, 2)
        setting.tick(1)
    results = []
    for share, goal in GOALS.items():
        if share not in shares:
            results.append(not_run(f"the {setting.size} size leaves it out"))
            continue
        reached = true[share] >= (bare[share] if reason else goal)
        results.append(
            Finding(round(true[share], 2), reached, reason=reason, details={"table": table})
        )
    harmless = Finding(
        round(worst, 2), worst >= -HARM_POINTS, setting.trials, reason=reason,
        details={"table": table},
    )  # fmt: skip
    return [*results, harmless]


PROOF = Proof(
    module="hints",
    about="What reuse hints are worth to the default policy, and what false ones cost. Trials are "
    "ways to make 30 % of the hints false.",
    claims=(
        *(
            Claim(f"true hints: token hit rate at {share:.0%}", "%", f">= {goal:g}")
            for share, goal in GOALS.items()
        ),
        Claim("30 % of hints false: over no hints, worst cell", "points", ">= -0.5"),
    ),
    trials={"test": 1, "short": 1, "long": 3},
    run=run,
    beside=(),
)

if __name__ == "__main__":
    main(PROOF)
