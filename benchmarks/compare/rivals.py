"""Optimizers that are not ours, each a small class with the contract that all are stepped by: `step(closure) -> loss`.

# w weights, m momentum of the base optimizer, g' the gradient that the step before used
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from arsam import ARSAM, functional
from tasks.errors import UserError

Closure = Callable[[], Tensor]


class Rival:
    """Around a base optimizer, what the training loop asks of one.

    Args:
        base: the optimizer that updates the weights.
        model: whose weights they are.
    """

    def __init__(self, base: Optimizer, model: nn.Module) -> None:
        self.base = base
        self.model = model

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's."""
        return self.base.param_groups

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        return self.base.state

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.base.zero_grad()

    def step(self, closure: Closure) -> Tensor:
        """Update the weights once, and return the loss at the weights before."""
        return self.base.step(closure)  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, as the loop does where a NaN sends it back."""
        self.base.load_state_dict(state)


class HalfBatch(ARSAM):
    """ARSAM whose second pass sees a part of the batch, which the task reads from the model.

    The loop runs both passes by one closure, so that the model carries the part: `model.part` while w + e stands.
    """

    part = 0.5

    @contextmanager
    def perturb(self, scaler: Any = None) -> Generator[None]:
        """As ARSAM's, with `model.part` set inside."""
        model: Any = self.model
        model.part = self.part
        try:
            with super().perturb(scaler):
                yield
        finally:
            model.part = 1.0


class OnePass(Rival):
    """The gradient is taken at w + e and applied at w, e from what the step before left: one pass a step.

    Args:
        base: the optimizer that updates the weights.
        model: whose weights they are.
        rho: the norm of e over all weights.
    """

    def __init__(self, base: Optimizer, model: nn.Module, rho: float) -> None:
        super().__init__(base, model)
        self.rho = rho

    @abstractmethod
    def direction(self, weights: list[Tensor]) -> list[Tensor] | None:
        """The direction of e, a tensor per weight; None: there is none yet."""

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """w <- w + e, backward, w <- w - e bitwise, base step."""
        weights = [p for group in self.param_groups for p in group["params"]]
        direction, saved = self.direction(weights), [p.clone() for p in weights]
        if direction is not None:
            scale = self.rho / (functional.global_norm(direction) + 1e-12)
            functional.add_scaled_(weights, direction, scale)
        with torch.enable_grad():
            loss = closure()
        functional.copy_(weights, saved)
        self.base.step()
        return loss


class MomentumSAM(OnePass):
    """MSAM: e = -rho m / ||m|| (arXiv 2401.12033): where the momentum came from, since the base steps along -m."""

    def direction(self, weights: list[Tensor]) -> list[Tensor] | None:
        """-m, SGD's momentum or Adam's first moment."""
        states = [self.base.state.get(p, {}) for p in weights]
        momenta = [state.get("momentum_buffer", state.get("exp_avg")) for state in states]
        return None if any(m is None for m in momenta) else [-m for m in momenta]


class StaleSAM(OnePass):
    """S2-SAM and AsyncSAM (arXiv 2503.11147): e = rho g' / ||g'||, g' the gradient that the step before used."""

    def direction(self, weights: list[Tensor]) -> list[Tensor] | None:
        """g', which is still there: the closure clears it."""
        gradients = [p.grad for p in weights]
        return None if any(g is None for g in gradients) else [g.clone() for g in gradients if g is not None]


class WeightAverage(Rival):
    """SWA (arXiv 1803.05407): after the last step the weights are the mean of those at the ends of the last epochs.

    Args:
        base: the optimizer that updates the weights.
        model: whose weights they are.
        steps_per_epoch: between two weights that are averaged.
        total_steps: of the run.
        share: of the run, its end, that is averaged over.
    """

    def __init__(self, base: Optimizer, model: nn.Module, steps_per_epoch: int, total_steps: int, share: float = 0.25) -> None:
        super().__init__(base, model)
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.start = round((1 - share) * total_steps)
        self.steps = self.count = 0
        self.mean: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """The base's step; at an epoch's end the mean takes in the weights, at the last one it takes their place."""
        with torch.enable_grad():
            loss = super().step(closure)
        self.steps += 1
        if self.steps > self.start and self.steps % self.steps_per_epoch == 0:
            weights: list[Tensor] = list(self.model.parameters())
            self.count += 1
            self.mean = self.mean or [torch.zeros_like(p) for p in weights]
            for mean, p in zip(self.mean, weights, strict=True):
                mean.lerp_(p, 1 / self.count)
            if self.steps == self.total_steps:
                functional.copy_(weights, self.mean)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, and the mean with its counts."""
        return {**super().state_dict(), "average": (self.steps, self.count, self.mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        super().load_state_dict(state)
        self.steps, self.count, self.mean = state["average"]


class Packaged(Rival):
    """An optimizer of pytorch-optimizer, its own settings at their defaults; LookSAM's k is 5, as in ours.

    Args:
        base: gives parameters, class and settings.
        model: whose weights they are.
        rho: radius.
        name: of the class.

    Raises:
        UserError: it is not installed.
    """

    def __init__(self, base: Optimizer, model: nn.Module, rho: float, name: str) -> None:
        super().__init__(base, model)
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise UserError("pytorch-optimizer is not installed (pip install pytorch-optimizer)") from error
        self.own = self.build(getattr(pytorch_optimizer, name), rho)

    def build(self, kind: Any, rho: float) -> Any:
        """The class with the base's settings, a group's own kept."""
        settings = {"k": 5} if kind.__name__ == "LookSAM" else {}
        return kind(self.base.param_groups, type(self.base), rho=rho, **self.base.defaults, **settings)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Theirs, which the schedule sets."""
        return self.own.param_groups

    @property
    def state(self) -> Any:
        """That of their base, which they build."""
        return self.own.base_optimizer.state

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.own.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """That of their base."""
        return self.own.base_optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.own.base_optimizer.load_state_dict(state)

    def step(self, closure: Closure) -> Tensor:
        """The first pass, and theirs, which runs the second one only."""
        loss = closure()
        self.own.step(closure)
        return loss


class PackagedWSAM(Packaged):
    """WSAM, whose constructor wants the model, and whose step runs both passes."""

    def build(self, kind: Any, rho: float) -> Any:
        """The class with the base's settings."""
        return kind(self.model, self.base.param_groups, type(self.base), rho=rho, **self.base.defaults)

    def step(self, closure: Closure) -> Tensor:
        """Theirs."""
        return self.own.step(closure)


class PackagedGSAM(Packaged):
    """GSAM, whose constructor wants a built base and a schedule of rho, and whose closure returns outputs and loss."""

    def build(self, kind: Any, rho: float) -> Any:
        """The class around the base, at a constant rho."""
        return kind(self.base.param_groups, self.base, self.model, rho_scheduler=SimpleNamespace(step=lambda: rho))

    def step(self, closure: Closure) -> Tensor:
        """Theirs, both passes."""
        return self.own.step(lambda: (None, torch.enable_grad()(closure)().detach()))[1]


PACKAGED: Sequence[tuple[str, type[Packaged]]] = (
    ("SAM", Packaged),
    ("GSAM", PackagedGSAM),
    ("WSAM", PackagedWSAM),
    ("FriendlySAM", Packaged),
    ("LookSAM", Packaged),
)
