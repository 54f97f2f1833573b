"""Checkpoints: plain containers and tensors, written aside and renamed, read without running code."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from tasks import folder
from tasks.errors import UserError


class _Ignored:
    """Whatever a file holds besides weights, read as nothing."""

    def __new__(cls, *_: Any) -> _Ignored:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# mmengine writes its log beside the weights: buffers of numpy arrays, with their methods. None of it is rebuilt, so that
# none of it can run.
_BESIDE_WEIGHTS = (
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint so that `path` is at any moment the old file or the new one, whole.

    Args:
        path: the file.
        state: plain containers and tensors.
        previous: where the old file is kept; None: it is not.

    Raises:
        OSError: the disk is full or forbids it; the old file stays.
    """
    try:
        with folder.aside(path) as file:
            torch.save(state, file)
            if previous is not None and path.exists():
                _keep(path, previous)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch's writer hides what the system said
        raise


def _keep(path: Path, previous: Path) -> None:
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)  # so that `path` is there all the time
    except OSError:  # a file system without hard links
        os.replace(path, previous)


def recover(path: Path, previous: Path) -> None:
    """Put the checkpoint before the last in the last one's place, where that is damaged or gone, and say so.

    Raises:
        UserError: both are unreadable.
    """
    if not previous.is_file():
        return
    try:
        load(path)
    except UserError as error:
        load(previous)
        print(f"warning: {error}; going on from the one before it, {previous.name}", file=sys.stderr, flush=True)
        os.replace(previous, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        UserError: no such file, a damaged one, or not a checkpoint of plain containers and tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        _check(path)
        with torch.serialization.safe_globals([(_Ignored, name) for name in _BESIDE_WEIGHTS]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile bytes make the readers raise anything
        raise UserError(
            f"{path}: not a readable checkpoint of tensors and plain containers ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a dict, found {type(state).__name__}")
    return state


def _check(path: Path) -> None:
    """Compare torch's archive with its own checksums, which torch.load does not; older formats have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch compresses nothing; what is compressed may be larger than any memory.
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if packed or archive.testzip() is not None:
                raise zipfile.BadZipFile


def weights(path: Path) -> dict[str, Any]:
    """The state_dict in a run's checkpoint, the averaged weights where it has them, in one of mmengine, or in a bare one.

    Raises:
        UserError: unreadable.
    """
    state = load(path)
    found = next(
        (part for part in map(state.get, ("average", "model", "state_dict")) if isinstance(part, dict) and part), state
    )
    if not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: not a state_dict: its keys are no names")
    return found


def fill(model: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load a state_dict into a model.

    Raises:
        UserError: the keys or shapes are not the model's.
    """
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: does not fit the model of this config: {first}") from error


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Fill a model from a checkpoint.

    Raises:
        UserError: unreadable, or not the model's.
    """
    fill(model, weights(path), path)
