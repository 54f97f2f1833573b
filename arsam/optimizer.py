"""The ARSAM optimizer: any torch optimizer, with a sampled, reused and mixed sharpness-aware gradient."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from arsam import functional
from arsam.reuse import Decayed, Reuse
from arsam.sampling import Adaptive, Sampling
from arsam.statistics import frozen_statistics

_NO_ASCENT = (
    "an ascent is due on this step, and step() was called without a closure: pass a closure that zeroes the gradients,"
    " runs forward and backward and returns the loss, or run the second pass yourself inside `with optimizer.perturb():`"
    " before step() whenever `optimizer.due` is true"
)


@dataclass
class _Ascent:
    """What a second pass leaves for the step that follows: the kept vectors and the monitored norms."""

    kept: dict[Tensor, Tensor]
    norms: tuple[Tensor, Tensor] | None


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

    Raises:
        TypeError: base is no optimizer.
        ValueError: rho or eps out of range.

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
    _pending: _Ascent | None  # made by perturb(), taken in by step()
    _perturbed: bool

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
    ) -> None:
        if not isinstance(base, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        if not rho >= 0:
            raise ValueError(f"rho must be >= 0, got {rho}")
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        # Optimizer.__init__ would build groups and state of its own; __setstate__ is what torch runs on an optimizer that
        # already has them, after unpickling. It makes the hook tables and the profiling wrapper, and nothing else.
        self.__setstate__(
            {
                "base": base,
                "sampling": sampling if sampling is not None else Adaptive(),
                "reuse": reuse if reuse is not None else Decayed(),
                "model": model,
                "eps": eps,
                "defaults": {**base.defaults, "rho": rho, "adaptive": adaptive},
                "_steps": 0,
                "_ascents": 0,
                "_reuses": 0,
                "_age": 0,
                "_kept": {},
                "_pending": None,
                "_perturbed": False,
            }
        )
        for group in base.param_groups:
            self._complete(group)
        if any(p.dtype in functional.HALF for group in base.param_groups for p in group["params"]):
            warnings.warn(
                "half-precision parameters: most of them round w + e back to w, so that the perturbation is lost; keep the"
                " parameters in float32 and use torch.autocast",
                stacklevel=2,
            )

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
        return functional.global_norm([p.grad for p in self._parameters() if p.grad is not None])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; "rho" and "adaptive" default to this optimizer's."""
        self._complete(param_group)
        self.base.add_param_group(param_group)

    @contextmanager
    def perturb(self) -> Generator[None]:
        """Run the second pass of a loop that owns its backward.

        On entry w <- w + e by the present gradient, and the gradient is cleared; inside, accumulate the gradient of the
        same batch; on exit, also by an exception, w is restored bitwise in the same storage. The gradient is then g_s, which
        `step` takes as the update.

        Raises:
            RuntimeError: entered inside itself, or a gradient is sparse.
        """
        if self._perturbed:
            raise RuntimeError("perturb() is already active; the weights can be perturbed once at a time")
        self._pending = None
        _ = self.due  # lets a rule that reads gradients see g, the one it decides by
        weights = [p for p in self._parameters() if p.grad is not None]
        gradients = {p: _owned(p) for p in weights}
        saved: list[Tensor] = []
        for p in weights:
            p.grad = None
        self._perturbed = True
        try:
            self._perturb_weights(gradients, saved)
            if self.reuse.horizon == 0:  # only the monitored gradients are needed after the second pass
                gradients = dict(list(gradients.items())[len(gradients) - self.sampling.monitor :])
            with frozen_statistics(self.model):
                yield
        finally:
            self._perturbed = False
            if saved:
                with torch.no_grad():
                    torch._foreach_copy_(weights[: len(saved)], saved)
            del saved
        self._pending = self._take_in(gradients)

    @torch.no_grad()
    def _perturb_weights(self, gradients: dict[Tensor, Tensor], saved: list[Tensor]) -> None:
        """w <- w + e for the weights that have a gradient, a copy of each appended to `saved` before it moves."""
        scaled: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
        for group in self.param_groups:
            self._complete(group)
            weights = [p for p in group["params"] if p in gradients]
            if weights:
                own = [gradients[p] for p in weights]
                scaled.append((group, weights, functional.scaled_gradients(weights, own, group["adaptive"])))
        norm = functional.global_norm([x for _, _, xs in scaled for x in xs])
        for group, weights, xs in scaled:
            # On a CPU one by one: a tensor is moved while the copy still has it in the cache.
            count = 1 if weights[0].device.type == "cpu" else len(weights)
            scale = group["rho"] / (norm + self.eps)
            for i in range(0, len(weights), count):
                some = slice(i, i + count)
                saved += [p.clone() for p in weights[some]]
                functional.perturb_(weights[some], xs[some], group["adaptive"], scale)

    @torch.no_grad()
    def _take_in(self, gradients: dict[Tensor, Tensor]) -> _Ascent:
        """Make the kept vectors and the monitored norms of g and g_s; consumes the gradients of the first pass."""
        both = [(p, g, p.grad) for p, g in gradients.items() if p.grad is not None]
        norms = None
        if self.sampling.monitor:
            last = both[-self.sampling.monitor :]
            psf = [g_s - g for _, g, g_s in last]
            norms = functional.global_norm([g for _, g, _ in last]), functional.global_norm(psf)
        if self.reuse.horizon == 0 or not both:
            return _Ascent({}, norms)
        kept = [g.float() if g.dtype in functional.HALF else g for _, g, _ in both]
        self.reuse.keep_(kept, [g_s for _, _, g_s in both])
        return _Ascent({p: x for (p, _, _), x in zip(both, kept, strict=True)}, norms)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights once.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss. Run once on one-pass steps, twice
                on ascent steps. May be left out when no ascent is due, or after `perturb`.

        Returns:
            The loss of the first pass, at the unperturbed weights; None without a closure.

        Raises:
            RuntimeError: an ascent is due, there is no closure, and `perturb` was not used; or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            self._pending = None
            with torch.enable_grad():
                loss = closure()
            if self.due:
                with self.perturb(), torch.enable_grad():
                    closure()
        elif self._pending is None and self.due:
            raise RuntimeError(_NO_ASCENT)
        ascent, self._pending = self._pending, None
        if ascent is not None:
            self._kept, self._age = ascent.kept, 0
        else:
            self._reuse_kept()
        self.base.step()
        self.sampling.update(self._steps, ascent is not None, ascent.norms if ascent is not None else None)
        self._steps += 1
        self._ascents += ascent is not None
        return loss

    def _reuse_kept(self) -> None:
        if not self._kept:
            return
        self._age += 1
        pairs = [(p.grad, self._kept[p]) for p in self._parameters() if p.grad is not None and p in self._kept]
        if pairs:
            self.reuse.mix_([g for g, _ in pairs], [x for _, x in pairs], self._age)
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
            "rules": [type(self.sampling).__name__, type(self.reuse).__name__],
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
        rules = [type(self.sampling).__name__, type(self.reuse).__name__]
        if own["rules"] != rules:
            raise ValueError(f"the state was made with the rules {own['rules']}, this optimizer has {rules}")
        self.base.load_state_dict(state_dict)
        parameters = self._parameters()
        self._steps, self._ascents, self._reuses = own["steps"], own["ascents"], own["reuses"]
        self._age, self._pending = own["age"], None
        kept: dict[int, Tensor] = own["kept"]
        self._kept = {parameters[i]: x.detach().clone().to(parameters[i].device) for i, x in kept.items()}
        self.sampling.load_state_dict(deepcopy(own["sampling"]))

    def __getstate__(self) -> dict[str, Any]:
        # What the class declares: no hooks, and no wrapper that an LR scheduler put around step, as torch's optimizers do.
        return {name: value for name, value in self.__dict__.items() if name in ARSAM.__annotations__}


def _owned(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, as memory that the second backward pass will not write to."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise RuntimeError(f"ARSAM needs dense gradients, got layout {gradient.layout}; build the embedding with sparse=False")
    # A view belongs to somebody else: DDP with gradient_as_bucket_view would overwrite it in the second pass.
    return gradient.detach().clone() if gradient._is_view() else gradient.detach()
