"""Weights of mmpose 1.x: their names and ours, for reading its checkpoints and for writing ours back.

    python -m tasks.pose.mmpose_weights runs/NAME/best.pt for_mmpose.pth

HRNet with a heatmap head, SimpleBaseline on ResNet, and SimCC heads on both have the same tensors here and there, so that only
names differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tasks import checkpoint
from tasks.errors import UserError

JOINTS = "_extra_state"  # torch's name of what a network of ours keeps beside its tensors

# mmpose's prefixes and ours, of the two networks; the backbones' names are timm's.
_HEATMAP = {"head.final_layer.": "head.", "head.deconv_layers.": "neck."}
_SIMCC = {
    "head.deconv_head.deconv_layers.": "deconvs.",
    "head.deconv_head.final_layer.": "maps.",
    "head.mlp_head_x.": "columns.",
    "head.mlp_head_y.": "rows.",
}
# HRNet's and SimpleBaseline's own repositories; all else there is the backbone.
_ORIGINAL = {"final_layer.": "head.", "deconv_layers.": "neck."}
_SIMCC_WITHOUT_DECONVS = {**_SIMCC, "head.final_layer.": "maps."}


def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of mmpose's or of the original HRNet's under our names; one that has them already comes back as it is."""
    if "final_layer.weight" in state:
        parts = (*_ORIGINAL, JOINTS)
        return {_replaced(key, _ORIGINAL) if key.startswith(parts) else f"backbone.{key}": x for key, x in state.items()}
    state = {_replaced(key, {"keypoint_head.": "head."}): tensor for key, tensor in state.items()}  # before mmpose 1.0
    names = _SIMCC_WITHOUT_DECONVS if "head.mlp_head_x.weight" in state else _HEATMAP
    return {_replaced(key, names): tensor for key, tensor in state.items()}


def to_mmpose(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_ours`, under the names of mmpose 1.x."""
    state = {key: tensor for key, tensor in state.items() if key != JOINTS}
    names = _HEATMAP
    if "columns.weight" in state:
        names = _SIMCC if any(key.startswith("deconvs.") for key in state) else _SIMCC_WITHOUT_DECONVS
    theirs = {ours: mmpose for mmpose, ours in names.items()}
    return {_replaced(key, theirs): tensor for key, tensor in state.items()}


def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A network's pre-hook of load_state_dict: lets it take a state_dict of mmpose's."""
    own = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
    for key in own:
        del state[key]
    renamed = to_ours({key[len(prefix) :]: tensor for key, tensor in own.items()})
    if hasattr(module, "joints"):  # of which mmpose's files know nothing
        renamed.setdefault(JOINTS, module.joints.encoded())  # type: ignore[operator, union-attr]
    state.update({prefix + key: tensor for key, tensor in renamed.items()})


def _replaced(key: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def main(arguments: list[str]) -> None:
    """Write the weights of a checkpoint of ours for mmpose."""
    if len(arguments) != 2:
        raise UserError("expected two files: python -m tasks.pose.mmpose_weights OURS.pt FOR_MMPOSE.pth")
    source, target = map(Path, arguments)
    state = checkpoint.weights(source)
    if not {"head.weight", "columns.weight"} & state.keys():
        raise UserError(f"{source}: not a pose network of this project: it has neither head.weight nor columns.weight")
    if any(key.startswith("lateral.") for key in state):
        raise UserError(f"{source}: mmpose's HeatmapHead has no top-down additions; deconvs= makes a network that it has")
    checkpoint.save(target, {"meta": {}, "state_dict": to_mmpose(state)})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
