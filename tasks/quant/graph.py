"""Passes on the ONNX graph of a fake-quantized model, which make its integer kernels run and its weights small."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import convenience


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """An array as an initializer of the graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value


def numbers(value: ir.Value | None) -> NDArray[Any] | None:
    """What a constant holds; None: it is no constant."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def input_step(node: ir.Node) -> float | None:
    """The step size of a node's input; None: it is float."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    step = numbers(source.inputs[1]) if source is not None and source.op_type == "DequantizeLinear" else None
    return None if step is None else float(step)


def _replace_codes(graph: ir.Graph, unpacked: ir.Node, codes: NDArray[Any]) -> None:
    """Other codes for a weight, under the same name."""
    name = str(unpacked.inputs[0].name)  # type: ignore[union-attr]
    del graph.initializers[name]
    unpacked.replace_input_with(0, constant(graph, name, codes))


def absorb_batch_norm(graph: ir.Graph, bits: dict[str, int], edge: int = 8) -> None:
    """BN(conv(x)) = conv'(x) with step sizes s gamma / sigma and bias beta + (b - mean) gamma / sigma: the codes stay.

    A channel with gamma < 0 changes the sign of its codes, where the most negative code, which has no opposite, does not
    occur; else the BatchNorm stays a float operation of its own.
    """
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        conv = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if conv is None or conv.op_type != "Conv" or len(conv.outputs[0].uses()) != 1:
            continue
        unpacked = conv.inputs[1].producer()  # type: ignore[union-attr]
        if unpacked is None or unpacked.op_type != "DequantizeLinear":
            continue
        gamma, beta, mean, variance = (numbers(value).astype(np.float64) for value in norm.inputs[1:5])  # type: ignore[union-attr]
        codes, step = numbers(unpacked.inputs[0]), numbers(unpacked.inputs[1])
        assert codes is not None
        assert step is not None
        sigma = np.sqrt(variance + norm.attributes["epsilon"].as_float())
        width = bits[str(unpacked.inputs[0].name)]  # type: ignore[union-attr]
        if (of_input := input_step(conv)) is not None:
            # A channel whose sums hardly ever move by one unit of the integers (its input is dead, say) has next to no sigma;
            # its unit would grow so coarse that the bias, a whole number of them, is lost. At most gamma / 8 is, like this.
            sigma = np.maximum(sigma, 4 / spread(width, edge) * of_input * step)
        factor = gamma / sigma
        if (negative := factor < 0).any():
            if (codes[negative] == -(2 ** (width - 1))).any():
                continue
            codes = codes.copy()
            codes[negative] = -codes[negative]
            _replace_codes(graph, unpacked, codes)
        bias = numbers(conv.inputs[2]) if len(conv.inputs) > 2 else None
        bias = beta + ((0.0 if bias is None else bias) - mean) * factor
        step = np.maximum(step * np.abs(factor), np.finfo(np.float32).tiny).astype(np.float32)
        unpacked.replace_input_with(1, constant(graph, f"{norm.name}.step", step))
        conv.resize_inputs(3)
        conv.replace_input_with(2, constant(graph, f"{norm.name}.bias", bias.astype(np.float32)))
        convenience.replace_all_uses_with(norm.outputs[0], conv.outputs[0])
        graph.remove(norm, safe=True)


def hold_biases(graph: ir.Graph, bits: dict[str, int], edge: int = 8) -> None:
    """Give every bias a unit of which it is less than 2^31.

    ONNX Runtime keeps a bias as int32 in units of the input's step size times the weight's. Where BatchNorm has all but
    switched a channel off, that unit is tiny and the bias would be cut off. What such a channel makes of its input is no
    more than a thousandth of the bias: its codes become 0, and the unit what the bias needs.
    """
    for node in graph:
        if node.op_type != "Conv" or len(node.inputs) < 3:
            continue
        unpacked = node.inputs[1].producer()  # type: ignore[union-attr]
        bias, of_input = numbers(node.inputs[2]), input_step(node)
        if unpacked is None or unpacked.op_type != "DequantizeLinear" or bias is None or of_input is None:
            continue
        codes, step = numbers(unpacked.inputs[0]), numbers(unpacked.inputs[1])
        if codes is None or step is None:
            continue
        width = bits[str(unpacked.inputs[0].name)]  # type: ignore[union-attr]
        least = (spread(width, edge) * np.abs(bias.astype(np.float64)) / (of_input * 2.0**30)).astype(np.float32)
        if (small := step < least).any():
            codes, step = codes.copy(), np.maximum(step, least)
            codes[small] = 0
            _replace_codes(graph, unpacked, codes)
            unpacked.replace_input_with(1, constant(graph, f"{node.name}.held", step))


