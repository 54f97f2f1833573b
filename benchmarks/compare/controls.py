"""Controls: rules that keep something else in place of the PSF, to see whether its direction is what helps."""

from __future__ import annotations

import torch
from torch import Tensor

from arsam.reuse import Decayed


class Reversed(Decayed):
    """The kept PSF with its sign flipped. If it does as well as the PSF, the direction is not what helps."""

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- -PSF."""
        super().keep_(gradients, sam_gradients)
        for x in gradients:
            x.neg_()


class RandomVector(Decayed):
    """Noise with the PSF's norm, tensor by tensor. If it does as well as the PSF, any noise of the size does."""

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- ||PSF|| n / ||n||, n of independent normal entries."""
        super().keep_(gradients, sam_gradients)
        for x in gradients:
            noise = torch.randn_like(x)
            x.copy_(noise * (x.norm() / noise.norm()))


class PermutedVector(Decayed):
    """The PSF with its entries in another order, tensor by tensor: its sizes without their places."""

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- PSF permuted."""
        super().keep_(gradients, sam_gradients)
        for x in gradients:
            x.copy_(x.flatten()[torch.randperm(x.numel(), device=x.device)].view_as(x))


class GradientNoise(Decayed):
    """The difference of the gradients of two ascents, with the PSF's norm, tensor by tensor; at first nothing."""

    _last: list[Tensor] | None = None

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- ||PSF|| (g - g_before) / ||g - g_before||."""
        last, self._last = self._last, [x.clone() for x in gradients]
        super().keep_(gradients, sam_gradients)
        for x, now, before in zip(gradients, self._last, last or self._last, strict=True):
            noise = now - before
            x.copy_(noise * (x.norm() / noise.norm().clamp(min=1e-30)))


class Rounded(Decayed):
    """The PSF as it would be kept in bfloat16, with half the memory."""

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- PSF, rounded."""
        super().keep_(gradients, sam_gradients)
        for x in gradients:
            x.copy_(x.bfloat16())
