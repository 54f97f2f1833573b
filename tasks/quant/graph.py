"""Passes on the ONNX graph of a fake-quantized model, which make its integer kernels run and its weights small."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import convenience

from tasks.quant.runtime import INPUT, session

_FUSED = ("Relu", "Clip")  # what an integer kernel does on the way out
_PASSING = ("MaxPool",)  # values go through unchanged
_LEADING = ("Add", *_PASSING, *_FUSED, "Concat", "GlobalAveragePool", "ReduceMean", "Reshape", "Flatten")  # stay integers


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value


def _numbers(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _input_step(node: ir.Node) -> float | None:
    """The step size of a node's input; None: it is float."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    step = _numbers(source.inputs[1]) if source is not None and source.op_type == "DequantizeLinear" else None
    return None if step is None else float(step)


def _replace_codes(graph: ir.Graph, unpacked: ir.Node, codes: NDArray[Any]) -> None:
    """Other codes for a weight, under the same name."""
    name = str(unpacked.inputs[0].name)  # type: ignore[union-attr]
    del graph.initializers[name]
    unpacked.replace_input_with(0, _constant(graph, name, codes))


def absorb_batch_norm(graph: ir.Graph, bits: dict[str, int]) -> None:
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
        gamma, beta, mean, variance = (_numbers(value).astype(np.float64) for value in norm.inputs[1:5])  # type: ignore[union-attr]
        codes, step = _numbers(unpacked.inputs[0]), _numbers(unpacked.inputs[1])
        assert codes is not None
        assert step is not None
        sigma = np.sqrt(variance + norm.attributes["epsilon"].as_float())
        width = bits[str(unpacked.inputs[0].name)]  # type: ignore[union-attr]
        if (of_input := _input_step(conv)) is not None:
            # A channel whose sums hardly ever move by one unit of the integers (its input is dead, say) has next to no sigma;
            # its unit would grow so coarse that the bias, a whole number of them, is lost. At most gamma / 8 is, like this.
            sigma = np.maximum(sigma, 4 / _spread(width) * of_input * step)
        factor = gamma / sigma
        if (negative := factor < 0).any():
            if (codes[negative] == -(2 ** (width - 1))).any():
                continue
            codes = codes.copy()
            codes[negative] = -codes[negative]
            _replace_codes(graph, unpacked, codes)
        bias = _numbers(conv.inputs[2]) if len(conv.inputs) > 2 else None
        bias = beta + ((0.0 if bias is None else bias) - mean) * factor
        step = np.maximum(step * np.abs(factor), np.finfo(np.float32).tiny).astype(np.float32)
        unpacked.replace_input_with(1, _constant(graph, f"{norm.name}.step", step))
        conv.resize_inputs(3)
        conv.replace_input_with(2, _constant(graph, f"{norm.name}.bias", bias.astype(np.float32)))
        convenience.replace_all_uses_with(norm.outputs[0], conv.outputs[0])
        graph.remove(norm, safe=True)


def hold_biases(graph: ir.Graph, bits: dict[str, int]) -> None:
    """Give every bias a unit of which it is less than 2^31.

    ONNX Runtime keeps a bias as int32 in units of the input's step size times the weight's. Where BatchNorm has all but
    switched a channel off, that unit is tiny and the bias would be cut off. What such a channel makes of its input is no
    more than a thousandth of the bias: its codes become 0, and the unit what the bias needs.
    """
    for node in graph:
        if node.op_type != "Conv" or len(node.inputs) < 3:
            continue
        unpacked = node.inputs[1].producer()  # type: ignore[union-attr]
        bias, of_input = _numbers(node.inputs[2]), _input_step(node)
        if unpacked is None or unpacked.op_type != "DequantizeLinear" or bias is None or of_input is None:
            continue
        codes, step = _numbers(unpacked.inputs[0]), _numbers(unpacked.inputs[1])
        if codes is None or step is None:
            continue
        width = bits[str(unpacked.inputs[0].name)]  # type: ignore[union-attr]
        least = (_spread(width) * np.abs(bias.astype(np.float64)) / (of_input * 2.0**30)).astype(np.float32)
        if (small := step < least).any():
            codes, step = codes.copy(), np.maximum(step, least)
            codes[small] = 0
            _replace_codes(graph, unpacked, codes)
            unpacked.replace_input_with(1, _constant(graph, f"{node.name}.held", step))


def clip_codes(graph: ir.Graph) -> None:
    """Clip(x, 0, c), then codes: the codes are clipped to round(c / s) instead, which is the same and fuses."""
    for node in [node for node in graph if node.op_type == "Clip"]:
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != "QuantizeLinear":
            continue
        after = [use.node for use in users[0].outputs[0].uses()]
        low, high = (_numbers(value) for value in node.inputs[1:3])
        step, zero = (_numbers(value) for value in users[0].inputs[1:3])
        if low is None or high is None or step is None or zero is None or low != 0 or zero != 0 or after[0].op_type != "Clip":
            continue
        most = _numbers(after[0].inputs[2])
        assert most is not None
        bound = np.array(min(int(most), round(float(high) / float(step))), np.uint8)
        after[0].replace_input_with(2, _constant(graph, f"{node.name}.codes", bound))
        convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
        graph.remove(node, safe=True)


