"""fp8 and int8: no value further from the stored one than is promised, and none twice."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.codec import LOSSY, CodecId, decode
from kvstore.lossy import (
    DTYPES,
    FP8_BOUND,
    FP8_FLOOR,
    GROUP,
    INT8_BOUND,
    WIDTHS,
    pack,
)

CODECS = list(LOSSY.values())


def as_bytes(values: NDArray[np.float32], dtype: str) -> bytes:
    """Values in their own type; bf16 by cutting, which is exact for what it can hold."""
    if dtype == "bfloat16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "float16" else "<f4").tobytes()


def as_values(data: bytes, dtype: str) -> NDArray[np.float64]:
    """What the bytes stand for, exactly."""
    with np.errstate(invalid="ignore"):  # Some bits are no number.
        if dtype == "bfloat16":
            wide = np.frombuffer(data, "<u2").astype("<u4") << 16
            return wide.view("<f4").astype(np.float64)
        return np.frombuffer(data, "<f2" if dtype == "float16" else "<f4").astype(np.float64)


def in_groups(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Consecutive values, zeros behind the last."""
    padded = np.zeros(-(-len(values) // GROUP) * GROUP)
    padded[: len(values)] = values
    return padded.reshape(-1, GROUP)


def assert_within_bound(codec: CodecId, before: bytes, after: bytes, dtype: str) -> None:
    """The promise of docs/format.md, computed in twice the precision."""
    x, y = in_groups(as_values(before, dtype)), in_groups(as_values(after, dtype))
    largest = np.abs(x).max(axis=1, keepdims=True)
    if codec is CodecId.INT8:
        bound = np.broadcast_to(largest * INT8_BOUND, x.shape)
    else:
        bound = np.abs(x) * FP8_BOUND + largest * FP8_FLOOR
    assert np.all(np.abs(x - y) <= bound * (1 + 1e-6))


def round_trip(codec: CodecId, data: bytes, dtype: str) -> bytes | None:
    """What comes back; None for what is not taken. The encoder has to know it as well."""
    packed = pack(codec, memoryview(data), dtype)
    if packed is None:
        return None
    payload, expected = packed
    into = bytearray(b"\xee" * len(data))
    decode(codec, memoryview(payload), memoryview(into))
    assert into == expected
    return expected


def contents(rng: random.Random, dtype: str) -> Iterator[NDArray[np.float32]]:
    """Values of every kind that a type has, in lengths that fill no group."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    for scale in (1e-3, 1.0, 100.0):
        yield numbers.normal(0, scale, 5000).astype(np.float32)
    yield np.zeros(1000, np.float32)
    yield (numbers.normal(0, 1, 5000) * 10.0 ** numbers.uniform(-3, 3, 5000)).astype(np.float32)
    yield np.exp2(numbers.integers(-10, 10, 777)).astype(np.float32)
    yield np.linspace(-448, 448, 4097).astype(np.float32)
    outliers = numbers.normal(0, 0.01, 4096).astype(np.float32)
    outliers[::97] = 60_000 if dtype == "float16" else 1e30
    yield outliers
    yield np.ones(33, np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_no_value_is_further_off_than_promised(
    codec: CodecId, dtype: str, rng: random.Random
) -> None:
    """All of these are taken, come back within the bound, and in far fewer bytes."""
    for values in contents(rng, dtype):
        data = as_bytes(values, dtype)
        after = round_trip(codec, data, dtype)
        assert after is not None
        assert_within_bound(codec, data, after, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_any_bits_are_kept_within_the_bound_or_not_taken(
    codec: CodecId, dtype: str, rng: random.Random
) -> None:
    """Random bits: denormal, huge, infinite, not a number; one such value among tame ones."""
    width, taken = WIDTHS[DTYPES.index(dtype)], 0
    for _ in range(300):
        tame = np.array([rng.gauss(0, 1) for _ in range(rng.randint(1, 200))], np.float32)
        data = bytearray(as_bytes(tame, dtype))
        for _ in range(rng.choice([1, 1, len(tame)])):
            at = rng.randrange(len(tame)) * width
            data[at : at + width] = rng.randbytes(width)
        after = round_trip(codec, bytes(data), dtype)
        values = as_values(bytes(data), dtype)
        if not np.all(np.isfinite(values)):
            assert after is None, "no number came back in place of what is none"
        if after is not None:
            taken += 1
            assert_within_bound(codec, bytes(data), after, dtype)
    assert taken > 100


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_no_number_is_not_taken(codec: CodecId) -> None:
    """Infinity and NaN anywhere; also a value whose group is too small for a scale."""
    for bad in (np.inf, -np.inf, np.nan):
        for at in (0, 63, 64, 199):
            values = np.ones(200, np.float32)
            values[at] = bad
            for dtype in DTYPES:
                assert round_trip(codec, as_bytes(values, dtype), dtype) is None
    tiny = np.full(200, 1e-44, np.float32)
    assert round_trip(codec, as_bytes(tiny, "float32"), "float32") in (None, tiny.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_a_second_time_changes_nothing(codec: CodecId, dtype: str, rng: random.Random) -> None:
    """A block that goes up and down again for days loses once."""
    for values in contents(rng, dtype):
        once = round_trip(codec, as_bytes(values, dtype), dtype)
        assert once is not None
        assert round_trip(codec, once, dtype) == once


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_behind_the_last_value_are_kept(codec: CodecId) -> None:
    """A block need not be a whole number of values."""
    data = as_bytes(np.ones(100, np.float32), "float32") + b"abc"
    after = round_trip(codec, data, "float32")
    assert after is not None
    assert (len(after), after[-3:]) == (len(data), b"abc")


@pytest.mark.parametrize("codec", CODECS)
def test_no_length_is_believed(codec: CodecId, rng: random.Random) -> None:
    """Cut, extended, or for a block of another length: an error before anything is decoded."""
    data = as_bytes(np.array([rng.gauss(0, 1) for _ in range(1000)], np.float32), "bfloat16")
    packed = pack(codec, memoryview(data), "bfloat16")
    assert packed is not None
    payload = packed[0]
    into = memoryview(bytearray(len(data)))
    harmed = [payload[:size] for size in range(len(payload))]
    harmed += [payload + b"\0", payload + payload, b"\3" + payload[1:], b"\2" + payload[1:]]
    for each in harmed:
        with pytest.raises(ValueError, match=r"frame|follow|decodes|kind"):
            decode(codec, memoryview(each), into)
    for size in (0, 1, len(data) - 1, len(data) + 1, 2 * len(data)):
        with pytest.raises(ValueError, match=r"frame|follow|decodes|kind"):
            decode(codec, memoryview(payload), memoryview(bytearray(size)))
