"""Where an engine's blocks have their home: its spaces at the node, once their names are known."""

import contextlib
import logging
import uuid
from collections.abc import Mapping
from concurrent.futures import wait
from typing import Any

from kvstore.api.errors import KvstoreError
from kvstore.api.space import SpaceDescriptor
from kvstore_client.client import Client
from kvstore_client.engine.background import in_background
from kvstore_client.space import Space
from kvstore_client.vllm.layout import Layout
from kvstore_client.vllm.metadata import Handshake
from kvstore_client.vllm.spaces import of_rank, revision_of, spaces_of

REVISION_WAIT_S = 5.0
"""How long the start of the engine waits for the name of its weights."""

_log = logging.getLogger("kvstore.vllm")


class Home:
    """The spaces of all groups and ranks. Used by the scheduler's thread alone."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, layout: Layout, client: Client, revision: str
    ) -> None:
        self.descriptors: tuple[SpaceDescriptor, ...] = ()
        """One for each group, of the first rank; empty as long as they have no names."""
        self.spaces: list[Space] = []
        """Of each group all ranks, the groups in order; empty as long as they have no names."""
        self._vllm_config = vllm_config
        self._layout = layout
        self._client = client
        replicas = max(1, kv_cache_config.kv_tp_replicas)
        self._ranks = max(1, vllm_config.parallel_config.tensor_parallel_size // replicas)
        self._revision = in_background(lambda: revision_of(vllm_config, revision))
        self._handshake: Handshake | None = None
        self._resets = ""

    @property
    def block_bytes(self) -> int:
        """Of a block of all groups, on one rank."""
        return sum(descriptor.block_bytes for descriptor in self.descriptors)

    def shake_hands(self, handshakes: Mapping[int, Handshake]) -> None:
        """Takes what the workers know of their KV caches. Raises ValueError if they differ, or if
        the weights have no name."""
        if not all(isinstance(each, Handshake) for each in handshakes.values()):
            raise ValueError(
                "KVStoreConnector: in a MultiConnector it has to stand before every other "
                "connector that exchanges handshakes"
            )
        if len(set(handshakes.values())) != 1:
            raise ValueError(f"the workers' KV caches differ: {dict(handshakes)}")
        self._handshake = next(iter(handshakes.values()))
        wait([self._revision], REVISION_WAIT_S)
        self.ready()

    def ready(self) -> bool:
        """Whether the spaces have names. Raises ValueError if the weights can have none."""
        if self.spaces:
            return True
        if self._handshake is None or not self._revision.done():
            return False
        revision = self._revision.result() + self._resets
        self.descriptors = spaces_of(
            self._vllm_config, self._layout, self._handshake, revision, self._ranks
        )
        self.spaces = [
            Space.of(of_rank(descriptor, rank))
            for descriptor in self.descriptors
            for rank in range(self._ranks)
        ]
        # The first request shall meet an open channel and open spaces.
        in_background(self._open)
        _log.info("%d spaces, blocks of %d tokens", len(self.spaces), self._layout.unit_tokens)
        return True

    def move(self) -> None:
        """To spaces that nobody else has, nor this engine had before."""
        self._resets = f" {uuid.uuid4().hex}"
        self.spaces, self.descriptors = [], ()

    def _open(self) -> None:
        with contextlib.suppress(KvstoreError):  # Where there is no node yet, they open later.
            for space in self.spaces:
                self._client.open_space(space.descriptor)
