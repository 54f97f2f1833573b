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

from collections.abc import Generator
from contextlib import contextmanager
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
        size: the L2 norm of the kept vectors, 0-dim.
        norms: (||g||, ||PSF||) of the monitored tensors, 0-dim; None: the sampling rule monitors none.
        seen: (||g||, ||g_s||, ||PSF||) over all tensors, 0-dim; None: g was not kept until the second pass was over.
        scaled: still in units of the scaled loss, if a GradScaler is at work.
        lost: the first pass had gradients, and the second has none.
    """

    kept: dict[Tensor, Tensor]
    size: Tensor | None = None
    norms: tuple[Tensor, Tensor] | None = None
    seen: tuple[Tensor, Tensor, Tensor] | None = None
    scaled: bool = True
    lost: bool = False


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


@contextmanager
def gradients_aside(parameters: list[Tensor]) -> Generator[None]:
    """Inside, these parameters start without a gradient; afterwards they have the one that they had before.

    They are those of the same model that another optimizer steps: the second pass must not add to their gradient.
    """
    before = [None if p.grad is None else p.grad.clone() if p.grad._is_view() else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient


@torch.no_grad()
def move_(
    groups: list[tuple[dict[str, Any], float]],
    gradients: dict[Tensor, Tensor],
    eps: float,
    saved: dict[Tensor, Tensor],
    memory: dict[Tensor, Tensor],
) -> None:
    """w <- w + e for the weights that have a gradient.

    Args:
        groups: (parameter group, rho); one with rho 0 stays, and is not in the norm. Where the base maximizes L, the worst
            case is a smaller one: w - e.
        gradients: parameter -> g.
        eps: added to the global norm.
        saved: parameter -> a copy of w, put here before w moves, so that an error half-way loses nothing.
        memory: parameter -> a tensor of its shape that is no longer of use, and becomes the copy.
    """
    scaled: list[tuple[float, bool, list[Tensor], list[Tensor]]] = []
    for group, radius in groups:
        weights = [p for p in group["params"] if p in gradients]
        if weights and radius > 0:
            rho, adaptive = -radius if group.get("maximize") else radius, group["sam_adaptive"]
            own = [gradients[p] for p in weights]
            scaled.append((rho, adaptive, weights, functional.scaled_gradients(weights, own, adaptive)))
    norm = functional.global_norm([x for _, _, _, xs in scaled for x in xs])
    for rho, adaptive, weights, xs in scaled:
        # On a CPU one by one: a tensor is moved while the copy still has it in the cache.
        count = 1 if weights[0].device.type == "cpu" else len(weights)
        scale = rho / (norm + eps)
        for i in range(0, len(weights), count):
            some = slice(i, i + count)
            saved.update(_copies(weights[some], memory))
            functional.perturb_(weights[some], xs[some], adaptive, scale)


def _copies(weights: list[Tensor], memory: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """parameter -> a copy, in memory that is there already where it fits: fresh pages cost more than the copy."""
    fits = [p for p in weights if p in memory and memory[p].dtype == p.dtype and memory[p].stride() == p.stride()]
    copies = {p: memory.pop(p) for p in fits}
    if copies:
        functional.copy_(list(copies.values()), fits)
    return {p: copies[p] if p in copies else p.clone() for p in weights}


@torch.no_grad()
def restore_(saved: dict[Tensor, Tensor]) -> None:
    """w <- its copy, bitwise and in the storage of w."""
    if saved:
        functional.copy_(list(saved), list(saved.values()))


@torch.no_grad()
def keep(gradients: dict[Tensor, Tensor], reuse: Reuse, monitor: int) -> Ascent:
    """The vectors to reuse and the norms, from g and the g_s that lies in ``.grad``.

    Args:
        gradients: parameter -> g; its memory becomes that of the kept vectors.
        reuse: says what is kept. Of what is not finite, nothing is.
        monitor: norms are wanted over the last so many tensors; 0: none.
    """
    both = [(p, g, p.grad) for p, g in gradients.items() if p.grad is not None]
    if not both:
        return Ascent({}, lost=bool(gradients))
    norms = None
    if monitor:
        last = both[-monitor:]
        norms = functional.global_norm([g for _, g, _ in last]), functional.global_norm([g_s - g for _, g, g_s in last])
    if reuse.horizon == 0:
        return Ascent({}, norms=norms)
    kept = [g.float() if g.dtype in functional.HALF else g for _, g, _ in both]
    sam = [g_s for _, _, g_s in both]
    first, second = functional.global_norm(kept), functional.global_norm(sam)
    psf = None if reuse.keeps_psf else functional.distance(kept, sam)
    reuse.keep_(kept, sam)
    size = functional.global_norm(kept)
    seen = first, second, size if psf is None else psf
    kept, size = functional.nothing_if_(kept, size, ~size.isfinite())
    return Ascent({p: x for (p, _, _), x in zip(both, kept, strict=False)}, size, norms, seen)


@torch.no_grad()
def leave_outlier_(ascent: Ascent, growth: float | None, before: Tensor | None) -> Tensor | None:
    """Keep nothing of an ascent whose vector is more than `growth` times as long as that of the ascent before.

    Args:
        ascent: in units of the loss.
        growth: > 1; None: whatever the length.
        before: length of the vector of the ascent before, 0-dim; None: there was none.

    Returns:
        The length to hold the next one against: that of this vector, kept or not, if it is a number above 0.
    """
    size = ascent.size
    if growth is None or size is None:
        return before
    if before is None:
        return size
    kept, ascent.size = functional.nothing_if_(list(ascent.kept.values()), size, (size > growth * before) & (before > 0))
    ascent.kept = dict(zip(ascent.kept, kept, strict=False))
    return torch.where(size > 0, size, before)
