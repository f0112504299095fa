"""Fixtures: the seed, a real Redis, tiers over simulated seams, and nodes that really serve.

What only some tests need is imported by the fixtures that need it: tests of the GPU run where
neither Redis nor the server's libraries are installed.
"""

import importlib.util
import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kvstore_workers.redis_server import RedisServer
    from tests.sim.nodes import Nodes
    from tests.sim.rig import Rig

NODE_NEEDS = ("numcodecs", "prometheus_client", "pydantic", "redis", "grpc_health")
NODE_TESTS = (
    "tier_contract", "keys", "wire", "record", "slabs", "memory", "policy", "disk", "disk_recovery",
    "disk_direct", "disk_reuse", "redis_tier",
    "tiered", "lending", "admission", "guarded", "node", "grpc", "config", "tenants",
    "serve_process", "proofs_service", "simulator", "policy_order", "policy_proofs",
    "replay_command", "replay_files", "replay_optimum", "plan", "calls", "digests",
    "shared_memory", "client_stream", "in_place", "policy_runs",
    "codecs", "codec_choice", "lossy", "tier_codec", "codec_figures",
    "bulk", "tls", "peers", "examples",
    "vllm_connector", "vllm_faults", "vllm_parts", "vllm_certainty", "vllm_tier", "sglang",
    "transformers", "transformers_faults", "transformers_refusals", "transformers_identity",
    "transformers_adapters", "transformers_modules", "transformers_sessions",
    "transformers_gpu",
)  # fmt: skip
if any(importlib.util.find_spec(name) is None for name in NODE_NEEDS):
    collect_ignore = [f"test_{name}.py" for name in NODE_TESTS]

SEED_VARIABLE = "KVSTORE_TEST_SEED"
REDIS_VARIABLE = "KVSTORE_REDIS_URL"


@pytest.fixture(scope="session")
def seed() -> int:
    """What all randomness of this run comes from: `KVSTORE_TEST_SEED`, or another each time."""
    return int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(2**32))


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """The random source of one test; the same one again when this test runs with the same seed."""
    print(f"{SEED_VARIABLE}={seed}")  # noqa: T201 - pytest shows it with a failure
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture(scope="session")
def redis_server_url() -> Iterator[str]:
    """A real Redis for the tests of one process: `KVSTORE_REDIS_URL`, or an embedded one."""
    from kvstore_workers.redis_server import RedisServer

    with RedisServer(os.environ.get(REDIS_VARIABLE) or None, policy="noeviction") as server:
        yield server.url


@pytest.fixture
def redis_url(redis_server_url: str) -> Iterator[str]:
    """A real Redis that holds nothing of ours, neither before nor after the test."""
    _forget_all(redis_server_url)
    yield redis_server_url
    _forget_all(redis_server_url)


@pytest.fixture
def private_redis() -> Iterator["RedisServer"]:
    """A real Redis for one test, which may stop, freeze and kill it."""
    from kvstore_workers.redis_server import RedisServer

    with RedisServer(policy="noeviction") as server:
        yield server


@pytest.fixture
async def rig() -> AsyncIterator["Rig"]:
    """Tiers over simulated time and files; checked, whatever the test did, and closed."""
    from tests.sim.rig import Rig

    rig = Rig()
    yield rig
    await rig.finish()


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator["Nodes"]:
    """Nodes that serve over gRPC and clients of them; checked and stopped at the end."""
    from tests.sim.nodes import Nodes

    nodes = Nodes(tmp_path)
    yield nodes
    await nodes.finish()


def _forget_all(url: str) -> None:
    """Deletes what kvstore keeps; the server may be somebody else's, who has other keys."""
    import redis

    with redis.from_url(url) as client:
        for key in list(client.scan_iter(match="kvstore:*", count=1000)):
            client.delete(key)
