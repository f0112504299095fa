"""What memory and disk buy: hit rates over sizes, what a goal takes, what the next GiB brings.

A policy may be worse with more room. Who has more can use less of it, so the answer for a pair of
sizes is the best that was found with at most so much of either: answers never fall.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.replay.runs import Cell
from kvstore.replay.trace import Trace
from kvstore.replay.two_tiers import TierRates, TiersCell

GIB = 1 << 30

Found = Mapping[Cell[TierRates], TierRates]
"""What replays found."""

_LEAST_SHARE = 0.005
_STEPS = 8
"""Sizes that are tried for each tier, from `_LEAST_SHARE` of all blocks to all of them."""
_NEXT = 1.25
"""What the next GiB buys is measured over a quarter more, and told for one GiB of it."""


@dataclass(frozen=True, slots=True)
class Question:
    """What an operator asks."""

    trace: Trace
    kv_bytes_per_token: int
    memory_bytes: int
    disk_bytes: int
    hit_rate: float
    policy: str

    @property
    def block_bytes(self) -> int:
        """The size of a block of the trace in this model."""
        return self.trace.block_tokens * self.kv_bytes_per_token

    @property
    def footprint_bytes(self) -> int:
        """What all blocks of the trace would take."""
        return self.trace.unique_blocks * self.block_bytes

    def cells(self) -> list[TiersCell]:
        """The replays that answer it."""
        wanted = [self.cell(memory, 0) for memory in self.sizes()]
        wanted += [self.cell(self.memory_bytes, disk) for disk in (0, *self.sizes())]
        wanted += [self.asked(), *self.more()]
        return list(dict.fromkeys(wanted))

    def sizes(self) -> list[int]:
        """Bytes from a little to all, each the same factor larger."""
        factor = (1 / _LEAST_SHARE) ** (1 / (_STEPS - 1))
        least = self.footprint_bytes * _LEAST_SHARE
        sizes = [max(self.block_bytes, round(least * factor**step)) for step in range(_STEPS)]
        # A trace of a few blocks has fewer sizes than steps.
        return list(dict.fromkeys(sizes))

    def asked(self) -> TiersCell:
        """The sizes that were given."""
        return self.cell(self.memory_bytes, self.disk_bytes)

    def more(self) -> tuple[TiersCell, TiersCell]:
        """With a quarter more memory, and with a quarter more disk."""
        return (
            self.cell(int(self.memory_bytes * _NEXT), self.disk_bytes),
            self.cell(self.memory_bytes, int(self.disk_bytes * _NEXT)),
        )

    def cell(self, memory_bytes: int, disk_bytes: int) -> TiersCell:
        """The replay of a pair of sizes."""
        # More than everything is as good as everything; a policy has room for one block at least.
        most = max(1, self.trace.unique_blocks)
        memory = min(max(1, memory_bytes // self.block_bytes), most)
        return TiersCell(self.policy, memory, min(disk_bytes // self.block_bytes, most))


@dataclass(frozen=True, slots=True)
class Row:
    """One pair of sizes and what it is worth."""

    memory_bytes: int
    disk_bytes: int
    rates: TierRates
    per_gib: float
    """Gain in hit rate for each GiB from the row before; of the first, from nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer."""

    question: Question
    memory_alone: Sequence[Row]
    with_disk: Sequence[Row]
    """With the memory that was given, over sizes of disk."""
    asked: TierRates
    used: TiersCell
    """The sizes that have what was `asked`: the given ones, or less where that is better."""
    per_gib_of_memory: float
    per_gib_of_disk: float

    def memory_for_goal_bytes(self) -> int | None:
        """Memory without disk for the goal; None if no size reaches it."""
        return _size_for(
            self.question.hit_rate,
            [(row.memory_bytes, row.rates.total) for row in self.memory_alone],
        )

    def disk_for_goal_bytes(self) -> int | None:
        """Disk beside the memory that was given for the goal; None if no size reaches it."""
        return _size_for(
            self.question.hit_rate,
            [(row.disk_bytes, row.rates.total) for row in self.with_disk],
        )

    def used_memory_bytes(self) -> int:
        """So much of the memory that was given is best used."""
        question = self.question
        if self.used.memory_blocks == question.asked().memory_blocks:
            return question.memory_bytes
        return self.used.memory_blocks * question.block_bytes

    def used_disk_bytes(self) -> int:
        """So much of the disk that was given is best used."""
        question = self.question
        if self.used.disk_blocks == question.asked().disk_blocks:
            return question.disk_bytes
        return self.used.disk_blocks * question.block_bytes

    def as_dict(self) -> dict[str, object]:
        """For JSON: sizes in bytes, rates as fractions; null where a goal is out of reach."""
        question, trace = self.question, self.question.trace
        return {
            "trace": trace.name,
            "requests": len(trace.requests),
            "unique_blocks": trace.unique_blocks,
            "infinite_token_hit_rate": trace.infinite_token_hit_rate,
            "policy": question.policy,
            "kv_bytes_per_token": question.kv_bytes_per_token,
            "block_bytes": question.block_bytes,
            "footprint_bytes": question.footprint_bytes,
            "memory_alone": [_row(row, question) for row in self.memory_alone],
            "with_disk": [_row(row, question) for row in self.with_disk],
            "asked": {
                "memory_bytes": question.memory_bytes,
                "disk_bytes": question.disk_bytes,
                "used_memory_bytes": self.used_memory_bytes(),
                "used_disk_bytes": self.used_disk_bytes(),
                **_rates(self.asked, question),
                "next_gib_of_memory": self.per_gib_of_memory,
                "next_gib_of_disk": self.per_gib_of_disk,
            },
            "goal": {
                "token_hit_rate": question.hit_rate,
                "memory_alone_bytes": self.memory_for_goal_bytes(),
                "disk_bytes": self.disk_for_goal_bytes(),
            },
        }


def answer(question: Question, found: Found) -> Plan:
    """The plan from what all of the question's cells found."""
    used = _best(question.asked(), question, found)
    asked = found[used]
    more_memory, more_disk = (found[_best(cell, question, found)] for cell in question.more())
    extra_gib = [size * (_NEXT - 1) / GIB for size in (question.memory_bytes, question.disk_bytes)]
    return Plan(
        question,
        _rows([(memory, 0) for memory in question.sizes()], question, found),
        _rows([(question.memory_bytes, disk) for disk in (0, *question.sizes())], question, found),
        asked,
        used,
        max(0.0, more_memory.total - asked.total) / extra_gib[0],
        max(0.0, more_disk.total - asked.total) / extra_gib[1] if question.disk_bytes else 0.0,
    )


