"""What rounding has shifted, put right from a few pictures: BatchNorm's statistics, and biases.

Replacing the statistics by those of a few pictures would take these pictures for the whole world. Here the same pictures go
through the float model and through the quantized one, and only the difference between the two is added: what is peculiar
to the pictures is in both and cancels.

# x input of a BatchNorm, y output of a layer with a bias; f of the float model, q of the quantized one; per channel
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tasks.quant.calibrate import modes_kept, some
from tasks.quant.prepare import QuantLayer

_MOST = 4.0  # by how much a variance is changed at most: what asks for more is a channel that is all but switched off


@torch.no_grad()
def correct_statistics(model: nn.Module, reference: nn.Module, batches: Iterable[Tensor]) -> None:
    """Put statistics and biases right, in place.

    mean <- mean_f + E[x_q] - E[x_f]
    var <- var_f Var[x_q] / Var[x_f]
    bias <- bias + E[y_f] - E[y_q]

    Layer by layer: what comes before is corrected while its successors are measured. A module that is used several times has
    the average over its uses. BatchNorm is whatever normalises by running statistics, frozen ones too.

    Args:
        model: prepared and calibrated.
        reference: the float model that it was made of, with the same names.
        batches: inputs on the models' device; a hundred pictures are enough.

    Raises:
        ValueError: no batches.

    References:
        Bias correction: arXiv 1906.04721, section 4.2.
    """
    norms, layers = with_statistics(model), with_bias(model)
    twins: dict[str, Any] = dict(reference.named_modules())
    seen: dict[str, deque[tuple[Tensor, Tensor]]] = defaultdict(deque)  # of the float model on the batch, use by use
    sums: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0])  # of shifts, variances of q and f, inputs
    before = {n: (twins[n].running_mean.clone(), twins[n].running_var.clone()) for n in norms}

    def look(name: str, x: Tensor, linear: bool) -> None:
        seen[name].append(moments(x, linear))

    def norm_comes(name: str, x: Tensor) -> None:
        (mean_f, var_f), (mean_q, var_q) = seen[name].popleft(), moments(x, linear=False)
        for place, value in enumerate((mean_q - mean_f, var_q, var_f, 1)):
            sums[name][place] = sums[name][place] + len(x) * value
        set_statistics(norms[name], before[name], mean_q - mean_f, var_q, var_f)

    def layer_answers(name: str, y: Tensor) -> Tensor:
        linear = isinstance(layers[name].layer, nn.Linear)
        shift = seen[name].popleft()[0] - moments(y, linear)[0]
        sums[name][0] = sums[name][0] + len(y) * shift
        sums[name][3] += len(y)
        return y + (shift if linear else shift.view(-1, *[1] * (y.dim() - 2)))

    hooks: list[Any] = []
    for name in norms:
        twin: Any = twins[name]
        hooks.append(twin.register_forward_pre_hook(partial(lambda name, _, x: look(name, x[0], False), name)))
        hooks.append(norms[name].register_forward_pre_hook(partial(lambda name, _, x: norm_comes(name, x[0]), name)))
    for name, layer in layers.items():
        twin, linear = twins[name], isinstance(layer.layer, nn.Linear)
        hooks.append(twin.register_forward_hook(partial(lambda name, linear, _, x, y: look(name, y, linear), name, linear)))
        hooks.append(layer.register_forward_hook(partial(lambda name, _, x, y: layer_answers(name, y), name)))
    try:
        with modes_kept(model), modes_kept(reference):
            model.eval()
            reference.eval()
            for batch in some(batches):
                reference(batch)
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for name, (mean, variance) in before.items():
            set_statistics(
                norms[name], (mean, variance), *(torch.zeros_like(mean), torch.ones_like(mean), torch.ones_like(mean))
            )
    for name, total in sums.items():
        shift, var_q, var_f, count = total
        if name in norms:
            set_statistics(norms[name], before[name], shift / count, var_q, var_f)
        else:
            layers[name].layer.bias.add_(shift / count)  # type: ignore[union-attr, operator]


def with_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """What normalises by running statistics, by name."""
    names = ("running_mean", "running_var")
    return {n: m for n, m in model.named_modules() if all(isinstance(getattr(m, name, None), Tensor) for name in names)}


def with_bias(model: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers with a bias of their own, by name."""
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    return {n: m for n, m in found.items() if m.layer.bias is not None and owners[m.layer.bias] == 1}  # type: ignore[index]


def moments(x: Tensor, linear: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel: the last axis of a linear layer's output, else the second."""
    rows = (x if linear else x.movedim(1, -1)).flatten(0, -2).float()
    return rows.mean(0), rows.var(0, correction=0)


def set_statistics(norm: Any, before: tuple[Tensor, Tensor], shift: Tensor, var_q: Tensor, var_f: Tensor) -> None:
    """Statistics that were right for the float network, moved by a shift and a ratio of variances; in place."""
    tiny = torch.finfo(torch.float32).tiny
    norm.running_mean.copy_(before[0] + shift)
    norm.running_var.copy_(before[1] * ((var_q + tiny) / (var_f + tiny)).clamp(1 / _MOST, _MOST))


@torch.no_grad()
def distance(model: nn.Module, wanted: Iterable[tuple[Tensor, Tensor]]) -> float:
    """How far a model's outputs are from wanted ones: sum (y - t)^2 / sum t^2 over pairs of an input and its t."""
    error, size = 0.0, 0.0
    with modes_kept(model):
        model.eval()
        for x, target in wanted:
            error += float((model(x).float() - target).square().sum())
            size += float(target.square().sum())
    return error / max(size, 1e-30)
