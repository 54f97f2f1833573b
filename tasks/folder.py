"""A run's folder: one process at a time, and a failed write costs no training."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tasks.errors import UserError

# A lock lasts as long as any process has its descriptor open: a loader's worker must not keep it from a run that is resumed.
_locks: set[int] = set()
os.register_at_fork(after_in_child=lambda: [os.close(_locks.pop()) for _ in list(_locks)])


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Make a folder and keep it from other runs; the system lets go of it when the process dies.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    with required(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
    _locks.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: in use by another process; wait for it to end, or name another --out") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        _locks.discard(lock)
        os.close(lock)


@contextmanager
def aside(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is on the disk: `path` is always the old file or the new one, whole.

    Raises:
        OSError: the disk is full or forbids it; the old file stays, and nothing else.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def required(path: Path) -> Iterator[None]:
    """A write without which there is no use in going on.

    Raises:
        UserError: it failed.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make room, or name another --out") from error


@contextmanager
def tolerated(path: Path) -> Iterator[None]:
    """A write whose failure is reported while the run goes on."""
    try:
        yield
    except OSError as error:
        print(f"warning: {path}: not written ({error.strerror or error}); the run goes on", file=sys.stderr, flush=True)