def clip_codes(graph: ir.Graph) -> None:
    """Clip(x, 0, c), then codes: the codes are clipped to round(c / s) instead, which is the same and fuses."""
    for node in [node for node in graph if node.op_type == "Clip"]:
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != "QuantizeLinear":
            continue
        quantize = users[0]
        low, high = (numbers(value) for value in node.inputs[1:3])
        step, zero = (numbers(value) for value in quantize.inputs[1:3])
        if low is None or high is None or step is None or zero is None or low != 0 or zero != 0:
            continue
        bound = np.array(min(255, round(float(high) / float(step))), np.uint8)
        after = next(iter(quantize.outputs[0].uses())).node
        if after.op_type == "Clip":
            most = numbers(after.inputs[2])
            assert most is not None
            after.replace_input_with(2, constant(graph, f"{node.name}.codes", np.minimum(bound, most.astype(np.uint8))))
        elif bound < 255:
            limits = [constant(graph, f"{node.name}.{name}", limit) for name, limit in (("low", zero), ("codes", bound))]
            clip = ir.Node("", "Clip", [quantize.outputs[0], *limits], name=f"{node.name}.clip")
            clip.outputs[0].name = f"{node.name}.clipped"
            for user, place in [use for use in quantize.outputs[0].uses() if use.node is not clip]:
                user.replace_input_with(place, clip.outputs[0])
            graph.insert_after(quantize, clip)
        convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
        graph.remove(node, safe=True)


def pool_globally(graph: ir.Graph) -> None:
    """A mean of quantized values over height and width as the pooling that it is, which ONNX Runtime computes on integers."""
    for node in [node for node in graph if node.op_type == "ReduceMean"]:
        value, axes = node.inputs[0], numbers(node.inputs[1]) if len(node.inputs) > 1 else None
        if value is None or value.shape is None or axes is None or len(value.shape) != 4:
            continue
        if sorted(int(axis) % 4 for axis in axes) != [2, 3] or node.outputs[0].is_graph_output():
            continue
        source = value.producer()
        if source is None or source.op_type != "DequantizeLinear":
            continue  # of floats, a mean suits the layout of the integer kernels better
        pool = ir.Node("", "GlobalAveragePool", [value], name=f"{node.name}.pool")
        pool.outputs[0].name, pool.outputs[0].type = f"{node.name}.pooled", value.type
        new = [pool]
        if "keepdims" in node.attributes and node.attributes["keepdims"].as_int() == 0:
            places = constant(graph, f"{node.name}.places", np.array([2, 3], np.int64))
            new.append(ir.Node("", "Squeeze", [pool.outputs[0], places], name=f"{node.name}.squeeze"))
            new[1].outputs[0].name, new[1].outputs[0].type = f"{node.name}.squeezed", value.type
        graph.insert_after(node, new)
        convenience.replace_all_uses_with(node.outputs[0], new[-1].outputs[0])
        graph.remove(node, safe=True)


