"""What a million blocks cost: bytes of index for each, and a match among them."""

import asyncio
import gc
import hashlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.proof import Claim, Finding, Proof, Setting, main
from kvstore.api.clock import SystemClock
from kvstore.api.tier import BlockRef
from kvstore.events import Events
from kvstore.leases import LeaseTable
from kvstore.metrics import Metrics
from kvstore.node import Node
from kvstore.policy.policies import DEFAULT, make_policy
from kvstore.record import Kind
from kvstore.tenants import LOCAL_TENANT, Tenant
from kvstore.tiers.disk_index import DiskIndex
from kvstore.tiers.memory import Memory
from kvstore.tiers.segment_log import Found
from kvstore.tiers.tiered import Tiered
from tests.sim.nodes import descriptor_of

BLOCK_BYTES = 4096
SLAB_BYTES = 1 << 22
CHAIN_BLOCKS = 100
MATCH_BLOCKS = 1000
FEW_BLOCKS = 10_000
MATCHES = 60
INDEX_GOAL_BYTES = 500
MATCH_GOAL = 2.0
LOCAL = Tenant(LOCAL_TENANT)


class Unranked:
    """A policy that remembers nothing, so that the index is measured alone."""

    def __init__(self) -> None:
        self._count = 0

    def use(self, use: object) -> None:
        return

    def advise(self, use: object) -> None:
        return

    def __contains__(self, key: BlockRef) -> bool:
        return False

    def insert(self, key: BlockRef, parent: BlockRef | None, size_bytes: int) -> None:
        self._count += 1

    def remove(self, key: BlockRef) -> None:
        self._count -= 1

    def victims(self, now_s: float) -> Iterator[BlockRef]:
        return iter(())

    def __len__(self) -> int:
        return self._count


