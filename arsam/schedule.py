"""When an ascent is due, and how far it goes: the sampling rule, the radius of each group, and what the rule is told."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from arsam import distributed, functional, saving
from arsam.reuse import Reuse
from arsam.sampling import Sampling
from arsam.wrapper import Wrapper, bases_of


class Scheduled(Wrapper):
    """A wrapper with a sampling rule and a radius for each group; it does not know what an ascent does."""

    sampling: Sampling
    reuse: Reuse
    rho_warmup: int

    def __repr__(self) -> str:
        rules = f"sampling={saving.shown(self.sampling)}, reuse={saving.shown(self.reuse)}"
        return f"{type(self).__name__}({rules}, rho={self.defaults['sam_rho']}, base={self.base!r})"

    def _start(self, sampling: Sampling, rho_warmup: int) -> None:
        self.sampling, self.rho_warmup = sampling, rho_warmup
        self._steps: int = 0
        self._agreed = False  # the ranks share one schedule
        self._asked = False  # the loop knows of ascents
        self._loss_scale: Callable[[], float] | None = None  # asks for that of the present gradient, where it can be known
        self._norm_read = False  # by the sampling rule, from a gradient whose scale was not known
        self._observed = False  # the sampling rule has been told the norm of this step's gradient

    def _agree(self) -> None:
        """Give all ranks rank 0's schedule, once."""
        if self._agreed or distributed.ranks() == 1:
            return
        distributed.share_schedule(self.sampling)
        self._agreed = True

    def _spacing(self) -> float | None:
        return getattr(self.sampling, "spacing", None)

    def _complete(self, group: dict[str, Any]) -> None:
        """Give a group its own radius; "rho" and "adaptive", where no base means something by them, are the old names."""
        theirs = {name for base in bases_of(self.base) for name in base.defaults}
        for old, name in (("rho", "sam_rho"), ("adaptive", "sam_adaptive")):
            if old in group and old not in theirs:
                group[name] = group.pop(old)
            group.setdefault(name, self.defaults[name])
        if not group["sam_rho"] >= 0:
            raise ValueError(f"rho must be >= 0, got {group['sam_rho']} in a parameter group")

    def _radii(self) -> list[float]:
        """rho min(1, t / rho_warmup) of each group, on the coming step t."""
        share = min(1.0, self._steps / self.rho_warmup) if self.rho_warmup else 1.0
        for group in self.base.param_groups:
            self._complete(group)
        return [group["sam_rho"] * share for group in self.base.param_groups]

    @property
    def due(self) -> bool:
        """Will the coming step want a second pass? With a rule that reads gradients, ask after the backward pass."""
        own = self._own()
        own._asked = True
        return own._is_due()

    def _own(self) -> Any:
        """This optimizer, also if a wrapper asks that inherits from the class of what it wraps: Lightning's and Fabric's do."""
        return vars(self).get("_optimizer", self)

    def _is_due(self) -> bool:
        return any(rho > 0 for rho in self._radii()) and self.sampling.due(self._steps, self._gradient_norm)

    def _may_ascend(self) -> bool:
        """As `_is_due`, before there is a gradient."""
        return self._reads_gradient or self._is_due()

    def _wanted(self) -> bool:
        return self._steps == 0 or self._may_ascend()

    @property
    def _reads_gradient(self) -> bool:
        return getattr(self.sampling, "reads_gradient", False)

    def _gradient_norm(self) -> Tensor:
        self._norm_read = self._loss_scale is None
        scale = 1.0 if self._loss_scale is None else self._loss_scale()
        return functional.global_norm([p.grad for p in self._parameters() if p.grad is not None]) / scale

    def _observe(self) -> None:
        """Tell a sampling rule that reads gradients the norm of this step's, once a step."""
        if self._reads_gradient and not self._observed:
            self.sampling.observe(self._gradient_norm())
            self._observed = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; "sam_rho" and "sam_adaptive" default to this optimizer's."""
        self.base.add_param_group(param_group)
        self._complete(self.base.param_groups[-1])
