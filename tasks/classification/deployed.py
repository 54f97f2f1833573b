"""Networks as they are used: from a checkpoint or an ONNX file, which tell how they are fed and what they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from tasks import checkpoint
from tasks.classification.task import Classification
from tasks.errors import UserError
from tasks.quant.lowbit import has_quantizers
from tasks.quant.runtime import InRuntime
from tasks.state import build_model


def load(task: Classification, file: Path) -> tuple[Classification, nn.Module]:
    """A network that answers, and the task as it was made for.

    Args:
        task: of the config; what it leaves open is taken from the file.
        file: a checkpoint, or *.onnx.

    Raises:
        UserError: it cannot be read, or is not the config's network.
    """
    if file.suffix.lower() == ".onnx":
        return _of_onnx(task, file)
    saved = checkpoint.load(file)
    about = saved.get("about")
    with checkpoint.trusted(file):
        task = task.knowing(about if isinstance(about, dict) else {})
    bits = {} if has_quantizers(checkpoint.weights(file)) else {"weight_bits": None, "act_bits": None}
    model = build_model(task.with_settings(weights=None, pretrained=False, distill=0.0, unlabelled=None, **bits))
    checkpoint.load_weights(model, file)
    return task, model


def _of_onnx(task: Classification, file: Path) -> tuple[Classification, nn.Module]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        held = onnx.load(file, load_external_data=False)
        network = InRuntime(file)
        about: dict[str, Any] = {entry.key: json.loads(entry.value) for entry in held.metadata_props}
    except Exception as error:  # the readers of a damaged file raise anything
        raise UserError(f"{file}: not an ONNX file that can be run ({' '.join(str(error).split())[:150]})") from error
    if about and about.get("task") != task.name:
        raise UserError(f"{file}: not the file of a classifier: its metadata names the task {about.get('task')!r}")
    with checkpoint.trusted(file):
        if about.get("size"):
            task = task.with_settings(side=tuple(about["size"]))
        return task.knowing(about), network
