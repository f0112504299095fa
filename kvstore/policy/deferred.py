"""A policy that hears of requests later than they come, and always before it is asked anything.

A request waits for the node's answer, and not for what a policy makes of it. So uses are kept in
their order until there is time, or until the policy has to decide, to learn or to forget something
else: it is told the same in the same order as without a delay, and decides the same.
"""

from collections import deque
from collections.abc import Iterator
from typing import Generic

from kvstore.policy.policy import K, Policy, Use

MOST_COST = 16_384
"""Uses that cost so much may wait: one for each, and one for each block. Who brings more has the
first ones told at once."""
_STEP_COST = 1024
"""About so much is told in one step, which takes a few milliseconds at most."""
MOST_STEPS = MOST_COST // _STEP_COST
"""After so many the policy has heard of all that waited at first."""


class Deferred(Generic[K]):
    """A `Policy` that owns another one.

    Invariant: `waiting` is what the uses that wait cost, and at most `MOST_COST`.
    """

    def __init__(self, policy: Policy[K]) -> None:
        self._policy = policy
        self._uses: deque[Use[K]] = deque()
        self.waiting = 0

    def settle(self) -> bool:
        """Tells of some uses, those first that have waited the longest; True if there are more."""
        self._tell(self.waiting - _STEP_COST)
        return bool(self._uses)

    def use(self, use: Use[K]) -> None:
        self._uses.append(use)
        self.waiting += _cost(use)
        self._tell(MOST_COST)

    def advise(self, use: Use[K]) -> None:
        self._told().advise(use)

    def __contains__(self, key: K) -> bool:
        return key in self._told()

    def insert(self, key: K, parent: K | None, size_bytes: int) -> None:
        self._told().insert(key, parent, size_bytes)

    def remove(self, key: K) -> None:
        self._told().remove(key)

    def victims(self, now_s: float) -> Iterator[K]:
        return self._told().victims(now_s)

    def __len__(self) -> int:
        return len(self._policy)  # Which no use changes.

    def _told(self) -> Policy[K]:
        """The policy, once it has heard of everything."""
        self._tell(0)
        return self._policy

    def _tell(self, left: int) -> None:
        """Tells of the first uses, until the others cost no more than that."""
        while self._uses and self.waiting > left:
            use = self._uses.popleft()
            self.waiting -= _cost(use)
            self._policy.use(use)


def _cost(use: Use[K]) -> int:
    return 1 + len(use.chain)
