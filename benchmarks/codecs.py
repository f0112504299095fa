"""What each codec makes of the demo model's own KV: size, speed of one core, and what it costs."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numcodecs import zstd

from benchmarks.demo_kv import CHUNK_TOKENS, DemoKV, held_out_texts
from benchmarks.proof import Claim, Finding, Proof, Setting, main
from benchmarks.slow_link import put_and_get_s
from kvstore.api.tier import Block, BlockRef
from kvstore.codec import AUTO, LOSSLESS, LOSSY, CodecId, decode, encode_as
from kvstore.lossy import DTYPES, WIDTHS, pack

TEXT_TOKENS = 1024
"""Of each text, before the tokens that are compared."""
COMPARED_TOKENS = 64
REPEATS = 5
STRONG_GOAL, LZ4_GOAL, LZ4_GOAL_GB_PER_S = 1.02, 1.15, 0.8
LOSS_GOAL, AUTO_GOAL = 0.02, 1.25
LINKS = {"25 MB/s": 25e6, "250 MB/s": 250e6, "memory": 0.0}
LINK_BLOCKS, JOINED_BLOCKS, TURNS = 12, 16, 3
"""Behind links blocks of a model with more layers are moved: so many of the demo's together."""
COLORS = dict(zip([*LOSSLESS, *LOSSY, AUTO], ("0.6", "C0", "C2", "C1", "C3", "C4"), strict=True))

Packed = tuple[CodecId, bytes | memoryview]
Encode = Callable[[bytes], Packed]


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


def without_loss(codec: CodecId, item_bytes: int, data: bytes) -> Packed:
    """A block by a lossless codec."""
    block = Block(BlockRef(b"", b""), None, b"", memoryview(data))
    encoded = encode_as(codec, block, item_bytes)
    return encoded.codec, encoded.payload


def with_loss(codec: CodecId, dtype: str, data: bytes) -> Packed:
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

    def decode_all() -> None:
        for codec, payload in payloads:
            decode(codec, memoryview(payload), into)

    decode_s = soonest_s(decode_all)
    stored = sum(len(payload) for _, payload in payloads)
    return Speed(size / stored, size / encode_s / 1e9, size / decode_s / 1e9)


