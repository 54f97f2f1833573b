"""A run's folder: whose it is, one process at a time, and a failed write costs no training."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tasks.errors import UserError

# A lock lasts as long as any process has its descriptor open: a loader's worker must not keep it from a run that is resumed.
_locks: set[int] = set()
os.register_at_fork(after_in_child=lambda: [os.close(_locks.pop()) for _ in list(_locks)])


MARKER = "run.json"  # names the tool that a folder belongs to, and its run


def check(path: Path, tool: str, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """See that a tool may write into a folder: one that is new, empty, or its own by the marker.

    Args:
        path: the folder.
        tool: the name of the tool, such as "train".
        overwrite: any folder will do; an input is safe from the tool all the same.
        inputs: files and folders that are read.

    Raises:
        UserError: it may not; nothing has been touched.
    """
    refuse_inputs(path, inputs)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: cannot be written (a link to nothing is in the way); name another --out")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: cannot be written (it is a file, not a folder); name another --out")
    if overwrite or not path.is_dir():
        return
    try:
        found = sorted(os.listdir(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name another --out") from error
    if not found or (owned := owner(path)) == tool:
        return
    if owned is not None:
        raise UserError(f"{path}: belongs to a run of tools/{owned}.py; name another --out, or --overwrite to write into it")
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    raise UserError(
        f"{path}: holds files that tools/{tool}.py did not write ({some}); name another --out, or --overwrite to write into it"
    )


def check_file(path: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """See that a tool may write a file: a new one, in the place of none or, with `overwrite`, of another file.

    Raises:
        UserError: it may not; nothing has been touched.
    """
    refuse_inputs(path, inputs)
    place = path.parent.resolve()
    if (path.exists() and not path.is_file()) or place == Path("/dev") or Path("/proc") in (place, *place.parents):
        raise UserError(f"{path}: cannot be written (it is no file); name another --out")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path}: is there already; name another --out, or --overwrite")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{path}: cannot be written ({above} is a file, not a folder); name another --out")


def refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    """See that a file or folder is none of the inputs and holds none, by whatever name or link.

    Raises:
        UserError: it is one, or holds one.
    """
    if not path.exists():
        return
    own = {_place(path)}
    held = {_place(Path(entry)) for entry in os.scandir(path) if entry.is_file()} if path.is_dir() else set()
    for source in inputs:
        if source.exists():
            whole = source.resolve()
            if _place(whole) in own | held or any(_place(above) in own for above in whole.parents):
                raise UserError(f"{path}: holds {source}, which is read; an output is never an input: name another --out")


def _place(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def owner(path: Path) -> str | None:
    """The tool whose marker a folder has; None: it has none."""
    try:
        marker = json.loads((path / MARKER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    tool = marker.get("tool") if isinstance(marker, dict) else None
    return tool if isinstance(tool, str) else None


def mark(path: Path, tool: str, record: dict[str, object]) -> None:
    """Make a folder, and the marker that says whose it is.

    Args:
        path: the folder.
        tool: the name of the tool.
        record: of the run: plain containers.

    Raises:
        UserError: it cannot be written.
    """
    with required(path / MARKER):
        path.mkdir(parents=True, exist_ok=True)
        with aside(path / MARKER) as file:
            file.write((json.dumps({"tool": tool, **record}, indent=2) + "\n").encode())


def sweep(path: Path) -> None:
    """Remove what a process that was killed has left half-written in a folder of ours."""
    for leftover in path.glob(".*.tmp"):
        leftover.unlink()


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
    temporary = beside(path)
    try:
        with open(fresh(temporary), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fresh(path: Path) -> Path:
    """The path, with nothing there: what is then written goes through no link into another file."""
    path.unlink(missing_ok=True)
    return path


def beside(path: Path) -> Path:
    """The name under which a file is written before it takes its own."""
    return path.with_name(f".{path.name}.tmp")


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


def clear(out: Path, tool: str, *names: str) -> None:
    """Remove from a tool's own folder what a killed process has left, and these files; files of others stay."""
    if owner(out) == tool:
        sweep(out)
        for name in names:
            (out / name).unlink(missing_ok=True)


def leave(out: Path, *names: str) -> None:
    """Remove these files, and the folder where it then holds nothing."""
    for name in names:
        (out / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds something else
        out.rmdir()
