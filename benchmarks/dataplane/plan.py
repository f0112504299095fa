"""What is measured: cells, each one path, one operation, one block size, one way of asking."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PATHS = ("shm", "bulk", "grpc", "disk", "redis")
MORE_PATHS = ("peer",)
"""That are measured when they are named. Nothing is put there."""
ALL_PATHS = PATHS + MORE_PATHS
OPS = ("put", "get")
MATCH = "match"
"""The one operation that moves no bytes; its floor is a call that does nothing."""

FLOORS = {
    "shm": "memcpy",
    "bulk": "raw_socket",
    "grpc": "bare_grpc",
    "disk": "raw_file",
    "redis": "raw_resp",
    "peer": "raw_socket",
}
TITLES = {
    "memcpy": "memcpy",
    "raw_socket": "raw socket stream",
    "bare_grpc": "bare grpcio stream",
    "raw_file": "raw O_DIRECT file",
    "raw_resp": "raw RESP stream",
}
"""What floors are called in tables."""
CALL_TITLE = "no-op unary call"
GOALS = {"shm": 0.90, "bulk": 0.80, "grpc": 0.90, "disk": 0.85, "redis": 0.60}
"""The least ratio of a path to its floor, for blocks of `GOAL_BLOCK_BYTES` and batches of 32."""
GOAL_BLOCK_BYTES = (2 << 20, 16 << 20)
GOAL_BATCH = 32
MATCH_GOALS = {1_000: 4.0, 10_000: 20.0}
"""The most that a match of so many blocks may take, in calls that do nothing."""

MATCH_BLOCK_BYTES = 4096
"""A match looks at names; its blocks are as small as blocks can be."""
LEAST_ROTATION_BYTES = 64 << 20
MOST_ROTATION_BYTES = 512 << 20
TURN_CALLS = 8
"""So many of the largest calls go once round, where that is not too much memory."""
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True, slots=True)
class Cell:
    """One row to be: so many clients that each move batches of blocks, over one path."""

    path: str
    op: str
    block_bytes: int
    batch: int
    clients: int

    @property
    def floor(self) -> str:
        """What it is compared with."""
        return FLOORS[self.path]

    @property
    def floor_title(self) -> str:
        """The same for people."""
        return CALL_TITLE if self.op == MATCH else TITLES[self.floor]

    @property
    def goal(self) -> float | None:
        """The ratio that is asked for: at least, or for a match at most; None: none is."""
        if self.op == MATCH:
            return MATCH_GOALS.get(self.batch)
        asked = self.block_bytes in GOAL_BLOCK_BYTES and self.batch == GOAL_BATCH
        return GOALS.get(self.path) if asked else None


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures."""

    paths: Sequence[str]
    block_bytes: Sequence[int]
    batches: Sequence[int]
    clients: Sequence[int]
    match_blocks: Sequence[int]
    repeats: int
    """Samples of each cell, and of its floor, in turn."""
    sample_s: float
    """A sample ends after this, or once every buffer of the rotation was used."""
    rotation_bytes: int
    """Each client goes round in at least so much memory on either side; 0: as `usual_rotation`."""

    def cells(self, block_bytes: int) -> list[Cell]:
        """The cells of one block size; the largest batch and the fewest clients first."""
        return [
            Cell(path, op, block_bytes, batch, clients)
            for path in self.paths
            for op in (OPS if path in PATHS else ("get",))
            for batch in sorted(self.batches, reverse=True)
            for clients in sorted(self.clients)
        ]

    def match_cells(self) -> list[Cell]:
        """The cells of the matches, which belong to the control calls over gRPC."""
        blocks = sorted(self.match_blocks) if "grpc" in self.paths else ()
        return [Cell("grpc", MATCH, MATCH_BLOCK_BYTES, count, 1) for count in blocks]

    def ring_blocks(self, block_bytes: int) -> int:
        """How many blocks each client goes round in: a whole number of the largest batches."""
        largest = max(self.batches)
        rotation_bytes = self.rotation_bytes or usual_rotation(largest * block_bytes)
        return largest * math.ceil(rotation_bytes / (largest * block_bytes))


def usual_rotation(call_bytes: int) -> int:
    """How many bytes a client goes round in, whose largest calls move so many.

    At least half of what the caches hold, so that what is read and what is written are together
    more than it; and several calls, because a single one after a pause is mostly noise.
    """
    sizes = [
        int(file.read_text().strip().removesuffix("K")) << 10 for file in _CACHES.glob("*/size")
    ]
    half = max(sizes, default=0) // 2
    rounded = math.ceil(half / LEAST_ROTATION_BYTES) * LEAST_ROTATION_BYTES
    return min(max(rounded, LEAST_ROTATION_BYTES, TURN_CALLS * call_bytes), MOST_ROTATION_BYTES)
