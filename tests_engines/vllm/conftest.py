"""What the tests of a file share; each engine run is a fixture, so several tests read one run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests_engines.vllm.models import Models
from tests_engines.vllm.rig import Node, Runner


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The models by name."""
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A directory of this file of tests."""
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])


@pytest.fixture(scope="module")
def runner(home: Path) -> Runner:
    """Starts engines in fresh processes."""
    return Runner(home)


@pytest.fixture(scope="module")
def node(home: Path) -> Iterator[Node]:
    """A store node that serves, with memory and a disk tier."""
    with Node(home / "node") as node:
        yield node