def quantize_gemms(graph: ir.Graph) -> None:
    """What ONNX Runtime wants before it computes a fully connected layer on integers.

    Written-out zero points of the weight, and a bias that is int32 in units of the input's step size times the weight's:
    convolutions need neither, a Gemm stays in floating point without.
    """
    for node in [node for node in graph if node.op_type == "Gemm"]:
        unpacked, of_input = node.inputs[1].producer(), input_step(node)  # type: ignore[union-attr]
        if of_input is None or unpacked is None or unpacked.op_type != "DequantizeLinear":
            continue
        step = numbers(unpacked.inputs[1])
        if step is None or len(unpacked.inputs) > 2:
            continue
        bias = numbers(node.inputs[2]) if len(node.inputs) > 2 else None
        if len(node.inputs) > 2 and (bias is None or step.shape != bias.shape):
            continue
        unpacked.resize_inputs(3)
        unpacked.replace_input_with(2, constant(graph, f"{node.name}.zeros", np.zeros(step.shape, np.int8)))
        if bias is None:
            continue
        unit = (step.astype(np.float64) * of_input).astype(np.float32)
        codes = np.round(bias / np.maximum(unit, np.finfo(np.float32).tiny).astype(np.float64))
        if np.abs(codes).max() >= 2**31:
            continue
        name = f"{node.name}.bias"
        pair = constant(graph, f"{name}.codes", codes.astype(np.int32)), constant(graph, f"{name}.unit", unit)
        whole = ir.Node("", "DequantizeLinear", pair, attributes=[ir.AttrInt64("axis", 0)], name=f"{name}.whole")
        whole.outputs[0].name = f"{name}.value"
        graph.insert_before(node, whole)
        node.replace_input_with(2, whole.outputs[0])


def spread(bits: int, edge: int = 8) -> int:
    """By how much codes are multiplied, and their step size divided: up to the edge of that many bits."""
    return 2 ** max(edge - bits, 0)


def pack(graph: ir.Graph, bits: dict[str, int], edge: int = 8, *, packed: bool = True) -> None:
    """Store the codes of up to 4 bits in 4, of 2 bits in 2; all spread over `edge` bits when they are unpacked.

    Args:
        graph: with weights behind DequantizeLinear.
        bits: of each weight, by the name of its codes.
        edge: bits that the kernel's weights may have, 7 or 8.
        packed: False stores all codes in 8 bits, for run times that know no shifts.

    The integer kernels round a bias to the input's step size times the weight's: of spread 4-bit codes, a 16th of that.
    Unpacking is a shift of 8-bit numbers, which ONNX Runtime does once, when it loads the file; a multiplication, which it has
    for int8 only by way of int32, would hold four times the memory of the 8-bit file on the way. The result is signed:
    kernels with unsigned weights are slower (a ResNet-18: 4.5 to 7.5 ms against 2.7).
    """
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        value = node.inputs[0]
        codes, step = numbers(value), numbers(node.inputs[1])
        if value is None or codes is None or step is None or bits.get(str(value.name), 8) == 8:
            continue
        name = str(value.name)
        width, factor = bits[name], spread(bits[name], edge)
        node.replace_input_with(1, constant(graph, f"{name}.step", (step / factor).astype(np.float32)))
        if width > 4 or not packed:
            node.replace_input_with(0, constant(graph, f"{name}.spread", (codes.astype(np.int32) * factor).astype(np.int8)))
            continue
        few = constant(graph, f"{name}.packed", codes.astype(ml_dtypes.int2 if width == 2 else ml_dtypes.int4))
        shift = constant(graph, f"{name}.shift", np.array(edge - width, np.uint8))
        # Two's complement wraps: -3 is 253 in uint8, 253 << 4 is 208 there, and 208 is -48 in int8.
        unsigned = _cast(few, ir.DataType.UINT8, f"{name}.unsigned")
        left = ir.AttrString("direction", "LEFT")
        shifted = ir.Node("", "BitShift", [unsigned.outputs[0], shift], attributes=[left], name=f"{name}.shifted")
        shifted.outputs[0].name = f"{name}.shifted"
        unpacked = _cast(shifted.outputs[0], ir.DataType.INT8, f"{name}.unpacked")
        graph.insert_before(node, [unsigned, shifted, unpacked])
        node.replace_input_with(0, unpacked.outputs[0])


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", to)], name=name)
    node.outputs[0].name = name
    return node
