"""The worker: loss-free generation over VRAM and the store below it.

A tiny random Llama computes; the store is a twin in memory that can hang, refuse and forget.
"""

import json
import random
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kvstore.api.digest import block_digest
from kvstore.api.errors import ConfigError, InvalidArgument, Unavailable
from kvstore.api.hint import Reuse, ReuseHint
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import Loaded
from kvstore_client import Client, Match, Run, Space
from kvstore_client.in_place import EmptySlot, GivenBlock
from kvstore_workers.layout import describe_space, digest_weights, read_layout
from kvstore_workers.link import StoreClient, StoreLink
from kvstore_workers.model import DecodeRow, check_config, load_model
from kvstore_workers.ray_app import StoreProcess
from kvstore_workers.request import Completion, Request
from kvstore_workers.vram import VramPool
from kvstore_workers.worker import Worker, WorkerConfig

VOCABULARY = 256
BLOCK = 8
CHUNK = 32
GEOMETRY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}


def save_model(kind: str, path: Path, **changes: Any) -> Path:
    """A random model of a family, the same at every call, as a checkpoint directory."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **{**GEOMETRY, **changes})
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random tokens; a longer text of the same seed begins with the shorter one."""
    chance = random.Random(seed)
    return [chance.randrange(VOCABULARY) for _ in range(count)]


class StoreTwin:
    """A store in memory, for any number of clients. It can hang, fall short, refuse and be gone."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str | None, str, bytes, bytes], bytes] = {}
        self.leases: set[bytes] = set()
        self.stores: list[tuple[int, bytes, ReuseHint | None]] = []
        """Blocks, parent key and hint of every call."""
        self.matches = 0
        self.named_blocks: list[tuple[int, int]] = []
        """Keys of every match, and how many of them the worker had itself."""
        self.reachable = True
        self.refuses = False
        self.breaks = False
        """Loads raise what no client should raise."""
        self.load_at_most = 10**6
        self.open_loads = 0
        """Loads that were begun and have not ended."""
        self.gate = threading.Event()
        """Stores wait while it is not set."""
        self.gate.set()

    def connect(self, endpoint: str, token: str | None) -> StoreClient:
        return ClientTwin(self, token)


@dataclass
class ClientTwin:
    """One tenant's view of a `StoreTwin`, with the surface of `kvstore_client.Client`."""

    store_twin: StoreTwin
    token: str | None
    closed: bool = field(default=False)

    def open_space(self, descriptor: SpaceDescriptor) -> Space:
        if not self.store_twin.reachable:
            raise Unavailable("nobody listens")
        return Space.of(descriptor)

    def match(
        self,
        spaces: Sequence[Space],
        keys: Sequence[bytes],
        *,
        scopes: Sequence[str] = (),
        lease_ms: int = 5000,
        hint: ReuseHint | None = None,
        request_id: bytes = b"",
        held_blocks: int = 0,
        budget_s: float | None = None,
    ) -> Match:
        twin = self.store_twin
        twin.matches += 1
        twin.named_blocks.append((len(keys), held_blocks))
        found = held_blocks
        while found < len(keys) and self._name(spaces[0], keys[found], scopes) in twin.blocks:
            found += 1
        lease = twin.matches.to_bytes(8, "little")
        twin.leases.add(lease)
        return Match(found, ((Run(found, "memory", True),),), lease, lease_ms)

    def load_stream(
        self,
        space: Space,
        keys: Sequence[bytes],
        buffers: Sequence[memoryview],
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        budget_s: float | None = None,
    ) -> Generator[list[Loaded], None, None]:
        assert lease is not None and lease.lease_id in self.store_twin.leases
        assert budget_s is not None and budget_s > 0
        twin = self.store_twin
        twin.open_loads += 1
        wanted = list(zip(keys, buffers, strict=True))[: twin.load_at_most]
        try:
            while wanted:
                # Three at a time: blocks come in pieces that no chunk is cut into.
                piece, wanted = wanted[:3], wanted[3:]
                yield [self._fetch(space, key, buffer, scopes) for key, buffer in piece]
            if twin.breaks:
                raise RuntimeError("a client never does this")
        finally:
            twin.open_loads -= 1
            for buffer in buffers:
                buffer[:] = b"\xee" * len(buffer)  # Nobody may rely on it any more.

    def _fetch(self, space: Space, key: bytes, buffer: memoryview, scopes: Sequence[str]) -> Loaded:
        data = self.store_twin.blocks[self._name(space, key, scopes)]
        buffer[:] = data
        return Loaded("memory", block_digest(space.space_id, key, data))

    def store(
        self,
        space: Space,
        keys: Sequence[bytes],
        blocks: Sequence[memoryview],
        *,
        parent_key: bytes = b"",
        scope: str = "",
        hint: ReuseHint | None = None,
        budget_s: float | None = None,
    ) -> list[bool]:
        twin = self.store_twin
        twin.stores.append((len(keys), parent_key, hint))
        twin.gate.wait()
        if twin.refuses:
            return [False] * len(keys)
        for key, block in zip(keys, blocks, strict=True):
            assert len(block) == space.block_bytes
            twin.blocks.setdefault(self._name(space, key, [scope] if scope else []), bytes(block))
        return [True] * len(keys)

    arena = None

    def write_in_place(
        self, space: Space, keys: Sequence[bytes], held: list[bool], **options: Any
    ) -> Generator[list[EmptySlot], None, None]:
        """It shares no memory."""
        yield from ()

    def read_in_place(
        self, space: Space, keys: Sequence[bytes], **options: Any
    ) -> Generator[list[GivenBlock], None, None]:
        """It shares no memory."""
        yield from ()

    def release(self, match: Match) -> None:
        self.store_twin.leases.discard(match.lease_id)

    def close(self) -> None:
        self.closed = True

    def _name(
        self, space: Space, key: bytes, scopes: Sequence[str]
    ) -> tuple[str | None, str, bytes, bytes]:
        return (self.token, scopes[0] if scopes else "", space.space_id, key)


