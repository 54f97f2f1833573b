"""Networks as they are used: from a checkpoint or an ONNX file, which tell how they are fed and what they find."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tasks import checkpoint, distributed
from tasks.errors import UserError
from tasks.pose import mmpose_weights, starting
from tasks.pose.codec import Heatmap, SimCC, UDPHeatmap
from tasks.pose.joints import Joints, same_names
from tasks.pose.task import PoseTask
from tasks.quant import export
from tasks.quant.lowbit import LowBit
from tasks.quant.runtime import InRuntime, opened
from tasks.state import build_model

_CODECS: dict[str, Any] = {codec.__name__: codec for codec in (Heatmap, UDPHeatmap, SimCC)}


def loaded(task: PoseTask, file: Path) -> tuple[PoseTask, nn.Module]:
    """A network that answers, and the task as it was trained for.

    Args:
        task: of the config.
        file: a checkpoint, or *.onnx.

    Raises:
        UserError: it cannot be read, or is not the config's network.
    """
    if file.suffix.lower() == ".onnx":
        return _of_file(task, file)
    task = _with_its_geometry(task, file)
    state = mmpose_weights.to_ours(starting.unwrapped(checkpoint.weights(file)))
    task = task.as_trained(state)
    model = build_model(task)
    checkpoint.fill(model, state, file)
    return task, model


def _with_its_geometry(task: PoseTask, file: Path) -> PoseTask:
    """The task, under UDP (arXiv 1911.07524) where a checkpoint of mmpose's was trained so: the tensors look the same.

    Raises:
        UserError: UDP's offsets, or no network of heatmaps.
    """
    meta = checkpoint.load(file).get("meta")
    settings, words = str(meta) if isinstance(meta, dict) else "", re.split(r"[^a-z]+", file.stem.lower())
    if re.search(r"UDPHeatmap|use_udp=True", settings) is None and "udp" not in words:
        return task
    if re.search(r"""heatmap_type['"]?\s*[=:]\s*['"]combined""", settings) or "regress" in words:
        raise UserError(f"{file}: trained with UDP's offsets beside its heatmaps, which this project does not decode")
    if isinstance(task.codec, UDPHeatmap):
        return task
    if not isinstance(task.codec, Heatmap):
        raise UserError(f"{file}: trained with UDP's heatmaps, where the config's codec is {type(task.codec).__name__}")
    if not distributed.rank():
        print(f"{file}: trained with UDP, and cropped and decoded so (codec UDPHeatmap)", flush=True)
    codec = task.codec
    return replace(task, codec=UDPHeatmap(codec.input_size, codec.heatmap_size, codec.sigma, codec.blur))


def _of_file(task: PoseTask, file: Path) -> tuple[PoseTask, nn.Module]:
    network, given = opened(file, task.name)
    if not given:
        return replace(task, weights=None), network
    try:
        settings = dict(given["codec"])
        codec = _CODECS[settings.pop("name")](**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        joints = Joints(**given["joints"])
        mean, std = tuple(given["mean"]), tuple(given["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: its metadata is not of this project: {type(error).__name__}: {error}") from error
    if task.joints is not None and not same_names(task.joint_set().names, joints.names):
        raise UserError(f"{file}: finds {joints.listed()}, where task.joints asks for {task.joint_set().listed()}")
    return replace(task, codec=codec, joints=joints, mean=mean, std=std, weights=None), network


@torch.no_grad()
def write(task: LowBit, model: nn.Module, file: Path) -> float:
    """Write a float network as an ONNX file with what its user must know, and compare the two.

    Args:
        task: of the network.
        model: on the CPU.
        file: to write.

    Returns:
        The largest difference of the answers on noise, as a share of the largest answer.
    """
    model.eval()
    noise = torch.randn(2, *task.example().shape[1:], generator=torch.Generator().manual_seed(0))
    export.export(model, file, [noise.numpy()], about={**task.about(), "task": task.name})  # type: ignore[attr-defined]
    expected, found = model(noise).numpy(), InRuntime(file)(noise).numpy()
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))
