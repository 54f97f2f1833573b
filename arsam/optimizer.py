"""The ARSAM optimizer: any torch optimizer, with a sampled, reused and mixed sharpness-aware gradient."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from arsam import arguments, distributed, functional, saving, scaling, watch
from arsam import ascent as ascents
from arsam.ascent import Ascent
from arsam.randomness import Randomness
from arsam.reuse import Decayed, Reuse
from arsam.sampling import Adaptive, Budget, Sampling
from arsam.second_pass import SecondPass
from arsam.wrapper import Wrapper, bases_of

_NO_ASCENT = (
    "an ascent is due on this step, and step() was called without a closure: pass a closure that zeroes the gradients,"
    " runs forward and backward and returns the loss, or run the second pass yourself inside `with optimizer.perturb():`"
    " before step() whenever `optimizer.due` is true"
)
_NEVER_ASKED = (
    "step() was called without a closure, and the loop has not asked `optimizer.due`; on some later step " + _NO_ASCENT
)


class ARSAM(Wrapper):
    """Sharpness-aware minimization at close to the price of its base optimizer.

    On a step where `sampling` wants an ascent, the update uses g_s = grad L(w + e) with e = rho g / (||g||_2 + eps), two
    passes, as SAM does; and PSF = g_s - g is kept. On the one-pass steps after it, `reuse` mixes the decayed PSF into the
    fresh gradient: g + beta^j PSF. The mixed gradient goes to the base optimizer, so it enters the momentum; weight decay
    stays the base optimizer's.

    Both passes are one function of the weights: random numbers and running statistics of the second are those of the first.

    The full text and code of the ARSAM paper could not be had. Its sampling rule is taken to be that of its predecessor vSAM,
    restated (`ARSAM.published`); "mixing" is read as written above.

    Example:
        >>> optimizer = ARSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(inputs), targets)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)

    Args:
        base: the optimizer that updates the weights; its groups and state stay its own and are this optimizer's too. Or a
            list of optimizers over disjoint parameters (Muon and AdamW): one e over all, one step, one state_dict.
        model: module whose running statistics stand still, and whose random numbers are the same, in the second pass. It is
            the module that the loop calls: the DistributedDataParallel or compiled one, where there is one.
        passes: forward-backward passes per step, in [1, 2]: `sampling.Budget(passes)` with `reuse.Decayed("auto", None)`.
            None means 1.2, unless `sampling` is given.
        rho: radius of the perturbation in weight space, >= 0. A group's own "sam_rho" takes precedence, and may be set by a
            scheduler at any time. Where it is 0 for all groups, a step takes one pass.
        rho_warmup: steps over which rho rises linearly from 0, >= 0.
        sampling: when the second pass is due, instead of `passes`.
        reuse: what a one-pass step gets; None means `reuse.Decayed(0.7, horizon=6)` where `sampling` is given.
        adaptive: ASAM's e = rho w^2 g / || |w| g ||_2. A group's own "sam_adaptive" takes precedence.
        clip: L2 norm, > 0, that the mixed gradient is scaled down to before the base's step; None: it is not.
        same_randomness: False lets the second pass draw anew.
        eps: added to the global norm, > 0.
        per_rank: under DistributedDataParallel, every rank perturbs by the gradient of its own share of the batch
            (m-sharpness), which also saves the first pass its communication; by default all perturb alike. Needs ``model``
            to be the DDP module. A loop that uses `perturb` runs the first pass of such a step under ``model.no_sync()``.

    Where torch.distributed is initialised, building and loading are collective: rank 0's sampling seed and state hold for all.

    Raises:
        TypeError: base is no optimizer, or one that cannot take the gradients of two passes (LBFGS, SparseAdam, an ARSAM).
        ValueError: an argument is out of range; `passes` and `sampling` together; a sampling rule that learns and serves
            another optimizer; per_rank with a model that has no ``no_sync``, or with a rule that reads gradients.

    References:
        ARSAM, arXiv 2510.03763; vSAM, arXiv 2403.08821; SAM, arXiv 2010.01412; ASAM, arXiv 2102.11600.
    """

    # GradScaler then leaves the unscaling to step(), which has the kept vector to unscale too
    _step_supports_amp_scaling = True
    _transient = (*Wrapper._transient, "_second")

    @arguments.base_first
    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        model: nn.Module | None = None,
        *,
        passes: float | None = None,
        rho: float = 0.05,
        rho_warmup: int = 0,
        sampling: Sampling | None = None,
        reuse: Reuse | None = None,
        adaptive: bool = False,
        clip: float | None = None,
        same_randomness: bool = True,
        eps: float = 1e-12,
        per_rank: bool = False,
    ) -> None:
        wrapped = arguments.checked_base(base)
        if passes is not None and sampling is not None:
            raise ValueError("passes and sampling exclude each other: passes=1.2 is sampling=Budget(1.2)")
        arguments.check_numbers(passes, rho, rho_warmup, clip, eps)
        if model is not None and not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if per_rank and distributed.ranks() > 1 and not hasattr(model, "no_sync"):
            raise ValueError("per_rank=True needs model to be the DistributedDataParallel module")
        if reuse is None:
            reuse = Decayed("auto", None) if sampling is None else Decayed()
        self.sampling: Sampling = sampling if sampling is not None else Budget(1.2 if passes is None else passes)
        self.reuse: Reuse = reuse
        self.base = wrapped
        self.defaults = {**wrapped.defaults, "sam_rho": rho, "sam_adaptive": adaptive}
        self.rho_warmup, self.clip, self.eps = rho_warmup, clip, eps
        self.same_randomness, self.per_rank = same_randomness, per_rank
        self._steps = self._ascents = self._reuses = 0
        self._age = 0  # one-pass steps since the kept vectors were made
        self._kept: dict[Tensor, Tensor] = {}  # parameter -> kept vector, at least float32
        self._size: Tensor | None = None  # its norm
        self._pending: Ascent | None = None  # made by perturb(), taken in by step()
        self._losses: tuple[Any, Any] | None = None  # of its two passes, where a closure gave them
        self._perturbed = False
        self._agreed = False  # the ranks share one schedule
        self._asked = False  # the loop knows of ascents
        self._zeroing_unseen = 3  # first steps on which the closure is watched for zeroing the gradients
        self._before: Randomness | None = None  # the generators before a closure's first pass
        self._loss_scale: Callable[[], float] | None = None  # asks for that of the present gradient, where it can be known
        self._norm_read = False  # by the sampling rule, from a gradient whose scale was not known
        self._observed = False  # the sampling rule has been told the norm of this step's gradient
        self._scaler = False  # the last step was a GradScaler's
        self._last = watch.LastAscent()
        self._model = model
        arguments.check_rules(self.sampling, self.reuse, per_rank)
        arguments.claim_rule(self)
        self.__setstate__({})
        for group in wrapped.param_groups:
            self._complete(group)
        if any(p.dtype in functional.HALF for p in self._parameters()):
            warnings.warn(
                "half-precision parameters: most of them round w + e back to w, so that the perturbation is lost; keep the"
                " parameters in float32 and use torch.autocast",
                stacklevel=3,  # the line that builds it
            )
        self._agree()

    @classmethod
    def published(
        cls, base: Optimizer | Sequence[Optimizer], model: nn.Module | None = None, *, rho: float = 0.05, **adaptive: Any
    ) -> ARSAM:
        """The rule as it is published: `sampling.Adaptive` with `reuse.Decayed(0.7, horizon=6)`.

        On most of our workloads it does not differ from the base optimizer; it is here to be compared with.

        Args:
            base: as for `ARSAM`.
            model: as for `ARSAM`.
            rho: radius of the perturbation, >= 0.
            adaptive: arguments of `sampling.Adaptive`.
        """
        return cls(base, model, rho=rho, sampling=Adaptive(**adaptive), reuse=Decayed(0.7, horizon=6))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._second = SecondPass(self._model, self._parameters, self._wanted, self.same_randomness)

    @property
    def model(self) -> nn.Module | None:
        """The module whose statistics and random numbers are looked after in the second pass."""
        return self._model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        if model is not self._model:
            self._model = model
            self._second.leave()
            self._second = SecondPass(model, self._parameters, self._wanted, self.same_randomness)

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
    def stats(self) -> dict[str, Any]:
        """Counts so far, and how the last ascent changed loss and gradient; reading it may wait for the device.

        Returns:
            "steps", "ascents" (two-pass steps), "reuses" (one-pass steps with a kept vector), "passes_per_step"; and of the
            last ascent "rise", L(w + e) - L(w) where the closure's losses are seen, "psf_ratio", ||g_s - g|| / ||g||, and
            "cosine", cos(g, g_s). The latter two are None where the reuse rule keeps nothing, for g is then given up before
            the second pass.
        """
        passes = (self._steps + self._ascents) / max(self._steps, 1)
        counts = {"steps": self._steps, "ascents": self._ascents, "reuses": self._reuses, "passes_per_step": passes}
        return {**counts, **self._last.read()}

    def __repr__(self) -> str:
        rules = f"sampling={saving.shown(self.sampling)}, reuse={saving.shown(self.reuse)}"
        return f"{type(self).__name__}({rules}, rho={self.defaults['sam_rho']}, base={self.base!r})"

    @property
    def due(self) -> bool:
        """Will the coming step want a second pass? With a rule that reads gradients, ask after the backward pass."""
        own = self._own()
        own._asked = True
        return own._is_due()

    def _own(self) -> ARSAM:
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

    @property
    def perturbed(self) -> bool:
        """Is the second pass under way? For a model's own forward, which may have a queue or a momentum encoder to guard."""
        return self._perturbed

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; outside of a second pass, what was left of a step that was not finished goes as well."""
        if not self._perturbed:
            self._pending = None
            self._second.forget()
        super().zero_grad(set_to_none)

    @contextmanager
    def perturb(self, scaler: GradScaler | None = None) -> Generator[None]:
        """Run the second pass of a loop that owns its backward.

        On entry w <- w + e by the present gradient, and the gradient is cleared; inside, accumulate the gradient of the
        same batch; on exit, also by an exception, w is restored bitwise in the same storage. The gradient is then g_s, which
        `step` takes as the update.

        The n-th call of the model inside draws the random numbers of its n-th call in the first pass.

        Both passes of a loop with a GradScaler go through ``scaler.scale(loss).backward()``; the direction of g is all that e
        needs, and ``scaler.step(optimizer)`` unscales.

        Args:
            scaler: needed only if ``scaler.unscale_(optimizer)`` follows, for clipping; to be called after this block.

        Raises:
            RuntimeError: entered inside itself, or a gradient is sparse.
        """
        if self._own() is not self:
            with self._own().perturb(scaler):
                yield
            return
        if self._perturbed:
            raise RuntimeError("perturb() is already active; the weights can be perturbed once at a time")
        self._asked = True
        self._pending = self._losses = None
        before, self._before = self._before, None
        self._agree()
        self._observe()
        radii = self._radii()
        gradients = ascents.take_gradients(self._parameters())
        weights, saved, memory = list(gradients), dict[Tensor, Tensor](), dict[Tensor, Tensor]()
        if not self._scaler:  # which may yet leave the step out, and then needs the old vectors
            memory, self._kept = self._kept, memory
        self._perturbed = True
        try:
            ascents.move_(list(zip(self.base.param_groups, radii, strict=True)), gradients, self.eps, saved, memory)
            memory.clear()
            if self.per_rank and (self.reuse.horizon != 0 or self.sampling.monitor):
                distributed.average_(list(gradients.values()), getattr(self._model, "process_group", None))
            if self.reuse.horizon == 0:  # only the monitored gradients are needed after the second pass
                gradients = dict(list(gradients.items())[len(gradients) - self.sampling.monitor :])
            with self._second.run(before):
                yield
        finally:
            self._perturbed = False
            ascents.restore_(saved)
            saved.clear()
            torch.clear_autocast_cache()
        self._pending = ascents.keep(gradients, self.reuse, self.sampling.monitor)
        self._pending.lost = bool(weights) and all(p.grad is None for p in weights)
        if scaler is not None:
            scaling.unscale_(self._pending, 1 / scaler.get_scale())

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights once.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss. Run once on one-pass steps, twice
                on ascent steps; a closure that uses `perturb` by itself is run once, and so is one that comes after
                `perturb` and leaves the gradients alone. May be left out when no ascent is due, or after `perturb`.

        Called by ``scaler.step(optimizer)``, a step whose gradient is inf or NaN in either pass is left out: weights, base
        state, schedule and kept vector stay as they were.

        Returns:
            The loss of the first pass, at the unperturbed weights; None without a closure.

        Raises:
            RuntimeError: an ascent is due, there is no closure, and `perturb` was not used; the closure adds to gradients
                that were there before; the second pass leaves no gradient; a gradient is sparse; or a GradScaler is used in
                a way that leaves a scale unknown.
        """
        return self._hooked_step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None and self._pending is None and saving.asking_checkpoint() is not None:
            return self._step_base()  # only so that the base has a state to be loaded into
        self._agree()
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # set, with grad_scale, by GradScaler.step
        self._scaler = found_inf is not None
        if found_inf is not None and not self._unscaled(closure, found_inf):
            return None
        loss = None
        if closure is not None:
            loss = self._passes(closure)
        elif self._pending is None:
            if not self._asked and self._spacing() != math.inf and any(g["sam_rho"] > 0 for g in self.base.param_groups):
                raise RuntimeError(_NEVER_ASKED)
            if self._is_due():
                raise RuntimeError(_NO_ASCENT)
        self._observe()
        ascent, self._pending = self._pending, None
        self._observed = self._norm_read = False
        if ascent is not None:
            self._take_in(ascent)
        else:
            self._reuse_kept()
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for p in self._parameters() if p.grad is not None], self.clip)
        self._step_base()
        torch.clear_autocast_cache()
        self.sampling.update(self._steps, ascent is not None, ascent.norms if ascent is not None else None)
        self._steps += 1
        self._ascents += ascent is not None
        self._second.forget()
        return loss

    def _unscaled(self, closure: Callable[[], Any] | None, found_inf: Tensor) -> bool:
        """Bring all to the units of the loss; False if the step is to be left out."""
        if closure is not None:
            raise RuntimeError(scaling.CLOSURE_UNDER_SCALER)
        norm_read, self._norm_read = self._norm_read, False
        if norm_read:
            raise RuntimeError(scaling.NORM_SCALED)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        if scaling.unscale_step(self._parameters(), self._pending, found_inf, grad_scale):
            return True
        self._pending, self._observed = None, False
        return False

    def _passes(self, closure: Callable[[], Any], loss_scale: Callable[[], float] | None = None) -> Any:
        """The first pass and, if it is due, the second; returns the loss of the first."""
        self._asked, self._observed = True, False
        pending = self._pending
        touched = watch.touched(self._parameters()) if pending is not None else []
        # The ranks' own gradients are wanted only where they give the direction of an ascent.
        own = self.per_rank and distributed.ranks() > 1 and self._is_due()
        no_sync: Any = getattr(self._model, "no_sync", nullcontext)
        before = self._second.randomness() if pending is None and self._may_ascend() else None
        self._loss_scale = loss_scale
        try:
            growing = self._parameters() if self._zeroing_unseen and pending is None else []
            with watch.Growth(growing) as growth, torch.enable_grad(), no_sync() if own else nullcontext():
                loss = closure()
            self._zeroing_unseen = 0 if growth.zeroed else max(self._zeroing_unseen - 1, 0)
            if growth.grown:
                raise RuntimeError(watch.GROWN)
            if pending is not None and self._pending is pending and watch.touched(self._parameters()) != touched:
                self._pending = None
                raise RuntimeError(watch.BOTH_RUN)
            if self._pending is None and self._is_due():  # a closure that used perturb() has run both passes by itself
                self._before = before
                with self.perturb(), torch.enable_grad():
                    second = closure()
                self._losses = loss, second
        finally:
            self._loss_scale = None
        return loss

    def _take_in(self, ascent: Ascent) -> None:
        if ascent.lost:
            raise RuntimeError(watch.LOST)
        self._kept, self._size, self._age = ascent.kept, ascent.size, 0
        self._last.put(ascent.seen, self._losses)
        self._losses = None

    def _reuse_kept(self) -> None:
        if not self._kept:
            return
        self._age += 1
        pairs = [(p.grad, self._kept[p]) for p in self._parameters() if p.grad is not None and p in self._kept]
        if pairs:
            told = (self._spacing(), self._size) if Reuse in type(self.reuse).__mro__ else ()
            self.reuse.mix_([g for g, _ in pairs], [x for _, x in pairs], self._age, *told)
            self._reuses += 1
        if self._age == self.reuse.horizon:
            self._kept = {}

    def _state(self) -> dict[str, Any]:
        index = {p: i for i, p in enumerate(self._parameters())}
        state: dict[str, Any] = self.base.state_dict()
        state["arsam"] = {
            "version": saving.VERSION,
            "steps": self._steps,
            "ascents": self._ascents,
            "reuses": self._reuses,
            "age": self._age,
            "kept": {index[p]: x for p, x in self._kept.items()},
            "size": float(self._size) if self._kept and self._size is not None else None,
            "last": self._last.read(),
            "rho_warmup": self.rho_warmup,
            "rules": [saving.shown(self.sampling), saving.shown(self.reuse)],
            "sampling": self.sampling.state_dict(),
        }
        asking = saving.asking_checkpoint()
        return state if asking is None else saving.by_parameter(state, self._parameters(), asking)

    def _load(self, state_dict: dict[str, Any]) -> None:
        state = saving.from_parameters(state_dict) if saving.is_by_parameter(state_dict) else dict(state_dict)
        if "arsam" not in state:
            raise ValueError(
                'the state has no entry "arsam", so it is a plain optimizer\'s; to start ARSAM from it, load it into'
                " optimizer.base"
            )
        own = state.pop("arsam")
        self._check_rules(own["rules"])
        self.base.load_state_dict(state)
        self._load_own(own)

    def _check_rules(self, rules: list[str]) -> None:
        """Raise ValueError if a state made with these sampling and reuse rules is not for this optimizer."""
        saving.check_rules(rules, [saving.shown(self.sampling), saving.shown(self.reuse)])

    def _load_own(self, own: dict[str, Any]) -> None:
        """The part of a `state_dict` that is not the base optimizer's."""
        parameters = self._parameters()
        for group in self.base.param_groups:
            self._complete(group)
        self._steps, self._ascents, self._reuses = own["steps"], own["ascents"], own["reuses"]
        self._age, self._pending = own["age"], None
        self.rho_warmup = own.get("rho_warmup", self.rho_warmup)
        kept: dict[int, Tensor] = own["kept"]
        self._kept = {parameters[i]: x.detach().clone().to(parameters[i].device) for i, x in kept.items()}
        self._size = None
        if self._kept:
            size = functional.global_norm(list(self._kept.values()))
            self._size = size if own.get("size") is None else torch.full_like(size, own["size"])
        self._last.load(own.get("last", self._last.read()))
        self.sampling.load_state_dict(deepcopy(own["sampling"]))
        self._agreed = False
        self._agree()
