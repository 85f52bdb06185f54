"""One process at a time in a folder, without anything to clean up after a crash."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError
from .files import disk_errors

LOCK = ".lock"
_held: dict[Path, list[int]] = {}  # folder -> [file handle, depth], of this process


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder`; UsageError if one is in it. May be nested within this process.

    The kernel drops the lock with the process, however it ends, so a lock is never stale. A record lock is used
    because forked workers do not inherit it: one that outlives its killed parent would keep the folder locked.
    """
    folder = folder.resolve()
    entry = _held.get(folder)
    if entry is None:
        entry = _held[folder] = [_acquire(folder), 0]
    entry[1] += 1
    try:
        yield
    finally:
        entry[1] -= 1
        if entry[1] == 0:
            del _held[folder]
            os.close(entry[0])


def _acquire(folder: Path) -> int:
    path = folder / LOCK
    with disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(handle):
            holder = os.read(handle, 32).decode("ascii", "replace").strip()
            who = f" (process {holder})" if holder else ""
            raise UsageError(f"{folder} is in use by another attnconvert{who}: wait for it, or use another --out")
        with disk_errors(path):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode("ascii"))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _try_lock(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            os.lseek(handle, 1 << 20, os.SEEK_SET)  # a byte nobody writes: Windows locks forbid reading
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(handle, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        # a network file system without locks: working unguarded beats not working
    return True
