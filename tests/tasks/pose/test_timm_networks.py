"""Pose networks on timm's backbones: shapes, gradients, what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tasks.errors import UserError
from tasks.pose.codec import Heatmap, SimCC, UDPHeatmap
from tasks.pose.joints import Joints
from tasks.pose.model import SimCCNet
from tasks.pose.timm_networks import TimmHeatmap, features

FISH = Joints(("tip", "left_fin", "right_fin", "tail"))
SMALL = ("tf_efficientnet_lite0", "mobilenetv3_small_050", "resnet10t", "convnext_atto")


@pytest.mark.parametrize("deconvs", [None, (8, 8, 8)])
@pytest.mark.parametrize("variant", SMALL)
def test_heatmaps_of_any_backbone(variant: str, deconvs: tuple[int, ...] | None) -> None:
    """A quarter of the crop, a map for each joint, a gradient for every parameter. Kills: levels joined in a wrong order.

    A parameter without a gradient stops DDP.
    """
    model = TimmHeatmap(variant, width=8, deconvs=deconvs, joints=FISH)
    answer = model(torch.randn(2, 3, 64, 96))
    assert answer.shape == (2, 4, 16, 24)
    answer.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_crops_that_no_stride_divides() -> None:
    """Levels of odd sizes are enlarged to one another's size. Kills: a factor of 2 in place of the size."""
    model = TimmHeatmap("resnet10t", width=8, codec=Heatmap((120, 152), (30, 38)), joints=FISH)
    assert model(torch.randn(1, 3, 152, 120)).shape == (1, 4, 38, 30)


def test_starts_near_zero() -> None:
    """The heatmaps' targets are 0 nearly everywhere. Kills: timm's init of the last layer, a bias of its own."""
    model = TimmHeatmap("resnet10t", width=64, joints=FISH)
    assert 5e-4 < float(model.head.weight.detach().std()) < 2e-3
    assert not model.head.bias.detach().any()


def test_features_are_the_last_of_their_stride() -> None:
    """Of a network that has several stages of one stride. Kills: the first, which knows less."""
    assert features("tf_efficientnet_lite0", (4, 32)).feature_info.reduction() == [4, 32]  # type: ignore[union-attr, operator]
    vgg = features("vgg11", (32,))
    assert vgg.feature_info.channels() == [512]  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(("variant", "what"), [("no_such_network", "no_such_network"), ("vit_tiny_patch16_224", "strides")])
def test_networks_without_such_features(variant: str, what: str) -> None:
    """Are refused by name. Kills: an IndexError out of timm."""
    with pytest.raises(UserError, match=what):
        features(variant, (4, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": Heatmap((64, 64), (32, 32))}, "heatmap_size must be a quarter"),
        ({"codec": UDPHeatmap((64, 64), (32, 32))}, "heatmap_size must be a quarter"),
        ({"deconvs": (8, 8)}, "deconvs must be three widths"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    """Errors name the rule. Kills: a size that fails inside the loss."""
    with pytest.raises(ValueError, match=message):
        TimmHeatmap("resnet10t", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", SMALL)
def test_simcc_on_any_backbone(variant: str) -> None:
    """Logits of every bin. Kills: a stride of 32 that is taken for granted, channels of another level."""
    codec = SimCC((64, 96), sigma=3.0)
    for strides, deconvs in (((32,), (8,)), ((16,), ())):
        model = SimCCNet(codec, partial(features, variant, strides), deconvs, FISH)
        answer = model(torch.randn(2, 3, 96, 64))
        assert answer.shape == (2, 4, 128 + 192)
        if strides == (32,):  # timm leaves what lies behind an earlier stride in place
            answer.square().mean().backward()
            assert all(p.grad is not None for p in model.parameters())
