"""VRAM blocks and their copies on a real GPU: bit-exact, ordered, pinned.

Needs torch, numpy and the package's own light imports; the worker at the end transformers, too.
"""

import hashlib
import mmap
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from kvstore_client.arena import ArenaMemory  # noqa: E402
from kvstore_workers.layout import KVLayout  # noqa: E402
from kvstore_workers.transfer import Copier  # noqa: E402
from kvstore_workers.vram import VramPool, choose_device  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LAYOUT = KVLayout(layers=16, kv_heads=8, head_dim=128, block_tokens=32)
"""Blocks of 2 MiB."""
BUSY_CYCLES = 500_000_000
"""Keeps a stream busy for some hundred milliseconds."""


@pytest.fixture
def vram() -> VramPool:
    pool = VramPool(LAYOUT, 64, choose_device())
    pool.bytes.random_(0, 256)
    torch.cuda.synchronize()
    return pool


def until_pinned(copier: Copier, arena: memoryview) -> None:
    """Asks, which begins it, and waits for its end."""
    copier.pinned("node", ArenaMemory(arena, LAYOUT.block_bytes))
    copier.settle()


def test_the_gpu_is_chosen_where_there_is_one() -> None:
    assert choose_device().type == "cuda"


def test_staging_memory_is_pinned_and_its_views_are_the_same_memory(vram: VramPool) -> None:
    staging = Copier(vram).staging(3)
    assert staging.tensor.is_pinned()
    staging.views[2][7] = 99
    assert int(staging.tensor[2, 7]) == 99
    assert [len(view) for view in staging.views] == [LAYOUT.block_bytes] * 3


def test_blocks_survive_the_way_down_and_up_bit_by_bit(vram: VramPool) -> None:
    copier = Copier(vram)
    staging = copier.staging(20)
    source = list(range(5, 25))
    target = list(range(60, 40, -1))
    wanted = [vram.sha256(block) for block in source]
    copier.to_host(source, staging.views, after=copier.mark())
    assert [hashlib.sha256(view).digest() for view in staging.views] == wanted
    untouched = vram.sha256(61)
    copier.to_device(staging.views, target, after=copier.mark())
    assert [vram.sha256(block) for block in target] == wanted
    assert vram.sha256(61) == untouched


def test_an_arena_is_pinned_and_blocks_go_straight_there_and_back(vram: VramPool) -> None:
    """Until its owner has another one, or none."""
    copier, size = Copier(vram), LAYOUT.block_bytes
    arenas = [memoryview(mmap.mmap(-1, 68 * size)) for _ in range(2)]
    for arena in arenas:
        until_pinned(copier, arena)
        assert copier.pinned("node", ArenaMemory(arena, LAYOUT.block_bytes))
        assert torch.frombuffer(arena, dtype=torch.uint8).is_pinned()
        # Neighbours here and there, also on both sides of where what is registered ends.
        places = [arena[at * size : (at + 1) * size] for at in (30, 31, 32, 33, 2, 0)]
        wanted = [vram.sha256(block) for block in range(5, 11)]
        copier.to_host(range(5, 11), places, after=copier.mark())
        assert [hashlib.sha256(place).digest() for place in places] == wanted
        readable = [place.toreadonly() for place in places]
        copier.to_device(readable, range(50, 56), after=copier.mark())
        assert [vram.sha256(block) for block in range(50, 56)] == wanted
    assert not torch.frombuffer(arenas[0], dtype=torch.uint8).is_pinned()
    assert not copier.pinned("node", None)
    until_pinned(copier, arenas[0])
    assert not torch.frombuffer(arenas[1], dtype=torch.uint8).is_pinned()
    copier.close()
    assert not torch.frombuffer(arenas[0], dtype=torch.uint8).is_pinned()


def test_nothing_waits_while_an_arena_is_pinned(vram: VramPool) -> None:
    """Neither who asks whether it is, nor copies; and kernels no longer than for a part of it."""
    copier, size = Copier(vram), 2 << 30
    arena = ArenaMemory(memoryview(mmap.mmap(-1, size)), LAYOUT.block_bytes)
    staging = copier.staging(1)
    began_s = time.monotonic()
    waits_s: list[float] = []
    pinned = copier.pinned("node", arena)
    while not pinned:
        since_s = time.monotonic()
        copier.to_host([3], staging.views, after=copier.mark())
        pinned = copier.pinned("node", arena)
        waits_s.append(time.monotonic() - since_s)
    pinning_s = time.monotonic() - began_s
    assert len(waits_s) > 2
    assert max(waits_s) < pinning_s / 3
    copier.close()


