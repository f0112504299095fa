"""Tells the cluster what this node holds, in batches and behind everything else."""

import asyncio
import logging

from kvstore.api.clock import Clock
from kvstore.api.errors import TierError
from kvstore.directory import HEARTBEAT_S
from kvstore.metrics import Metrics
from kvstore.peers.holdings import Holdings
from kvstore.peers.register import Register

_log = logging.getLogger("kvstore.peers")

GATHER_S = 0.02
"""Changes that follow each other so closely go together."""
BATCH_NAMES = 4096
SURVEY_S = 600.0
"""So often all is announced anew: names that were dropped, or struck in error, come back."""


class Announcer:
    """Keeps the register as the holdings are, as far as Redis takes it; up to `most_blocks` names.

    What cannot be announced is counted and nothing else: others do not find it here.
    """

    def __init__(
        self,
        holdings: Holdings,
        register: Register,
        clock: Clock,
        metrics: Metrics,
        *,
        most_blocks: int,
    ) -> None:
        self._holdings = holdings
        self._register = register
        self._clock = clock
        self._metrics = metrics
        self._most_blocks = most_blocks
        self._announced = 0
        """Names in the register, or a few more."""
        self._is_whole = False
        """Whether the register has all that it should have."""
        self._surveyed_s = 0.0
        self._turn = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Announces what is here, and from now on what changes."""
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._live())]

    async def leave(self) -> None:
        """Announces nothing more, and takes back what was announced. Later calls change nothing."""
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._register.leave()
        except TierError as error:
            _log.info("what this node announced is left to expire: %s", error)

    async def settle(self) -> None:
        """Returns when all that has changed until now was passed on, or could not be."""
        if not self._tasks:
            return  # Nobody is told anything yet, or any more.
        async with self._turn:
            if not self._is_whole:
                await self._renew()
            await self._pass_on()

    async def _follow(self) -> None:
        while True:
            await self._holdings.changed()
            await self._clock.sleep(GATHER_S)
            async with self._turn:
                await self._pass_on()

    async def _live(self) -> None:
        while True:
            async with self._turn:
                await self._renew()
            await self._clock.sleep(HEARTBEAT_S)

    async def _pass_on(self) -> None:
        while True:
            held, gone = await self._holdings.take(BATCH_NAMES)
            if not held and not gone:
                return
            await self._note(held, gone)

    async def _renew(self) -> None:
        now_s = self._clock.monotonic_s()
        try:
            count = await self._register.renew()
            self._announced = count or 0
            if count is None or self._holdings.missed or now_s >= self._surveyed_s + SURVEY_S:
                self._is_whole = False
            if not self._is_whole:
                await self._announce_all()
                self._surveyed_s = now_s
        except TierError as error:
            self._is_whole = False
            _log.warning("what this node holds cannot be announced: %s", error)
            await self._holdings.survey()

    async def _announce_all(self) -> None:
        await self._holdings.survey()
        await self._register.begin()
        self._announced, self._is_whole = 0, True
        for names in self._holdings.names():
            await self._note(names, [])
            await asyncio.sleep(0)  # Where there is no room left, nothing else waits.

    async def _note(self, held: list[bytes], gone: list[bytes]) -> None:
        room = max(0, self._most_blocks - self._announced) if self._is_whole else 0
        dropped = len(held) - room
        if dropped > 0:
            self._metrics.peer_announce_dropped.inc(dropped)
            held = held[:room]
        if not self._is_whole or not (held or gone):
            return
        try:
            await self._register.note(held, gone)
        except TierError as error:
            # The next heartbeat that gets through begins anew.
            self._is_whole = False
            self._metrics.peer_announce_dropped.inc(len(held))
            _log.warning("what this node holds cannot be announced: %s", error)
            return
        self._announced += len(held) - len(gone)
        self._metrics.peer_announced_blocks.inc(len(held))
        self._metrics.peer_withdrawn_blocks.inc(len(gone))
