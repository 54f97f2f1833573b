"""What an output of a layer is a product with: the columns u of its input, at a few places.

# G groups of a layer, d inputs of an output (channels times kernel), n columns; y = w u + bias for w [G, o, d]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.quant.prepare import QuantLayer

PLACES = 64  # of an input that are looked at, at most
_MOST = 1 << 24  # numbers in the columns of a layer, about


def columns(layer: QuantLayer, *inputs: Tensor) -> list[Tensor]:
    """u [G, d, n] of each input [B, ...], at the same places, input after input of the batch.

    Args:
        layer: a convolution or a linear layer.
        inputs: of one shape.
    """
    inner: Any = layer.layer
    groups, d = getattr(inner, "groups", 1), inner.weight[0].numel()
    places = max(2, min(PLACES, _MOST // (len(inputs[0]) * groups * d)))
    generator = torch.Generator().manual_seed(0)
    chosen: list[list[Tensor]] = [[] for _ in inputs]
    for parts in zip(*(x.split(1) for x in inputs), strict=True):
        us = [_of_one(layer, x).reshape(groups, d, -1) for x in parts]
        if us[0].shape[-1] > places:
            few = torch.randperm(us[0].shape[-1], generator=generator)[:places].to(us[0].device)
            us = [u[..., few] for u in us]
        for found, u in zip(chosen, us, strict=True):
            found.append(u)
    return [torch.cat(found, 2) for found in chosen]


def _of_one(layer: QuantLayer, x: Tensor) -> Tensor:
    """All columns of an input [1, ...], [1, G d, ...]."""
    inner: Any = layer.layer
    if isinstance(inner, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).mT
    if type(inner).forward is nn.Conv2d.forward and inner.padding_mode == "zeros" and not isinstance(inner.padding, str):
        return F.unfold(x, inner.kernel_size, inner.dilation, inner.padding, inner.stride)
    # A convolution whose kernels are the unit vectors gives the columns, with the layer's own padding and stride.
    d = inner.weight[0].numel()
    unit = torch.eye(d, device=x.device, dtype=x.dtype).view(d, *inner.weight.shape[1:])
    vars(inner)["bias"] = None  # an instance attribute goes before a parameter
    try:
        return layer.call(x, unit.repeat(inner.groups, *[1] * (x.dim() - 1))).flatten(2)
    finally:
        del vars(inner)["bias"]
