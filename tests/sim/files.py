"""The twin of `kvstore.files`: a directory in memory that fills up, fails, tears and forgets.

What is promised is what a disk promises. Bytes are safe once their file was synced. Before that a
crash may keep, lose or tear each write for itself, and keeps only a prefix of the directory's
changes (a file that was made may be missing, one that was removed may be back).
"""

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.files import PAGE_BYTES, begins_on_a_page

Fault = Callable[[str, str], None]
"""Called with operation and file name before each operation; may raise OSError."""


class PowerLost(OSError):
    """When the machine of these files went down: nothing works until `restart`."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "power lost")


@dataclass(slots=True)
class _File:
    data: bytearray = field(default_factory=bytearray)
    """What a reader sees now."""
    safe: bytes = b""
    """What is on the device."""
    unsafe: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Since the last sync: (offset, bytes written), or (length, None) for a cut."""


class SimulatedFiles:
    """`Files` in memory. `fault` may raise before any operation; `injected` counts what it did."""

    def __init__(self, *, room_bytes: int | None = None) -> None:
        self.room_bytes = room_bytes
        """The size of the device; None: endless."""
        self.fault: Fault | None = None
        self.injected: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.peak_bytes = 0
        """The most that the files ever took together, as a reader of their sizes sees it."""
        self._names: dict[str, _File] = {}
        self._safe_names: dict[str, _File] = {}
        self._changes: list[dict[str, _File | None]] = []
        self._handles: dict[int, tuple[str, _File]] = {}
        self._next_handle = 100
        self._off = False

    # The seam.

    def names(self) -> list[str]:
        self._enter("names", "")
        return list(self._names)

    def open(self, name: str, *, create: bool) -> int:
        self._enter("open", name)
        if create:
            if name in self._names:
                raise FileExistsError(errno.EEXIST, "exists", name)
            self._names[name] = _File()
            self._changes.append({name: self._names[name]})
        elif name not in self._names:
            raise FileNotFoundError(errno.ENOENT, "missing", name)
        self._next_handle += 1
        self._handles[self._next_handle] = (name, self._names[name])
        return self._next_handle

    def size_bytes(self, handle: int) -> int:
        return len(self._file("size", handle).data)

    def read_into(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        _assert_direct(buffers, offset)
        data = self._file("read", handle).data
        done = 0
        for buffer in buffers:
            part = data[offset + done : offset + done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> None:
        _assert_direct(buffers, offset)
        self._enter("write", self._handles[handle][0])
        data = b"".join(buffers)
        file = self._handle(handle)
        growth = max(0, offset + len(data) - len(file.data))
        if self.room_bytes is not None and self.total_bytes + growth > self.room_bytes:
            # Like a real device: what fits is written, then there is no room.
            self.injected["enospc"] += 1
            fits = max(0, len(data) - (self.total_bytes + growth - self.room_bytes))
            self._write(file, data[:fits], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write(file, data, offset)

    def truncate(self, handle: int, size: int) -> None:
        file = self._file("truncate", handle)
        del file.data[size:]
        file.data.extend(bytes(size - len(file.data)))
        file.unsafe.append((size, None))

    def sync(self, handle: int) -> None:
        file = self._file("sync", handle)
        file.safe, file.unsafe = bytes(file.data), []
        self._safe_names, self._changes = dict(self._names), []

    def rename(self, name: str, new_name: str) -> None:
        self._enter("rename", name)
        assert new_name not in self._names, "a file is replaced"
        file = self._names[new_name] = self._names.pop(name)
        self._changes.append({name: None, new_name: file})

    def remove(self, name: str) -> None:
        self._enter("remove", name)
        del self._names[name]
        self._changes.append({name: None})

    def close(self, handle: int) -> None:
        self._handles.pop(handle, None)

    # What a test does to it.

    @property
    def total_bytes(self) -> int:
        """The sum of the sizes of all files."""
        return sum(len(file.data) for file in self._names.values())

    @property
    def open_handles(self) -> int:
        """How many handles nobody closed."""
        return len(self._handles)

    def content(self, name: str) -> bytearray:
        """The bytes of one file, to look at or to damage."""
        return self._names[name].data

    def put(self, name: str, data: bytes) -> None:
        """Makes a file of these bytes, safely; who has it open finds them there as well."""
        file = self._safe_names[name] = self._names.setdefault(name, _File())
        file.data[:], file.safe, file.unsafe = data, bytes(data), []

    def flip(self, name: str, bit: int) -> None:
        """Flips one bit of one file, on the device as well."""
        file = self._names[name]
        file.data[bit // 8] ^= 1 << bit % 8
        file.safe = bytes(file.data)

    def turn_off(self) -> None:
        """From now on every operation raises `PowerLost`."""
        self._off = True

    def restart(self) -> None:
        """Another process begins: handles are gone, what was written is there."""
        self._off = False
        self.fault = None
        self._handles.clear()

    def crash(self, rng: random.Random | None) -> None:
        """The machine goes down and comes up: of what was not synced, some is lost or torn.

        Without `rng` it is the worst that is allowed: every unsynced byte is lost, and every file
        that was removed or renamed is so.
        """
        survived = dict(self._safe_names)
        for change in self._changes[: rng.randint(0, len(self._changes)) if rng else None]:
            for name, file in change.items():
                if file is None:
                    survived.pop(name, None)
                else:
                    survived[name] = file
        for file in {id(file): file for file in survived.values()}.values():
            file.data = _after_crash(file, rng) if rng else bytearray(file.safe)
            file.safe, file.unsafe = bytes(file.data), []
        self._names, self._safe_names, self._changes = survived, dict(survived), []
        self.restart()

    def copy(self) -> "SimulatedFiles":
        """Another directory with the same files, as they lie on the device."""
        twin = SimulatedFiles(room_bytes=self.room_bytes)
        for name, file in self._names.items():
            twin.put(name, bytes(file.data))
        return twin

    def _enter(self, operation: str, name: str) -> None:
        if self._off:
            raise PowerLost
        if self.fault is not None:
            try:
                self.fault(operation, name)
            except OSError:
                self.injected[operation] += 1
                raise
        self.done[operation] += 1

    def _file(self, operation: str, handle: int) -> _File:
        if handle in self._handles:
            self._enter(operation, self._handles[handle][0])
        return self._handle(handle)

    def _handle(self, handle: int) -> _File:
        if handle not in self._handles:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._handles[handle][1]

    def _write(self, file: _File, data: bytes, offset: int) -> None:
        if data:
            _overwrite(file.data, data, offset)
            file.unsafe.append((offset, data))
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)


def _assert_direct(buffers: Sequence[memoryview], offset: int) -> None:
    """What a device asks of direct I/O, which the real twin would refuse or stage again."""
    assert offset % PAGE_BYTES == 0, "not at a page"
    for buffer in buffers:
        assert len(buffer) % PAGE_BYTES == 0, "not in whole pages"
        assert not buffer or begins_on_a_page(buffer), "not on a page"


def _overwrite(target: bytearray, data: bytes, offset: int) -> None:
    target.extend(bytes(max(0, offset - len(target))))
    target[offset : offset + len(data)] = data


def _after_crash(file: _File, rng: random.Random) -> bytearray:
    data = bytearray(file.safe)
    for offset, written in file.unsafe:
        if written is None:
            if rng.random() < 0.5:
                del data[offset:]
            continue
        fate = rng.choice(["kept", "kept", "lost", "short", "pages"])
        if fate == "kept":
            _overwrite(data, written, offset)
        elif fate == "short":
            _overwrite(data, written[: rng.randrange(len(written))], offset)
        elif fate == "pages":
            for start in range(0, len(written), PAGE_BYTES):
                if rng.random() < 0.5:
                    _overwrite(data, written[start : start + PAGE_BYTES], offset + start)
    return data


class FailNth:
    """Raises once, at the `number`-th operation of some kinds, and counts all of them.

    `number` 0 never raises: a first run with it tells how many operations there are.
    """

    def __init__(self, number: int, code: int, operations: Sequence[str]) -> None:
        self.seen = 0
        self._number = number
        self._code = code
        self._operations = operations

    def __call__(self, operation: str, name: str) -> None:
        if operation in self._operations:
            self.seen += 1
            if self.seen == self._number:
                raise OSError(self._code, os.strerror(self._code), name)


class FailAlways:
    """Raises at every operation of some kinds whose file `matches`."""

    def __init__(
        self, code: int, operations: Sequence[str], matches: Callable[[str], bool] = lambda _: True
    ) -> None:
        self._code = code
        self._operations = operations
        self._matches = matches

    def __call__(self, operation: str, name: str) -> None:
        if operation in self._operations and self._matches(name):
            raise OSError(self._code, os.strerror(self._code), name)
