"""Nodes for the tests, and a stub for what SGLang imports and a CPU does not have."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from tests_engines.sglang.rig import Node

sys.path.insert(0, str(Path(__file__).parent / "stubs"))


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., "Node"]]:
    """Starts nodes, settings as keywords, and ends them with the test."""
    from tests_engines.sglang.rig import Node

    nodes: list[Node] = []

    def start(**flags: str) -> Node:
        home = tmp_path / f"node-{len(nodes)}"
        home.mkdir()
        nodes.append(Node(home, **flags))
        return nodes[-1].start()

    yield start
    for node in nodes:
        node.stop()


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ProcessGroup"]:
    """A process group of one rank, for the controller's reductions."""
    import torch.distributed as dist

    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
