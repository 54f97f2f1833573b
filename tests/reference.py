"""The plain twin of the optimizer: textbook loops, one tensor at a time, written from the equations and nothing else."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Closure = Callable[[], Tensor]


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A small network with a frozen tensor and a tensor out of use, and its loss on a fixed batch."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    model[2].bias.requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=dtype)))
    inputs = torch.randn(16, 5, generator=generator, dtype=dtype)
    labels = torch.randint(3, (16,), generator=generator)
    return model, lambda m: nn.functional.cross_entropy(m(inputs), labels)


def closure_of(optimizer: Optimizer, model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> Closure:
    """PyTorch's closure; counts its calls in ``closure.calls``."""

    def closure() -> Tensor:
        closure.calls += 1  # type: ignore[attr-defined]
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    closure.calls = 0  # type: ignore[attr-defined]
    return closure


def counts(optimizer: Any) -> dict[str, float]:
    """The counts in an ARSAM's `stats`, without what these say of the last ascent."""
    return {name: optimizer.stats[name] for name in ("steps", "ascents", "reuses", "passes_per_step")}


def gradients(params: list[Tensor]) -> list[Tensor | None]:
    """Copies of the present gradients."""
    return [None if p.grad is None else p.grad.clone() for p in params]


def sam_gradient(
    params: list[Tensor], closure: Closure, rho: list[float], adaptive: bool, eps: float = 1e-12
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """(loss, g, g_s) by two passes. Leaves g_s in .grad and the weights where they were."""
    loss = closure()
    g = gradients(params)
    total = 0.0
    for p, x in zip(params, g, strict=True):
        if x is not None:
            total += float(((p.detach().abs() * x if adaptive else x) ** 2).sum())
    old = [p.detach().clone() for p in params]
    for p, x, r in zip(params, g, rho, strict=True):
        if x is not None:
            e = r * (p.detach() ** 2 * x if adaptive else x) / (math.sqrt(total) + eps)
            p.data = p.data + e
    closure()
    g_s = gradients(params)
    for p, w in zip(params, old, strict=True):
        p.data = w
    return loss, g, g_s


def norm(xs: list[Tensor]) -> float:
    """L2 norm of all tensors together."""
    return math.sqrt(sum(float((x**2).sum()) for x in xs))


class Twin:
    """ARSAM restated: `due(t, g)` samples, `mix(g, age, g0, g_s0)` reuses what the last ascent saw.

    Args:
        base: updates the weights.
        params: in the order of its groups.
        closure: of the same model.
        due: (step, gradients) -> bool.
        mix: (g, age, g of the last ascent, g_s of the last ascent) -> update, for one-pass steps; lists over tensors.
        rho: per tensor.
        adaptive: ASAM.
        after: called with (step, g, g_s or None) when the step is over.
    """

    def __init__(
        self,
        base: Optimizer,
        params: list[Tensor],
        closure: Closure,
        due: Callable[[int, list[Tensor]], bool],
        mix: Callable[..., list[Tensor]] | None = None,
        rho: float | list[float] = 0.05,
        adaptive: bool = False,
        after: Callable[[int, list[Tensor], list[Tensor] | None], None] | None = None,
    ) -> None:
        self.base, self.params, self.closure = base, params, closure
        self.due, self.mix, self.adaptive, self.after = due, mix, adaptive, after
        self.rho = rho if isinstance(rho, list) else [rho] * len(params)
        self.step_number, self.age = 0, 0
        self.last: tuple[list[Tensor], list[Tensor]] | None = None

    def step(self) -> Tensor:
        """One update; the loss of the first pass."""
        loss = self.closure()
        g = [x for x in gradients(self.params) if x is not None]
        seen = None
        if self.due(self.step_number, g):
            loss, first, second = sam_gradient(self.params, self.closure, self.rho, self.adaptive)
            seen = [x for x in second if x is not None]
            self.last, self.age = ([x for x in first if x is not None], seen), 0
        elif self.last is not None and self.mix is not None:
            self.age += 1
            mixed = iter(self.mix(g, self.age, *self.last))
            for p in self.params:
                if p.grad is not None:
                    p.grad = next(mixed)
        self.base.step()
        if self.after is not None:
            self.after(self.step_number, g, seen)
        self.step_number += 1
        return loss


def budget(passes_per_step: float, total_steps: int, warmup: int = 0) -> set[int]:
    """The steps with an ascent, listed: the warm-up's, then the i-th of N at ceil(i M / N) of the M steps that are left."""
    left = round((passes_per_step - 1) * total_steps) - warmup
    steps = total_steps - warmup
    return set(range(warmup)) | {warmup + math.ceil(Fraction(i * steps, left)) for i in range(left)}


def decayed(beta: float, horizon: int) -> Callable[..., list[Tensor]]:
    """g + beta^j PSF up to the horizon."""

    def mix(g: list[Tensor], age: int, g0: list[Tensor], g_s0: list[Tensor]) -> list[Tensor]:
        if age > horizon:
            return g
        return [x + beta**age * (b - a) for x, a, b in zip(g, g0, g_s0, strict=True)]

    return mix


def looksam(alpha: float) -> Callable[..., list[Tensor]]:
    """g + alpha ||g|| / ||g_v|| g_v."""

    def mix(g: list[Tensor], age: int, g0: list[Tensor], g_s0: list[Tensor]) -> list[Tensor]:
        along = sum(float((a * b).sum()) for a, b in zip(g0, g_s0, strict=True)) / norm(g0) ** 2
        g_v = [b - along * a for a, b in zip(g0, g_s0, strict=True)]
        return [x + alpha * norm(g) / norm(g_v) * v for x, v in zip(g, g_v, strict=True)]

    return mix


class Rule:
    """The adaptive rule restated from its description, with everything recomputed from full histories."""

    def __init__(
        self, window: int, blocks: int, max_rate: float, alpha: tuple[float, float], initial: float, warmup: int,
        monitor: int, log: bool, seed: int,
    ) -> None:  # fmt: skip
        self.window, self.blocks, self.cap, self.alpha = window, blocks, math.floor(max_rate * window), alpha
        self.S, self.warmup, self.monitor, self.log, self.seed = initial, warmup, monitor, log, seed
        self.psf: list[float] = []
        self.ratio: list[float] = []
        self.variances: list[float] = []
        self.ascents: list[int] = []

    def due(self, step: int, _: list[Tensor]) -> bool:
        """Warm-up, or the draw, or the last chance."""
        n = step - self.warmup
        if n < 0:
            return True
        start = step - n % self.window
        done = sum(1 for t in self.ascents if t >= start)
        quota = math.floor(self.S)
        steps_left = self.window - n % self.window
        draw = random.Random(f"{self.seed}:{step}").random()
        return (done < quota and draw < self.S / self.window) or steps_left <= quota - done

    def after(self, step: int, g: list[Tensor], g_s: list[Tensor] | None) -> None:
        """Record an ascent; at the end of a window set S."""
        if g_s is not None:
            self.ascents.append(step)
            a = norm(g[-self.monitor :])
            b = norm([y - x for x, y in zip(g, g_s, strict=True)][-self.monitor :])
            self.psf.append(b)
            self.ratio.append(b / a)
            if len(self.psf) >= self.window:
                recent = torch.tensor(sorted(self.psf[-self.window :]), dtype=torch.float64)
                size = self.window // self.blocks
                self.variances.append(float(recent[: size * self.blocks].view(self.blocks, size).var(dim=1).mean()))
        n = step + 1 - self.warmup
        if n > 0 and n % self.window == 0 and len(self.ratio) >= self.window and len(self.variances) >= self.window:
            trend = self.alpha[0] * self._trend(self.ratio) + self.alpha[1] * self._trend(self.variances)
            self.S = min(max(self.S * (1 + trend), 1.0), self.cap)

    def _trend(self, values: list[float]) -> float:
        x = torch.tensor(values[-self.window :], dtype=torch.float64)
        change = (x[1:] / x[:-1]).log() if self.log else x[1:] / x[:-1] - 1
        return float(change.mean().clamp(-1, 1))
