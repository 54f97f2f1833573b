"""From a picture to the network's input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tasks.classification.preprocessing import Preprocessing, of_model
from tasks.pictures import MEAN


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("vit_tiny_patch16_224", False),
        ("tf_efficientnet_lite0", False),
        ("resnet18", False),
        ("mobilevit_xs", False),
        ("resnet50", True),  # evaluated at 288, where its crop is another
        ("convnext_tiny.fb_in22k_ft_in1k_384", False),  # stretched
    ],
)
def test_as_timm_evaluates(name: str, larger: bool) -> None:
    """Pixel for pixel timm's own transform. Kills: another mean, the crop of another network or size, bilinear for bicubic."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    size = (cfg.test_input_size if larger else cfg.input_size)[1:]  # type: ignore[index]
    mine = of_model(cfg.to_dict(), size, 3)
    config = timm.data.resolve_data_config({}, pretrained_cfg=cfg.to_dict(), use_test_size=larger)
    theirs: Any = timm.data.create_transform(**config)
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((350, 330), Image.Resampling.BICUBIC)
    found = mine.normalised(mine.transform()(picture)[None])[0]
    torch.testing.assert_close(found, theirs(picture), atol=2 / 255 / min(mine.std), rtol=0)
    assert (found - theirs(picture)).abs().mean() < 1e-3


def test_what_is_given_goes_first() -> None:
    """And small pictures are seen whole."""
    cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.5, 0.5), "crop_pct": 0.9, "interpolation": "bicubic"}
    assert of_model(cfg, (32, 32), 3).crop is None
    assert of_model(cfg, (96, 96), 3).crop == 0.9
    assert of_model({}, (96, 96), 3).mean == MEAN
    own = of_model(cfg, (96, 64), 3, crop=0.5, interpolation="nearest", mean=(0.1, 0.2, 0.3))
    assert own == Preprocessing((96, 64), 0.5, "nearest", (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert own.cover == (192, 128)
    assert of_model(cfg, (96, 96), 1).mean == pytest.approx((0.4,))
    assert of_model(cfg, (96, 96), 4).mean == pytest.approx((0.5, 0.4, 0.3, 0.4))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_and_sizes(channels: int, mode: str) -> None:
    """Wide and tall pictures, every mode, a size that is no square."""
    how = of_model({}, (96, 64), channels)
    for picture in (
        Image.new("RGB", (500, 80)),
        Image.new("L", (80, 500)),
        Image.new("RGBA", (64, 96)),
        Image.new("P", (9, 9)),
    ):
        assert how.transform()(picture).shape == (channels, 96, 64)
    assert how.about()["color"] == mode


def test_sixteen_bits_are_scaled() -> None:
    """Kills: Pillow's conversion, which cuts off at 255."""
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    for picture in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        found = of_model({}, (4, 4), 3).transform()(picture)
        np.testing.assert_allclose(found[0].numpy(), values / 257, atol=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 0.0}, "crop must lie"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest"),
        ({"mean": (0.5,)}, "as many as channels"),
        ({"std": (0.0, 1.0, 1.0)}, "std > 0"),
        ({"mean": (0.0, float("inf"), 1.0)}, "mean and std must be finite"),
        ({"size": (0, 3)}, "side must be >= 1"),
    ],
)
def test_out_of_range(settings: dict[str, Any], message: str) -> None:
    """Refused where it is set."""
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"size": (8, 8), **settings})