def test_neighbours_go_in_one_copy_and_others_in_their_own(vram: VramPool) -> None:
    copier = Copier(vram)
    staging = copier.staging(8)
    places = [staging.views[at] for at in (0, 1, 2, 5, 6, 4, 3)]
    blocks = [10, 11, 12, 13, 15, 16, 17]
    wanted = [vram.sha256(block) for block in blocks]
    copier.to_host(blocks, places, after=copier.mark())
    assert [hashlib.sha256(place).digest() for place in places] == wanted
    untouched = vram.sha256(39), vram.sha256(47)
    copier.to_device(places, range(40, 47), after=copier.mark())
    assert [vram.sha256(block) for block in range(40, 47)] == wanted
    assert (vram.sha256(39), vram.sha256(47)) == untouched


def test_one_flipped_bit_on_the_host_is_another_digest_in_vram(vram: VramPool) -> None:
    copier = Copier(vram)
    staging = copier.staging(1)
    copier.to_host([3], staging.views, after=copier.mark())
    staging.views[0][12345] ^= 1
    copier.to_device(staging.views, [4], after=copier.mark())
    assert vram.sha256(4) != vram.sha256(3)


def test_a_spill_waits_for_the_kernels_that_write_the_block(vram: VramPool) -> None:
    """In a thread of its own, as the spiller does it; without the mark it would be too early."""
    copier = Copier(vram)
    early, late = copier.staging(1), copier.staging(1)
    vram.bytes[7].fill_(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    vram.bytes[7].fill_(2)
    mark = copier.mark()
    copier.to_host([7], early.views, after=None)
    thread = threading.Thread(target=copier.to_host, args=([7], late.views), kwargs={"after": mark})
    thread.start()
    thread.join()
    assert int(late.tensor.min()) == int(late.tensor.max()) == 2
    assert int(early.tensor[0, 0]) == 1, "the stream was not busy: the test proves nothing"


def test_a_restore_waits_for_the_kernels_that_read_the_evicted_block(vram: VramPool) -> None:
    copier = Copier(vram)
    staging = copier.staging(1)
    staging.tensor.fill_(9)
    vram.bytes[7].fill_(1)
    seen_before = torch.empty_like(vram.bytes[7])
    torch.cuda._sleep(BUSY_CYCLES)
    seen_before.copy_(vram.bytes[7])
    copier.to_device(staging.views, [7], after=copier.mark())
    seen_after = vram.bytes[7].clone()
    assert int(seen_before.max()) == 1
    assert int(seen_after.min()) == 9


def test_a_spill_does_not_wait_for_later_kernels(vram: VramPool) -> None:
    """Spilling runs beside the computation: the mark covers only what was launched before it."""
    copier = Copier(vram)
    staging = copier.staging(1)
    mark = copier.mark()
    torch.cuda._sleep(4 * BUSY_CYCLES)
    later = torch.cuda.Event()
    later.record()
    copier.to_host([7], staging.views, after=mark)
    assert not later.query(), "the copy waited for a kernel that came after its mark"
    later.synchronize()


def test_copies_that_were_begun_are_finished_when_they_were_waited_for(vram: VramPool) -> None:
    """In either direction; nobody stands still until then."""
    copier = Copier(vram)
    staging = copier.staging(1)
    staging.tensor.fill_(9)
    torch.cuda._sleep(BUSY_CYCLES)
    vram.bytes[7].fill_(2)
    down = copier.begin_to_host([7], staging.views, after=copier.mark())
    assert int(staging.tensor.min()) == 9, "it waited for the kernel"
    down.wait()
    assert int(staging.tensor.min()) == int(staging.tensor.max()) == 2
    copier.begin_to_device(staging.views, [8], after=copier.mark()).wait()
    assert int(vram.bytes[8].min()) == int(vram.bytes[8].max()) == 2


def test_copies_down_and_up_run_from_two_threads_at_once(vram: VramPool) -> None:
    copier = Copier(vram)
    down, up = copier.staging(16), copier.staging(16)
    copier.to_host(list(range(16)), up.views, after=copier.mark())
    wanted = [vram.sha256(block) for block in range(32)]
    mark = copier.mark()

    def spill() -> None:
        for _ in range(20):
            copier.to_host(list(range(16, 32)), down.views, after=mark)

    thread = threading.Thread(target=spill)
    thread.start()
    for _ in range(20):
        copier.to_device(up.views, list(range(40, 56)), after=mark)
    thread.join()
    assert [vram.sha256(block) for block in range(40, 56)] == wanted[:16]
    assert [hashlib.sha256(view).digest() for view in down.views] == wanted[16:]


def test_the_bandwidth_of_copies_is_shown(
    vram: VramPool, capsys: pytest.CaptureFixture[str]
) -> None:
    copier = Copier(vram)
    staging = copier.staging(64)
    blocks = list(range(64))
    size_gb = 64 * LAYOUT.block_bytes / 1e9
    ways: dict[str, Callable[[], None]] = {
        "to host": lambda: copier.to_host(blocks, staging.views, after=None),
        "to device": lambda: copier.to_device(staging.views, blocks, after=None),
    }
    figures = []
    for name, copy in ways.items():
        copy()
        begin_s = time.perf_counter()
        for _ in range(10):
            copy()
        figures.append(f"{name} {10 * size_gb / (time.perf_counter() - begin_s):.1f} GB/s")
    with capsys.disabled():
        gpu = torch.cuda.get_device_name()
        sys.stdout.write(f"\n{gpu}: blocks of 2 MiB, {', '.join(figures)}\n")


@pytest.mark.parametrize(("start", "end"), [(0, 96), (96, 160), (96, 97), (128, 150)])
def test_fused_attention_sees_what_a_mask_lets_see(start: int, end: int) -> None:
    pytest.importorskip("transformers")
    from kvstore_workers.attention import Row, _attend, causal_mask

    device, dtype = choose_device(), torch.bfloat16
    torch.manual_seed(3)
    by_block = torch.randn(2, 2, 8, 32, 64, dtype=dtype, device=device)
    query = torch.randn(8, end - start, 64, dtype=dtype, device=device)
    table = torch.tensor([3, 1, 7, 2, 5][: -(-end // 32)], device=device)
    host = torch.device("cpu")
    assert causal_mask(start, end, 4, dtype, device) is None
    mask = causal_mask(start, end, 4, torch.float32, host)
    row = Row(table.cpu(), end, mask)
    wanted = _attend(query.float().cpu(), by_block.float().cpu(), row, 0.125)
    fused = _attend(query, by_block, Row(table, end, None), 0.125)
    assert (fused.float().cpu() - wanted).abs().max() < 0.02


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model whose prompts of 500 tokens have three whole chunks."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_worker_on_the_gpu_reuses_blocks_without_a_difference(checkpoint: Path) -> None:
    from kvstore_workers.request import Request
    from kvstore_workers.worker import Worker, WorkerConfig

    worker = Worker(WorkerConfig(checkpoint=checkpoint, vram_blocks=128))
    mine = Request([(7 * place) % 512 for place in range(500)], 12, logits_tokens=12)
    others = [Request([place % 512 for place in range(length)], 20) for length in (90, 300)]
    cold, warm = worker.generate([mine]), worker.generate([mine])
    assert warm[0].restored_tokens == {"vram": 384}
    assert warm[0].logits == cold[0].logits
    worker.forget_vram()
    assert worker.generate([*others, mine])[2].logits == cold[0].logits
    worker.close()


@pytest.mark.parametrize("pinned", [False, True])
def test_what_a_gpu_computed_another_worker_restores_from_memory_and_disk(
    checkpoint: Path, tmp_path: Path, pinned: bool
) -> None:
    """By memory in between, and straight from and to the node's memory once that is pinned."""
    pytest.importorskip("pydantic", reason="needs the store node")
    from kvstore_workers.request import Completion, Request
    from kvstore_workers.worker import Worker, WorkerConfig
    from tests.node_process import NodeProcess

    mine = Request([(7 * place) % 512 for place in range(500)], 12, logits_tokens=12)

    def answer() -> Completion:
        config = WorkerConfig(
            checkpoint=checkpoint, vram_blocks=128, store_endpoint=node.endpoint,
            match_budget_s=30.0, restore_budget_s=30.0, store_budget_s=30.0, restore_gate=False,
        )  # fmt: skip
        with Worker(config) as worker:
            filler = 0
            while pinned and not worker.stats()["arenas_pinned"]:
                worker.generate([Request([filler] * 200, 1)])
                filler += 1
            [completion] = worker.generate([mine])
            assert worker.flush_spills(30.0)
            assert not worker.stats().get("spill_failed")
            return completion

    node = NodeProcess(tmp_path)
    node.start()
    try:
        cold, from_memory = answer(), answer()
        node.stop()
        node.start()
        from_disk = answer()
    finally:
        node.kill()
    assert (cold.restored_tokens, from_memory.restored_tokens) == ({}, {"memory": 384})
    assert from_disk.restored_tokens == {"disk": 384}
    assert from_memory.logits == from_disk.logits == cold.logits
