"""The codec of one slower tier: chosen by measurement, or as its settings say; counted."""

import threading
from collections import OrderedDict

from kvstore import lossy
from kvstore.api.clock import Clock
from kvstore.api.digest import block_digest
from kvstore.api.tier import Block
from kvstore.codec import (
    AUTO,
    ITEM_BYTES,
    LOSSLESS,
    LOSSY,
    NAMES,
    NO_LOSS,
    CodecId,
    Direction,
    Encoded,
    decode,
    encode_as,
)
from kvstore.codec_choice import Choice, Link, Trial
from kvstore.files import PAGE_BYTES
from kvstore.metrics import Metrics
from kvstore.spaces import Space, Spaces

SAMPLE_BYTES, SAMPLE_PIECES = 1 << 20, 4
"""So much of a block is tried at most, from so many places: layers, keys and values differ."""
LEAST_MOVED_BYTES = 1 << 14
"""Less says how long a request takes, not how fast bytes go."""
CHOICES = 4096
"""So many spaces have a choice; the one that stored the longest ago begins anew."""


class TierCodec:
    """Encodes what goes to the tier called `tier`. Several threads may do so at once.

    `codec` is the name of a lossless codec or `auto`; `lossy` that of a lossy one or `none`, for
    blocks whose space is known to hold floating-point values.
    """

    def __init__(
        self, tier: str, codec: str, lossy: str, spaces: Spaces, clock: Clock, metrics: Metrics
    ) -> None:
        self._tier = tier
        self._fixed = None if codec == AUTO else LOSSLESS[codec]
        self._lossy = None if lossy == NO_LOSS else LOSSY[lossy]
        self._spaces = spaces
        self._clock = clock
        self._metrics = metrics
        self._choices: OrderedDict[bytes, Choice] = OrderedDict()
        self._link = Link()
        self._lock = threading.Lock()
        """Of choices and link. Nothing is encoded under it."""

    def encode(self, block: Block) -> Encoded:
        space = self._spaces.find(block.ref.namespace)
        encoded = self._without_some(block, space) or self._without_loss(block, space)
        name = NAMES[encoded.codec]
        self._metrics.codec_blocks.labels(self._tier, name).inc()
        self._metrics.codec_in_bytes.labels(self._tier, name).inc(len(block.data))
        self._metrics.codec_out_bytes.labels(self._tier, name).inc(len(encoded.payload))
        return encoded

    def works_on(self, namespace: bytes) -> bool:
        space = self._spaces.find(namespace)
        if self._lossy is not None and space is not None and space.dtype in lossy.DTYPES:
            return True
        if self._fixed is not None:
            return self._fixed is not CodecId.RAW
        with self._lock:
            choice = self._choices.get(space.space_id if space is not None else namespace)
        return choice is None or choice.codec is not CodecId.RAW

    def moved(self, direction: Direction, size_bytes: int, seconds: float) -> None:
        if size_bytes < LEAST_MOVED_BYTES:
            return
        with self._lock:
            self._link.moved(direction, size_bytes, seconds)
            byte_s = self._link.byte_s(direction)
        if byte_s:
            self._metrics.link_bytes_per_s.labels(self._tier, direction).set(1 / byte_s)

    def _without_some(self, block: Block, space: Space | None) -> Encoded | None:
        """The block by the lossy codec; None where it is not wanted, or would miss its bound.

        What was damaged in memory must not get a digest that says it was not.
        """
        if self._lossy is None or space is None or space.dtype not in lossy.DTYPES:
            return None
        if block_digest(space.space_id, block.ref.key, block.data) != block.digest:
            return None
        packed = lossy.pack(self._lossy, block.data, space.dtype)
        if packed is None or len(packed[0]) >= len(block.data):
            self._metrics.codec_kept_exact.labels(self._tier).inc()
            return None
        payload, decoded = packed
        digest = block_digest(space.space_id, block.ref.key, decoded)
        return Encoded(self._lossy, payload, digest)

    def _without_loss(self, block: Block, space: Space | None) -> Encoded:
        item_bytes = space.item_bytes if space is not None else ITEM_BYTES
        if self._fixed is not None:
            return encode_as(self._fixed, block, item_bytes)
        # Blocks of one space are alike, whosever they are.
        group = space.space_id if space is not None else block.ref.namespace
        return encode_as(self._choose(group, block, item_bytes), block, item_bytes)

    def _choose(self, group: bytes, block: Block, item_bytes: int) -> CodecId:
        with self._lock:
            choice = self._choice(group)
            due = choice.due(self._clock.monotonic_s())
        trials = self._try(block, item_bytes) if due else []
        with self._lock:
            before = choice.codec
            choice.learn(trials)
            chosen = choice.choose(self._link)
        if chosen is not before:
            self._metrics.codec_changes.labels(self._tier, NAMES[chosen]).inc()
        return chosen

    def _choice(self, group: bytes) -> Choice:
        choice = self._choices.setdefault(group, Choice())
        self._choices.move_to_end(group)
        if len(self._choices) > CHOICES:
            self._choices.popitem(last=False)
        return choice

    def _try(self, block: Block, item_bytes: int) -> list[Trial]:
        """Every lossless codec on one block. The lesser of two times: others run beside it."""
        sample = block._replace(data=_sample(block.data))
        self._metrics.codec_trials.labels(self._tier).inc()
        return [self._try_one(codec, sample, item_bytes) for codec in LOSSLESS.values()]

    def _try_one(self, codec: CodecId, sample: Block, item_bytes: int) -> Trial:
        size, into = len(sample.data), memoryview(bytearray(len(sample.data)))
        now, encode_s, decode_s = self._clock.monotonic_s, [], []
        for _ in range(2):
            started = now()
            encoded = encode_as(codec, sample, item_bytes)
            done = now()
            decode(encoded.codec, memoryview(encoded.payload), into)
            encode_s.append((done - started) / size)
            decode_s.append((now() - done) / size)
        return Trial(codec, len(encoded.payload) / size, min(encode_s), min(decode_s))


def _sample(data: memoryview) -> memoryview:
    """The block, or pieces of it that lie evenly spread."""
    if len(data) <= SAMPLE_BYTES:
        return data
    size = SAMPLE_BYTES // SAMPLE_PIECES
    step = (len(data) - size) // (SAMPLE_PIECES - 1) // PAGE_BYTES * PAGE_BYTES
    return memoryview(b"".join(data[at * step :][:size] for at in range(SAMPLE_PIECES)))
