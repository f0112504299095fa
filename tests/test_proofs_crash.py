"""The proofs of crashes, damage and failing I/O: they hold, and they bite.

Each runs here in its shortest form. Then bugs are planted in the product, and the proof has to
find them: a proof that cannot fail proves nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import failing_io, full_disk, kill_anywhere, kill_every_call, mutations
from benchmarks.crash.nursery import Nursery
from benchmarks.harm import disk as harm_disk
from benchmarks.harm import reads as harm_reads
from benchmarks.harm import records as harm_records
from benchmarks.harm import redis as harm_redis
from benchmarks.proof import Finding, Proof, Setting
from benchmarks.tally import Tally
from kvstore import record
from kvstore.api.digest import DIGEST_BYTES
from kvstore.tiers import disk_reader, disk_writer, redis_parts, segment, segment_log

PROOFS = [
    mutations.PROOF,
    kill_every_call.PROOF,
    kill_anywhere.PROOF,
    failing_io.PROOF,
    full_disk.PROOF,
]


def setting(seed: int, trials: int) -> Setting:
    """So many trials, in the shortest form."""
    return Setting(trials, str(seed), "test", lambda done: None)


def shortest(proof: Proof, seed: int) -> Sequence[Finding]:
    """What a proof finds in its shortest form."""
    return proof.run(setting(seed, proof.trials["test"]))


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.module)
def test_the_proof_holds(proof: Proof, seed: int) -> None:
    """No claim is broken; one that could not be tried says why."""
    findings = shortest(proof, seed)
    assert len(findings) == len(proof.claims)
    for finding in findings:
        assert finding.ok is not False, (seed, finding)
        assert finding.trials if finding.ok else finding.reason


# Planted bugs: mutations.


async def harmed(harm: mutations.Harm, trials: int) -> Tally:
    """What was seen of one surface in so many trials."""
    tally = Tally()
    await mutations.mutate_one(harm, setting(7, trials), tally, trials)
    await harm.close()
    return tally


def believe_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The payload's digest is not looked at."""

    def check(header: record.Header, name: bytes, payload: memoryview) -> None:
        if header.name != name:
            raise record.Damaged("another block")

    def decode(header: record.Header, name: bytes, payload: memoryview, into: memoryview) -> bytes:
        check(header, name, payload)
        if len(into) != len(payload):
            raise record.Damaged("another block")
        into[:] = payload
        return header.digest

    for module in (harm_records, disk_reader, redis_parts):
        monkeypatch.setattr(module, "decode_block", decode)
    monkeypatch.setattr(redis_parts, "check_payload", check)


@pytest.mark.parametrize(
    ("harm", "trials"),
    [
        (harm_records.RecordHarm, 1000),
        (harm_disk.DiskHarm, 300),
        (harm_redis.RedisHarm, 200),
    ],
)
async def test_an_unchecked_payload_is_found(
    monkeypatch: pytest.MonkeyPatch, harm: Any, trials: int
) -> None:
    """Wrong bytes are counted on every surface that decodes records."""
    believe_payloads(monkeypatch)
    tally = await harmed(harm(), trials)
    assert any("wrong bytes" in what for what in tally.failures)


async def test_an_unchecked_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record under another block's name passes every digest; the mix-up is counted."""
    decode = record.decode_block

    def careless(
        header: record.Header, name: bytes, payload: memoryview, into: memoryview
    ) -> bytes:
        return decode(header, header.name, payload, into)

    monkeypatch.setattr(harm_records, "decode_block", careless)
    tally = await harmed(harm_records.RecordHarm(), 5000)
    assert any("another's record" in what for what in tally.failures)


async def test_a_client_that_believes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not check the digest of what arrives delivers wrong bytes."""
    constant = bytes(DIGEST_BYTES)

    class AlwaysRight(bytes):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = bytes.__hash__

    monkeypatch.setattr(
        "kvstore_client.arrivals.BlockDigest.digest", lambda self: AlwaysRight(constant)
    )
    tally = await harmed(harm_reads.ReadHarm(), 500)
    assert any("wrong bytes" in what for what in tally.failures)


# Planted bugs: kills.


def killed(trials: int, seed: int) -> Finding:
    """What SIGKILL at calls finds."""
    (finding,) = kill_every_call.PROOF.run(setting(seed, trials))
    return finding


def test_a_torn_tail_that_is_believed_is_found(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A tier that takes a record whose write was cut off serves holes in place of its bytes."""
    monkeypatch.setattr(segment, "is_intact", lambda *parts: True)
    believe_payloads(monkeypatch)
    assert "wrong bytes" in str(killed(160, seed).details)


def test_a_forget_record_that_is_not_written_is_found(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What was discarded comes back at the next start."""

    async def forget(self: object, headers: object) -> None:
        return

    monkeypatch.setattr(disk_writer.DiskWriter, "_forget", forget)
    assert "forgotten is back" in str(killed(40, seed).details)


@pytest.mark.parametrize(
    ("bug", "claim"), [("forget_in_memory_only", 0), ("lose_what_was_not_sealed", 1)]
)
def test_nodes_with_a_bug_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bug: str, claim: int
) -> None:
    """Phantoms, and sealed blocks that are missing, in real processes that were killed."""
    monkeypatch.setenv("KVSTORE_PLANTED", bug)
    tally = kill_anywhere.kill(setting(3, 3), Nursery("tests.planted_nursery"), tmp_path)
    findings = kill_anywhere.findings(tally)
    assert findings[claim].ok is False


# Planted bugs: failing I/O.


def test_an_announcement_before_the_sync_is_found(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whoever says "on the device" first and syncs afterwards is caught."""

    def hasty(self: Any, segment_id: int) -> None:
        return

    monkeypatch.setattr(segment_log.SegmentLog, "_sync", hasty)
    findings = failing_io.PROOF.run(setting(seed, 5))
    assert "not for certain" in str(findings[0].details)


def test_an_error_that_is_not_answered_is_found(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """An exception in place of a miss is counted."""
    write = segment_log.SegmentLog.write

    def raising(self: Any, *arguments: Any) -> None:
        try:
            write(self, *arguments)
        except OSError:
            raise RuntimeError("planted") from None

    monkeypatch.setattr(segment_log.SegmentLog, "write", raising)
    findings = failing_io.PROOF.run(setting(seed, 40))
    assert "instead of an answer" in str(findings[0].details)
