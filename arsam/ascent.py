"""One ascent, as functions of tensors: take the gradient, move the weights to w + e, put them back, keep what is reused.

Nothing here knows of an optimizer's state. The order is that of `arsam.ARSAM.perturb`:

    g <- take_gradients          the gradient of the first pass, out of the way of the second
    w <- w + e, move_            e = rho g / (||g||_2 + eps), over all parameter groups at once
    (the second pass: g_s)
    w <- restore_                the same bits, in the same storage
    keep                         the vector that one-pass steps reuse, such as PSF = g_s - g
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arsam import functional
from arsam.reuse import Reuse


@dataclass
class Ascent:
    """What a second pass leaves for the step that follows.

    Attributes:
        kept: parameter -> the vector that one-pass steps reuse, at least float32.
        norms: (||g||, ||PSF||) of the monitored tensors, 0-dim; None: the sampling rule monitors none.
        scaled: still in units of the scaled loss, if a GradScaler is at work.
    """

    kept: dict[Tensor, Tensor]
    norms: tuple[Tensor, Tensor] | None
    scaled: bool = True


def take_gradients(parameters: list[Tensor]) -> dict[Tensor, Tensor]:
    """parameter -> g, for the parameters that have a gradient; their ``.grad`` is None afterwards.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    gradients = {p: _own_gradient(p) for p in parameters if p.grad is not None}
    for p in gradients:
        p.grad = None
    return gradients


def _own_gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, as memory that the second backward pass will not write to."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise RuntimeError(f"ARSAM needs dense gradients, got layout {gradient.layout}; build the embedding with sparse=False")
    # A view belongs to somebody else: DDP with gradient_as_bucket_view would overwrite it in the second pass.
    return gradient.detach().clone() if gradient._is_view() else gradient.detach()


@torch.no_grad()
def move_(groups: list[dict[str, Any]], gradients: dict[Tensor, Tensor], eps: float, saved: dict[Tensor, Tensor]) -> None:
    """w <- w + e for the weights that have a gradient.

    Args:
        groups: parameter groups with "rho" and "adaptive".
        gradients: parameter -> g.
        eps: added to the global norm.
        saved: parameter -> a copy of w, put here before w moves, so that an error half-way loses nothing.
    """
    scaled: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
    for group in groups:
        weights = [p for p in group["params"] if p in gradients]
        if weights:
            own = [gradients[p] for p in weights]
            scaled.append((group, weights, functional.scaled_gradients(weights, own, group["adaptive"])))
    norm = functional.global_norm([x for _, _, xs in scaled for x in xs])
    for group, weights, xs in scaled:
        # On a CPU one by one: a tensor is moved while the copy still has it in the cache.
        count = 1 if weights[0].device.type == "cpu" else len(weights)
        scale = group["rho"] / (norm + eps)
        for i in range(0, len(weights), count):
            some = slice(i, i + count)
            saved.update({p: p.clone() for p in weights[some]})
            functional.perturb_(weights[some], xs[some], group["adaptive"], scale)


@torch.no_grad()
def restore_(saved: dict[Tensor, Tensor]) -> None:
    """w <- its copy, bitwise and in the storage of w."""
    if saved:
        functional.copy_(list(saved), list(saved.values()))


@torch.no_grad()
def keep(gradients: dict[Tensor, Tensor], reuse: Reuse, monitor: int) -> Ascent:
    """The vectors to reuse and the monitored norms, from g and the g_s that lies in ``.grad``.

    Args:
        gradients: parameter -> g; its memory becomes that of the kept vectors.
        reuse: says what is kept.
        monitor: norms are wanted over the last so many tensors; 0: none.
    """
    both = [(p, g, p.grad) for p, g in gradients.items() if p.grad is not None]
    norms = None
    if monitor:
        last = both[-monitor:]
        psf = [g_s - g for _, g, g_s in last]
        norms = functional.global_norm([g for _, g, _ in last]), functional.global_norm(psf)
    if reuse.horizon == 0 or not both:
        return Ascent({}, norms)
    kept = [g.float() if g.dtype in functional.HALF else g for _, g, _ in both]
    reuse.keep_(kept, [g_s for _, _, g_s in both])
    return Ascent({p: x for (p, _, _), x in zip(both, kept, strict=True)}, norms)
