"""What a fake-quantized model learns from a few batches without training: step sizes, and BatchNorm's statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from tasks.quant.prepare import QuantLayer
from tasks.quant.quantizer import Quantizer

PRIOR = 1024  # inputs that BatchNorm's statistics of training count for, beside those that are looked at
_SAMPLE = 512  # values of a layer's input that are kept of each of the batch's inputs, besides the batch's extremes


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], *, method: str = "mse", percentile: float = 99.99) -> None:
    """Set every quantizer's step size, sign and offset, in place, from what the float model's layers see.

    The model runs in evaluation mode with its quantizers off; modes and switches are then as they were. A layer that no
    batch reached keeps the input quantizer it had.

    Args:
        model: prepared.
        batches: inputs of the model, on its device; a few hundred images are enough.
        method: "mse", "percentile", "minmax" or "lsq", see `Quantizer.initialise`.
        percentile: 50 to 100, for that method.

    Raises:
        ValueError: the model is not prepared, there are no batches, or the method is unknown.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer: calibrate what `prepare` returns")
    seen: dict[nn.Module, list[Tensor]] = defaultdict(list)
    kept = 0

    def counted() -> Iterator[Tensor]:
        nonlocal kept
        for batch in some(batches):
            kept = _SAMPLE * len(batch)  # so that an input of a small batch weighs no more than another
            yield batch

    def look(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].float().flatten()
        if len(x) > kept:
            # The same places each time: layers that take the same values get the same step size, and share codes in the file.
            chosen = torch.randint(len(x), (kept,), generator=torch.Generator().manual_seed(len(seen[quantizer])))
            x = torch.cat([x[chosen.to(x.device)], torch.stack(x.aminmax())])
        seen[quantizer].append(x.cpu())

    run_in_float(model, counted(), [layer.input_quantizer.register_forward_pre_hook(look) for layer in layers])
    for layer in layers:
        layer.weight_quantizer.initialise(layer.standardised_weight(), method, percentile)
        if layer.input_quantizer in seen:
            layer.input_quantizer.initialise(torch.cat(seen[layer.input_quantizer]), method, percentile)


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor], *, prior: int = PRIOR) -> None:
    """Move BatchNorm's running statistics, in place, to the average over batches, without training.

    running_mean <- (prior running_mean + sum_t n_t mean_t) / (prior + sum_t n_t), n_t inputs in batch t; var likewise

    Training leaves the statistics of its last steps alone, of weights that have moved on. A few inputs are no better: they
    blend with what was there. All else runs in evaluation mode; modes and momentum are then as they were.

    Args:
        model: any.
        batches: inputs of the model, on its device; of any sizes.
        prior: inputs that the old statistics count for; 0 forgets them.

    Raises:
        ValueError: no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    seen = prior
    with modes_kept(model):
        try:
            model.eval()
            for batch in some(batches):
                seen += len(batch)
                for norm in norms:
                    norm.momentum = len(batch) / seen
                    norm.training = True
                model(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def modes_kept(model: nn.Module) -> Generator[None]:
    """Training and evaluation modes are on exit as on entry, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def some(batches: Iterable[Tensor]) -> Iterable[Tensor]:
    """The batches, of which there must be one."""
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("batches is empty: at least one batch is needed (a generator can be used only once)")
    return chain([first], iterator)


def run_in_float(model: nn.Module, batches: Iterable[Tensor], hooks: list[Any]) -> None:
    """Run a prepared model with its quantizers off, in evaluation mode, for hooks that look; they are removed afterwards.

    Raises:
        ValueError: no batches.
    """
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    switches = [q.enabled for q in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        with modes_kept(model):
            model.eval()
            for batch in some(batches):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for quantizer, enabled in zip(quantizers, switches, strict=True):
            quantizer.enabled = enabled
