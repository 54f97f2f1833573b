"""Lets mmpose 1.3.2, last released in 2024, be imported beside today's torch.

mmpose imports what no longer installs there: mmcv's compiled operators, mmdet, xtcocotools. `install` puts stand-ins at the
very end of Python's search, so that wherever the real package is there, it is the one that is found. Training HRNet, SimCC
and RTMPose calls none of what they stand for; a model that calls a compiled operator gets an error that names it.

A process that is spawned starts from nothing, so there `install` has to run again: call it at the top of the script, above
``if __name__ == "__main__"``, which a spawned worker runs too. Or run this module once, ``python -m
arsam.integrations.mmpose_standins``, as ``make mmpose`` does: from then on every process of that environment installs the
stand-ins by itself the moment it imports mmpose, mmpose's own tools included.
"""

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# One line of a .pth file: Python runs it at every start, so it may import nothing until mmpose is asked for.
_AT_START = (
    "import sys, types; sys.meta_path.insert(0, types.SimpleNamespace(find_spec=lambda name, *_: name == 'mmpose'"
    " and __import__('arsam.integrations.mmpose_standins', fromlist=['install']).install() or None))\n"
)


def install() -> None:
    """Make ``import mmpose`` and mmengine's resume work. Call it before; a second call does nothing.

    Raises:
        ModuleNotFoundError: mmengine is missing; ``make mmpose`` makes an environment with everything.
    """
    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.append(_StandIns())
    allow_log_history()


def allow_log_history() -> None:
    """Let torch.load read mmengine's checkpoints as what they are: tensors, and the log's history in numpy arrays.

    mmengine 0.10.7 calls torch.load as if it still unpickled anything. Naming the few classes that its checkpoints hold
    keeps torch's check on all others, so that a file from elsewhere still cannot run code.
    """
    import numpy as np
    from mmengine.logging import HistoryBuffer

    multiarray: Any = importlib.import_module("numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray")
    reconstruct, scalar = multiarray._reconstruct, multiarray.scalar
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            *((f, f"numpy.{core}.multiarray.{f.__name__}") for f in (reconstruct, scalar) for core in ("core", "_core")),
            np.ndarray,
            np.dtype,
            *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
        ]
    )


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, after everybody else has failed to, the modules of `_CONTENT`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a stand-in, and None for all other modules."""
        if fullname not in _CONTENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=any(x.startswith(f"{fullname}.") for x in _CONTENT))

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module."""
        vars(module).update(_CONTENT[module.__name__]())


def _operators() -> dict[str, Any]:
    """mmcv.ops asks its compiled library for functions by name when it is imported, and calls them when a model does."""

    def __getattr__(name: str) -> Callable[..., Any]:  # noqa: N807
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"{name} is compiled code of mmcv, which mmcv-lite has not; the model needs the full mmcv"
            )

        return missing

    return {"__getattr__": __getattr__}


def _mmdet() -> dict[str, Any]:
    from mmengine import ConfigDict

    return {"ConfigType": ConfigDict | dict[str, Any], "reduce_mean": _reduce_mean}


def _reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over all ranks; the tensor itself where there is one."""
    from mmengine import dist

    if dist.get_world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, "mean")
    return tensor


def _same_as(name: str) -> Callable[[], dict[str, Any]]:
    """The public content of another module."""

    def content() -> dict[str, Any]:
        return {key: x for key, x in vars(importlib.import_module(name)).items() if not key.startswith("__")}

    return content


_CONTENT: dict[str, Callable[[], dict[str, Any]]] = {
    "mmcv._ext": _operators,
    "mmdet": dict,
    "mmdet.utils": _mmdet,
    "xtcocotools": dict,
    **{f"xtcocotools.{part}": _same_as(f"pycocotools.{part}") for part in ("coco", "cocoeval", "mask")},
}


if __name__ == "__main__":
    target = Path(sysconfig.get_path("purelib")) / "arsam_mmpose.pth"
    target.write_text(_AT_START)
    print(f"wrote {target}", file=sys.stderr)
