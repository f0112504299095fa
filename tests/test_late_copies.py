"""Copies that run by themselves, as a GPU's do; here each is made as late as it may be."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_client import Client, Space, local_transfers
from kvstore_client.in_place import EmptySlot
from kvstore_workers.cut import Cut
from kvstore_workers.layout import KVLayout
from kvstore_workers.link import StoreLink
from kvstore_workers.restore import RestoreJob, Restorer
from kvstore_workers.spill import CacheKey, Spiller, SpillRun
from kvstore_workers.transfer import Copier, Copies, Mark, one_ahead
from kvstore_workers.vram import VramPool
from tests.node_process import NodeProcess
from tests.sim.blocks import keys_of
from tests.sim.nodes import PATIENT, descriptor_of, expected

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=64, block_tokens=16, dtype="bfloat16")
SPACE = descriptor_of(LAYOUT.block_bytes, block_tokens=16)
BLOCKS = 96
KEYS = keys_of("chain", BLOCKS)
MEMORY = ("--memory-capacity-bytes", "4MiB", "--memory-slab-bytes", "256KiB")
"""Windows of 32 blocks, and three of them to a chain."""

NO_LEASES = ("--leases-memory-fraction", "0")
"""Nothing keeps blocks in memory but that somebody copies them."""


class Late(Copies):
    """Copies that are made when they are waited for."""

    def __init__(self, copy: Callable[[], Any]) -> None:
        self._copy: Callable[[], Any] | None = copy
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            copy, self._copy = self._copy, None
            if copy is not None:
                copy()


class LateCopier(Copier):
    """What it begins is done at the end; `before_each` runs ahead of it, `before_begin` earlier."""

    before_begin: Callable[[], Any] = staticmethod(lambda: None)
    before_each: Callable[[], Any] = staticmethod(lambda: None)
    begun_blocks = 0
    waiting = 0
    """Copies that were begun and not made yet."""
    most_waiting = 0

    def begin_to_host(
        self, blocks: Sequence[int], places: Sequence[memoryview], *, after: Mark
    ) -> Copies:
        return self._late(partial(super().begin_to_host, blocks, places, after=after), len(blocks))

    def begin_to_device(
        self, places: Sequence[memoryview], blocks: Sequence[int], *, after: Mark
    ) -> Copies:
        copy = partial(super().begin_to_device, places, blocks, after=after)
        return self._late(copy, len(blocks))

    def _late(self, copy: Callable[[], Any], blocks: int) -> Copies:
        def late() -> None:
            self.before_each()
            copy()
            self.waiting -= 1

        self.before_begin()
        self.begun_blocks += blocks
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        return Late(late)


class Worker:
    """A pool of blocks with a spiller and a restorer, whose copies are late."""

    def __init__(self, endpoint: str, connect: type[Client] = Client) -> None:
        self.vram = VramPool(LAYOUT, BLOCKS, torch.device("cpu"))
        self.copier = LateCopier(self.vram)
        self.link = StoreLink(lambda: connect(endpoint, budgets=PATIENT), SPACE)
        assert self.link.wait_tried(60.0)
        self.spiller = Spiller(
            self.copier, LAYOUT.block_bytes, queue_bytes=64 << 20, staging_bytes=64 << 20,
            budget_s=60.0, record_digests=True,
        )  # fmt: skip
        self._restorer = Restorer(
            self.copier, LAYOUT.block_bytes, cut=Cut(block_tokens=16, chunk_tokens=16),
            staging_bytes=1 << 20, match_budget_s=60.0, budget_s=60.0,
        )  # fmt: skip

    def fill(self) -> None:
        """Each block as its key says."""
        for block, key in enumerate(KEYS):
            data = torch.frombuffer(bytearray(expected(Space.of(SPACE), key)), dtype=torch.uint8)
            self.vram.bytes[block] = data

    def wrong(self) -> list[int]:
        """Blocks that have other bytes."""
        space = Space.of(SPACE)
        return [
            block for block, key in enumerate(KEYS)
            if self.vram.bytes[block].numpy().tobytes() != expected(space, key)
        ]  # fmt: skip

    def offer(self) -> None:
        keys, blocks = [CacheKey("", "", key) for key in KEYS], range(BLOCKS)
        assert self.spiller.offer(SpillRun(self.link, keys, blocks, b"", blocks, None))

    def restore(self) -> list[str]:
        return self._restorer.start(RestoreJob(self.link, KEYS, range(BLOCKS), None)).result(60.0)

    def close(self) -> None:
        self.spiller.close()
        self._restorer.close()
        self.link.close()


@pytest.fixture
def endpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    node = NodeProcess(tmp_path)
    yield node.start(*MEMORY, *getattr(request, "param", ()))
    node.kill()


@pytest.fixture
def flood(endpoint: str) -> Iterator[Callable[[], None]]:
    """Stores more than the node's memory holds: what nobody keeps is evicted and overwritten."""
    with Client(endpoint, budgets=PATIENT) as client:
        space, turns = client.open_space(SPACE), iter(range(1000))

        def store() -> None:
            keys = keys_of(f"flood {next(turns)}", 2 * (4 << 20) // LAYOUT.block_bytes)
            client.store(space, keys, [expected(space, key) for key in keys])

        yield store


def test_nothing_is_committed_before_it_is_filled(
    endpoint: str, flood: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are given in parts, so that two of them are being filled at a time."""
    monkeypatch.setattr(local_transfers, "PART_BYTES", LAYOUT.block_bytes)
    with closing(Worker(endpoint)) as worker:
        worker.fill()
        worker.copier.before_each = flood
        worker.offer()
        assert worker.spiller.flush(60.0)
        assert worker.spiller.counters == {"held": BLOCKS, "failed": 0, "dropped": 0}
        assert worker.spiller.digests is not None
        assert len(worker.spiller.digests) == BLOCKS
        assert worker.copier.begun_blocks == BLOCKS
        assert worker.copier.most_waiting == 2
        worker.vram.bytes.zero_()
        assert len(worker.restore()) == BLOCKS
        assert worker.wrong() == []


@pytest.mark.parametrize(
    "endpoint",
    [pytest.param((), id="leases"), pytest.param(NO_LEASES, id="no leases")],
    indirect=True,
)
def test_nothing_is_let_go_of_before_it_is_copied(endpoint: str, flood: Callable[[], None]) -> None:
    """Without leases what was not given yet is evicted meanwhile, and comes from disk."""
    with closing(Worker(endpoint)) as worker:
        worker.fill()
        worker.offer()
        assert worker.spiller.flush(60.0)
        worker.vram.bytes.zero_()
        worker.copier.before_each, worker.copier.begun_blocks = flood, 0
        tiers = worker.restore()
        assert tiers.count("memory") > BLOCKS // 3
        assert len(tiers) == BLOCKS
        assert worker.copier.begun_blocks == BLOCKS, "what came once was fetched again"
        assert worker.copier.most_waiting == 2
        assert worker.wrong() == []


class Stalled(Client):
    """Gives the first slots of a write, and the next ones when somebody says so."""

    given = threading.Event()
    go_on = threading.Event()

    def write_in_place(self, *args: Any, **options: Any) -> Generator[list[EmptySlot], None, None]:
        with closing(super().write_in_place(*args, **options)) as steps:
            for slots in steps:
                yield slots
                self.given.set()
                assert self.go_on.wait(60.0)


def test_what_is_abandoned_is_copied_or_not_but_never_read_later(endpoint: str) -> None:
    """Its blocks are the engine's again, which writes to them, while the node does not answer."""
    Stalled.given.clear()
    Stalled.go_on.clear()
    with closing(Worker(endpoint, Stalled)) as worker:
        worker.fill()
        worker.offer()
        assert Stalled.given.wait(60.0)
        assert worker.spiller.abandon() == [range(BLOCKS)]
        worker.vram.bytes.fill_(0xEE)
        Stalled.go_on.set()
        assert worker.spiller.flush(60.0)
        held = worker.spiller.counters["held"]
        assert held + worker.spiller.counters["dropped"] == BLOCKS
        tiers = worker.restore()
        assert len(tiers) >= held
        assert set(worker.wrong()) == set(range(len(tiers), BLOCKS))


class Gate:
    """Holds up who comes first, until it is opened."""

    def __init__(self) -> None:
        self.entered, self._opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self._opened.wait(60.0)

    def abandon(self, worker: Worker) -> None:
        """Abandons a spill that is held up here; nothing is being copied when that returns."""
        assert self.entered.wait(60.0)
        with ThreadPoolExecutor(1) as pool:
            abandoning = pool.submit(worker.spiller.abandon)
            with pytest.raises(TimeoutError):
                abandoning.result(0.05)
            self._opened.set()
            assert abandoning.result(60.0) == [range(BLOCKS)]
        assert worker.copier.waiting == 0
        assert worker.spiller.flush(60.0)


def test_who_abandons_waits_for_copies_that_are_about_to_begin(endpoint: str) -> None:
    with closing(Worker(endpoint)) as worker:
        worker.fill()
        worker.copier.before_begin = gate = Gate()
        worker.offer()
        gate.abandon(worker)


def test_who_abandons_waits_for_both_copies_that_are_under_way(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_transfers, "PART_BYTES", LAYOUT.block_bytes)
    with closing(Worker(endpoint)) as worker:
        worker.fill()
        gate = Gate()

        def first() -> None:
            worker.copier.before_each = lambda: None
            assert worker.copier.waiting == 2
            gate()

        worker.copier.before_each = first
        worker.offer()
        gate.abandon(worker)


# Steps.


def recorded(said: list[str]) -> Iterator[list[int]]:
    """Steps that say when they are asked for."""
    for step in ([1], [2, 3], [], [4], []):
        said.append(f"ask {step}")
        yield step


def beginner(said: list[str]) -> Callable[[Sequence[int]], Copies | None]:
    def begin(step: Sequence[int]) -> Copies:
        said.append(f"begin {step}")
        return Late(lambda: said.append(f"copied {step}"))

    return begin


def test_the_next_step_is_asked_for_while_one_is_copied() -> None:
    said: list[str] = []
    steps = [list(step) for step in one_ahead(recorded(said), beginner(said))]
    assert steps == [[1], [2, 3], [4]]
    assert said == [
        "ask [1]", "begin [1]", "ask [2, 3]", "begin [2, 3]", "copied [1]", "ask []",
        "copied [2, 3]", "ask [4]", "begin [4]", "ask []", "copied [4]",
    ]  # fmt: skip


def test_what_is_being_copied_is_waited_for_whatever_happens() -> None:
    """When nobody wants the rest, when a copy cannot begin, and when a step fails."""
    said: list[str] = []
    steps = one_ahead(recorded(said), beginner(said))
    assert next(steps) == [1]
    steps.close()
    assert said[-1] == "copied [2, 3]"

    def refuse(step: Sequence[int]) -> Copies | None:
        return beginner(said)(step) if step == [1] else None

    said.clear()
    assert list(one_ahead(recorded(said), refuse)) == []
    assert said[-1] == "copied [1]"

    def failing() -> Iterator[list[int]]:
        yield [1]
        raise RuntimeError("the step failed")

    said.clear()
    with pytest.raises(RuntimeError, match="the step failed"):
        list(one_ahead(failing(), beginner(said)))
    assert said[-1] == "copied [1]"
