"""From a float model to a fake-quantized one and back: layers are wrapped, found by their class, told apart by their name.

Every function returns a new model and leaves its argument as it was, so that the float model can be the teacher.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from tasks.quant.quantizer import Quantizer

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_PRODUCTS = {
    "convolution": "convolution",
    "mm": "matrix product",
    "addmm": "matrix product",
    "bmm": "product of two activations",
    "baddbmm": "product of two activations",
}
_FLOAT = "normalisation, activation functions, softmax, pooling, additions and biases are computed in floating point"


class QuantLayer(nn.Module):
    """A convolution or linear layer whose input and weight are fake-quantized; else it runs as its class says.

    The input has one step size, and codes on both sides of 0 if its values are; the weight has signed codes and a step
    size per output channel. What the wrapper does not know (``weight``, ``in_features``, ...) is the layer's.

    Args:
        layer: of a class in LAYERS.
        weight_bits: 2 to 8.
        act_bits: 2 to 8.
        asymmetric: an offset is learned for the input (LSQ+).
    """

    def __init__(self, layer: nn.Module, weight_bits: int, act_bits: int, asymmetric: bool = False) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.layer = layer
        self.input_quantizer = Quantizer(act_bits, signed=None, asymmetric=asymmetric).to(weight.device)
        self.weight_quantizer = Quantizer(weight_bits, signed=True, channels=weight.shape[0]).to(weight.device)
        self.train(layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # not there yet, while unpickling
                raise
            return getattr(self.layer, name)

    @property
    def _standardises(self) -> bool:
        return isinstance(self.layer, STANDARDISED)

    def standardised_weight(self) -> Tensor:
        """The weight to be quantized: the layer's own, or what weight standardisation makes of it (arXiv 1903.10520)."""
        layer: Any = self.layer
        if not self._standardises:
            return layer.weight
        gain = (layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None
        flat = layer.weight.reshape(1, layer.out_channels, -1)
        return F.batch_norm(flat, None, None, gain, training=True, momentum=0.0, eps=layer.eps).view_as(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer on the quantized input with the quantized weight."""
        x = self.input_quantizer(x)
        weight = self.weight_quantizer(self.standardised_weight())
        with nullcontext() if torch.compiler.is_compiling() else self._requantized_for_backward(weight):
            return self._call(x, weight)

    def _call(self, x: Tensor, weight: Tensor) -> Tensor:
        layer: Any = self.layer
        if self._standardises:  # its own forward would standardise once more
            if getattr(layer, "same_pad", False):
                x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
            return layer._conv_forward(x, weight, layer.bias)
        # An instance attribute goes before a parameter, so the layer's own forward reads this one: its padding and casts
        # stay its own, at the price of a dictionary entry.
        vars(layer)["weight"] = weight
        try:
            return layer(x)
        finally:
            del vars(layer)["weight"]

    def _requantized_for_backward(self, weight: Tensor) -> saved_tensors_hooks:
        """Inside, autograd keeps a note in place of the quantized weight, and quantizes once more when it wants it.

        A rounding costs less than the memory: small feature maps are dwarfed by a second copy of all weights.
        """
        place = weight.data_ptr(), weight.numel()  # not the weight itself: autograd keeps this function too

        def pack(saved: Tensor) -> Any:
            return (saved.size(), saved.stride()) if (saved.data_ptr(), saved.numel()) == place else saved

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            with torch.no_grad():
                return self.weight_quantizer(self.standardised_weight()).as_strided(*packed)

        return saved_tensors_hooks(pack, unpack)


def prepare(
    model: nn.Module,
    *,
    weight_bits: int,
    act_bits: int,
    layers: Mapping[str, tuple[int, int] | None] | None = None,
    first_last_bits: int | None = 8,
    asymmetric: bool = False,
) -> nn.Module:
    """A copy of a model whose convolutions and linear layers are fake-quantized.

    The layers are the instances of nn.Conv1d, nn.Conv2d and nn.Linear, subclasses included, outside
    nn.MultiheadAttention, which never calls its own. What stays float is told by `not_quantized`. The first layer's input
    is the image: its step size stays as calibrated, all others are learned.

    Args:
        model: float.
        weight_bits: 2 to 8.
        act_bits: 2 to 8, of the layers' inputs.
        layers: name pattern (as of `fnmatch`: "blocks.*.mlp.*") to (weight_bits, act_bits), or to None for a layer that
            stays float. The first pattern that fits decides, before first_last_bits.
        first_last_bits: of weights and inputs in the first and the last layer by order of registration; None: as the rest.
        asymmetric: learn an offset for inputs (LSQ+).

    Returns:
        The fake-quantized copy, step sizes not yet set: calibrate, or let the first batch set them.

    Raises:
        ValueError: nothing to quantize, already prepared, a pattern that fits no layer, or bits out of range.
    """
    patterns = dict(layers or {})
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ValueError("the model is already prepared: prepare the float model, which `convert` gives back")
    model = copy.deepcopy(model)
    found = dict(_layers(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer to quantize: no {', '.join(c.__name__ for c in LAYERS)} in it")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            close = get_close_matches(pattern, found, n=3, cutoff=0.4) or list(found)[:3]
            raise ValueError(f"layers: no layer's name fits {pattern!r}; did you mean one like {', '.join(map(repr, close))}?")
    ends = {next(iter(found)), next(reversed(found))} if first_last_bits is not None else set[str]()
    wrapped: dict[nn.Module, QuantLayer] = {}
    for name, layer in found.items():
        bits = (first_last_bits, first_last_bits) if name in ends else (weight_bits, act_bits)
        bits = next((b for pattern, b in patterns.items() if fnmatchcase(name, pattern)), bits)
        if bits is not None:
            wrapped[layer] = QuantLayer(layer, *bits, asymmetric)  # type: ignore[arg-type]
    if (first := next(iter(found.values()))) in wrapped:
        # Learning it would take the gradient of the image, which nothing else needs: 7 % of a ResNet-18 step.
        wrapped[first].input_quantizer.requires_grad_(False)
    return replaced(model, wrapped)


def convert(model: nn.Module) -> nn.Module:
    """The float copy of a prepared model: the inverse of `prepare`, with the parameters as training left them."""
    model = copy.deepcopy(model)
    return replaced(model, {m: m.layer for m in model.modules() if isinstance(m, QuantLayer)})


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What can be wrapped, by order of registration, with its dotted name."""
    if isinstance(module, LAYERS):
        yield prefix, module
    elif not isinstance(module, nn.MultiheadAttention):
        for name, child in module.named_children():
            yield from _layers(child, f"{prefix}.{name}" if prefix else name)


def replaced(model: nn.Module, new: Mapping[Any, nn.Module]) -> nn.Module:
    """The model with modules exchanged, under every name they have."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the weights, and the step sizes and offsets with rho 0 and no weight decay.

    A perturbation is scaled to the weights, and would move a small step size by many times itself.
    """
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    own = dict.fromkeys(p for q in quantizers for p in q.parameters())
    weights = [p for p in model.parameters() if p not in own]
    return [{"params": weights}, {"params": list(own), "rho": 0.0, "weight_decay": 0.0}]


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


def canonicalise(model: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy of a float model with the same outputs and no negative BatchNorm gamma behind a convolution.

    Where gamma < 0, the channel's weights, bias, running mean and gamma change sign: BN(-x; -gamma, -mean) = BN(x; gamma,
    mean). Only where that is exact, bit for bit: the normalisation takes the convolution's own output, nothing else does,
    and neither is used twice. A gamma of zero stays zero.

    Args:
        model: float, before `prepare`.
        inputs: a batch; the convolutions and normalisations are paired by the autograd graph of its forward pass.

    Raises:
        ValueError: the model is prepared.
    """
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ValueError("the model is prepared: canonicalise the float model first, then prepare it")
    model = copy.deepcopy(model)
    probe = copy.deepcopy(model).eval().requires_grad_()
    names = {module: name for name, module in probe.named_modules()}
    made: dict[str, list[Node | None]] = defaultdict(list)
    taken: dict[str, list[Node | None]] = defaultdict(list)

    def left(module: nn.Module, args: Any, output: Tensor) -> None:
        made[names[module]].append(output.grad_fn)

    def entered(module: nn.Module, args: Any) -> None:
        taken[names[module]].append(args[0].grad_fn)

    for module in names:
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            module.register_forward_hook(left)
        elif isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(entered)
    with torch.enable_grad():
        outputs = [out.grad_fn for out in tree_leaves(probe(inputs)) if isinstance(out, Tensor)]
    uses = Counter(outputs)
    unseen, seen = list(uses), set(uses)
    while unseen:
        node = unseen.pop()
        following = [node for node, _ in node.next_functions] if node is not None else []
        uses.update(following)
        unseen += [node for node in dict.fromkeys(following) if node not in seen]
        seen.update(following)
    modules: dict[str, Any] = dict(model.named_modules())
    makers = {nodes[0]: modules[name] for name, nodes in made.items() if len(nodes) == 1 and uses[nodes[0]] == 1}
    owners = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    for name, nodes in taken.items():
        norm, conv = modules[name], makers.get(nodes[0])
        if conv is None or norm.weight is None or len(nodes) > 1:
            continue
        tensors = [conv.weight, norm.weight, *(t for t in (conv.bias, norm.running_mean) if t is not None)]
        if all(owners[t] <= 1 for t in tensors):
            with torch.no_grad():
                negative = norm.weight < 0
                for tensor in tensors:
                    tensor[negative] = -tensor[negative]
    return model
