"""Fake quantization with learned step sizes: LSQ, and LSQ+ for activations that are not symmetric.

Notation: x input, s step size (the parameter ``scale``), b its offset, z = -b / s the zero point, v = x / s, q the integer
code, y = s q the output, [n, p] the codes' range, N elements that share a step size, clip(v) = min(max(v, n), p).

References:
    LSQ, arXiv 1902.08153, eq. 1-5; LSQ+, arXiv 2004.09576, eq. 2-5; perturbation behind the quantizer, arXiv 2111.12273.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

METHODS = ("lsq", "minmax", "percentile", "mse")
_SMALLEST = 1e-12  # step size in place of 0, which would divide
_SAMPLE = 1 << 16  # elements per step size that the searches look at
_BLOCK = 1 << 18  # elements that the backward pass works on at a time on the CPU, a megabyte

# "g where n < v < p, else 0" in one fused pass and with the strict bounds of the paper; comparisons and a where take five
_gate: Callable[[Tensor, Tensor, int, int], Tensor] = torch.ops.aten.hardtanh_backward


def _wide(x: Tensor) -> Tensor:
    """At least float32: in bfloat16 neighbouring codes of 8 bits are the same number."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _step(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The step size in use, |scale|: positive in training and in evaluation alike, whatever sign training has led to."""
    return scale.to(dtype).abs().clamp_min(_SMALLEST)


