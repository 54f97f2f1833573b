"""What an output of a layer is a product with: the columns u of its input, at a few places.

# G groups of a layer, d inputs of an output (channels times kernel), n columns; y = w u + bias for w [G, o, d]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
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

    def of(x: Tensor, number: int) -> Tensor:
        def choose(count: int) -> Tensor:  # the same for every input
            order = torch.randperm(count, generator=torch.Generator().manual_seed(number))
            return (order[:places] if count > places else torch.arange(count)).to(x.device)

        return _of_one(layer, x, choose).reshape(groups, d, -1)

    return [torch.cat([of(part, number) for number, part in enumerate(x.split(1))], 2) for x in inputs]


def _of_one(layer: QuantLayer, x: Tensor, choose: Callable[[int], Tensor]) -> Tensor:
    """The columns of an input [1, ...], [G d, n] or [1, G d, n]."""
    inner: Any = layer.layer
    if isinstance(inner, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[choose(len(rows))].mT
    if isinstance(inner, Conv2dSame):
        same: Any = inner
        return _patches(inner, pad_same(x, same.kernel_size, same.stride, same.dilation), choose)
    if type(inner).forward is nn.Conv2d.forward and inner.padding_mode == "zeros" and not isinstance(inner.padding, str):
        (above, left) = inner.padding
        return _patches(inner, F.pad(x, (left, left, above, above)), choose)
    # A convolution whose kernels are the unit vectors gives the columns, with the layer's own padding and stride.
    d = inner.weight[0].numel()
    unit = torch.eye(d, device=x.device, dtype=x.dtype).view(d, *inner.weight.shape[1:])
    vars(inner)["bias"] = None  # an instance attribute goes before a parameter
    try:
        u = layer.call(x, unit.repeat(inner.groups, *[1] * (x.dim() - 1))).flatten(2)
    finally:
        del vars(inner)["bias"]
    return u[..., choose(u.shape[-1])]


def _patches(conv: Any, x: Tensor, choose: Callable[[int], Tensor]) -> Tensor:
    """What a two-dimensional kernel covers of a padded input [1, c, h, w], at some places."""
    (kh, kw), (sh, sw), (dh, dw), (h, w) = conv.kernel_size, conv.stride, conv.dilation, x.shape[2:]
    rows, across = (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1
    places = choose(rows * across)
    corners = places // across * sh * w + places % across * sw
    taps = (torch.arange(kh)[:, None] * dh * w + torch.arange(kw) * dw).flatten().to(x.device)
    return x.flatten(2)[0][:, taps[:, None] + corners].flatten(0, 1)
