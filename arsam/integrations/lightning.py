"""ARSAM in Lightning's automatic optimization.

Returned from ``configure_optimizers`` as it is, an ARSAM trains under precision "32-true" and "bf16-mixed", for Lightning
steps optimizers with a closure. But Lightning's closure does more than ARSAM asks of it, and on an ascent it does all of that
twice: it logs the loss at w + e beside the loss, updates metrics twice, reports the second loss, and clips each pass by
itself. With ``accumulate_grad_batches`` the second pass would be over the last batch alone, and nothing would tell; under
"16-mixed" the first ascent is an error, since there Lightning runs the closure itself. `SharpnessAware` puts all of it right.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUntypedBaseClass=false, reportUnknownArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

from arsam.optimizer import ARSAM


class SharpnessAware(LightningModule):
    """A LightningModule whose optimizer may be an ARSAM; all else stays as it is.

    ``training_step`` runs twice on an ascent, and is silent the second time: `log` does nothing then. State that it keeps
    for itself it has to guard by ``if not self.second_pass``. ``gradient_clip_val`` clips once, the gradient that goes into
    ARSAM; Lightning refuses it under "16-mixed". To clip what the update reads in every case, with the PSF mixed in:

        base.register_step_pre_hook(lambda *_: clip_grad_norm_(self.parameters(), 1.0) and None)

    Example:
        >>> class Model(SharpnessAware):
        ...     def configure_optimizers(self):
        ...         return ARSAM(torch.optim.SGD(self.parameters(), lr=0.1), rho=0.05, model=self)
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
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches must be 1 with ARSAM: Lightning's closure repeats the last batch alone; take larger"
                " batches, or split them inside training_step"
            )
        first: Any = optimizer_closure

        def passes() -> Any:
            loss = first()
            if loss is not None and arsam.due:
                result = first._result  # what Lightning reports of this step
                self.second_pass = True
                try:
                    with arsam.perturb():
                        first()
                finally:
                    self.second_pass = False
                    first._result = result
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, passes)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """LightningModule.log, silent in the second pass."""
        if not self.second_pass:
            super().log(*args, **kwargs)