def private_bytes() -> int:
    """The memory of this process that is not shared: the arena does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [anonymous] = [line for line in lines if line.startswith("RssAnon")]
    return int(anonymous.split()[1]) << 10


def grown_bytes(make: Callable[[], object]) -> float:
    """How much memory is taken by what `make` makes."""
    gc.collect()
    before = private_bytes()
    made = make()
    gc.collect()
    grown = private_bytes() - before
    del made
    return grown


def keys_of_chain(seed: str, number: int, blocks: int) -> list[bytes]:
    """The keys of one chain: any 32 bytes do."""
    return [hashlib.sha256(f"{seed} {number} {at}".encode()).digest() for at in range(blocks)]


def memory_index(seed: str, blocks: int) -> Memory:
    """The memory tier's index over so many blocks, in chains."""
    capacity = -(-blocks // (SLAB_BYTES // BLOCK_BYTES)) * SLAB_BYTES
    memory = Memory(capacity, SLAB_BYTES, Unranked(), SystemClock())
    namespace = hashlib.sha256(b"one tenant").digest()
    for number in range(blocks // CHAIN_BLOCKS):
        parent = None
        for key in keys_of_chain(seed, number, CHAIN_BLOCKS):
            ref = BlockRef(namespace, key)
            slot = memory.reserve(ref, BLOCK_BYTES)
            assert slot is not None
            # As from the wire: another object of the same name.
            memory.commit(
                slot, parent and BlockRef(namespace, bytes(bytearray(parent.key))), key[:16]
            )
            parent = ref
    return memory


def disk_index(seed: str, blocks: int) -> DiskIndex:
    """The disk tier's index over so many blocks, in chains, as a start makes it."""
    index = DiskIndex()
    tag = hashlib.sha256(b"tag").digest()[:16]
    for number in range(blocks // CHAIN_BLOCKS):
        parent = None
        for at, name in enumerate(keys_of_chain(seed, number, CHAIN_BLOCKS)):
            place = number * CHAIN_BLOCKS + at
            index.insert(
                Found(
                    Kind.BLOCK, place, 0, name, parent, bytes(bytearray(tag)), 1 << 20, 800_000, 0,
                    1 + place // 256, place % 256 * (1 << 20),
                )
            )  # fmt: skip
            parent = name
    return index


def node_with(seed: str, blocks: int) -> tuple[Node, bytes]:
    """A node with the default policy whose memory is full of chains of `MATCH_BLOCKS`."""
    capacity = -(-blocks // (SLAB_BYTES // BLOCK_BYTES)) * SLAB_BYTES
    metrics, clock = Metrics(), SystemClock()
    memory = Memory(capacity, SLAB_BYTES, make_policy(DEFAULT, capacity), clock)
    node = Node(
        node_id="node", secret=bytes(32), tiers=Tiered(memory, None, metrics),
        leases=LeaseTable(capacity), max_lease_s=60, events=Events(), clock=clock,
        metrics=metrics,
    )  # fmt: skip
    space_id = node.open_space(descriptor_of(BLOCK_BYTES))
    for number in range(blocks // MATCH_BLOCKS):
        refs = node.refs(LOCAL, "", space_id, keys_of_chain(seed, number, MATCH_BLOCKS))
        for ref, parent in zip(refs, [None, *refs], strict=False):
            slot = memory.reserve(ref, BLOCK_BYTES)
            assert slot is not None
            memory.commit(slot, parent, ref.key[:16])
    return node, space_id


async def match_s(node: Node, space_id: bytes, keys: Sequence[bytes]) -> float:
    """How long a match with a lease takes, and its release."""
    started = time.perf_counter()
    matched = await node.match(LOCAL, [space_id], keys, (), lease_s=1.0)
    assert matched.blocks == len(keys)
    assert matched.lease is not None
    node.release(LOCAL, matched.lease.lease_id)
    return time.perf_counter() - started


async def match_times(seed: str, blocks: int) -> tuple[float, float]:
    """The median time of a match of `MATCH_BLOCKS` among few blocks and among many."""
    rng = random.Random(seed)
    sizes = [FEW_BLOCKS, blocks]
    nodes = [node_with(seed, size) for size in sizes]
    times: list[list[float]] = [[], []]
    for _ in range(MATCHES):
        for (node, space_id), size, taken in zip(nodes, sizes, times, strict=True):
            keys = keys_of_chain(seed, rng.randrange(size // MATCH_BLOCKS), MATCH_BLOCKS)
            taken.append(await match_s(node, space_id, keys))
            while node.tiers.memory.settle():  # As the loop does when it has answered.
                pass
    for node, _ in nodes:
        await node.close(0, 1)
    return statistics.median(times[0]), statistics.median(times[1])


def run(setting: Setting) -> list[Finding]:
    """Measures both indexes, then matches, with as many blocks as there are trials."""
    blocks = max(setting.trials, 2 * FEW_BLOCKS) // MATCH_BLOCKS * MATCH_BLOCKS
    per_block = []
    makers: list[Callable[[str, int], object]] = [memory_index, disk_index]
    for make in makers:
        per_block.append(grown_bytes(partial(make, setting.seed, blocks)) / blocks)
        setting.tick(setting.trials // 3)
    few_s, many_s = asyncio.run(match_times(setting.seed, blocks))
    setting.tick(setting.trials - 2 * (setting.trials // 3))
    details = {"blocks": blocks, "match_few_ms": few_s * 1e3, "match_many_ms": many_s * 1e3}
    return [
        Finding(round(size), size <= INDEX_GOAL_BYTES, details=details) for size in per_block
    ] + [Finding(round(many_s / few_s, 2), many_s / few_s <= MATCH_GOAL, details=details)]


PROOF = Proof(
    module="index_cost",
    about="What a million blocks cost: bytes of index for each, and a match among them.",
    claims=(
        Claim("index of memory", "B/block", f"<= {INDEX_GOAL_BYTES}"),
        Claim("index of disk", "B/block", f"<= {INDEX_GOAL_BYTES}"),
        Claim(f"match of {MATCH_BLOCKS} blocks, many over 10^4 blocks here", "times", "<= 2"),
    ),
    trials={"test": 20_000, "short": 300_000, "long": 1_000_000},
    run=run,
    beside=(),
)

if __name__ == "__main__":
    main(PROOF)
