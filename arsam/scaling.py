"""Loss scales: a step under torch.amp.GradScaler, whose gradients are those of the loss times a scale.

The direction of g is all that e needs, so both passes run on the scaled loss. What is kept of an ascent is brought to the
units of the loss when the gradients are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arsam.ascent import Ascent

CLOSURE_UNDER_SCALER = (
    "a GradScaler steps without a closure: use `arsam.scaled_step(optimizer, closure, scaler)`, or run the second pass"
    " inside `with optimizer.perturb():` before `scaler.step(optimizer)`"
)
_SCALE_UNKNOWN = (
    "the gradients were unscaled after the second pass, by a scale that the kept vector does not know: enter"
    " `with optimizer.perturb(scaler):`"
)
NORM_SCALED = (
    "sampling.GradientNorm reads the gradient before it is unscaled, so its decisions would depend on the loss scale:"
    " use `arsam.scaled_step(optimizer, closure, scaler)`"
)


@torch.no_grad()
def unscale_(ascent: Ascent, inverse: float | Tensor) -> None:
    """Bring what an ascent left from units of the scaled loss to those of the loss: times 1 / scale."""
    for x in ascent.kept.values():
        x.mul_(inverse.to(x.device) if isinstance(inverse, Tensor) else inverse)
    if ascent.size is not None:
        ascent.size = ascent.size * inverse
    if ascent.norms is not None:
        ascent.norms = ascent.norms[0] * inverse, ascent.norms[1] * inverse
    ascent.scaled = False


@torch.no_grad()
def unscale_step(parameters: list[Tensor], ascent: Ascent | None, found_inf: Tensor, grad_scale: Tensor | None) -> bool:
    """Bring the gradients and the pending ascent to the units of the loss; False if the step is to be left out.

    Args:
        parameters: whose ``.grad`` the step reads.
        ascent: pending from a second pass, or None.
        found_inf: from the scaler, above 0 where a gradient is inf or NaN.
        grad_scale: from the scaler; None: the loop has unscaled the gradients already.

    Raises:
        RuntimeError: the loop has unscaled the gradients, and the ascent is still scaled.
    """
    if ascent is not None and ascent.scaled and grad_scale is None:
        raise RuntimeError(_SCALE_UNKNOWN)
    if float(found_inf):
        return False
    if grad_scale is not None:
        inverse = grad_scale.double().reciprocal().float()  # on its device: nobody waits
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(inverse.to(p.grad.device))
        if ascent is not None and ascent.scaled:
            unscale_(ascent, inverse)
    return True


def bring_to_units(optimizer: Any, closure: Any, found_inf: Tensor) -> bool:
    """A step of an ARSAM by ``GradScaler.step``: all in the units of the loss, or False where it is to be left out.

    Raises:
        RuntimeError: there is a closure, or a scale is not known.
    """
    if closure is not None:
        raise RuntimeError(CLOSURE_UNDER_SCALER)
    norm_read, optimizer._norm_read = optimizer._norm_read, False
    if norm_read:
        raise RuntimeError(NORM_SCALED)
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if unscale_step(optimizer._parameters(), optimizer._pending, found_inf, grad_scale):
        return True
    optimizer._pending, optimizer._observed = None, False
    return False
