"""Top-down pose networks: timm's backbones with a head for each codec. They also load state_dicts of mmpose's.

# B batch, K keypoints, h w crop, W H bins of SimCC
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.hrnet import cfg_cls
from torch import Tensor, nn

from tasks.pose import mmpose_weights
from tasks.pose.codec import Heatmaps, SimCC
from tasks.pose.joints import COCO, Joints, same_names


def hrnet(
    variant: str = "hrnet_w32",
    widths: tuple[int, int, int, int] | None = None,
    modules: tuple[int, int, int] | None = None,
    blocks: int | None = None,
) -> nn.Module:
    """HRNet up to its branch of stride 4 (arXiv 1902.09212).

    Args:
        variant: timm's name, such as "hrnet_w32" or "hrnet_w48".
        widths: channels of the four branches, (8, 16, 32, 64) say; None leaves the variant's.
        modules: fusion modules of stages 2, 3 and 4; None leaves the variant's (1, 4, 3).
        blocks: residual blocks per branch; None leaves the variant's 4.
    """
    stages = _stages(variant, widths, modules, blocks)
    backbone: Any = timm.create_model(variant, features_only=True, feature_location="", out_indices=(1,), **stages)
    # Only the first branch is read: what the last module fuses for the others would never get a gradient.
    backbone.stage4[-1].fuse_layers = backbone.stage4[-1].fuse_layers[:1]
    return backbone


def resnet(variant: str = "resnet50", stages: int = 4) -> nn.Module:
    """A timm ResNet up to the features of its last stage, of stride 32, or of an earlier one: of stride 16 after stage 3."""
    return timm.create_model(variant, features_only=True, out_indices=(stages,))


class PoseNetwork(nn.Module):
    """What pose networks have in common: their joints, which the state_dict carries along, and mmpose's names for tensors.

    Args:
        joints: to find.
    """

    def __init__(self, joints: Joints) -> None:
        super().__init__()
        self.joints = joints
        self.register_load_state_dict_pre_hook(mmpose_weights.rename)

    def get_extra_state(self) -> Tensor:
        """The joints."""
        return self.joints.encoded()

    def set_extra_state(self, state: Any) -> None:
        """Compare the joints of a state_dict with the network's own.

        Raises:
            RuntimeError: they have other names.
        """
        theirs = Joints.decoded(state)
        if theirs is not None and not same_names(theirs.names, self.joints.names):
            raise RuntimeError(f"it was trained on {theirs.listed()}, where {self.joints.listed()} are expected")


class HeatmapHRNet(PoseNetwork):
    """HRNet and a 1x1 convolution to the heatmaps.

    Args:
        variant: as of `hrnet`, and so the next three.
        widths: channels.
        modules: fusion modules.
        blocks: residual blocks.
        codec: whose heatmaps are asked for; they must have a quarter of the crop's size.
        joints: to find.
    """

    def __init__(
        self,
        variant: str = "hrnet_w32",
        widths: tuple[int, int, int, int] | None = None,
        modules: tuple[int, int, int] | None = None,
        blocks: int | None = None,
        codec: Heatmaps | None = None,
        joints: Joints = COCO,
    ) -> None:
        super().__init__(joints)
        if codec is not None and tuple(4 * side for side in codec.heatmap_size) != codec.input_size:
            raise ValueError(f"heatmap_size must be a quarter of input_size {codec.input_size}, got {codec.heatmap_size}")
        self.backbone: Any = hrnet(variant, widths, modules, blocks)
        self.head = nn.Conv2d(self.backbone.feature_info.channels()[0], len(joints), 1)
        _from_scratch(self)

    def forward(self, image: Tensor) -> Tensor:
        """Heatmaps [B, K, h / 4, w / 4] of normalised crops [B, 3, h, w]."""
        return self.head(self.backbone(image)[0])


class SimCCNet(PoseNetwork):
    """A backbone, one small map per joint, and a linear classifier per axis that all joints share (arXiv 2107.03332).

    Args:
        codec: sets the crop's size and the bins.
        backbone: called without arguments: `resnet`, `hrnet` or a partial of one.
        deconvs: channels of the 4x4 deconvolutions before the maps, each of which doubles the resolution (arXiv
            1804.06208): three of 256 on ResNets in mmpose, none needed on HRNet.
        joints: to find.
    """

    def __init__(
        self,
        codec: SimCC,
        backbone: Callable[..., nn.Module] = resnet,
        deconvs: tuple[int, ...] = (256, 256, 256),
        joints: Joints = COCO,
    ) -> None:
        super().__init__(joints)
        self.backbone: Any = backbone()
        channels, stride = self.backbone.feature_info.channels()[0], self.backbone.feature_info.reduction()[0]
        layers: list[nn.Module] = []
        for width in deconvs:
            layers += [nn.ConvTranspose2d(channels, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.deconvs = nn.Sequential(*layers)
        self.maps = nn.Conv2d(channels, len(joints), 1)
        width, height = (side // stride * 2 ** len(deconvs) for side in codec.input_size)
        self.columns, self.rows = (nn.Linear(width * height, bins) for bins in codec.bins)
        _read_out(self.columns, width, height, axis=0)
        _read_out(self.rows, width, height, axis=1)
        _from_scratch(self.deconvs, self.maps)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K, W + H] of normalised crops [B, 3, h, w]."""
        maps = self.maps(self.deconvs(self.backbone(image)[0])).flatten(2)
        return torch.cat([self.columns(maps), self.rows(maps)], dim=2)


def _from_scratch(*parts: nn.Module) -> None:
    """mmpose's init; with timm's He init the heatmaps' tiny targets are not found."""
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=0.001)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _read_out(classifier: nn.Linear, width: int, height: int, axis: int) -> None:
    """Let a classifier start as the sum of a map over the other axis, interpolated to the bins.

    So the maps are heatmaps from the start. mmpose's N(0, 0.01) has to find that out: from scratch, on 150 batches of the
    drawn people, it took the loss from 0.41 to 0.286, and this to 0.246.
    """
    cells, others = (width, height) if axis == 0 else (height, width)
    place = (torch.arange(classifier.out_features) + 0.5) / classifier.out_features * cells - 0.5
    near = (1 - (place[:, None] - torch.arange(cells)).abs()).clamp(min=0) / others**0.5
    grid = near[:, None, :].expand(-1, height, -1) if axis == 0 else near[:, :, None].expand(-1, -1, width)
    with torch.no_grad():
        classifier.weight.copy_(grid.flatten(1))
        classifier.bias.zero_()


def _stages(
    variant: str,
    widths: tuple[int, int, int, int] | None,
    modules: tuple[int, int, int] | None,
    blocks: int | None,
) -> dict[str, Any]:
    """Timm's stage configs with our widths, module and block counts, as overrides of `create_model`."""
    stages: dict[str, Any] = {}
    for i in range(4):
        published: Any = cfg_cls[variant][f"stage{i + 1}"]
        stage = dict(published)
        branches = stage["num_branches"]
        if i > 0 and widths is not None:
            stage["num_channels"] = widths[:branches]
        if i > 0 and modules is not None:
            stage["num_modules"] = modules[i - 1]
        if blocks is not None:
            stage["num_blocks"] = (blocks,) * branches
        stages[f"stage{i + 1}"] = stage
    return stages
