"""The proofs of eviction hold in their shortest form, and they bite."""

from collections.abc import Sequence

import pytest

from benchmarks import eviction, hints, policy_cost
from benchmarks.proof import Finding, Proof, Setting
from benchmarks.traces import SHAPES, generate, misled
from kvstore.policy import contest
from kvstore.policy.experts import hazard


def shortest(proof: Proof, seed: int) -> Sequence[Finding]:
    """What a proof finds in its shortest form."""
    return proof.run(Setting(proof.trials["test"], str(seed), "test", lambda done: None))


@pytest.mark.parametrize("proof", [eviction.PROOF, hints.PROOF], ids=lambda proof: proof.module)
def test_the_proof_holds(proof: Proof, seed: int) -> None:
    """No claim is broken; one that could not be tried says why."""
    findings = shortest(proof, seed)
    assert len(findings) == len(proof.claims)
    for finding in findings:
        assert finding.ok is not False, (seed, finding)
        assert finding.ok or finding.reason


def test_the_cost_is_measured(seed: int) -> None:
    """Memory holds also here; time is no matter for a test on a busy machine."""
    time, state = shortest(policy_cost.PROOF, seed)
    assert time.figure is not None
    assert time.figure > 0
    assert state.ok, state


def test_a_default_that_never_follows_anybody_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is LRU, and far below the best of the others."""
    monkeypatch.setattr(contest, "_MARGIN", 1e9)
    findings = shortest(eviction.PROOF, 1)
    assert [finding.ok for finding in findings] == [True, False, True, False]


def test_hints_that_are_not_looked_at_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then true ones gain nothing."""
    trace = generate("mixed", 1500, "1")
    bare = hints.rate(trace.hinted([None] * len(trace.requests)), 0.05)
    assert hints.rate(trace, 0.05) > bare + 1
    monkeypatch.setattr(hazard, "class_of_request", lambda hint, turn, tokens: 0)
    assert hints.rate(trace, 0.05) < bare + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_generated_traces_repeat_and_make_sense(shape: str) -> None:
    """The same seed gives the same trace; times go on, chains share, hints are there."""
    one, two, other = (generate(shape, 400, seed) for seed in ("a", "a", "b"))
    assert one == two
    assert one.requests != other.requests
    times = [request.at_s for request in one.requests]
    assert times == sorted(times)
    assert 0 < one.infinite_token_hit_rate < 1
    assert all(request.hint is not None for request in one.requests)
    lies = misled(one, 0.3, "x")
    false = sum(lie != request.hint for lie, request in zip(lies, one.requests, strict=True)) / len(
        lies
    )
    assert false == pytest.approx(0.3, abs=0.2)
