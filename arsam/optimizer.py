"""The ARSAM optimizer: any torch optimizer, with a sampled, reused and mixed sharpness-aware gradient."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from arsam import arguments, distributed, saving, scaling, watch
from arsam import ascent as ascents
from arsam.ascent import Ascent
from arsam.randomness import Randomness
from arsam.reuse import Decayed, Reuse
from arsam.sampling import Adaptive, Sampling
from arsam.schedule import Scheduled
from arsam.second_pass import SecondPass


class ARSAM(Scheduled):
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
    _transient = (*Scheduled._transient, "_second")

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
        arguments.check_numbers(passes, rho, rho_warmup, clip, eps)
        arguments.check_model(model, per_rank)
        sampling, self.reuse = arguments.rules(passes, sampling, reuse)
        arguments.check_rules(sampling, self.reuse, per_rank)
        self.base = wrapped
        self.defaults = {**wrapped.defaults, "sam_rho": rho, "sam_adaptive": adaptive}
        self._start(sampling, rho_warmup)
        self.clip, self.eps, self.same_randomness, self.per_rank = clip, eps, same_randomness, per_rank
        self._ascents = self._reuses = 0
        self._age = 0  # one-pass steps since the kept vectors were made
        self._kept: dict[Tensor, Tensor] = {}  # parameter -> kept vector, at least float32
        self._size: Tensor | None = None  # its norm
        self._length: Tensor | None = None  # the norm of the last ascent's vector, kept or not
        self._pending: Ascent | None = None  # made by perturb(), taken in by step()
        self._losses: tuple[Any, Any] | None = None  # of its two passes, where a closure gave them
        self._perturbed = self._scaler = False  # w + e is in place; the last step was a GradScaler's
        self._zeroing_unseen = 3  # first steps on which the closure is watched for zeroing the gradients
        self._before: Randomness | None = None  # the generators before a closure's first pass
        self._last = watch.LastAscent()
        self._model = model
        arguments.claim_rule(self)
        self.__setstate__({})
        for group in wrapped.param_groups:
            self._complete(group)
        arguments.warn_of_half(self._parameters())
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

    @property
    def perturbed(self) -> bool:
        """Is the second pass under way? For a model's own forward, which may have a queue or a momentum encoder to guard."""
        return self._perturbed

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
        if found_inf is not None and not scaling.bring_to_units(self, closure, found_inf):
            return None
        loss = None
        if closure is not None:
            loss = self._passes(closure)
        elif self._pending is None:
            if not self._asked and self._spacing() != math.inf and any(g["sam_rho"] > 0 for g in self.base.param_groups):
                raise RuntimeError(watch.NEVER_ASKED)
            if self._is_due():
                raise RuntimeError(watch.NO_ASCENT)
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
        self._length = ascents.leave_outlier_(ascent, getattr(self.reuse, "max_growth", None), self._length)
        self._kept, self._size, self._age = ascent.kept, ascent.size, 0
        self._last.put(ascent.seen, self._losses)
        self._losses = None

    def _reuse_kept(self) -> None:
        if not self._kept:
            return
        self._age += 1
        pairs = [(p.grad, self._kept[p]) for p in self._parameters() if p.grad is not None and p in self._kept]
        if pairs:
            told: Any = (self._spacing(), self._size) if Reuse in type(self.reuse).__mro__ else ()
            self.reuse.mix_([g for g, _ in pairs], [x for _, x in pairs], self._age, *told)
            self._reuses += 1
        if self._age == self.reuse.horizon:
            self._kept = {}

    def _state(self) -> dict[str, Any]:
        state = {**self.base.state_dict(), "arsam": saving.state_of(self)}
        asking = saving.asking_checkpoint()
        return state if asking is None else saving.by_parameter(state, self._parameters(), asking)

    def _load(self, state_dict: dict[str, Any]) -> None:
        saving.load(self, state_dict)

    def _check_rules(self, rules: list[str]) -> None:
        """Raise ValueError if a state made with these sampling and reuse rules is not for this optimizer."""
        saving.check_rules(rules, [saving.shown(self.sampling), saving.shown(self.reuse)])

    def _load_own(self, own: dict[str, Any]) -> None:
        """The part of a `state_dict` that is not the base optimizer's."""
        saving.load_into(self, own)
