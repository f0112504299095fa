"""The proofs of the service in their smallest form, and a planted bug that each one catches."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from benchmarks import cancelled, herd, overload, redis_faults
from benchmarks.proof import Finding, Proof, Setting, not_run
from kvstore.admission import Admission
from kvstore.api.tier import BlockRef
from kvstore.tiers.guarded import Guarded
from kvstore.tiers.lending import Lending, Lent
from kvstore.tiers.tiered import Tiered
from tests.sim.nodes import Nodes


def run(proof: Proof, seed: int, trials: int = 0, **options: Any) -> list[Finding]:
    """The findings of one run in test size."""
    trials = trials or proof.trials["test"]
    setting = Setting(trials, str(seed), "test", lambda done: None, **options)
    findings = list(proof.run(setting))
    assert len(findings) == len(proof.claims)
    return findings


def holds(findings: list[Finding]) -> None:
    """All claims were tried, and none is broken."""
    assert [(finding.ok, finding.reason) for finding in findings] == [(True, "")] * len(findings), [
        finding.details for finding in findings if not finding.ok
    ]


def test_a_herd_causes_one_read(seed: int) -> None:
    """Over disk and Redis, with leases and without."""
    holds(run(herd.PROOF, seed))


def test_a_herd_without_single_flight_is_caught(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every caller without a lease reads for himself."""

    async def lend(self: Lending, sizes: Mapping[BlockRef, int]) -> dict[BlockRef, Lent]:
        mine = Lending(self._inner, self._metrics, keep_bytes=0)
        lent: dict[BlockRef, Lent] = await original(mine, sizes)
        return lent

    original: Callable[..., Any] = Lending.lend
    monkeypatch.setattr(Lending, "lend", lend)
    findings = run(herd.PROOF, seed, trials=4)
    assert [finding.ok for finding in findings] == [False, False]
    assert all(finding.figure and finding.figure > 1 for finding in findings)


def test_what_is_cancelled_or_killed_leaves_nothing(seed: int) -> None:
    """Calls of all kinds, in the middle."""
    holds(run(cancelled.PROOF, seed))


def _leave_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiered, "release", lambda self, acquired: None)


def _leave_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "_give_back", lambda self, client, size: None)
    monkeypatch.setattr(Admission, "_room_for", lambda self, size: True)
    monkeypatch.setattr(Admission, "_client_allows", lambda self, client, size: True)
    monkeypatch.setattr(Admission, "check", lambda self: None)


def test_what_is_left_behind_is_caught(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the end of a call gives back neither its pins nor what it was charged for."""
    monkeypatch.setattr(cancelled, "GRACE_S", 0.1)
    monkeypatch.setattr(cancelled, "check_node", lambda server: None)
    monkeypatch.setattr(Nodes, "finish", _stop_unchecked)
    monkeypatch.setattr(cancelled, "_killed", _nobody_is_killed)
    honest: Callable[..., Any] = cancelled._cancelled

    async def planted(*arguments: Any) -> Finding:
        _leave_pins(monkeypatch)
        _leave_bytes(monkeypatch)
        finding: Finding = await honest(*arguments)
        return finding

    monkeypatch.setattr(cancelled, "_cancelled", planted)
    first, _ = run(cancelled.PROOF, seed, trials=72)
    assert first.ok is False
    assert set(first.details["left"]) >= {"pins", "bytes in flight", "admitted calls"}


async def _nobody_is_killed(*arguments: object) -> Finding:
    return not_run("not in this test")


async def _stop_unchecked(nodes: Nodes) -> None:
    for client in nodes._clients:
        await client.close()
    for server in nodes._servers:
        await server.stop()


def test_a_redis_that_fails_fails_no_call(seed: int) -> None:
    """A frozen one in the middle of a read, and one that is out of memory.

    Whether its misses come in time is for a quiet machine to say.
    """
    calls, _, breaker, recovery = run(redis_faults.PROOF, seed)
    holds([calls, breaker, recovery])


def test_a_missing_deadline_is_caught(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: look-ups wait as long as the client of Redis does, and that waits twice as long.

    With its right timeout alone that client bounds what the node forgot to.
    """
    honest: Callable[..., Any] = Guarded._answer

    async def patient(self: Guarded, call: Any, miss: Any, timeout_s: float, *breakers: Any) -> Any:
        return await honest(self, call, miss, 60.0, *breakers)

    monkeypatch.setattr(Guarded, "_answer", patient)
    patience_s = 2 * redis_faults.BATCH_S
    monkeypatch.setattr(redis_faults, "BATCH_S", patience_s)
    # Several late answers come while they are still judged.
    monkeypatch.setitem(redis_faults.STAYS_S, "test", 4 * patience_s)
    failed, beyond, _, _ = run(redis_faults.PROOF, seed, trials=1)
    assert failed.ok, "late is not failed"
    assert beyond.ok is False
    assert beyond.figure
    assert beyond.figure > 20


def test_goodput_holds_under_overload(seed: int) -> None:
    """Ten times what the tier can deliver: the peak is kept, the rest is refused.

    How soon it is refused is for a quiet machine to say.
    """
    goodput, rejects, memory = run(overload.PROOF, seed)
    holds([goodput, memory])
    assert rejects.trials > 0


def test_a_node_that_takes_everything_is_caught(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: no bound anywhere; nothing is refused, and hardly anything arrives in time."""
    monkeypatch.setattr(overload, "NODE", "tests.planted_overload")
    monkeypatch.setattr(overload, "DEADLINE_S", 0.3)
    goodput, rejects, _ = run(overload.PROOF, seed, trials=1)
    assert (goodput.ok, rejects.ok) == (False, False)
