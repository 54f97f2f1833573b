"""ARSAM in Lightning's automatic optimization.

Returned from ``configure_optimizers`` as it is, an ARSAM trains under precision "32-true" and "bf16-mixed", for Lightning
steps optimizers with a closure. But Lightning's closure does more than ARSAM asks of it, and on an ascent it does all of that
twice: it logs the loss at w + e beside the loss, updates metrics twice, reports the second loss, and clips each pass by
itself. With ``accumulate_grad_batches`` the second pass would be over the last batch alone, and nothing would tell; under
"16-mixed" the first ascent is an error, since there Lightning runs the closure itself. `SharpnessAware` puts all of it right.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUntypedBaseClass=false, reportUnknownArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

from arsam.optimizer import ARSAM


class SharpnessAware(LightningModule):
    """A LightningModule whose optimizer may be an ARSAM; all else stays as it is.

    ``training_step`` runs twice on an ascent, and is silent the second time: `log` does nothing then. State that it keeps
    for itself it has to guard by ``if not self.second_pass``. ``gradient_clip_val`` clips once, the gradient that goes into
    ARSAM; Lightning refuses it under "16-mixed". ``ARSAM(base, model, clip=1.0)`` clips what the update reads in every case,
    with the PSF mixed in. For another kind of clipping give the base a hook, which must return nothing: torch takes what a
    hook returns for the arguments of step.

        def clip(*_):
            torch.nn.utils.clip_grad_value_(self.parameters(), 0.1)

        base.register_step_pre_hook(clip)

    With ``self.automatic_optimization = False`` this class is not needed: a ``training_step`` that runs the second pass in
    ``with optimizer.perturb():`` trains any LightningModule, where ``optimizer = self.optimizers().optimizer``.

    Example:
        >>> class Model(SharpnessAware):
        ...     def configure_optimizers(self):
        ...         return ARSAM(torch.optim.SGD(self.parameters(), lr=0.1), self.network)
    """

    second_pass = False

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Run both passes inside one closure, whatever the precision.

        Raises:
            ValueError: the trainer accumulates gradients, which Lightning's closure cannot repeat.
        """
        arsam = optimizer.optimizer
        if not isinstance(arsam, ARSAM) or optimizer_closure is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        if self.trainer.fit_loop._skip_backward:
            # The epoch in which StochasticWeightAveraging re-estimates BatchNorm: forward passes, and no gradient to step by.
            optimizer_closure()
            return
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches must be 1 with ARSAM: Lightning's closure repeats the last batch alone; take larger"
                " batches, or split them inside training_step"
            )
        passes = _Passes(self, optimizer_closure)
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)

        def both() -> Any:
            return arsam._passes(passes, None if scaler is None else scaler.get_scale())

        super().optimizer_step(epoch, batch_idx, optimizer, both)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """LightningModule.log, silent in the second pass."""
        if not self.second_pass:
            super().log(*args, **kwargs)


class _Passes:
    """Lightning's closure: called once as it is, a second time silently, with the first time's result for Lightning to see."""

    def __init__(self, module: SharpnessAware, closure: Any) -> None:
        self.module, self.closure = module, closure
        self.calls, self.loss = 0, None

    def __call__(self) -> Any:
        self.calls += 1
        if self.calls == 1:
            self.loss = self.closure()
            return self.loss
        if self.loss is None:  # training_step has left this batch out
            return None
        result = self.closure._result  # what Lightning reports of this step
        self.module.second_pass = True
        try:
            return self.closure()
        finally:
            self.module.second_pass = False
            self.closure._result = result
