"""The mathematics of a sharpness-aware step: pure functions on lists of tensors.

Nothing here knows of optimizers, groups or schedules. A name that ends in ``_`` works in place. Scalars that come from
data (norms, coefficients) stay 0-dim tensors on the device, so that no function makes the host wait for an accelerator.

Notation: w weights, g = grad L(w), e the perturbation, g_s = grad L(w + e), PSF = g_s - g.

References:
    SAM, arXiv 2010.01412, eq. 2; ASAM, arXiv 2102.11600, eq. 7; ARSAM, arXiv 2510.03763; LookSAM, arXiv 2203.02714, eq. 6.
"""

# torch's foreach functions are public by use, underscore and all
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """One L2 norm over all tensors, ||x||_2 = sqrt(sum_i ||x_i||_2^2).

    Args:
        tensors: any shapes, dtypes and devices; may be empty.

    Returns:
        0-dim tensor on the first tensor's device. Half-precision tensors are summed in float32, since their squares
        overflow or vanish.
    """
    if not tensors:
        return torch.zeros(())
    full = [x for x in tensors if x.dtype not in HALF]
    half = [x for x in tensors if x.dtype in HALF]
    norms = list(torch._foreach_norm(full)) if full else []
    norms += torch._foreach_norm(half, 2, torch.float32) if half else []
    device = tensors[0].device
    return _whole(torch.stack([n.to(device) for n in norms]).square().sum()).sqrt()


def inner_product(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """<x, y> over all pairs, in the dtype of x, 0-dim on the first tensor's device; of complex numbers Re <x, y>."""
    pairs = [(_real(x), _real(y.to(x.dtype))) for x, y in zip(xs, ys, strict=True)]
    products = [(x * y).sum() for x, y in pairs]
    return _whole(torch.stack([p.to(products[0].device) for p in products]).sum())


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def distance(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """||y - x||_2 over all pairs, without the memory of a whole difference."""
    device = xs[0].device
    squares = [_whole(torch.linalg.vector_norm(y - x)).square().to(device) for x, y in zip(xs, ys, strict=True)]
    return torch.stack(squares).sum().sqrt()


def nothing_if_(xs: list[Tensor], norm: Tensor, bad: Tensor) -> tuple[list[Tensor], Tensor]:
    """The tensors and their norm, or nothing where `bad` is true: no tensors on the CPU, elsewhere zeros, without a wait."""
    if bad.device.type == "cpu":
        (spoilt,) = cast("list[bool]", bad.reshape(1).tolist())  # pyright: ignore[reportUnknownMemberType]
        return ([], torch.zeros_like(norm)) if spoilt else (xs, norm)
    for x in xs:
        shard = _shard(x)
        shard.masked_fill_(bad.to(shard.device), 0)
    return xs, norm.masked_fill(bad, 0)


def _whole(scalar: Any) -> Tensor:
    """The sum over all shards, where the tensors are sharded (DTensor); a plain tensor is whole."""
    return scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar


def copy_(xs: list[Tensor], ys: list[Tensor]) -> None:
    """x_i <- y_i, in the storage of x_i; shard by shard where the tensors are sharded alike."""
    # DTensor has no rule for this function
    torch._foreach_copy_([_shard(x) for x in xs], [_shard(y) for y in ys])


def _shard(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def add_scaled_(xs: list[Tensor], ys: list[Tensor], scale: Tensor) -> None:
    """x_i <- x_i + scale * y_i with a 0-dim tensor as scale.

    The scale stays on its device, which saves a wait; on the CPU no copy of ys is made either.
    """
    if not xs:
        return
    if scale.device.type == "cpu" and all(x.device.type == "cpu" for x in xs):
        torch._foreach_addcmul_(xs, ys, [scale] * len(xs))
    else:
        torch._foreach_add_(xs, _scaled(ys, scale))


def _scaled(xs: list[Tensor], scale: Tensor) -> list[Tensor]:
    devices = {x.device for x in xs}
    if len(devices) == 1:
        return list(torch._foreach_mul(xs, scale.to(devices.pop())))
    return [x * scale.to(x.device) for x in xs]


def scaled_gradients(weights: list[Tensor], gradients: list[Tensor], adaptive: bool) -> list[Tensor]:
    """t * g, the gradient in the geometry of the perturbation: t = 1 for SAM, t = |w| for ASAM."""
    return list(torch._foreach_mul(torch._foreach_abs(weights), gradients)) if adaptive else list(gradients)


def perturb_(weights: list[Tensor], scaled: list[Tensor], adaptive: bool, scale: Tensor) -> None:
    """w <- w + e, e = scale * t * (t g), scale = rho / (||t g||_2 + eps).

    Args:
        weights: moved in place.
        scaled: t g, as `scaled_gradients` returned it for the same weights.
        adaptive: False t = 1 (SAM), True t = |w| (ASAM: e = rho w^2 g / || |w| g ||_2).
        scale: 0-dim; the norm in it is the global one, over all parameter groups.
    """
    add_scaled_(weights, scaled_gradients(weights, scaled, adaptive), scale)


def psf_(gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
    """g <- PSF = g_s - g: the memory of g becomes the PSF's."""
    pairs = list(zip(gradients, sam_gradients, strict=True))
    if all(type(g) is Tensor and g.device.type == "cpu" and g.dtype == g_s.dtype for g, g_s in pairs):
        for g, g_s in pairs:
            torch.sub(g_s, g, out=g)  # once through the memory; the foreach functions have no such form
    else:
        torch._foreach_neg_(gradients)
        torch._foreach_add_(gradients, sam_gradients)


def orthogonal_(gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
    """g <- g_v = g_s - (<g_s, g> / ||g||^2) g, the part of g_s orthogonal to g. A zero gradient takes nothing away."""
    square = inner_product(gradients, gradients)
    along = inner_product(gradients, sam_gradients)
    coefficient = torch.where(square > 0, along / square, torch.zeros_like(square))
    projected = _scaled(gradients, -coefficient)
    copy_(gradients, sam_gradients)
    torch._foreach_add_(gradients, projected)
