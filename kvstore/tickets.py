"""Tickets: what gRPC has authenticated gets one, and shows it once at a socket that cannot."""

import secrets
from typing import NamedTuple

from kvstore.api.clock import Clock
from kvstore.api.errors import ResourceExhausted
from kvstore.api.local import TICKET_BYTES

MAX_TICKETS = 1024


class Ticket(NamedTuple):
    """Whom it was given to, and until when it is good."""

    authorization: str | None
    peer: str
    """The connection over which it was asked for."""
    expires_s: float
    is_peer: bool = False
    """Whether it opens a connection for another node, and for nobody else."""


class Tickets:
    """Each is good once, and for `good_s`."""

    def __init__(self, clock: Clock, good_s: float) -> None:
        self.good_s = good_s
        self._clock = clock
        self._given: dict[bytes, Ticket] = {}

    def give(self, authorization: str | None, peer: str, *, is_peer: bool = False) -> bytes:
        """A new one. Raises ResourceExhausted while too many have not been shown."""
        now_s = self._clock.monotonic_s()
        self._given = {t: known for t, known in self._given.items() if known.expires_s > now_s}
        if len(self._given) >= MAX_TICKETS:
            raise ResourceExhausted(f"{MAX_TICKETS} tickets were given and have not been shown")
        shown = secrets.token_bytes(TICKET_BYTES)
        self._given[shown] = Ticket(authorization, peer, now_s + self.good_s, is_peer)
        return shown

    def take(self, shown: bytes) -> Ticket | None:
        """Whose it is; None for one that was made up, used, or is too old."""
        ticket = self._given.pop(shown, None)
        if ticket is None or ticket.expires_s <= self._clock.monotonic_s():
            return None
        return ticket
