"""Networks as they are used: from a checkpoint or an ONNX file, which tell how they are fed and what they answer."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tasks import checkpoint
from tasks.classification.task import Classification
from tasks.quant.lowbit import has_quantizers
from tasks.quant.runtime import opened
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
    network, about = opened(file, task.name)
    with checkpoint.trusted(file):
        if about.get("size"):
            task = task.with_settings(side=tuple(about["size"]))
        if isinstance(classes := network.output_shape[-1], int):
            task = task.with_settings(classes=classes)
        return task.knowing(about), network
