"""From a float model to a fake-quantized one and back: layers are wrapped, found by their class, told apart by their name.

Every function returns a new model and leaves its argument as it was, so that the float model can be the teacher.
"""

from __future__ import annotations

import copy
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
from torch.autograd.graph import saved_tensors_hooks

from tasks.quant.quantizer import Quantizer

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


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
            return self.call(x, weight)

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own forward with another weight, nothing quantized."""
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
    return [{"params": weights}, {"params": list(own), "sam_rho": 0.0, "weight_decay": 0.0}]
