"""A sharpness-aware step on a fake-quantized model: what it moves, and what of that survives rounding.

A perturbation of latent weights is mostly rounded away: it acts on BatchNorm and biases alone. `AfterRounding` adds it
behind the quantizer instead (SAQ, arXiv 2111.12273, eq. 6); `effect` measures both.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, sampling
from tasks.quant.prepare import QuantLayer, parameter_groups
from tasks.quant.quantizer import Quantizer


class AfterRounding(Quantizer):
    """A weight quantizer that takes a perturbed weight w + e for Q(w) + e, in the second pass of a step.

    It learns of the second pass as observers do: `arsam.frozen_statistics` switches them off. In the first pass it
    remembers w, a copy of the weight; the gradient goes straight through to the latent weight, as without perturbation.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer.bits, signed=quantizer.signed, channels=quantizer.channels, axis=quantizer.axis)
        self.load_state_dict(quantizer.state_dict())
        self.observer_enabled = [True]
        self._seen: Tensor | None = None

    def disable_observer(self) -> None:
        """The second pass begins."""
        self.observer_enabled[0] = False

    def enable_observer(self) -> None:
        """The second pass is over."""
        self.observer_enabled[0] = True
        self._seen = None

    def forward(self, x: Tensor) -> Tensor:
        """Q(x), or Q(w) + e where x = w + e in a second pass."""
        if self.observer_enabled[0] or self._seen is None:
            if self.training and torch.is_grad_enabled():  # else it is the backward pass that quantizes once more
                self._seen = x.detach().clone()
            return super().forward(x)
        e = x.detach() - self._seen
        return super().forward(x - e) + e


@torch.no_grad()
def effect(model: nn.Module, loss: Callable[[nn.Module], Tensor], rho: float) -> dict[str, float]:
    """What one ascent of length rho does to a fake-quantized model, by either choice.

    Args:
        model: prepared and calibrated; it is left as it was.
        loss: of the model on a fixed batch.
        rho: length of the perturbation of the weights.

    Returns:
        "codes_changed": share of the weights' codes that a latent perturbation changes; "loss_rise_latent" and
        "loss_rise_quantized": L(w + e) - L(w), with e before and after rounding.
    """
    # On a copy, and without `model`: statistics may move there, and `AfterRounding` must not hear of a second pass.
    model = copy.deepcopy(model).train()
    optimizer = ARSAM(SGD(parameter_groups(model), lr=0.0), rho=rho, sampling=sampling.Never())
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]

    def codes() -> list[Tensor]:
        return [layer.weight_quantizer.codes(layer.standardised_weight()) for layer in layers]

    with torch.enable_grad():
        optimizer.zero_grad()
        first = loss(model)
        first.backward()
    weights, before = [layer.standardised_weight().clone() for layer in layers], codes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statistics that move: the copy's, which nobody keeps
        with optimizer.perturb():
            moved = [layer.standardised_weight() - w for layer, w in zip(layers, weights, strict=True)]
            after, latent = codes(), loss(model)
    for layer, e in zip(layers, moved, strict=True):
        layer.weight_quantizer.perturbation = e
    quantized = loss(model)
    for layer in layers:
        layer.weight_quantizer.perturbation = None
    optimizer.zero_grad()
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return {
        "codes_changed": changed / sum(b.numel() for b in before),
        "loss_rise_latent": float(latent - first),
        "loss_rise_quantized": float(quantized - first),
    }
