"""Fixtures of the transformers adapter's tests: nodes, and a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.node_process import NodeProcess
from tests.scripted_node import NodeThread
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node that all tests share: each has weights, or a salt, of its own."""
    node = NodeProcess(tmp_path_factory.mktemp("node"))
    yield node.start()
    node.kill()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    """A node that a test may stop, kill and start again."""
    node = NodeProcess(tmp_path)
    node.start()
    yield node
    node.kill()


@pytest.fixture
def scripted() -> Iterator[NodeThread]:
    """A node that misbehaves as a test says."""
    thread = NodeThread()
    yield thread
    thread.stop()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are not worth two, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def salt(request: pytest.FixtureRequest) -> bytes:
    """One for each test."""
    return str(request.node.nodeid).encode()


@pytest.fixture(scope="module")
def llama() -> Any:
    """A model that nobody changes."""
    return tiny_model("llama", seed=1)
