"""Which node holds which blocks, in Redis: a set of names for each node, which expires with it.

A node renews its set as a whole, so that to live on costs nothing for each block. A question goes
to the sets of all nodes that are asked about, in one round trip.
"""

from collections.abc import Awaitable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from kvstore.api.errors import TierError
from kvstore.directory import ENTRY_TTL_S, Neighbour

_PREFIX = b"kvstore:d1:blocks:"
_MARK = "all"
"""Among the names of a set: it was begun and not lost since, to an eviction or a restart."""


class Register:
    """The sets of names of all nodes; this node's own can be written. Raises TierError."""

    def __init__(self, redis: Redis, own: Neighbour) -> None:
        self._redis = redis
        self._key = _key(own)

    async def who_holds(
        self, names: Sequence[bytes], nodes: Sequence[Neighbour]
    ) -> list[list[bool]]:
        """For each node which of the blocks it holds, as far as is known."""
        if not names or not nodes:
            return [[False] * len(names) for _ in nodes]
        pipeline = self._redis.pipeline(transaction=False)
        for node in nodes:
            pipeline.smismember(_key(node), list(names))
        return [[bool(held) for held in row] for row in await _ask(pipeline.execute())]

    async def begin(self) -> None:
        """This node's set begins anew, without a name."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.unlink(self._key)
        pipeline.sadd(self._key, _MARK)
        pipeline.expire(self._key, ENTRY_TTL_S)
        await _ask(pipeline.execute())

    async def note(self, held: Sequence[bytes], gone: Sequence[bytes]) -> None:
        """Adds and removes names of this node's set."""
        pipeline = self._redis.pipeline(transaction=True)
        if held:
            pipeline.sadd(self._key, *held)
        if gone:
            pipeline.srem(self._key, *gone)
        # Where the set was lost it has just begun without its mark, and without an end.
        pipeline.expire(self._key, ENTRY_TTL_S)
        await _ask(pipeline.execute())

    async def renew(self) -> int | None:
        """Lets this node's set live on; how many names it has, None if it was lost."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.sismember(self._key, _MARK)
        pipeline.scard(self._key)
        pipeline.expire(self._key, ENTRY_TTL_S)
        is_whole, count, _ = await _ask(pipeline.execute())
        return int(count) - 1 if is_whole else None

    async def strike(self, node: Neighbour, names: Sequence[bytes]) -> None:
        """Removes what came damaged from there from another node's set."""
        await _ask(self._redis.srem(_key(node), *names))

    async def leave(self) -> None:
        """This node holds nothing for others any more."""
        await _ask(self._redis.unlink(self._key))


def _key(node: Neighbour) -> bytes:
    return _PREFIX + f"{node.node_id}:{node.life}".encode()


async def _ask(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except (RedisError, OSError) as error:
        raise TierError(f"directory: {error}") from error
