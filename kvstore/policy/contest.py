"""Who leads a tournament: scores that fade, and when a lead is large enough to follow it."""

from collections.abc import Sequence
from typing import Protocol

_FADE = 0.5 ** (1 / 1000)
"""Half of a score is of the last thousand requests."""
_LONG_FADE = 0.5 ** (1 / 5000)
"""Half of a long score is of the last five thousand."""
_MARGIN = 0.02


class Contest(Protocol):
    """Sees for each request how many blocks each expert would have had, and names the leader."""

    def leader(self, hits: Sequence[int], asked: int, block_tokens: int) -> int:
        """The number of the expert to follow from now on."""


class Always:
    """One expert leads, whatever happens: how a single policy runs."""

    def __init__(self, number: int) -> None:
        self._number = number

    def leader(self, hits: Sequence[int], asked: int, block_tokens: int) -> int:
        return self._number


class Scores:
    """Hits of late, and who has the most; whoever leads is challenged only by a clear margin.

    Number 0 is what nobody may be worse than: it leads at first, and takes the lead back as soon
    as it is ahead. The margin is one of the leader's hits, or of his misses where those are fewer:
    a share of the hits alone nobody could gain where almost everything is a hit. It is there
    because a change costs: what only the new leader holds has to be computed once more. For the
    same reason who is ahead of late has to be so for long as well, or bursts of one kind and of
    another would have the lead change hands, and be paid for, each time.
    """

    def __init__(self, experts: int) -> None:
        self.scores = [0.0] * experts
        """Tokens that each would have had, older ones fading."""
        self._long = [0.0] * experts
        self._asked = 0.0
        self._leader = 0

    def leader(self, hits: Sequence[int], asked: int, block_tokens: int) -> int:
        scores, long = self.scores, self._long
        self._asked = self._asked * _FADE + asked * block_tokens
        for number, count in enumerate(hits):
            scores[number] = scores[number] * _FADE + count * block_tokens
            long[number] = long[number] * _LONG_FADE + count * block_tokens
        lead, long_lead = scores[self._leader], long[self._leader]
        best = scores.index(max(scores))
        # By a margin the way back to number 0 is open at once.
        lasting = not best or long[best] > long_lead
        if lasting and scores[best] > lead + _MARGIN * min(lead, self._asked - lead):
            self._leader = best
        elif scores[0] > lead and long[0] > long_lead:
            self._leader = 0
        return self._leader