def quantize_edges(model: ir.Model, batches: list[NDArray[np.float32]]) -> None:
    """An 8-bit pair behind every convolution, and addition or pooling on the way to one, whose value has other users too.

    Without it the integer kernels would hand each other floats, which costs more than the kernels save. Additions whose sum
    only goes on in float (a transformer's residuals) are left alone: there is no kernel to win and accuracy to lose.
    """
    graph = model.graph
    wanted: set[ir.Value] = set()  # values that an integer kernel takes, at once or after what integers can do
    for node in reversed(list(graph)):
        if node.op_type == "QuantizeLinear" or (node.op_type in _LEADING and not wanted.isdisjoint(node.outputs)):
            wanted.update(value for value in node.inputs if value is not None)
    edges: list[ir.Value] = []
    for node in graph:
        if node.op_type not in ("Conv", "Add", *_PASSING) or any(i is None or i.producer() is None for i in node.inputs[:1]):
            continue
        if node.op_type == "Add" and any(_numbers(value) is not None for value in node.inputs):
            continue  # a bias
        if node.op_type != "Conv" and node.outputs[0] not in wanted:
            continue
        value = node.outputs[0]
        users = [use.node for use in value.uses()]
        if len(users) == 1 and users[0].op_type in _FUSED:
            value = users[0].outputs[0]
            users = [use.node for use in value.uses()]
        if users and not (len(users) == 1 and users[0].op_type == "QuantizeLinear"):
            edges.append(value)
    ranges = _ranges(model, [str(value.name) for value in edges], batches)
    for value in edges:
        name, node = str(value.name), value.producer()
        assert node is not None
        low, high = (min(ranges[name][0], 0.0), max(ranges[name][1], 1e-6))
        step = np.float32((high - low) / 255)
        zero = np.uint8(np.clip(round(-low / float(step)), 0, 255))
        pair = _constant(graph, f"{name}.step", np.array(step)), _constant(graph, f"{name}.zero", np.array(zero))
        source = node.inputs[0].producer() if node.op_type in _PASSING else None  # type: ignore[union-attr]
        if source is not None and source.op_type == "DequantizeLinear":
            pair = (source.inputs[1], source.inputs[2])  # type: ignore[assignment]  # pooling keeps its input's codes
        users = list(value.uses())
        quantize = ir.Node("", "QuantizeLinear", [value, *pair], name=f"{name}.quantize")
        dequantize = ir.Node("", "DequantizeLinear", [quantize.outputs[0], *pair], name=f"{name}.dequantize")
        quantize.outputs[0].name, dequantize.outputs[0].name = f"{name}.codes", f"{name}.values"
        for user, place in users:
            user.replace_input_with(place, dequantize.outputs[0])
        graph.insert_after(node, [quantize, dequantize])


def _ranges(model: ir.Model, names: list[str], batches: list[NDArray[np.float32]]) -> dict[str, tuple[float, float]]:
    """Least and largest value of the named values over the batches."""
    if not names:
        return {}
    proto = ir.to_proto(model)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in known
    )
    run = session(proto.SerializeToString())
    extremes = []
    for batch in batches:
        values: Any = run.run(names, {INPUT: batch})
        extremes.append([(float(array.min()), float(array.max())) for array in values])
    table = np.array(extremes)
    return {name: (table[:, i, 0].min(), table[:, i, 1].max()) for i, name in enumerate(names)}


def _spread(bits: int) -> int:
    """By how much codes are multiplied, and their step size divided: up to the edge of 8 bits."""
    return 2 ** (8 - bits)


def pack(graph: ir.Graph, bits: dict[str, int]) -> None:
    """Store the codes of up to 4 bits in 4, of 2 bits in 2, unpacked by Cast, Mul and Cast; all spread over 8 bits.

    The integer kernels round a bias to the input's step size times the weight's: of spread 4-bit codes, a 16th of that.
    """
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        value = node.inputs[0]
        codes, step = _numbers(value), _numbers(node.inputs[1])
        if value is None or codes is None or step is None or bits.get(str(value.name), 8) == 8:
            continue
        name = str(value.name)
        width, factor = bits[name], _spread(bits[name])
        node.replace_input_with(1, _constant(graph, f"{name}.step", (step / factor).astype(np.float32)))
        if width > 4:
            node.replace_input_with(0, _constant(graph, f"{name}.spread", (codes.astype(np.int32) * factor).astype(np.int8)))
            continue
        packed = _constant(graph, f"{name}.packed", codes.astype(ml_dtypes.int2 if width == 2 else ml_dtypes.int4))
        times = _constant(graph, f"{name}.factor", np.array(factor, np.int32))
        wide = ir.Node("", "Cast", [packed], attributes=[ir.AttrInt64("to", ir.DataType.INT32)], name=f"{name}.wide")
        wide.outputs[0].name = f"{name}.as_int32"
        spread = ir.Node("", "Mul", [wide.outputs[0], times], name=f"{name}.spread")
        spread.outputs[0].name = f"{name}.times_factor"
        cast = ir.Node(
            "", "Cast", [spread.outputs[0]], attributes=[ir.AttrInt64("to", ir.DataType.INT8)], name=f"{name}.unpack"
        )
        cast.outputs[0].name = f"{name}.unpacked"
        graph.insert_before(node, [wide, spread, cast])
        node.replace_input_with(0, cast.outputs[0])
