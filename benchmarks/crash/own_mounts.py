"""File systems of our own: small ones that really fill up, seen by this process alone."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

_NEW_USERS, _NEW_MOUNTS = 0x10000000, 0x00020000
_RECURSIVE, _PRIVATE = 0x4000, 0x40000
TIMEOUT_S = 30.0
VOLUME_BYTES = 16 << 20


class Forbidden(Exception):
    """When this system does not let us mount; says what it said."""


def enter_own_mounts() -> None:
    """From now on this process has mounts of its own, which end with it.

    Root needs no more than that; everybody else becomes root of a user namespace, where the system
    allows it. The process must have no threads yet. Raises Forbidden.
    """
    user, group = os.geteuid(), os.getegid()
    if user != 0 or not _try_unshare(_NEW_MOUNTS):
        if not _try_unshare(_NEW_USERS | _NEW_MOUNTS):
            raise Forbidden(f"no namespaces for user {user}: {os.strerror(ctypes.get_errno())}")
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", Path("/"), "", _RECURSIVE | _PRIVATE, "")


def mount_tmpfs(at: Path, size_bytes: int) -> None:
    """A file system in memory. Raises Forbidden."""
    at.mkdir(exist_ok=True)
    _mount("tmpfs", at, "tmpfs", 0, f"size={size_bytes},mode=700")


def mount_ext4(at: Path, size_bytes: int) -> None:
    """An ext4 in a file beside `at`, which takes direct I/O. Raises Forbidden.

    Needs the real root: a user namespace may not mount what lies on a block device.
    """
    at.mkdir()
    image = at.with_suffix(".ext4")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    _command("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(image))
    _command("mount", "-o", "loop", str(image), str(at))


def unmount(at: Path) -> None:
    """Lets go of a file system, and with it of its loop device."""
    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(at), 0)


def _try_unshare(flags: int) -> bool:
    return bool(ctypes.CDLL(None, use_errno=True).unshare(flags) == 0)


def _mount(source: str, at: Path, kind: str, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = (source.encode(), os.fsencode(at), kind.encode() or None)
    if libc.mount(*words, ctypes.c_ulong(flags), options.encode()) != 0:
        raise Forbidden(f"mount {kind or 'private'}: {os.strerror(ctypes.get_errno())}")


def _command(name: str, *arguments: str) -> None:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if found is None:
        raise Forbidden(f"{name} is not installed")
    ran = subprocess.run(
        [found, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if ran.returncode:
        raise Forbidden(f"{name}: {ran.stderr.strip()[:200]}")
