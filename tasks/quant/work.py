"""How much work a fake-quantized model does, and how much of it on quantized values."""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from tasks.quant.prepare import QuantLayer

_PRODUCTS = {
    "convolution": "convolution",
    "mm": "matrix product",
    "addmm": "matrix product",
    "bmm": "product of two activations",
    "baddbmm": "product of two activations",
}
_FLOAT = "normalisation, activation functions, softmax, pooling, additions and biases are computed in floating point"


class _Work(TorchDispatchMode):
    """Multiply-adds (times two) of a forward pass, by the innermost module: on quantized values, and not."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names
        self.modules = ModuleTracker()
        self.quantized = 0
        self.rest: dict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation in flop_registry:
            work = flop_registry[operation](*args, **(kwargs or {}), out_val=out)
            running = self.modules.parents
            if running & self.names:
                self.quantized += work
            else:
                self.rest[max(running - {"Global"}, key=len)][operation.__name__] += work
        return out


def not_quantized(model: nn.Module, inputs: Tensor) -> list[str]:
    """What of a prepared model's work is not done on quantized values: sentences for a report.

    Measured by a forward pass of a copy: so attention's matrix products are there, and layers whose weight is used
    without a call. Convolutions and matrix products are counted.

    Args:
        model: prepared; stays as it was.
        inputs: a batch; one image is enough.

    Returns:
        The share of all multiplications that is quantized, a sentence for each kind of module that multiplies floats,
        largest first, embeddings and recurrent layers, and what is float in every model.
    """
    model = copy.deepcopy(model).eval()
    root = type(model).__name__  # as the tracker names it
    names = {f"{root}.{name}" if name else root for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    work = _Work(names)
    # Fused attention, and fast paths for want of a gradient, would hide the products in operations that nobody counts.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), work.modules, work:
        model(inputs)
    total = work.quantized + sum(ops.total() for ops in work.rest.values())
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for name, ops in work.rest.items():
        kinds[re.sub(r"\b\d+\b", "*", name.removeprefix(root).removeprefix(".")) or root] += ops
    lines = [f"{work.quantized / max(total, 1):.2%} of the multiplications have both operands quantized"]
    for name, ops in sorted(kinds.items(), key=lambda kind: -kind[1].total()):
        what = ", ".join(sorted({_PRODUCTS.get(op, op) for op in ops}))
        lines.append(f"{name}: {what} in floating point, {ops.total() / total:.2%} of the multiplications")
    uncounted = [name for name, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag, nn.RNNBase))]
    return lines + [f"{name}: in floating point, and not among the multiplications" for name in uncounted] + [_FLOAT]


@torch.no_grad()
def bit_operations(model: nn.Module, image: Tensor, low_bit: bool) -> float:
    """Bit operations of the quantizable layers, sum over layers of multiplications x weight bits x input bits."""
    total = 0.0

    def count(layer: QuantLayer, _: Any, output: Tensor) -> None:
        nonlocal total
        weight: Any = layer.layer.weight
        channels = weight.shape[0]
        bits = layer.weight_quantizer.bits * layer.input_quantizer.bits if low_bit else 32 * 32
        total += output.numel() / channels * weight.numel() * bits

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, QuantLayer)]  # type: ignore[arg-type]
    try:
        model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def size_in_bits(model: nn.Module) -> int:
    """Of the weights, each stored in its bits, and of all other parameters in 32."""
    saved = sum(
        (32 - layer.weight_quantizer.bits) * layer.layer.weight.numel()  # type: ignore[union-attr, operator]
        for layer in model.modules()
        if isinstance(layer, QuantLayer)
    )
    return 32 * sum(p.numel() for p in model.parameters()) - saved