def shuffled_zstd(item_bytes: int, blocks: Sequence[bytes]) -> int:
    """What byte shuffle and zstd-1 make of each block: the goal's measure."""
    return sum(
        len(zstd.compress(b"".join(block[at::item_bytes] for at in range(item_bytes)), 1))
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


def joined(blocks: Sequence[bytes]) -> list[bytes]:
    """Larger blocks, the same ones again where there are too few."""
    large = [
        b"".join(blocks[at : at + JOINED_BLOCKS]) for at in range(0, len(blocks), JOINED_BLOCKS)
    ]
    return (large * LINK_BLOCKS)[:LINK_BLOCKS]


def auto_over_best(blocks: Sequence[bytes]) -> tuple[float, dict[str, dict[str, float]]]:
    """How long `auto` takes to store and load, over the best fixed codec, behind its worst link.

    Milliseconds for each block by link and codec as well, and what `auto` used the most.
    """
    table: dict[str, dict[str, float]] = {}
    for link, bytes_per_s in LINKS.items():
        seconds = dict.fromkeys([*LOSSLESS, AUTO], float("inf"))
        # In turns, so that what others do meanwhile meets all of them.
        for _ in range(TURNS):
            for name in seconds:
                took_s = asyncio.run(put_and_get_s(name, blocks, bytes_per_s))
                seconds[name] = min(seconds[name], took_s)
        table[link] = {name: round(1e3 * s / len(blocks), 3) for name, s in seconds.items()}
    worst = max(
        row[AUTO] / min(time for name, time in row.items() if name != AUTO)
        for row in table.values()
    )
    return worst, table


def measured(dtype: str, blocks: Sequence[bytes], codecs: Mapping[str, CodecId]) -> dict[str, Any]:
    """Each codec on blocks of one kind, beside byte shuffle and zstd-1, for JSON."""
    item_bytes = WIDTHS[DTYPES.index(dtype)]
    baseline = shuffled_zstd(item_bytes, blocks)
    speeds: dict[str, Speed] = {}
    for name, codec in codecs.items():
        lossless = partial(without_loss, codec, item_bytes)
        speeds[name] = speed_of(
            lossless if name in LOSSLESS else partial(with_loss, codec, dtype), blocks
        )
    size = sum(map(len, blocks))
    return {
        "dtype": dtype,
        "blocks": len(blocks),
        "block_bytes": len(blocks[0]),
        "codecs": {name: speed.as_dict() for name, speed in speeds.items()},
        "byte_shuffle_zstd1_ratio": round(size / baseline, 4),
        "strong_over_shuffle": size / speeds["planes-zstd"].ratio / baseline,
    }


def run(setting: Setting) -> list[Finding]:
    """Every codec on the blocks of as many texts as there are trials."""
    torch.set_num_threads(1)
    kv = DemoKV("bfloat16", TEXT_TOKENS + CHUNK_TOKENS)
    texts = held_out_texts(setting.trials, TEXT_TOKENS + 1 + COMPARED_TOKENS)
    blocks = [block for text in texts for block in kv.blocks(text[:TEXT_TOKENS])]
    wide = DemoKV("float32", TEXT_TOKENS).blocks(texts[0][:TEXT_TOKENS])
    own = measured("bfloat16", blocks, LOSSLESS | LOSSY)
    large = measured("bfloat16", joined(blocks), LOSSLESS)
    details = own | {"large": large, "float32": measured("float32", wide, LOSSLESS | LOSSY)}
    strong = max(each["strong_over_shuffle"] for each in (own, large, details["float32"]))
    lz4 = own["codecs"]["bitshuffle-lz4"]
    worst, table = auto_over_best(joined(blocks))
    findings = [
        Finding(round(strong, 3), strong <= STRONG_GOAL, details=details),
        Finding(lz4["ratio"], lz4["ratio"] >= LZ4_GOAL),
        Finding(lz4["encode_gb_per_s"], lz4["encode_gb_per_s"] >= LZ4_GOAL_GB_PER_S),
        Finding(round(worst, 2), worst <= AUTO_GOAL, details={"ms_per_block": table}),
    ]
    for codec in LOSSY.values():
        cost = cost_of(codec, kv, texts)
        added = round(cost.loss, 4)
        findings.append(Finding(added, cost.loss <= LOSS_GOAL, details=cost.as_dict()))
    setting.tick(setting.trials)
    return findings


def draw(machine: str, rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """How small against how fast, of every codec, and what the lossy ones cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, speed in rows[0]["details"]["codecs"].items():
        if name == "raw":
            continue
        for way, marker in (("encode", "o"), ("decode", "^")):
            left.plot(speed[f"{way}_gb_per_s"], speed["ratio"], marker, color=COLORS[name])
        label = f"{name} (○ encode, △ decode)"
        left.plot([], [], "s", color=COLORS[name], label=label)
    left.set_xscale("log")
    left.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    left.minorticks_off()
    left.set_xlabel("GB/s of one core, of blocks")
    left.set_ylabel("times smaller")
    left.set_title("Size and speed on the demo model's KV", loc="left")
    left.legend(fontsize=8)
    links = rows[3]["details"]["ms_per_block"]
    for at, name in enumerate([*LOSSLESS, AUTO]):
        places = [link + 0.2 * (at - 1.5) for link in range(len(links))]
        best = [min(row.values()) for row in links.values()]
        heights = [row[name] / least for row, least in zip(links.values(), best, strict=True)]
        right.bar(places, heights, 0.18, label=name, color=COLORS[name])
    right.set_xticks(range(len(links)), links)
    right.set_ylabel("time to store and load, over the best")
    right.set_title("Chosen by measurement, behind three links", loc="left")
    right.legend(fontsize=8, ncols=4, loc="lower center")
    for axes in (left, right):
        axes.grid(visible=True, color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(machine, fontsize=8, color="0.4")
    figure.savefig(file)


PROOF = Proof(
    module="codecs",
    about="What each codec makes of the demo model's own KV: size, speed of one core, and what the "
    "lossy ones cost. Trials are texts of 1,024 tokens.",
    claims=(
        Claim(
            "planes-zstd: size over byte shuffle + zstd-1",
            "times",
            f"<= {STRONG_GOAL}",
        ),
        Claim("bitshuffle-lz4: times smaller", "times", f">= {LZ4_GOAL}"),
        Claim("bitshuffle-lz4: encoding on one core", "GB/s", f">= {LZ4_GOAL_GB_PER_S}"),
        Claim("auto: store and load over the best codec", "times", f"<= {AUTO_GOAL}"),
        *(
            Claim(f"{name}: loss added to the demo model", "nats/token", f"<= {LOSS_GOAL}")
            for name in LOSSY
        ),
    ),
    trials={"test": 1, "short": 6, "long": 20},
    run=run,
    beside=(),
    draw=draw,
)

if __name__ == "__main__":
    main(PROOF)
