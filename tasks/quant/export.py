"""A fake-quantized model as an ONNX file whose integer kernels run: QuantizeLinear / DequantizeLinear, packed weights.

The steps, each a function: `_frozen` puts codes in the place of weights; torch's exporter translates two operators of our
own to ONNX's; then, on the graph, `absorb_batch_norm` moves BatchNorm into the weights' step sizes and the bias, exactly;
`edges.quantize_edges` adds 8-bit pairs where a value would stay float between two integer kernels (residual additions,
pooling), with ranges measured on a few batches; and `graph.pack` stores codes in 2 or 4 bits, unpacked by what ONNX
Runtime folds when it loads the file.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import opset21
from torch import Tensor, nn

from tasks import folder
from tasks.quant.edges import quantize_edges
from tasks.quant.graph import absorb_batch_norm, clip_codes, hold_biases, pack, pool_globally, quantize_gemms
from tasks.quant.prepare import QuantLayer, replaced
from tasks.quant.quantizer import Quantizer
from tasks.quant.runtime import INPUT, OUTPUT
from tasks.quant.targets import TARGETS, Target

op: Any = opset21  # its stubs know tensors only, and these functions are traced


@torch.library.custom_op("arsam::quantize_input", mutates_args=())
def _quantize_input(x: Tensor, scale: Tensor, zero: int, low: int, high: int, clip_codes: bool) -> Tensor:
    """Codes low ... high of uint8, or of int8 if some are negative, zero the code of 0, and back."""
    return ((x / scale).round() + zero).clamp(low, high).sub(zero) * scale


@_quantize_input.register_fake
def _(x: Tensor, scale: Tensor, zero: int, low: int, high: int, clip_codes: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("arsam::weight_of_codes", mutates_args=())
def _weight_of_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """int8 codes times the step size of their output channel."""
    return codes.float() * scale.view(-1, *[1] * (codes.dim() - 1))


@_weight_of_codes.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(codes.shape)


def _input_to_onnx(x: Any, scale: Any, zero: int, low: int, high: int, clip_codes: bool) -> Any:
    kind = np.int8 if low < 0 else np.uint8

    def code(value: int) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, kind)))

    fewer = (low, high) != (np.iinfo(kind).min, np.iinfo(kind).max)
    if fewer and not clip_codes:
        ends = [op.Mul(scale, op.Constant(value_float=float(end - zero))) for end in (low, high)]
        x = op.Clip(x, *ends)
    codes = op.QuantizeLinear(x, scale, code(zero))
    if fewer and clip_codes:
        codes = op.Clip(codes, code(low), code(high))
    return op.DequantizeLinear(codes, scale, code(zero))


def _weight_to_onnx(codes: Any, scale: Any) -> Any:
    return op.DequantizeLinear(codes, scale, axis=0)


class _Input(nn.Module):
    """An input quantizer as it is exported."""

    def __init__(self, quantizer: Quantizer, target: Target) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.step.float().reshape(()))
        # Signed codes move up by 128, the middle of uint8, where the target wants that.
        shift = 128 if quantizer.signed and not target.signed else 0
        self.zero = shift + int(quantizer.zero_point)
        self.low, self.high = quantizer.low + shift, quantizer.high + shift
        self.clip_codes = target.codes_clipped

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized input."""
        return torch.ops.arsam.quantize_input(x, self.scale, self.zero, self.low, self.high, self.clip_codes)


class _Weight(nn.Module):
    """A weight quantizer as it is exported: the codes themselves."""

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.register_buffer("codes", quantizer.codes(weight).to(torch.int8))
        self.register_buffer("scale", quantizer.step.float())

    def forward(self, _: Tensor) -> Tensor:
        """The weight that the codes stand for."""
        return torch.ops.arsam.weight_of_codes(self.codes, self.scale)


def export(
    model: nn.Module,
    path: Path,
    batches: Iterable[NDArray[np.float32]],
    *,
    about: Mapping[str, Any] | None = None,
    target: str = "ort",
) -> None:
    """Write a model, fake-quantized or float, as an ONNX file with a free batch size.

    Args:
        model: prepared and calibrated, or float.
        path: of the file.
        batches: inputs [B, 3, h, w] from which the ranges of 8-bit edges are measured; one for a float model.
        about: how inputs are made, what outputs are called: the file's metadata, each value as JSON.
        target: the run time, one of `targets.TARGETS`.

    Raises:
        ValueError: a quantizer is not initialised.
    """
    batches, aim = list(batches), TARGETS[target]
    frozen = _frozen(model, aim)
    bits = {f"{name}.codes": module.bits for name, module in frozen.named_modules() if isinstance(module, _Weight)}
    example = torch.from_numpy(batches[0][:2])
    translation = {
        torch.ops.arsam.quantize_input.default: _input_to_onnx,
        torch.ops.arsam.weight_of_codes.default: _weight_to_onnx,
    }
    with warnings.catch_warnings(), torch.no_grad():  # with gradients, fused attention has a layout that cannot be exported
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            frozen,
            (example,),
            dynamo=True,
            opset_version=21,
            custom_translation_table=translation,
            dynamic_shapes=({0: "batch"},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    onnx_model = program.model
    graph = onnx_model.graph
    if bits:
        absorb_batch_norm(graph, bits, aim.edge)
        hold_biases(graph, bits, aim.edge)
        if aim.codes_clipped:
            clip_codes(graph)
        quantize_edges(onnx_model, batches, signed=aim.signed)
        pool_globally(graph)
        pack(graph, bits, aim.edge, packed=aim.packed)
        if aim.whole_biases:
            quantize_gemms(graph)
        if min(bits.values()) == 2 and aim.packed:
            onnx_model.graph.opset_imports[""] = 25  # the first with 2-bit integers
            onnx_model.ir_version = 13
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    _leave_out_origins(onnx_model)
    onnx_model.metadata_props.update({key: json.dumps(value) for key, value in (about or {}).items()})
    ir.save(onnx_model, folder.fresh(path))


def _leave_out_origins(model: ir.Model) -> None:
    """The exporter's notes on each node: source lines and folders of this machine, a tenth to a third of a small file."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None


@torch.no_grad()
def _frozen(model: nn.Module, target: Target) -> nn.Module:
    """A copy in evaluation mode whose quantizers are those of the file; a layer that is never called is float in it too."""
    model = copy.deepcopy(model).eval().cpu()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLayer)}
    if layers and not any(layer.input_quantizer.initialised for layer in layers.values()):
        raise ValueError(f"{next(iter(layers))}: a quantizer has no step size yet; calibrate the model, or train a step")
    for layer in layers.values():
        if layer.input_quantizer.initialised:
            layer.weight_quantizer = _Weight(layer.weight_quantizer, layer.standardised_weight())  # type: ignore[assignment]
            layer.input_quantizer = _Input(layer.input_quantizer, target)  # type: ignore[assignment]
    # Models that read a layer's weight instead of calling the layer (BEiT's queries, keys and values).
    return replaced(model, {layer: layer.layer for layer in layers.values() if isinstance(layer.input_quantizer, Quantizer)})