def _zero(offset: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The zero point, a whole number within the codes, so that x = 0 (a convolution's padding) has a code of its own."""
    return (offset.to(step.dtype) / -step).round_().clamp_(low, high)


class _LSQ(Function):
    """LSQ: y = s clip(round(x / s)), straight through.

    dy/dx = 1 where n < v < p, else 0
    dy/ds = round(v) - v where n < v < p, n below, p above, times 1 / sqrt(N p)

    The input is all that is kept: what produced it, or the layer before, mostly keeps it anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.range = low, high
        wide = _wide(x)
        step = _step(scale, wide.dtype)
        return torch.div(wide, step).round_().clamp_(low, high).mul_(step).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale = ctx.saved_tensors
        return *_gradients(gradient, x, scale, None, *ctx.range), None, None


class _LSQPlus(Function):
    """LSQ+: y = s (clip(round(x / s) + z) - z), straight through, z included.

    dy/dx, dy/ds as in LSQ, with v = x / s + z
    dy/db = 0 where n < v < p, else 1; times 1 / sqrt(N p) too
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.range = low, high
        wide = _wide(x)
        step = _step(scale, wide.dtype)
        zero = _zero(offset, step, low, high)
        return torch.div(wide, step).round_().add_(zero).clamp_(low, high).sub_(zero).mul_(step).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale, offset = ctx.saved_tensors
        low, high = ctx.range
        zero = _zero(offset, _step(scale, _wide(x).dtype), low, high)
        of_x, of_scale = _gradients(gradient, x, scale, zero, low, high)
        outside = _wide(gradient) - _wide(of_x)
        of_offset = outside.sum_to_size(offset.shape) * (x.numel() // scale.numel() * high) ** -0.5
        return of_x, of_scale, of_offset.to(offset.dtype), None, None


def _gradients(gradient: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale, which has the shape of what it is broadcast from."""
    step = _step(scale, _wide(x).dtype)
    of_x, of_step = torch.empty_like(x), torch.zeros_like(step)
    # The temporaries of a large weight cost the CPU more than its arithmetic does, unless they stay in the cache.
    rows = max(1, _BLOCK * len(x) // x.numel()) if x.device.type == "cpu" else len(x)
    per_row = step.dim() > 0 and len(step) > 1
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        own = block if per_row else ...
        g, v = _wide(gradient[block]), _wide(x[block]) / step[own]
        code = v.round()
        if zero is not None:
            code.add_(zero[own])
            v.add_(zero[own])
        of_x[block] = _gate(g, v, low, high)
        code.clamp_(low, high).sub_(_gate(v, v, low, high)).mul_(g)  # round(v) - v inside, the bound outside
        of_step[own].add_(code.sum_to_size(step[own].shape))
    of_step *= (x.numel() // scale.numel() * high) ** -0.5
    return of_x, torch.where(scale < 0, -of_step, of_step).to(scale.dtype)


class Quantizer(nn.Module):
    """A fake quantizer of one tensor: weights or activations, per tensor or per channel, 2 to 8 bits.

    Codes are 0 ... 2^B - 1 unsigned and -2^(B-1) ... 2^(B-1) - 1 signed; an asymmetric quantizer has unsigned codes and a
    learned offset. Step size, sign and offset are set by the first batch, unless `initialise` (calibration) or a loaded
    state_dict came before. Calibrate before the model is copied (averages of weights, replicas on other devices).

    ``perturbation`` is None or a tensor like the input that is added to the output: a sharpness-aware step that moves the
    quantized values themselves, y + e, instead of latent ones that rounding puts back (arXiv 2111.12273). Its gradient is
    the output's. It belongs to whoever sets it, is no parameter and not in the state_dict; set it back to None.

    Args:
        bits: B, 2 to 8.
        signed: codes on both sides of 0; None decides by the sign of the smallest value at initialisation.
        channels: number of step sizes along ``axis``; None is one for the tensor.
        axis: of the channels.
        asymmetric: LSQ+.

    Attributes:
        scale: parameter, [] or [channels]; the step size in use is `step`, its absolute value.
        offset: parameter of the same shape; only if asymmetric.
        enabled: False passes the input through (and adds the perturbation).
        initialised: is there a step size? In the state_dict, as is the sign.

    References:
        LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576.
    """

    scale: nn.Parameter
    offset: nn.Parameter | None

    def __init__(
        self, bits: int, *, signed: bool | None, channels: int | None = None, axis: int = 0, asymmetric: bool = False
    ) -> None:
        super().__init__()
        if bits not in range(2, 9):
            raise ValueError(f"bits must be a whole number from 2 to 8, got {bits}; leave the layer float for more")
        if asymmetric and signed:
            raise ValueError("signed=True and asymmetric=True: an asymmetric quantizer has unsigned codes; drop one of the two")
        shape = () if channels is None else (channels,)
        self.bits, self.channels, self.axis, self.asymmetric = bits, channels, axis, asymmetric
        self.decides_sign = signed is None and not asymmetric
        self.signed = bool(signed)
        self.enabled, self.initialised = True, False
        self.perturbation: Tensor | None = None
        self.scale = nn.Parameter(torch.ones(shape))
        self.register_parameter("offset", nn.Parameter(torch.zeros(shape)) if asymmetric else None)

    @property
    def low(self) -> int:
        """Smallest code, n."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest code, p."""
        return 2 ** (self.bits - self.signed) - 1

    @property
    def step(self) -> Tensor:
        """The step size in use, |scale|, [] or [channels], without gradient."""
        return _step(self.scale.detach(), _wide(self.scale).dtype)

    @property
    def zero_point(self) -> Tensor:
        """The code of x = 0, a whole number in floating point, [] or [channels]."""
        step = self.step
        return torch.zeros_like(step) if self.offset is None else _zero(self.offset.detach(), step, self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized input, in its dtype."""
        y = x
        if self.enabled:
            if not self.initialised:
                self.initialise(x)
            scale = self._along(self.scale, x)
            if self.offset is None:
                y = _LSQ.apply(x, scale, self.low, self.high)
            else:
                y = _LSQPlus.apply(x, scale, self._along(self.offset, x), self.low, self.high)
        return y if self.perturbation is None else y + self.perturbation

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integer codes, int32 and shaped like x; y = step (codes - zero_point)."""
        wide = _wide(x)
        zero = self._along(self.zero_point, x)
        return (wide / self._along(self.step, x)).round_().add_(zero).clamp_(self.low, self.high).int()

    def _along(self, parameter: Tensor, x: Tensor) -> Tensor:
        if self.channels is None:
            return parameter
        shape = [1] * x.dim()
        shape[self.axis] = self.channels
        return parameter.view(shape)

    @torch.no_grad()
    def initialise(self, x: Tensor, method: str | None = None, percentile: float = 99.99) -> None:
        """Set sign, step size and offset from values.

        Args:
            x: the tensor, or for one step size any sample of the values.
            method: "lsq" 2 mean|x| / sqrt(p); "minmax" the largest codes are the extreme values; "percentile" they are the
                percentiles; "mse" the fraction of the extremes that gives the least mean (y - x)^2. None is LSQ's own up to
                4 bits, where it is meant to be trained, and "mse" from 5, where it is several times too wide.
            percentile: 50 to 100, for that method.

        Raises:
            ValueError: method unknown or not for this quantizer; x is empty or not finite.
        """
        if method is None:
            method = "lsq" if self.bits <= 4 and not self.asymmetric else "mse"
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "lsq" and self.asymmetric:
            raise ValueError('method "lsq" knows no offset; use "mse", "minmax" or "percentile" with asymmetric=True')
        if not 50 <= percentile <= 100:
            raise ValueError(f"percentile must be from 50 to 100, got {percentile}")
        if x.numel() == 0 or not x.isfinite().all():
            raise ValueError(
                f"a quantizer cannot be initialised from values that are {'not finite' if x.numel() else 'missing'}"
            )
        values = _wide(x).reshape(1, -1) if self.channels is None else _wide(x).movedim(self.axis, 0).flatten(1)
        if self.decides_sign:
            self.signed = bool(values.min() < 0)
        if method == "lsq":
            step = values.abs().mean(1) * (2 / self.high**0.5)
            offset = torch.zeros_like(step)
        else:
            tail = percentile if method == "percentile" else 100.0
            bottom, top = _percentile(-values, tail).neg_().clamp_max_(0), _percentile(values, tail).clamp_min_(0)
            if method == "mse":
                bottom, top = self._least_error(values, bottom, top)
            step, offset = self._from_range(bottom, top)
        # A tensor of zeros has no step size of its own: its neighbours' is the best guess, and 1 the last.
        largest = step.max()
        step = torch.where(step > _SMALLEST, step, largest if largest > _SMALLEST else torch.ones_like(largest))
        self.scale.copy_(step.view_as(self.scale))
        if self.offset is not None:
            self.offset.copy_(offset.view_as(self.offset))
        self.initialised = True

    def _from_range(self, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Step size and offset at which the largest codes reach bottom <= 0 <= top."""
        if self.asymmetric:
            return (top - bottom) / self.high, bottom
        step = top / self.high
        return (torch.maximum(step, bottom / self.low) if self.signed else step), torch.zeros_like(step)

    def _least_error(self, values: Tensor, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Shrink the range by the fraction of least squared error: 20 fractions from 1 to 0.01, then 8 around the best."""
        if values.shape[1] > _SAMPLE:
            chosen = torch.randint(values.shape[1], (_SAMPLE,), generator=torch.Generator().manual_seed(0))
            values = values[:, chosen.to(values.device)]
        best, least = torch.ones_like(top), torch.full_like(top, torch.inf)
        for factors in (torch.logspace(0, -2, 20), torch.logspace(-0.08, 0.08, 8)):
            centre = best
            for factor in factors.tolist():
                fraction = centre * factor
                if self.bits == 8:  # beyond the extremes nothing is won, and what clips there (ReLU6) could not be left out
                    fraction = fraction.clamp_max(1)
                step, offset = (t.unsqueeze(1) for t in self._from_range(bottom * fraction, top * fraction))
                step = step.clamp_min(_SMALLEST)
                zero = _zero(offset, step, self.low, self.high)
                y = values.div(step).round_().add_(zero).clamp_(self.low, self.high).sub_(zero).mul_(step)
                error = y.sub_(values).square_().sum(1)
                better = error < least
                best, least = torch.where(better, fraction, best), torch.where(better, error, least)
        return bottom * best, top * best

    def get_extra_state(self) -> Tensor:
        """Whether initialised, and the sign: a tensor, since checkpoints hold tensors."""
        return torch.tensor([self.initialised, self.signed])

    def set_extra_state(self, state: Tensor) -> None:
        """Take the state over."""
        self.initialised, self.signed = (bool(flag) for flag in state.tolist())

    def extra_repr(self) -> str:
        """Bits, range and whether there is a step size yet."""
        kind = "asymmetric" if self.asymmetric else "signed" if self.signed else "unsigned"
        axis = "" if self.channels is None else f", {self.channels} channels"
        return f"{self.bits} bits, {kind}{axis}" + ("" if self.initialised else ", not initialised")


def _percentile(values: Tensor, percentile: float) -> Tensor:
    """The smallest value of each row that is not below ``percentile`` % of its row."""
    if percentile == 100:
        return values.amax(1)
    return values.kthvalue(max(1, -int(-values.shape[1] * percentile // 100)), dim=1).values
