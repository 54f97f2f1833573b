"""Learned rounding: a weight's codes by the error of the layer's output, not by their own.

Rounding each weight to the nearest code is best for the weights and not for the output, in which errors of neighbouring
inputs can cancel. The objective is AdaRound's, the layer's squared output error; it is quadratic in the codes, and is
lowered by one code at a time, exactly, until none wants to move: no rates, no schedule, minutes for a mobile network.

# G groups of a layer, o outputs of a group, d inputs of an output (channels times kernel), n samples of them
# w weights, s step sizes, q codes [G, o, d] or [G, o]; u inputs [G, d, n]; h = E[u u^T] [G, d, d]

References:
    AdaRound's objective: arXiv 2004.10568, eq. 8 to 14. Coordinate descent on it: QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tasks.quant.calibrate import run_in_float
from tasks.quant.prepare import QuantLayer

DAMPING = 0.1  # of the mean diagonal of h: what a few pictures did not show is not taken for silent
SWEEPS = 4  # over the codes of a layer
_PLACES = 64  # of a picture that are looked at
_MOST = 8192  # inputs of an output; h of a wider layer would not fit, and it keeps the nearest codes


@torch.no_grad()
def learn_rounding(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Choose the codes of each layer's weight, in place: the weights become what their codes stand for.

    minimise over q: (w - s q) h (w - s q)^T, from the nearest codes on

    Args:
        model: prepared and calibrated.
        batches: inputs on its device; a hundred pictures are enough.

    Raises:
        ValueError: no batches.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLayer) and m.layer.weight[0].numel() <= _MOST]  # type: ignore[index]
    layers = [layer for layer in layers if layer.standardised_weight() is layer.layer.weight]  # others are made anew each time
    moments = _second_moments(model, layers, batches)
    for layer in layers:
        if layer not in moments:
            continue
        weight: Any = layer.layer.weight
        quantizer = layer.weight_quantizer
        h = moments.pop(layer)
        groups, d, _ = h.shape
        w, s = weight.reshape(groups, -1, d).double(), quantizer.step.view(groups, -1).double()
        diagonal = h.diagonal(dim1=1, dim2=2)
        diagonal += DAMPING * diagonal.mean(1, keepdim=True).clamp_min(1e-12)
        codes = quantizer.codes(weight).reshape(groups, -1, d).double()
        codes = descend(w, h, s, codes, quantizer.low, quantizer.high)
        weight.copy_((codes * s[..., None]).reshape(weight.shape))


def descend(w: Tensor, h: Tensor, s: Tensor, codes: Tensor, low: int, high: int, sweeps: int = SWEEPS) -> Tensor:
    """Lower (w - s q) h (w - s q)^T by one code at a time, all outputs at once; never raises it.

    With r = w - s q and g = r h: the best code of input j, others fixed, is q_j + round(g_j / (s h_jj)), clipped.

    Args:
        w: [G, o, d].
        h: [G, d, d], symmetric, with a positive diagonal.
        s: [G, o], > 0.
        codes: to start from, [G, o, d].
        low: smallest code.
        high: largest code.
        sweeps: over all inputs, at most.
    """
    codes = codes.clone()
    g = (w - s[..., None] * codes) @ h
    diagonal = h.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        moved = False
        for j in diagonal.mean(0).argsort(descending=True).tolist():
            wanted = (codes[:, :, j] + g[:, :, j] / (s * diagonal[:, None, j])).round_().clamp_(low, high)
            change = wanted - codes[:, :, j]
            if change.any():
                moved = True
                codes[:, :, j] = wanted
                g.baddbmm_((change * s)[..., None], h[:, None, j, :], alpha=-1)
        if not moved:
            break
    return codes


def _second_moments(model: nn.Module, layers: list[QuantLayer], batches: Iterable[Tensor]) -> dict[QuantLayer, Tensor]:
    """h of each layer that a batch reaches, with the quantizers off, in float64."""
    moments: dict[QuantLayer, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def look(layer: QuantLayer, x: Tensor) -> None:
        for picture in x.split(1):
            u = _columns(layer, picture.detach(), generator).double()
            h = u @ u.mT
            moments[layer] = moments[layer].add_(h) if layer in moments else h

    run_in_float(
        model,
        batches,
        [layer.register_forward_pre_hook(lambda layer, x: look(layer, x[0])) for layer in layers],  # type: ignore[arg-type]
    )
    return moments


def _columns(layer: QuantLayer, x: Tensor, generator: torch.Generator) -> Tensor:
    """What an output is a product with, at a few places: u [G, d, n] of one input."""
    inner: Any = layer.layer
    if isinstance(inner, nn.Linear):
        u = x.reshape(1, -1, x.shape[-1]).mT
        groups = 1
    else:
        # A convolution whose kernels are the unit vectors gives the columns, with the layer's own padding and stride.
        groups, d = inner.groups, inner.weight[0].numel()
        unit = (
            torch.eye(d, device=x.device, dtype=x.dtype).view(d, *inner.weight.shape[1:]).repeat(groups, *[1] * (x.dim() - 1))
        )
        vars(inner)["bias"] = None  # an instance attribute goes before a parameter
        try:
            u = layer.call(x, unit)
        finally:
            del vars(inner)["bias"]
        u = u.flatten(2).view(groups, d, -1)
    places = u.shape[-1]
    if places > _PLACES:
        u = u[..., torch.randperm(places, generator=generator)[:_PLACES].to(u.device)]
    return u
