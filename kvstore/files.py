"""The seam of files: the disk tier reaches its directory through `Files` alone.

Reads and writes are of whole pages, at page offsets, from and to one or more buffers of whole
pages that begin on a page (`kvstore.staging`, slots of the arena), so that they can go past the
page cache.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvstore.api.errors import ConfigError

_log = logging.getLogger("kvstore.disk")

PAGE_BYTES = 4096
SECTOR_BYTES = 512


class Files(Protocol):
    """The files of one directory. All calls block; all raise OSError."""

    def names(self) -> list[str]:
        """The names of the files, in no order."""

    def open(self, name: str, *, create: bool) -> int:
        """A handle for reading and writing; with `create` the file must be new."""

    def size_bytes(self, handle: int) -> int:
        """How long the file is."""

    def read_into(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills the buffers in turn, says how many bytes came; fewer only at the file's end."""

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Writes all of the buffers, one behind the other."""

    def truncate(self, handle: int, size: int) -> None:
        """Cuts the file."""

    def sync(self, handle: int) -> None:
        """Returns when the file's bytes are on the device."""

    def rename(self, name: str, new_name: str) -> None:
        """Gives a file a name that no other has; like a new name it is safe after a `sync`."""

    def remove(self, name: str) -> None:
        """Deletes the file."""

    def close(self, handle: int) -> None:
        """Lets go of the handle."""


class DirectoryFiles:
    """The files of a real directory, which only its owner may enter, and only one process uses.

    With `direct` they are read and written past the page cache, where the file system can.
    Raises ConfigError if the directory cannot be used or another process uses it.
    """

    def __init__(self, root: Path, *, direct: bool = True) -> None:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._root = os.open(root, os.O_DIRECTORY | os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"disk.path: {root} cannot be used: {error.strerror}") from None
        try:
            self._lock = os.open(".lock", os.O_CREAT | os.O_RDWR, 0o600, dir_fd=self._root)
        except OSError as error:
            _close(self._root)
            raise ConfigError(f"disk.path: {root} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.shut()
            raise ConfigError(f"disk.path: {root} is in use by another process") from None
        self._flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if direct and self._takes_direct():
            self._flags |= os.O_DIRECT
        elif direct:
            _log.info("disk: %s has no direct I/O, the page cache is used", root)

    @property
    def direct(self) -> bool:
        """Whether the page cache is passed by."""
        return bool(self._flags & os.O_DIRECT)

    def _takes_direct(self) -> bool:
        """Tries it on the lock file: some file systems refuse only when they are written to."""
        page = mmap.mmap(-1, PAGE_BYTES)
        try:
            handle = os.open(".lock", self._flags | os.O_DIRECT, dir_fd=self._root)
        except OSError:
            return False
        try:
            os.pwrite(handle, page, 0)
            return os.preadv(handle, [page], 0) == PAGE_BYTES
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            _close(handle)

    def shut(self) -> None:
        """Lets go of the directory itself."""
        _close(self._lock)
        _close(self._root)

    def names(self) -> list[str]:
        return os.listdir(self._root)

    def open(self, name: str, *, create: bool) -> int:
        flags = self._flags | (os.O_CREAT | os.O_EXCL if create else 0)
        return os.open(name, flags, 0o600, dir_fd=self._root)

    def size_bytes(self, handle: int) -> int:
        return os.fstat(handle).st_size

    def read_into(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        done, size = 0, sum(map(len, buffers))
        while done < size:
            count = os.preadv(handle, _behind(buffers, done), offset + done)
            done += count
            if count == 0 or done % SECTOR_BYTES:  # The file ends here.
                break
        return done

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> None:
        done, size = 0, sum(map(len, buffers))
        while done < size:
            count = os.pwritev(handle, _behind(buffers, done), offset + done)
            if count < SECTOR_BYTES:
                raise OSError(errno.EIO, "nothing more was written")
            # Past the cache, what follows a short write must begin a sector.
            done += count // SECTOR_BYTES * SECTOR_BYTES

    def truncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def sync(self, handle: int) -> None:
        os.fdatasync(handle)
        os.fsync(self._root)

    def rename(self, name: str, new_name: str) -> None:
        os.rename(name, new_name, src_dir_fd=self._root, dst_dir_fd=self._root)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._root)

    def close(self, handle: int) -> None:
        os.close(handle)


def begins_on_a_page(buffer: memoryview) -> bool:
    """Whether direct I/O can use the buffer. One that is read-only counts as not."""
    if buffer.readonly or not len(buffer):
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE_BYTES == 0


def _behind(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of the buffers behind the first `done` bytes."""
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:])
        done = max(0, done - len(buffer))
    return left


def _close(handle: int) -> None:
    """A handle is gone whatever its closing says: there is nothing to try again."""
    with contextlib.suppress(OSError):
        os.close(handle)