@pytest.fixture
def store() -> Iterator[StoreTwin]:
    """A store twin that ends without a lease and never hangs at the end."""
    twin = StoreTwin()
    yield twin
    assert not twin.leases, "a lease was not released"
    assert twin.open_loads == 0, "a load was left behind"


Start = Callable[..., Worker]


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Start]:
    """Starts workers; at the end each is idle, has consistent bookkeeping, and is closed."""
    workers: list[tuple[Worker, StoreTwin | None]] = []

    def begin(store: StoreTwin | None = None, **changes: Any) -> Worker:
        settings: dict[str, Any] = {
            "checkpoint": checkpoint,
            "vram_blocks": 64,
            "block_tokens": BLOCK,
            "chunk_tokens": CHUNK,
            "threads": 1,
            "store_endpoint": "twin" if store else None,
            "match_budget_s": 30.0,
            "restore_budget_s": 30.0,
            "restore_gate": False,
        }
        config = WorkerConfig(**{**settings, **changes})
        worker = Worker(config, connect=store.connect if store else None)
        workers.append((worker, store))
        return worker

    yield begin
    for worker, twin in workers:
        if twin is not None:
            twin.gate.set()
        assert worker.flush_spills(30.0)
        worker._engine._take_back(0.0)
        worker._engine.pool.check()
        assert worker._engine.pool.usage().in_use == 0, "a block was never released"
        worker.close()


def one(worker: Worker, prompt: Sequence[int], new: int = 4, **changes: Any) -> Completion:
    """The answer to one request, all logits kept."""
    request = Request(prompt, new, **{"logits_tokens": new, "record_digests": True, **changes})
    (completion,) = worker.generate([request])
    return completion


def spilled(worker: Worker, prompt: Sequence[int], **changes: Any) -> Completion:
    """The same, with its blocks in the store: they go there beside the answer, or after it."""
    completion = one(worker, prompt, **changes)
    assert worker.flush_spills(30.0)
    return completion


def cached_blocks(worker: Worker, prompt: Sequence[int]) -> list[int]:
    """Where the prompt's canonical blocks lie in VRAM, after it was computed if need be."""
    one(worker, prompt)
    blocks = worker._engine.pool.match(worker._engine._canonical_keys(Request(prompt, 1)))
    worker._engine.pool.release(blocks)
    return blocks


def vram_of(worker: Worker) -> VramPool:
    return worker._engine._vram


