"""Top-down pose networks: timm's HRNet with one 1x1 convolution to the heatmaps.

# B batch, K keypoints, h w crop; the heatmap is at a quarter of the crop's size
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models.hrnet import cfg_cls
from torch import Tensor, nn

from tasks.pose.data import KEYPOINTS


class HeatmapHRNet(nn.Module):
    """HRNet's stride-4 branch and a 1x1 convolution (arXiv 1902.09212).

    Args:
        variant: timm's name, such as "hrnet_w32" or "hrnet_w48".
        widths: channels of the four branches, (8, 16, 32, 64) say; None leaves the variant's.
        modules: fusion modules of stages 2, 3 and 4; None leaves the variant's (1, 4, 3).
        blocks: residual blocks per branch; None leaves the variant's 4.
    """

    def __init__(
        self,
        variant: str = "hrnet_w32",
        widths: tuple[int, int, int, int] | None = None,
        modules: tuple[int, int, int] | None = None,
        blocks: int | None = None,
    ) -> None:
        super().__init__()
        stages = _stages(variant, widths, modules, blocks)
        backbone: Any = timm.create_model(variant, features_only=True, feature_location="", out_indices=(1,), **stages)
        # Only the first branch is read: what the last module fuses for the others would never get a gradient.
        backbone.stage4[-1].fuse_layers = backbone.stage4[-1].fuse_layers[:1]
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.feature_info.channels()[0], len(KEYPOINTS), 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # mmpose's init; with timm's He init the heatmaps' tiny targets are not found.
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Heatmaps [B, K, h / 4, w / 4] of normalised crops [B, 3, h, w]."""
        return self.head(self.backbone(image)[0])


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
