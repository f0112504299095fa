"""Fixtures of the client's tests: a scripted node and a patient client of it."""

from collections.abc import AsyncIterator

import pytest

from kvstore_client import AsyncClient, Space
from kvstore_client.losses import MEANINGS
from tests.client_rig import PATIENT, descriptor
from tests.scripted_node import ScriptedNode, serving


@pytest.fixture
def node() -> ScriptedNode:
    """A node without blocks."""
    return ScriptedNode()


@pytest.fixture
async def client(node: ScriptedNode) -> AsyncIterator[AsyncClient]:
    """A patient client of the node. Its counters hold only documented names."""
    async with serving(node) as (endpoint, _), AsyncClient(endpoint, budgets=PATIENT) as client:
        yield client
        assert set(client.counters) <= set(MEANINGS)


@pytest.fixture
async def space(client: AsyncClient) -> Space:
    """An open space of small blocks."""
    return await client.open_space(descriptor())


@pytest.fixture
async def unused_endpoint() -> str:
    """An endpoint at which a server was and is no more."""
    async with serving(ScriptedNode()) as (endpoint, _):
        return endpoint
