"""kvstore: a tiered store for the KV blocks of LLM serving.

The one idea: a block is immutable and named by its content; a tier may forget, it may never lie.
From it follows the rest. Nothing is ever invalidated or overwritten, a miss is always a correct
answer, and everything that keeps blocks (memory, Redis, disk, another node, a composition of
them) is the same small interface, `kvstore.api.tier.Tier`.

Imports go one way: `kvstore_workers → kvstore_client → kvstore.api ← kvstore`. This file imports
nothing, so that `import kvstore.api` stays light.
"""

__version__ = "0.1.0"
