"""What each codec makes of the demo model's own KV: size, speed of one core, and what it costs."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.demo_kv import CHUNK_TOKENS, DemoKV, held_out_texts
from benchmarks.proof import Claim, Finding, Proof, Setting, main
from kvstore.api.tier import Block, BlockRef
from kvstore.codec import LOSSLESS, LOSSY, CodecId, decode, encode_as
from kvstore.frames import entropy_coded
from kvstore.lossy import pack

TEXT_TOKENS = 1024
"""Of each text, before the tokens that are compared."""
COMPARED_TOKENS = 64
REPEATS = 5
STRONG_GOAL, LZ4_GOAL, LZ4_GOAL_GB_PER_S = 1.02, 1.15, 0.8
AGREE_GOAL = {"fp8": 0.90, "int8": 0.95}
"""Of greedy tokens, at least."""

Encode = Callable[[bytes], tuple[CodecId, bytes | memoryview]]


@dataclass(frozen=True, slots=True)
class Speed:
    """One codec on one core; bytes are those of blocks."""

    ratio: float
    encode_gb_per_s: float
    decode_gb_per_s: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "ratio": round(self.ratio, 4),
            "encode_gb_per_s": round(self.encode_gb_per_s, 3),
            "decode_gb_per_s": round(self.decode_gb_per_s, 3),
        }


@dataclass(frozen=True, slots=True)
class Cost:
    """What a lossy codec does to the model. `agreed`: share of greedy tokens that are the same."""

    largest: float
    mean: float
    agreed: float
    loss: float
    """Nats per token more than without."""
    exact_blocks: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "logit_difference_max": round(self.largest, 3),
            "logit_difference_mean": round(self.mean, 4),
            "greedy_tokens_agreed": round(self.agreed, 4),
            "loss_added": round(self.loss, 4),
            "blocks_kept_exact": self.exact_blocks,
        }


def without_loss(codec: CodecId, item_bytes: int, data: bytes) -> tuple[CodecId, bytes | memoryview]:
    """A block by a lossless codec."""
    block = Block(BlockRef(b"", b""), None, b"", memoryview(data))
    encoded = encode_as(codec, block, item_bytes)
    return encoded.codec, encoded.payload


def with_loss(codec: CodecId, dtype: str, data: bytes) -> tuple[CodecId, bytes | memoryview]:
    """A block by a lossy codec, or as it is."""
    packed = pack(codec, memoryview(data), dtype)
    return (codec, packed[0]) if packed is not None else (CodecId.RAW, data)


def decoded(codec: CodecId, payload: bytes | memoryview, size: int) -> bytes:
    """What comes back."""
    into = bytearray(size)
    decode(codec, memoryview(payload), memoryview(into))
    return bytes(into)


def soonest_s(work: Callable[[], object]) -> float:
    """The shortest of some runs: what others do beside it only adds."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def speed_of(encode: Encode, blocks: Sequence[bytes]) -> Speed:
    """How small and how fast. The block's buffer is there already, as a slot of the arena is."""
    size = sum(map(len, blocks))
    payloads = [encode(block) for block in blocks]
    into = memoryview(bytearray(len(blocks[0])))
    encode_s = soonest_s(lambda: [encode(block) for block in blocks])
    decode_s = soonest_s(
        lambda: [decode(codec, memoryview(payload), into) for codec, payload in payloads]
    )
    stored = sum(len(payload) for _, payload in payloads)
    return Speed(size / stored, size / encode_s / 1e9, size / decode_s / 1e9)


def two_threads(encode: Encode, blocks: Sequence[bytes]) -> float:
    """How many times as fast two threads are as one: 1 where the GIL is held."""
    with ThreadPoolExecutor(2) as pool:
        one_s = soonest_s(lambda: [encode(block) for block in [*blocks, *blocks]])
        two_s = soonest_s(
            lambda: list(pool.map(lambda part: [encode(block) for block in part], [blocks, blocks]))
        )
    return one_s / two_s


def shuffled_zstd(item_bytes: int, blocks: Sequence[bytes]) -> int:
    """What byte shuffle and zstd-1 make of each block: the goal's measure."""
    return sum(
        len(entropy_coded(memoryview(b"".join(block[at::item_bytes] for at in range(item_bytes)))))
        for block in blocks
    )


def cost_of(codec: CodecId, kv: DemoKV, texts: Sequence[Sequence[int]]) -> Cost:
    """The model's logits over KV that went through a lossy codec, beside those over the exact."""
    kept: list[bool] = []

    def through(data: bytes) -> bytes:
        used, payload = with_loss(codec, kv.layout.dtype, data)
        kept.append(used is CodecId.RAW)
        return decoded(used, payload, len(data))

    exact, lossy, follow = [], [], []
    for text in texts:
        exact.append(kv.logits(text, TEXT_TOKENS + 1))
        lossy.append(kv.logits(text, TEXT_TOKENS + 1, through))
        follow += list(text[TEXT_TOKENS + 1 :])
    before, after = torch.cat(exact), torch.cat(lossy)
    difference = (after - before).abs()
    loss = torch.nn.functional.cross_entropy
    said = torch.tensor(follow)
    return Cost(
        difference.max().item(),
        difference.mean().item(),
        (before.argmax(-1) == after.argmax(-1)).float().mean().item(),
        (loss(after, said) - loss(before, said)).item(),
        sum(kept),
    )


def run(setting: Setting) -> list[Finding]:
    """Every codec on the blocks of as many texts as there are trials."""
    torch.set_num_threads(1)
    kv = DemoKV("bfloat16", TEXT_TOKENS + CHUNK_TOKENS)
    texts = held_out_texts(setting.trials, TEXT_TOKENS + 1 + COMPARED_TOKENS)
    blocks = [block for text in texts for block in kv.blocks(text[:TEXT_TOKENS])]
    encoders: dict[str, Encode] = {
        name: partial(without_loss, codec, 2) for name, codec in LOSSLESS.items()
    }
    encoders |= {name: partial(with_loss, codec, "bfloat16") for name, codec in LOSSY.items()}
    speeds = {name: speed_of(encode, blocks) for name, encode in encoders.items()}
    size = sum(map(len, blocks))
    baseline = shuffled_zstd(2, blocks)
    strong = size / speeds["planes-zstd"].ratio / baseline
    details = {
        "blocks": len(blocks),
        "block_bytes": len(blocks[0]),
        "codecs": {name: speed.as_dict() for name, speed in speeds.items()},
        "shuffle_zstd1_ratio": round(size / baseline, 4),
        "two_threads": {
            name: round(two_threads(encoders[name], blocks), 2)
            for name in encoders
            if name != "raw"
        },
    }
    costs = {}
    for name, codec in LOSSY.items():
        costs[name] = cost_of(codec, kv, texts)
    setting.tick(setting.trials)
    lz4 = speeds["bitshuffle-lz4"]
    findings = [
        Finding(round(strong, 3), strong <= STRONG_GOAL, details=details),
        Finding(round(lz4.ratio, 3), lz4.ratio >= LZ4_GOAL),
        Finding(round(lz4.encode_gb_per_s, 2), lz4.encode_gb_per_s >= LZ4_GOAL_GB_PER_S),
    ]
    for name, cost in costs.items():
        agreed = round(100 * cost.agreed, 1)
        findings.append(
            Finding(agreed, cost.agreed >= AGREE_GOAL[name], details=cost.as_dict())
        )
    return findings
