"""What breaks is a miss: the node is killed, hangs or lies at each phase, and SGLang goes on."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_client.sglang import KVStoreBackend, transfers
from tests_engines.sglang.controller import Engine, engine
from tests_engines.sglang.rig import Node, attached, config, device_pool, fill, keys_of, mha, pages
from tests_engines.sglang.test_backend import (
    KEYS,
    PROMPT,
    START,
    has_arena,
    load,
    store,
    wait_until,
)

BUDGET_S = 0.5
SLACK_S = 1.0
"""For a machine that is busy: what a call may take beyond its budget."""
HASTY = {f"{call}_budget_s": BUDGET_S for call in ("match", "load", "store")}
PHASES = ("before the lookup", "before the load", "before the backup")
WAYS = pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])

StartNode = Callable[..., Node]


@pytest.fixture
def pool() -> Any:
    """Pages with random bytes."""
    pool = mha("page_first")
    fill(pool, 3)
    return pool


def hasty(endpoint: str, shared_memory: bool) -> Any:
    """A backend that waits for little."""
    return config(endpoint, extra=HASTY | {"shared_memory": shared_memory})


def in_time(call: Callable[[], Any]) -> Any:
    """The answer of one call to the node, which came within its budget."""
    begun_s = time.monotonic()
    answer = call()
    assert time.monotonic() - begun_s < BUDGET_S + SLACK_S
    return answer


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
@WAYS
@pytest.mark.parametrize("phase", PHASES)
def test_a_node_that_goes_away_costs_a_budget_and_no_more(
    phase: str, shared_memory: bool, number: int, pool: Any, start_node: StartNode
) -> None:
    """At each phase; once it is back, everything works again."""
    node = start_node()
    with attached(pool, hasty(node.endpoint, shared_memory)) as backend:
        before = store(backend, pool)
        if phase == "before the load":
            assert backend.batch_exists(KEYS, START) == 4
        node.signal(number)
        if phase == "before the backup":
            others, indices = keys_of(list(range(100, 164))), pool.alloc(64)
            held = in_time(lambda: backend.batch_set_v1(others, indices, START))
            assert held == [False] * 4
        else:
            if phase == "before the lookup":
                assert in_time(lambda: backend.batch_exists(KEYS, START)) == 0
            got = in_time(lambda: load(backend, pool))
            # What lies in shared memory may still be copied, as long as the node has not let go.
            assert all(page in (None, stored) for page, stored in zip(got, before, strict=True))
            assert None in got
        if number == signal.SIGKILL:
            node.start()
        else:
            node.signal(signal.SIGCONT)
        wait_until(lambda: all(backend.batch_set_v1(KEYS, torch.arange(64), START)))
        wait_until(lambda: backend.batch_exists(KEYS, START) == 4)
        wait_until(lambda: None not in load(backend, pool))


@pytest.mark.parametrize("copying", ["gather", "scatter"])
@WAYS
def test_a_node_that_dies_in_the_middle_of_a_transfer_leaves_nothing_wrong(
    copying: str,
    shared_memory: bool,
    pool: Any,
    start_node: StartNode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while the second page is copied, to it or from it."""
    node = start_node()
    with attached(pool, hasty(node.endpoint, shared_memory)) as backend:
        if shared_memory:
            wait_until(has_arena(backend))
        before = store(backend, pool)
        copies = 0
        copy = getattr(transfers, copying)

        def killing(*arguments: Any) -> None:
            nonlocal copies
            copies += 1
            if copies == 2:
                node.signal(signal.SIGKILL)
            copy(*arguments)

        monkeypatch.setattr(transfers, copying, killing)
        if copying == "gather":
            others, indices = keys_of(list(range(100, 164))), pool.alloc(64)
            assert in_time(lambda: backend.batch_set_v1(others, indices, START)) == [False] * 4
        else:
            got = in_time(lambda: load(backend, pool))
            assert all(page in (None, stored) for page, stored in zip(got, before, strict=True))
            assert got[0] == before[0]
        assert copies >= 2


@WAYS
def test_a_flipped_bit_in_the_nodes_memory_is_a_miss(
    shared_memory: bool, pool: Any, start_node: StartNode
) -> None:
    """Pages before it are delivered; the engine is told that this one did not come."""
    node = start_node()
    with (
        attached(pool, hasty(node.endpoint, True)) as near,
        attached(pool, hasty(node.endpoint, shared_memory)) as backend,
    ):
        wait_until(has_arena(near))
        before = store(near, pool)
        assert load(near, pool) == before
        arena = near._client.arena.memory
        at = bytes(arena).index(before[2])
        arena[at + 777] ^= 1
        if shared_memory:
            wait_until(has_arena(backend))
        assert load(backend, pool) == [*before[:2], None, None]
        assert backend.counters["load_corrupt"] == 1


