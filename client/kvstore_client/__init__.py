"""The client of kvstore: finds, loads and stores KV blocks at a node, and never stops an engine.

    with Client("127.0.0.1:7070") as client:
        space = client.open_space(descriptor)
        match = client.match([space], keys)
        loaded = client.load(space, keys[: match.blocks], buffers, lease=match)
        client.store(space, keys, blocks)

A miss is data: whatever goes wrong on the way to the node, these calls answer what they have
within their budget and count the loss in `client.counters`.
"""

from kvstore_client.async_client import AsyncClient
from kvstore_client.budgets import Budgets
from kvstore_client.client import Client
from kvstore_client.match import Match, Run
from kvstore_client.remote_tier import RemoteTier
from kvstore_client.space import Space

__all__ = ["AsyncClient", "Budgets", "Client", "Match", "RemoteTier", "Run", "Space"]
