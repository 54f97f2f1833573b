"""ARSAM in OpenMMLab's training loop: two optimizer wrappers, so that one line of any config turns it on.

    custom_imports = dict(imports=["arsam.integrations.mmengine"])
    optim_wrapper = dict(type="ARSAMOptimWrapper", rho=0.001, optimizer=dict(type="AdamW", lr=5e-4))

mmengine's runner computes the loss itself and hands it to the wrapper, so there is no closure to call again. The wrapper
keeps what the model was called with, and calls it so once more where an ascent is due.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUntypedBaseClass=false, reportUntypedClassDecorator=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn
from torch.optim import Optimizer

import arsam.reuse
import arsam.sampling
from arsam.integrations.mmpose_standins import allow_log_history
from arsam.optimizer import ARSAM

allow_log_history()  # or else resuming fails, in whatever library of OpenMMLab's

_NOT_ONE_FORWARD = (
    "an ascent is due, and the second pass needs what the model was called with: between two updates it must be called"
    " once for every backward pass, inside `optim_wrapper.optim_context(model)`, and return a dict of losses, as"
    " BaseModel.train_step does; a model with a train_step of another kind trains with sampling=dict(type='Never') only"
)


@OPTIM_WRAPPERS.register_module()
class ARSAMOptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper around ARSAM.

    An update counts as one step however many batches it accumulates: it is decided once, and an ascent runs all of them
    again. Their inputs are held until then. Gradients are clipped where the update reads them, after mixing. The message hub,
    and so the log, gets ``ascents`` (so far) and ``rho``; a scheduler of mmengine's moves rho by ``param_name="sam_rho"``:

        rise = dict(type="LinearParamScheduler", param_name="sam_rho", start_factor=0.1, end=1000, by_epoch=False)

    Dropout and its like draw the same numbers in both passes.

    Args:
        optimizer: the base optimizer, as the runner builds it.
        rho: radius of the perturbation, >= 0.
        adaptive: ASAM's perturbation.
        passes: forward-backward passes per update, in [1, 2]; None means 1.2, unless `sampling` is given.
        rho_warmup: updates over which rho rises linearly from 0.
        sampling: a rule of `arsam.sampling` by name instead of `passes`, ``dict(type="Periodic", every=5)``; rules that take
            total_steps want it in updates of the whole run.
        reuse: None for the default, or a rule of `arsam.reuse` by name, ``dict(type="Decayed", beta=0.9, horizon=4)``.
        kwargs: accumulative_counts and clip_grad, as in OptimWrapper.

    Raises:
        ValueError: a rule that does not exist, or a setting out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        passes: float | None = None,
        rho_warmup: int = 0,
        sampling: dict[str, Any] | None = None,
        reuse: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        wrapped = ARSAM(
            optimizer,
            rho=rho,
            adaptive=adaptive,
            passes=passes,
            rho_warmup=rho_warmup,
            sampling=_rule(arsam.sampling, sampling),
            reuse=_rule(arsam.reuse, reuse),
        )
        super().__init__(optimizer=wrapped, **kwargs)
        self._calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []  # backward passes before the call, its arguments
        if self.clip_grad_kwargs:
            optimizer.register_step_pre_hook(self._clip)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Generator[None]:
        """OptimWrapper's context for the forward pass; keeps what the model is called with inside."""
        self.optimizer.model = model

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((self._inner_count, args, kwargs))

        handle = model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with super().optim_context(model):
                yield
        finally:
            handle.remove()

    def step(self, **kwargs: Any) -> None:
        """Run the second pass if it is due, then update the weights.

        Raises:
            RuntimeError: an ascent is due, and the model was not called once per backward pass.
        """
        calls, self._calls = self._calls, []
        ascent = self.optimizer.due
        if ascent:
            done = self._inner_count
            if not calls or [count for count, _, _ in calls] != list(range(done - len(calls), done)):
                raise RuntimeError(_NOT_ONE_FORWARD)
            with self.optimizer.perturb():
                self._second_pass(calls)
        self._update(**kwargs)
        self.message_hub.update_scalar("train/ascents", self.optimizer.stats["ascents"])
        self.message_hub.update_scalar("train/rho", float(self.optimizer.param_groups[0]["sam_rho"]))

    def _second_pass(self, calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]]) -> None:
        model = self.optimizer.model
        module = model.module if is_model_wrapper(model) else model
        for count, args, kwargs in calls:
            self._inner_count = count  # decides on the loss's factor and on no_sync as in the first pass
            with super().optim_context(model):
                losses = model(*args, **kwargs)
            loss, _ = module.parse_losses(losses)
            self.backward(self.scale_loss(loss))

    def _update(self, **kwargs: Any) -> None:
        self.optimizer.step(**kwargs)

    def _clip(self, *_: Any) -> None:
        self._clip_grad()


@OPTIM_WRAPPERS.register_module()
class ARSAMAmpOptimWrapper(ARSAMOptimWrapper, AmpOptimWrapper):
    """mmengine's AmpOptimWrapper around ARSAM: autocast in both passes, one loss scale for both.

    Args:
        kwargs: those of ARSAMOptimWrapper and of AmpOptimWrapper (loss_scale, dtype).
    """

    def _update(self, **kwargs: Any) -> None:
        # ARSAM unscales by itself, so that clipping on the base optimizer sees the gradient's own units.
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._scale_update_param)


def _rule(module: ModuleType, config: dict[str, Any] | None) -> Any:
    if config is None:
        return None
    settings = dict(config)
    name = settings.pop("type", None)
    rules = {x.__name__: x for x in module.RULES}
    if name not in rules:
        raise ValueError(f"{module.__name__} has no rule {name!r}; type must be one of {', '.join(rules)}")
    return rules[name](**settings)
