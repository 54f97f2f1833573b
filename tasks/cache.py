"""What a run looks up once and keeps in its folder: a million files on a disk far away take minutes to be listed.

# D files and folders that were looked at
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import distributed, folder

Arrays = dict[str, NDArray[Any]]
_SETTLED = 2_000_000_000  # ns: what was changed so shortly before it was read may change again within one tick of its clock
_STAMPS = ("looked_at", "stamps")

_out: Path | None = None  # the folder of the run under way
_waiting: dict[Path, Arrays] = {}  # what is to be kept once the folder is there


@contextmanager
def beside(out: Path | None) -> Iterator[None]:
    """Keep what is looked up in here in the run's folder, unless a run around this one keeps it in its own."""
    global _out
    if _out is not None or out is None:
        yield
        return
    _out = out
    try:
        yield
    finally:
        _out = None
        _waiting.clear()


def arrays(source: Path, make: Callable[[], tuple[Arrays, list[Path]]]) -> Arrays:
    """What `make` returns for a source, or what the run's folder holds of it while nothing in the source has changed.

    Args:
        source: file or folder that is looked up; it is never written to.
        make: returns the arrays, and the files and folders whose change makes them wrong. A folder changes when a name in it
            comes or goes.
    """
    source = source.resolve()
    kept = _read(_path(_out, source)) if _out is not None else None
    if kept is not None:
        return kept
    begin = time.time_ns()
    found, looked_at = make()
    if _out is not None and distributed.rank() == 0:
        stamps = np.array([_stamp(path) for path in looked_at], np.int64).reshape(-1, 2)
        if stamps[:, 0].max(initial=0) < begin - _SETTLED:
            names = np.array([os.fsencode(path.resolve()) for path in looked_at])
            _waiting[_path(_out, source)] = {**found, **dict(zip(_STAMPS, (names, stamps), strict=True))}
            keep()
    return found


def keep() -> None:
    """Write what waits, if the folder belongs to a tool by now. What cannot be written is looked up again the next time."""
    if _out is not None and folder.owner(_out) is not None:
        for path, found in _waiting.items():
            with folder.tolerated(path), folder.aside(path) as file:
                np.savez(file, **found)  # type: ignore[arg-type]
        _waiting.clear()


def _path(out: Path, source: Path) -> Path:
    return out / f"listing-{source.stem}-{zlib.crc32(os.fsencode(source)):08x}.npz"


def _read(path: Path) -> Arrays | None:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        names, stamps = (found.pop(name) for name in _STAMPS)
        now = [_stamp(Path(os.fsdecode(name))) for name in names.tolist()]
    except Exception:  # not there, damaged, or something in the source is gone
        return None
    return found if now == stamps.tolist() else None


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_mtime_ns, status.st_size]