# What is computed.


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_every_family_computes_what_transformers_computes(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = save_model(kind, tmp_path / "model", **changes)
    layout = read_layout(path, BLOCK, "float32")
    vram = VramPool(layout, 40, torch.device("cpu"))
    model = load_model(path, vram, width=2)
    text = tokens(75)
    table = torch.tensor(random.Random(1).sample(range(40), 10))
    for begin in range(0, 70, CHUNK):
        chunk = text[begin : min(begin + CHUNK, 70)]
        first = model.prefill(chunk, begin, table, want_logits=True)
    assert first is not None
    rows = [DecodeRow(text[place], place, table) for place in range(70, 75)]
    ours = [first, *(model.decode([row])[0] for row in rows)]
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        theirs = reference(torch.tensor([text]), use_cache=False).logits[0, 69:75]
    torch.testing.assert_close(torch.stack(ours), theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_request_gets_the_same_bits_alone_and_among_others_at_any_row(
    start: Start, dtype: str
) -> None:
    mine = Request(tokens(50, 1), 12, logits_tokens=12)
    others = [
        Request(tokens(40 + 9 * seed, seed), 5 + 4 * seed, temperature=0.5, use_cache=seed != 3)
        for seed in (2, 3, 4)
    ]
    alone = start(dtype=dtype).generate([mine])[0]
    for row in range(4):
        crowd = [*others[:row], mine, *others[row:]]
        among = start(dtype=dtype).generate(crowd)[row]
        assert among.tokens == alone.tokens
        assert among.logits == alone.logits
    assert len(set(alone.logits)) == 12


def test_more_requests_than_rows_are_all_answered_in_order(start: Start) -> None:
    worker = start(max_running=2)
    requests = [Request(tokens(20 + seed, seed), 1 + seed % 4) for seed in range(7)]
    completions = worker.generate(requests)
    assert [one.request_id for one in completions] == list(range(7))
    assert [len(one.tokens) for one in completions] == [1, 2, 3, 4, 1, 2, 3]
    again = [worker.generate([request])[0].tokens for request in requests]
    assert again == [one.tokens for one in completions]


# Loss-free reuse.


@pytest.mark.parametrize("length", [33, 63, 64, 65, 97, 200])
def test_reuse_from_vram_changes_no_bit_and_ends_at_a_chunk(start: Start, length: int) -> None:
    worker = start()
    prompt = tokens(length)
    cold = one(worker, prompt, use_cache=False)
    first, second = one(worker, prompt), one(worker, prompt)
    assert first.restored_tokens == {}
    restored = (length - 1) // CHUNK * CHUNK
    assert second.restored_tokens == {"vram": restored}
    assert second.computed_tokens == length - restored > 0
    assert cold.logits == first.logits == second.logits
    assert cold.tokens == first.tokens == second.tokens


def test_reuse_from_the_store_changes_no_bit(start: Start, store: StoreTwin) -> None:
    prompt = tokens(150)
    first = start(store, record_spill_digests=True)
    cold = one(first, prompt)
    assert first.flush_spills(30.0)
    second = start(store, vram_blocks=40)
    warm = one(second, prompt)
    assert warm.restored_tokens == {"memory": 128}
    assert (warm.logits, warm.tokens) == (cold.logits, cold.tokens)
    assert len(warm.restored_digests) == 128 // BLOCK
    written = first.spill_digests()
    assert all(written[block.key] == block.sha256 for block in warm.restored_digests)
    again = one(second, prompt)
    assert again.restored_tokens == {"vram": 128}
    assert again.logits == cold.logits


def test_what_is_computed_sooner_than_loaded_is_computed(start: Start, store: StoreTwin) -> None:
    """The gate is told how long both take; whatever it decides, no bit changes."""
    worker = start(store, restore_gate=True)
    gate = worker._tiers.restorer.gate if worker._tiers is not None else None
    assert gate is not None
    prompt = tokens(70, 5)
    first = one(worker, prompt)
    assert worker.flush_spills(30.0)
    for seconds, restores in ((1e6, False), (0.0, True)):
        for _ in range(200):
            gate.loaded(["memory"] * 8, seconds)
        worker.forget_vram()
        again = one(worker, prompt)
        assert bool(again.restored_tokens) == restores
        assert again.logits == first.logits
    assert worker.stats()["restore_recomputed"] > 0


def test_vram_and_store_together_restore_one_prefix(start: Start, store: StoreTwin) -> None:
    prompt = tokens(150)
    cold = spilled(start(store), prompt)
    second = start(store)
    one(second, prompt[:70], use_cache=True)
    warm = one(second, prompt)
    assert warm.restored_tokens == {"vram": 64, "memory": 64}
    assert store.named_blocks[-1] == (128 // BLOCK, 64 // BLOCK), "the store cannot touch the head"
    assert warm.logits == cold.logits


def test_a_store_that_has_part_of_a_chunk_restores_whole_chunks_only(
    start: Start, store: StoreTwin
) -> None:
    prompt = tokens(150)
    cold = spilled(start(store), prompt)
    forgotten = list(store.blocks)[CHUNK // BLOCK + 2 :]
    for name in forgotten:
        del store.blocks[name]
    warm = one(start(store), prompt)
    assert warm.restored_tokens == {"memory": CHUNK}
    assert warm.logits == cold.logits


def test_what_the_store_has_of_the_next_request_comes_beside_a_decode_step(
    start: Start, store: StoreTwin
) -> None:
    """No step goes by in which it only waits: two chunks of each prompt take two steps."""
    engine, steps = start(store)._engine, 0
    for seed in range(3):
        engine.submit(Request(tokens(CHUNK + 1, seed), 20))
    while len(engine._running) < 3:
        engine.step()
        steps += 1
        if engine._filling is not None and engine._filling.restoring is not None:
            engine._filling.restoring.result(30.0)
    assert steps == 6
    while engine.busy:
        engine.step()


def test_a_partial_chunk_and_an_answer_are_never_reused(start: Start, store: StoreTwin) -> None:
    worker = start(store)
    prompt = tokens(CHUNK + 20)
    answer = one(worker, prompt, new=60)
    conversation = [*prompt, *answer.tokens, 1]
    second = one(worker, conversation)
    assert second.restored_tokens == {"vram": CHUNK}
    assert second.logits == one(worker, conversation, use_cache=False).logits
    assert worker.flush_spills(30.0)
    assert len(store.blocks) == (len(conversation) - 1) // CHUNK * CHUNK // BLOCK


def test_without_cache_nothing_is_read_or_published(start: Start, store: StoreTwin) -> None:
    worker = start(store)
    prompt = tokens(100)
    one(worker, prompt, use_cache=False)
    assert one(worker, prompt).restored_tokens == {}
    assert worker.flush_spills(30.0)
    stored, matched = len(store.blocks), store.matches
    assert one(worker, prompt, use_cache=False).restored_tokens == {}
    assert (len(store.blocks), store.matches) == (stored, matched)


@pytest.mark.parametrize("damage", ["one bit", "a foreign block", "two blocks swapped"])
def test_damage_in_vram_is_seen_in_logits_and_digests(start: Start, damage: str) -> None:
    """The proofs above can fail: the same comparisons notice what is planted here.

    Two swapped blocks of one chain are seen by the digests only: a key carries its position,
    attention does not care for the order in which it finds keys.
    """
    worker = start()
    prompt = tokens(100)
    foreign = cached_blocks(worker, tokens(100, 9))
    sound = one(worker, prompt)
    blocks = cached_blocks(worker, prompt)
    intact = one(worker, prompt)
    memory = vram_of(worker).bytes
    if damage == "one bit":
        memory[blocks[5], 77] ^= 0x40
    elif damage == "a foreign block":
        memory[blocks[5]] = memory[foreign[5]]
    else:
        memory[[blocks[2], blocks[7]]] = memory[[blocks[7], blocks[2]]]
    damaged = one(worker, prompt)
    assert intact.logits == sound.logits
    assert damaged.restored_tokens == intact.restored_tokens
    assert damaged.restored_digests != intact.restored_digests
    if damage != "two blocks swapped":
        assert damaged.logits != sound.logits


# Who shares with whom.


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"tenant": "a", "salt": b"x"}, {}])
def test_tenants_and_salts_never_meet_in_vram_or_store(
    start: Start, store: StoreTwin, other: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"token": "mine", "tokens": {"a": "token a", "b": "token b"}}
    worker = start(store, **settings)
    prompt = tokens(100)
    one(worker, prompt, tenant="a")
    assert one(worker, prompt, **other).restored_tokens == {}
    assert one(worker, prompt, tenant="a").restored_tokens == {"vram": 96}
    assert worker.flush_spills(30.0)
    fresh = start(store, **settings)
    assert one(fresh, prompt, tenant="a").restored_tokens == {"memory": 96}


def test_a_shared_scope_is_where_blocks_go_and_come_from(start: Start, store: StoreTwin) -> None:
    prompt = tokens(100)
    spilled(start(store, scope="team"), prompt)
    assert {name[1] for name in store.blocks} == {"team"}
    assert one(start(store), prompt).restored_tokens == {}
    assert one(start(store, scope="team"), prompt).restored_tokens == {"memory": 96}


def test_a_hint_reaches_the_store(start: Start, store: StoreTwin) -> None:
    hint = ReuseHint(b"session", Reuse.INTERACTIVE, 5000)
    worker = start(store)
    one(worker, tokens(100), hint=hint)
    assert worker.flush_spills(30.0)
    assert [call[2] for call in store.stores] == [hint]


# Choosing tokens.


def test_sampling_is_reproducible_and_depends_on_the_seed_alone(start: Start) -> None:
    worker = start()
    prompt = tokens(40)
    draw = {"temperature": 3.0, "top_p": 0.95}
    first = one(worker, prompt, new=16, seed=5, **draw)
    one(worker, prompt, new=16, seed=6, **draw)
    assert one(worker, prompt, new=16, seed=5, **draw).tokens == first.tokens
    assert one(worker, prompt, new=16, seed=6, **draw).tokens != first.tokens


def test_a_tiny_top_p_leaves_only_the_likeliest_token(start: Start) -> None:
    worker = start()
    greedy = one(worker, tokens(40), new=8)
    drawn = one(worker, tokens(40), new=8, temperature=2.0, top_p=1e-6)
    assert drawn.tokens == greedy.tokens
    likeliest = [int(np.frombuffer(logits, "<f4").argmax()) for logits in greedy.logits]
    assert tuple(likeliest) == greedy.tokens


def test_an_answer_ends_with_the_end_token_unless_told_otherwise(
    checkpoint: Path, start: Start, tmp_path: Path
) -> None:
    answer = one(start(), tokens(40), new=8).tokens
    path = Path(shutil.copytree(checkpoint, tmp_path / "with-eos"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(settings | {"eos_token_id": [answer[3]]}))
    worker = start(checkpoint=path)
    ended = one(worker, tokens(40), new=8).tokens
    assert ended == answer[: answer.index(answer[3]) + 1]
    assert one(worker, tokens(40), new=8, ignore_eos=True).tokens == answer


# VRAM is short.


def test_random_requests_in_little_vram_keep_every_invariant(
    start: Start, store: StoreTwin
) -> None:
    """Conversations that share heads evict each other; answers stay those of a cold run."""
    seed = 11
    chance = random.Random(seed)
    worker = start(store, vram_blocks=44, max_running=3, spill_patience_s=0.0)
    cold = start(vram_blocks=200)
    requests = []
    for _ in range(24):
        shared = tokens(CHUNK * chance.randrange(4), chance.randrange(2))
        own = tokens(chance.randrange(1, 50), 100 + chance.randrange(4))
        requests.append(Request([*shared, *own], chance.randrange(1, 6), logits_tokens=6))
    wanted = [cold.generate([replace(one, use_cache=False)])[0] for one in requests]
    ids = [worker._engine.submit(request) for request in requests]
    answers: dict[int, Completion] = {}
    while worker._engine.busy:
        answers.update((done.request_id, done) for done in worker._engine.step())
        worker._engine.pool.check()
    for request_id, cold_answer in zip(ids, wanted, strict=True):
        assert answers[request_id].logits == cold_answer.logits, f"seed {seed}"
    assert worker.stats()["prompt_tokens_vram"] > 0


def test_what_vram_forgot_comes_back_from_the_store(start: Start, store: StoreTwin) -> None:
    worker = start(store, vram_blocks=16)
    first = one(worker, tokens(100, 1))
    assert worker.flush_spills(30.0)
    one(worker, tokens(100, 2))
    again = one(worker, tokens(100, 1))
    assert again.restored_tokens.get("memory", 0) > 0
    assert sum(again.restored_tokens.values()) == 96
    assert again.logits == first.logits


def test_a_request_never_waits_for_a_store_that_hangs(start: Start, store: StoreTwin) -> None:
    """Each prompt fills VRAM and the staging holds one block, so spills pin what comes next."""
    worker = start(store, vram_blocks=14, staging_bytes=1, spill_patience_s=0.0)
    store.gate.clear()
    answers = [one(worker, tokens(100, seed)) for seed in range(3)]
    assert all(len(answer.tokens) == 4 for answer in answers)
    assert not worker.flush_spills(0.0)
    store.gate.set()
    assert worker.flush_spills(30.0)
    stats = worker.stats()
    offered = 3 * 96 // BLOCK
    assert stats["spill_held"] + stats["spill_dropped"] + stats.get("spill_failed", 0) == offered
    assert stats["spill_dropped"] > 0


@pytest.mark.parametrize(
    ("request_change", "field_name"),
    [
        ({"prompt": tokens(600)}, "prompt"),
        ({"prompt": [VOCABULARY]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": tokens(30), "max_new_tokens": 400}, "prompt"),
        ({"tenant": "nobody"}, "tenant"),
    ],
)
def test_what_can_never_be_served_is_refused_before_anything_is_computed(
    start: Start, request_change: dict[str, Any], field_name: str
) -> None:
    worker = start(vram_blocks=50)
    bad = Request(**{"prompt": [1], "max_new_tokens": 2, **request_change})
    with pytest.raises(InvalidArgument, match=f"request.{field_name}"):
        worker.generate([Request([1], 1), bad])
    assert "requests" not in worker.stats()
    assert len(one(worker, [1, 2, 3]).tokens) == 4


# The store misbehaves.


def test_a_full_queue_takes_the_head_of_a_chain_and_counts_the_rest(
    start: Start, store: StoreTwin
) -> None:
    block_bytes = read_layout(start().config.checkpoint, BLOCK, "bfloat16").block_bytes
    worker = start(store, spill_queue_bytes=5 * block_bytes)
    one(worker, tokens(100))
    assert worker.flush_spills(30.0)
    assert (worker.stats()["spill_held"], worker.stats()["spill_dropped"]) == (5, 7)
    one(worker, tokens(100))
    assert worker.flush_spills(30.0)
    assert worker.stats()["spill_held"] == 10
    assert store.stores[1][:2] == (5, list(store.blocks)[4][3])


def test_a_chain_that_the_store_holds_is_not_offered_again(start: Start, store: StoreTwin) -> None:
    worker = start(store)
    one(worker, tokens(100))
    assert worker.flush_spills(30.0)
    one(worker, tokens(100))
    fresh = start(store)
    one(fresh, tokens(100))
    assert worker.flush_spills(30.0) and fresh.flush_spills(30.0)
    assert [call[0] for call in store.stores] == [12]


def test_after_a_refusal_chains_are_offered_whole(start: Start, store: StoreTwin) -> None:
    worker = start(store)
    one(worker, tokens(70))
    assert worker.flush_spills(30.0)
    store.refuses = True
    store.blocks.clear()
    one(worker, tokens(100))
    assert worker.flush_spills(30.0)
    assert worker.stats()["spill_failed"] == 4
    store.refuses = False
    one(worker, tokens(100))
    assert worker.flush_spills(30.0)
    assert [call[:2] for call in store.stores][-1] == (12, b"")
    assert len(store.blocks) == 12


@pytest.mark.parametrize("fault", ["short", "empty", "broken"])
def test_a_failed_load_is_computed_instead(start: Start, store: StoreTwin, fault: str) -> None:
    prompt = tokens(150)
    cold = spilled(start(store), prompt)
    store.load_at_most = {"short": 7, "empty": 0, "broken": 100}[fault]
    store.breaks = fault == "broken"
    warm = one(start(store), prompt)
    assert warm.restored_tokens == ({"memory": CHUNK} if fault == "short" else {})
    assert warm.logits == cold.logits


def test_an_unreachable_store_costs_only_computing(start: Start, store: StoreTwin) -> None:
    store.reachable = False
    worker = start(store)
    assert worker.connected() == {"": False}
    cold = one(worker, tokens(100))
    assert cold.computed_tokens == 100
    assert one(worker, tokens(100)).restored_tokens == {"vram": 96}
    assert not store.stores and not store.matches


def test_the_space_is_opened_when_the_store_comes_back(checkpoint: Path, store: StoreTwin) -> None:
    store.reachable = False
    layout = read_layout(checkpoint, BLOCK, "bfloat16")
    descriptor = describe_space(checkpoint, layout, numerics="")
    link = StoreLink(lambda: store.connect("twin", None), descriptor, retry_s=0.001)
    assert link.wait_tried(30.0)
    assert link.space is None
    store.reachable = True
    link._opener.join(30.0)
    assert link.space is not None
    assert link.space.space_id == descriptor.space_id
    link.close()


# A node of its own.


WAYS = ("local_commit", "bulk_write", "write")
"""As a node counts what was stored through shared memory, by the bulk path, and by the stream."""


@pytest.mark.parametrize("way", WAYS)
def test_blocks_go_to_a_node_and_come_back_until_it_is_killed(
    start: Start, tmp_path: Path, way: str
) -> None:
    """By the best way that the node offers."""
    settings = tmp_path / "node.toml"
    settings.write_text(
        f"""
        server = {{ listen = "127.0.0.1:0", metrics_listen = "127.0.0.1:0" }}
        memory = {{ capacity_bytes = "32MiB", slab_bytes = "1MiB" }}
        disk = {{ path = "{tmp_path}/blocks", capacity_bytes = "64MiB", segment_bytes = "4MiB" }}
        shared_memory = {{ enabled = {str(way == "local_commit").lower()} }}
        bulk = {{ enabled = {str(way != "write").lower()} }}
        """
    )
    node = StoreProcess(settings)
    try:
        endpoint = node.start()
        prompt = tokens(150)
        first = start(store_endpoint=endpoint, record_spill_digests=True)
        cold = one(first, prompt)
        assert first.flush_spills(30.0)
        second = start(store_endpoint=endpoint)
        warm = one(second, prompt)
        assert sum(warm.restored_tokens.values()) == 128
        assert warm.logits == cold.logits
        written = first.spill_digests()
        assert all(written[block.key] == block.sha256 for block in warm.restored_digests)
        with Client(endpoint) as client:
            counted = client.status().counters
        stored = {op for op in WAYS if any(f'op="{op}"' in name for name in counted)}
        assert stored == {way}
        assert node.kill() == -signal.SIGKILL
        second.forget_vram()
        alone = one(second, prompt)
        assert alone.computed_tokens == 150
        assert alone.logits == cold.logits
    finally:
        node.kill()


def test_a_node_that_cannot_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="did not start"):
        StoreProcess(tmp_path / "missing.toml").start()


# Spaces and settings.


def test_a_flipped_bit_of_the_weights_or_another_setting_is_another_space(
    checkpoint: Path, tmp_path: Path
) -> None:
    layout = read_layout(checkpoint, BLOCK, "bfloat16")
    same = describe_space(checkpoint, layout, numerics="n", model="m")
    assert same.revision == digest_weights(checkpoint)
    assert same.block_bytes == 2 * 2 * 2 * BLOCK * 16 * 2
    path = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    ids = {describe_space(path, layout, numerics="n", model="m").space_id}
    assert ids == {same.space_id}
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ids.add(describe_space(path, layout, numerics="n", model="m").space_id)
    ids.add(describe_space(checkpoint, layout, numerics="other", model="m").space_id)
    ids.add(describe_space(checkpoint, layout, numerics="n", model="other").space_id)
    assert len(ids) == 4


def test_rope_scaling_is_canonical_text(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    path = save_model("llama", tmp_path / "scaled", rope_scaling=scaling)
    descriptor = describe_space(path, read_layout(path, BLOCK, "bfloat16"), numerics="")
    assert json.loads(descriptor.rope_scaling)["factor"] == 2.0
    assert " " not in descriptor.rope_scaling


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {}, "model_type"),
        ("mistral", {"sliding_window": 64}, "sliding-window"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding-window"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_models_that_cannot_be_served_exactly_are_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    config = transformers.AutoConfig.for_model(kind, **changes)
    with pytest.raises(ConfigError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vram_blocks", 0),
        ("chunk_tokens", 40),
        ("max_running", 0),
        ("dtype", "int4"),
        ("threads", 0),
        ("restore_budget_s", 0.0),
        ("tokens", {"": "x"}),
    ],
)
def test_a_bad_setting_is_refused_by_name(name: str, value: object) -> None:
    settings: dict[str, Any] = {"checkpoint": Path("x"), "vram_blocks": 8, name: value}
    with pytest.raises(ConfigError, match=f"worker.{name}"):
        WorkerConfig(**settings)


def test_tokens_of_tenants_are_not_shown() -> None:
    config = WorkerConfig(checkpoint=Path("x"), vram_blocks=8, token="hush", tokens={"a": "quiet"})
    assert "hush" not in repr(config) and "quiet" not in repr(config)
