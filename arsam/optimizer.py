"""The ARSAM optimizer: any torch optimizer, with a sampled, reused and mixed sharpness-aware gradient."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from arsam import ascent as ascents
from arsam import distributed, functional, scaling
from arsam.ascent import Ascent
from arsam.reuse import Decayed, Reuse
from arsam.sampling import Adaptive, Sampling
from arsam.statistics import frozen_statistics

_NO_ASCENT = (
    "an ascent is due on this step, and step() was called without a closure: pass a closure that zeroes the gradients,"
    " runs forward and backward and returns the loss, or run the second pass yourself inside `with optimizer.perturb():`"
    " before step() whenever `optimizer.due` is true"
)
# Rules with a history, by identity, and the optimizer that each serves.
_OWNERS: WeakValueDictionary[int, ARSAM] = WeakValueDictionary()


class ARSAM(Optimizer):
    """Sharpness-aware minimization at close to the price of its base optimizer.

    On a step where `sampling` wants an ascent, the update uses g_s = grad L(w + e) with e = rho g / (||g||_2 + eps), two
    passes, as SAM does; and PSF = g_s - g is kept. On the one-pass steps after it, `reuse` mixes the decayed PSF into the
    fresh gradient: g + beta^j PSF. The mixed gradient goes to the base optimizer, so it enters the momentum; weight decay
    stays the base optimizer's.

    The full text and code of the ARSAM paper could not be had. The default sampling rule is that of its predecessor
    vSAM, restated; "mixing" is read as written above.

    Example:
        >>> optimizer = ARSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(inputs), targets)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)

    Args:
        base: the optimizer that updates the weights; its groups and state stay its own and are this optimizer's too.
        rho: radius of the perturbation in weight space, >= 0. A group's own "rho" takes precedence.
        adaptive: ASAM's e = rho w^2 g / || |w| g ||_2. A group's own "adaptive" takes precedence.
        sampling: when the second pass is due; None means `sampling.Adaptive()`.
        reuse: what a one-pass step gets; None means `reuse.Decayed(0.7, horizon=6)`.
        model: module whose running statistics stand still during the second pass; None: nothing is frozen.
        eps: added to the global norm, > 0.
        per_rank: under DistributedDataParallel, every rank perturbs by the gradient of its own share of the batch
            (m-sharpness), which also saves the first pass its communication; by default all perturb alike. Needs ``model``
            to be the DDP module. A loop that uses `perturb` runs the first pass of such a step under ``model.no_sync()``.

    Where torch.distributed is initialised, building and loading are collective: rank 0's sampling seed and state hold for all.

    Raises:
        TypeError: base is no optimizer.
        ValueError: rho or eps out of range; per_rank with a model that has no ``no_sync``, or with `sampling.GradientNorm`.

    References:
        ARSAM, arXiv 2510.03763; vSAM, arXiv 2403.08821; SAM, arXiv 2010.01412; ASAM, arXiv 2102.11600.
    """

    base: Optimizer
    sampling: Sampling
    reuse: Reuse
    model: nn.Module | None
    eps: float
    defaults: dict[str, Any]
    _steps: int
    _ascents: int
    _reuses: int
    _age: int  # one-pass steps since the kept vectors were made
    _kept: dict[Tensor, Tensor]  # parameter -> kept vector, at least float32
    per_rank: bool
    _pending: Ascent | None  # made by perturb(), taken in by step()
    _perturbed: bool
    _agreed: bool  # the ranks share one schedule
    _loss_scale: Callable[[], float] | None  # asks for that of the present gradient, where it can be known
    _norm_read: bool  # by the sampling rule, from a gradient whose scale was not known
    _observed: bool  # the sampling rule has been told the norm of this step's gradient
    _scaler: bool  # the last step was a GradScaler's

    # GradScaler then leaves the unscaling to step(), which has the kept vector to unscale too
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base: Optimizer,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        sampling: Sampling | None = None,
        reuse: Reuse | None = None,
        model: nn.Module | None = None,
        eps: float = 1e-12,
        per_rank: bool = False,
    ) -> None:
        if not isinstance(base, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        if not rho >= 0:
            raise ValueError(f"rho must be >= 0, got {rho}")
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        if per_rank and getattr(sampling, "reads_gradient", False):
            raise ValueError(
                f"per_rank=True: ranks with their own gradients would decide apart by sampling.{type(sampling).__name__}"
            )
        if per_rank and distributed.ranks() > 1 and not hasattr(model, "no_sync"):
            raise ValueError("per_rank=True needs model to be the DistributedDataParallel module")
        # Optimizer.__init__ would build groups and state of its own; __setstate__ is what torch runs on an optimizer that
        # already has them, after unpickling. It makes the hook tables and the profiling wrapper, and nothing else.
        self.__setstate__(
            {
                "base": base,
                "sampling": sampling if sampling is not None else Adaptive(),
                "reuse": reuse if reuse is not None else Decayed(),
                "model": model,
                "eps": eps,
                "per_rank": per_rank,
                "defaults": {**base.defaults, "rho": rho, "adaptive": adaptive},
                "_steps": 0,
                "_ascents": 0,
                "_reuses": 0,
                "_age": 0,
                "_kept": {},
                "_pending": None,
                "_perturbed": False,
                "_agreed": False,
                "_loss_scale": None,
                "_norm_read": False,
                "_observed": False,
                "_scaler": False,
            }
        )
        if getattr(self.reuse, "needs_spacing", False) and self._spacing() is None:
            raise ValueError(
                f'beta="auto" needs a sampling rule with a spacing; {type(self.sampling).__name__} has none: give beta'
            )
        self._claim_rule()
        for group in base.param_groups:
            self._complete(group)
        if any(p.dtype in functional.HALF for group in base.param_groups for p in group["params"]):
            warnings.warn(
                "half-precision parameters: most of them round w + e back to w, so that the perturbation is lost; keep the"
                " parameters in float32 and use torch.autocast",
                stacklevel=2,
            )
        self._agree()

    def _claim_rule(self) -> None:
        """Raise ValueError if the sampling rule has a history, and that of another optimizer."""
        rule = self.sampling
        if not getattr(rule, "learns", False):
            return
        if id(rule) in _OWNERS:
            gc.collect()  # the other may be gone, and only wait to be collected
            owner = _OWNERS.get(id(rule))
            if owner is not None and owner.sampling is rule:
                raise ValueError(
                    f"this {type(rule).__name__} already serves another optimizer, and learns from its steps; give each"
                    " optimizer a sampling rule of its own"
                )
        _OWNERS[id(rule)] = self

    def _agree(self) -> None:
        """Give all ranks rank 0's schedule, once."""
        if self._agreed or distributed.ranks() == 1:
            return
        distributed.share_schedule(self.sampling)
        self._agreed = True

    def _spacing(self) -> float | None:
        return getattr(self.sampling, "spacing", None)

    def _complete(self, group: dict[str, Any]) -> None:
        group.setdefault("rho", self.defaults["rho"])
        group.setdefault("adaptive", self.defaults["adaptive"])
        if not group["rho"] >= 0:
            raise ValueError(f"rho must be >= 0, got {group['rho']} in a parameter group")

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's own groups, each with "rho" and "adaptive"."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's own state; ARSAM keeps nothing in it."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.state = state

    @property
    def stats(self) -> dict[str, float]:
        """Steps, ascents (two-pass steps), reuses (one-pass steps with a kept vector) and passes per step so far."""
        passes = (self._steps + self._ascents) / max(self._steps, 1)
        return {"steps": self._steps, "ascents": self._ascents, "reuses": self._reuses, "passes_per_step": passes}

    @property
    def due(self) -> bool:
        """Will the coming step want a second pass? With `sampling.GradientNorm`, ask after the backward pass."""
        return self.sampling.due(self._steps, self._gradient_norm)

    def _gradient_norm(self) -> Tensor:
        self._norm_read = self._loss_scale is None
        scale = 1.0 if self._loss_scale is None else self._loss_scale()
        return functional.global_norm([p.grad for p in self._parameters() if p.grad is not None]) / scale

    def _observe(self) -> None:
        """Tell a sampling rule that reads gradients the norm of this step's, once a step."""
        if getattr(self.sampling, "reads_gradient", False) and not self._observed:
            self.sampling.observe(self._gradient_norm())
            self._observed = True

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; "rho" and "adaptive" default to this optimizer's."""
        self._complete(param_group)
        self.base.add_param_group(param_group)

    @contextmanager
    def perturb(self, scaler: GradScaler | None = None) -> Generator[None]:
        """Run the second pass of a loop that owns its backward.

        On entry w <- w + e by the present gradient, and the gradient is cleared; inside, accumulate the gradient of the
        same batch; on exit, also by an exception, w is restored bitwise in the same storage. The gradient is then g_s, which
        `step` takes as the update.

        Both passes of a loop with a GradScaler go through ``scaler.scale(loss).backward()``; the direction of g is all that e
        needs, and ``scaler.step(optimizer)`` unscales.

        Args:
            scaler: needed only if ``scaler.unscale_(optimizer)`` follows, for clipping; to be called after this block.

        Raises:
            RuntimeError: entered inside itself, or a gradient is sparse.
        """
        if self._perturbed:
            raise RuntimeError("perturb() is already active; the weights can be perturbed once at a time")
        self._pending = None
        self._agree()
        self._observe()
        for group in self.param_groups:
            self._complete(group)
        gradients = ascents.take_gradients(self._parameters())
        if not self._scaler:
            self._kept = {}  # to be replaced; a scaler may yet leave the step out, and then needs it
        saved: dict[Tensor, Tensor] = {}
        self._perturbed = True
        try:
            ascents.move_(self.param_groups, gradients, self.eps, saved)
            if self.per_rank and (self.reuse.horizon != 0 or self.sampling.monitor):
                distributed.average_(list(gradients.values()), getattr(self.model, "process_group", None))
            if self.reuse.horizon == 0:  # only the monitored gradients are needed after the second pass
                gradients = dict(list(gradients.items())[len(gradients) - self.sampling.monitor :])
            with frozen_statistics(self.model):
                yield
        finally:
            self._perturbed = False
            ascents.restore_(saved)
            saved.clear()
        self._pending = ascents.keep(gradients, self.reuse, self.sampling.monitor)
        if scaler is not None:
            scaling.unscale_(self._pending, 1 / scaler.get_scale())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights once.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss. Run once on one-pass steps, twice
                on ascent steps; a closure that uses `perturb` by itself is run once. May be left out when no ascent is due,
                or after `perturb`.

        Called by ``scaler.step(optimizer)``, a step whose gradient is inf or NaN in either pass is left out: weights, base
        state, schedule and kept vector stay as they were.

        Returns:
            The loss of the first pass, at the unperturbed weights; None without a closure.

        Raises:
            RuntimeError: an ascent is due, there is no closure, and `perturb` was not used; a gradient is sparse; or a
                GradScaler is used in a way that leaves a scale unknown.
        """
        self._agree()
        loss = None
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # set, with grad_scale, by GradScaler.step
        self._scaler = found_inf is not None
        if found_inf is not None:
            if closure is not None:
                raise RuntimeError(scaling.CLOSURE_UNDER_SCALER)
            norm_read, self._norm_read = self._norm_read, False
            if norm_read:
                raise RuntimeError(scaling.NORM_SCALED)
            grad_scale: Tensor | None = getattr(self, "grad_scale", None)
            if not scaling.unscale_step(self._parameters(), self._pending, found_inf, grad_scale):
                self._pending, self._observed = None, False
                return None
        if closure is not None:
            loss = self._passes(closure)
        elif self._pending is None and self.due:
            raise RuntimeError(_NO_ASCENT)
        self._observe()
        ascent, self._pending = self._pending, None
        if ascent is not None:
            self._kept, self._age = ascent.kept, 0
        else:
            self._reuse_kept()
        self.base.step()
        self.sampling.update(self._steps, ascent is not None, ascent.norms if ascent is not None else None)
        self._steps += 1
        self._ascents += ascent is not None
        self._observed = self._norm_read = False
        return loss

    def _passes(self, closure: Callable[[], Any], loss_scale: Callable[[], float] | None = None) -> Any:
        """The first pass and, if it is due, the second; returns the loss of the first."""
        self._pending, self._observed = None, False
        # The ranks' own gradients are wanted only where they give the direction of an ascent.
        own = self.per_rank and distributed.ranks() > 1 and self.due
        no_sync: Any = getattr(self.model, "no_sync", nullcontext)
        self._loss_scale = loss_scale
        try:
            with torch.enable_grad(), no_sync() if own else nullcontext():
                loss = closure()
            if self._pending is None and self.due:  # a closure that used perturb() has run both passes by itself
                with self.perturb(), torch.enable_grad():
                    closure()
        finally:
            self._loss_scale = None
        return loss

    def _reuse_kept(self) -> None:
        if not self._kept:
            return
        self._age += 1
        pairs = [(p.grad, self._kept[p]) for p in self._parameters() if p.grad is not None and p in self._kept]
        if pairs:
            settings = (self._spacing(),) if getattr(self.reuse, "needs_spacing", False) else ()
            self.reuse.mix_([g for g, _ in pairs], [x for _, x in pairs], self._age, *settings)
            self._reuses += 1
        if self._age == self.reuse.horizon:
            self._kept = {}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict with one entry more, "arsam": containers, numbers and tensors only."""
        index = {p: i for i, p in enumerate(self._parameters())}
        state = self.base.state_dict()
        state["arsam"] = {
            "steps": self._steps,
            "ascents": self._ascents,
            "reuses": self._reuses,
            "age": self._age,
            "kept": {index[p]: x for p, x in self._kept.items()},
            "rules": self._rules(),
            "sampling": self.sampling.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bitwise from a `state_dict`.

        Raises:
            ValueError: the state is a plain optimizer's, or was made with other sampling or reuse rules.
        """
        if "arsam" not in state_dict:
            raise ValueError(
                'the state has no entry "arsam", so it is a plain optimizer\'s; to start ARSAM from it, load it into'
                " optimizer.base"
            )
        own = state_dict["arsam"]
        self._check_rules(own["rules"])
        self.base.load_state_dict(state_dict)
        self._load_own(own)

    def _check_rules(self, rules: list[str]) -> None:
        """Raise ValueError if a state made with these sampling and reuse rules is not for this optimizer."""
        if rules != self._rules():
            raise ValueError(f"the state was made with the rules {rules}, this optimizer has {self._rules()}")

    def _rules(self) -> list[str]:
        return [type(self.sampling).__name__, type(self.reuse).__name__]

    def _load_own(self, own: dict[str, Any]) -> None:
        """The part of a `state_dict` that is not the base optimizer's."""
        parameters = self._parameters()
        self._steps, self._ascents, self._reuses = own["steps"], own["ascents"], own["reuses"]
        self._age, self._pending = own["age"], None
        kept: dict[int, Tensor] = own["kept"]
        self._kept = {parameters[i]: x.detach().clone().to(parameters[i].device) for i, x in kept.items()}
        self.sampling.load_state_dict(deepcopy(own["sampling"]))
        self._agreed = False
        self._agree()

    def __getstate__(self) -> dict[str, Any]:
        # What the class declares: no hooks, and no wrapper that an LR scheduler put around step, as torch's optimizers do.
        return {name: value for name, value in self.__dict__.items() if name in ARSAM.__annotations__}
