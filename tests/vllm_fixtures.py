"""Fixtures of the tests of vLLM's connector: small engines, and nodes for them."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.scripted_node import NodeThread
from tests.stand_ins import vllm_connector
from tests.stand_ins.vllm_mini_engine import MiniEngine
from tests.vllm_rig import PATIENT, Start, weights

if TYPE_CHECKING:
    from kvstore.server import NodeServer
    from tests.sim.nodes import Nodes


@pytest.fixture
def stand_in() -> Iterator[None]:
    """vLLM is what `tests/stand_ins` says."""
    with vllm_connector.standing_in(), pytest.MonkeyPatch.context() as patch:
        # An engine begins when a test makes it, and not with the process of the tests.
        patch.setattr("kvstore_client.engine.process.started_ns", time.time_ns)
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint, as far as its name goes."""
    return weights(tmp_path / "model", b"weights")


@pytest.fixture
async def node(nodes: "Nodes") -> "NodeServer":
    """A small node with a disk."""
    return await nodes.start()


@pytest.fixture
def remote() -> Iterator[NodeThread]:
    """A scripted node, served in a thread of its own."""
    node = NodeThread()
    yield node
    node.stop()


@pytest.fixture
async def start(stand_in: None, model: Path) -> AsyncIterator[Start]:
    """Starts engines, and ends them."""
    engines: list[MiniEngine] = []

    def started(
        node: "NodeServer | NodeThread | str",
        *args: Any,
        settings: dict[str, Any] | None = None,
        **more: Any,
    ) -> MiniEngine:
        from kvstore_client.vllm import KVStoreConnector

        endpoint = node if isinstance(node, str) else node.endpoint
        values = {**PATIENT, "endpoint": endpoint, **(settings or {})}
        checkpoint = more.pop("model", model)
        engine = MiniEngine(KVStoreConnector, checkpoint, *args, settings=values, **more)
        engines.append(engine)
        return engine

    yield started
    for engine in engines:
        await asyncio.to_thread(engine.close)
