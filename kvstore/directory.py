"""The directory of the cluster: which nodes live, and where. Entries expire with their nodes."""

import asyncio
import json
import logging

from redis.asyncio import Redis
from redis.exceptions import RedisError

from kvstore.api.clock import Clock

_log = logging.getLogger("kvstore.directory")

_PREFIX = b"kvstore:d1:node:"
ENTRY_TTL_S = 15
HEARTBEAT_S = 5.0
MAX_NODES = 1024


class Directory:
    """Announces this node and lists all. Without Redis it lists nobody, and tries on."""

    def __init__(self, redis: Redis, clock: Clock, node_id: str, endpoint: str) -> None:
        self._redis = redis
        self._clock = clock
        self._key = _PREFIX + node_id.encode()
        self._entry = json.dumps({"endpoint": endpoint})
        self._heartbeat = asyncio.create_task(self._announce())

    async def nodes(self) -> list[tuple[str, str]]:
        """Id and endpoint of every live node, by id."""
        try:
            keys = [key async for key in self._redis.scan_iter(match=_PREFIX + b"*", count=1000)]
            keys = sorted(keys)[:MAX_NODES]
            values = await self._redis.mget(keys) if keys else []
        except (RedisError, OSError) as error:
            _log.warning("the directory does not answer: %s", error)
            return []
        return [
            (key.removeprefix(_PREFIX).decode(), endpoint)
            for key, value in zip(keys, values, strict=True)
            if (endpoint := _endpoint(value))
        ]

    async def close(self) -> None:
        """Takes this node's entry out."""
        self._heartbeat.cancel()
        try:
            await self._redis.delete(self._key)
        except (RedisError, OSError) as error:
            _log.info("the entry in the directory is left to expire: %s", error)
        await self._redis.aclose()

    async def _announce(self) -> None:
        while True:
            try:
                await self._redis.set(self._key, self._entry, ex=ENTRY_TTL_S)
            except (RedisError, OSError) as error:
                _log.warning("this node could not be announced: %s", error)
            await self._clock.sleep(HEARTBEAT_S)


def _endpoint(value: bytes | str | None) -> str:
    """The endpoint of an entry; empty for one that expired or is not ours."""
    try:
        entry = json.loads(value or b"{}")
    except ValueError:
        return ""
    endpoint = entry.get("endpoint") if isinstance(entry, dict) else None
    return endpoint if isinstance(endpoint, str) else ""
