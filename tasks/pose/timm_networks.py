"""Heatmaps on any of timm's backbones, with a light head: top-down additions, or deconvolutions (SimpleBaseline).

# B batch, K keypoints, h w crop
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import timm
from torch import Tensor, nn

from tasks.errors import UserError
from tasks.pose.codec import Heatmaps
from tasks.pose.joints import COCO, Joints
from tasks.pose.model import PoseNetwork

STRIDES = (4, 8, 16, 32)


def features(variant: str, strides: tuple[int, ...] = (32,)) -> nn.Module:
    """A timm backbone that answers with its features of these strides.

    Args:
        variant: timm's name, of a network that timm builds with features_only.
        strides: of the features, each a stride that the network has.

    Raises:
        UserError: timm does not know the network, or it has no such features.
    """
    try:
        found: Any = timm.create_model(variant, features_only=True)
        reductions = list(found.feature_info.reduction())
        places = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides)  # the last of a stride
        return timm.create_model(variant, features_only=True, out_indices=places)
    except (RuntimeError, AttributeError, AssertionError, ValueError, TypeError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{variant}: timm gives no features of strides {strides} ({what}); name another variant") from error


class TimmHeatmap(PoseNetwork):
    """A timm backbone and heatmaps of a quarter of the crop's size.

    Without deconvolutions, the features of strides 4 to 32 are brought to one width by 1x1 convolutions and added from the
    top down, each enlarged to the next (arXiv 1612.03144); a 3x3 convolution smooths the sum. With them, the features of
    stride 32 are enlarged by three deconvolutions (arXiv 1804.06208).

    Args:
        variant: timm's name of the backbone.
        width: channels of the additions.
        deconvs: channels of the 4x4 deconvolutions, each of which doubles the resolution: (256, 256, 256) in SimpleBaseline.
        codec: whose heatmaps are asked for; they must have a quarter of the crop's size.
        joints: to find.
    """

    def __init__(
        self,
        variant: str = "tf_efficientnet_lite0",
        width: int = 64,
        deconvs: tuple[int, ...] | None = None,
        codec: Heatmaps | None = None,
        joints: Joints = COCO,
    ) -> None:
        super().__init__(joints)
        if codec is not None and tuple(4 * side for side in codec.heatmap_size) != codec.input_size:
            raise ValueError(f"heatmap_size must be a quarter of input_size {codec.input_size}, got {codec.heatmap_size}")
        if deconvs is not None and len(deconvs) != 3:
            raise ValueError(f"deconvs must be three widths, which lead from stride 32 to 4, got {deconvs}")
        self.backbone: Any = features(variant, STRIDES if deconvs is None else STRIDES[-1:])
        channels = self.backbone.feature_info.channels()
        if deconvs is None:
            self.lateral = nn.ModuleList(_unit(nn.Conv2d(count, width, 1, bias=False)) for count in channels)
            self.neck = _unit(nn.Conv2d(width, width, 3, padding=1, bias=False))
        else:
            widths = (channels[0], *deconvs)
            self.neck = nn.Sequential(
                *(layer for pair in pairwise(widths) for layer in _unit(nn.ConvTranspose2d(*pair, 4, 2, 1, bias=False)))
            )
            width = deconvs[-1]
        self.head = nn.Conv2d(width, len(joints), 1)
        nn.init.normal_(self.head.weight, std=0.001)  # the targets are close to 0 nearly everywhere
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """Heatmaps [B, K, h / 4, w / 4] of normalised crops [B, 3, h, w]."""
        levels = self.backbone(image)
        if not hasattr(self, "lateral"):
            return self.head(self.neck(levels[0]))
        *lower, x = (bring(level) for bring, level in zip(self.lateral, levels, strict=True))
        for level in reversed(lower):
            x = level + nn.functional.interpolate(x, size=level.shape[2:], mode="nearest")
        return self.head(self.neck(x))


def _unit(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True))
