"""The lossy codecs, fp8 and int8, for spaces of floating-point values whose operator wants them.

Values lie in groups of `GROUP` consecutive ones with a scale of their own, which needs to know
nothing of the layout. What comes back of a value x in a group whose largest magnitude is m:

    int8   at most m/125 away from x
    fp8    at most |x|/16 + m/2^17 away from x

Every block is decoded and compared before it is stored: one with a value that would miss its
bound (infinite, not a number, denormal) is stored without loss. What was decoded is encoded to
itself: a block that goes up and down between tiers loses once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.codec import LEAST_BYTES, CodecId
from kvstore.frames import entropy_coded, expand, frame_bytes

GROUP = 64
"""Consecutive values with a scale of their own."""
INT8_BOUND = 1 / 125
"""Half a step of 1/127, and half a unit in the last place of bf16, which is 1/256."""
FP8_BOUND = 1 / 16
FP8_FLOOR = 1 / (1 << 17)
"""Of a group's largest magnitude: half the step of what is denormal in fp8."""

DTYPES = ("bfloat16", "float16", "float32")
"""What can be lossy; a payload names its own by the index."""
WIDTHS = (2, 2, 4)

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Scales = NDArray[Any]

_PIECE = 1 << 10
"""So many groups are worked on at a time, in the processor's cache."""
_E4M3_MANTISSA, _E4M3_BIAS, _E4M3_TOP = 3, 7, 0.875
_E4M3_LEAST_NORMAL = np.float32(2.0 ** (1 - _E4M3_BIAS))
_LEAST_EXPONENT = -126
_F32_BIAS, _DROPPED = 127, 23 - _E4M3_MANTISSA
_DENORMAL_MAGIC = np.float32(2.0 ** (23 + 1 - _E4M3_BIAS - _E4M3_MANTISSA))
"""Its last place is the step of what is denormal in e4m3, so adding it rounds to such steps."""


def pack(codec: CodecId, data: memoryview, dtype: str) -> tuple[bytes, bytes] | None:
    """The payload of a block of `dtype` and what it decodes to; None if it would miss its bound."""
    kind = DTYPES.index(dtype)
    count = len(data) // WIDTHS[kind]
    values = _widened(data, kind, count)
    if len(data) < LEAST_BYTES or not np.isfinite(values).all():
        return None
    quantise, restore, bound = _SCHEMES[codec]
    with np.errstate(all="ignore"):
        scales, codes = _by_piece(values, quantise)
        decoded = bytearray(data)
        _restore(codes, scales, restore, memoryview(decoded), kind)
        kept = _widened(memoryview(decoded), kind, count)
        for start in range(0, len(values), _PIECE):
            piece = slice(start, start + _PIECE)
            # What has become no number is in no bound.
            if not np.all(np.abs(kept[piece] - values[piece]) <= bound(np.abs(values[piece]))):
                return None
    packed_codes = entropy_coded(codes.reshape(-1)[:count])
    packed_scales = entropy_coded(scales.view(np.uint8).reshape(-1))
    tail = data[count * WIDTHS[kind] :]
    return b"".join([bytes([kind]), packed_scales, packed_codes, tail]), bytes(decoded)


