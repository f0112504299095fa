"""The policies by name, as the setting `memory.policy` and `kvstore replay` know them."""

from collections.abc import Callable
from typing import Any

from kvstore.policy.blocks import Blocks
from kvstore.policy.contest import Always, Scores
from kvstore.policy.experts.expert import Expert
from kvstore.policy.experts.gdsf import LeafGdsfExpert
from kvstore.policy.experts.hazard import HazardExpert
from kvstore.policy.experts.lfuda import LfuDaExpert
from kvstore.policy.experts.lru2 import Lru2Expert
from kvstore.policy.experts.s3fifo import S3FifoExpert
from kvstore.policy.policy import Policy
from kvstore.policy.tournament import MakeExpert, Tournament

DEFAULT = "default"


def _s3fifo(blocks: Blocks[Any], flag: int, capacity_bytes: int) -> Expert:
    return S3FifoExpert(blocks, flag, flag << 7, capacity_bytes)


def _single(*makes: MakeExpert) -> Callable[[int], Policy[Any]]:
    """LRU without an argument, which is always there; else what follows the one given."""
    return lambda capacity_bytes: Tournament(capacity_bytes, makes, Always(len(makes)))


def _default(capacity_bytes: int) -> Policy[Any]:
    experts: list[MakeExpert] = [Lru2Expert, LfuDaExpert, _s3fifo, HazardExpert]
    return Tournament(capacity_bytes, experts, Scores(len(experts) + 1))


POLICIES: dict[str, Callable[[int], Policy[Any]]] = {
    "lru": _single(),
    "lru2": _single(Lru2Expert),
    "lfuda": _single(LfuDaExpert),
    "s3fifo": _single(_s3fifo),
    "leaf-gdsf": _single(LeafGdsfExpert),
    DEFAULT: _default,
}
"""What makes each policy, given the capacity of the tier in bytes."""


def make_policy(name: str, capacity_bytes: int) -> Policy[Any]:
    """The policy of that name for a tier of `capacity_bytes`. ValueError names those there are."""
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}: there are {', '.join(POLICIES)}")
    return POLICIES[name](capacity_bytes)