def test_a_flipped_bit_on_disk_is_a_miss(pool: Any, start_node: StartNode) -> None:
    """The node finds it when it reads the block; the pages before it are whole."""
    node = start_node(
        disk_enabled="true", disk_capacity_bytes="64MiB", disk_segment_bytes="4MiB",
        disk_codec="raw",
    )  # fmt: skip
    with attached(pool, config(node.endpoint)) as backend:
        before = store(backend, pool)
    node.signal(signal.SIGTERM)
    flip(node.home, before[2])
    node.start()
    with attached(pool, config(node.endpoint)) as backend:
        found = backend.batch_exists(KEYS, START)
        assert load(backend, pool) == [*before[:2], None, None]
        assert found >= 2


def flip(directory: Path, page: bytes) -> None:
    """Turns one bit over in the only file that holds this page."""
    [(file, content)] = [
        (file, content)
        for file in directory.rglob("*")
        if file.is_file() and page in (content := file.read_bytes())
    ]
    at = content.index(page) + 777
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.fixture
def running(
    pool: Any,
    start_node: StartNode,
    group: torch.distributed.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[Engine, Node]]:
    """SGLang's controller over a hasty backend."""
    node = start_node()
    with engine(pool, device_pool(), node.endpoint, group, monkeypatch, **HASTY) as run:
        yield run, node


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
@pytest.mark.parametrize("phase", PHASES)
def test_sglangs_threads_go_on_without_the_node(
    phase: str, number: int, running: tuple[Engine, Node]
) -> None:
    """The controller acknowledges every operation, and detaches."""
    run, node = running
    stored = run.pool.alloc(64)
    assert run.backup(PROMPT, stored, []) == 64
    before = pages(run.pool, stored)
    found = run.find(PROMPT) if phase == "before the load" else None
    node.signal(number)
    if phase == "before the backup":
        others = list(range(100, 164))
        assert in_time(lambda: run.backup(others, run.pool.alloc(64), [])) == 0
    elif found is None:
        assert in_time(lambda: run.prefetch(PROMPT))[0] == 0
    else:
        assert found.storage_hit_count == 64
        completed, into = in_time(lambda: run.fetch(found))
        assert pages(run.pool, into)[: completed // 16] == before[: completed // 16]


def test_calls_from_many_threads_do_not_disturb_each_other(
    pool: Any, start_node: StartNode
) -> None:
    """Each thread stores, finds and loads prompts of its own, over one backend."""
    from concurrent.futures import ThreadPoolExecutor

    with attached(pool, config(start_node().endpoint)) as backend:

        def work(number: int) -> bool:
            for turn in range(8):
                keys = keys_of(list(range(1000 * number + turn, 1000 * number + turn + 32)))
                indices, into = pool.alloc(32), pool.alloc(32)
                assert backend.batch_set_v1(keys, indices, START) == [True, True]
                assert backend.batch_exists(keys, START) == 2
                assert backend.batch_get_v1(keys, into, START) == [True, True]
                same = pages(pool, into) == pages(pool, indices)
                pool.free(indices)
                pool.free(into)
                assert same
            return True

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(work, range(4)))


def test_what_the_lookup_promised_is_loaded_though_memory_is_short(
    pool: Any, start_node: StartNode
) -> None:
    """Pages that were found are leased: others that come meanwhile do not push them out."""
    node = start_node(memory_capacity_bytes="768KiB", memory_slab_bytes="64KiB")
    with attached(pool, config(node.endpoint)) as backend:
        before = store(backend, pool)
        assert backend.batch_exists(KEYS, START) == 4
        indices = torch.arange(64)
        for turn in range(1, 8):
            backend.batch_set_v1(keys_of(list(range(turn, 64 + turn))), indices, START)
        assert load(backend, pool) == before
        assert not backend._promises._open
        for turn in range(10, 18):
            backend.batch_set_v1(keys_of(list(range(turn, 64 + turn))), indices, START)
        assert load(backend, pool) != before


def test_a_promise_that_cannot_be_kept_is_let_go(pool: Any, start_node: StartNode) -> None:
    """After a failed load the rest of the lease is released; nobody will read on."""
    node = start_node()
    with attached(pool, hasty(node.endpoint, False)) as backend:
        assert_promises(backend, 0)
        store(backend, pool)
        assert backend.batch_exists(KEYS, START) == 4
        assert_promises(backend, 1)
        load(backend, pool, KEYS[:2])
        assert_promises(backend, 1)
        load(backend, pool, [KEYS[2], "nope"])
        assert_promises(backend, 1)
        load(backend, pool, [KEYS[3], "nope"])
        assert_promises(backend, 0)


def assert_promises(backend: KVStoreBackend, number: int) -> None:
    """So many leases are kept."""
    assert len(backend._promises._open) == number
