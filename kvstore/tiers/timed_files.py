"""The files of the disk tier, with a look at how fast bytes go to them: codecs are chosen by it."""

from collections.abc import Sequence

from kvstore.api.clock import Clock
from kvstore.codec import Codec
from kvstore.files import Files


class TimedFiles:
    """`inner`; the codec hears of what was written and read, and how long it took."""

    def __init__(self, inner: Files, codec: Codec, clock: Clock) -> None:
        self._inner = inner
        self._codec = codec
        self._clock = clock

    def read_into(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        started_s = self._clock.monotonic_s()
        size = self._inner.read_into(handle, buffers, offset)
        self._codec.moved("get", size, self._clock.monotonic_s() - started_s)
        return size

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> None:
        started_s = self._clock.monotonic_s()
        self._inner.write(handle, buffers, offset)
        size = sum(len(part) for part in buffers)
        self._codec.moved("put", size, self._clock.monotonic_s() - started_s)

    def names(self) -> list[str]:
        return self._inner.names()

    def open(self, name: str, *, create: bool) -> int:
        return self._inner.open(name, create=create)

    def size_bytes(self, handle: int) -> int:
        return self._inner.size_bytes(handle)

    def truncate(self, handle: int, size: int) -> None:
        self._inner.truncate(handle, size)

    def sync(self, handle: int) -> None:
        self._inner.sync(handle)

    def rename(self, name: str, new_name: str) -> None:
        self._inner.rename(name, new_name)

    def remove(self, name: str) -> None:
        self._inner.remove(name)

    def close(self, handle: int) -> None:
        self._inner.close(handle)
