"""What a match found: how much of a chain can be restored, where it lies, what is promised."""

from dataclasses import dataclass
from typing import Self

from kvstore.api.errors import KvstoreError
from kvstore.api.v1 import kvstore_pb2 as pb


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of one space that lay in the same place."""

    blocks: int
    tier: str
    """Where they lay when the node answered; empty: the match rule does not need them, or the
    caller has them."""
    leased: bool
    """True: they stay until read, released or expired. False: they are only likely."""


@dataclass(frozen=True, slots=True)
class Match:
    """The answer to `match`. After a failure it is `Match.none()`."""

    blocks: int
    """The longest length of the chain that every space can restore."""
    spaces: tuple[tuple[Run, ...], ...] = ()
    """For each space of the question the runs that make up `blocks`, in order."""
    lease_id: bytes = b""
    lease_ms: int = 0
    """How long the lease holds from the answer on; 0: nothing is leased."""
    load_estimate_s: float = 0.0
    """What the node expects a load of these blocks to take; 0: unknown."""

    @classmethod
    def none(cls, held_blocks: int = 0) -> Self:
        """Nothing found beyond what the caller has, nothing leased."""
        return cls(held_blocks)

    @classmethod
    def from_wire(cls, reply: pb.MatchReply, spaces: int, keys: int, held_blocks: int = 0) -> Self:
        """The match of a reply. Raises `KvstoreError` if it contradicts itself or the question."""
        blocks = reply.matched_blocks
        if not held_blocks <= blocks <= keys:
            raise KvstoreError(f"matched_blocks: {blocks} of {keys} keys, {held_blocks} held")
        if len(reply.spaces) != spaces:
            raise KvstoreError(f"spaces: {len(reply.spaces)} answered of {spaces}")
        runs = tuple(
            tuple(Run(run.blocks, run.tier, run.leased) for run in space.runs)
            for space in reply.spaces
        )
        for index, space_runs in enumerate(runs):
            total = sum(run.blocks for run in space_runs)
            if total != blocks:
                raise KvstoreError(f"spaces[{index}].runs: {total} blocks, {blocks} matched")
        return cls(blocks, runs, reply.lease_id, reply.lease_ms, reply.load_estimate_us / 1e6)