def _best(most: TiersCell, question: Question, found: Found) -> TiersCell:
    """The sizes with the most hits of those that are no larger; of equal ones the largest."""
    within = [
        cell
        for cell in question.cells()
        if cell.memory_blocks <= most.memory_blocks and cell.disk_blocks <= most.disk_blocks
    ]
    # Rounded, because equal sums of two shares may differ in the last digit.
    return max(
        within, key=lambda cell: (round(found[cell].total, 9), cell.memory_blocks, cell.disk_blocks)
    )


def _rows(sizes: Sequence[tuple[int, int]], question: Question, found: Found) -> list[Row]:
    rows: list[Row] = []
    for memory_bytes, disk_bytes in sizes:
        rates = found[_best(question.cell(memory_bytes, disk_bytes), question, found)]
        gib = (memory_bytes + disk_bytes) / GIB
        gained = rates.total
        if rows:
            gib -= (rows[-1].memory_bytes + rows[-1].disk_bytes) / GIB
            gained = max(0.0, gained - rows[-1].rates.total)
        rows.append(Row(memory_bytes, disk_bytes, rates, gained / gib))
    return rows


def _size_for(goal: float, points: Sequence[tuple[int, float]]) -> int | None:
    """The least size that reaches the goal, on the line between the points around it."""
    before: tuple[int, float] | None = None
    for size, rate in points:
        if rate >= goal:
            if before is None or before[0] == 0 or rate == before[1]:
                return size
            part = (goal - before[1]) / (rate - before[1])
            # Sizes grow by a factor from point to point, so the line is one over their logarithm.
            smaller, larger = math.log(before[0]), math.log(size)
            return math.ceil(math.exp(smaller + part * (larger - smaller)))
        before = size, rate
    return None


def _row(row: Row, question: Question) -> dict[str, object]:
    return {
        "memory_bytes": row.memory_bytes,
        "disk_bytes": row.disk_bytes,
        **_rates(row.rates, question),
        "per_gib": row.per_gib,
    }


def _rates(rates: TierRates, question: Question) -> dict[str, object]:
    return {
        "memory_token_hit_rate": rates.memory,
        "disk_token_hit_rate": rates.disk,
        "token_hit_rate": rates.total,
        "disk_written_bytes": rates.written_blocks * question.block_bytes,
    }
