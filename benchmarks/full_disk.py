"""ENOSPC on file systems that are really full, with a real node and real clients.

`python -m benchmarks.full_disk`
"""

import json
import subprocess
import sys
from collections.abc import Sequence

# Not used here: it is what the processes of the rounds run, and what the digest is to cover.
from benchmarks.crash import full_ordeal  # noqa: F401
from benchmarks.proof import Claim, Finding, Proof, Setting, main, not_run, passed

KINDS = ("tmpfs", "ext4")
TIMEOUT_PER_ROUND_S = 60.0
START_S = 60.0


def run(setting: Setting) -> Sequence[Finding]:
    """The rounds of each kind of volume, each kind in a process of its own."""
    findings = []
    for kind in KINDS:
        findings.append(_try(kind, setting))
        setting.tick(setting.trials // len(KINDS))
    return findings


def _try(kind: str, setting: Setting) -> Finding:
    rounds = max(1, setting.trials // len(KINDS))
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.crash.full_volume", kind, str(rounds), setting.seed],
            capture_output=True,
            text=True,
            check=False,
            timeout=START_S + rounds * TIMEOUT_PER_ROUND_S,
        )
    except subprocess.TimeoutExpired:
        return passed(1, rounds, seen=["the node hung"])
    if ran.returncode:
        return passed(1, rounds, seen=[ran.stderr[-500:]])
    seen = json.loads(ran.stdout.splitlines()[-1])
    if "forbidden" in seen:
        return not_run(seen["forbidden"])
    failures = list(seen.pop("failures"))
    if not seen["writes_without_room"]:
        failures.append("no write met a full volume")
    return passed(len(failures), rounds, seen=failures, **seen)


PROOF = Proof(
    module="full_disk",
    about="Fills small file systems under a running node, and makes room again.",
    claims=[
        Claim(
            f"ENOSPC on a really full {kind}: unanswered requests, wrong bytes, "
            "disk not back within 5 s",
            "failures",
            "0",
        )
        for kind in KINDS
    ],
    trials={"test": 2, "short": 6, "long": 60},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
