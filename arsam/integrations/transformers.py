"""ARSAM in the Trainer of Hugging Face's transformers."""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUntypedBaseClass=false, reportUnknownArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from arsam.optimizer import ARSAM


class SharpnessAwareTrainer(Trainer):
    """A Trainer whose optimizer may be an ARSAM, which an ordinary Trainer steps without a closure: an error when due.

    An ascent runs all batches of an accumulated step again, in one second pass; their inputs are held until then. The
    loss that is logged is that of the first pass. The Trainer clips (``max_grad_norm``, 1.0 by default) the gradient
    that goes into ARSAM. To clip what the update reads, with the PSF mixed in, set it to 0 and give ``ARSAM(..., clip=1.0)``.

    Under fp16, accelerate takes a step that overflowed for a step done, as with all optimizers that unscale by themselves:
    the weights stay as they are, the learning rate moves on.

    Example:
        >>> optimizer = ARSAM(torch.optim.AdamW(model.parameters(), lr=5e-5), model)
        >>> SharpnessAwareTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: list[tuple[Any, Any]] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch and, after the last batch of a step, the second pass if it is due."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        arsam: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if not isinstance(arsam, ARSAM):
            return loss
        self._batches.append((inputs, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return loss
        batches, self._batches = self._batches, []
        if arsam.due:
            with arsam.perturb(self.accelerator.scaler):  # the Trainer unscales, if only to log the norm
                for left, (some, count) in zip(reversed(range(len(batches))), batches, strict=True):
                    with self.accelerator.no_sync(model) if left else nullcontext():
                        super().training_step(model, some, count)
        return loss