def unpack(codec: CodecId, payload: memoryview, into: memoryview) -> None:
    """Fills `into` from a payload whose digest was verified; ValueError if it cannot."""
    kind = payload[0] if len(payload) else len(DTYPES)
    if kind >= len(DTYPES):
        raise ValueError(f"no values are of kind {kind}")
    count = len(into) // WIDTHS[kind]
    groups = -(-count // GROUP)
    _, restore, _ = _SCHEMES[codec]
    scales = np.empty(groups * _SCALE_TYPES[codec].itemsize, np.uint8)
    codes = np.zeros(groups * GROUP, np.uint8)
    rest = payload[1:]
    for part in (scales, codes[:count]):
        size = frame_bytes(rest)
        expand(rest[:size], part)
        rest = rest[size:]
    if len(rest) != len(into) - count * WIDTHS[kind]:
        raise ValueError(f"{len(rest)} bytes follow the values of a block of {len(into)}")
    with np.errstate(all="ignore"):
        typed = scales.view(_SCALE_TYPES[codec])
        _restore(codes.reshape(-1, GROUP), typed, restore, into, kind)
    into[count * WIDTHS[kind] :] = rest


def _widened(data: memoryview, kind: int, count: int) -> Floats:
    """The values in groups, zeros behind the last one."""
    values = np.zeros((-(-count // GROUP), GROUP), np.float32)
    flat = values.reshape(-1)[:count]
    if kind == 0:
        flat.view(np.uint32)[:] = np.frombuffer(data, "<u2", count)
        flat.view(np.uint32)[:] <<= 16
    else:
        flat[:] = np.frombuffer(data, "<f2" if kind == 1 else "<f4", count)
    return values


def _narrow(values: Floats, kind: int, into: memoryview) -> None:
    """Writes values in their own type, each rounded to the nearest, ties to even."""
    if kind == 0:
        bits = values.view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        np.frombuffer(into, "<u2")[:] = rounded
    else:
        np.frombuffer(into, "<f2" if kind == 1 else "<f4")[:] = values


def _by_piece(
    values: Floats, quantise: Callable[[Floats], tuple[Scales, Codes]]
) -> tuple[Scales, Codes]:
    pieces = [quantise(values[at : at + _PIECE]) for at in range(0, len(values), _PIECE)]
    return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])


def _restore(
    codes: Codes,
    scales: Scales,
    restore: Callable[[Codes, Scales], Floats],
    into: memoryview,
    kind: int,
) -> None:
    width, count = WIDTHS[kind], len(into) // WIDTHS[kind]
    for start in range(0, len(codes), _PIECE):
        piece = slice(start, start + _PIECE)
        begin, end = start * GROUP, min((start + _PIECE) * GROUP, count)
        values = restore(codes[piece], scales[piece]).reshape(-1)[: end - begin]
        _narrow(values, kind, into[begin * width : end * width])


def _quantise_int8(values: Floats) -> tuple[Scales, Codes]:
    """Steps of 1/127 of the largest magnitude. The step ends in eight zero bits: its multiples are
    exact, and the largest of them rounds to the very value that it came from."""
    steps = np.abs(values).max(axis=1) / np.float32(127)
    bits = steps.view(np.uint32)
    steps = ((bits + 0xFF) & np.uint32(0xFFFFFF00)).view(np.float32)
    inverse = np.where(steps > 0, np.float32(1) / steps, np.float32(0))
    codes = np.rint(values * inverse[:, None]).clip(-127, 127)
    return steps, codes.astype(np.int8).view(np.uint8)


def _restore_int8(codes: Codes, scales: Scales) -> Floats:
    values = codes.view(np.int8).astype(np.float32)
    values *= scales[:, None]
    return values


def _quantise_fp8(values: Floats) -> tuple[Scales, Codes]:
    """e4m3 after a shift by a power of two that brings the largest magnitude under its 448."""
    fraction, exponent = np.frexp(np.abs(values).max(axis=1))
    shifts = exponent - np.where(fraction <= _E4M3_TOP, 9, 8)
    shifts = shifts.clip(_LEAST_EXPONENT, 127).astype(np.int8)
    scaled = values * np.ldexp(np.float32(1), -shifts.astype(np.int32))[:, None]
    size = np.abs(scaled)
    bits = size.view(np.uint32)
    bias = np.uint32((_F32_BIAS - _E4M3_BIAS) << _E4M3_MANTISSA)
    normal = ((bits + (((1 << (_DROPPED - 1)) - 1) + (bits >> _DROPPED & 1))) >> _DROPPED) - bias
    small = (size + _DENORMAL_MAGIC).view(np.uint32) - _DENORMAL_MAGIC.view(np.uint32)
    codes = np.where(size < _E4M3_LEAST_NORMAL, small, normal)
    codes |= scaled.view(np.uint32) >> 24 & 0x80
    return shifts, codes.astype(np.uint8)


def _restore_fp8(codes: Codes, scales: Scales) -> Floats:
    values = _E4M3[codes]
    values *= np.ldexp(np.float32(1), scales.astype(np.int32))[:, None]
    return values


def _e4m3_values() -> Floats:
    """What the 256 codes stand for; those of no number as zero, which no encoder writes."""
    codes = np.arange(256)
    exponent, mantissa = codes >> _E4M3_MANTISSA & 15, codes & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - _E4M3_BIAS - _E4M3_MANTISSA)
    small = mantissa * 2.0 ** (1 - _E4M3_BIAS - _E4M3_MANTISSA)
    values = np.where(exponent > 0, normal, small) * np.where(codes & 0x80, -1.0, 1.0)
    values[codes & 0x7F == 0x7F] = 0.0
    return values.astype(np.float32)


def _int8_bound(sizes: Floats) -> Floats:
    largest: Floats = sizes.max(axis=1, keepdims=True) * np.float32(INT8_BOUND)
    return largest


def _fp8_bound(sizes: Floats) -> Floats:
    floor = sizes.max(axis=1, keepdims=True) * np.float32(FP8_FLOOR)
    bound: Floats = sizes * np.float32(FP8_BOUND) + floor
    return bound


_E4M3 = _e4m3_values()
_SCHEMES = {
    CodecId.FP8: (_quantise_fp8, _restore_fp8, _fp8_bound),
    CodecId.INT8: (_quantise_int8, _restore_int8, _int8_bound),
}
_SCALE_TYPES: dict[CodecId, np.dtype[Any]] = {
    CodecId.FP8: np.dtype(np.int8),
    CodecId.INT8: np.dtype(np.float32),
}
