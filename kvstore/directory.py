"""The directory of the cluster: which nodes live, and where. Entries expire with their nodes."""

import asyncio
import json
import logging
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError

from kvstore.api.asking import host_of
from kvstore.api.clock import Clock
from kvstore.api.errors import TierError

_log = logging.getLogger("kvstore.directory")

_PREFIX = b"kvstore:d1:node:"
_IDS = b"kvstore:d1:nodes"
"""The ids of all nodes, so that nobody has to look through whatever else Redis keeps."""
ENTRY_TTL_S = 15
HEARTBEAT_S = 5.0
MAX_NODES = 1024


class Neighbour(NamedTuple):
    """A node as its entry describes it."""

    node_id: str
    endpoint: str
    life: str = ""
    """Another one after each start, of nodes that lend blocks to others; empty: it does not."""

    @property
    def lends(self) -> bool:
        """Whether it may be asked for blocks, as far as its entry makes sense."""
        return bool(self.life) and bool(host_of(self.endpoint))


class Directory:
    """Announces this node, once it is started, and lists all. Without Redis it tries on."""

    def __init__(self, redis: Redis, clock: Clock, own: Neighbour) -> None:
        self.redis = redis
        self.own = own
        self.others: list[Neighbour] = []
        """The other nodes, as of the last heartbeat at which Redis answered."""
        self._clock = clock
        self._key = _PREFIX + own.node_id.encode()
        self._entry = json.dumps({"endpoint": own.endpoint, "life": own.life})
        self._heartbeat: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on this node is announced."""
        self._heartbeat = asyncio.create_task(self._announce())

    async def nodes(self) -> list[Neighbour]:
        """Every live node, by id; nobody where Redis does not answer."""
        try:
            return await self._nodes()
        except (RedisError, OSError) as error:
            _log.warning("the directory does not answer: %s", error)
            return []

    async def refresh(self) -> list[Neighbour]:
        """The other nodes of now. Raises TierError where Redis does not answer."""
        try:
            nodes = await self._nodes()
        except (RedisError, OSError) as error:
            raise TierError(f"directory: {error}") from error
        self.others = [node for node in nodes if node.node_id != self.own.node_id]
        return self.others

    async def beat(self) -> None:
        """Announces this node once, and sees who else is there. Raises as `refresh`."""
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.set(self._key, self._entry, ex=ENTRY_TTL_S)
        pipeline.sadd(_IDS, self.own.node_id)
        try:
            await pipeline.execute()
        except (RedisError, OSError) as error:
            raise TierError(f"directory: {error}") from error
        await self.refresh()

    async def close(self) -> None:
        """Takes this node's entry out."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        try:
            await self.redis.delete(self._key)
        except (RedisError, OSError) as error:
            _log.info("the entry in the directory is left to expire: %s", error)
        await self.redis.aclose()

    async def _announce(self) -> None:
        while True:
            try:
                await self.beat()
            except TierError as error:
                _log.warning("this node could not be announced: %s", error)
            await self._clock.sleep(HEARTBEAT_S)

    async def _nodes(self) -> list[Neighbour]:
        # As bytes: the client decodes nothing.
        ids: list[Any] = sorted(await self.redis.smembers(_IDS))[:MAX_NODES]
        if not ids:
            return []
        values: list[Any] = await self.redis.mget([_PREFIX + node_id for node_id in ids])
        if gone := [node_id for node_id, value in zip(ids, values, strict=True) if value is None]:
            await self.redis.srem(_IDS, *gone)
        entries = map(_entry_of, ids, values)
        return [entry for entry in entries if entry is not None]


def _entry_of(node_id: bytes, value: bytes | None) -> Neighbour | None:
    """What an entry says; None for one that expired or is not ours."""
    try:
        entry = json.loads(value or b"{}")
        name = node_id.decode()
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    endpoint, life = entry.get("endpoint"), entry.get("life", "")
    if not isinstance(endpoint, str) or not endpoint or not isinstance(life, str):
        return None
    return Neighbour(name, endpoint, life)
