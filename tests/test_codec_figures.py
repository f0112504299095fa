"""What is said of codecs on the demo model's own KV holds, and a worse one is noticed."""

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.codecs import (
    COMPARED_TOKENS,
    LOSS_GOAL,
    LZ4_GOAL,
    STRONG_GOAL,
    TEXT_TOKENS,
    cost_of,
    shuffled_zstd,
    without_loss,
)
from benchmarks.demo_kv import CHUNK_TOKENS, DemoKV, held_out_texts
from kvstore import lossless, lossy
from kvstore.codec import LOSSY, CodecId

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """One text that the model has not seen."""
    return held_out_texts(1, TEXT_TOKENS + 1 + COMPARED_TOKENS)


@pytest.fixture(scope="module")
def kv() -> DemoKV:
    """The demo model."""
    return DemoKV("bfloat16", TEXT_TOKENS + CHUNK_TOKENS)


def stored_bytes(codec: CodecId, blocks: Sequence[bytes]) -> int:
    """What a codec makes of all blocks."""
    return sum(len(without_loss(codec, 2, block)[1]) for block in blocks)


def test_lossless_codecs_make_kv_as_small_as_is_said(
    kv: DemoKV, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against byte shuffle and zstd-1 on the same blocks; a codec that does less is noticed."""
    blocks = kv.blocks(texts[0][:TEXT_TOKENS])
    size, baseline = sum(map(len, blocks)), shuffled_zstd(2, blocks)
    assert size / stored_bytes(CodecId.BITSHUFFLE_LZ4, blocks) >= LZ4_GOAL
    assert stored_bytes(CodecId.PLANES_ZSTD, blocks) <= STRONG_GOAL * baseline
    worse = lossless.PACK | {CodecId.PLANES_ZSTD: lossless.PACK[CodecId.BITSHUFFLE_LZ4]}
    monkeypatch.setattr(lossless, "PACK", worse)
    assert stored_bytes(CodecId.PLANES_ZSTD, blocks) > STRONG_GOAL * baseline


@pytest.mark.parametrize("codec", list(LOSSY.values()))
def test_the_model_hardly_notices_what_is_lost(
    codec: CodecId, kv: DemoKV, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits move a little and its loss not; with a tenth of the codes it would be seen."""
    cost = cost_of(codec, kv, texts)
    assert cost.exact_blocks == 0
    assert 0 < cost.largest < 2
    assert cost.loss <= LOSS_GOAL
    assert cost.agreed >= 0.9
    quantise, restore, _ = lossy._SCHEMES[codec]

    def coarse(values: lossy.Floats) -> tuple[lossy.Scales, lossy.Codes]:
        scales, codes = quantise(values)
        return scales, codes & np.uint8(0xE0)

    anything = lambda sizes: sizes * 0 + 1e9  # noqa: E731
    monkeypatch.setitem(lossy._SCHEMES, codec, (coarse, restore, anything))
    assert cost_of(codec, kv, texts).loss > LOSS_GOAL


def test_the_bound_keeps_a_codec_that_is_wrong_out(
    kv: DemoKV, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: codes of which the last bit is lost. Every block is then kept as it is."""
    quantise, restore, bound = lossy._SCHEMES[CodecId.INT8]

    def sloppy(values: lossy.Floats) -> tuple[lossy.Scales, lossy.Codes]:
        scales, codes = quantise(values)
        return scales, codes & np.uint8(0xFC)

    monkeypatch.setitem(lossy._SCHEMES, CodecId.INT8, (sloppy, restore, bound))
    blocks = kv.blocks(texts[0][:TEXT_TOKENS])
    assert all(lossy.pack(CodecId.INT8, memoryview(each), "bfloat16") is None for each in blocks)
