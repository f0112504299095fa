"""The seam of files: the disk tier reaches its directory through `Files` alone."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvstore.api.errors import ConfigError


class Files(Protocol):
    """The files of one directory. All calls block; all raise OSError."""

    def names(self) -> list[str]:
        """The names of the files, in no order."""

    def open(self, name: str, *, create: bool) -> int:
        """A handle for reading and writing; with `create` the file must be new."""

    def size_bytes(self, handle: int) -> int:
        """How long the file is."""

    def read(self, handle: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer only at the file's end."""

    def write(self, handle: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Writes all the buffers, one behind the other."""

    def truncate(self, handle: int, size: int) -> None:
        """Cuts the file."""

    def sync(self, handle: int) -> None:
        """Returns when the file's bytes are on the device."""

    def remove(self, name: str) -> None:
        """Deletes the file."""

    def close(self, handle: int) -> None:
        """Lets go of the handle."""


class DirectoryFiles:
    """The files of a real directory, which only its owner may enter, and only one process uses.

    Raises ConfigError if the directory cannot be used or another process uses it.
    """

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._root = os.open(root, os.O_DIRECTORY | os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"disk.path: {root} cannot be used: {error.strerror}") from None
        self._lock = os.open(".lock", os.O_CREAT | os.O_RDWR, 0o600, dir_fd=self._root)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.shut()
            raise ConfigError(f"disk.path: {root} is in use by another process") from None

    def shut(self) -> None:
        """Lets go of the directory itself."""
        os.close(self._lock)
        os.close(self._root)

    def names(self) -> list[str]:
        return os.listdir(self._root)

    def open(self, name: str, *, create: bool) -> int:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        return os.open(name, flags, 0o600, dir_fd=self._root)

    def size_bytes(self, handle: int) -> int:
        return os.fstat(handle).st_size

    def read(self, handle: int, size: int, offset: int) -> bytes:
        parts: list[bytes] = []
        while size and (part := os.pread(handle, size, offset)):
            parts.append(part)
            size -= len(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, handle: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                written = os.pwrite(handle, rest, offset)
                rest = rest[written:]
                offset += written

    def truncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def sync(self, handle: int) -> None:
        os.fdatasync(handle)
        os.fsync(self._root)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._root)

    def close(self, handle: int) -> None:
        os.close(handle)
