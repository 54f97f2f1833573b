"""Does a file answer as the network that it was made of? And if not, which layer parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.quant.calibrate import modes_kept
from tasks.quant.prepare import QuantLayer
from tasks.quant.runtime import InRuntime, best

AGREEMENT = 0.9  # share of equal answers under which a file is not what it was made of
_PICTURES = 64  # that are looked at, at most


@torch.no_grad()
def check(path: Path, model: nn.Module, batches: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
    """Compare a file with its fake-quantized network on calibration inputs.

    Args:
        path: of the file.
        model: prepared and calibrated.
        batches: inputs [B, c, h, w].

    Returns:
        "agreement", the share of equal answers; "distance", sum (y_file - y)^2 / sum y^2; "warnings", lines; and where there
        are some, "layers": per layer its bits, sign, step sizes and signal-to-noise ratio, see `layer_errors`.
    """
    images = torch.from_numpy(np.concatenate(list(batches))[:_PICTURES])
    device = next(model.parameters()).device
    with modes_kept(model):
        model.eval()
        wanted = torch.cat([model(x.to(device)).float().cpu() for x in images.split(8)])
        found = torch.cat([InRuntime(path)(x) for x in images.split(8)])
    agreement = float((best(found) == best(wanted)).float().mean())
    distance = float((found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30))
    answer: dict[str, Any] = {"agreement": agreement, "distance": distance, "warnings": []}
    if agreement < AGREEMENT:
        answer["layers"] = layer_errors(model, images[:8].to(device))
        worst = min(answer["layers"], key=lambda row: row["snr_db"])
        answer["warnings"].append(
            f"{path}: agrees with the fake-quantized network on {agreement:.1%} of {len(images)} calibration inputs; the"
            f" noisiest layer is {worst['layer']} ({worst['snr_db']:.1f} dB; report.md lists all): task.layers can leave it"
            " float, or give it more bits"
        )
    return answer


@torch.no_grad()
def layer_errors(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """What quantization does to each layer's output, given the layer's own input.

    snr = 10 log10(sum y^2 / sum (y_q - y)^2), y the layer in float and y_q in bits

    Args:
        model: prepared and calibrated.
        images: a few inputs, on its device.
    """
    rows: list[dict[str, Any]] = []

    def look(name: str, layer: QuantLayer, x: Tensor, answer: Tensor) -> None:
        exact = layer.call(x, layer.standardised_weight())
        noise = float((answer - exact).square().sum().clamp_min(1e-30))
        rows.append(
            {
                "layer": name,
                "weight_bits": layer.weight_quantizer.bits,
                "act_bits": layer.input_quantizer.bits,
                "signed": layer.input_quantizer.signed,
                "act_step": float(layer.input_quantizer.step),
                "weight_step": float(layer.weight_quantizer.step.mean()),
                "snr_db": 10 * float(np.log10(max(float(exact.square().sum()), 1e-30) / noise)),
            }
        )

    hooks = [
        layer.register_forward_hook(lambda layer, x, y, name=name: look(name, layer, x[0], y))  # type: ignore[arg-type]
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer)
    ]
    try:
        with modes_kept(model):
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return rows
